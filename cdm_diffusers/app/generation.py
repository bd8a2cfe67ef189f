"""Sampling that is watched: what a visitor chose, and what there is to see of it step by step."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from PIL import Image

from ..commands.pictures import class_labels, row_names
from ..options import NonNegativeInt, PositiveInt, option, options
from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.inputs import tensor_to_images
from ..pipelines.solver_names import SolverName
from ..pipelines.solvers import solver_name
from ..pipelines.stages import num_classes_of
from .config import Limits


SECONDS_BETWEEN_UPDATES = 0.5
LARGEST_SEED = 2**32 - 1

_sampling = threading.Lock()  # held by whoever samples: one at a time
_closing = threading.Event()  # nobody samples any longer


@contextlib.contextmanager
def ending_sampling(patience: float) -> Iterator[None]:
    """On leaving, stops sampling, and waits for the current step, for up to `patience` seconds."""
    _closing.clear()
    try:
        yield
    finally:
        _closing.set()
        if _sampling.acquire(timeout=patience):
            _sampling.release()


@options
class Settings:
    """What a visitor chose; mappings are by stage."""

    class_labels: list[str] = option("Names or numbers of classes; none for an unconditional cascade.", [])
    num_images: PositiveInt = option("Images of each class.", 4)
    seed: Annotated[int, Ge(0), Le(LARGEST_SEED)] = option("Seed of all noise.", 0)
    num_inference_steps: dict[str, PositiveInt] = option("Steps. Default: the pipeline's.", {})
    augmentation_levels: dict[str, NonNegativeInt] = option("s. Default: the pipeline's.", {})
    guidance_scale: dict[str, float] = option("w of classifier-free guidance. Default: the pipeline's.", {})
    scheduler: dict[str, SolverName] = option("Solvers. Default: the pipeline's.", {})


@dataclass(frozen=True)
class Update:
    """
    What there is to see after a step.

    Args:
        stage: the stage that took it.
        step, num_steps: which of how many, from 1.
        seconds: that the stage has taken so far.
        images: those of the stages so far, by name; the last are unfinished until `step` is `num_steps`.
        captions: of the images of each stage: their classes, "" where the stages that run have none.
    """

    stage: str
    step: int
    num_steps: int
    seconds: float
    images: dict[str, list[Image.Image]]
    captions: list[str]

    @property
    def unfinished_stage(self) -> str | None:
        """The stage whose images are in the making."""
        return self.stage if self.step < self.num_steps else None

    @property
    def images_per_second(self) -> float:
        """Of this stage, at the rate of its steps so far."""
        return len(self.images[self.stage]) * self.step / self.num_steps / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Of this stage, at the rate of its steps so far."""
        return self.seconds / self.step * (self.num_steps - self.step)


def generate(
    pipeline: CascadedDiffusionPipeline,
    settings: Settings,
    limits: Limits,
    picture: torch.Tensor | None = None,
    consistency: bool = False,
) -> Iterator[Update]:
    """
    Samples a cascade in a thread of its own. Closing the iterator ends sampling after the step that is running.

    An update that a newer one overtakes is dropped; the last never is.

    Args:
        picture: (1, C, h, h) in [0, 1], to start from at the stage that takes its size. Default: the base's samples.
        consistency: whether the stages keep to their input.

    Raises:
        ValueError: what is asked for is beyond `limits`, or not for these stages.
    """
    own = {stage.name: solver_name(stage.scheduler) for stage in pipeline.stages}
    pipeline = pipeline.with_schedulers({k: name for k, name in settings.scheduler.items() if name != own.get(k)})
    pipeline.set_progress_bar_config(disable=True)
    stages, _ = pipeline._stages_from(picture)
    labels = None
    if num_classes_of(stages) is not None:
        labels = class_labels(settings.class_labels, pipeline.config.id2label)
        if not labels:
            raise ValueError("`class_labels` is empty; it must have at least one class: choose one.")
    names = row_names(labels, pipeline.config.id2label)
    _check_count(settings.num_images, len(names), limits)
    steps = pipeline.stage_options(settings.num_inference_steps)["num_inference_steps"]
    for stage in stages:
        _check_steps(stage.name, steps[stage.name], limits)
    captions = [name for name in names for _ in range(settings.num_images)]
    call = partial(
        pipeline,
        class_labels=labels,
        num_images_per_label=settings.num_images,
        num_inference_steps=settings.num_inference_steps,
        augmentation_levels=settings.augmentation_levels,
        guidance_scale=settings.guidance_scale,
        consistency=consistency,
        image=picture,
        generator=torch.Generator(pipeline.device).manual_seed(settings.seed),
    )
    return _updates(_Watched(call, limits.max_seconds, captions))


def _check_count(num_images: int, num_classes: int, limits: Limits) -> None:
    count = num_images * num_classes
    if count > limits.max_images:
        raise ValueError(
            f"`num_images` is {num_images} for each of {num_classes} classes, {count} in all; it must be at most "
            f"{limits.max_images} in all: choose fewer classes or images."
        )


def _check_steps(stage: str, steps: int, limits: Limits) -> None:
    if steps > limits.max_steps:
        raise ValueError(
            f"`num_inference_steps` of stage `{stage}` is {steps}; it must be at most {limits.max_steps}."
        )


def _updates(watched: "_Watched") -> Iterator[Update]:
    threading.Thread(target=watched.run, daemon=True).start()
    try:
        while (update := watched.updates.get()) is not None:
            if isinstance(update, Exception):
                raise update
            yield update
    finally:
        watched.is_stopped.set()


class _Watched:
    """A call of a pipeline that puts its newest [`Update`], and at its end None or its exception, into a queue."""

    def __init__(self, call: Callable, max_seconds: float, captions: list[str]):
        self.call, self.max_seconds, self.captions = call, max_seconds, captions
        self.updates: queue.SimpleQueue = queue.SimpleQueue()
        self.is_stopped = threading.Event()
        self.images: dict[str, list[Image.Image]] = {}
        self.last_update = 0.0

    @property
    def is_to_end(self) -> bool:
        """Whether no further step is to be taken."""
        return self.is_stopped.is_set() or _closing.is_set()

    def run(self) -> None:
        """Samples; in a thread of its own."""
        end = None
        try:
            with _sampling:
                self.began = self.stage_began = time.monotonic()
                if _closing.is_set():
                    raise ValueError("The server is stopping: nothing more is sampled.")
                if not self.is_stopped.is_set():
                    self.call(callback_on_step_end=self.on_step_end)
        except Exception as error:
            end = error
        self.updates.put(end)

    def on_step_end(self, pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
        now = time.monotonic()
        if now - self.began > self.max_seconds:
            raise ValueError(
                f"This took longer than {self.max_seconds:g} seconds and was stopped: choose fewer steps or images."
            )
        pipeline._interrupt = self.is_to_end
        stage, step, num_steps = pipeline.current_stage, index + 1, pipeline.num_timesteps
        if step == num_steps or now - self.last_update > SECONDS_BETWEEN_UPDATES:
            self.last_update = now
            self.images = self.images | {stage: tensor_to_images(tensors["sample"], "pil")}
            with contextlib.suppress(queue.Empty):
                self.updates.get_nowait()  # out of date, and not yet fetched
            self.updates.put(Update(stage, step, num_steps, now - self.stage_began, self.images, self.captions))
        if step == num_steps:
            self.stage_began = now
        return {}
