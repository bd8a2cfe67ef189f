"""What a page shows of a cascade: its classes, its stages and what each of them takes."""

from dataclasses import dataclass

from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.solvers import solver_name
from ..pipelines.stages import num_classes_of
from .config import Limits


@dataclass(frozen=True)
class StageFacts:
    """
    One stage, with the defaults of a call.

    Args:
        name: "base", "super_res_1", ...
        size: of its images.
        low_res_size: of the images it takes; None for the base.
        steps, most_steps: default and bound of the number of steps.
        level, highest_level: default and bound of s; None for a stage that takes none.
        scale: default of w; None for a stage that takes no guidance.
        solver: name of the solver it was saved with; None for one without a name.
    """

    name: str
    size: int
    low_res_size: int | None
    steps: int
    most_steps: int
    level: int | None
    highest_level: int | None
    scale: float | None
    solver: str | None

    @property
    def title(self) -> str:
        """Name and sizes, for a person."""
        sizes = [size for size in (self.low_res_size, self.size) if size is not None]
        return f"{self.name}: {' to '.join(f'{size}x{size}' for size in sizes)}"


def stage_facts(pipeline: CascadedDiffusionPipeline, limits: Limits) -> list[StageFacts]:
    """What can be chosen for each stage, from the first to the last."""
    defaults = pipeline.stage_options()
    facts = []
    for stage in pipeline.stages:
        noising = stage.noising_scheduler
        most_steps = min(limits.max_steps, stage.scheduler.config.num_train_timesteps)
        facts.append(
            StageFacts(
                name=stage.name,
                size=stage.unet.config.sample_size,
                low_res_size=stage.unet.config.low_res_size,
                steps=min(defaults["num_inference_steps"][stage.name], most_steps),
                most_steps=most_steps,
                level=defaults["augmentation_levels"].get(stage.name),
                highest_level=None if noising is None else noising.config.num_train_timesteps,
                scale=defaults["guidance_scale"][stage.name] if stage.unet.config.null_class else None,
                solver=solver_name(stage.scheduler),
            )
        )
    return facts


def class_names(pipeline: CascadedDiffusionPipeline) -> list[str]:
    """The classes by name, or by number where they have none; empty for an unconditional cascade."""
    count = num_classes_of(pipeline.stages)
    names = pipeline.config.id2label or {}
    return [names.get(number, str(number)) for number in range(count or 0)]
