"""The end of a training run: the stage as a pipeline folder that loads, with a model card."""

from pathlib import Path
from typing import Any

from PIL import Image

from ..files import staged_folder
from ..model_cards import write_stage_card
from ..models import CascadedUNet2DModel
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..presets import StagePreset
from .stage import Stage


def stage_pipeline(
    unet: CascadedUNet2DModel, stage: Stage, preset: StagePreset, id2label: dict[int, str] | None
) -> CascadedDiffusionPipeline | SuperResolutionPipeline:
    """The pipeline of one stage: a cascade without super-resolution for a base."""
    inference = preset.inference
    common = {"id2label": id2label, "source_resolution": preset.data.source_resolution}
    if preset.unet.low_res_size is None:
        return CascadedDiffusionPipeline(
            unet, stage.scheduler, default_num_inference_steps={"base": inference.num_inference_steps}, **common
        )
    return SuperResolutionPipeline(
        unet,
        stage.scheduler,
        stage.noising_scheduler,
        default_num_inference_steps=inference.num_inference_steps,
        default_augmentation_level=inference.augmentation_level,
        **common,
    )


def save_pipeline(
    pipeline: CascadedDiffusionPipeline | SuperResolutionPipeline,
    resolved: dict[str, Any],
    figures: dict[str, float | None],
    grid: Image.Image | None,
    output_dir: Path,
) -> None:
    """Writes a stage's pipeline with its model card into `output_dir`."""
    with staged_folder(output_dir) as folder:
        pipeline.save_pretrained(folder)
        if grid is not None:
            grid.save(folder / "samples.png")
        write_stage_card(pipeline, resolved, figures, folder)
