"""Stages of a cascade, and the options that each takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin

from ..diffusion import held_to
from ..models import CascadedUNet2DModel
from ..models.arguments import low_res_channels_of
from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from ..schedulers.ancestral import MOST_STEPS, check_timesteps
from .denoising import Denoiser
from .inputs import check_augmentation_level, check_count, check_guidance_scale
from .solvers import OWN_SCHEDULERS


# Which draws make the image of a seed. It changes whenever the same seed begins to make other images, so that samples
# of the old rule are not mixed with those of the new one.
NOISE_RULE = "the noise of conditioning augmentation, whatever s is, before x_T"


def noise_rule(stages: "list[CascadeStage]", augmentation_levels: dict[str, int], truncated: bool) -> str | None:
    """[`NOISE_RULE`] if its last change affected these images, as at s = 0 and when truncated; else None."""
    levels = [augmentation_levels[stage.name] for stage in stages if stage.noising_scheduler is not None]
    return NOISE_RULE if levels and (truncated or 0 in levels) else None


class StageOptions(NamedTuple):
    """
    How a stage is sampled: number of steps, s, w of guidance, and its time steps if they are not spaced evenly. None
    is the default; for s, it also stands for a stage that takes none.
    """

    num_inference_steps: int | None = None
    augmentation_level: int | None = None
    guidance_scale: float | None = None
    timesteps: Sequence[int] | None = None

    def before(self, others: "StageOptions") -> "StageOptions":
        """These options, else those of `others`; a number of steps or time steps here overrides both there."""
        if self.num_inference_steps is not None or self.timesteps is not None:
            others = others._replace(num_inference_steps=None, timesteps=None)
        return StageOptions(*(other if one is None else one for one, other in zip(self, others, strict=True)))


@dataclass(frozen=True)
class CascadeStage:
    r"""
    One stage of a cascade: `name` ("base", "super_res_1", ...), the network, the scheduler it samples with, and the
    forward process of its Gaussian conditioning augmentation (None for a base and for stages without).
    """

    name: str
    unet: CascadedUNet2DModel
    scheduler: SchedulerMixin
    noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None = None

    def __post_init__(self):
        takes_level = self.unet.config.augmentation_level_embedding
        if self.noising_scheduler is None and takes_level:
            raise ValueError(
                f"The network of stage `{self.name}` takes an augmentation level, but the stage has no "
                "`noising_scheduler` to make the noise with."
            )
        if self.noising_scheduler is not None and not isinstance(self.noising_scheduler, OWN_SCHEDULERS):
            raise ValueError(
                f"The `noising_scheduler` of stage `{self.name}` is a {type(self.noising_scheduler).__name__}; it "
                "must be the CascadedDDPMScheduler or ContinuousDDPMScheduler of the preceding stage's training."
            )

    def default_num_inference_steps(self, recommended: int | None) -> int:
        """What was recommended, else T for CascadedDDPMScheduler and 100 for others; Diffusers' take at most 100, and
        at most T / 2, since solvers need few steps and cannot use all of a cosine schedule."""
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        if isinstance(self.scheduler, CascadedDDPMScheduler):
            return recommended or num_train_timesteps
        if isinstance(self.scheduler, ContinuousDDPMScheduler):
            return recommended or min(100, num_train_timesteps)
        return min(recommended or 100, 100, max(1, num_train_timesteps // 2))

    def _check_default(self, default: StageOptions):
        for option, lowest in (("num_inference_steps", 1), ("augmentation_level", 0)):
            value = getattr(default, option)
            if value is not None:
                check_count(f"The default `{option}` of stage `{self.name}`", value, lowest, MOST_STEPS)

    def options(self, given: StageOptions, default: StageOptions) -> StageOptions:
        """
        What was given, else the default, else [`default_num_inference_steps`], s = 0 and no guidance. A number of
        steps alone is spaced evenly, whatever the default time steps.

        Raises:
            ValueError: a number is out of range, numbers of steps contradict each other, or the stage takes no s or no
                guidance.
        """
        self._check_default(default)
        steps, level, scale, timesteps = given
        if steps is timesteps is None:
            timesteps = default.timesteps
        if timesteps is not None:
            timesteps = self._checked_timesteps(steps, timesteps)
            steps = len(timesteps)
        if steps is None:
            steps = self.default_num_inference_steps(default.num_inference_steps)
        if level is None and self.noising_scheduler is not None:
            level = default.augmentation_level or 0
        if scale is None:
            scale = 1.0 if default.guidance_scale is None else default.guidance_scale
        return StageOptions(
            check_count(f"`num_inference_steps` of stage `{self.name}`", steps, highest=MOST_STEPS),
            check_augmentation_level(self.name, level, self.noising_scheduler),
            check_guidance_scale(self.name, scale, self.unet),
            timesteps,
        )

    def _checked_timesteps(self, steps: int | None, timesteps: Sequence[int]) -> list[int]:
        what, count = f"`timesteps` of stage `{self.name}`", self.scheduler.config.num_train_timesteps
        timesteps = check_timesteps(what, timesteps, count)
        if steps not in (None, len(timesteps)):
            raise ValueError(
                f"{what} has {len(timesteps)} entries, but `num_inference_steps` is {steps}: leave one of them out."
            )
        return timesteps

    def denoiser(
        self,
        class_labels: torch.Tensor | None,
        low_res: torch.Tensor | None,
        level: int | None,
        guidance_scale: float,
        held_to_image: torch.Tensor | None = None,
    ) -> Denoiser:
        """
        The network with its conditions; those that it was trained without are left out.

        Args:
            held_to_image: (B, C, h, h) in [-1, 1]; the area averages that x_0 is held to, see [`held_to`].
        """
        config = self.unet.config
        return Denoiser(
            self.unet,
            class_labels=None if config.num_classes is None else class_labels,
            low_res=low_res,
            augmentation_level=level if config.augmentation_level_embedding else None,
            guidance_scale=guidance_scale,
            refine=None if held_to_image is None else partial(held_to, low_res=held_to_image.clamp(-1, 1)),
        )

    def check_consistency(self) -> None:
        """
        Raises:
            ValueError: the stage's images cannot be averaged to the size and channels of its input.
        """
        config = self.unet.config
        channels = low_res_channels_of(config)
        if config.sample_size % config.low_res_size or channels != config.out_channels:
            made, taken = (f"{size}x{size}" for size in (config.sample_size, config.low_res_size))
            raise ValueError(
                f"`consistency` is True, but the images of stage `{self.name}`, {made} of {config.out_channels} "
                f"channels, cannot be averaged to its input, {taken} of {channels}: leave it out."
            )


def num_classes_of(stages: list[CascadeStage]) -> int | None:
    """Number of classes of the conditional stages, None if no stage is conditional."""
    return next((stage.unet.config.num_classes for stage in stages if stage.unet.config.num_classes is not None), None)
