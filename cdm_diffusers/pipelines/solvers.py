"""The samplers by name: this package's ancestral sampling, and those of Diffusers' schedulers that work here."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, IPNDMScheduler, SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from .solver_names import ANCESTRAL, SOLVER_NAMES, SOLVERS


if TYPE_CHECKING:
    from .stages import CascadeStage


OWN_SCHEDULERS = (CascadedDDPMScheduler, ContinuousDDPMScheduler)

SOLVER_CLASSES = tuple(dict.fromkeys(getattr(diffusers, name) for name, _ in SOLVERS.values()))

# Options of Diffusers' solvers whose noise levels are not those of training times
LEVEL_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

# lambda = log(alpha / sigma) at which Diffusers' solvers start
LOWEST_LOG_SNR = -5.1


# ---------------------------------------------------------------------------------------------------------------------
# Names


def scheduler_of(stage: "CascadeStage", name: str | None) -> SchedulerMixin:
    """
    The solver called `name` for a stage's forward process; None for the stage's own scheduler.

    Raises:
        ValueError: there is no such solver.
    """
    if name is None:
        return stage.scheduler
    if name not in SOLVER_NAMES:
        raise ValueError(f"`scheduler` of stage `{stage.name}` is {name!r}; it must be one of {SOLVER_NAMES}.")
    if name == ANCESTRAL and isinstance(stage.scheduler, OWN_SCHEDULERS):
        return stage.scheduler
    _, options_before = SOLVERS.get(solver_name(stage.scheduler), (None, {}))
    config = {entry: value for entry, value in stage.scheduler.config.items() if entry not in options_before}
    if name != ANCESTRAL:
        kind, options = SOLVERS[name]
        solver_class = getattr(diffusers, kind)
        arguments = parameters_of(solver_class)
        others = {entry: config.pop(entry) for entry in config.keys() - arguments if not entry.startswith("_")}
        solver = solver_class.from_config(config, **options)
        # from_config would keep these too, and warn; what is None is left out, or loading would warn again
        solver.register_to_config(**{entry: value for entry, value in others.items() if value is not None})
        return solver
    if stage.unet.config.time_conditioning == "noise_level":
        return ContinuousDDPMScheduler.from_config(config)
    is_learned = stage.unet.config.learned_variance and not config.get("variance_type")
    return CascadedDDPMScheduler.from_config(config, **({"variance_type": "learned_range"} if is_learned else {}))


def solver_name(scheduler: SchedulerMixin) -> str | None:
    """The name of a scheduler among `SOLVER_NAMES`; None for others."""
    if isinstance(scheduler, OWN_SCHEDULERS):
        return ANCESTRAL
    for name, (kind, options) in SOLVERS.items():
        if type(scheduler).__name__ == kind and options.items() <= scheduler.config.items():
            return name
    return None


def with_inference_schedule(
    name: str, scheduler: SchedulerMixin, schedule: str | list[float]
) -> ContinuousDDPMScheduler:
    """
    The scheduler of stage `name` with other noise levels to visit: the end points [beta_start, beta_end] of a linear
    schedule, or "squaredcos_cap_v2".

    Raises:
        ValueError: the scheduler is of another class, or the schedule is neither.
    """
    if not isinstance(scheduler, ContinuousDDPMScheduler):
        raise ValueError(
            f"`inference_schedules` names stage `{name}`, which samples with {type(scheduler).__name__}: only "
            "ContinuousDDPMScheduler takes another schedule at inference."
        )
    if schedule == "squaredcos_cap_v2":
        return type(scheduler).from_config(scheduler.config, inference_beta_schedule=schedule)
    if not isinstance(schedule, (list, tuple)) or len(schedule) != 2 or not 0 < schedule[0] < schedule[1] < 1:
        raise ValueError(
            f"`inference_schedules` of stage `{name}` is {schedule!r}; it must be the end points [beta_start, "
            "beta_end] of a linear schedule, 0 < beta_start < beta_end < 1, or 'squaredcos_cap_v2'."
        )
    ends = {"inference_beta_start": schedule[0], "inference_beta_end": schedule[1]}
    return type(scheduler).from_config(scheduler.config, inference_beta_schedule="linear", **ends)


# ---------------------------------------------------------------------------------------------------------------------
# Grids of Diffusers' solvers


def solver_on_grid(
    scheduler: SchedulerMixin, num_inference_steps: int, timesteps: Sequence[int] | None = None
) -> tuple[SchedulerMixin, torch.Tensor, torch.Tensor]:
    r"""
    A fresh solver like `scheduler` that takes only epsilon (IPNDM: v), with its grid set up on the CPU:
    `num_inference_steps` as it spaces them, or the training times `timesteps`, as many, from high to low.

    Returns:
        `tuple`: the solver; and for each of its `timesteps` the training time i = t - 1 that the network is given,
        int64, and alpha_bar, float64.

    Raises:
        `ValueError`: it cannot run so many steps, or not at these times, or its noise levels are not those of a
            diffusion process.
    """
    make = _ipndm_on_grid if isinstance(scheduler, IPNDMScheduler) else _on_grid
    with torch.device("cpu"):  # not the default device, where Diffusers would put some of the tables
        return make(scheduler, num_inference_steps, timesteps)


def _on_grid(
    scheduler: SchedulerMixin, num_inference_steps: int, timesteps: Sequence[int] | None
) -> tuple[SchedulerMixin, torch.Tensor, torch.Tensor]:
    """[`solver_on_grid`] of all but IPNDM."""
    kind = type(scheduler).__name__
    # with any other spacing, a single step would be taken at the cleanest time
    solver = _epsilon_solver(scheduler, {"timestep_spacing": "trailing"} if num_inference_steps == 1 else {})
    num_levels = solver.config.num_train_timesteps
    if num_inference_steps > num_levels:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}; {kind} takes {num_levels} at most, the training steps "
            "with signal left."
        )
    solver.set_timesteps(num_inference_steps, device="cpu")
    if timesteps is not None:
        _visit(solver, timesteps)
    if not hasattr(solver, "sigmas"):
        indices = solver.timesteps.round().long()
        alphas_cumprod = solver.alphas_cumprod[indices].double()
        _respace(solver, indices)
        return solver, indices, alphas_cumprod
    sigmas = solver.sigmas.double()
    if len(sigmas[:-1].unique()) < num_inference_steps:
        raise ValueError(
            f"{kind} cannot make {num_inference_steps} different noise levels out of {num_levels} timesteps: use "
            "fewer `num_inference_steps`."
        )
    solver.set_begin_index(0)  # not looked up by the first timestep, which several levels may share
    sigmas = sigmas[: len(solver.timesteps)]
    return solver, _training_times(solver, sigmas), 1 / (1 + sigmas**2)


@functools.cache
def parameters_of(kind: type[SchedulerMixin]) -> Mapping[str, inspect.Parameter]:
    """Of its `__init__`, which its configuration is made of."""
    return inspect.signature(kind.__init__).parameters


def _epsilon_solver(scheduler: SchedulerMixin, options: dict[str, Any]) -> SchedulerMixin:
    r"""
    A fresh scheduler like `scheduler`, but for `options`, that takes epsilon as it is (no limits of x_0, no learned
    variance) and starts where there is signal left: log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) >= -5.1.

    That is what DPM-Solver's authors recommend for cosine schedules (Diffusers' `lambda_min_clipped`), and about
    where the usual linear schedules end. A cosine schedule of 4000 steps goes on to -11.3 in its last 16 steps, where
    ODE solvers keep whatever x_0 is predicted first, and Heun's method does not converge. Of a process that is
    rescaled to end without any signal (`rescale_betas_zero_snr`), likewise only the last few times are dropped.
    """
    parameters = parameters_of(type(scheduler))
    arguments = {name: scheduler.config[name] for name in parameters if name in scheduler.config}
    if arguments.get("use_flow_sigmas"):
        raise ValueError(
            "`use_flow_sigmas` is True; it must be False: the network was trained on a diffusion process, whose noise "
            "levels differ from those of flow matching."
        )
    overrides = {"prediction_type": "epsilon", "thresholding": False, "clip_sample": False, **options}
    arguments |= {name: value for name, value in overrides.items() if name in parameters}
    if arguments.get("variance_type") in ("learned", "learned_range"):
        arguments["variance_type"] = parameters["variance_type"].default
    num_levels = int((torch.logit(scheduler.alphas_cumprod.double()) / 2 >= LOWEST_LOG_SNR).sum())
    if num_levels < len(scheduler.betas):
        arguments |= {"num_train_timesteps": num_levels, "trained_betas": scheduler.betas[:num_levels].tolist()}
        arguments.pop("rescale_betas_zero_snr", None)  # these betas are rescaled already
    return type(scheduler)(**arguments)


def _visit(solver: SchedulerMixin, timesteps: Sequence[int]):
    """Replaces the grid of a solver by other times, even if its `set_timesteps` takes no times."""
    kind, num_levels = type(solver).__name__, solver.config.num_train_timesteps
    spacing = next((option for option in LEVEL_SPACINGS if solver.config.get(option)), None)
    if spacing is not None:
        raise ValueError(
            f"`timesteps` are given, but `{spacing}` is True, with which {kind} chooses its own noise levels: leave "
            "one of them out."
        )
    if timesteps[0] >= num_levels:
        raise ValueError(
            f"`timesteps` begin at {timesteps[0]}; with {kind} they must be below {num_levels}, the training steps "
            "with signal left."
        )
    if "timesteps" in inspect.signature(solver.set_timesteps).parameters:
        solver.set_timesteps(timesteps=list(timesteps), device="cpu")
        return
    indices = torch.tensor(timesteps)
    solver.timesteps = indices.to(solver.timesteps.dtype)
    if hasattr(solver, "sigmas"):
        alphas_cumprod = solver.alphas_cumprod[indices].double()
        solver.sigmas = torch.cat([((1 - alphas_cumprod) / alphas_cumprod).sqrt().float(), solver.sigmas[-1:]])


def _ipndm_on_grid(
    scheduler: IPNDMScheduler, num_inference_steps: int, timesteps: Sequence[int] | None
) -> tuple[IPNDMScheduler, torch.Tensor, torch.Tensor]:
    """On the times of DDIM, since Diffusers' scheduler knows one process only; its "betas" are sqrt(1 - alpha_bar)."""
    count = scheduler.config.num_train_timesteps
    ddim = DDIMScheduler.from_config(scheduler.config, num_train_timesteps=count)
    _, indices, alphas_cumprod = solver_on_grid(ddim, num_inference_steps, timesteps)
    solver = IPNDMScheduler(num_inference_steps, trained_betas=[*(1 - alphas_cumprod).sqrt().tolist(), 0.0])
    solver.set_begin_index(0)
    return solver, indices, alphas_cumprod


def _respace(scheduler: SchedulerMixin, indices: torch.Tensor):
    r"""
    Reduces a scheduler that looks alpha_bar up by timestep to the timesteps it visits, n-1..0.

    DDIMScheduler takes the previous timestep to be t - T // n, which is not the next one it visits unless the spacing
    happens to be T // n; on n timesteps it is.
    """
    scheduler.alphas_cumprod = scheduler.alphas_cumprod[indices.flip(0)]
    # as Diffusers' pipelines do; `register_to_config` would write all betas out for a debug message
    scheduler._internal_dict = FrozenDict(scheduler.config, num_train_timesteps=len(indices))
    scheduler.timesteps = torch.arange(len(indices)).flip(0)


def _training_times(solver: SchedulerMixin, sigmas: torch.Tensor) -> torch.Tensor:
    """
    The solver's own times, rounded, unless they are more than one away from the nearest in noise: Diffusers leaves
    them evenly spread where levels are interpolated otherwise (`interpolation_type="log_linear"`).
    """
    log_sigmas = -torch.logit(solver.alphas_cumprod.double()) / 2
    nearest = np.interp(sigmas.log().numpy(), log_sigmas.numpy(), np.arange(len(log_sigmas))).round()
    own, nearest = solver.timesteps.round().long(), torch.from_numpy(nearest).long()
    return torch.where((own - nearest).abs() > 1, nearest, own)
