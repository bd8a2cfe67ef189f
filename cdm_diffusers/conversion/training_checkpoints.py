"""Checkpoints of this package's own training as stages."""

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from ..files import read_json
from ..model_cards import SOURCE
from ..pipelines.loading import PARTS, check_output, part_names
from ..training.checkpoints import Result, loading
from ..training.export import pipeline_of, save_pipeline
from ..training.resolve import preset_of
from ..training.stage import build_stage
from .config import TrainingCheckpointConfig


def convert_training_checkpoint(
    checkpoint: str | Path, output_dir: str | Path, weights: Literal["ema", "raw"] = "ema"
):
    r"""
    A checkpoint of this package's training (`checkpoint-1000`) as the stage's pipeline folder, without resuming
    the training.

    Args:
        checkpoint (`str` or `Path`): the checkpoint's folder.
        output_dir (`str` or `Path`): the folder for the stage.
        weights (`"ema"` or `"raw"`, defaults to `"ema"`): the averaged weights or the last ones.

    Raises:
        `ValueError`: the folder is not such a checkpoint, or damaged; or `output_dir` holds parts of another pipeline.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if weights not in ("ema", "raw"):
        raise ValueError(f"`weights` is {weights!r}; it must be 'ema' or 'raw'.")
    if not (checkpoint / "progress.json").is_file():
        raise ValueError(
            f"`checkpoint` is {str(checkpoint)!r}, which is not a checkpoint folder of the training scripts."
        )
    with loading(checkpoint):
        resolved = read_json(checkpoint / "training_config.json", dict[str, Any], "training")
        progress = read_json(checkpoint / "progress.json", Result, "training")
        preset = preset_of(resolved)
        stage = build_stage(preset)
        file = checkpoint / ("ema.safetensors" if weights == "ema" else "model.safetensors")
        stage.unet.load_state_dict(load_file(file), strict=True)
    pipeline = pipeline_of(stage.unet.eval(), stage, preset, resolved["data"]["id2label"])
    check_output(output_dir, part_names(pipeline), names=(*PARTS, SOURCE))
    kind = "the EMA weights" if weights == "ema" else "the last weights, not their average,"
    kind = f"{kind} of the checkpoint at step {progress['step']}"
    save_pipeline(pipeline, resolved, {"loss": progress["loss"]}, None, output_dir, weights=kind)


def convert_checkpoint(config: TrainingCheckpointConfig) -> None:
    """[`convert_training_checkpoint`] with the options of the command line."""
    convert_training_checkpoint(config.checkpoint, config.output, config.weights)
