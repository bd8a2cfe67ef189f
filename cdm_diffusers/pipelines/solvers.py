"""How images are drawn from a cascade when sets of them are made: a generator for each image, the stages that run,
their schedulers, and how often their networks are called."""

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from ..schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from . import CascadedDiffusionPipeline
from .denoising import OWN_SCHEDULERS
from .inputs import check_stage_names, per_stage
from .pipeline_base import CascadeStage


# What a name stands for: a scheduler of Diffusers, and what its config says besides the stage's.
SOLVERS = {
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
}
SOLVER_NAMES = ("ancestral", *SOLVERS)


# ------------------------------------------------------------------------------------------------------------------
# What the stages do: schedulers, steps, s, guidance
# ------------------------------------------------------------------------------------------------------------------


def with_schedulers(
    pipeline: CascadedDiffusionPipeline,
    scheduler: str | dict[str, str] | None = None,
    inference_schedules: dict[str, str | list[float]] | None = None,
    last_stage: str | None = None,
) -> CascadedDiffusionPipeline:
    """
    A cascade with the same networks and other schedulers, cut off after `last_stage`.

    Args:
        scheduler: one of `SOLVER_NAMES` for all stages, or for some of them in a dict; the others keep theirs.
        inference_schedules: for stages with a ContinuousDDPMScheduler, the noise levels they visit: the end points
            [beta_start, beta_end] of a linear schedule, or "squaredcos_cap_v2".

    Raises:
        ValueError: a name of a stage or solver is unknown, or the stage is of another kind.
    """
    names = [stage.name for stage in pipeline.stages]
    if last_stage is not None and last_stage not in names:
        raise ValueError(f"`last_stage` is {last_stage!r}; the pipeline has {names}.")
    schedulers, levels = per_stage("scheduler", scheduler, names), inference_schedules or {}
    check_stage_names("inference_schedules", levels, names)
    kept = names if last_stage is None else names[: names.index(last_stage) + 1]
    parts = {}
    for stage in pipeline.stages[: len(kept)]:
        solver = scheduler_of(stage, schedulers.get(stage.name))
        if stage.name in levels:
            solver = _with_inference_schedule(stage.name, solver, levels[stage.name])
        parts |= {f"{stage.name}_unet": stage.unet, f"{stage.name}_scheduler": solver}
        if stage.noising_scheduler is not None:
            parts[f"{stage.name}_noising_scheduler"] = stage.noising_scheduler
    config = {name: value for name, value in pipeline.config.items() if name in ("id2label", "source_resolution")}
    if all(parts[f"{name}_unet"].config.num_classes is None for name in kept):
        config["id2label"] = None
    for name, value in pipeline.config.items():
        if name.startswith("default_"):
            config[name] = value and {stage: default for stage, default in value.items() if stage in kept}
    return CascadedDiffusionPipeline(**parts, **config)


def scheduler_of(stage: CascadeStage, name: str | None) -> SchedulerMixin:
    """
    The solver called `name` for a stage's forward process; None for the stage's own scheduler.

    Raises:
        ValueError: there is no such solver.
    """
    if name is None:
        return stage.scheduler
    if name not in SOLVER_NAMES:
        raise ValueError(f"`scheduler` of stage `{stage.name}` is {name!r}; it must be one of {SOLVER_NAMES}.")
    if name != "ancestral":
        kind, options = SOLVERS[name]
        return kind.from_config(stage.scheduler.config, **options)
    if isinstance(stage.scheduler, OWN_SCHEDULERS):
        return stage.scheduler
    is_continuous = stage.unet.config.time_conditioning == "noise_level"
    return (ContinuousDDPMScheduler if is_continuous else CascadedDDPMScheduler).from_config(stage.scheduler.config)


def solver_name(scheduler: SchedulerMixin) -> str | None:
    """The one of `SOLVER_NAMES` that a scheduler is; None for others."""
    if isinstance(scheduler, OWN_SCHEDULERS):
        return "ancestral"
    for name, (kind, options) in SOLVERS.items():
        if type(scheduler) is kind and options.items() <= scheduler.config.items():
            return name
    return None


def _with_inference_schedule(name: str, scheduler: SchedulerMixin, schedule: str | list[float]) -> SchedulerMixin:
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


def stage_options(
    pipeline: CascadedDiffusionPipeline,
    num_inference_steps: int | dict[str, int] | None = None,
    augmentation_levels: dict[str, int] | None = None,
    guidance_scale: float | dict[str, float] | None = None,
) -> dict[str, dict[str, int | float]]:
    """These arguments of the pipeline's call for all stages: the pipeline's own values where none are given."""
    stages = pipeline.stages
    names = [stage.name for stage in stages]
    steps = per_stage("num_inference_steps", num_inference_steps, names)
    recommended = pipeline.config.default_num_inference_steps or {}
    for stage in stages:
        if steps.get(stage.name) is None:
            steps[stage.name] = stage.default_num_inference_steps(recommended.get(stage.name))
    if not isinstance(augmentation_levels or {}, dict):
        raise ValueError(
            f'`augmentation_levels` is {augmentation_levels!r}; it must name stages, such as {{"super_res_1": 100}}.'
        )
    defaults = pipeline.config.default_augmentation_levels or {}
    levels = {stage.name: defaults.get(stage.name, 0) for stage in stages if stage.noising_scheduler is not None}
    scales = dict.fromkeys(names, 1.0) | (pipeline.config.default_guidance_scales or {})
    given = per_stage("guidance_scale", guidance_scale, names)
    return {
        "num_inference_steps": steps,
        "augmentation_levels": levels | (augmentation_levels or {}),
        "guidance_scale": scales | {name: scale for name, scale in given.items() if scale is not None},
    }


# ------------------------------------------------------------------------------------------------------------------
# Cost
# ------------------------------------------------------------------------------------------------------------------
