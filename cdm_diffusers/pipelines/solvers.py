"""The samplers by name: this package's ancestral sampling, and those of Diffusers' schedulers that work here."""

from typing import TYPE_CHECKING

import diffusers
from diffusers import SchedulerMixin

from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from .solver_names import ANCESTRAL, SOLVER_NAMES, SOLVERS


if TYPE_CHECKING:
    from .pipeline_base import CascadeStage


OWN_SCHEDULERS = (CascadedDDPMScheduler, ContinuousDDPMScheduler)

SOLVER_CLASSES = tuple(dict.fromkeys(getattr(diffusers, name) for name, _ in SOLVERS.values()))


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
    if name != ANCESTRAL:
        kind, options = SOLVERS[name]
        return getattr(diffusers, kind).from_config(stage.scheduler.config, **options)
    if isinstance(stage.scheduler, OWN_SCHEDULERS):
        return stage.scheduler
    is_continuous = stage.unet.config.time_conditioning == "noise_level"
    return (ContinuousDDPMScheduler if is_continuous else CascadedDDPMScheduler).from_config(stage.scheduler.config)


def solver_name(scheduler: SchedulerMixin) -> str | None:
    """The one of `SOLVER_NAMES` that a scheduler is; None for others."""
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
