"""The end of a training run: the stage as a pipeline folder that loads, with a model card."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..model_cards import write_stage_card
from ..models import CascadedUNet2DModel
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..presets import StagePreset
from .checkpoints import TEMPORARY_PREFIX, sync_folder, sync_to_disk
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


@contextmanager
def staged_folder(output_dir: Path) -> Iterator[Path]:
    """A new, empty folder that is emptied into `output_dir` once the block has filled it, and never stays."""
    temporary = output_dir / f"{TEMPORARY_PREFIX}pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, output_dir: Path) -> None:
    """
    Moves a complete pipeline folder to its final place part by part. `model_index.json`, without which nothing loads,
    goes first and comes back last: an interruption leaves no folder that half loads.
    """
    sync_to_disk(temporary)
    index = output_dir / "model_index.json"
    index.unlink(missing_ok=True)
    for part in sorted(temporary.iterdir(), key=lambda part: part.name == index.name):
        final = output_dir / part.name
        if final.is_dir():
            shutil.rmtree(final)
        os.rename(part, final)
    sync_folder(output_dir)
