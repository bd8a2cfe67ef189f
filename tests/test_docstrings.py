"""Docstrings of the library's core: all there, and their examples run."""

import ast
import inspect
import re
import textwrap

import PIL.Image
import pytest
import torch
from scripts import ROOT

from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    ContinuousDDPMScheduler,
    SuperResolutionPipeline,
)


PACKAGE = ROOT / "cdm_diffusers"
CORE = sorted(
    [
        *(path for room in ("pipelines", "schedulers", "models") for path in (PACKAGE / room).glob("*.py")),
        *(PACKAGE / f"{name}.py" for name in ("diffusion", "losses", "conditioning_augmentation", "registration")),
    ]
)


def undocumented(node, name):
    """Names of public definitions in a syntax tree that have no docstring."""
    if not ast.get_docstring(node):
        yield name
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{name}.{child.name}")
            elif not ast.get_docstring(child):
                yield f"{name}.{child.name}"


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_definition_has_a_docstring(path):
    assert not list(undocumented(ast.parse(path.read_text()), path.stem))


def run_example(documented) -> dict:
    (code,) = re.findall(r"Examples:\n\n\s*```python\n(.*?)```", inspect.getdoc(documented), re.DOTALL)
    names = {}
    exec(compile(textwrap.dedent(code), documented.__qualname__, "exec"), names)
    return names


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """Where the shipped checkpoints are and files can be written."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize(
    ("documented", "pictures"),
    [
        (CascadedDiffusionPipeline.__call__, {"ankle_boot.png": (32, 32), "ankle_boot_8x8.png": (8, 8)}),
        (SuperResolutionPipeline.__call__, {"ankle_boot_16x16.png": (16, 16)}),
    ],
)
def test_examples_of_pipelines(at_home, documented, pictures):
    run_example(documented)
    for name, size in pictures.items():
        with PIL.Image.open(at_home / name) as picture:
            assert picture.size == size and picture.getextrema()[1] > 100


@pytest.mark.parametrize(("documented", "size"), [(CascadedDDPMScheduler, 8), (ContinuousDDPMScheduler, 32)])
def test_examples_of_schedulers(at_home, documented, size):
    sample = run_example(documented)["sample"]
    assert sample.shape == (2, 1, size, size) and sample.abs().max() < 1.5
