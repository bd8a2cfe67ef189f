"""
The package as its users have it: built, installed into environments of its own outside the repository, and run there.

Such an environment holds the installed wheel, and of the packages that the tests run with only those that the wheel
asks for: a requirement that is missing in setup.cfg is missing there.
"""

import email
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image


ROOT = Path(__file__).parent.parent
PIPELINE = ROOT / "checkpoints" / "fashion-mnist-32"
NOT_SOURCES = (".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "node_modules", "runs")

pytestmark = [
    pytest.mark.slow("builds and installs the package, and runs it in processes that each import torch"),
    pytest.mark.timeout(1800),
]

OWN = ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS")  # of the process that tests


def run(*command: object, cwd: Path, **variables: str) -> str:
    """What a command prints, or the test's failure with its errors. The repository is not on its path."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"} | variables
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with a source distribution and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=source)
    shutil.rmtree(source)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, sdist, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


def requirements_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")


def required(requirements: Iterable[str], extras: Iterable[str] = ()) -> set[str]:
    """The names of all distributions that `requirements` ask for, here, and those ask for in turn."""
    names, waiting = set(), [(Requirement(text), frozenset(extras)) for text in requirements]
    while waiting:
        requirement, of_extras = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in (*of_extras, "")):
            continue
        found = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if found not in names:
            names.add(found)
            asked = importlib.metadata.requires(requirement.name) or []
            waiting += [(Requirement(text), frozenset(requirement.extras)) for text in asked]
    return {name for name, _ in names}


def environment(folder: Path, wheel: Path, *extras: str) -> Path:
    """Makes an environment that `pip install cdm_diffusers[extras]` would make; its Python."""
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    options = ["--quiet", "--no-deps", "--no-index"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    packages = folder / "packages"
    packages.mkdir()
    for name in required(requirements_of(wheel), extras):
        distribution = importlib.metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / entry).exists():
                (packages / entry).symlink_to(distribution.locate_file(entry))
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"{packages}\n")
    return python


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("core"), wheel)


@pytest.fixture(scope="module")
def train(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("train"), wheel, "train")


@pytest.fixture(scope="module")
def measure(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("eval"), wheel, "eval")


@pytest.fixture(scope="module")
def demo(wheel, tmp_path_factory) -> Path:
    pytest.importorskip("gradio", reason="gradio is not installed; the extra `app` has it")
    return environment(tmp_path_factory.mktemp("app"), wheel, "app")


def test_the_source_distribution_has_all_that_is_tracked(distributions, tmp_path):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        archive.extractall(tmp_path, filter="data")
    if (ROOT / ".git").exists():
        tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
        assert tracked - packed == set()
        besides = {name for name in packed - tracked if not name.startswith("cdm_diffusers.egg-info/")}
        assert besides == {"PKG-INFO"}
    (unpacked,) = tmp_path.iterdir()
    collected = run(sys.executable, "-m", "pytest", "--collect-only", "-q", cwd=unpacked, PYTHONPATH=str(unpacked))
    assert "tests/test_installed.py" in collected
    assert sdist.stat().st_size < 100e6  # what PyPI takes of one file; the shipped checkpoints, for the most part


def test_the_wheel_is_what_is_imported(core, tmp_path):
    program = "import cdm_diffusers; print(cdm_diffusers.__file__, cdm_diffusers.__version__)"
    file, version = run(core, "-c", program, cwd=tmp_path).split()
    package = Path(file).parent
    assert core.parent.parent in package.parents and ROOT not in package.parents
    assert (package / "py.typed").is_file() and (package / "conversion" / "imagenet_classes.json").is_file()
    assert f"cdm_diffusers-{version}.dist-info" in {entry.name for entry in package.parent.iterdir()}


def test_the_core_samples(core, tmp_path):
    """Without anything that only training or measuring needs."""
    program = f"""
import importlib.util
from cdm_diffusers import CascadedDiffusionPipeline

assert not any(map(importlib.util.find_spec, ("scipy", "matplotlib", "datasets", "transformers", "tensorboard")))
pipe = CascadedDiffusionPipeline.from_pretrained({str(PIPELINE)!r})
images = pipe(class_labels=["Ankle boot"], num_inference_steps=2).images
assert [image.size for image in images] == [(32, 32)]
"""
    run(core, "-c", program, cwd=tmp_path)


@pytest.mark.parametrize(
    ("extra", "rooms"),
    [
        ("core", ["models", "pipelines", "schedulers", "conversion", "evaluation.sample"]),
        ("core", [f"commands.{name}" for name in ("main", "config", "info", "pictures", "card")]),
        ("train", ["data", "training", "commands"]),
        ("measure", ["training", "evaluation", "conversion", "studies", "commands"]),
        ("demo", ["app"]),
    ],
)
def test_modules_import_with_their_extra(extra, rooms, request, tmp_path):
    """Every module of a room, with nothing but the core and the room's extra."""
    program = f"""
import importlib, pkgutil
import cdm_diffusers

for module in pkgutil.walk_packages(cdm_diffusers.__path__, "cdm_diffusers."):
    if module.name.startswith(tuple("cdm_diffusers." + room for room in {rooms!r})) and "__main__" not in module.name:
        importlib.import_module(module.name)
"""
    run(request.getfixturevalue(extra), "-c", program, cwd=tmp_path)


# The command. (One place.)


TRAINING = [
    *("--train_data_dir", "images", "--source_resolution", 32, "--num_channels", 3),
    *("--train_batch_size", 4, "--max_train_steps", 10, "--lr_warmup_steps", 1),
]


@pytest.fixture(scope="module")
def cascade(train, tmp_path_factory) -> Path:
    """A base and a super-resolution stage, trained for ten steps each by the installed command, and joined."""
    folder = tmp_path_factory.mktemp("cascade")
    generator = np.random.default_rng(0)
    for label, colour in (("cat", (200, 80, 20)), ("dog", (20, 80, 200))):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(generator.normal(colour, 20, size=(40, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{number}.png")
    options = [*TRAINING, "--validation_steps", 0]
    base = ["--preset", "fashion_mnist_8", "--output_dir", "base", *options]
    run(train, "-m", "cdm_diffusers", "train", "base", *base, cwd=folder)
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", 1, "-m", "cdm_diffusers"]
    super_res = ["--preset", "fashion_mnist_8_to_32", "--output_dir", "sr", *options]
    run(train, *launcher, "train", "sr", *super_res, cwd=folder)
    joined = ["--base", "base", "--super-res", "sr", "--output", "cascade"]
    run(train.with_name("cdm"), "assemble", *joined, cwd=folder)
    return folder / "cascade"


def test_what_was_trained_samples(cascade, core, tmp_path):
    cdm = core.with_name("cdm")
    assert "super_res_1" in run(cdm, "info", cascade, cwd=tmp_path)
    options = ["--class_labels", "dog", "--num_images_per_label", 2, "--num_inference_steps", 2]
    run(cdm, "sample", cascade, *options, "--output", "samples.png", cwd=tmp_path)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size[0] > 4 * 32
    options = ["--num_images", 2, "--num_inference_steps", 2, "--output_dir", "samples"]
    run(cdm, "sample-set", "--pipeline", cascade, *options, cwd=tmp_path)
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 2


def test_curves_go_to_weights_and_biases_offline(cascade, train, tmp_path):
    """With the newest wandb, which is nobody's requirement; its files lie in the run's folder."""
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "wandb", "wandb", cwd=tmp_path)
    options = [*TRAINING, "--report_to", "wandb", "--validation_steps", 5, "--validation_inference_steps", 2]
    base = ["--preset", "fashion_mnist_8", "--output_dir", tmp_path / "base", *options]
    variables = {"PYTHONPATH": str(tmp_path / "wandb"), "WANDB_MODE": "offline"}
    printed = run(train, "-m", "cdm_diffusers", "train", "base", *base, cwd=cascade.parent, **variables)
    assert f"Curves: wandb, with its files in {tmp_path}/base/logs" in printed
    (record,) = (tmp_path / "base" / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    for name in (b"train/loss", b"validation/sample_std", b"validation/samples"):
        assert name in record.read_bytes()


# Types, as those see them who import the package.
CONSUMER = """
from typing import assert_type

from diffusers import DPMSolverMultistepScheduler

from cdm_diffusers import (
    PRESETS,
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    CascadedDiffusionPipelineOutput,
    CascadedUNet2DModel,
    SuperResolutionPipeline,
    get_preset,
)
from cdm_diffusers.presets import StagePreset

preset = get_preset("imagenet_32")
assert_type(preset, StagePreset)
assert_type(preset.training.ema_decay, float)
assert_type(PRESETS["imagenet_32"].unet.block_out_channels, tuple[int, ...])
unet = CascadedUNet2DModel(sample_size=8, block_out_channels=(32,), attention_resolutions=(), num_attention_heads=1)
scheduler = CascadedDDPMScheduler(num_train_timesteps=20)
scheduler.set_timesteps(10, stop_at=5)
pipe = CascadedDiffusionPipeline(base_unet=unet, base_scheduler=scheduler)
pipe.base_scheduler = DPMSolverMultistepScheduler.from_config(pipe.base_scheduler.config)
output = pipe(class_labels=["Bag", 3], num_inference_steps={"base": 20}, return_dict=True)
cascade = CascadedDiffusionPipeline.from_pretrained("folder")
assert_type(cascade, CascadedDiffusionPipeline)
stage = SuperResolutionPipeline.from_pretrained("folder")
assert_type(stage, SuperResolutionPipeline)
"""


def test_types_are_clean(measure, tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    options = ["--python-executable", measure, "--cache-dir", tmp_path / "cache", "--strict"]
    options += ["--allow-untyped-calls"]  # Diffusers' own functions
    run(sys.executable, "-m", "mypy", *options, "consumer.py", cwd=tmp_path)
    mistake = 'from cdm_diffusers import get_preset\n\nget_preset("imagenet_32").unet.widths\n'
    (tmp_path / "mistake.py").write_text(mistake)
    command = [sys.executable, "-m", "mypy", *options, "mistake.py"]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert '"UNetArguments" has no attribute "widths"' in result.stdout
