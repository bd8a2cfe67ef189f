"""The resolved configuration of a run: a preset, what the command line overrides of it, and what the data says."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..added import defaults_of_added
from ..data.config import DataConfig
from ..models.arguments import UNetArguments
from ..models.unet_2d_cascaded import side_factor
from ..presets import (
    COSINE_AUGMENTATION,
    BlurAugmentationPreset,
    DataPreset,
    GaussianAugmentationPreset,
    InferencePreset,
    SchedulerPreset,
    StagePreset,
    TrainingPreset,
    get_preset,
)
from .batches import BATCH, MICRO_BATCH
from .config import RunConfig, TrainingConfig


AUGMENTATIONS = {"gaussian": GaussianAugmentationPreset, "blur": BlurAugmentationPreset}

# What a resumed run may change; everything else would make it another run.
MAY_CHANGE = {
    "data.dataset_revision",  # see same_data.py
    "data.train_data_dir",
    "training.max_train_steps",
    "training.learning_rate",
    "training.lr_scheduler",
    "training.lr_warmup_steps",
    "training.max_grad_norm",
    "distillation.pipeline",  # its stage's fingerprint stays
    "pretrained.pipeline",
}

# How a batch is divided, and what follows from that; see [`drawn_for`].
SPLIT = {"training.num_processes", "training.gradient_accumulation_steps", "training.drawn_for"}

# What configurations mean that lack fields added in later versions.
DEFAULTS_OF_ADDED = {
    f"{section}.{name}": default
    for section, kind in (
        ("unet", UNetArguments),
        ("augmentation", GaussianAugmentationPreset),
        ("training", TrainingPreset),
    )
    for name, default in defaults_of_added(kind).items()
}

# Options with no influence on the trained weights beyond their rounding.
RUN_OPTIONS = (
    "output_dir",
    "dataloader_num_workers",
    "hold_in_memory",
    "gradient_checkpointing",
    "compile",
    "channels_last",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "logging_steps",
    "validation_steps",
    "num_validation_images",
    "validation_inference_steps",
    "report_to",
    "logging_dir",
)


def resolve_preset(
    config: TrainingConfig, super_resolution: bool, num_processes: int = 1, saved: dict[str, Any] | None = None
) -> StagePreset:
    """
    The preset with the options that were given. Its `train_batch_size` stays global: over all processes and
    accumulation steps.

    Args:
        saved: the configuration of the checkpoint that the run resumes from. Fields that the preset has gained since
            (which `saved` lacks) keep their defaults.

    Raises:
        ValueError: if preset and options do not fit each other.
    """
    preset = get_preset(config.preset)
    if saved is not None:
        preset = as_of(saved, preset)
    check_kind(config, preset, super_resolution)
    batch_size = global_batch_size(preset, config.train_batch_size, num_processes, config.gradient_accumulation_steps)
    further: dict[str, Any] = {"train_batch_size": batch_size}
    if config.crop_size == 0:  # whole images from the first step on
        further |= {"crop_size": None, "whole_image_fraction": config.whole_image_fraction or 0.0}
    training = override_training(preset.training, config, **further)
    if config.unconditional and config.label_dropout is None:
        training = dataclasses.replace(training, label_dropout=0.0)
    augmentation = resolve_augmentation(config, preset)
    inference = override(preset.inference, config)
    if not isinstance(augmentation, GaussianAugmentationPreset):
        inference = dataclasses.replace(inference, augmentation_level=None)
    preset = dataclasses.replace(
        preset,
        unet=resolve_unet(config, preset.unet, training.label_dropout, augmentation),
        scheduler=override(preset.scheduler, config),
        augmentation=augmentation,
        training=training,
        inference=inference,
        data=override(preset.data, config),
    )
    check_sizes(preset)
    check_crop(preset)
    check_skip(preset, config.pretrained_model_name_or_path is not None)
    return preset


def as_of(saved: dict[str, Any], preset: StagePreset) -> StagePreset:
    """`preset` without what came after the configuration `saved`: fields that it lacks take their defaults."""
    sections = {}
    for section in dataclasses.fields(preset):
        part = getattr(preset, section.name)
        if dataclasses.is_dataclass(part) and saved.get(section.name) is not None:
            defaults = defaults_of_added(part).items()
            lacked = {name: default for name, default in defaults if name not in saved[section.name]}
            sections[section.name] = dataclasses.replace(part, **lacked)
    return dataclasses.replace(preset, **sections)


def resolve_augmentation(
    config: TrainingConfig, preset: StagePreset
) -> GaussianAugmentationPreset | BlurAugmentationPreset | None:
    """The preset's conditioning augmentation or the one that was asked for, with the options that go with it."""
    kinds = {"gaussian": COSINE_AUGMENTATION, "blur": BlurAugmentationPreset(), "none": None}
    augmentation = preset.augmentation
    if config.conditioning_augmentation is not None:
        asked = kinds[config.conditioning_augmentation]
        augmentation = augmentation if type(augmentation) is type(asked) else asked
    if config.augmentation_level is not None and isinstance(augmentation, GaussianAugmentationPreset):
        augmentation = dataclasses.replace(augmentation, zero_level_probability=None)  # of drawn levels only
    options = {
        GaussianAugmentationPreset: {
            "augmentation_level": "level",
            "zero_level_probability": "zero_level_probability",
        },
        BlurAugmentationPreset: {"blur_sigma_range": "sigma_range", "blur_probability": "probability"},
    }
    for kind, names in options.items():
        for option, field in names.items():
            value = getattr(config, option)
            if value is None:
                continue
            if not isinstance(augmentation, kind):
                raise ValueError(
                    f"`{option}` is {value}, but the conditioning augmentation of {preset.name!r} is "
                    f"{'none' if augmentation is None else type(augmentation).__name__}: leave it out, or choose "
                    "another `conditioning_augmentation`."
                )
            augmentation = dataclasses.replace(
                augmentation, **{field: tuple(value) if isinstance(value, list) else value}
            )
    return augmentation


def resolve_unet(
    config: TrainingConfig, unet: UNetArguments, label_dropout: float, augmentation: Any
) -> UNetArguments:
    """The network's arguments, and what options that are not its own mean for it."""
    further = {}
    if config.num_attention_heads is not None or config.attention_head_dim is not None:
        # The preset may give the other one of the two.
        further["num_attention_heads"] = config.num_attention_heads
        further["attention_head_dim"] = config.attention_head_dim
    if config.attention_resolutions == [0]:
        further["attention_resolutions"] = ()
    if isinstance(config.layers_per_block, list) and len(config.layers_per_block) == 1:
        further["layers_per_block"] = config.layers_per_block[0]
    if config.num_channels is not None:
        further["in_channels"] = further["out_channels"] = config.num_channels
    # The paper's networks for one s (Table 2b) are not conditioned on it: s is then part of the network, not an input.
    amortised = isinstance(augmentation, GaussianAugmentationPreset) and augmentation.level is None
    further["augmentation_level_embedding"] = amortised
    if config.unconditional:
        further["num_classes"] = None
    unet = override(unet, config, null_class=label_dropout > 0, **further)
    if unet.null_class and unet.num_classes is None:
        raise ValueError(f"`label_dropout` is {label_dropout}, but the stage has no classes: leave it out.")
    return unet


def override_training(training: TrainingPreset, config: RunConfig, **further: Any) -> TrainingPreset:
    """[`override`] of the optimisation, whose precision, unless given, is that of `accelerate launch`."""
    if config.mixed_precision is None:  # the launcher passes on what it was told or is configured for
        further["mixed_precision"] = os.environ.get("ACCELERATE_MIXED_PRECISION", training.mixed_precision)
    return override(training, config, **further)


def override(section: Any, config: RunConfig, **further: Any) -> Any:
    """A copy of a preset's `section` with the options that were given and are called like one of its fields."""
    names = {f.name for f in dataclasses.fields(section)} & {f.name for f in dataclasses.fields(config)}
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return dataclasses.replace(section, **(given | further))


def check_skip(preset: StagePreset, is_pretrained: bool) -> None:
    """Refuses `low_res_skip` where it would be of no use."""
    unet, prediction_type = preset.unet, preset.scheduler.prediction_type
    if unet.low_res_skip and prediction_type != "sample":
        raise ValueError(
            f"`low_res_skip` is True, but `prediction_type` is {prediction_type!r}: give prediction_type sample, or "
            "leave out `low_res_skip`."
        )
    if unet.low_res_skip_threshold > 0 and isinstance(preset.augmentation, GaussianAugmentationPreset):
        raise ValueError(
            f"`low_res_skip_threshold` is {unet.low_res_skip_threshold}, which would leave noise of the Gaussian "
            "conditioning augmentation in the images: leave it out, or choose another `conditioning_augmentation`."
        )
    if unet.low_res_skip_threshold > 0 and not is_pretrained:
        raise ValueError(
            f"`low_res_skip_threshold` is {unet.low_res_skip_threshold}, below which a network learns nothing, and a "
            "new one starts at 0: train with `low_res_skip` alone first, and start from those weights "
            "(`pretrained_model_name_or_path`)."
        )


def check_kind(config: TrainingConfig, preset: StagePreset, super_resolution: bool) -> None:
    """Refuses presets and options of the other kind of stage."""
    is_super_resolution = preset.unet.low_res_size is not None
    if is_super_resolution != super_resolution:
        script = "cdm train sr" if is_super_resolution else "cdm train base"
        kind = "super-resolution" if is_super_resolution else "base"
        raise ValueError(f"`preset` is {preset.name!r}, a {kind} stage: train it with {script}.")
    for name in () if super_resolution else ("low_res_size", "low_res_skip", "conditioning_augmentation"):
        if value := getattr(config, name):
            raise ValueError(f"`{name}` is {value!r}, but {preset.name!r} is a base stage: leave it out.")


def global_batch_size(
    preset: StagePreset, train_batch_size: int | None, num_processes: int, gradient_accumulation_steps: int
) -> int:
    """Images per optimizer step, over all processes and micro-batches; `train_batch_size` is of one of these."""
    split = num_processes * gradient_accumulation_steps
    if train_batch_size is not None:
        return train_batch_size * split
    if preset.training.train_batch_size % split:
        raise ValueError(
            f"the batch of {preset.training.train_batch_size} of {preset.name!r} does not divide over {num_processes} "
            f"processes and `gradient_accumulation_steps` of {gradient_accumulation_steps}: "
            "give `train_batch_size`, per process and micro-batch."
        )
    return preset.training.train_batch_size


def check_sizes(preset: StagePreset) -> None:
    """Images are averaged over whole blocks of pixels, down from the source resolution."""
    sizes = [("source_resolution", preset.data.source_resolution), ("sample_size", preset.unet.sample_size)]
    if preset.unet.low_res_size is not None:
        sizes.append(("low_res_size", preset.unet.low_res_size))
    for (larger, large), (smaller, small) in itertools.pairwise(sizes):
        if small < 1 or large % small:
            raise ValueError(
                f"`{smaller}` is {small}, which does not divide `{larger}` of {large}: change one of them."
            )


def check_crop(preset: StagePreset) -> None:
    """Crops are squares of whole low-resolution pixels, smaller than the image, for networks that take any size."""
    training, unet = preset.training, preset.unet
    if not 0 <= training.whole_image_fraction <= 1:
        raise ValueError(f"`whole_image_fraction` is {training.whole_image_fraction}; it must lie in 0..1.")
    size = training.crop_size
    if size is None and training.whole_image_fraction:
        raise ValueError(
            f"`whole_image_fraction` is {training.whole_image_fraction} without a `crop_size`: leave it out."
        )
    if size is None:
        return
    if unet.low_res_size is None:
        raise ValueError(f"`crop_size` is {size}, but {preset.name!r} is a base stage: leave it out.")
    if unet.mid_block_attention or unet.attention_resolutions:
        raise ValueError(
            f"`crop_size` is {size}, but the network of {preset.name!r} has attention, which only takes whole images: "
            "leave it out, or give `--attention_resolutions 0 --mid_block_attention false`."
        )
    factor = side_factor(unet)
    if not 0 < size < unet.sample_size or size % factor:
        raise ValueError(
            f"`crop_size` is {size}; it must be smaller than `sample_size`, {unet.sample_size}, and a multiple of "
            f"{factor}: whole low-resolution pixels, and whole patches on every level."
        )


def data_config(config: RunConfig, preset: StagePreset) -> DataConfig:
    """Which images, as the options and the preset say."""
    of_network = {"num_channels": preset.unet.in_channels, "class_conditional": preset.unet.num_classes is not None}
    return DataConfig.of(vars(config), **dataclasses.asdict(preset.data), **of_network)


def resolve_channels_last(
    asked: bool | None, saved: dict[str, Any] | None, compiled: bool, device: torch.device
) -> bool:
    """
    What was asked for, else the checkpoint's, because the format changes the rounding, else no: training steps took
    longer with it on a CPU, and on an H200 (docs/benchmarks.md).

    Raises:
        ValueError: if the network is to be compiled as well, on a CPU.
    """
    by_default = saved is not None and saved["run"]["channels_last"]
    channels_last = by_default if asked is None else asked
    if channels_last and compiled and device.type == "cpu":
        raise ValueError(  # see compile_network
            "`compile` and `channels_last` are both True (the latter as asked for, or as the checkpoint has it), with "
            "which Inductor loses gradients on a CPU: leave out `--compile`, or give `--channels_last false`."
        )
    return channels_last


def run_description(
    config: RunConfig,
    preset: StagePreset,
    id2label: dict[int, str] | None,
    num_examples: int | None,
    num_processes: int,
    drawn_for: str = BATCH,
    num_lanes: int | None = None,
) -> dict[str, Any]:
    """
    The resolved configuration as the plain nested dict that `training_config.json` holds. Streams have no
    `num_examples` (None); `num_lanes` is theirs, None for those that are not read in lanes. What is under `run` has no
    influence on the trained weights beyond their rounding.
    """
    resolved = dataclasses.asdict(preset)
    if preset.augmentation is not None:
        kind = next(kind for kind, of in AUGMENTATIONS.items() if isinstance(preset.augmentation, of))
        resolved["augmentation"] = {"kind": kind} | resolved["augmentation"]
    resolved["training"] |= {
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_processes": num_processes,
        "seed": config.seed,
        "drawn_for": drawn_for,
    }
    resolved["data"] = dataclasses.asdict(data_config(config, preset))
    resolved["data"] |= {"num_examples": num_examples, "id2label": id2label}
    if num_lanes is not None:
        resolved["data"]["num_lanes"] = num_lanes
    elif config.streaming:
        resolved["data"]["num_workers"] = config.dataloader_num_workers  # each shuffles a part of the stream
    resolved["run"] = {name: getattr(config, name) for name in RUN_OPTIONS}
    return json.loads(json.dumps(resolved))


def preset_of(resolved: dict[str, Any]) -> StagePreset:
    """The inverse of [`run_description`]: the preset that a run's `training_config.json` describes."""
    augmentation = resolved["augmentation"]
    return StagePreset(
        name=resolved["name"],
        source=resolved["source"],
        unet=section(UNetArguments, resolved["unet"]),
        scheduler=section(SchedulerPreset, resolved["scheduler"]),
        augmentation=None if augmentation is None else section(AUGMENTATIONS[augmentation["kind"]], augmentation),
        training=section(TrainingPreset, resolved["training"]),
        inference=section(InferencePreset, resolved["inference"]),
        data=section(DataPreset, resolved["data"]),
    )


def section(kind: type, values: dict[str, Any]) -> Any:
    """A part of a preset from a saved configuration, which has lists for tuples, and further entries."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in values]
    return kind(**{name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in names})


def drawn_for(saved: dict[str, Any] | None) -> str:
    """For what a run draws its noise: batches, unless it resumes one whose noise was drawn for each part."""
    if saved is None or num_parts(saved) == 1:
        return BATCH
    return saved["training"].get("drawn_for", MICRO_BATCH)


def was_streamed_whole(saved: dict[str, Any] | None) -> bool:
    """Whether a run resumes one of 0.1.0 on a stream, which was not in lanes."""
    return saved is not None and saved["data"]["streaming"] and "num_lanes" not in saved["data"]


def num_parts(resolved: dict[str, Any]) -> int:
    """Into how many parts a run divides a batch."""
    return resolved["training"]["num_processes"] * resolved["training"]["gradient_accumulation_steps"]


def check_resumable(saved: dict[str, Any], resolved: dict[str, Any], checkpoint: Path) -> None:
    """
    Raises:
        ValueError: if a checkpoint's configuration and this run's differ in more than a resumed run may change; names
            every field that differs, with both values.
    """
    saved, resolved = DEFAULTS_OF_ADDED | flatten(saved), DEFAULTS_OF_ADDED | flatten(resolved)
    may_change = MAY_CHANGE | (SPLIT if resolved["training.drawn_for"] == BATCH else {"training.drawn_for"})
    differences = [
        f"{name} ({saved.get(name)!r} in the checkpoint, {resolved.get(name)!r} now)"
        for name in sorted(saved.keys() | resolved.keys())
        if saved.get(name) != resolved.get(name)
        and name not in may_change
        and not name.startswith(("run.", "inference."))
    ]
    if differences:
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, but this is another run: {'; '.join(differences)}. "
            "Give the options of the first run, or another `output_dir` and no `resume_from_checkpoint`."
        )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
