"""Who imports whom, read from the source, and what `import cdm_diffusers` gives and needs."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cdm_diffusers


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cdm_diffusers"
SCRIPT_FOLDERS = ("training", "evaluation", "conversion", "examples", "benchmarks")

# What each part of the package may import of the others: downward only. Parts that are not here yet need a place.
MAY_IMPORT = {
    "_lazy": set(),
    "added": set(),
    "options": set(),
    "diffusion": set(),
    "draws": set(),
    "hub": set(),
    "locks": set(),
    "plain": set(),
    "files": {"locks"},
    "presets": {"added", "models"},
    "processes": {"files"},
    "registration": set(),
    "tables": set(),
    "model_cards": {"tables"},
    "publishing": {"hub", "model_cards", "options"},
    "models": {"_lazy", "added", "plain"},
    "schedulers": {"_lazy", "diffusion", "draws", "plain"},
    "losses": {"diffusion", "draws"},
    "conditioning_augmentation": {"diffusion", "draws"},
    "pipelines": {"_lazy", "added", "models", "plain", "schedulers", "diffusion", "hub", "publishing"},
    "data": {"draws", "files", "hub", "options"},
}
for part in (
    "training",
    "evaluation",
    "conversion",
    "studies",
    "commands",
    "app",
):  # each may import all of those before it
    MAY_IMPORT[part] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"commands"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SCRIPTS = sorted(path for folder in SCRIPT_FOLDERS for path in (ROOT / folder).glob("*.py"))


def relative_name(path):
    return str(path.relative_to(ROOT))


def imported_names(path):
    """Dotted names of everything that a file imports, relative imports resolved, imports inside functions included."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = list(package[: len(package) - node.level + 1]) if node.level else []
            origin += node.module.split(".") if node.module else []
            names |= {".".join([*origin, alias.name]) for alias in node.names}
    return names


def test_imports_are_found():
    """The reader itself: relative, absolute and nested imports."""
    names = imported_names(PACKAGE / "schedulers" / "ancestral.py")
    assert {"torch", "cdm_diffusers.diffusion.DiffusionTable", "diffusers.ConfigMixin"} <= names
    assert len(MODULES) > 15 and len(SCRIPTS) > 1


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_package_imports_downward_only(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {part} may import"
    for name in imported_names(path):
        if name.split(".")[0] == "cdm_diffusers":
            imported = name.split(".")[1]
            assert imported == part or imported in MAY_IMPORT[part], f"{relative_name(path)} imports {name}"


def test_diffusion_needs_only_torch():
    tops = {name.split(".")[0] for name in imported_names(PACKAGE / "diffusion.py")}
    assert tops - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", ["presets", "added", "models/arguments"])
def test_presets_need_nothing(name):
    """But what is listed here."""
    names = imported_names(PACKAGE / f"{name}.py")
    ours = {"cdm_diffusers.added.added", "cdm_diffusers.models.arguments.UNetArguments"}
    assert {name.split(".")[0] for name in names - ours} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SCRIPTS, ids=relative_name)
def test_scripts_import_no_scripts(path):
    """But benchmarks, which run as modules, each other."""
    scripts = {script.stem for script in SCRIPTS} | set(SCRIPT_FOLDERS) | {"tests"}
    names = {name for name in imported_names(path) if not name.startswith("benchmarks.")}
    assert not {name.split(".")[0] for name in names} & scripts


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=relative_name)
def test_nothing_imports_torchvision(path):
    assert "torchvision" not in {name.split(".")[0] for name in imported_names(path)}


def test_every_module_imports_without_torchvision():
    """As on machines where it is missing, whatever this one has."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    if importlib.util.find_spec("gradio") is None:  # the extra `app`
        modules.remove("cdm_diffusers.app.page")
    program = "import importlib, sys\n"
    program += "sys.modules['torchvision'] = None\n"
    program += f"for name in {modules}: importlib.import_module(name)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_public_names_exist():
    assert sorted(set(cdm_diffusers.__all__)) == sorted(cdm_diffusers.__all__)
    for name in cdm_diffusers.__all__:
        assert hasattr(cdm_diffusers, name), name
