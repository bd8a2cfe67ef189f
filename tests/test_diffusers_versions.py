"""The lowest version of Diffusers that setup.cfg allows, and the newest that can be installed."""

import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parent.parent
FEW = ("test_solvers.py",)
MOST = ("test_unet.py", "test_pipelines.py", "test_foreign_schedulers.py", "test_conversion_unet_2d.py", "test_hub.py")


def allowed() -> Requirement:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return next(
        r for r in map(Requirement, setup["options"]["install_requires"].split("\n")[1:]) if r.name == "diffusers"
    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("end", ["lowest", "newest"])
@pytest.mark.parametrize(
    "tests",
    [FEW, pytest.param(MOST, marks=pytest.mark.slow("runs all that depends on Diffusers once more"))],
    ids=["few", "most"],
)
def test_both_ends_of_the_allowed_versions(tests, end, tmp_path):
    requirement = allowed()
    if end == "lowest":
        (lowest,) = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        requirement = f"diffusers=={lowest}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(requirement)]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"{requirement} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    (found,) = importlib.metadata.distributions(name="diffusers", path=[str(tmp_path)])
    if found.version == importlib.metadata.version("diffusers"):
        pytest.skip(f"all tests run with Diffusers {found.version}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    program = "import diffusers; print(diffusers.__version__)"
    version = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stdout
    assert version.strip() == found.version
    command = [sys.executable, "-m", "pytest", "-q", *(str(ROOT / "tests" / name) for name in tests)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"Diffusers {found.version}:\n{result.stdout[-4000:]}"
    assert re.search(r"\d+ passed|\[100%\]", result.stdout)
