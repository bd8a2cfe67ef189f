"""Checkpoints of this package's own training as stages."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from ..presets import (
    BlurAugmentationPreset,
    DataPreset,
    GaussianAugmentationPreset,
    InferencePreset,
    SchedulerPreset,
    StagePreset,
    TrainingPreset,
    UNetPreset,
)
from ..training.checkpoints import loading, write_json
from ..training.export import save_pipeline, stage_pipeline
from ..training.stage import build_stage
from .cards import say_which_weights


AUGMENTATIONS = {"gaussian": GaussianAugmentationPreset, "blur": BlurAugmentationPreset}


def convert_training_checkpoint(
    checkpoint: str | Path, output_dir: str | Path, weights: Literal["ema", "raw"] = "ema"
):
    r"""
    A checkpoint of this package's training (`checkpoint-1000`) as the stage's pipeline folder, without going on
    training.

    Args:
        checkpoint (`str` or `Path`): the checkpoint's folder.
        output_dir (`str` or `Path`): the folder for the stage.
        weights (`"ema"` or `"raw"`, defaults to `"ema"`): the averaged weights or the last ones.

    Raises:
        `ValueError`: the folder is no such checkpoint, or damaged.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if weights not in ("ema", "raw"):
        raise ValueError(f"`weights` is {weights!r}; it must be 'ema' or 'raw'.")
    if not (checkpoint / "progress.json").is_file():
        raise ValueError(
            f"`checkpoint` is {str(checkpoint)!r}, which is no checkpoint folder of the training scripts."
        )
    with loading(checkpoint):
        resolved = json.loads((checkpoint / "training_config.json").read_text())
        progress = json.loads((checkpoint / "progress.json").read_text())
        preset = preset_from_resolved(resolved)
        stage = build_stage(preset)
        file = checkpoint / ("ema.safetensors" if weights == "ema" else "model.safetensors")
        stage.unet.load_state_dict(load_file(file), strict=True)
    pipeline = stage_pipeline(stage.unet.eval(), stage, preset, resolved["data"]["id2label"])
    save_pipeline(pipeline, resolved, {"loss": progress["loss"]}, None, output_dir)
    say_which_weights(output_dir / "README.md", weights, progress["step"])
    write_json(output_dir / "training_config.json", resolved)


def preset_from_resolved(resolved: dict[str, Any]) -> StagePreset:
    """The preset that a run's `training_config.json` describes."""
    augmentation = resolved["augmentation"]
    return StagePreset(
        name=resolved["name"],
        source=resolved["source"],
        unet=_section(UNetPreset, resolved["unet"]),
        scheduler=_section(SchedulerPreset, resolved["scheduler"]),
        augmentation=None if augmentation is None else _section(AUGMENTATIONS[augmentation["kind"]], augmentation),
        training=_section(TrainingPreset, resolved["training"]),
        inference=_section(InferencePreset, resolved["inference"]),
        data=_section(DataPreset, resolved["data"]),
    )


def _section(kind: type, values: dict[str, Any]) -> Any:
    """A part of a preset from JSON, which has lists for tuples, and entries that are not the preset's."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in values]
    return kind(**{name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in names})
