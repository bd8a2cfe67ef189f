"""What a saved pipeline consists of."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from ..model_cards import named_settings
from ..pipelines import SuperResolutionPipeline
from ..pipelines.loading import Pipeline, load_without_weights
from ..pipelines.stages import CascadeStage
from ..tables import markdown_table
from .config import InfoConfig


SCHEDULER_KEYS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "variance_type", "prediction_type")


def info(config: InfoConfig) -> None:
    """Prints what [`facts_of`] says of `config.pipeline`."""
    description = facts_of(config.pipeline)
    print(json.dumps(description, indent=2) if config.json else as_text(description))


def facts_of(name: str) -> dict[str, Any]:
    """
    Stages, classes and licence of the pipeline in a folder or on the Hub, without its weights, as JSON has them.

    Raises:
        ValueError: it is not a pipeline of this package.
        OSError: there is none.
    """
    pipeline = load_without_weights(name)
    classes = pipeline.config.id2label
    return {
        "pipeline": name,
        "class": type(pipeline).__name__,
        "license": license_of(name),
        "source_resolution": pipeline.config.source_resolution,
        "classes": None if classes is None else {str(number): label for number, label in classes.items()},
        **({"settings": pipeline.config.settings} if pipeline.config.get("settings") else {}),
        "stages": {stage.name: describe_stage(stage, pipeline) for stage in pipeline.stages},
    }


def describe_stage(stage: CascadeStage, pipeline: Pipeline) -> dict[str, Any]:
    """Network, schedulers and defaults of one stage."""
    unet = stage.unet.config
    return {
        "size": unet.sample_size,
        "low_res_size": unet.low_res_size,
        "channels": unet.out_channels,
        "num_classes": unet.num_classes,
        "parameters": stage.unet.num_parameters(),
        "time_conditioning": unet.time_conditioning,
        "scheduler": describe_scheduler(stage.scheduler),
        "noising_scheduler": stage.noising_scheduler and describe_scheduler(stage.noising_scheduler),
        "defaults": defaults_of(stage, pipeline),
    }


def describe_scheduler(scheduler: Any) -> dict[str, Any]:
    """A scheduler's class, and those entries of its config that say what it was trained with."""
    config = scheduler.config
    return {"class": type(scheduler).__name__, **{key: config[key] for key in SCHEDULER_KEYS if key in config}}


def defaults_of(stage: CascadeStage, pipeline: Pipeline) -> dict[str, int | float | None]:
    """Steps, s and guidance of a call that does not give them."""
    if isinstance(pipeline, SuperResolutionPipeline):
        return pipeline.stage_options()
    return {name: values.get(stage.name) for name, values in pipeline.stage_options().items()}


def license_of(name: str) -> str | None:
    """From the model card; None where it does not say."""
    file = Path(name) / "README.md"
    if os.path.isdir(name):
        return ModelCard.load(file).data.license if file.is_file() else None
    try:
        return ModelCard.load(name).data.license
    except EntryNotFoundError:
        return None


def as_text(description: dict[str, Any]) -> str:
    """What [`facts_of`] found, as a person reads it."""
    header = ["stage", "images", "parameters", "predicts", "scheduler", "trained with", "steps", "s", "guidance"]
    rows = []
    for name, stage in description["stages"].items():
        scheduler, defaults = stage["scheduler"], stage["defaults"]
        size, low_res = stage["size"], stage["low_res_size"]
        rows.append(
            [
                name,
                f"{size}x{size}" if low_res is None else f"{low_res}x{low_res} to {size}x{size}",
                f"{stage['parameters'] / 1e6:.2f}M",
                scheduler["prediction_type"],
                scheduler["class"],
                f"T = {scheduler['num_train_timesteps']}, {scheduler['beta_schedule']}",
                *(value for option, value in defaults.items() if option != "timesteps"),
            ]
        )
    classes = description["classes"]
    lines = [
        f"{description['class']} in {description['pipeline']}",
        f"licence: {description['license'] or 'unknown'}",
        "classes: " + (", ".join(f"{n} {label}" for n, label in classes.items()) if classes else "none named"),
        "",
        markdown_table(header, rows),
    ]
    for name, stage in description["stages"].items():
        if times := stage["defaults"].get("timesteps"):
            lines.append(f"time steps of {name}: {', '.join(map(str, times))}")
    if "settings" in description:
        lines.append(f"settings by name: {named_settings(description['settings'])}")
    return "\n".join(lines)
