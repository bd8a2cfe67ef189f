"""Whether stages fit together: sizes, channels, classes, and the noise that one makes and the next expects."""

import itertools

import torch
from diffusers.utils import logging

from ..models.arguments import low_res_channels_of
from .solver_names import ANCESTRAL
from .solvers import scheduler_of
from .stages import CascadeStage, num_classes_of


logger = logging.get_logger(__name__)

# Largest difference of log(alpha_bar / (1 - alpha_bar)) between processes that count as the same: tables of one config
# differ by rounding only, and at both ends, near 1 and near 0, this is a relative difference.
LOG_SNR_TOLERANCE = 1e-9


def check_fit(stages: list[CascadeStage]):
    """
    Raises:
        ValueError: the stages of a cascade differ in channels or numbers of classes, or one takes images of another
            size than those before it make.
    """
    base, num_classes = stages[0].unet.config, num_classes_of(stages)
    if base.low_res_size is not None:
        raise ValueError("`base_unet` takes a low-resolution image (`low_res_size`); it is not a base network.")
    for before, stage in itertools.pairwise(stages):
        size, config = before.unet.config.sample_size, stage.unet.config
        if config.low_res_size != size:
            raise ValueError(
                f"Stage `{stage.name}` takes images of size {config.low_res_size}, but stage `{before.name}` makes "
                f"images of size {size}."
            )
    for stage in stages:
        config = stage.unet.config
        channels = {config.in_channels, config.out_channels}
        if config.low_res_size is not None:
            channels.add(low_res_channels_of(config))
        if channels != {base.out_channels}:
            raise ValueError(f"Stage `{stage.name}` has {channels} channels; `base` makes {base.out_channels}.")
        if config.num_classes not in (None, num_classes):
            raise ValueError(f"Stage `{stage.name}` has {config.num_classes} classes, one before it {num_classes}.")


def check_same_forward_process(before: CascadeStage, stage: CascadeStage):
    """
    z_s must be both what stage `before` arrives at, whatever samples it, and what `stage` is conditioned on.

    Raises:
        ValueError: the processes differ in length, or anywhere in alpha_bar.
    """
    if before.scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"`rescale_betas_zero_snr` of stage `{before.name}` is True; it must be False: if True, its process ends "
            f"without any signal (zero terminal SNR), while that of the inputs which stage `{stage.name}` was trained "
            f"on ends with some. Give stage `{before.name}` the scheduler that its network was trained with."
        )
    table, noising_table = scheduler_of(before, ANCESTRAL).table, stage.noising_scheduler.table
    if len(table) != len(noising_table) or not torch.allclose(
        table.alphas_cumprod.logit(), noising_table.alphas_cumprod.logit(), rtol=0, atol=LOG_SNR_TOLERANCE
    ):
        raise ValueError(
            f"Stage `{stage.name}` was trained on inputs noised by a {_schedule(stage.noising_scheduler)}, but stage "
            f"`{before.name}` diffuses by a {_schedule(before.scheduler)}: their alpha-bar tables differ."
        )


def _schedule(scheduler) -> str:
    return f"{scheduler.config.beta_schedule} schedule of {scheduler.config.num_train_timesteps} steps"


def same_id2label(name: str, id2label: dict | None, of_stage: dict | None) -> dict | None:
    """
    The class names that stage `name` and those before it share; None if neither has any. Classes that are named by
    their numbers, as in data without class names, take the names of the others.

    Raises:
        ValueError: they differ.
    """
    if id2label is None or of_stage is None:
        return of_stage if id2label is None else id2label
    if id2label.keys() == of_stage.keys() and (_is_numbered(id2label) or _is_numbered(of_stage)):
        return of_stage if _is_numbered(id2label) else id2label
    if id2label != of_stage:
        index = next(i for i in sorted({*id2label, *of_stage}) if id2label.get(i) != of_stage.get(i))
        raise ValueError(
            f"Stage `{name}` has other classes: `id2label[{index}]` is {of_stage.get(index)!r}, before it "
            f"{id2label.get(index)!r}."
        )
    return id2label


def _is_numbered(id2label: dict) -> bool:
    return all(name == str(label) for label, name in id2label.items())


def same_source_resolution(name: str, resolution: int | None, of_stage: int | None) -> int | None:
    """The resolution that stage `name` and those before it were averaged down from; warns where they differ."""
    if resolution is not None and of_stage is not None and resolution != of_stage:
        logger.warning(
            f"Stage `{name}` was trained on images averaged down from {of_stage} pixels, a stage before it from "
            f"{resolution}: what it was trained to expect and what it is given differ in distribution."
        )
    return of_stage if resolution is None else resolution
