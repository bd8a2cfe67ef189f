"""One super-resolution stage as a pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..models import CascadedUNet2DModel
from ..models.arguments import low_res_channels_of
from ..plain import plain
from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from .denoising import make_sampler
from .inputs import (
    batch_inputs,
    check_augmentation_level,
    check_count,
    check_generator,
    check_output_type,
    check_source_resolution,
    image_to_tensor,
    resolve_class_labels,
    tensor_to_images,
)
from .pipeline_base import PixelDiffusionPipeline, StepEnd, added_to_config
from .stages import CascadeStage, StageOptions


class SuperResolutionPipeline(PixelDiffusionPipeline):
    r"""
    One super-resolution stage, applied to given images: what training such a stage saves.

    This model inherits from [`DiffusionPipeline`], which documents loading, saving, moving and offloading.
    [`CascadedDiffusionPipeline.from_stages`] joins it with others.

    Args:
        unet ([`CascadedUNet2DModel`]): the network, with `low_res_size`.
        scheduler ([`CascadedDDPMScheduler`] or [`ContinuousDDPMScheduler`], or one of Diffusers'):
            The sampler; `solvers.py` names those of Diffusers that are supported.
        noising_scheduler ([`CascadedDDPMScheduler`] or [`ContinuousDDPMScheduler`], *optional*):
            The forward process of the Gaussian conditioning augmentation, which is the preceding stage's; None for a
            stage without it.
        id2label (`dict[int, str]`, *optional*): names of the classes.
        source_resolution (`int`, *optional*): the resolution that training images were averaged down from.
        default_num_inference_steps (`int`, *optional*): recommended steps.
        default_augmentation_level (`int`, *optional*): recommended s.
        default_guidance_scale (`float`, *optional*): recommended w, for a network trained with label dropout.
        default_timesteps (`list[int]`, *optional*): recommended time steps; they override the number of steps.

    Raises:
        `ValueError`: the network takes no low-resolution image, or the parts contradict each other.
    """

    # Set by `register_modules`. The common base of Diffusers' schedulers declares neither `config` nor `step`.
    unet: CascadedUNet2DModel
    scheduler: Any
    noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None

    model_cpu_offload_seq = "unet"
    _optional_components = ["noising_scheduler"]

    def __init__(
        self,
        unet: CascadedUNet2DModel,
        scheduler: SchedulerMixin,
        noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None = None,
        id2label: dict | None = None,
        source_resolution: int | None = None,
        default_num_inference_steps: int | None = None,
        default_augmentation_level: int | None = None,
        default_guidance_scale: float | None = None,
        default_timesteps: Sequence[int] | None = None,
    ):
        super().__init__()
        if unet.config.low_res_size is None:
            raise ValueError("`unet` takes no low-resolution image (`low_res_size`): it is not for super-resolution.")
        self.register_modules(unet=unet, scheduler=scheduler, noising_scheduler=noising_scheduler)
        self.register_to_config(
            id2label=self._checked_id2label(id2label, unet.config.num_classes),
            source_resolution=check_source_resolution(source_resolution),
            default_num_inference_steps=plain(default_num_inference_steps),
            default_augmentation_level=plain(default_augmentation_level),
            default_guidance_scale=plain(default_guidance_scale),
            **added_to_config(default_timesteps=default_timesteps),
        )
        if default_augmentation_level is not None:
            check_augmentation_level(self.stage.name, default_augmentation_level, noising_scheduler)
        self.stage_options()

    @property
    def stage(self) -> CascadeStage:
        """The stage, with its parts as they are now."""
        return CascadeStage("super_res", self.unet, self.scheduler, self.noising_scheduler)

    @property
    def stages(self) -> list[CascadeStage]:
        """The stage, alone in a list, as in a cascade of one stage."""
        return [self.stage]

    def stage_options(
        self,
        num_inference_steps: int | None = None,
        augmentation_level: int | None = None,
        guidance_scale: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        r"""
        The options that a call with these arguments uses; those not given are the config's defaults, as described in
        [`__call__`].

        Returns:
            `dict`: these arguments, all of them set; s is None for a stage that takes none, and "timesteps" are left
            out where it has none of its own.

        Raises:
            `ValueError`: an argument is out of range, or not for this stage.
        """
        if num_inference_steps is not None:
            check_count("`num_inference_steps`", num_inference_steps)
        given = StageOptions(num_inference_steps, augmentation_level, guidance_scale, timesteps)
        options = self.stage.options(given, self._default_options)._asdict()
        if options["timesteps"] is None:
            del options["timesteps"]
        return options

    @property
    def _default_options(self) -> StageOptions:
        return StageOptions(**{option: self.config.get(f"default_{option}") for option in StageOptions._fields})

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        *,
        num_images_per_label: int = 1,
        augmentation_level: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        consistency: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["sample"],  # noqa: B006
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Samples high-resolution versions of given low-resolution images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                Clean images of size `low_res_size`: PIL in mode "L" or "RGB", or floats in [0, 1] as arrays
                `(N, h, h, C)` or tensors `(N, C, h, h)`.
            class_labels (`int`, `str`, a list of them, or an int64 `torch.Tensor` of shape `(B,)`, *optional*):
                Indices or names of classes, one for each image or one for all; not for an unconditional network.
            num_images_per_label (`int`, defaults to 1): images made of each pair of image and label.
            augmentation_level (`int`, *optional*):
                s in 0..T: the image is noised to z_s first (Section 3.3). By default the config's, else 0.
            num_inference_steps (`int`, *optional*):
                Steps, 1..T. By default the config's, else T for CascadedDDPMScheduler and 100 for others; Diffusers'
                schedulers by default take at most 100, and at most T/2.
            timesteps (`list[int]`, *optional*):
                The time steps themselves instead of a number of steps: indices t - 1 in 0..T-1 from high to low. If
                neither is given, the config's.
            guidance_scale (`float`, *optional*):
                w of classifier-free guidance, for a network trained with label dropout; 1 is none. By default the
                config's, else 1.
            consistency (`bool`, defaults to `False`):
                Whether the images stay consistent with `image`: at each step x_0 is shifted so that its area averages
                are the clean image. Corrections that s > 0 would allow are then confined to within each low-resolution
                pixel.
            generator (`torch.Generator` or a list of them, one per image, *optional*):
                Determines all noise; calls that differ only in s see the same noise, also at s = 0. With a list, an
                image does not depend on the others beyond float rounding.
            output_type (`"pil"`, `"np"` or `"pt"`, defaults to `"pil"`): PIL images, or float32 in [0, 1].
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, {"sample": x})` after each step; a "sample" in the dict it
                returns replaces x. Setting `pipe._guidance_scale` changes w for the steps that follow.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["sample"]`): tensors for the callback.
            return_dict (`bool`, defaults to `True`): whether to return an `ImagePipelineOutput` or a tuple.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the images, all those of the first pair first.

        Raises:
            `ValueError`: an argument is out of range, of the wrong type, or not for this stage.

        Examples:

        ```python
        from cdm_diffusers import CascadedDiffusionPipeline

        cascade = CascadedDiffusionPipeline.from_pretrained("checkpoints/fashion-mnist-32")
        low_res = cascade.stage_pipeline("base")("Ankle boot").images[0]  # or 8 x 8 pixels of your own

        upsample = cascade.stage_pipeline("super_res_1")
        image = upsample(low_res, "Ankle boot", augmentation_level=100).images[0]
        image.save("ankle_boot_16x16.png")
        ```
        """
        # 1. check everything, before anything runs
        stage, config, device = self.stage, self.unet.config, self._execution_device
        check_output_type(output_type, config.out_channels)
        low_res = image_to_tensor(image, low_res_channels_of(config), [config.low_res_size])
        labels = resolve_class_labels(class_labels, config.num_classes, self.config.id2label)
        labels, low_res, batch_size = batch_inputs(labels, low_res, None, num_images_per_label, device)
        check_generator(generator, batch_size)
        on_step_end = StepEnd(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        options = StageOptions(
            **self.stage_options(num_inference_steps, augmentation_level, guidance_scale, timesteps)
        )
        if consistency:
            stage.check_consistency()
        steps = options.num_inference_steps
        sampler = make_sampler(stage.name, stage.unet, stage.scheduler, steps, device, options.timesteps)

        # 2. noise the image, then sample
        self._interrupt = False
        held_to_image = low_res if consistency else None
        if stage.noising_scheduler is not None:
            low_res = stage.noising_scheduler.forward_marginal(low_res, options.augmentation_level, generator)
        denoiser = stage.denoiser(labels, low_res, options.augmentation_level, options.guidance_scale, held_to_image)
        sample = self._initial_noise(stage, sampler, batch_size, generator)
        sample = self._denoise(stage.name, sampler, denoiser, sample, generator, on_step_end)

        # 3. output
        self.maybe_free_model_hooks()
        images = tensor_to_images(sample, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
