r"""
The adapter between a stage's network and a scheduler: one network call a step, the same for every scheduler.

A [`Denoiser`] calls the network and applies guidance. A sampler uses what it predicts to go one step down a grid of
noise levels: [`AncestralSampler`] with a scheduler of this package, which handles every prediction, learned variance
and limit of x_0 itself; [`SolverSampler`] with one of Diffusers', which is handed nothing but an epsilon that agrees
with the limited x_0. All of it runs in float32, whatever the network's dtype, on tables that are on the device before
the loop starts.
"""

import copy
import inspect

import torch
from diffusers import SchedulerMixin

from ..diffusion import epsilon_from_x_0, limit_x_0, prediction_for
from ..schedulers import ContinuousDDPMScheduler
from .solvers import OWN_SCHEDULERS, SOLVER_CLASSES


# lambda = log(alpha / sigma) at which Diffusers' solvers start
LOWEST_LOG_SNR = -5.1


class Denoiser:
    r"""
    A stage's network with everything it is told besides x_t and the time.

    Classifier-free guidance (Ho and Salimans, 2021) takes one call on a doubled batch:
    epsilon = epsilon_null + w (epsilon_class - epsilon_null), and likewise for v. The variance is the class's.

    Args:
        unet ([`CascadedUNet2DModel`]): the network.
        class_labels (`torch.Tensor` of shape `(B,)`, *optional*): int64 labels.
        low_res (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): the conditioning image, noise included.
        augmentation_level (`int`, *optional*): s, for a network that is told it.
        guidance_scale (`float`, defaults to 1.0): w; 1 is no guidance.
    """

    def __init__(self, unet, class_labels=None, low_res=None, augmentation_level=None, guidance_scale=1.0):
        self.unet = unet
        self.guidance_scale = guidance_scale
        self.is_guided = guidance_scale != 1
        if self.is_guided:
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, unet.config.num_classes)])
            low_res = None if low_res is None else torch.cat([low_res, low_res])
        self.conditions = {}
        if class_labels is not None:
            self.conditions["class_labels"] = class_labels
        if low_res is not None:
            self.conditions["low_res"] = low_res.to(unet.dtype)
        if augmentation_level is not None:
            self.conditions["augmentation_level"] = torch.tensor(augmentation_level, device=low_res.device)

    def __call__(self, x_t: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction `(B, C, H, W)` at x_t and the raw variance, which has no channels where it is not learned."""
        channels = x_t.shape[1]
        if self.is_guided:
            x_t = torch.cat([x_t, x_t])
        output = self.unet(x_t.to(self.unet.dtype), time, **self.conditions, return_dict=False)[0].float()
        prediction, raw_variance = output[:, :channels], output[:, channels:]
        if self.is_guided:
            of_class, of_null = prediction.chunk(2)
            prediction = of_null + self.guidance_scale * (of_class - of_null)
            raw_variance = raw_variance.chunk(2)[0]
        return prediction, raw_variance


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: `timesteps` to loop over, the `times` the network is told, and `step`


class AncestralSampler:
    r"""
    Steps of a scheduler of this package.

    Works on a copy of `scheduler`, so that calls and stages never disturb each other's grids.

    Args:
        scheduler ([`CascadedDDPMScheduler`] or [`ContinuousDDPMScheduler`]): the scheduler.
        time_conditioning (`"timestep"` or `"noise_level"`): what the network is told: the index t - 1, or
            sqrt(alpha_bar).
        num_inference_steps (`int`): steps of the whole grid.
        device (`torch.device`): where sampling runs.
        stop_at (`int`, defaults to 0), start_at (`int`, *optional*): the paper's times between which it runs.
    """

    def __init__(self, scheduler, time_conditioning, num_inference_steps, device, stop_at=0, start_at=None):
        if time_conditioning == "timestep" and isinstance(scheduler, ContinuousDDPMScheduler):
            raise ValueError(
                "The network is conditioned on timesteps, but ContinuousDDPMScheduler samples at noise levels: use "
                "CascadedDDPMScheduler, or one of Diffusers' schedulers."
            )
        self.scheduler = copy.copy(scheduler)
        self.scheduler.set_timesteps(num_inference_steps, device, stop_at=stop_at, start_at=start_at)
        self.timesteps = self.scheduler.timesteps
        levels = self.scheduler.inference_table.alphas_cumprod.flip(0).sqrt()
        self.times = self.timesteps if time_conditioning == "timestep" else levels.to(device, torch.float32)

    def step(self, index, denoise: Denoiser, sample, generator) -> torch.Tensor:
        """x_{t-1} from `sample` = x_t, t being `timesteps[index]`."""
        output = torch.cat(denoise(sample, self.times[index]), dim=1)
        return self.scheduler.step(output, self.timesteps[index], sample, generator=generator, return_dict=False)[0]


class SolverSampler:
    r"""
    Steps of one of Diffusers' schedulers (`SOLVERS` of `solver_names.py`).

    The scheduler works from epsilon alone, its own limits of x_0 and its learned variance off: limits are applied
    here, to x_0, and epsilon is derived again from the result. Without that solvers diverge: where alpha_bar is near
    0, the least error of epsilon is a huge error of x_0. Limits are those of the scheduler's config, where entries of
    the scheduler it was converted from survive (`clip_sample`, `clip_sample_range`, `thresholding`, ...); without any,
    x_0 is clipped to [-1, 1].

    Args:
        scheduler ([`~schedulers.SchedulerMixin`]): the scheduler, which is copied.
        time_conditioning (`"timestep"` or `"noise_level"`): what the network is told.
        num_inference_steps (`int`): what `set_timesteps` is given.
        device (`torch.device`):
            Where sampling runs. The schedule itself stays on the CPU, where looking things up in it waits for nothing.
    """

    def __init__(self, scheduler, time_conditioning, num_inference_steps, device):
        config = scheduler.config
        self.prediction = prediction_for(config.get("prediction_type", "epsilon"))
        self.limits = {
            "clip_sample": config.get("clip_sample", True),
            "clip_sample_range": config.get("clip_sample_range", 1.0),
            "thresholding": config.get("thresholding", False),
            "dynamic_thresholding_ratio": config.get("dynamic_thresholding_ratio", 0.995),
            "sample_max_value": config.get("sample_max_value", 1.0),
        }
        self.scheduler = _epsilon_solver(scheduler)
        num_levels = self.scheduler.config.num_train_timesteps
        if num_inference_steps > num_levels:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}; {type(scheduler).__name__} takes {num_levels} at "
                "most, the training steps with signal left."
            )
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        indices = self.scheduler.timesteps.round().long()
        if hasattr(self.scheduler, "sigmas"):
            sigmas = self.scheduler.sigmas.double()
            if len(sigmas[:-1].unique()) < num_inference_steps:
                raise ValueError(
                    f"{type(scheduler).__name__} cannot make {num_inference_steps} different noise levels out of "
                    f"{num_levels} timesteps: use fewer `num_inference_steps`."
                )
            alphas_cumprod = 1 / (1 + sigmas[: len(indices)] ** 2)
        else:
            alphas_cumprod = self.scheduler.alphas_cumprod[indices].double()
            _respace(self.scheduler, indices)
        self.timesteps = self.scheduler.timesteps
        self.alpha = alphas_cumprod.sqrt().to(device, torch.float32)
        self.sigma = (1 - alphas_cumprod).sqrt().to(device, torch.float32)
        self.times = indices.to(device) if time_conditioning == "timestep" else self.alpha
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self.extra_step_arguments = ("generator",) if takes_generator else ()

    def step(self, index, denoise: Denoiser, sample, generator) -> torch.Tensor:
        """The scheduler's next `sample`, which may be scaled up from x_t by 1/sqrt(alpha_bar)."""
        timestep, alpha, sigma = self.timesteps[index], self.alpha[index], self.sigma[index]
        x_t = self.scheduler.scale_model_input(sample, timestep)
        prediction, _ = denoise(x_t, self.times[index])
        x_0 = limit_x_0(self.prediction.x_0(prediction, x_t, alpha, sigma), self.limits)
        epsilon = epsilon_from_x_0(x_0, x_t, alpha, sigma)
        extra = dict.fromkeys(self.extra_step_arguments, generator)
        return self.scheduler.step(epsilon, timestep, sample, **extra, return_dict=False)[0]


def _epsilon_solver(scheduler: SchedulerMixin) -> SchedulerMixin:
    r"""
    A fresh scheduler like `scheduler` that takes epsilon as it is (no limits of x_0, no learned variance) and starts
    where there is signal left: log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) >= -5.1.

    That is what DPM-Solver's authors recommend for cosine schedules (Diffusers' `lambda_min_clipped`), and about
    where the usual linear schedules end. A cosine schedule of 4000 steps goes on to -11.3 in its last 16 steps, where
    solvers of an ODE keep whatever x_0 they are told first, and Heun's rule does not converge.
    """
    parameters = inspect.signature(type(scheduler).__init__).parameters
    arguments = {name: scheduler.config[name] for name in parameters if name in scheduler.config}
    overrides = {"prediction_type": "epsilon", "thresholding": False, "clip_sample": False}
    arguments |= {name: value for name, value in overrides.items() if name in parameters}
    if arguments.get("variance_type") in ("learned", "learned_range"):
        arguments["variance_type"] = parameters["variance_type"].default
    solver = type(scheduler)(**arguments)
    num_levels = int((torch.logit(solver.alphas_cumprod.double()) / 2 >= LOWEST_LOG_SNR).sum())
    if num_levels == len(solver.betas):
        return solver
    arguments |= {"num_train_timesteps": num_levels, "trained_betas": solver.betas[:num_levels].tolist()}
    return type(scheduler)(**arguments)


def _respace(scheduler: SchedulerMixin, indices: torch.Tensor):
    r"""
    Reduces a scheduler that looks alpha_bar up by timestep to the timesteps it visits, n-1..0.

    DDIMScheduler takes the previous timestep to be t - T // n, which is not the next one it visits unless the spacing
    happens to be T // n; on n timesteps it is.
    """
    scheduler.alphas_cumprod = scheduler.alphas_cumprod[indices.flip(0)]
    scheduler.register_to_config(num_train_timesteps=len(indices))
    scheduler.timesteps = torch.arange(len(indices)).flip(0)


def make_sampler(
    name: str, unet, scheduler, num_inference_steps: int, device, stop_at: int = 0, start_at: int | None = None
) -> AncestralSampler | SolverSampler:
    r"""
    The sampler of a stage, its grid laid out.

    Raises:
        `ValueError`: the scheduler is unknown, cannot run so many steps, or cannot stop or start at a given time.
    """
    try:
        if isinstance(scheduler, OWN_SCHEDULERS):
            return AncestralSampler(
                scheduler, unet.config.time_conditioning, num_inference_steps, device, stop_at, start_at
            )
        if not isinstance(scheduler, SOLVER_CLASSES):
            supported = ", ".join(kind.__name__ for kind in (*OWN_SCHEDULERS, *SOLVER_CLASSES))
            raise ValueError(f"{type(scheduler).__name__} is not supported; use one of {supported}.")
        if stop_at > 0 or start_at is not None:
            raise ValueError(
                f"{type(scheduler).__name__} cannot stop or restart inside its grid: use non-truncated sampling "
                "(`truncated=False`) without `restart_timestep`, or CascadedDDPMScheduler."
            )
        return SolverSampler(scheduler, unet.config.time_conditioning, num_inference_steps, device)
    except ValueError as error:
        raise ValueError(f"Stage `{name}`: {error}") from error
