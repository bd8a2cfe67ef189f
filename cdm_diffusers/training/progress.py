"""What a training says of itself: at its start, where its settings defeat it, and at its end."""

import math
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from ..presets import StagePreset, TrainingPreset
from .config import TrainingConfig


# The share of the random start that an average of the weights may hold in the end.
LARGEST_START = 0.01
# A training step costs about three calls of the network: one forward, and a backward pass of twice that.
CALLS_PER_STEP = 3


def introduction(
    config: TrainingConfig,
    preset: StagePreset,
    num_parameters: int,
    num_examples: int | None,
    device: torch.device,
    num_processes: int,
    checkpoint: Path | None,
) -> str:
    """
    What is trained on what, and where it will be found; for a person.

    Args:
        num_examples: None for a stream.
        checkpoint: that the run goes on from, if it does.
    """
    unet, training, folder = preset.unet, preset.training, config.output_dir
    size = f"{unet.sample_size}x{unet.sample_size}"
    low_res = unet.low_res_size
    kind = f"base, {size}" if low_res is None else f"super-resolution, {low_res}x{low_res} to {size}"
    examples = "a stream of images" if num_examples is None else f"{num_examples:,} images"
    classes = "no classes" if unet.num_classes is None else f"{unet.num_classes:,} classes"
    where = f"{num_processes} x {device.type}"
    if device.type == "cpu":
        where += f" ({torch.get_num_threads()} threads)"
    lines = [
        f"{preset.name}: {kind}, {num_parameters / 1e6:.2f} million parameters, on {examples}, {classes}.",
        f"{training.max_train_steps:,} steps of {training.train_batch_size:,} images on {where}.",
        "A new run." if checkpoint is None else f"Goes on from {checkpoint}.",
        f"Checkpoints every {config.checkpointing_steps:,} steps: {folder}/checkpoint-*.",
    ]
    if config.validation_steps:
        lines.append(f"Samples every {config.validation_steps:,} steps: {folder}/samples.")
    if config.report_to == "tensorboard":
        lines.append(f"Curves: tensorboard --logdir {folder}/{config.logging_dir}")
    elif config.report_to != "none":
        lines.append(f"Curves: {config.report_to}, with its files in {folder}/{config.logging_dir}")
    return "\n".join(lines)


def farewell(config: TrainingConfig, preset: StagePreset) -> str:
    """Where the stage is, and what to type next."""
    folder = config.output_dir
    if preset.unet.low_res_size is None:
        following = f"cdm sample {folder}\n  cdm assemble --base {folder} --super_res ... --output my-cascade"
    else:
        following = f"cdm assemble --base ... --super_res {folder} --output my-cascade\n  cdm sample my-cascade"
    return f"The stage is in {folder}. Next, for example:\n  {following}"


def interruption(checkpoint: Path, number: int) -> str:
    """What a signal has ended, and how to go on."""
    return (
        f"Stopped by {signal.Signals(number).name}; all steps are in {checkpoint}. The same command with "
        "--resume_from_checkpoint latest goes on from there."
    )


def warnings(config: TrainingConfig, preset: StagePreset) -> Iterator[str]:
    """A sentence for each setting that spoils a run without an error."""
    training = preset.training
    start = share_of_start(training)
    if start > LARGEST_START:
        yield (
            f"`ema_decay` is {training.ema_decay} and `ema_warmup` {training.ema_warmup}: after "
            f"{training.max_train_steps:,} steps, {start:.1%} of the average is still the random start: "
            "give --ema_warmup and a smaller --ema_decay, such as 0.999, or train longer."
        )
    if config.validation_steps and preset.unet.low_res_size is None:
        steps = config.validation_inference_steps or preset.inference.num_inference_steps
        calls = steps * config.num_validation_images
        if calls > CALLS_PER_STEP * config.validation_steps * training.train_batch_size:
            yield (
                f"A validation of {config.num_validation_images} images in {steps:,} steps takes longer than the "
                f"{config.validation_steps:,} training steps between two: give --validation_inference_steps 50, or "
                "larger --validation_steps."
            )


def share_of_start(training: TrainingPreset) -> float:
    """How much of the weights after the first step, still random, is in their average at the end."""
    steps = range(1, training.max_train_steps)
    if not training.ema_warmup:
        return training.ema_decay ** len(steps)
    return math.prod(min(training.ema_decay, (1 + step) / (10 + step)) for step in steps)
