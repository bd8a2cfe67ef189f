"""The site of `make docs`: links, tables of contents and references; that it builds without warnings."""

import ast
import configparser
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL import ImageChops
from scripts import run

import cdm_diffusers
import cdm_diffusers.conversion
from cdm_diffusers.commands.main import COMMANDS, resolve
from cdm_diffusers.presets import PRESETS
from cdm_diffusers.studies.experiments import EXPERIMENTS


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUTSIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/avatars/README.md"]
OUTSIDE += ["checkpoints/avatars-256/README.md", "checkpoints/avatars-256-distilled/README.md"]
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in OUTSIDE)])
FENCE = re.compile(r"^( *)```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
DIRECTIVE = re.compile(r"^\.\. (auto\w+):: ([\w.]+)$", re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchor(heading: str) -> str:
    """As code hosts and MyST make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.lower())
    return re.sub(r"[^\w\- ]", "", text.strip()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def looked_up(path: str):
    """What "module.Class.method" below the package is; an AttributeError where there is none."""
    found, seen = cdm_diffusers, "cdm_diffusers"
    for part in path.split("."):
        seen += f".{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(seen) if hasattr(found, "__path__") else getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"(https?|mailto):", link):
            continue
        file, _, place = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert target.suffix != ".md" or target in PAGES, f"{name_of(page)}: {link} is not a page of the site"
        assert not place or place in anchors(target), f"{name_of(page)}: {link}"


def test_every_page_is_in_one_table_of_contents():
    entries = Counter()
    for page in DOCS.rglob("*.md"):
        for contents in re.findall(r"^```\{toctree\}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            names = re.findall(r"^(?:[^:\n].* <)?([\w./-]+)>?$", contents, re.MULTILINE)
            entries.update((page.parent / f"{name}.md").resolve() for name in names)
    assert entries == Counter(page for page in PAGES if page != DOCS / "index.md")


def references() -> list[tuple[str, str, str]]:
    """(page, directive, what it documents) of the API pages."""
    pages = sorted((DOCS / "api").glob("*.md"))
    return [(page.stem, *found) for page in pages for found in DIRECTIVE.findall(page.read_text())]


@pytest.mark.parametrize(("page", "directive", "name"), references())
def test_references_exist(page, directive, name):
    found = looked_up(name.removeprefix("cdm_diffusers."))
    kinds = {"autoclass": lambda: isinstance(found, type), "autofunction": lambda: callable(found)}
    assert directive == "automodule" or kinds[directive]()
    assert found.__doc__


def test_every_exported_name_has_its_reference():
    exported = {f"cdm_diffusers.{name}" for name in cdm_diffusers.__all__}
    exported |= {f"cdm_diffusers.conversion.{name}" for name in cdm_diffusers.conversion.__all__}
    of_diffusers = {"cdm_diffusers.ModelMixin", "cdm_diffusers.SchedulerMixin"}
    in_modules = {"cdm_diffusers.PRESETS"}  # with `cdm_diffusers.presets`
    names = [name for _, _, name in references()]
    assert exported - of_diffusers - in_modules <= set(names)
    assert "cdm_diffusers.presets" in names and max(Counter(names).values()) == 1


PAPER = (DOCS / "paper.md").read_text()
CELLS = [cell for line in PAPER.split("\n") if line.startswith("|") for cell in re.split(r"(?<!\\)\|", line)]


def quoted(cells: list[str]) -> list[str]:
    return [token for cell in cells for token in re.findall(r"`([^`]+)`", cell)]


def test_the_paper_is_mapped_to_code_that_exists():
    parameters = re.findall(r"\(`(\w+)`\)", PAPER)  # of the function named before
    names = [name for name in quoted(CELLS) if not name.startswith("cdm ") and name not in parameters]
    assert len(names) > 60
    for name in names:
        assert name in PRESETS or looked_up(name) is not None
    for function, parameter in re.findall(r"`([\w.]+)` \(`(\w+)`\)", PAPER):
        assert parameter in inspect.signature(looked_up(function)).parameters


@pytest.mark.parametrize("command", sorted({token for token in quoted(CELLS) if token.startswith("cdm ")}))
def test_the_paper_is_mapped_to_commands_that_exist(command):
    words = command.split()[1:]
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    further = words[len(name.split()) :]
    options = {field.name for field in fields(resolve(COMMANDS[name].options))}
    assert {word.removeprefix("--") for word in further if word.startswith("--")} <= options
    if name == "reproduce":
        assert set(further) <= set(EXPERIMENTS)


WHOLE = {
    "Sections": [
        *("1", "2.1", "2.2", "2.3", "3", "3.1", "3.2", "3.3"),
        *("4", "4.1", "4.2", "4.3", "4.4", "4.5", "5", "A", "B"),
    ],
    "Equations": ["(1): the bound", "(2): p^s(x_0), truncated at s", "(3): the bound of a cascade"],
    "Algorithms": ["1: 1-7", "1: 8-15", "2: 2-5", "2: 6-9", "2: 10", "2: 13-15"],
    "Tables": ["1a, 1b", "2a", "2b", "3a", "3b", "4a", "4b", "5"],
    "Figures": ["1", "2, 5, 6", "3", "4", "7", "8", "9", "10", "11, 12", "13"],
}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_paper_is_mapped_whole(kind):
    """Everything that is numbered there has its row."""
    section = re.search(rf"^## {kind}\n(.*?)(?=^## |\Z)", PAPER, re.MULTILINE | re.DOTALL)[1]
    assert set(WHOLE[kind]) <= set(re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE))


def texts() -> list[str]:
    """All strings of the package; what is put into them is "?"."""
    found = []
    for file in (ROOT / "cdm_diffusers").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "?" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_are_those_of_the_package():
    page = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.+?)` \|", page[page.index("| message |") :], re.MULTILINE)
    written = texts()
    assert len(messages) > 10
    for message in messages:
        pattern = re.compile(".+".join(re.escape(part) for part in message.split("...")), re.DOTALL)
        assert any(pattern.search(text) for text in written), message


def test_the_builder_reads_the_same_pages():
    """`include_patterns` of docs/conf.py, which lists the pages outside docs/."""
    tree = ast.parse((DOCS / "conf.py").read_text())
    (patterns,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "include_patterns"
    )
    assert patterns == ["docs/**.md", *OUTSIDE]


FIGURES = sorted((DOCS / "figures").glob("*.png"))


@pytest.mark.parametrize("figure", FIGURES, ids=name_of)
def test_figures_are_small_and_shown(figure):
    assert figure.stat().st_size < 200_000
    assert any(f"](figures/{figure.name})" in page.read_text() for page in PAGES)


def test_make_test_installs_no_builder_of_sites():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    assert "sphinx" in extras["docs"] and "sphinx" not in extras["test"]
    targets = dict(re.findall(r"^(test|test-all): (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert "installed-docs" in targets["test-all"] and "installed-docs" not in targets["test"]


@pytest.mark.slow("samples for the figures, a minute and a half")
def test_figures_are_drawn_again(tmp_path):
    run("docs/figures/make_figures.py", tmp_path)
    drawn = {figure.name: figure for figure in tmp_path.glob("*.png")}
    assert {figure.name for figure in FIGURES} - set(drawn) == {"tutorial.png"}  # by the tutorial's own commands
    for name, figure in drawn.items():
        with PIL.Image.open(figure) as again, PIL.Image.open(DOCS / "figures" / name) as shown:
            assert again.size == shown.size
            assert np.asarray(ImageChops.difference(again.convert("RGB"), shown.convert("RGB"))).mean() < 1


@pytest.mark.slow("builds the site, half a minute")
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    rule = re.search(r"^docs:.*\n\t\$\(BIN\)/python (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    words = rule.replace("build/", f"{tmp_path}/").split()
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    index = (tmp_path / "docs" / "docs" / "index.html").read_text()
    assert "tutorial.html" in index and (tmp_path / "docs" / "index.html").is_file()
