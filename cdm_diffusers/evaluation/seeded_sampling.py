"""Images of a set, each from a generator of its own, and how often the networks are called for them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.stages import num_classes_of


def image_generator(seed: int, index: int, first_stage: int = 0) -> torch.Generator:
    """
    The generator of one image; on the CPU, so that every device draws the same noise.

    Args:
        seed: of the whole set.
        index: of the image.
        first_stage: the number of the stage that starts; 0 for the base. A run that goes on from stored low-resolution
            images draws other noise than the run that made them: otherwise z_0 and the noise added to it would be
            functions of the same numbers.
    """
    state = np.random.SeedSequence([seed, index, first_stage]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_images(
    pipeline: CascadedDiffusionPipeline,
    indices: torch.Tensor,
    labels: torch.Tensor | None,
    seed: int,
    low_res: torch.Tensor | None = None,
    first_stage: int = 0,
    **options,
) -> dict[str, torch.Tensor]:
    """
    One call of the pipeline for the images of a set that `indices` (B,) names.

    Args:
        labels: int64 (N,) of the whole set, None for an unconditional cascade.
        seed: image i has the generator of (seed, i).
        low_res: float32 (B, C, h, w) in [0, 1] to start stage number `first_stage` from.
        options: further arguments of the call.

    Returns:
        `dict`: float32 images (B, C, H, W) in [0, 1] of each stage that ran, by its name.
    """
    arguments = {"generator": [image_generator(seed, index, first_stage) for index in indices.tolist()]}
    if low_res is not None:
        arguments["image"] = low_res
    if num_classes_of(pipeline.stages[first_stage:]) is not None:
        arguments["class_labels"] = labels[indices]
    elif low_res is None:
        arguments["batch_size"] = len(indices)
    return pipeline(**arguments, output_type="pt", output_stages=True, **options).stages


def sample_batches(
    make: Callable[[torch.Tensor], Any],
    batches: Sequence[torch.Tensor],
    total: int,
    num_finished: Callable[[], int] | None = None,
    disable: bool = False,
    leave: bool = False,
) -> Iterator[Any]:
    """
    What `make` returns for each of `batches`, with a bar that counts images.

    Args:
        make: samples the images of a set that have the numbers (B,).
        total: images, of all processes.
        num_finished: how many of them there are by now, of all processes; where it is None, those of this loop count.
        disable: whether there is no bar.
        leave: whether it stays when all is done.
    """
    with tqdm(total=total, desc="sampling", unit="image", leave=leave, disable=disable) as bar:
        for indices in batches:
            yield make(indices)
            bar.update(len(indices) if num_finished is None else num_finished() - bar.n)


def check_call(pipeline: CascadedDiffusionPipeline, labels, seed: int, low_res, first_stage: int, **options) -> None:
    """
    Runs one step of one image, before which the pipeline checks all of its arguments.

    Raises:
        ValueError: an argument of `draw_images` is out of range or does not fit the stages.
    """

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    first = torch.tensor([0])
    draw_images(pipeline, first, labels, seed, low_res, first_stage, callback_on_step_end=stop, **options)


@contextmanager
def counted_evaluations(pipeline: CascadedDiffusionPipeline) -> Iterator[dict[str, int]]:
    """Counts, stage by stage, the images that networks are called on; guidance calls them on two for each image."""
    counts = {stage.name: 0 for stage in pipeline.stages}

    def count(name, unet, arguments):
        counts[name] += len(arguments[0])

    hooks = [stage.unet.register_forward_pre_hook(partial(count, stage.name)) for stage in pipeline.stages]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
