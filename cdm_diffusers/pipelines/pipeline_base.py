"""What both pipelines share: stages, and the loop that samples one of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from typing_extensions import Self

from ..models import CascadedUNet2DModel
from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from .denoising import AncestralSampler, Denoiser, SolverSampler
from .inputs import check_augmentation_level, check_count, check_guidance_scale
from .solvers import OWN_SCHEDULERS


# Which draws make the image of a seed. It changes whenever the same seed begins to make other images, so that samples
# of the old rule are not mixed with those of the new one.
NOISE_RULE = "the noise of conditioning augmentation, whatever s is, before x_T"


def noise_rule(stages: "list[CascadeStage]", augmentation_levels: dict[str, int], truncated: bool) -> str | None:
    """[`NOISE_RULE`] where its last change changed the images of a seed, at s = 0 and when truncated; else None."""
    levels = [augmentation_levels[stage.name] for stage in stages if stage.noising_scheduler is not None]
    return NOISE_RULE if levels and (truncated or 0 in levels) else None


class StageOptions(NamedTuple):
    """How a stage is sampled: number of steps, s, and w of guidance. None is the default, and s of stages without."""

    num_inference_steps: int | None = None
    augmentation_level: int | None = None
    guidance_scale: float | None = None


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
                f"The network of stage `{self.name}` is told an augmentation level, but the stage has no "
                "`noising_scheduler` to make the noise with."
            )
        if self.noising_scheduler is not None and not isinstance(self.noising_scheduler, OWN_SCHEDULERS):
            raise ValueError(
                f"The `noising_scheduler` of stage `{self.name}` is a {type(self.noising_scheduler).__name__}; it "
                "must be the CascadedDDPMScheduler or ContinuousDDPMScheduler of the preceding stage's training."
            )

    def default_num_inference_steps(self, recommended: int | None) -> int:
        """What was recommended, else T for CascadedDDPMScheduler and 100 for others; Diffusers' take at most 100 and
        half of T, since solvers need few steps and cannot use all of a cosine schedule."""
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        if isinstance(self.scheduler, CascadedDDPMScheduler):
            return recommended or num_train_timesteps
        if isinstance(self.scheduler, ContinuousDDPMScheduler):
            return recommended or min(100, num_train_timesteps)
        return min(recommended or 100, 100, max(1, num_train_timesteps // 2))

    def options(self, given: StageOptions, default: StageOptions) -> StageOptions:
        """
        What was given, else the default, else [`default_num_inference_steps`], s = 0 and no guidance.

        Raises:
            ValueError: a number is out of range, or the stage takes no s or no guidance.
        """
        steps, level, scale = given
        if steps is None:
            steps = self.default_num_inference_steps(default.num_inference_steps)
        if level is None and self.noising_scheduler is not None:
            level = default.augmentation_level or 0
        if scale is None:
            scale = 1.0 if default.guidance_scale is None else default.guidance_scale
        return StageOptions(
            check_count(f"`num_inference_steps` of stage `{self.name}`", steps),
            check_augmentation_level(self.name, level, self.noising_scheduler),
            check_guidance_scale(self.name, scale, self.unet),
        )

    def denoiser(
        self, class_labels: torch.Tensor | None, low_res: torch.Tensor | None, level: int | None, guidance_scale: float
    ) -> Denoiser:
        """The network with its conditions; those that it was trained without are left out."""
        config = self.unet.config
        return Denoiser(
            self.unet,
            class_labels=None if config.num_classes is None else class_labels,
            low_res=low_res,
            augmentation_level=level if config.augmentation_level_embedding else None,
            guidance_scale=guidance_scale,
        )


def num_classes_of(stages: list[CascadeStage]) -> int | None:
    """Classes of the conditional stages, None if there are none."""
    return next((stage.unet.config.num_classes for stage in stages if stage.unet.config.num_classes is not None), None)


class StepEnd:
    """`callback_on_step_end` with the tensors it asked for."""

    def __init__(self, callback: Callable | None, tensor_inputs: list[str], known: list[str]):
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        if any(name not in known for name in tensor_inputs):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` is {tensor_inputs}; there is only {known}.")
        self.callback = callback
        self.tensor_inputs = tensor_inputs

    def __call__(self, pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, sample: torch.Tensor):
        """The sample to go on with."""
        if self.callback is None:
            return sample
        tensors = {"sample": sample}
        outputs = self.callback(pipe, step, timestep, {name: tensors[name] for name in self.tensor_inputs})
        return outputs.get("sample", sample)


class PixelDiffusionPipeline(DiffusionPipeline):
    """Base of [`CascadedDiffusionPipeline`] and [`SuperResolutionPipeline`]: loading, and the loop over steps."""

    _callback_tensor_inputs = ["sample"]
    _interrupt = False
    _current_stage = None

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt = True`, which ends sampling after the current step."""
        return self._interrupt

    @property
    def current_stage(self) -> str | None:
        """The name of the stage that is sampled at the moment."""
        return self._current_stage

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        r"""
        Loads a folder that [`~DiffusionPipeline.save_pretrained`] wrote, or a Hub id; `kwargs` are those of
        [`DiffusionPipeline.from_pretrained`] (`dtype`, `variant`, `device_map`, ...). Pickled weights are loaded only
        with `use_safetensors=False`.

        Raises:
            `OSError`: the folder is incomplete or damaged; the message says where.
            `ValueError`: the folder holds another kind of pipeline.
        """
        kwargs = {"use_safetensors": True, **kwargs}
        if not os.path.isdir(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        try:
            index = cls.load_config(pretrained_model_name_or_path)
            components, _ = cls._get_signature_keys(cls)
            absent = [name for name in components if name not in (*index, *kwargs, *cls._optional_components)]
            if absent:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a {index['_class_name']} without {absent}, which is not a "
                    f"{cls.__name__}."
                )
            for name in components:
                is_saved = name in index and index[name][0] is not None and name not in kwargs
                if is_saved and not os.path.isdir(os.path.join(pretrained_model_name_or_path, name)):
                    raise OSError(f"the folder of component `{name}` is missing.")
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise OSError(f"{pretrained_model_name_or_path} is incomplete or damaged: {error}") from error

    def _checked_id2label(self, id2label: dict | None, num_classes: int | None) -> dict[int, str] | None:
        """`id2label` with the int keys that JSON has made strings."""
        if id2label is None:
            return None
        id2label = {int(index): str(name) for index, name in id2label.items()}
        if num_classes is None or not all(0 <= index < num_classes for index in id2label):
            raise ValueError(f"`id2label` has the keys {list(id2label)}; the networks have {num_classes} classes.")
        return id2label

    def _initial_noise(self, stage: CascadeStage, sampler, batch_size: int, generator) -> torch.Tensor:
        """x_T ~ N(0, I), float32, at the scale of the scheduler."""
        size = stage.unet.config.sample_size
        shape = (batch_size, stage.unet.config.in_channels, size, size)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return noise * sampler.scheduler.init_noise_sigma

    def _denoise(
        self,
        name: str,
        sampler: AncestralSampler | SolverSampler,
        denoiser: Denoiser,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        on_step_end: StepEnd,
    ) -> torch.Tensor:
        """Takes `sample` down the grid of `sampler`: the reverse process of one stage (Algorithm 2)."""
        self._current_stage = name
        with self.progress_bar(total=len(sampler.timesteps)) as progress_bar:
            progress_bar.set_description(name)
            for index, timestep in enumerate(sampler.timesteps):
                if self.interrupt:
                    break
                sample = sampler.step(index, denoiser, sample, generator)
                sample = on_step_end(self, index, timestep, sample)
                progress_bar.update()
        self._current_stage = None
        return sample
