"""Distillation: students that sample in few steps, without guidance, what a stage samples in many."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.labels import check_same_classes
from ..data.memory import ImageData
from ..diffusion import limit_x_0, prediction_for
from ..losses import DistillationLoss, GridTimes
from ..models import CascadedUNet2DModel
from ..pipelines.denoising import Denoiser, limits_of
from ..pipelines.solvers import solver_on_grid
from ..presets import GaussianAugmentationPreset, StagePreset
from .checkpoints import TrainingState
from .config import DistillationConfig
from .export import pipeline_of, save_pipeline
from .loop import Trainer, carry_out, compile_network
from .sharding import local
from .stage import Stage
from .teacher import Teacher, load_teacher, student_preset, student_weights


# The last students have the most to learn: phases that end at so few steps are twice as long (the paper's, too).
FEW_STEPS = 2

START_STEPS = 64


def distill(config: DistillationConfig) -> None:
    """
    Distils a stage, and leaves the student as a pipeline folder in `config.output_dir`; beside it, in
    `student-*-steps`, the students of the phases before.

    Raises:
        ValueError, RuntimeError, OSError, SystemExit, KeyboardInterrupt: as [`train`].
    """

    def plan(num_processes: int, saved: dict[str, Any] | None):
        teacher = load_teacher(config)
        phases = phases_of(config, learns_v=teacher.student_prediction_type != teacher.prediction_type)
        preset = student_preset(config, teacher, phases[-1].end_step, num_processes)
        return preset, partial(Distillation, teacher=teacher, phases=phases)

    carry_out(plan, config)


# ---------------------------------------------------------------------------------------------------------------------
# Phases


@dataclass(frozen=True)
class Phase:
    """
    A student learns to do `teacher_steps` of DDIM in `student_steps`: in optimizer steps `first_step` + 1 to
    `end_step`.
    """

    teacher_steps: int
    student_steps: int
    first_step: int
    end_step: int

    def __str__(self):
        return f"{self.teacher_steps} to {self.student_steps} steps"


def phases_of(config: DistillationConfig, learns_v: bool) -> list[Phase]:
    """
    What is learnt, in order: v, in as many steps as the teacher takes, if `learns_v`; then half the steps again and
    again, or all at once by consistency distillation.

    Raises:
        ValueError: the teacher's steps cannot be halved to `end_steps`, or there are too few or too many
            `phase_steps`.
    """
    start, end = start_steps_of(config.start_steps, config.timesteps), config.end_steps
    factor = start // end
    is_progressive = config.method == "progressive"
    if start % end or factor == 1 or (is_progressive and factor.bit_count() != 1):
        by = "2, 4, 8, ..." if is_progressive else "2 or more"
        what = "`start_steps` is" if config.timesteps is None else "The number of `timesteps` is"
        raise ValueError(f"{what} {start}; it must be `end_steps`, {end}, times {by}.")
    halved = [start >> count for count in range(factor.bit_length())]
    steps = list(itertools.pairwise(halved)) if is_progressive else [(start, end)]
    if learns_v:
        steps = [(start, start), *steps]
    lengths = config.phase_steps
    if len(lengths) == 1:
        lengths = [lengths[0] * (2 if student <= FEW_STEPS else 1) for _, student in steps]
    if len(lengths) != len(steps):
        names = ", ".join(f"{teacher} to {student}" for teacher, student in steps)
        raise ValueError(f"`phase_steps` is {config.phase_steps}; it must be 1 number, or {len(steps)}: {names}.")
    ends = list(itertools.accumulate(lengths))
    return [Phase(*pair, end - length, end) for pair, length, end in zip(steps, lengths, ends, strict=True)]


def start_steps_of(start_steps: int | None, timesteps: list[int] | None) -> int:
    """
    DDIM steps of the first teacher.

    Raises:
        ValueError: `start_steps` is not the number of `timesteps`.
    """
    if timesteps is None:
        return start_steps or START_STEPS
    if start_steps not in (None, len(timesteps)):
        raise ValueError(
            f"`start_steps` is {start_steps}, but `timesteps` has {len(timesteps)} entries: leave one of them out."
        )
    return len(timesteps)


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Predictor:
    """x_0 as a network predicts it, guided and limited as in sampling."""

    unet: CascadedUNet2DModel
    prediction_type: str
    guidance_scale: float = 1.0
    limits: dict[str, Any] = dataclasses.field(default_factory=lambda: limits_of({}))

    def __call__(self, conditions: dict[str, torch.Tensor], x_t: torch.Tensor, times: GridTimes) -> torch.Tensor:
        """x_0 (B, C, H, W) in float32 at x_t, given the network's conditions."""
        denoiser = Denoiser(self.unet, **conditions, guidance_scale=self.guidance_scale)
        prediction, _ = denoiser(x_t, times.condition)
        x_0 = prediction_for(self.prediction_type).x_0(prediction, x_t, times.alpha, times.sigma)
        return limit_x_0(x_0, self.limits)


class Distillation(Trainer):
    """
    A run that uses images only to add noise to them: the loss is the distance from what `teacher` predicts or, from
    the second phase on, the averaged student of the phase before, which is then part of the run's state, too.
    """

    config: DistillationConfig

    def __init__(
        self,
        config: DistillationConfig,
        preset: StagePreset,
        data: ImageData,
        accelerator: Accelerator,
        resolved: dict[str, Any],
        is_sharded: bool = False,
        *,
        teacher: Teacher,
        phases: list[Phase],
    ):
        if data.id2label is not None:
            check_same_classes("The data", data.id2label, teacher.id2label)
        self.teacher, self.phases = teacher, phases
        resolved = resolved | {"distillation": described(config, preset, teacher, phases)}
        super().__init__(config, preset, data, accelerator, resolved, is_sharded)
        self.expert = Predictor(
            self.ready(teacher.stage.unet),
            teacher.prediction_type,
            teacher.options.guidance_scale,
            limits_of(teacher.stage.scheduler.config),
        )
        for phase in phases:  # before anything begins, since grids that do not nest are refused
            self.make_loss(phase)

    def make_stage(self) -> Stage:
        """The student with its teacher's weights."""
        stage = super().make_stage()
        stage.unet.load_state_dict(student_weights(self.teacher.stage.unet, stage.unet))
        return stage

    def make_loss(self, phase: Phase) -> DistillationLoss:
        """The loss on the grid that the student will be sampled on, as its pipeline lays it out."""
        levels, conditions = self.grid(phase.teacher_steps)
        loss = DistillationLoss(
            levels,
            conditions,
            phase.student_steps,
            anywhere=self.config.method == "consistency",
            weighting=self.config.loss_weighting,
            prediction_type=self.preset.scheduler.prediction_type,
        )
        if not torch.equal(levels[loss.stride - 1 :: loss.stride], self.grid(phase.student_steps)[0]):
            raise ValueError(
                f"`start_steps` is {self.phases[0].teacher_steps}; it must be a power of two times `end_steps`, since "
                f"the times of DDIM in {phase.student_steps} steps are not among those in {phase.teacher_steps}."
            )
        return loss

    def grid(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_bar, float64, and what the network is told, at the student's times, from low to high noise."""
        (stage,) = pipeline_of(self.stage.unet, self.stage, self.preset, None).stages
        _, indices, alphas_cumprod = solver_on_grid(stage.scheduler, num_steps, self.times(num_steps))
        is_timestep = self.preset.unet.time_conditioning == "timestep"
        return alphas_cumprod.flip(0), (indices if is_timestep else alphas_cumprod.sqrt().float()).flip(0)

    def times(self, num_steps: int) -> tuple[int, ...] | None:
        """Those of `timesteps` that are visited in so many steps; None for DDIM's own."""
        times = self.config.timesteps
        return None if times is None else tuple(times[:: len(times) // num_steps])

    def ready(self, unet: CascadedUNet2DModel) -> CascadedUNet2DModel:
        """A network for inference only, on the device, in the memory format and compiled as the trained one."""
        memory_format = torch.channels_last if self.config.channels_last else torch.preserve_format
        unet = unet.requires_grad_(False).eval().to(self.accelerator.device, memory_format=memory_format)
        if self.config.compile:
            compile_network(unet, self.accelerator.device)
        return unet

    def student_with(self, weights: dict[str, torch.Tensor]) -> Predictor:
        """A student with these weights, to learn from."""
        unet = CascadedUNet2DModel.from_config(self.stage.unet.config)
        unet.load_state_dict(weights)
        return self.predictor(self.ready(unet))

    def predictor(self, unet: CascadedUNet2DModel) -> Predictor:
        """x_0 as a student with this network predicts it."""
        return Predictor(unet, self.preset.scheduler.prediction_type)

    # -----------------------------------------------------------------------------------------------------------------
    # Phases

    def phase_of(self, step: int) -> Phase:
        """The phase that step `step` + 1 is in; after the end, the last."""
        return next((phase for phase in self.phases if step < phase.end_step), self.phases[-1])

    def start(self, checkpoint: Path | None) -> None:
        """Picks up `checkpoint`, if there is one, and makes the output folder ready."""
        super().start(checkpoint)
        self.enter(self.phase_of(self.step))

    def introduce(self, checkpoint: Path | None) -> None:
        """Says what is trained on what, and what is learnt from whom."""
        super().introduce(checkpoint)
        print(f"{self.preset.source}: {', '.join(map(str, self.phases))}.", flush=True)

    def enter(self, phase: Phase) -> None:
        """Sets loss, learning rate and the student's number of steps to those of `phase`."""
        self.phase, self.phase_loss = phase, self.make_loss(phase)
        steps = phase.student_steps
        inference = dataclasses.replace(self.preset.inference, num_inference_steps=steps, timesteps=self.times(steps))
        self.preset = dataclasses.replace(self.preset, inference=inference)
        self.resolved = self.resolved | {"inference": dataclasses.asdict(inference)}
        self.schedule_learning_rate(phase.first_step, phase.end_step - phase.first_step)

    def begin(self, phase: Phase) -> None:
        """The averaged student of the phase before is saved, and becomes the teacher and the student of `phase`."""
        self.enter(self.phases[self.phases.index(phase) - 1])
        averages = self.averages(keep=True)
        if self.accelerator.is_main_process:
            folder = self.output_dir / f"student-{self.phase.student_steps}-steps"
            figures = {"loss": self.last_loss}
            save_pipeline(
                self.ema_pipeline(averages), self.resolved, figures, None, folder, license=self.config.license
            )
        self.expert = self.student_with(averages)
        with torch.no_grad():
            for parameter, average in zip(self.stage.unet.parameters(), self.ema.shadow_params, strict=True):
                local(parameter).copy_(local(average))
        self.optimizer.optimizer.state.clear()
        self.ema = self.make_average()
        self.enter(phase)

    def optimizer_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """One step of the optimizer and of the average; begins a phase first, if its turn has come."""
        phase = self.phase_of(self.step)
        if self.step == phase.first_step > 0:
            self.begin(phase)
        super().optimizer_step(batches)

    def loss(self, x_0: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss (B,) of the student at images x_0 (B, C, H, W) in [-1, 1], given their conditions."""

        def predicted_by(predictor: Predictor, x_t: torch.Tensor, times: GridTimes) -> torch.Tensor:
            with self.accelerator.autocast():
                return predictor(conditions, x_t, times)

        teacher = partial(predicted_by, self.expert)
        own = partial(predicted_by, self.predictor(self.stage.unet))
        second = own if self.config.method == "consistency" else teacher
        return self.phase_loss(partial(self.denoise, conditions), teacher, second, x_0, self.noise.generator)

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def state(self, keep: bool) -> TrainingState:
        """All tensors of the run, including those of a student that is learnt from."""
        is_student = self.expert.unet is not self.teacher.stage.unet
        return dataclasses.replace(super().state(keep), teacher=self.expert.unet.state_dict() if is_student else None)

    def load_state(self, state: TrainingState) -> None:
        """Puts the tensors of a run back."""
        super().load_state(state)
        if self.step > self.phases[0].end_step:
            if state.teacher is None:
                raise ValueError("the student that was learnt from is missing")
            self.expert = self.student_with(state.teacher)


def described(
    config: DistillationConfig, preset: StagePreset, teacher: Teacher, phases: list[Phase]
) -> dict[str, Any]:
    """What `training_config.json` says of a student's origin. s is None where it is drawn as in the teacher's."""
    augmentation = preset.augmentation
    return {
        "pipeline": teacher.pipeline,
        "stage": teacher.stage.name,
        "fingerprint": teacher.fingerprint,
        "method": config.method,
        "guidance_scale": teacher.options.guidance_scale,
        "augmentation_level": augmentation.level if isinstance(augmentation, GaussianAugmentationPreset) else None,
        "loss_weighting": config.loss_weighting,
        "timesteps": config.timesteps,
        "phases": [[phase.teacher_steps, phase.student_steps, phase.end_step - phase.first_step] for phase in phases],
    }
