"""What a training run says about itself: at its start, when its settings defeat it, and at its end."""

import contextlib
import dataclasses
import json
import math
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..presets import StagePreset, TrainingPreset
from .config import RunConfig
from .export import check_inference_steps


# The share of the weights it began with that an average may hold in the end.
LARGEST_START = 0.01
# A training step costs about three calls of the network: one forward, and a backward pass of twice that.
CALLS_PER_STEP = 3
# With fewer, samples do not show what a network has learnt.
FEWEST_STEPS = 10


def introduction(
    config: RunConfig,
    preset: StagePreset,
    num_parameters: int,
    num_examples: int | None,
    device: torch.device,
    num_processes: int,
    checkpoint: Path | None,
    pretrained: dict[str, str] | None = None,
) -> str:
    """
    What is trained on what, and where it will be found; for a person.

    Args:
        num_examples: None for a stream.
        checkpoint: that the run goes on from, if it does.
        pretrained: "stage" and "pipeline" of the weights that a new run begins with, if it does.
    """
    unet, training, folder = preset.unet, preset.training, config.output_dir
    size = f"{unet.sample_size}x{unet.sample_size}"
    low_res = unet.low_res_size
    kind = f"base, {size}" if low_res is None else f"super-resolution, {low_res}x{low_res} to {size}"
    examples = "a stream of images" if num_examples is None else f"{num_examples:,} images"
    classes = (
        "no classes" if unet.num_classes is None else f"{unet.num_classes:,} class{'es' * (unet.num_classes > 1)}"
    )
    where = f"{num_processes} x {device.type}"
    if device.type == "cpu":
        where += f" ({torch.get_num_threads()} threads)"
    first_weights = "" if pretrained is None else ", with the weights of {stage} of {pipeline}".format(**pretrained)
    lines = [
        f"{preset.name}: {kind}, {num_parameters / 1e6:.2f} million parameters, on {examples}, {classes}.",
        f"{training.max_train_steps:,} steps of {training.train_batch_size:,} images on {where}.",
        f"A new run{first_weights}." if checkpoint is None else f"Goes on from {checkpoint}.",
        f"Checkpoints every {config.checkpointing_steps:,} steps and at the end: {folder}/checkpoint-*.",
    ]
    if config.validation_steps:
        lines.append(f"Samples every {config.validation_steps:,} steps and at the end: {folder}/samples.")
    if config.report_to == "tensorboard":
        lines.append(f"Curves: tensorboard --logdir {folder}/{config.logging_dir}")
    elif config.report_to != "none":
        lines.append(f"Curves: {config.report_to}, with its files in {folder}/{config.logging_dir}")
    return "\n".join(lines)


def farewell(folder: Path) -> str:
    """Where the stage is, and what to type next: with the stages that lie beside it, where they are the only ones."""
    beside = stages_beside(folder)
    own, name, hint = beside.pop(str(folder)), str(folder), ""
    if own["low_res_size"] is None:
        commands = [f"cdm sample {shlex.quote(name)} --output samples.png"]
        above = [other for other, stage in beside.items() if stage["low_res_size"] == own["sample_size"]]
        stages = [name, *above] if len(above) == 1 else []
    else:
        commands, below = [], stages_below(own, beside)
        hint = "" if below else f"\n(BASE: the folder of a {own['low_res_size']}x{own['low_res_size']} stage.)"
        stages = [*(below or ["BASE"]), name]
    if stages:
        base, *super_res = map(shlex.quote, stages)
        commands.append(f"cdm assemble --base {base} --super_res {' '.join(super_res)} --output my-cascade")
    return "\n  ".join([f"The stage is in {folder}. Next, for example:", *commands]) + hint


def stages_beside(folder: Path) -> dict[str, dict[str, Any]]:
    """The networks' configurations of `folder` and of finished stages beside it that were trained on like data."""
    own, stages = _configuration(folder), {}
    for place in (folder, *sorted(folder.parent.iterdir())):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a file of that name that is damaged, or not ours
            config = _configuration(place)
            if config and all(config["data"][key] == own["data"][key] for key in ("source_resolution", "id2label")):
                stages[str(place)] = config["unet"]
    return stages


def _configuration(folder: Path) -> dict[str, Any] | None:
    """Of a finished stage; None of anything else that may lie there, such as a cascade."""
    file = folder / "training_config.json"
    if not (file.is_file() and (folder / "model_index.json").is_file()):
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    return config if "unet" in config else None


def stages_below(stage: dict[str, Any], others: dict[str, dict[str, Any]]) -> list[str] | None:
    """Folders of the stages from the base to below `stage`; None unless each is there, and the only one."""
    if stage["low_res_size"] is None:
        return []
    fitting = [name for name, other in others.items() if other["sample_size"] == stage["low_res_size"]]
    further = stages_below(others[fitting[0]], others) if len(fitting) == 1 else None
    return None if further is None else [*further, *fitting]


def interruption(checkpoint: Path, number: int) -> str:
    """What a signal has ended, and how to go on."""
    return (
        f"Stopped by {signal.Signals(number).name}; all steps are in {checkpoint}. The same command with "
        "--resume_from_checkpoint latest goes on from there."
    )


def warnings(config: RunConfig, preset: StagePreset) -> Iterator[str]:
    """A sentence for each setting that spoils a run without an error."""
    training = preset.training
    start = share_of_start(training)
    if start > LARGEST_START:
        warm = share_of_start(dataclasses.replace(training, ema_warmup=True))
        yield (
            f"`ema_decay` is {training.ema_decay} and `ema_warmup` {training.ema_warmup}: after "
            f"{training.max_train_steps:,} steps, {start:.1%} of the average is still the weights it began with: "
            f"{'give --ema_warmup, or train' if warm < start else 'train'} longer (--max_train_steps)."
        )
    if config.validation_steps:
        steps = config.validation_inference_steps or preset.inference.num_inference_steps
        equal = steps * config.num_validation_images / calls_per_step(preset)  # training steps that take as long
        if equal > config.validation_steps:
            fewer = math.floor(steps * config.validation_steps / equal)
            yield (
                f"A validation of {config.num_validation_images} images in {steps:,} steps takes longer than the "
                f"{config.validation_steps:,} training steps between two: give --validation_steps {math.ceil(equal)}"
                + (f" or --validation_inference_steps {fewer}." if is_enough(preset, fewer) else ".")
            )


def is_enough(preset: StagePreset, num_inference_steps: int) -> bool:
    """Whether samples of so many steps show something, and the stage's schedule has so few."""
    if num_inference_steps < FEWEST_STEPS:
        return False
    try:
        check_inference_steps(preset, num_inference_steps)
    except ValueError:
        return False
    return True


def calls_per_step(preset: StagePreset) -> float:
    """What a training step costs, in calls of the network with one whole image."""
    training = preset.training
    share = 1.0
    if training.crop_size is not None:
        of_crop = (training.crop_size / preset.unet.sample_size) ** 2
        share = of_crop + training.whole_image_fraction * (1 - of_crop)
    return CALLS_PER_STEP * training.train_batch_size * share


def share_of_start(training: TrainingPreset) -> float:
    """How much of the weights after the first step is in their average at the end."""
    steps = range(1, training.max_train_steps)
    if not training.ema_warmup:
        return training.ema_decay ** len(steps)
    return math.prod(min(training.ema_decay, (1 + step) / (10 + step)) for step in steps)
