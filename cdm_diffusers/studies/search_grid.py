"""Options of post-training search, and what it varies: settings of one stage, as a grid or a list of grids."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..data.config import LabelledDataOptions
from ..evaluation.sample import parse_json
from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.solvers import solver_name, stage_options
from ..training.config import check_at_least, option


CONDITIONINGS = ("generated", "train", "eval")


@dataclass(kw_only=True)
class SearchConfig(LabelledDataOptions):
    """
    Everything that can be said on the command line of `evaluation/search.py`.

    Raises:
        ValueError: for a value out of its range.
    """

    pipeline: str = field(metadata={"help": "Folder or Hub id of a cascade."})
    extractor: str = field(metadata={"help": "Network of the features; see evaluation/evaluate.py."})
    output_dir: str = field(metadata={"help": "Folder for results. A search that was stopped there goes on."})
    padding: int = option("Black pixels added on each side of real images (Fashion-MNIST, 28 to 32 pixels: 2).", 0)
    stage: str | None = option("The stage that is searched. Default: the last.")
    measured_stage: str | None = option(
        "The stage whose images are measured, against real images averaged down to its size: the searched one (the "
        "default), or one after it, the stages between running at the pipeline's settings."
    )
    grid: str | None = option(
        "What is searched, as JSON or a file of it: a dict of lists, all combinations of which are tried, or a list "
        "of such dicts; keys are num_inference_steps, augmentation_level, truncated, conditioning, scheduler, "
        "inference_schedule, guidance_scale and restart_timestep. Instead of the options that follow."
    )
    num_inference_steps: list[int] | None = option("Steps of the stage.")
    augmentation_levels: list[int] | None = option("s of the stage.")
    truncated: list[str] | None = option("false: z_0 is noised to s; true: the stage before stops at s.")
    conditionings: list[str] | None = option(
        '"generated", or real images of the "train" or "eval" split, averaged down.'
    )
    schedulers: list[str] | None = option("ancestral, ddim, dpmsolver++, sde-dpmsolver++, unipc.")
    guidance_scales: list[float] | None = option("w of the stage.")
    restart_timesteps: list[int] | None = option("t to which the base's samples are noised and denoised again.")
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each setting is sampled with each seed."})
    num_images: int = option("Samples of each setting and seed.", 2000)
    batch_size: int = option("Images per call of the pipeline and of the extractor.", 100)
    labels: str | None = option("Of the samples; see evaluation/sample.py.")
    classifier: str | None = option(
        "Folder of a classifier, for the share of samples recognised as their labels. Default: the extractor, if it "
        "is one."
    )
    select_split: str | None = option(
        "The split by whose distance the best setting is selected; the other one's is reported. Default: the training "
        "split."
    )
    max_evaluations: int | None = option(
        "Select among settings of at most so many evaluations of the stage's network."
    )
    write_best: bool = option("Write the best setting into the pipeline's folder.", False)
    keep_samples: bool = option("Keep the samples of every setting.", False)
    dtype: Literal["float32", "bf16", "fp16"] = option("Type of the networks' weights.", "float32")
    cache_dir: str = option("Folder for statistics of real images.", "~/.cache/cdm_diffusers")

    def __post_init__(self):
        check_at_least(self, num_images=2, batch_size=1, padding=0, max_evaluations=1)
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"`seeds` is {self.seeds}; give one or more, at least 0.")
        splits = [self.dataset_split, self.eval_split]
        if splits[0] == splits[1]:
            raise ValueError(f"`dataset_split` and `eval_split` are both {splits[0]!r}; they must differ.")
        self.select_split = self.select_split or self.dataset_split
        if self.select_split not in splits:
            raise ValueError(f"`select_split` is {self.select_split!r}; it must be one of {splits}.")
        if self.write_best and not Path(self.pipeline).is_dir():
            raise ValueError(f"`write_best` needs a folder to write to; `pipeline` is {self.pipeline!r}.")

    def grids(self) -> list[dict[str, list]]:
        """From `grid`, or from the options for the axes."""
        options = {
            "num_inference_steps": self.num_inference_steps,
            "augmentation_level": self.augmentation_levels,
            "truncated": self.truncated and [parse_json("truncated", value) for value in self.truncated],
            "conditioning": self.conditionings,
            "scheduler": self.schedulers,
            "guidance_scale": self.guidance_scales,
            "restart_timestep": self.restart_timesteps,
        }
        options = {name: values for name, values in options.items() if values is not None}
        if (self.grid is None) == (not options):
            raise ValueError(f"`grid` is {self.grid!r} and its axes are {options}: give either the one or the others.")
        return [options] if self.grid is None else read_grid(self.grid)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """
    How the searched stage is sampled; what is None is the pipeline's own.

    Args:
        num_inference_steps: steps of its untruncated grid.
        augmentation_level: s of its low-resolution input.
        truncated: whether the stage before stops at s, instead of being noised to it.
        conditioning: "generated" by the stages before, or real images of the "train" or "eval" split (Table 3b).
        scheduler: one of `SOLVER_NAMES`.
        inference_schedule: end points of a linear schedule or "squaredcos_cap_v2", for a ContinuousDDPMScheduler.
        guidance_scale: w.
        restart_timestep: of the base.
    """

    num_inference_steps: int | None = None
    augmentation_level: int | None = None
    truncated: bool = False
    conditioning: str = "generated"
    scheduler: str | None = None
    inference_schedule: tuple[float, float] | str | None = None
    guidance_scale: float | None = None
    restart_timestep: int | None = None

    def __post_init__(self):
        if isinstance(self.inference_schedule, list):
            object.__setattr__(self, "inference_schedule", tuple(self.inference_schedule))
        if type(self.guidance_scale) is int:
            object.__setattr__(self, "guidance_scale", float(self.guidance_scale))
        if type(self.truncated) is not bool:
            raise ValueError(f"`truncated` is {self.truncated!r}; it must be true or false.")
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"`conditioning` is {self.conditioning!r}; it must be one of {CONDITIONINGS}.")
        if self.truncated and self.conditioning != "generated":
            raise ValueError(
                f"`truncated` with `conditioning` {self.conditioning!r}: real images come from no truncated process."
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON, without what does not apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def sampling_options(self, stage: str) -> dict[str, Any]:
        """Arguments of [`SampleConfig`]; what is None is left out."""
        per_stage = {
            "num_inference_steps": self.num_inference_steps,
            "augmentation_levels": self.augmentation_level,
            "scheduler": self.scheduler,
            "inference_schedules": self.inference_schedule,
            "guidance_scale": self.guidance_scale,
        }
        options = {name: {stage: value} for name, value in per_stage.items() if value is not None}
        return {**options, "truncated": self.truncated, "restart_timestep": self.restart_timestep}


AXES = tuple(axis.name for axis in fields(Setting))


def read_grid(grid: str) -> list[dict[str, list]]:
    """
    Grids as JSON, or from a file of it: `{axis: [values]}` or a list of such; axes are the fields of [`Setting`].

    Raises:
        ValueError: it is something else.
    """
    try:
        content = json.loads(grid if grid.lstrip().startswith(("{", "[")) else Path(grid).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"`grid` is {grid!r}, which is neither JSON nor a file of it ({error}).") from error
    grids = content if isinstance(content, list) else [content]
    if not grids:
        raise ValueError("`grid` is empty: give at least one dict of lists.")
    for of_axes in grids:
        if not isinstance(of_axes, dict) or not all(
            isinstance(values, list) and values for values in of_axes.values()
        ):
            raise ValueError(f"`grid` has {of_axes!r}; it must be a dict of lists, such as {{'truncated': [true]}}.")
        unknown = sorted(set(of_axes) - set(AXES))
        if unknown:
            raise ValueError(f"`grid` has the axes {unknown}; there are {list(AXES)}.")
    return grids


def settings_of(grids: list[dict[str, list]], pipeline: CascadedDiffusionPipeline, stage: str) -> list[Setting]:
    """All combinations of each grid, with the pipeline's own values where a grid has none, each setting once."""
    settings = [resolved(Setting(**combination), pipeline, stage) for combination in _combinations(grids)]
    return list(dict.fromkeys(settings))


def _combinations(grids: list[dict[str, list]]) -> Iterator[dict[str, Any]]:
    for of_axes in grids:
        for values in itertools.product(*of_axes.values()):
            yield dict(zip(of_axes, values, strict=True))


def resolved(setting: Setting, pipeline: CascadedDiffusionPipeline, stage: str) -> Setting:
    own = stage_options(pipeline)
    defaults = {
        "num_inference_steps": own["num_inference_steps"][stage],
        "augmentation_level": own["augmentation_levels"].get(stage),
        "scheduler": solver_name(getattr(pipeline, f"{stage}_scheduler")),
        "guidance_scale": own["guidance_scale"][stage],
    }
    given = {name: value for name, value in asdict(setting).items() if value is not None}
    return Setting(**(defaults | given))
