"""examples/cascade.ipynb: whole, without outputs, and it runs."""

import ast
import json
import re

import PIL.Image
import pytest
from scripts import ROOT, run


FILE = ROOT / "examples" / "cascade.ipynb"
NOTEBOOK = json.loads(FILE.read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]

# In place of the values of the cell of parameters.
SMALL = {
    "CLASSES": ["toon-head", "miniavs"],
    "LEVELS": [0, 3000],
    "SOLVERS": {"unipc": 2, "ancestral": 2},
    "PICTURE": "picture.png",
    "FOLDER": None,
    "BASE_STEPS": 2,
    "SUPER_RES_STEPS": 2,
    "WORK": "runs",
}
# What the pictures of the cells show is looked at by the last lines.
LOOK = """
from collections import Counter

assert [image.size for image in images] == [(256, 256)] * 2
assert len(by_level) == 2 and by_level[0].tobytes() != by_level[1].tobytes()
assert Counter(len(found) for found in by_solver.values()) == {2: 2}
assert small.size == (16, 16) and follows.tobytes() != keeps.tobytes()
assert names == ["circle", "square", "triangle"]
assert [image.size for stage in output.stages.values() for image in stage] == [(16, 16)] * 3 + [(64, 64)] * 3
"""


def source(cell) -> str:
    return "".join(cell["source"])


def test_notebook_is_small_and_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and FILE.stat().st_size < 20_000
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def test_links_of_the_notebook_lead_somewhere():
    text = "".join(source(cell) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((FILE.parent / link).is_file() for link in links)


def test_parameters_are_those_that_the_test_makes_small():
    (parameters,) = (cell for cell in CODE if cell["metadata"].get("tags") == ["parameters"])
    assigned = {node.id for node in ast.walk(ast.parse(source(parameters))) if isinstance(node, ast.Name)}
    assert assigned == set(SMALL)


@pytest.mark.slow("samples a shipped cascade five ways, and trains two stages")
def test_notebook_runs(tmp_path):
    """Its cells, in order, in a process of their own."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    PIL.Image.new("RGB", (100, 70), "orange").save(tmp_path / "picture.png")
    program = [f"import os; os.chdir({str(tmp_path)!r})"]
    for cell in CODE:
        program.append(source(cell))
        if "tags" in cell["metadata"]:
            program += [f"{name} = {value!r}" for name, value in SMALL.items()]
    script = tmp_path / "cells.py"
    script.write_text("\n".join([*program, LOOK]))
    run(script)
