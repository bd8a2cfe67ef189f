r"""
The adapter between a stage's network and a scheduler: one network call per step (on a CPU, one per part of a large
batch), the same for every scheduler.

A [`Denoiser`] calls the network and applies guidance. A sampler uses what it predicts to go one step down a grid of
noise levels: [`AncestralSampler`] with a scheduler of this package, which handles every prediction, learned variance
and limit of x_0 itself; [`SolverSampler`] with one of Diffusers', which is given only an epsilon consistent with the
limited x_0. All of it runs in float32, whatever the network's dtype, on tables that are on the device before
the loop starts.
"""

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import IPNDMScheduler

from ..diffusion import epsilon_from_x_0, limit_x_0, prediction_for
from ..schedulers import ContinuousDDPMScheduler
from .solvers import OWN_SCHEDULERS, SOLVER_CLASSES, solver_on_grid


class Denoiser:
    r"""
    A stage's network with everything it is conditioned on besides x_t and the time.

    Classifier-free guidance (Ho and Salimans, 2021) takes one call on a doubled batch:
    epsilon = epsilon_null + w (epsilon_class - epsilon_null), and likewise for v. The variance is the class's.

    Args:
        unet ([`CascadedUNet2DModel`]): the network.
        class_labels (`torch.Tensor` of shape `(B,)`, *optional*): int64 labels.
        low_res (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): the conditioning image, noise included.
        augmentation_level (`int` or `torch.Tensor` of shape `(B,)`, *optional*): s, for a network conditioned on it.
        guidance_scale (`float`, defaults to 1.0): w, which may be set between steps; 1 is no guidance.
        refine (`Callable`, *optional*):
            Called with the limited x_0 of each step, and with the final sample; returns what to use instead.
    """

    def __init__(
        self, unet, class_labels=None, low_res=None, augmentation_level=None, guidance_scale=1.0, refine=None
    ):
        self.refine = refine
        self.unet, self.dtype = unet, dtype_of(unet)
        self.guidance_scale = guidance_scale
        self.extremes = []  # least and greatest of each call's output, on the device: NaN or infinite if any value is
        self.parts = {}  # the conditions of a batch, guided or not, in parts
        self.conditions = {}
        if class_labels is not None:
            self.conditions["class_labels"] = class_labels
        if low_res is not None:
            self.conditions["low_res"] = low_res.to(self.dtype)
        if augmentation_level is not None:
            self.conditions["augmentation_level"] = torch.as_tensor(augmentation_level, device=low_res.device)

    @functools.cached_property
    def doubled_conditions(self) -> dict[str, torch.Tensor]:
        """The conditions of the batch with its labels, then with the null class."""
        labels = self.conditions["class_labels"]
        null = torch.full_like(labels, self.unet.config.num_classes)
        doubled = {name: twice(condition) for name, condition in self.conditions.items()}
        return doubled | {"class_labels": torch.cat([labels, null])}

    def __call__(self, x_t: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The prediction `(B, C, H, W)` at x_t and a time, () or (B,); and the raw variance, which has no channels where
        it is not learned.
        """
        channels, is_guided = x_t.shape[1], self.guidance_scale != 1
        x_t, time = (twice(x_t), twice(time)) if is_guided else (x_t, time)
        output = self._output(x_t.to(self.dtype), time, is_guided).float()
        self.extremes.extend(torch.aminmax(output))
        prediction, raw_variance = output[:, :channels], output[:, channels:]
        if is_guided:
            of_class, of_null = prediction.chunk(2)
            prediction = of_null + self.guidance_scale * (of_class - of_null)
            raw_variance = raw_variance.chunk(2)[0]
        return prediction, raw_variance

    def _output(self, x_t: torch.Tensor, time: torch.Tensor, is_guided: bool) -> torch.Tensor:
        """The network's output for a batch, which it sees in parts of [`images_at_a_time`]."""
        count, size = len(x_t), images_at_a_time(self.unet, x_t)
        if is_guided not in self.parts:
            conditions = self.doubled_conditions if is_guided else self.conditions
            split = {name: in_parts(values, size, count) for name, values in conditions.items()}
            numbers = range(-(-count // size))
            self.parts[is_guided] = [{name: parts[number] for name, parts in split.items()} for number in numbers]
        inputs = zip(in_parts(x_t, size, count), in_parts(time, size, count), self.parts[is_guided], strict=True)
        outputs = [self.unet(*one, **conditions, return_dict=False)[0] for *one, conditions in inputs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def is_finite(self, sample: torch.Tensor) -> bool:
        """
        Whether `sample` and all outputs of the network were finite, which limiting x_0 would hide; waits for the
        device.
        """
        return bool(torch.stack([*self.extremes, *torch.aminmax(sample)]).isfinite().all())


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether Diffusers or accelerate changes what it or a part of it does, as offloading and layerwise casting do."""
    own = vars(module)
    return "_hf_hook" in own or "_diffusers_hook" in own or any(map(has_hooks, filter(None, own["_modules"].values())))


def dtype_of(unet) -> torch.dtype:
    """Its `dtype`, for which Diffusers goes through the whole network, here only where there are hooks."""
    if has_hooks(unet):
        return unet.dtype
    floating = (parameter.dtype for parameter in unet.parameters() if parameter.is_floating_point())
    return next(floating, None) or unet.dtype


def twice(values: torch.Tensor) -> torch.Tensor:
    """Values (B, ...) repeated for a doubled batch; a single value for all images, (), as it is."""
    return torch.cat([values, values]) if values.ndim else values


def in_parts(values: torch.Tensor, size: int, count: int) -> list[torch.Tensor]:
    """Values (count, ...) in parts of `size`; a single value for all images, (), once for each part."""
    return list(values.split(size)) if values.ndim else [values] * -(-count // size)


# What a CPU's allocator keeps for reuse. Larger tensors (glibc: 32 MiB, or half of that if all are freed at once) come
# from the system each time and are returned to it, which took two fifths of the time of a 256x256 stage.
KEPT_BYTES = 16 * 2**20


def images_at_a_time(unet, x_t: torch.Tensor) -> int:
    """
    How many images of a batch a network is called with at once: all; on a CPU, only as many as keep the largest
    feature maps, the first level's with the concatenated skips, within [`KEPT_BYTES`].
    """
    if x_t.device.type != "cpu":
        return len(x_t)
    config = unet.config
    pixels = x_t.shape[-2] * x_t.shape[-1] // config.patch_size**2
    channels = sum(config.block_out_channels[:2])
    return max(1, KEPT_BYTES // (pixels * channels * x_t.element_size()))


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: `timesteps` to loop over, the `times` the network is conditioned on, and `step`


class AncestralSampler:
    r"""
    Steps of a scheduler of this package.

    Works on a copy of `scheduler`, so that calls and stages never disturb each other's grids.

    Args:
        scheduler ([`CascadedDDPMScheduler`] or [`ContinuousDDPMScheduler`]): the scheduler.
        time_conditioning (`"timestep"` or `"noise_level"`):
            What the network is conditioned on: the index t - 1, or sqrt(alpha_bar).
        num_inference_steps (`int`): steps of the whole grid.
        device (`torch.device`): where sampling runs.
        timesteps (`list[int]`, *optional*): the grid itself, indices t - 1 from high to low.
        stop_at (`int`, defaults to 0), start_at (`int`, *optional*): the paper's times between which it runs.
    """

    def __init__(
        self, scheduler, time_conditioning, num_inference_steps, device, timesteps=None, stop_at=0, start_at=None
    ):
        if time_conditioning == "timestep" and isinstance(scheduler, ContinuousDDPMScheduler):
            raise ValueError(
                "The network is conditioned on timesteps, but ContinuousDDPMScheduler samples at noise levels: use "
                "CascadedDDPMScheduler, or one of Diffusers' schedulers."
            )
        self.scheduler = copy.copy(scheduler)
        grid = {"num_inference_steps": num_inference_steps} if timesteps is None else {"timesteps": timesteps}
        self.scheduler.set_timesteps(device=device, stop_at=stop_at, start_at=start_at, **grid)
        self.timesteps = self.scheduler.timesteps
        levels = self.scheduler.inference_table.alphas_cumprod.flip(0).sqrt()
        self.times = self.timesteps if time_conditioning == "timestep" else levels.to(device, torch.float32)

    def step(self, index, denoise: Denoiser, sample, generator) -> torch.Tensor:
        """x_{t-1} from `sample` = x_t, t being `timesteps[index]`."""
        self.scheduler.refine = denoise.refine
        position = len(self.timesteps) - 1 - index
        return self.scheduler.reverse_step(position, sample, *denoise(sample, self.times[index]), generator)[0]


class SolverSampler:
    r"""
    Steps of one of Diffusers' schedulers (`SOLVERS` of `solver_names.py`).

    The scheduler gets only epsilon (IPNDM: v, which it converts to epsilon), with its own limiting of x_0 and its
    learned variance switched off: x_0 is limited here, and epsilon recomputed from the result. Without that, solvers
    diverge: where alpha_bar is near 0, the slightest error in epsilon is a huge error in x_0. The limits are those of
    the scheduler's config, in which entries of the scheduler it was converted from survive (`clip_sample`,
    `clip_sample_range`, `thresholding`, ...); without any, x_0 is clipped to [-1, 1].

    Args:
        scheduler ([`~schedulers.SchedulerMixin`]): the scheduler, which is copied.
        time_conditioning (`"timestep"` or `"noise_level"`): what the network is conditioned on.
        num_inference_steps (`int`): passed to `set_timesteps`.
        device (`torch.device`):
            Where sampling runs. The schedule itself stays on the CPU, where lookups never wait for the device.
        timesteps (`list[int]`, *optional*): the times to visit instead of evenly spread ones.
    """

    def __init__(self, scheduler, time_conditioning, num_inference_steps, device, timesteps=None):
        config = scheduler.config
        self.prediction = prediction_for(config.get("prediction_type", "epsilon"))
        self.limits = limits_of(config)
        self.scheduler, indices, alphas_cumprod = solver_on_grid(scheduler, num_inference_steps, timesteps)
        self.timesteps = self.scheduler.timesteps
        self.alpha = alphas_cumprod.sqrt().to(device, torch.float32)
        self.sigma = (1 - alphas_cumprod).sqrt().to(device, torch.float32)
        self.times = indices.to(device) if time_conditioning == "timestep" else self.alpha
        self.extra_step_arguments = ("generator",) if takes_generator(type(scheduler)) else ()

    def step(self, index, denoise: Denoiser, sample, generator) -> torch.Tensor:
        """The scheduler's next `sample`, which may be scaled up from x_t by 1/sqrt(alpha_bar)."""
        timestep, alpha, sigma = self.timesteps[index], self.alpha[index], self.sigma[index]
        x_t = self.scheduler.scale_model_input(sample, timestep)
        prediction, _ = denoise(x_t, self.times[index])
        x_0 = limit_x_0(self.prediction.x_0(prediction, x_t, alpha, sigma), self.limits)
        x_0 = x_0 if denoise.refine is None else denoise.refine(x_0)
        epsilon = epsilon_from_x_0(x_0, x_t, alpha, sigma)
        output = alpha * epsilon - sigma * x_0 if isinstance(self.scheduler, IPNDMScheduler) else epsilon
        extra = dict.fromkeys(self.extra_step_arguments, generator)
        return self.scheduler.step(output, timestep, sample, **extra, return_dict=False)[0]


@functools.cache
def takes_generator(kind: type) -> bool:
    """Whether a step of such a scheduler takes a generator."""
    return "generator" in inspect.signature(kind.step).parameters


def limits_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler config's limits of x_0, for [`limit_x_0`]; by default it is clipped to [-1, 1]."""
    return {
        "clip_sample": config.get("clip_sample", True),
        "clip_sample_range": config.get("clip_sample_range", 1.0),
        "thresholding": config.get("thresholding", False),
        "dynamic_thresholding_ratio": config.get("dynamic_thresholding_ratio", 0.995),
        "sample_max_value": config.get("sample_max_value", 1.0),
    }


def make_sampler(
    name: str,
    unet,
    scheduler,
    num_inference_steps: int,
    device,
    timesteps: Sequence[int] | None = None,
    stop_at: int = 0,
    start_at: int | None = None,
) -> AncestralSampler | SolverSampler:
    r"""
    The sampler of a stage with its grid set up: `num_inference_steps` times as the scheduler spaces them, or the given
    `timesteps`, as many.

    Raises:
        `ValueError`: the scheduler is unknown, expects a prediction or a variance that the network does not output,
            cannot run so many steps, or cannot stop or start at a given time.
    """
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    try:
        if unet.config.low_res_skip and prediction_type != "sample":
            raise ValueError(
                f"the scheduler's `prediction_type` is {prediction_type!r}, but the network adds the low-resolution "
                "image to its output (`low_res_skip`): give the scheduler prediction_type='sample'."
            )
        if isinstance(scheduler, OWN_SCHEDULERS):
            if scheduler.config.variance_type == "learned_range" and not unet.config.learned_variance:
                raise ValueError(
                    "the scheduler's `variance_type` is 'learned_range', but the network predicts no variance "
                    "(`learned_variance`): give the scheduler variance_type='fixed_small' or 'fixed_large'."
                )
            return AncestralSampler(
                scheduler, unet.config.time_conditioning, num_inference_steps, device, timesteps, stop_at, start_at
            )
        if not isinstance(scheduler, SOLVER_CLASSES):
            supported = ", ".join(kind.__name__ for kind in (*OWN_SCHEDULERS, *SOLVER_CLASSES))
            raise ValueError(f"{type(scheduler).__name__} is not supported; use one of {supported}.")
        if stop_at > 0 or start_at is not None:
            raise ValueError(
                f"{type(scheduler).__name__} cannot stop or restart inside its grid: use non-truncated sampling "
                "(`truncated=False`) without `restart_timestep`, or CascadedDDPMScheduler."
            )
        return SolverSampler(scheduler, unet.config.time_conditioning, num_inference_steps, device, timesteps)
    except ValueError as error:
        raise ValueError(f"Stage `{name}`: {error}") from error
