"""The stage that a student is distilled from, and what follows from it for the student."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

from ..model_cards import CONFIGURATION, by_stage
from ..models import CascadedUNet2DModel
from ..models.arguments import UNetArguments
from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.fingerprints import fingerprint
from ..pipelines.loading import load_pipeline
from ..pipelines.solver_names import ANCESTRAL
from ..pipelines.solvers import scheduler_of
from ..pipelines.stages import CascadeStage, StageOptions
from ..presets import (
    BlurAugmentationPreset,
    DataPreset,
    GaussianAugmentationPreset,
    InferencePreset,
    SchedulerPreset,
    StagePreset,
    TrainingPreset,
)
from ..publishing import find_document
from ..schedulers import ContinuousDDPMScheduler
from ..schedulers.ancestral import check_timesteps
from .config import DistillationConfig
from .resolve import check_sizes, global_batch_size, override, override_training, preset_of, section


# Of teachers that do not say how they were trained.
UNKNOWN_TRAINING = TrainingPreset(64, 1e-4, max_train_steps=0, vlb_weight=None, lr_warmup_steps=0)


@dataclass(frozen=True)
class Teacher:
    """
    Args:
        pipeline: folder or Hub id of the cascade.
        stage: its stage.
        options: s and w that the stage ships with, or that were asked for.
        preset: how it was trained, where that is known.
        id2label, source_resolution: of its images, as the pipeline has them; names of classes are numbers where it has
            none.
        fingerprint: of its weights and schedulers.
    """

    pipeline: str
    stage: CascadeStage
    options: StageOptions
    preset: StagePreset | None
    id2label: dict[int, str] | None
    source_resolution: int | None
    fingerprint: str

    @property
    def prediction_type(self) -> str:
        """What the stage's network predicts."""
        return self.stage.scheduler.config.get("prediction_type", "epsilon")

    @property
    def student_prediction_type(self) -> str:
        """What its students predict: v in place of epsilon, which says nothing of x_0 where there is only noise."""
        return "v_prediction" if self.prediction_type == "epsilon" else self.prediction_type


def load_teacher(config: DistillationConfig) -> Teacher:
    """
    The stage that `config` names, with its weights.

    Raises:
        ValueError: there is no such stage, or it takes no such s or w.
        OSError: there is no such pipeline.
    """
    pipeline = load_pipeline(config.pipeline)
    names = [stage.name for stage in pipeline.stages]
    name = names[0] if config.stage is None and len(names) == 1 else config.stage
    if name not in names:
        raise ValueError(f"`stage` is {name!r}; it must be one of the stages of {config.pipeline!r}, {names}.")
    document = find_document(config.pipeline, CONFIGURATION)
    configurations = {} if document is None else by_stage(json.loads(document.read_text(encoding="utf-8")), names)
    if isinstance(pipeline, CascadedDiffusionPipeline):
        pipeline = pipeline.stage_pipeline(name)
    stage = dataclasses.replace(pipeline.stages[0], name=name)
    shipped = StageOptions(*(of.get(name) if isinstance(of, dict) else of for of in pipeline.stage_options().values()))
    return Teacher(
        pipeline=config.pipeline,
        stage=stage,
        options=stage.options(StageOptions(None, config.augmentation_level, config.guidance_scale), shipped),
        preset=preset_of(configurations[name]) if name in configurations else None,
        id2label=pipeline.config.id2label
        or {number: str(number) for number in range(stage.unet.config.num_classes or 0)},
        source_resolution=pipeline.config.source_resolution,
        fingerprint=fingerprint([stage]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The student


def student_preset(config: DistillationConfig, teacher: Teacher, max_train_steps: int, num_processes: int):
    """
    What a student is and how it is trained: like its teacher, as far as that is known, except for v in place of
    epsilon, the options, and DDIM in few steps.

    Args:
        max_train_steps: optimizer steps in all.

    Returns:
        [`StagePreset`]

    Raises:
        ValueError: the options do not fit the teacher or each other.
    """
    known, stage = teacher.preset, teacher.stage
    augmentation = student_augmentation(teacher, config.augmentation_level)
    is_gaussian = isinstance(augmentation, GaussianAugmentationPreset)
    resolution = config.source_resolution or teacher.source_resolution
    if resolution is None:
        raise ValueError(
            f"`source_resolution` is None, and {teacher.pipeline!r} does not say from which resolution its images "
            "were averaged down: give it."
        )
    process = student_process(teacher)
    if config.timesteps is not None:
        check_timesteps("`timesteps`", config.timesteps, process.num_train_timesteps)
    data = DataPreset(resolution, known.data.padding if known else 0)
    preset = StagePreset(
        name=f"{known.name if known else stage.name}, distilled",
        source=f"distilled from stage {stage.name} of {teacher.pipeline}",
        unet=student_arguments(stage.unet),
        scheduler=process,
        augmentation=augmentation,
        training=known.training if known else UNKNOWN_TRAINING,
        inference=InferencePreset(
            config.end_steps,
            teacher.options.augmentation_level if is_gaussian else None,
            solver="ddim",
            timestep_spacing="trailing",
        ),
        data=override(data, config),
    )
    check_sizes(preset)
    of_distillation = {
        "train_batch_size": global_batch_size(
            preset, config.train_batch_size, num_processes, config.gradient_accumulation_steps
        ),
        "max_train_steps": max_train_steps,
        "lr_warmup_steps": config.lr_warmup_steps or 0,
        "lr_scheduler": config.lr_scheduler or "linear",
        "ema_warmup": True if config.ema_warmup is None else config.ema_warmup,
        "vlb_weight": None,
        "label_dropout": 0.0,
        "crop_size": None,
        "whole_image_fraction": 0.0,
    }
    return dataclasses.replace(preset, training=override_training(preset.training, config, **of_distillation))


def student_arguments(unet: CascadedUNet2DModel) -> UNetArguments:
    """The teacher's network without learned variance, null class and dropout."""
    arguments = section(UNetArguments, unet.config)
    return dataclasses.replace(arguments, learned_variance=False, null_class=False, dropout=0.0)


def student_weights(teacher: CascadedUNet2DModel, student: CascadedUNet2DModel) -> dict[str, torch.Tensor]:
    """The teacher's weights, but for the output channels of the variance and the null class, which come last."""
    weights = teacher.state_dict()
    return {name: weights[name][: len(tensor)].float() for name, tensor in student.state_dict().items()}


def student_process(teacher: Teacher) -> SchedulerPreset:
    """The teacher's forward process, and what the student predicts of it."""
    scheduler = scheduler_of(teacher.stage, ANCESTRAL)
    names = {field.name for field in dataclasses.fields(SchedulerPreset)} & set(scheduler.config)
    values: dict[str, Any] = {name: scheduler.config[name] for name in names}
    values |= {"variance_type": "fixed_small", "prediction_type": teacher.student_prediction_type}
    return SchedulerPreset(continuous=isinstance(scheduler, ContinuousDDPMScheduler), **values)


def student_augmentation(
    teacher: Teacher, level: int | None
) -> GaussianAugmentationPreset | BlurAugmentationPreset | None:
    """The teacher's: over all s if it is conditioned on s, unless `level` is one; else at the s of its training."""
    known = teacher.preset.augmentation if teacher.preset else None
    noising_scheduler = teacher.stage.noising_scheduler
    if noising_scheduler is None:
        return known
    process = noising_scheduler.config
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    augmentation = GaussianAugmentationPreset(**{name: process[name] for name in names})
    known = known if isinstance(known, GaussianAugmentationPreset) else augmentation
    if level is not None:
        return dataclasses.replace(augmentation, level=level)
    if teacher.stage.unet.config.augmentation_level_embedding:
        return dataclasses.replace(
            augmentation, level=known.level, zero_level_probability=known.zero_level_probability
        )
    level = teacher.options.augmentation_level if known.level is None else known.level
    return dataclasses.replace(augmentation, level=level)
