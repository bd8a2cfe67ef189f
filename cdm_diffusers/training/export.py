"""The end of a training run: the stage as a pipeline folder that loads, with a model card."""

from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from PIL import Image

from ..files import staged_folder, write_json
from ..model_cards import CONFIGURATION, GRID, VALIDATION, write_card
from ..models import CascadedUNet2DModel
from ..models.costs import build_on_meta
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.denoising import make_sampler
from ..pipelines.solvers import scheduler_of
from ..pipelines.stages import CascadeStage
from ..presets import InferencePreset, StagePreset
from .stage import Stage, build_stage


def pipeline_of(
    unet: CascadedUNet2DModel, stage: Stage, preset: StagePreset, id2label: dict[int, str] | None
) -> CascadedDiffusionPipeline | SuperResolutionPipeline:
    """The pipeline of one stage: a cascade without super-resolution for a base."""
    inference = preset.inference
    common = {"id2label": id2label, "source_resolution": preset.data.source_resolution}
    times = None if inference.timesteps is None else list(inference.timesteps)
    if preset.unet.low_res_size is None:
        pipeline = CascadedDiffusionPipeline(
            unet,
            stage.scheduler,
            default_num_inference_steps={"base": inference.num_inference_steps},
            default_timesteps=times and {"base": times},
            **common,
        )
        pipeline.base_scheduler = inference_scheduler(pipeline.stages[0], inference)
        return pipeline
    pipeline = SuperResolutionPipeline(
        unet,
        stage.scheduler,
        stage.noising_scheduler,
        default_num_inference_steps=inference.num_inference_steps,
        default_augmentation_level=inference.augmentation_level,
        default_timesteps=times,
        **common,
    )
    pipeline.scheduler = inference_scheduler(pipeline.stage, inference)
    return pipeline


def inference_scheduler(stage: CascadeStage, inference: InferencePreset) -> SchedulerMixin:
    """The scheduler that samples a trained stage."""
    scheduler = scheduler_of(stage, inference.solver)
    if inference.timestep_spacing is None:
        return scheduler
    return type(scheduler).from_config(scheduler.config, timestep_spacing=inference.timestep_spacing)


def check_inference_steps(preset: StagePreset, num_inference_steps: int) -> None:
    """
    Raises:
        ValueError: the stage cannot be sampled in so many steps.
    """
    (stage,) = stage_without_weights(preset).stages
    try:
        make_sampler(stage.name, stage.unet, stage.scheduler, num_inference_steps, torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"`validation_inference_steps` is {num_inference_steps}: {error}") from error


def saved_part_names(preset: StagePreset) -> set[str]:
    """The folders that a trained stage consists of, known before its network is."""
    if preset.unet.low_res_size is None:
        return {"base_unet", "base_scheduler"}
    stage = build_stage(preset, torch.nn.Module())
    return {"unet", "scheduler"} | ({"noising_scheduler"} if stage.noising_scheduler is not None else set())


def stage_without_weights(preset: StagePreset) -> CascadedDiffusionPipeline | SuperResolutionPipeline:
    """The pipeline that a training of the preset ends in, without class names, its network on the meta device."""
    unet = build_on_meta(preset.unet)
    return pipeline_of(unet, build_stage(preset, unet), preset, None)


def save_pipeline(
    pipeline: CascadedDiffusionPipeline | SuperResolutionPipeline,
    resolved: dict[str, Any],
    figures: dict[str, float | None],
    grid: Image.Image | None,
    output_dir: Path,
    *,
    weights: str = "the EMA weights",
    license: str | None = None,
) -> None:
    r"""
    Writes a stage's pipeline with its model card into `output_dir`.

    Args:
        pipeline ([`CascadedDiffusionPipeline`] or [`SuperResolutionPipeline`]): the stage.
        resolved (`dict`): the run's `training_config.json`.
        figures (`dict`): what was measured: `loss`, and mean and standard deviation of samples and data.
        grid (`PIL.Image.Image`, *optional*): samples.
        output_dir (`Path`): the folder.
        weights (`str`): which weights these are.
        license (`str`, *optional*): of data and weights, for the card.
    """
    with staged_folder(output_dir) as folder:
        pipeline.save_pretrained(folder)
        if grid is not None:
            grid.save(folder / GRID)
        write_json(folder / CONFIGURATION, resolved)
        write_json(folder / VALIDATION, {"weights": weights, **figures})
        write_card(pipeline, folder, output_dir.resolve().name, license=license)
