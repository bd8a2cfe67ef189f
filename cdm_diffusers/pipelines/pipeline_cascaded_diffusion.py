"""A whole cascade as one pipeline (Algorithm 2)."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import logging

from ..models import CascadedUNet2DModel
from ..plain import plain
from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from .denoising import AncestralSampler, SolverSampler, make_sampler
from .fit import check_fit, check_same_forward_process, same_id2label, same_source_resolution
from .inputs import (
    batch_inputs,
    check_count,
    check_generator,
    check_output_type,
    check_source_resolution,
    check_stage_names,
    image_to_tensor,
    per_stage,
    resolve_class_labels,
    tensor_to_images,
)
from .pipeline_base import PixelDiffusionPipeline, StepEnd, added_to_config
from .pipeline_output import CascadedDiffusionPipelineOutput
from .pipeline_super_resolution import SuperResolutionPipeline
from .solvers import OWN_SCHEDULERS, scheduler_of, solver_name, with_inference_schedule
from .stages import CascadeStage, StageOptions, num_classes_of


logger = logging.get_logger(__name__)

STAGE_NAMES = ("base", "super_res_1", "super_res_2", "super_res_3")
STAGE_PARTS = ("unet", "scheduler", "noising_scheduler")
# Entries of a cascade's config, in the order of [`StageOptions`]
DEFAULTS = (
    "default_num_inference_steps",
    "default_augmentation_levels",
    "default_guidance_scales",
    "default_timesteps",
)
# The same as arguments of a call
ARGUMENTS = ("num_inference_steps", "augmentation_levels", "guidance_scale", "timesteps")


@dataclass(frozen=True)
class StageRun:
    """How one stage runs in one call. `input_is_noisy`: its low-resolution input is z_s already (truncated)."""

    stage: CascadeStage
    sampler: AncestralSampler | SolverSampler
    restart_sampler: AncestralSampler | None
    options: StageOptions
    input_is_noisy: bool

    @property
    def evaluations(self) -> int:
        """Network evaluations per image; guidance doubles them."""
        samplers = [sampler for sampler in (self.sampler, self.restart_sampler) if sampler is not None]
        return sum(len(sampler.timesteps) for sampler in samplers) * (1 if self.options.guidance_scale == 1 else 2)


class CascadedDiffusionPipeline(PixelDiffusionPipeline):
    r"""
    A cascade: a base stage and up to three super-resolution stages (Section 2.2; Algorithm 2). A base alone is a
    cascade too.

    This model inherits from [`DiffusionPipeline`], which documents loading, saving, moving, offloading and compiling.
    Components are flat, so all of that works on them: `base_unet`, `base_scheduler`, and for k = 1, 2, 3
    `super_res_k_unet`, `super_res_k_scheduler` and `super_res_k_noising_scheduler`. Dictionaries over stages have the
    keys "base", "super_res_1", "super_res_2", "super_res_3".

    Args:
        base_unet, super_res_k_unet ([`CascadedUNet2DModel`]): the networks.
        base_scheduler, super_res_k_scheduler ([`CascadedDDPMScheduler`], [`ContinuousDDPMScheduler`] or Diffusers'):
            The samplers. Of Diffusers' schedulers, those named in `solver_names.SOLVERS` work on every stage:
            `pipe.base_scheduler = DPMSolverMultistepScheduler.from_config(pipe.base_scheduler.config)`.
        super_res_k_noising_scheduler ([`CascadedDDPMScheduler`] or [`ContinuousDDPMScheduler`], *optional*):
            The forward process of a stage's Gaussian conditioning augmentation, which is that of the preceding stage's
            training; None for a stage without it.
        id2label (`dict[int, str]`, *optional*): names of the classes.
        source_resolution (`int`, *optional*): the resolution that training images were averaged down from.
        default_num_inference_steps (`dict[str, int]`, *optional*): recommended steps of each stage.
        default_augmentation_levels (`dict[str, int]`, *optional*): recommended s of each stage that takes one.
        default_guidance_scales (`dict[str, float]`, *optional*): recommended w of stages trained with label dropout.
        default_timesteps (`dict[str, list[int]]`, *optional*):
            Recommended time steps of stages for which evenly spread ones are not best, as `cdm search` finds them.
            They take precedence over the recommended number of steps.
        settings (`dict[str, dict]`, *optional*):
            Other recommendations by name, for `pipe(..., settings=name)`: for each name, the arguments that differ
            from the defaults, `{"calibrated": {"num_inference_steps": {"super_res_2": 25}}}`.

    Raises:
        `ValueError`: stages are missing or do not fit together.
    """

    # Set by `register_modules`. The common base of Diffusers' schedulers declares neither `config` nor `step`.
    base_unet: CascadedUNet2DModel
    base_scheduler: Any
    super_res_1_unet: CascadedUNet2DModel | None
    super_res_1_scheduler: Any
    super_res_1_noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None
    super_res_2_unet: CascadedUNet2DModel | None
    super_res_2_scheduler: Any
    super_res_2_noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None
    super_res_3_unet: CascadedUNet2DModel | None
    super_res_3_scheduler: Any
    super_res_3_noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None

    model_cpu_offload_seq = "base_unet->super_res_1_unet->super_res_2_unet->super_res_3_unet"
    _optional_components = [f"{name}_{part}" for name in STAGE_NAMES[1:] for part in STAGE_PARTS]

    def __init__(
        self,
        base_unet: CascadedUNet2DModel,
        base_scheduler: SchedulerMixin,
        super_res_1_unet: CascadedUNet2DModel | None = None,
        super_res_1_scheduler: SchedulerMixin | None = None,
        super_res_1_noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None = None,
        super_res_2_unet: CascadedUNet2DModel | None = None,
        super_res_2_scheduler: SchedulerMixin | None = None,
        super_res_2_noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None = None,
        super_res_3_unet: CascadedUNet2DModel | None = None,
        super_res_3_scheduler: SchedulerMixin | None = None,
        super_res_3_noising_scheduler: CascadedDDPMScheduler | ContinuousDDPMScheduler | None = None,
        id2label: dict | None = None,
        source_resolution: int | None = None,
        default_num_inference_steps: dict | None = None,
        default_augmentation_levels: dict | None = None,
        default_guidance_scales: dict | None = None,
        default_timesteps: dict | None = None,
        settings: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            base_unet=base_unet,
            base_scheduler=base_scheduler,
            super_res_1_unet=super_res_1_unet,
            super_res_1_scheduler=super_res_1_scheduler,
            super_res_1_noising_scheduler=super_res_1_noising_scheduler,
            super_res_2_unet=super_res_2_unet,
            super_res_2_scheduler=super_res_2_scheduler,
            super_res_2_noising_scheduler=super_res_2_noising_scheduler,
            super_res_3_unet=super_res_3_unet,
            super_res_3_scheduler=super_res_3_scheduler,
            super_res_3_noising_scheduler=super_res_3_noising_scheduler,
        )
        self.register_to_config(
            id2label=self._checked_id2label(id2label, num_classes_of(self.stages)),
            source_resolution=check_source_resolution(source_resolution),
            default_num_inference_steps=plain(default_num_inference_steps),
            default_augmentation_levels=plain(default_augmentation_levels),
            default_guidance_scales=plain(default_guidance_scales),
            **added_to_config(default_timesteps=default_timesteps, settings=settings),
        )
        check_fit(self.stages)
        names = [stage.name for stage in self.stages]
        for default in DEFAULTS:
            if self.config.get(default) is not None:
                check_stage_names(default, self.config[default], names)
        self.stage_options()
        self._check_settings(names)

    def __setattr__(self, name: str, value):
        if name in STAGE_PARTS:
            raise AttributeError(_one_for_each_stage(name))
        super().__setattr__(name, value)

    def __getattr__(self, name: str):
        if name in STAGE_PARTS:
            raise AttributeError(_one_for_each_stage(name))
        return super().__getattr__(name)

    @property
    def stages(self) -> list[CascadeStage]:
        """The stages in the order in which they run, with their parts as they are now."""
        stages = []
        for name in STAGE_NAMES:
            unet, scheduler = getattr(self, f"{name}_unet"), getattr(self, f"{name}_scheduler")
            noising_scheduler = getattr(self, f"{name}_noising_scheduler", None)
            if unet is None and scheduler is None and noising_scheduler is None:
                continue
            if unet is None or scheduler is None:
                raise ValueError(f"Stage `{name}` is incomplete: it needs `{name}_unet` and `{name}_scheduler`.")
            if len(stages) != STAGE_NAMES.index(name):
                raise ValueError(f"Stage `{name}` was given without `{STAGE_NAMES[len(stages)]}`.")
            stages.append(CascadeStage(name, unet, scheduler, noising_scheduler))
        return stages

    @classmethod
    def from_stages(
        cls,
        base: "CascadedDiffusionPipeline | str | os.PathLike",
        *super_res: SuperResolutionPipeline | str | os.PathLike,
        **kwargs,
    ) -> "CascadedDiffusionPipeline":
        r"""
        Joins separately trained stages.

        Args:
            base ([`CascadedDiffusionPipeline`], folder or Hub id): the base, or a cascade to extend.
            super_res ([`SuperResolutionPipeline`], folder or Hub id): super-resolution stages, from low to high.
            kwargs: for `from_pretrained`, where folders or Hub ids are given.

        Returns:
            [`CascadedDiffusionPipeline`]: with the stages' recommended steps and s.

        Raises:
            `ValueError`: there are more than three super-resolution stages, or stages differ in channels, classes or
            class names, an input size is not the preceding stage's size, or a stage's augmentation noise is not the
            preceding stage's forward process.
        """
        base = base if isinstance(base, PixelDiffusionPipeline) else cls.from_pretrained(base, **kwargs)
        if not isinstance(base, CascadedDiffusionPipeline):
            raise ValueError(f"`base` is a {type(base).__name__}; it must be a CascadedDiffusionPipeline.")
        parts = {name: part for name, part in base.components.items() if part is not None}
        defaults = {default: dict(base.config.get(default) or {}) for default in DEFAULTS}
        id2label, source_resolution = base.config.id2label, base.config.source_resolution
        for number, pipe in enumerate(super_res, start=len(base.stages)):
            pipe = (
                pipe
                if isinstance(pipe, PixelDiffusionPipeline)
                else SuperResolutionPipeline.from_pretrained(pipe, **kwargs)
            )
            if not isinstance(pipe, SuperResolutionPipeline):
                raise ValueError(f"`super_res` has a {type(pipe).__name__}; it must be a SuperResolutionPipeline.")
            if number >= len(STAGE_NAMES):
                raise ValueError(f"There would be {number} super-resolution stages; a cascade has up to three.")
            name = STAGE_NAMES[number]
            id2label = same_id2label(name, id2label, pipe.config.id2label)
            source_resolution = same_source_resolution(name, source_resolution, pipe.config.source_resolution)
            parts |= {f"{name}_{part}": component for part, component in pipe.components.items()}
            for values, value in zip(defaults.values(), pipe._default_options, strict=True):
                if value is not None:
                    values[name] = value
        cascade = cls(
            **parts,
            id2label=id2label,
            source_resolution=source_resolution,
            settings=base.config.get("settings"),
            **{default: values or None for default, values in defaults.items()},
        )
        for before, stage in itertools.pairwise(cascade.stages):
            if stage.noising_scheduler is not None:
                check_same_forward_process(before, stage)
        return cascade

    def stage_pipeline(self, name: str) -> "CascadedDiffusionPipeline | SuperResolutionPipeline":
        r"""
        One stage as its training would have left it, with this cascade's defaults for it: the inverse of
        [`from_stages`]. The networks and schedulers are the same objects.

        Args:
            name (`str`): "base", "super_res_1", ...

        Returns:
            [`CascadedDiffusionPipeline`] for the base, else [`SuperResolutionPipeline`].

        Raises:
            `ValueError`: there is no such stage.
        """
        stages = {stage.name: stage for stage in self.stages}
        if name not in stages:
            raise ValueError(f"`name` is {name!r}; it must be one of the stages {list(stages)}.")
        if name == "base":
            return self.with_schedulers(last_stage="base")
        stage, defaults = stages[name], StageOptions(*(values.get(name) for values in self._defaults()))
        return SuperResolutionPipeline(
            stage.unet,
            stage.scheduler,
            stage.noising_scheduler,
            id2label=None if stage.unet.config.num_classes is None else self.config.id2label,
            source_resolution=self.config.source_resolution,
            **{f"default_{option}": value for option, value in defaults._asdict().items()},
        )

    def with_schedulers(
        self,
        scheduler: str | dict[str, str] | None = None,
        inference_schedules: dict[str, str | list[float]] | None = None,
        last_stage: str | None = None,
    ) -> "CascadedDiffusionPipeline":
        r"""
        A cascade of the same networks with other schedulers, cut off after a stage. Recommended time steps of stages
        that get another scheduler are left out: they were found for the previous one.

        Args:
            scheduler (`str` or `dict[str, str]`, *optional*):
                A solver for all stages or for some of them; the others keep theirs. "ancestral" is this package's;
                "ddim", "ddpm", "deis", "dpmsolver++", "sde-dpmsolver++", "dpmsolver-singlestep", "euler",
                "euler-ancestral", "heun", "ipndm", "lms" and "unipc" are Diffusers'.
            inference_schedules (`dict`, *optional*):
                For stages with a ContinuousDDPMScheduler, the noise levels that they visit: the end points
                [beta_start, beta_end] of a linear schedule, or "squaredcos_cap_v2".
            last_stage (`str`, *optional*): the stage that makes the images; by default the last.

        Raises:
            `ValueError`: the name of a stage or solver is unknown, or a stage takes no inference schedule.
        """
        names = [stage.name for stage in self.stages]
        if last_stage is not None and last_stage not in names:
            raise ValueError(f"`last_stage` is {last_stage!r}; it must be one of the stages {names}.")
        schedulers, levels = per_stage("scheduler", scheduler, names), inference_schedules or {}
        check_stage_names("inference_schedules", levels, names)
        kept = self.stages if last_stage is None else self.stages[: names.index(last_stage) + 1]
        parts = {}
        for stage in kept:
            solver = scheduler_of(stage, schedulers.get(stage.name))
            if stage.name in levels:
                solver = with_inference_schedule(stage.name, solver, levels[stage.name])
            parts |= {f"{stage.name}_unet": stage.unet, f"{stage.name}_scheduler": solver}
            if stage.noising_scheduler is not None:
                parts[f"{stage.name}_noising_scheduler"] = stage.noising_scheduler
        others = [
            stage.name
            for stage in kept
            if stage.name in levels or solver_name(stage.scheduler) != solver_name(parts[f"{stage.name}_scheduler"])
        ]
        return CascadedDiffusionPipeline(
            **parts,
            id2label=None if num_classes_of(kept) is None else self.config.id2label,
            source_resolution=self.config.source_resolution,
            **self._recommendations([stage.name for stage in kept], others),
        )

    def stage_options(
        self,
        num_inference_steps: int | dict[str, int] | None = None,
        augmentation_levels: dict[str, int] | None = None,
        guidance_scale: float | dict[str, float] | None = None,
        timesteps: Sequence[int] | dict[str, Sequence[int]] | None = None,
        settings: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        r"""
        The options that a call with these arguments uses, stage by stage; those not given are the config's defaults,
        as described in [`__call__`].

        Returns:
            `dict`: these arguments, with a value for every stage (s: for every stage that takes one; "timesteps": for
            those that have some, absent if none has), so that `pipe(..., **pipe.stage_options())` is `pipe(...)`.

        Raises:
            `ValueError`: a stage is unknown, or a number is out of range or not for its stage.
        """
        given = num_inference_steps, augmentation_levels, guidance_scale, timesteps
        options = self._options(self.stages, *given, settings)
        levels = {name: of_stage.augmentation_level for name, of_stage in options.items()}
        times = {name: of_stage.timesteps for name, of_stage in options.items() if of_stage.timesteps is not None}
        return {
            "num_inference_steps": {name: of_stage.num_inference_steps for name, of_stage in options.items()},
            "augmentation_levels": {name: level for name, level in levels.items() if level is not None},
            "guidance_scale": {name: of_stage.guidance_scale for name, of_stage in options.items()},
        } | ({"timesteps": times} if times else {})

    def evaluations(
        self,
        num_inference_steps: int | dict[str, int] | None = None,
        augmentation_levels: dict[str, int] | None = None,
        guidance_scale: float | dict[str, float] | None = None,
        truncated: bool = False,
        restart_timestep: int | None = None,
        timesteps: Sequence[int] | dict[str, Sequence[int]] | None = None,
        settings: str | None = None,
    ) -> dict[str, int]:
        r"""
        Network evaluations per image, stage by stage, of a call with these arguments, described in [`__call__`];
        guidance takes two per step. The networks need no weights.

        Raises:
            `ValueError`: the call would refuse the arguments.
        """
        given = num_inference_steps, augmentation_levels, guidance_scale, timesteps
        options = self._options(self.stages, *given, settings)
        runs = self._runs(self.stages, options, truncated, restart_timestep, torch.device("cpu"))
        return {run.stage.name: run.evaluations for run in runs}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        *,
        num_images_per_label: int = 1,
        batch_size: int | None = None,
        settings: str | None = None,
        num_inference_steps: int | dict[str, int] | None = None,
        timesteps: Sequence[int] | dict[str, Sequence[int]] | None = None,
        augmentation_levels: dict[str, int] | None = None,
        truncated: bool = False,
        restart_timestep: int | None = None,
        guidance_scale: float | dict[str, float] | None = None,
        consistency: bool = False,
        image: PipelineImageInput | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        output_stages: bool = False,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["sample"],  # noqa: B006
        return_dict: bool = True,
    ) -> CascadedDiffusionPipelineOutput | tuple:
        r"""
        Samples images (Algorithm 2), or continues given low-resolution images.

        Args:
            class_labels (`int`, `str`, a list of them, or an int64 `torch.Tensor` of shape `(B,)`, *optional*):
                Indices or names (`config.id2label`) of classes; not for unconditional cascades.
            num_images_per_label (`int`, defaults to 1):
                Images of each label; all those of the first label come first.
            batch_size (`int`, *optional*): how many images an unconditional cascade makes; 1 by default.
            settings (`str`, *optional*):
                A name in `config.settings`, whose steps, s and w then replace the config's defaults.
            num_inference_steps (`int` or `dict[str, int]`, *optional*):
                Steps of all stages or of each, 1..T, spaced as the scheduler spaces them. By default the config's,
                else T for CascadedDDPMScheduler and 100 for others; Diffusers' schedulers by default take at most 100,
                and at most T/2.
            timesteps (`list[int]` or `dict[str, list[int]]`, *optional*):
                The time steps themselves instead of a number of steps: indices t - 1 in 0..T-1 from high to low, of
                all stages or of each. If neither is given, the config's.
            augmentation_levels (`dict[str, int]`, *optional*):
                s in 0..T of stages with Gaussian conditioning augmentation. By default the config's, else 0.
            truncated (`bool`, defaults to `False`):
                Whether a stage's input is the preceding reverse process stopped at s (Section 3.2), rather than its
                end result noised to s (Section 3.3). The preceding stage then needs a scheduler of this package. A
                given `image` is noised either way.
            restart_timestep (`int`, *optional*):
                The paper's t in 1..T: noises the finished base sample to t and denoises it again from there, on the
                same grid (Section 4.2; 2000 of 4000 there).
            guidance_scale (`float` or `dict[str, float]`, *optional*):
                w of classifier-free guidance, for stages trained with label dropout; 1 is none. A single number
                applies to those stages only, with a warning if there are others. By default the config's, else 1.
            consistency (`bool`, defaults to `False`):
                Whether super-resolution stages stay consistent with their input: at each step x_0 is shifted so that
                its area averages are that image, without the noise of s. Corrections that s > 0 would allow are then
                confined to within each low-resolution pixel.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Clean low-resolution images to start from, at the stage that takes their size: PIL in mode "L" or
                "RGB", or floats in [0, 1] as arrays `(N, h, h, C)` or tensors `(N, C, h, h)`; one for each label or
                one for all.
            generator (`torch.Generator` or a list of them, one per image, *optional*):
                Determines all noise. Calls that differ only in s see the same noise, also at s = 0; truncated ones do
                not, since the stage before takes fewer steps. With a list, an image does not depend on the others
                beyond float rounding.
            output_type (`"pil"`, `"np"` or `"pt"`, defaults to `"pil"`): PIL images, or float32 in [0, 1].
            output_stages (`bool`, defaults to `False`): whether to return every stage's images as well.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, {"sample": x})` after each step of each stage
                (`pipe.current_stage`); a "sample" in the dict it returns replaces x. Setting `pipe._guidance_scale`
                changes w for the stage's remaining steps, including those after a restart. Setting
                `pipe._interrupt = True` ends sampling there, and the images are those of the stage that was
                interrupted.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["sample"]`): tensors for the callback.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`CascadedDiffusionPipelineOutput`] or a tuple (images, and stages if asked for).

        Returns:
            [`CascadedDiffusionPipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: an argument is out of range, of the wrong type, or not for these stages.

        Examples:

        ```python
        import torch

        from cdm_diffusers import CascadedDiffusionPipeline

        pipe = CascadedDiffusionPipeline.from_pretrained("checkpoints/fashion-mnist-32")
        images = pipe(["Ankle boot", "Bag"], generator=torch.Generator().manual_seed(0)).images
        images[0].save("ankle_boot.png")

        # fewer steps in two of the stages, another s, and the images of every stage
        output = pipe(
            ["Ankle boot", "Bag"],
            num_inference_steps={"base": 10, "super_res_1": 5},
            augmentation_levels={"super_res_1": 400},
            generator=torch.Generator().manual_seed(0),
            output_stages=True,
        )
        output.stages["base"][0].save("ankle_boot_8x8.png")
        ```
        """
        # 1. check everything, before anything runs
        device = self._execution_device
        stages, low_res = self._stages_from(image)
        check_output_type(output_type, self.base_unet.config.out_channels)
        labels = resolve_class_labels(class_labels, num_classes_of(stages), self.config.id2label)
        labels, low_res, count = batch_inputs(labels, low_res, batch_size, num_images_per_label, device)
        check_generator(generator, count)
        on_step_end = StepEnd(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        given = num_inference_steps, augmentation_levels, guidance_scale, timesteps
        options = self._options(stages, *given, settings)
        if consistency:
            self._check_consistency(stages, truncated)
        runs = self._runs(stages, options, truncated, restart_timestep, device)

        # 2. sample stage by stage, each conditioned on the result of the one before
        self._interrupt = False
        samples = {}
        for run in runs:
            stage, held_to_image = run.stage, low_res if consistency else None
            if stage.noising_scheduler is not None:
                # drawn even if it is not used, so that every s sees the same x_T
                noised = stage.noising_scheduler.forward_marginal(low_res, run.options.augmentation_level, generator)
                low_res = low_res if run.input_is_noisy else noised
            denoiser = stage.denoiser(
                labels, low_res, run.options.augmentation_level, run.options.guidance_scale, held_to_image
            )
            sample = self._initial_noise(stage, run.sampler, count, generator)
            sample = self._denoise(stage.name, run.sampler, denoiser, sample, generator, on_step_end)
            if run.restart_sampler is not None and not self.interrupt:
                sample = stage.scheduler.forward_marginal(sample, restart_timestep, generator)
                sample = self._denoise(stage.name, run.restart_sampler, denoiser, sample, generator, on_step_end)
            samples[stage.name] = low_res = sample
            if self.interrupt:
                break

        # 3. output
        self.maybe_free_model_hooks()
        shown = samples if output_stages else {stage.name: sample}
        images = {name: tensor_to_images(sample, output_type) for name, sample in shown.items()}
        output = CascadedDiffusionPipelineOutput(images[stage.name], images if output_stages else None)
        return output if return_dict else output.to_tuple()

    # -----------------------------------------------------------------------------------------------------------------
    # Arguments of a call, stage by stage

    def _stages_from(self, image) -> tuple[list[CascadeStage], torch.Tensor | None]:
        """The stages that run, and the given image as a tensor `(N, C, h, h)` in [-1, 1]."""
        stages = self.stages
        if image is None:
            return stages, None
        sizes = [stage.unet.config.low_res_size for stage in stages[1:]]
        if not sizes:
            raise ValueError("`image` was given, but this cascade has no super-resolution stage to start at.")
        low_res = image_to_tensor(image, self.base_unet.config.out_channels, sizes)
        return stages[1 + sizes.index(low_res.shape[-1]) :], low_res

    def _recommendations(self, kept: list[str], others: list[str]) -> dict[str, Any]:
        """Arguments of a cascade of the stages `kept`; those with new solvers, `others`, lose their time steps."""

        def part(argument: str, values: dict[str, Any] | None) -> dict[str, Any] | None:
            names = [name for name in kept if name not in others or not argument.endswith("timesteps")]
            return values and {name: values[name] for name in names if name in values}

        settings = {
            name: {argument: part(argument, values) for argument, values in named.items()}
            for name, named in (self.config.get("settings") or {}).items()
        }
        return {default: part(default, self.config.get(default)) for default in DEFAULTS} | {
            "settings": settings or None
        }

    def _defaults(self) -> list[dict[str, Any]]:
        """The config's [`DEFAULTS`], each by stage."""
        return [self.config.get(name) or {} for name in DEFAULTS]

    def _named(self, settings: str | None) -> list[dict[str, Any]]:
        """The [`ARGUMENTS`] of the settings of that name, each by stage."""
        named = self.config.get("settings") or {}
        if settings is not None and settings not in named:
            there_are = f"it must be one of {list(named)}" if named else "this pipeline has none by name: leave it out"
            raise ValueError(f"`settings` is {settings!r}; {there_are}.")
        return [{} if settings is None else named[settings].get(argument, {}) for argument in ARGUMENTS]

    def _check_settings(self, names: list[str]):
        settings = self.config.get("settings") or {}
        if not isinstance(settings, Mapping) or not all(isinstance(named, Mapping) for named in settings.values()):
            raise ValueError(
                f"`settings` is {settings!r}; it must be a dict of names, with a dict of arguments for each."
            )
        for name, named in settings.items():
            for argument, values in named.items():
                if argument not in ARGUMENTS:
                    raise ValueError(f"`settings` {name!r} has {argument!r}; it must be one of {ARGUMENTS}.")
                check_stage_names(argument, values, names)
            self.stage_options(**named)

    def _options(
        self,
        stages: list[CascadeStage],
        num_inference_steps=None,
        augmentation_levels=None,
        guidance_scale=None,
        timesteps=None,
        settings: str | None = None,
    ) -> dict[str, StageOptions]:
        """The options of those `stages` that run, resolved and checked; see [`stage_options`]."""
        names = [stage.name for stage in self.stages]
        if augmentation_levels is not None:
            check_stage_names("augmentation_levels", augmentation_levels, names)
        given = [
            per_stage("num_inference_steps", num_inference_steps, names),
            per_stage("augmentation_levels", augmentation_levels, names),
            self._guidance_by_stage(guidance_scale, stages),
            per_stage("timesteps", timesteps, names),
        ]
        named = self._named(settings)

        def of(stage: CascadeStage, values_by_stage: list[dict[str, Any]]) -> StageOptions:
            return StageOptions(*(values.get(stage.name) for values in values_by_stage))

        return {
            stage.name: stage.options(of(stage, given), of(stage, named).before(of(stage, self._defaults())))
            for stage in stages
        }

    def _guidance_by_stage(
        self, guidance_scale: float | dict[str, float] | None, stages: list[CascadeStage]
    ) -> dict[str, float | None]:
        """w by stage; a single one applies to `stages` trained with label dropout, with a warning about the others."""
        scales = per_stage("guidance_scale", guidance_scale, [stage.name for stage in self.stages])
        unguided = [stage.name for stage in stages if not stage.unet.config.null_class]
        if isinstance(guidance_scale, Mapping) or guidance_scale in (None, 1) or len(unguided) in (0, len(stages)):
            return scales
        logger.warning(
            f"`guidance_scale` is {guidance_scale}; the stages {unguided} were trained without label dropout and are "
            "not guided."
        )
        return scales | dict.fromkeys(unguided, 1.0)

    def _check_restart(self, stages: list[CascadeStage], restart_timestep: int | None):
        if restart_timestep is None:
            return
        if stages[0].name != "base":
            raise ValueError(f"`restart_timestep` is {restart_timestep}, but with `image` the base does not run.")
        num_train_timesteps = stages[0].scheduler.config.num_train_timesteps
        check_count("`restart_timestep`", restart_timestep, highest=num_train_timesteps)

    def _check_consistency(self, stages: list[CascadeStage], truncated: bool):
        if truncated:
            raise ValueError(
                "`consistency` and `truncated` are both True; one of them must be False, since a truncated input is "
                "noisy, and there is no image to keep to."
            )
        for stage in stages:
            if stage.name != "base":
                stage.check_consistency()

    def _runs(
        self,
        stages: list[CascadeStage],
        options: dict[str, StageOptions],
        truncated: bool,
        restart_timestep: int | None,
        device: torch.device,
    ) -> list[StageRun]:
        """How each stage runs, its samplers' grids set up; checks everything that concerns those."""
        if truncated and all(stage.noising_scheduler is None for stage in stages):
            raise ValueError("`truncated=True` needs a stage with Gaussian conditioning augmentation; there is none.")
        self._check_restart(stages, restart_timestep)
        runs = []
        for position, stage in enumerate(stages):
            following = stages[position + 1] if position + 1 < len(stages) else None
            stop_at = 0
            if truncated and following is not None and following.noising_scheduler is not None:
                stop_at = options[following.name].augmentation_level
                if isinstance(stage.scheduler, OWN_SCHEDULERS):
                    check_same_forward_process(stage, following)
            steps, timesteps = options[stage.name].num_inference_steps, options[stage.name].timesteps
            grid = (stage.name, stage.unet, stage.scheduler, steps, device, timesteps)
            if restart_timestep is not None and stage.name == "base":
                sampler, restart_sampler = make_sampler(*grid), make_sampler(*grid, stop_at, restart_timestep)
            else:
                sampler, restart_sampler = make_sampler(*grid, stop_at), None
            runs.append(
                StageRun(
                    stage=stage,
                    sampler=sampler,
                    restart_sampler=restart_sampler,
                    options=options[stage.name],
                    # a truncated process already ends in z_s; a given image comes from none
                    input_is_noisy=truncated and position > 0,
                )
            )
        return runs


def _one_for_each_stage(part: str) -> str:
    first = "super_res_1" if part == "noising_scheduler" else "base"
    return f"A cascade has no single `{part}`, but one for each stage: use `{first}_{part}` and so on."
