"""
Sets of samples, made by any number of processes and by any number of attempts.

Image i is drawn from the generator of (seed, i), and micro-batches are cut by index: which process makes one, and
when, changes no bit of it (given the same kind of device and number of threads).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..data.transforms import to_uint8
from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.fingerprints import fingerprint
from ..pipelines.inputs import resolve_class_labels
from ..pipelines.stages import noise_rule, num_classes_of
from ..processes import ending_together, held_by_main, open_state
from .config import SampleConfig
from .records import provenance
from .sample_store import LowResImages, SampleStore


DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sample(config: SampleConfig, pipeline: CascadedDiffusionPipeline | None = None) -> None:
    """
    Fills `config.output_dir` with samples, or finishes what a run of the same settings has begun there.

    Args:
        pipeline: what `config.pipeline` names, if it is loaded already.

    Raises:
        ValueError: settings that the cascade does not take, other ones than those of the samples already there, or
            another run in the same folder.
    """
    state = open_state()
    output_dir = Path(config.output_dir)
    with ending_together(state, lambda: how_to_go_on(output_dir)), held_by_main(state, output_dir, "sampling"):
        if pipeline is None:
            pipeline = CascadedDiffusionPipeline.from_pretrained(config.pipeline, dtype=DTYPES[config.dtype])
        job = SamplingJob(config, pipeline.to(state.device))
        job.store.check()
        state.wait_for_everyone()  # all have looked before one writes
        pending = job.prepare(state)
        if pending is not None:
            job.run(pending, state)
            state.wait_for_everyone()
            if state.is_main_process:
                job.store.assemble(partial(job.make, num_processes=state.num_processes))
        state.wait_for_everyone()
    state.print(f"{config.num_images:,} images are in {job.store.final}")


def how_to_go_on(output_dir: Path) -> str:
    """What to do when some processes of a command that goes on by itself have ended."""
    return f"What is finished is kept in {str(output_dir)!r}: start the command again, and it goes on from there."


class SamplingJob:
    """
    A set of samples to be made: the stages that run, their options, all labels, and the folder. Checks all of them.

    Raises:
        ValueError: as `sample`.
    """

    def __init__(self, config: SampleConfig, pipeline: CascadedDiffusionPipeline):
        self.config = config
        last_name = pipeline.stages[-1].name
        pipeline = pipeline.with_schedulers(config.scheduler, config.inference_schedules, config.last_stage)
        self.pipeline, names = pipeline, [stage.name for stage in pipeline.stages]
        self.low_res, self.first_stage = None, 0
        if config.low_res_dir is not None:
            self.low_res = LowResImages(config.low_res_dir, config.low_res_stage)
            self.first_stage = self._stage_after(self.low_res, names)
            self.labels = self.low_res.labels
            if self.labels is not None:
                self.labels = self.labels[: config.num_images]
            elif num_classes_of(pipeline.stages[self.first_stage :]) is not None:
                raise ValueError(
                    f"`low_res_dir` {config.low_res_dir!r} has no labels, which stages after "
                    f"`{self.low_res.stage}` take: sample all stages in one run, with --labels."
                )
        else:
            num_classes = num_classes_of(pipeline.stages)
            self.labels = all_labels(config.labels, config.num_images, num_classes, pipeline.config.id2label)
        self.stages = pipeline.stages[self.first_stage :]
        self.options = call_options(pipeline, config, self.first_stage)
        self.kept = [name for name in names[self.first_stage :] if config.keep_stages and name != last_name]
        first_low_res = None if self.low_res is None else self.low_res[torch.tensor([0])]
        pipeline.set_progress_bar_config(disable=True)
        check_call(pipeline, self.labels, config.seed, first_low_res, self.first_stage, **self.options)
        self.store = SampleStore(config.output_dir, self._settings())

    def _stage_after(self, low_res: LowResImages, names: list[str]) -> int:
        if low_res.stage not in names[:-1]:
            raise ValueError(
                f"`low_res_dir` {self.config.low_res_dir!r} has images of stage `{low_res.stage}`, which no stage of "
                f"{names} follows."
            )
        if len(low_res) < self.config.num_images:
            raise ValueError(
                f"`num_images` is {self.config.num_images}, but `low_res_dir` {self.config.low_res_dir!r} has "
                f"{len(low_res)}: sample more of them first."
            )
        first_stage = names.index(low_res.stage) + 1
        if self.config.truncated and first_stage == len(names) - 1:
            raise ValueError(
                "`truncated` with `low_res_dir`: a truncated input is made by the stage before, which does not run. "
                "Leave out --truncated, which also noises z_0 to s, or --low_res_dir."
            )
        return first_stage

    def _settings(self) -> dict[str, Any]:
        """All that decides the samples, and "about", which does not."""
        config, pipeline = self.config, self.pipeline
        settings = {
            "num_images": config.num_images,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "noise_rule": noise_rule(self.stages, self.options["augmentation_levels"], config.truncated),
            "labels": None if self.labels is None else hashlib.sha256(self.labels.numpy()).hexdigest(),
            "id2label": pipeline.config.id2label,
            "stages": {stage.name: stage.unet.config.sample_size for stage in self.stages},
            "channels": pipeline.base_unet.config.out_channels,
            "source_resolution": pipeline.config.source_resolution,
            "kept_stages": self.kept,
            "options": self.options,
            "schedulers": {stage.name: type(stage.scheduler).__name__ for stage in self.stages},
            "weights_and_schedulers": fingerprint(pipeline.stages),
            "low_res": None if self.low_res is None else {"stage": self.low_res.stage, "of": self.low_res.settings},
            "image_format": config.image_format,
            "dtype": config.dtype,
            "about": {
                "pipeline": config.pipeline,
                **provenance("torch", "diffusers", "numpy"),
            },
        }
        return json.loads(json.dumps(settings))

    def prepare(self, state: PartialState) -> list[torch.Tensor] | None:
        """
        Makes the folder ready. What the main process finds there holds for all, since the caches of a network file
        system may differ.

        Returns:
            `list[torch.Tensor]`: the indices of each micro-batch that is to be made; None if the set is finished.
        """
        pending = [None]
        if state.is_main_process:
            self.store.prepare(self.labels)
            if not self.store.is_finished:
                pending = [[indices.tolist() for indices in self.store.pending()]]
        broadcast_object_list(pending)
        return None if pending[0] is None else [torch.tensor(indices) for indices in pending[0]]

    def run(self, pending: list[torch.Tensor], state: PartialState) -> None:
        """This process's share of the micro-batches that are `pending` for all."""
        self.pipeline.set_progress_bar_config(disable=not state.is_main_process, leave=False, position=1)
        total = sum(map(len, pending))
        at_start = self.config.num_images - total

        def num_finished() -> int:
            return self.store.num_finished() - at_start

        share = pending[state.process_index :: state.num_processes]
        make = partial(self.make, num_processes=state.num_processes)
        for _ in sample_batches(make, share, total, num_finished, not state.is_main_process, leave=True):
            pass

    def make(self, indices: torch.Tensor, num_processes: int) -> None:
        """The shard of one micro-batch."""
        began = time.perf_counter()
        low_res = None if self.low_res is None else self.low_res[indices]
        with counted_evaluations(self.pipeline) as counts:
            stages = draw_images(
                self.pipeline, indices, self.labels, self.config.seed, low_res, self.first_stage, **self.options
            )
        images = {name: stages[name] for name in self.kept}
        images["images"] = to_uint8(2 * stages[self.stages[-1].name] - 1)
        record = {
            "evaluations": {stage.name: counts[stage.name] / len(indices) for stage in self.stages},
            "seconds": time.perf_counter() - began,
            "num_processes": num_processes,
        }
        self.store.save_shard(indices, {name: tensor.cpu().numpy() for name, tensor in images.items()}, record)


def call_options(pipeline: CascadedDiffusionPipeline, config: SampleConfig, first_stage: int = 0) -> dict[str, Any]:
    """Arguments of the pipeline's call, with a value for each of the stages that run."""
    names = [stage.name for stage in pipeline.stages]
    if config.truncated and all(stage.noising_scheduler is None for stage in pipeline.stages[first_stage + 1 :]):
        raise ValueError(
            f"`truncated` changes nothing: of the stages whose input is made here, {names[first_stage + 1 :]}, none "
            "takes an s. Leave it out."
        )
    options = pipeline.stage_options(
        config.num_inference_steps,
        config.augmentation_levels,
        config.guidance_scale,
        config.timesteps,
        config.settings,
    )
    for values in options.values():
        for name in names[:first_stage]:
            values.pop(name, None)
    if options.get("timesteps") == {}:
        del options["timesteps"]
    options |= {"truncated": config.truncated, "restart_timestep": config.restart_timestep}
    return options | ({"consistency": True} if config.consistency else {})  # which older folders do not name


def all_labels(
    labels: str | None, num_images: int, num_classes: int | None, id2label: dict[int, str] | None
) -> torch.Tensor | None:
    """
    int64 (N,) from `labels` as [`SampleConfig`] has them; None for an unconditional cascade.

    Raises:
        ValueError: a label is not a class of the cascade, or a file does not have one per image.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError(f"`labels` is {labels!r}, but the cascade is unconditional: leave it out.")
        return None
    if labels in (None, "balanced"):
        return torch.arange(num_images) % num_classes
    is_file = os.path.isfile(labels)
    words = Path(labels).read_text().splitlines() if is_file else labels.split(",")
    words = [word.strip() for word in words if word.strip()]
    if is_file and len(words) != num_images:
        raise ValueError(
            f"`labels` is {labels!r}, a file of {len(words)} labels, and `num_images` is {num_images}: it must have "
            "one per image."
        )
    classes = [int(word) if word.isdecimal() else word for word in words]
    classes = torch.tensor(resolve_class_labels(classes, num_classes, id2label))
    return classes[torch.arange(num_images) % len(classes)]


# ------------------------------------------------------------------------------------------------------------------
# Images, each from a generator of its own, and how often the networks are called for them
# ------------------------------------------------------------------------------------------------------------------


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
