"""The training loop: exact resume after kills, atomic checkpoints, EMA, and what stops a run.

Every run is a process of its own, forked from a server that has imported the package once.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers.training_utils import EMAModel
from forkserver import FORKSERVER
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cdm_diffusers.data.sources import open_images
from cdm_diffusers.options import parse
from cdm_diffusers.pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from cdm_diffusers.presets import BlurAugmentationPreset, get_preset
from cdm_diffusers.training import cpu
from cdm_diffusers.training.checkpoints import checkpoints_in, read_checkpoint, rotate, step_of
from cdm_diffusers.training.config import TrainingConfig
from cdm_diffusers.training.ema import LerpEMAModel
from cdm_diffusers.training.export import check_inference_steps
from cdm_diffusers.training.loop import Trainer, train
from cdm_diffusers.training.resolve import (
    check_resumable,
    data_config,
    resolve_channels_last,
    resolve_preset,
    run_description,
)
from cdm_diffusers.training.stage import build_stage


CLASSES = ("bag", "boot", "coat")
IMAGES_PER_CLASS = 7
TINY = {
    "source_resolution": 8,
    "padding": 0,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "attention_resolutions": [0],  # none
    "attention_head_dim": 4,
    "norm_num_groups": 2,
    "lr_warmup_steps": 2,
    "validation_steps": 0,
    "report_to": "none",
    "logging_steps": 2,
}
BASE = TINY | {"preset": "fashion_mnist_8", "sample_size": 4}
SUPER_RES = TINY | {"preset": "fashion_mnist_8_to_16", "sample_size": 8, "low_res_size": 4}

# 21 images in batches of 4 are 5 batches an epoch: accumulation steps and checkpoints fall across its end.
EXACT = {
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "dropout": 0.1,
    "label_dropout": 0.2,
    "random_flip": True,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of small grey images, one sub-folder a class."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for index in range(IMAGES_PER_CLASS):
            pixels = generator.integers(60 * label, 60 * label + 120, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def train_here(options, super_resolution, before=None):
    """A run in this process; `before` prepares a fault. Returns how many processes accelerate sees."""
    return carry_out_here(partial(train, super_resolution=super_resolution), TrainingConfig(**options), before)


def carry_out_here(command, config, before=None):
    """As [`train_here`], of any command that trains a stage."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data loaders, in this process
    if before is not None:
        before()
    command(config)
    return PartialState().num_processes


def run(options, before=None, super_resolution=False):
    """A run in a process of its own; its exceptions are raised here."""
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:
        return pool.submit(train_here, options, super_resolution, before).result()


def weights(folder):
    """Everything that was trained, of a checkpoint folder."""
    state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    moments = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
    return [load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors"), moments]


def assert_same_run(output_dir, reference, step=6):
    for ours, theirs in zip(
        weights(output_dir / f"checkpoint-{step}"), weights(reference / f"checkpoint-{step}"), strict=True
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    final = "base_unet/diffusion_pytorch_model.safetensors"
    if (reference / final).exists():
        assert (output_dir / final).read_bytes() == (reference / final).read_bytes()


def trainer_of(options):
    """A super-resolution stage, ready to train in this process."""
    config = TrainingConfig(**options)
    preset = resolve_preset(config, super_resolution=True)
    preset = dataclasses.replace(preset, unet=dataclasses.replace(preset.unet, num_classes=len(CLASSES)))
    data = open_images(data_config(config, preset))
    resolved = run_description(config, preset, data.id2label, len(data.dataset), 1)
    return Trainer(config, preset, data, Accelerator(), resolved)


def gradients(options):
    """Of the first batch, for a network none of whose weights are zero."""
    torch.set_num_threads(1)
    trainer = trainer_of(options)
    for parameter in trainer.stage.unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.noise.start(trainer.step, 0)
    trainer.batch_loss(next(trainer.batches())).backward()
    return {name: parameter.grad for name, parameter in trainer.stage.unet.named_parameters()}


@pytest.mark.slow("Inductor compiles a network's forward and backward pass")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_network_has_the_same_gradients(images):
    """With layouts of its own choice, Inductor of torch 2.13 makes 66 of these 117 gradients zero on a CPU."""
    options = SUPER_RES | {"train_data_dir": str(images), "output_dir": "unused", "train_batch_size": 4}
    options |= {"block_out_channels": [8, 8], "num_channels": 3}
    with ProcessPoolExecutor(2, mp_context=FORKSERVER) as pool:
        eager, compiled = pool.map(gradients, [options, options | {"compile": True}])
    for name, gradient in eager.items():
        if name.endswith("to_k.bias"):  # attention's weights do not depend on it: its gradient is rounding
            continue
        assert (compiled[name] - gradient).norm() < 1e-4 * gradient.norm(), name


class OnOtherCpu:
    """Eight cores without instructions for bfloat16; what is logged goes to a file."""

    def __init__(self, log):
        self.log = log

    def __call__(self):
        cpu.available_cores, cpu.has_bfloat16 = lambda: 8, lambda: False
        logging.getLogger("cdm_diffusers").addHandler(logging.FileHandler(self.log))


def test_what_makes_a_cpu_slow_is_said(images, tmp_path):
    options = BASE | {"train_data_dir": str(images), "output_dir": str(tmp_path / "run"), "train_batch_size": 4}
    run(options | {"max_train_steps": 1, "mixed_precision": "bf16"}, OnOtherCpu(tmp_path / "log"))
    idle, bfloat16, *_ = (tmp_path / "log").read_text().splitlines()
    assert idle.startswith("1 x 1 threads") and "`accelerate launch --num_cpu_threads_per_process 8 ...`" in idle
    assert bfloat16.startswith("`mixed_precision` is 'bf16'") and "give 'no'" in bfloat16


@pytest.mark.parametrize(
    ("processes", "threads", "expected"), [(1, 8, None), (1, 3, 8), (2, 4, None), (2, 1, 4), (5, 1, None)]
)
def test_idle_cores(processes, threads, expected, monkeypatch):
    monkeypatch.setattr(cpu, "available_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sentences = list(cpu.slow_cpu(processes, "no"))
    assert len(sentences) == (expected is not None)
    assert all(f"--num_cpu_threads_per_process {expected} " in sentence for sentence in sentences)


def test_bfloat16_is_known_of_x86_only(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for machine, supported, expected in (("x86_64", False, False), ("AMD64", True, True), ("arm64", False, True)):
        monkeypatch.setattr(platform, "machine", lambda name=machine: name)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda is_supported=supported: is_supported)
        assert cpu.has_bfloat16() is expected


class Float16OnTheCpu:
    """What accelerate sets up for fp16 on a GPU. It leaves CPUs out; PyTorch's autocast and scaler do not."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self):
        initialise = Accelerator.__init__

        def initialise_with_scaler(accelerator, *args, **options):
            initialise(accelerator, *args, **options)
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)

        Accelerator.__init__ = initialise_with_scaler


@pytest.mark.parametrize(("precision", "before"), [("bf16", None), ("fp16", Float16OnTheCpu(2.0**10))])
def test_mixed_precision_rounds_activations_and_keeps_float32_weights(precision, before, images, tmp_path):
    """Four steps end near those of float32, not at them."""
    options = SUPER_RES | {"train_data_dir": str(images), "train_batch_size": 4, "max_train_steps": 4}
    run(options | {"output_dir": str(tmp_path / "no"), "mixed_precision": "no"}, super_resolution=True)
    run(options | {"output_dir": str(tmp_path / precision), "mixed_precision": precision}, before, True)
    exact, rounded = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("no", precision))
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
    difference = torch.cat([(rounded[name] - exact[name]).flatten() for name in exact])
    size = torch.cat([tensor.flatten() for tensor in exact.values()])
    assert 1e-6 * size.norm() < difference.norm() < 0.05 * size.norm()


def test_fp16_skips_overflowing_steps_and_resumes_with_its_scale(images, tmp_path):
    """Each step that overflows halves the scale, from 2**19 to 2**16: three steps of six, the third after resuming."""
    options = BASE | EXACT | {"train_data_dir": str(images), "mixed_precision": "fp16", "lr_scheduler": "constant"}
    overflowing = Float16OnTheCpu(2.0**19)
    run(options | {"output_dir": str(tmp_path / "unbroken")}, overflowing)
    checkpoint = tmp_path / "unbroken" / "checkpoint-6"
    assert torch.load(checkpoint / "scaler.pt", weights_only=True)["scale"] == 2**16
    states = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"].values()
    assert {state["step"].item() for state in states} == {3}

    broken = options | {"output_dir": str(tmp_path / "broken")}
    run(broken | {"max_train_steps": 2}, overflowing)
    run(broken | {"resume_from_checkpoint": "latest"}, overflowing)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")


def test_fp16_on_a_cpu_is_refused(images, tmp_path):
    options = BASE | {"train_data_dir": str(images), "output_dir": str(tmp_path / "run"), "mixed_precision": "fp16"}
    with pytest.raises(ValueError, match=r"`mixed_precision` is 'fp16', .* on CPUs: give 'bf16'"):
        run(options)
    assert not (tmp_path / "run").exists()


def assert_nothing_half_written(output_dir):
    """Whatever has a final name is complete."""
    for checkpoint in output_dir.glob("checkpoint-*"):
        assert len(weights(checkpoint)[0]) == len(weights(checkpoint)[1]) > 0
        assert json.loads((checkpoint / "progress.json").read_text())["step"] == int(checkpoint.name.split("-")[1])
    if (output_dir / "model_index.json").exists():
        CascadedDiffusionPipeline.from_pretrained(output_dir)


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """A run that nothing stopped."""
    output_dir = tmp_path_factory.mktemp("unbroken")
    run(BASE | EXACT | {"train_data_dir": str(images), "output_dir": str(output_dir)})
    return output_dir


class AtDiskCalls:
    """Calls `action(n)` before the n-th call of a function that changes the disk."""

    watched = ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (torch, "save"))

    def __init__(self, action):
        self.action, self.count, self.is_acting = action, 0, False

    def __call__(self):
        for module, name in self.watched:
            setattr(module, name, self.counting(getattr(module, name)))

    def counting(self, function):
        def wrapper(*args, **kwargs):
            if not self.is_acting:
                self.count, self.is_acting = self.count + 1, True
                self.action(self.count)
                self.is_acting = False
            return function(*args, **kwargs)

        return wrapper


class KillAt:
    def __init__(self, count):
        self.count = count

    def __call__(self, count):
        if count == self.count:
            os.kill(os.getpid(), signal.SIGKILL)


class Snapshot:
    def __init__(self, output_dir, snapshots):
        self.output_dir, self.snapshots = output_dir, snapshots

    def __call__(self, count):
        if self.output_dir.exists():
            shutil.copytree(self.output_dir, self.snapshots / str(count))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class KillAfter:
    """SIGKILL after some time, wherever the run is."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self):
        timer = threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()


@pytest.mark.parametrize(
    "kill", [AtDiskCalls(KillAt(29)), AtDiskCalls(KillAt(64)), AtDiskCalls(KillAt(84)), KillAfter(1.5)]
)
def test_killed_run_resumes_to_the_same_weights(kill, images, unbroken, tmp_path):
    options = BASE | EXACT | {"train_data_dir": str(images), "output_dir": str(tmp_path)}
    with contextlib.suppress(BrokenProcessPool):  # the timer may be too late
        run(options, kill)
        assert isinstance(kill, KillAfter)
    assert_nothing_half_written(tmp_path)
    run(options | {"resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path, unbroken)
    assert_nothing_half_written(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


def test_whatever_a_kill_leaves_is_complete(images, unbroken, tmp_path):
    """Snapshots of the disk before every call that changes it: all that SIGKILL inside a save can leave behind."""
    output_dir, snapshots = tmp_path / "run", tmp_path / "snapshots"
    options = BASE | EXACT | {"train_data_dir": str(images), "output_dir": str(output_dir)}
    run(options, AtDiskCalls(Snapshot(output_dir, snapshots)))
    checkpoints, last = {}, 0
    for snapshot in sorted(snapshots.iterdir(), key=lambda path: int(path.name)):
        saved = checkpoints_in(snapshot)
        for checkpoint in saved:
            if checkpoint.name not in checkpoints:
                assert_nothing_half_written(snapshot)
            values = contents(checkpoint)
            assert checkpoints.setdefault(checkpoint.name, values) == values
        if (snapshot / "model_index.json").exists():
            CascadedDiffusionPipeline.from_pretrained(snapshot)
        assert last <= (step_of(saved[-1]) if saved else 0)
        last = step_of(saved[-1]) if saved else 0
    assert last == 6
    assert_same_run(output_dir, unbroken)


def test_killed_stream_resumes_to_the_same_weights(images, tmp_path):
    options = BASE | EXACT | {"train_data_dir": str(images), "streaming": True}
    run(options | {"output_dir": str(tmp_path / "unbroken")})
    with pytest.raises(BrokenProcessPool):
        run(options | {"output_dir": str(tmp_path / "killed")}, AtDiskCalls(KillAt(40)))
    run(options | {"output_dir": str(tmp_path / "killed"), "resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def test_resuming_elsewhere_from_an_earlier_checkpoint(images, unbroken, tmp_path):
    options = BASE | EXACT | {"train_data_dir": str(images), "output_dir": str(tmp_path), "checkpointing_steps": 5}
    run(options | {"resume_from_checkpoint": str(unbroken / "checkpoint-4")})
    assert_same_run(tmp_path, unbroken)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_a_run_of_version_0_1_0_resumes_to_the_same_weights(images, tmp_path):
    """
    What that version saved after four of six steps, and what its last two made of it, on the same data. Its
    configuration lacks what came later, in presets too, and means the defaults.
    """
    earlier = Path(__file__).parent / "data" / "run-0.1.0"
    options = SUPER_RES | EXACT | {"train_data_dir": str(images), "output_dir": str(tmp_path)}
    resumed = options | {"resume_from_checkpoint": str(earlier / "checkpoint-4")}
    run(resumed, super_resolution=True)
    for name in ("model", "ema"):
        ours, theirs = (
            load_file(tmp_path / "checkpoint-6" / f"{name}.safetensors"),
            load_file(earlier / f"{name}.safetensors"),
        )
        assert ours.keys() == theirs.keys()
        for parameter in theirs:  # bit for bit on one kind of CPU; others round otherwise
            torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-5, atol=1e-6)
    saved = json.loads((tmp_path / "training_config.json").read_text())
    assert saved["augmentation"]["zero_level_probability"] is None
    with pytest.raises(ValueError, match=r"another run: augmentation.zero_level_probability \(None in .*, 0.1 now\)"):
        run(resumed | {"zero_level_probability": 0.1, "output_dir": str(tmp_path / "other")}, super_resolution=True)


CROPS = TINY | {
    "preset": "avatars_64_to_256",
    "sample_size": 8,
    "low_res_size": 4,
    "patch_size": 2,
    "crop_size": 4,
    "whole_image_fraction": 0.5,
    "layers_per_block": [1, 2],
}


def test_crops_then_whole_images_and_exact_resume(images, tmp_path):
    """Killed in the half of the steps that is on crops."""
    options = CROPS | EXACT | {"train_data_dir": str(images), "label_dropout": 0.0, "random_flip": False}
    run(options | {"output_dir": str(tmp_path / "unbroken")}, super_resolution=True)
    broken = options | {"output_dir": str(tmp_path / "broken")}
    with pytest.raises(BrokenProcessPool):
        run(broken, AtDiskCalls(KillAt(32)), super_resolution=True)
    assert [step_of(checkpoint) for checkpoint in checkpoints_in(tmp_path / "broken")] == [2]
    run(broken | {"resume_from_checkpoint": "latest"}, super_resolution=True)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    unet = SuperResolutionPipeline.from_pretrained(tmp_path / "unbroken").unet
    assert unet.config.layers_per_block == [1, 2] and unet.config.patch_size == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": 8}, "`crop_size` is 8; it must be smaller than `sample_size`, 8, and a multiple of 4"),
        ({"crop_size": 6}, "`crop_size` is 6; it must be smaller than `sample_size`, 8, and a multiple of 4"),
        ({"crop_size": 0, "whole_image_fraction": 0.5}, r"`whole_image_fraction` is 0.5 without a `crop_size`"),
        ({"whole_image_fraction": 2.0}, r"`whole_image_fraction` is 2.0; it must be between 0 and 1"),
        (
            {"preset": "fashion_mnist_8_to_16", "patch_size": 1},
            "`crop_size` is 4, but the network of .* has attention",
        ),
        ({"preset": "fashion_mnist_8", "low_res_size": None}, "`crop_size` is 4, but 'fashion_mnist_8' is a base"),
    ],
)
def test_crops_that_do_not_fit_are_refused(changes, message):
    options = CROPS | {"train_data_dir": "images", "output_dir": "run"} | changes
    with pytest.raises(ValueError, match=message):
        resolve_preset(TrainingConfig(**options), super_resolution=changes.get("preset") != "fashion_mnist_8")


SKIP = {"preset": "avatars_64_to_256", "train_data_dir": "images", "output_dir": "run", "low_res_skip": True}
ABOVE = SKIP | {"low_res_skip_threshold": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SKIP | {"prediction_type": "epsilon"}, "`low_res_skip` is True, but `prediction_type` is 'epsilon': give"),
        (SKIP | {"preset": "avatars_16"}, "`low_res_skip` is True, but 'avatars_16' is a base stage: leave it out"),
        (ABOVE, r"`low_res_skip_threshold` is 0\.1, below which a network learns nothing, .*: train with"),
        (
            ABOVE | {"pretrained_model_name_or_path": "x", "conditioning_augmentation": "gaussian"},
            r"`low_res_skip_threshold` is 0\.1, which would leave noise of the Gaussian conditioning augmentation",
        ),
    ],
)
def test_low_res_skip_where_it_is_of_no_use_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_preset(TrainingConfig(**options), super_resolution=options["preset"] != "avatars_16")


def test_low_res_skip_is_trained(images, tmp_path):
    """From nothing, where all that it makes at first is 0, and then with a threshold."""
    options = CROPS | EXACT | {"train_data_dir": str(images), "label_dropout": 0.0, "random_flip": False}
    options |= {"low_res_skip": True, "learning_rate": 0.01}
    run(options | {"output_dir": str(tmp_path / "skip")}, super_resolution=True)
    first = SuperResolutionPipeline.from_pretrained(tmp_path / "skip").unet
    assert first.config.low_res_skip and first.conv_out.weight.abs().max() > 0
    further = {"low_res_skip_threshold": 0.001, "pretrained_model_name_or_path": str(tmp_path / "skip")}
    run(options | further | {"output_dir": str(tmp_path / "above")}, super_resolution=True)
    second = SuperResolutionPipeline.from_pretrained(tmp_path / "above").unet
    assert second.config.low_res_skip_threshold == 0.001
    assert not torch.equal(first.conv_out.weight, second.conv_out.weight)
    plain = options | {"low_res_skip": None, "pretrained_model_name_or_path": str(tmp_path / "skip")}
    with pytest.raises(ValueError, match="is another network: its `low_res_skip` is True, here it is False"):
        run(plain | {"output_dir": str(tmp_path / "plain")}, super_resolution=True)


def test_a_resumed_run_keeps_its_memory_format(images, tmp_path):
    options = BASE | {"train_data_dir": str(images), "train_batch_size": 4, "max_train_steps": 4}
    options |= {"block_out_channels": [16, 16], "lr_scheduler": "constant", "checkpointing_steps": 2}
    whole, resumed = (options | {"output_dir": str(tmp_path / name)} for name in ("whole", "resumed"))
    run(whole | {"channels_last": True})
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run(resumed | {"resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", step=4)
    assert json.loads((tmp_path / "resumed" / "training_config.json").read_text())["run"]["channels_last"] is True


@pytest.mark.parametrize("super_resolution", [False, True])
def test_images_held_in_memory_train_to_the_same_weights(images, unbroken, tmp_path, super_resolution):
    """Base: averages of 4x4, up to their rounding. Super-resolution at the source resolution: to the bit."""
    options = (
        (SUPER_RES if super_resolution else BASE) | EXACT | {"train_data_dir": str(images), "hold_in_memory": True}
    )
    run(options | {"output_dir": str(tmp_path / "held")}, super_resolution=super_resolution)
    if super_resolution:
        run(options | {"output_dir": str(tmp_path / "read"), "hold_in_memory": False}, super_resolution=True)
        assert_same_run(tmp_path / "held", tmp_path / "read")
    else:
        held, read = (
            load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (tmp_path / "held", unbroken)
        )
        for name in read:
            torch.testing.assert_close(held[name], read[name], rtol=1e-4, atol=1e-5)


class InProcessGroup:
    """The environment that torchrun gives one of `size` processes; `before` prepares a fault of that one."""

    def __init__(self, rank, port, size, before=None):
        self.rank, self.port, self.size, self.before = rank, port, size, before

    def __call__(self):
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "WORLD_SIZE": str(self.size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        if self.before is not None:
            self.before()


def in_process_groups(size, before=None):
    """One for each of `size` processes of one run, all with the fault `before`, or each with its own."""
    faults = before if isinstance(before, tuple) else (before,) * size
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [InProcessGroup(rank, port, size, fault) for rank, fault in enumerate(faults)]


def run_in_processes(size, options, before=None, super_resolution=False):
    """A run in `size` processes, with the faults of [`in_process_groups`]; raises the first exception."""
    with ProcessPoolExecutor(size, mp_context=FORKSERVER) as pool:
        futures = [
            pool.submit(train_here, options, super_resolution, group) for group in in_process_groups(size, before)
        ]
        return [future.result() for future in futures]


def test_two_processes(images, tmp_path):
    options = BASE | EXACT | {"train_data_dir": str(images), "train_batch_size": 3, "checkpointing_steps": 3}
    options |= {"lr_scheduler": "linear", "learning_rate": 1e-3}
    whole, halved = (options | {"output_dir": str(tmp_path / name)} for name in ("whole", "halved"))
    assert run_in_processes(2, whole) == [2, 2]
    training = json.loads((tmp_path / "whole" / "training_config.json").read_text())["training"]
    assert training["num_processes"] == 2
    assert training["train_batch_size"] == 2 * 2 * 3
    # The learning rate falls once a step, not once a step and process: 3 of 4 steps after the warm-up are left.
    optimizer = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.bin", weights_only=True)
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(1e-3 * 3 / 4)

    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "halved" / "checkpoint-3")
    run_in_processes(2, halved | {"resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path / "halved", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# What stops a run, and what is then left


def test_resuming_another_architecture_names_the_fields(images, unbroken):
    before = weights(unbroken / "checkpoint-6")
    options = BASE | EXACT | {"train_data_dir": str(images), "output_dir": str(unbroken)}
    other = {"block_out_channels": [8, 8], "resume_from_checkpoint": "latest", "max_train_steps": 9}
    with pytest.raises(ValueError, match=r"unet.block_out_channels \(\[4, 8\] in the checkpoint, \[8, 8\] now\)\. "):
        run(options | other)
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run"):
        run(options)
    with pytest.raises(ValueError, match="not a checkpoint of this package"):
        run(options | {"resume_from_checkpoint": str(images)})
    with pytest.raises(ValueError, match="`max_train_steps` is 5"):
        run(options | {"resume_from_checkpoint": "latest", "max_train_steps": 5})
    for ours, theirs in zip(weights(unbroken / "checkpoint-6"), before, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.bin", "progress.json"])
def test_resuming_a_damaged_checkpoint(name, images, unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    content = (tmp_path / "checkpoint-4" / name).read_bytes()
    (tmp_path / "checkpoint-4" / name).write_bytes(content[: len(content) // 2])
    options = BASE | EXACT | {"train_data_dir": str(images), "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"checkpoint-4', which is incomplete or damaged"):
        run(options | {"resume_from_checkpoint": "latest"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": "4"}, "`step`: Input should be a valid integer"),
        ({"step": -1}, "`step`: Input should be greater than or equal to 0"),
        ({"epoch": None}, "`epoch`: Input should be a valid integer"),
        ({"loss": "low"}, "`loss`: Input should be a valid number"),
        ([], "Input should be an object"),
        ({}, "`epoch_batches`: Field required"),
    ],
)
def test_a_malformed_progress_file(change, problem, unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / "progress.json"
    progress = json.loads(file.read_text())
    assert read_checkpoint(tmp_path / "checkpoint-4")[1] == progress
    if not change:
        del progress["epoch_batches"]
    file.write_text(json.dumps(progress | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=rf"progress.json' was not written by training, or is damaged \({problem}"):
        read_checkpoint(tmp_path / "checkpoint-4")


def test_resuming_other_data_is_refused(images, unbroken, tmp_path):
    shutil.copytree(images, tmp_path / "fewer")
    (tmp_path / "fewer" / "boot" / "3.png").unlink()
    options = BASE | EXACT | {"train_data_dir": str(tmp_path / "fewer"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"data.num_examples \(21 in the checkpoint, 20 now\)\. "):
        run(options | {"resume_from_checkpoint": str(unbroken / "checkpoint-4")})


def diverge():
    """From step 6 on, the loss is NaN."""
    batch_loss = Trainer.batch_loss
    Trainer.batch_loss = lambda self, batch: batch_loss(self, batch) * (math.nan if self.step >= 5 else 1.0)


@pytest.mark.parametrize("logging_steps", [50, 3])
def test_divergence_stops_before_anything_is_saved(logging_steps, images, tmp_path):
    options = BASE | {"train_data_dir": str(images), "output_dir": str(tmp_path), "train_batch_size": 4}
    options |= {"max_train_steps": 12, "checkpointing_steps": 4, "logging_steps": logging_steps}
    last = 6 if logging_steps == 3 else 8
    message = f"steps 5 to {last} is NaN or infinite.*last good checkpoint is {tmp_path / 'checkpoint-4'}"
    with pytest.raises(RuntimeError, match=message):
        run(options, diverge)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "training_config.json"]
    assert all(tensor.isfinite().all() for part in weights(tmp_path / "checkpoint-4") for tensor in part.values())


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def fill_disk():
    def write_text(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    Path.write_text = write_text


class FailAfterStart:
    """`fault` strikes when the first checkpoint is about to be written."""

    def __init__(self, fault):
        self.fault = fault

    def __call__(self):
        save_checkpoint = Trainer.save_checkpoint

        def failing(trainer):
            self.fault()
            save_checkpoint(trainer)

        Trainer.save_checkpoint = failing


@pytest.mark.parametrize("fault", [limit_file_size, fill_disk])
def test_full_disk_keeps_the_last_checkpoint(fault, images, tmp_path):
    options = BASE | {"train_data_dir": str(images), "output_dir": str(tmp_path), "train_batch_size": 4}
    with pytest.raises(OSError, match=r"step 2 could not be saved .* There is no checkpoint yet") as refusal:
        run(options | {"max_train_steps": 2}, FailAfterStart(fault))
    assert refusal.value.errno in (errno.ENOSPC, errno.EFBIG) and str(tmp_path) in str(refusal.value)
    run(options | {"max_train_steps": 2})
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.name != "training_config.json" and path.is_file()
    }
    with pytest.raises(OSError, match=r"step 4 could not be saved .* last good checkpoint is .*checkpoint-2"):
        run(options | {"max_train_steps": 4, "resume_from_checkpoint": "latest"}, FailAfterStart(fault))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(tmp_path.glob(".tmp-*"))


def test_rotation_spares_the_newest_and_is_atomic(tmp_path, monkeypatch):
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path: seen.append(path.name))
    rotate(tmp_path, 2, newest=tmp_path / "checkpoint-10")
    assert seen == [".tmp-removed-checkpoint-2"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-12",
        "checkpoint-4",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


def test_ema_follows_its_recursion(images, tmp_path):
    options = BASE | {
        "train_data_dir": str(images),
        "train_batch_size": 4,
        "max_train_steps": 5,
        "checkpointing_steps": 1,
    }
    for name, warmup, decay in (
        ("warmup", True, lambda i: min(0.3, (1 + i) / (10 + i))),
        ("constant", False, lambda i: 0.3),
    ):
        folder = tmp_path / name
        run(options | {"output_dir": str(folder), "ema_decay": 0.3, "ema_warmup": warmup, "learning_rate": 0.01})
        expected = {}
        for step in range(1, 6):
            for key, value in load_file(folder / f"checkpoint-{step}" / "model.safetensors").items():
                share = decay(step - 1) if step > 1 else 0.0
                expected[key] = share * expected.get(key, 0.0) + (1 - share) * value.double()
        averages = load_file(folder / "checkpoint-5" / "ema.safetensors")
        assert averages.keys() == expected.keys()
        for key, value in averages.items():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-7)
        assert any(
            not torch.equal(load_file(folder / "checkpoint-5" / "model.safetensors")[k], v)
            for k, v in averages.items()
        )


@pytest.mark.parametrize("min_decay", [0.0, 0.999])
def test_ema_is_diffusers_to_the_bit(min_decay):
    """From the first step, whose weights are over 0.5, on sizes that leave something over beside whole vectors."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1,), (7,), (15,), (33,), (5, 3, 3, 3), (31, 7, 3, 3), (257, 129)]
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    parameters.append(torch.nn.Parameter(parameters[5].detach().to(memory_format=torch.channels_last)))
    ours, theirs = (
        kind(parameters, decay=0.999, min_decay=min_decay, foreach=True) for kind in (LerpEMAModel, EMAModel)
    )
    for _ in range(30):
        for parameter in parameters:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        ours.step(parameters)
        theirs.step(parameters)
        assert all(torch.equal(*pair) for pair in zip(ours.shadow_params, theirs.shadow_params, strict=True))
        assert ours.optimization_step == theirs.optimization_step


def prepared_batch(options, step=0):
    """What one micro-batch becomes: labels before and after, and all that loss and network are given."""
    trainer = trainer_of(options)
    seen = {}

    def loss(denoise, x_0, generator):
        seen["x_0"] = x_0
        trainer.unet = lambda sample, condition, **conditions: seen.update(conditions) or torch.nn.Identity()
        with contextlib.suppress(AttributeError):
            denoise(x_0, None)
        return x_0

    trainer.stage.loss = loss
    batch, trainer.step = next(trainer.batches()), step
    trainer.noise.start(trainer.step, 0)
    trainer.batch_loss(batch)
    return {"image": batch["image"], "label": batch["label"], **seen}


def test_batches_are_prepared_as_in_algorithm_1(images):
    options = SUPER_RES | {"train_data_dir": str(images), "output_dir": "unused", "train_batch_size": 21}
    options |= {"label_dropout": 0.5, "random_flip": True, "augmentation_level": 0}
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:
        batch = pool.submit(prepared_batch, options).result()
    images, x_0 = batch["image"] / 127.5 - 1, batch["x_0"]
    is_same = (x_0 == images).flatten(1).all(1)
    is_flipped = (x_0 == images.flip(-1)).flatten(1).all(1)
    assert (is_same ^ is_flipped).all()
    assert is_same.any() and is_flipped.any()
    # At s = 0 the low-resolution image is the area average of the very image that is the target.
    averaged = x_0.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3))
    torch.testing.assert_close(batch["low_res"], averaged)
    assert "augmentation_level" not in batch  # one fixed s is not an input
    is_null = batch["class_labels"] == 3
    assert is_null.any() and not is_null.all()
    assert torch.equal(batch["class_labels"][~is_null], batch["label"][~is_null])


@pytest.mark.parametrize(("step", "size"), [(0, 4), (2, 4), (3, 8), (5, 8)])
def test_crops_are_of_pairs_and_end_with_their_share_of_the_steps(images, step, size):
    options = CROPS | {"train_data_dir": str(images), "output_dir": "unused", "train_batch_size": 21}
    options |= {"conditioning_augmentation": "none", "max_train_steps": 6}
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:
        batch = pool.submit(prepared_batch, options, step).result()
    assert batch["x_0"].shape == (21, 3, size, size)
    averaged = batch["x_0"].unflatten(-1, (size // 2, 2)).unflatten(-3, (size // 2, 2)).mean((-1, -3))
    torch.testing.assert_close(batch["low_res"], averaged)


@pytest.mark.parametrize(
    ("report_to", "installed", "said"),
    [
        ("wandb", ["tensorboard"], "`report_to` is 'wandb', which is not installed: pip install wandb."),
        ("all", [], "`report_to` is 'all', but no tracker is installed: pip install tensorboard."),
        ("tensorbord", ["tensorboard"], "dvclive, swanlab; did you mean `--report_to tensorboard`?"),
        ("tensorboard,wandb", ["tensorboard", "wandb"], "it must be one of none, all, "),
    ],
)
def test_trackers_that_are_not_there_are_refused(images, tmp_path, monkeypatch, report_to, installed, said):
    monkeypatch.setattr("cdm_diffusers.training.trackers.get_available_trackers", lambda: installed)
    options = BASE | {"train_data_dir": str(images), "output_dir": str(tmp_path), "report_to": report_to}
    with pytest.raises(ValueError, match=re.escape(said)):
        train(TrainingConfig(**options), super_resolution=False)
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("preset", "options", "steps", "said"),
    [
        (
            "imagenet_64_to_256",
            SUPER_RES,
            50,
            "Stage `super_res`: A linear schedule of 50 steps has no",
        ),
        ("fashion_mnist_8", BASE, 5000, "Stage `base`: `num_inference_steps` is 5000; it must be at most 4000"),
    ],
)
def test_steps_that_no_validation_can_take_are_refused(images, tmp_path, preset, options, steps, said):
    """Before anything is trained that a validation would end."""
    options = options | {"train_data_dir": str(images), "output_dir": str(tmp_path), "preset": preset}
    config = TrainingConfig(**options | {"validation_steps": 2, "validation_inference_steps": steps})
    with pytest.raises(ValueError, match=re.escape(f"`validation_inference_steps` is {steps}: {said}")):
        train(config, super_resolution="low_res_size" in options)
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == []


def test_a_solver_takes_fewer_steps_than_its_schedule_has():
    """As in sampling: the last ones are where the cosine schedule has no signal."""
    preset = get_preset("fashion_mnist_8")
    preset = dataclasses.replace(preset, inference=dataclasses.replace(preset.inference, solver="ddim"))
    check_inference_steps(preset, 100)
    with pytest.raises(ValueError, match=r"`validation_inference_steps` is 3990: .* takes 3984 at most"):
        check_inference_steps(preset, 3990)


def test_super_resolution_run_ends_in_a_pipeline_with_card_and_curves(images, tmp_path):
    options = SUPER_RES | {"train_data_dir": str(images), "output_dir": str(tmp_path), "train_batch_size": 4}
    options |= {
        "max_train_steps": 4,
        "validation_steps": 2,
        "num_validation_images": 5,
        "validation_inference_steps": 2,
    }
    run(options | {"report_to": "tensorboard"}, super_resolution=True)

    pipeline = SuperResolutionPipeline.from_pretrained(tmp_path)
    averages = load_file(tmp_path / "checkpoint-4" / "ema.safetensors")
    assert all(torch.equal(value, averages[name]) for name, value in pipeline.unet.named_parameters())
    preset = get_preset("fashion_mnist_8_to_16")
    assert pipeline.config.id2label == dict(enumerate(CLASSES))
    assert pipeline.config.source_resolution == 8
    assert pipeline.config.default_num_inference_steps == preset.inference.num_inference_steps
    assert pipeline.config.default_augmentation_level == preset.inference.augmentation_level
    assert pipeline.noising_scheduler.config.num_train_timesteps == preset.augmentation.num_train_timesteps
    low_res = torch.rand(2, 1, 4, 4)
    assert pipeline(low_res, ["boot", "bag"], num_inference_steps=2, output_type="pt").images.shape == (2, 1, 8, 8)

    # four triples a row, the fifth in a second one
    assert Image.open(tmp_path / "samples" / "step-2.png").size == (12 * 64, 2 * 64)
    card = (tmp_path / "README.md").read_text()
    for part in ("library_name: diffusers", "![samples](samples.png)", "21 images", "| sample_mean | ", "| loss | "):
        assert part in card
    events = EventAccumulator(str(tmp_path / "logs" / "train")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert all(math.isfinite(event.value) for event in events.Scalars("validation/sample_std"))
    assert [event.step for event in events.Images("validation/samples")] == [2, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Options


def parsed(*arguments):
    return parse(TrainingConfig, list(arguments))


DATA = ("--dataset_name", "someone/something", "--output_dir", "somewhere")


def test_mixed_precision_is_the_option_else_the_launchers(monkeypatch):
    """`accelerate launch --mixed_precision bf16`, or its configuration, reaches scripts in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for options, expected in (((), "bf16"), (("--mixed_precision", "no"), "no")):
        resolved = resolve_preset(parsed("--preset", "fashion_mnist_8", *DATA, *options), super_resolution=False)
        assert resolved.training.mixed_precision == expected


def test_options_override_the_preset_only_when_given():
    preset = get_preset("fashion_mnist_8_to_16")
    assert resolve_preset(parsed("--preset", preset.name, *DATA), super_resolution=True) == preset

    options = ["--learning_rate", "0.1", "--random_flip", "false", "--label_dropout", "0.2", "--padding", "0"]
    options += ["--block_out_channels", "32", "64", "--num_attention_heads", "2", "--num_channels", "3"]
    options += ["--attention_resolutions", "8"]
    options += ["--prediction_type", "epsilon", "--augmentation_level", "7", "--train_batch_size", "6"]
    options += ["--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--low_res_size", "4"]
    resolved = resolve_preset(parsed("--preset", preset.name, *DATA, *options), super_resolution=True, num_processes=3)
    unet = {
        "block_out_channels": (32, 64),
        "attention_resolutions": (8,),
        "num_attention_heads": 2,
        "attention_head_dim": None,
        "in_channels": 3,
    }
    unet |= {"out_channels": 3, "null_class": True, "augmentation_level_embedding": False, "low_res_size": 4}
    training = {
        "learning_rate": 0.1,
        "random_flip": False,
        "label_dropout": 0.2,
        "train_batch_size": 36,
        "max_grad_norm": 0.5,
    }
    assert resolved == dataclasses.replace(
        preset,
        unet=dataclasses.replace(preset.unet, **unet),
        scheduler=dataclasses.replace(preset.scheduler, prediction_type="epsilon"),
        augmentation=dataclasses.replace(preset.augmentation, level=7, zero_level_probability=None),
        training=dataclasses.replace(preset.training, **training),
        inference=dataclasses.replace(preset.inference, augmentation_level=7),
        data=dataclasses.replace(preset.data, padding=0),
    )
    stage = build_stage(resolved)
    assert stage.augmentation.level == 7
    assert stage.unet.config.null_class


def test_another_conditioning_augmentation():
    """Any kind for any super-resolution stage; what the network and the recommended s then are follows."""

    def resolved(preset, *options):
        return resolve_preset(parsed("--preset", preset, *DATA, *options), super_resolution=True)

    blur = resolved("fashion_mnist_16_to_32", "--blur_sigma_range", "0.4", "1.0", "--blur_probability", "1")
    assert blur.augmentation == BlurAugmentationPreset(sigma_range=(0.4, 1.0), probability=1.0)
    noise = resolved("fashion_mnist_16_to_32", "--conditioning_augmentation", "gaussian")
    assert noise.augmentation == get_preset("imagenet_32_to_64").augmentation
    assert noise.unet.augmentation_level_embedding
    for kind, augmentation in (("blur", BlurAugmentationPreset()), ("none", None)):
        changed = resolved("fashion_mnist_8_to_16", "--conditioning_augmentation", kind)
        assert changed.augmentation == augmentation
        assert not changed.unet.augmentation_level_embedding and changed.inference.augmentation_level is None
        assert build_stage(changed).noising_scheduler is None
    fixed = resolved("avatars_16_to_64", "--augmentation_level", "100").augmentation
    assert get_preset("avatars_16_to_64").augmentation.zero_level_probability is not None
    assert (fixed.level, fixed.zero_level_probability) == (100, None)
    same = resolved("fashion_mnist_8_to_16", "--conditioning_augmentation", "gaussian")
    assert same == get_preset("fashion_mnist_8_to_16")


def test_what_a_preset_has_been_given_since_is_left_out_of_an_earlier_run(tmp_path):
    """Unless it is asked for: the run is then another, which `check_resumable` says."""
    config = TrainingConfig(preset="avatars_64_to_256", train_data_dir=str(tmp_path), output_dir="run")
    now = resolve_preset(config, super_resolution=True)
    assert (now.unet.patch_size, now.training.crop_size, now.training.whole_image_fraction) == (4, 128, 0.1)
    saved = run_description(config, now, None, 0, 1)
    assert resolve_preset(config, super_resolution=True, saved=saved) == now
    for section, name in (("unet", "patch_size"), ("training", "crop_size"), ("training", "whole_image_fraction")):
        del saved[section][name]
    earlier = resolve_preset(config, super_resolution=True, saved=saved)
    assert (earlier.unet.patch_size, earlier.training.crop_size, earlier.training.whole_image_fraction) == (1, None, 0)
    check_resumable(saved, run_description(config, earlier, None, 0, 1), Path("checkpoint-1"))
    asked = dataclasses.replace(config, patch_size=2)
    with pytest.raises(ValueError, match=r"another run: unet.patch_size \(1 in the checkpoint, 2 now\)"):
        other = resolve_preset(asked, super_resolution=True, saved=saved)
        check_resumable(saved, run_description(asked, other, None, 0, 1), Path("checkpoint-1"))


@pytest.mark.parametrize(
    ("asked", "saved", "compiled", "device", "expected"),
    [
        (None, None, False, "cpu", False),
        (None, None, False, "cuda", False),
        (None, True, False, "cpu", True),
        (None, True, False, "cuda", True),
        (True, False, False, "cpu", True),
        (False, True, False, "cuda", False),
        (True, None, True, "cuda", True),
    ],
)
def test_channels_last_is_the_option_else_the_checkpoints(asked, saved, compiled, device, expected):
    saved = None if saved is None else {"run": {"channels_last": saved}}
    assert resolve_channels_last(asked, saved, compiled, torch.device(device)) is expected


def test_channels_last_is_not_compiled_on_a_cpu():
    with pytest.raises(ValueError, match=r"`compile` and `channels_last` are both True .* `--channels_last false`"):
        resolve_channels_last(True, None, True, torch.device("cpu"))


def test_the_null_class_follows_label_dropout():
    for options, label_dropout in [((), 0.1), (("--label_dropout", "0"), 0.0), (("--unconditional",), 0.0)]:
        resolved = resolve_preset(parsed("--preset", "fashion_mnist_8", *DATA, *options), super_resolution=False)
        assert resolved.training.label_dropout == label_dropout
        assert resolved.unet.null_class == (label_dropout > 0)


def test_resolved_configuration_is_one_json(images, unbroken):
    resolved = json.loads((unbroken / "training_config.json").read_text())
    assert resolved["unet"]["num_classes"] == 3  # the data's, not the preset's
    assert resolved["unet"]["block_out_channels"] == [4, 8]
    assert resolved["scheduler"] == dataclasses.asdict(get_preset("fashion_mnist_8").scheduler)
    assert resolved["training"]["train_batch_size"] == 8
    assert resolved["training"]["adam_beta2"] == get_preset("fashion_mnist_8").training.adam_beta2
    assert resolved["data"]["id2label"] == {"0": "bag", "1": "boot", "2": "coat"}
    assert (resolved["data"]["num_examples"], resolved["data"]["train_data_dir"]) == (21, str(images))
    assert resolved["run"]["checkpoints_total_limit"] == 2
    assert json.loads((unbroken / "checkpoint-6" / "training_config.json").read_text()) == resolved


@pytest.mark.parametrize(
    ("arguments", "super_resolution", "message"),
    [
        (("--preset", "cifar", *DATA), False, "imagenet_32, .*fashion_mnist_8"),
        (("--preset", "imagenet_32", *DATA), True, "base stage: train it with cdm train base"),
        (
            ("--preset", "imagenet_32_to_64", *DATA),
            False,
            "super-resolution stage: train it with cdm train sr",
        ),
        (("--preset", "imagenet_32", "--output_dir", "x"), False, "exactly one of them"),
        (("--preset", "imagenet_32", "--train_data_dir", "x", *DATA), False, "exactly one of them"),
        (("--preset", "lsun_64", "--label_dropout", "0.1", *DATA), False, "`label_dropout` is 0.1"),
        (("--preset", "imagenet_32", "--unconditional", "--label_dropout", "0.1", *DATA), False, "`label_dropout`"),
        (
            ("--preset", "imagenet_32", "--sample_size", "48", *DATA),
            False,
            "`sample_size` is 48, which does not divide",
        ),
        (("--preset", "imagenet_32_to_64", "--low_res_size", "24", *DATA), True, "`low_res_size` is 24"),
        (("--preset", "imagenet_32", "--low_res_size", "16", *DATA), False, "`low_res_size` is 16"),
        (("--preset", "imagenet_64_to_256", "--augmentation_level", "9", *DATA), True, "`augmentation_level` is 9"),
        (("--preset", "imagenet_32_to_64", "--blur_probability", "1", *DATA), True, "`blur_probability` is 1"),
        (("--preset", "imagenet_32", "--conditioning_augmentation", "blur", *DATA), False, "is a base stage"),
        (("--preset", "imagenet_32", "--gradient_accumulation_steps", "3", *DATA), False, "batch of 2048"),
        (("--preset", "imagenet_32", "--logging_steps", "0", *DATA), False, "`logging_steps` is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, super_resolution, message, capsys):
    """Some as words of the command line, the others against the preset."""
    with pytest.raises((ValueError, SystemExit)) as refusal:
        resolve_preset(parsed(*arguments), super_resolution)
    assert re.search(message, f"{refusal.value} {capsys.readouterr().err}")


def test_too_few_images_for_a_batch(images, tmp_path):
    options = BASE | {"train_data_dir": str(images), "output_dir": str(tmp_path), "train_batch_size": 22}
    with pytest.raises(ValueError, match=r"`train_batch_size` is 22 .* only 21 images"):
        run(options)
    with pytest.raises(ValueError, match="not hold even one whole batch"):
        run(options | {"streaming": True})


def run_script(script, arguments):
    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize(("script", "sizes"), [("train_base.py", BASE), ("train_sr.py", SUPER_RES)])
def test_scripts(script, sizes, images, tmp_path):
    options = sizes | {"train_data_dir": images, "output_dir": tmp_path, "train_batch_size": 2, "max_train_steps": 1}
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    script = str(Path(__file__).parents[1] / "training" / script)
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:
        pool.submit(run_script, script, arguments).result()
    assert (tmp_path / "model_index.json").is_file()
