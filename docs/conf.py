"""The site that `make docs` builds. Its source is the whole repository, so that links beyond docs/ work there too."""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cdm_diffusers  # noqa: E402


project = "cdm_diffusers"
author = "The cdm_diffusers contributors"
release = cdm_diffusers.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/avatars/README.md",
    "checkpoints/avatars-256/README.md",
    "checkpoints/avatars-256-distilled/README.md",
]
exclude_patterns = [".*", "build", "runs", "tests", "**/node_modules"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # links such as training.md#streaming, as on a code host

autodoc_typehints = "none"  # docstrings say types, with shapes and ranges
autodoc_member_order = "bysource"
default_role = "py:obj"  # `name` in a docstring: a link where there is something to link to, else code
napoleon_use_rtype = False

html_theme = "furo"
html_title = "cdm_diffusers"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_extra_path = ["site"]  # index.html, which leads to that of docs/


def as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are written as Diffusers' are, for its own builder; Sphinx reads reStructuredText."""
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", "\n".join(lines))  # links
    text = re.sub(r"^( *)```(\w+)\n(.*?)^ *```$", code_block, text, flags=re.MULTILINE | re.DOTALL)
    lines[:] = re.sub(r"(?<=^Raises:\n)(?: +.*\n?)+", hanging, text, flags=re.MULTILINE).split("\n")


def code_block(fence: re.Match) -> str:
    return f"{fence[1]}.. code-block:: {fence[2]}\n\n" + re.sub("^(?=.)", "    ", fence[3], flags=re.MULTILINE)


def hanging(entries: re.Match) -> str:
    """Entries begin with a backtick; lines that go on are indented, so that they are not taken for entries."""
    return re.sub("^ +(?=[^` ])", r"        ", entries[0], flags=re.MULTILINE)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # before napoleon's
