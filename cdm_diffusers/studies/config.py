"""Options of the studies, and configurations of `reproduce`, which are checked whole before anything runs."""

import dataclasses
import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Gt, Le
from pydantic import AfterValidator, TypeAdapter, ValidationInfo, model_validator

from ..data.config import DataOptions, LabelledDataOptions
from ..evaluation.config import (
    CACHE_DIR,
    PADDING,
    ClassificationAccuracyConfig,
    EvaluateConfig,
    Measurable,
    SampleConfig,
    TwoOrMore,
)
from ..options import NonNegativeInt, PositiveFloat, PositiveInt, from_json, option, options
from ..options.kinds import as_declared, kinds_of
from ..pipelines.solver_names import SolverName
from ..training.config import TrainingConfig, check_preset
from .experiments import EXPERIMENTS, Experiment


def _check_not_empty(values: list, info: ValidationInfo) -> list:
    if not values:
        raise ValueError(f"`{info.field_name}` is []; it must have at least one item.")
    return values


Seeds = Annotated[list[NonNegativeInt], AfterValidator(_check_not_empty)]
Conditioning = Literal["generated", "train", "eval"]
TimeSteps = Literal["even", "gits"]
MEMBERS = 8  # samples of an input, for the CRPS
InferenceSchedule = tuple[float, float] | Literal["squaredcos_cap_v2"]


# ------------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------------


@options
class ReproduceConfig:
    """
    Train, sample and measure what a table or figure of the paper compares, and set the results beside the paper's.

    Example:
        cdm reproduce table2b --config configs/fashion_mnist.json --output_dir runs/study
        cdm reproduce all --config configs/imagenet.json --dry_run
    """

    name: Literal[(*EXPERIMENTS, "all")] = option("The table or figure, or all of the configuration.", positional=True)
    config: str = option("JSON file: data, stages, scale and experiments; see configs/.")
    output_dir: str | None = option("Folder for stages, samples and results; experiments share it.", None)
    dataset_name: str | None = option("Data set of the Hub. Default: the configuration's.", None)
    train_data_dir: str | None = option("Folder of the data. Default: the configuration's.", None)
    num_images: Measurable | None = option("Samples of each row and seed. Default: the configuration's.", None)
    sampling_seeds: Seeds | None = option("Seeds of the samples. Default: the configuration's.", None)
    training_seeds: Seeds | None = option("Seeds of the trainings. Default: the configuration's.", None)
    max_train_steps: PositiveInt | None = option(
        "Optimizer steps of every training. Default: the configuration's.", None
    )
    dry_run: bool = option(
        "Check every row and print what would be trained and sampled, and what that costs. Needs no data and no GPU.",
        False,
    )
    json: bool = option("With --dry_run: print JSON.", False)
    gpu_tflops: PositiveFloat | None = option(
        "With --dry_run: peak of the GPU in TFLOPS, a multiply-add being two operations. Default: an H100's, 989 in "
        "bf16 and fp16, and 495 in float32 (TF32).",
        None,
    )
    utilisation: Annotated[float, Gt(0), Le(1)] | None = option(
        "With --dry_run: assumed share of that peak that networks reach. Default: 0.3.", None
    )

    def __post_init__(self):
        if self.output_dir is None and not self.dry_run:
            raise ValueError("`output_dir` is missing; it may be left out only with `dry_run`.")
        for name in () if self.dry_run else ("json", "gpu_tflops", "utilisation"):
            if value := getattr(self, name):
                raise ValueError(
                    f"`{name}` is {value}, but it only applies to a `dry_run`: leave it out, or give `dry_run`."
                )
        # Before anything is imported that takes long, or may not be installed.
        for name in experiment_names(self.name, self.config):
            read_settings(self, name)


@options
class CompareConfig:
    """
    Compare the rows of an experiment with one of them, seed by seed: better, worse or about equal?

    Example:
        cdm compare --report docs/results/table2b.json --to "no cascading"
    """

    report: str = option("NAME.json of reproduce.")
    to: str | None = option(
        "The row that the others are compared with, as the table names it. Default: the first.", None
    )
    split: Literal["train", "validation"] = option("Split from which distances are compared.", "validation")
    extrapolated: bool = option("Whether distances are those extrapolated to infinitely many images.", False)
    margin: float = option('"About equal" is a ratio between 1 - margin and 1 + margin.', 0.1)

    def __post_init__(self):
        if not 0 < self.margin < 1:
            raise ValueError(f"`margin` is {self.margin}; it must lie between 0 and 1.")


@options
class Setting:
    """How the searched stage is sampled; what is None is the pipeline's own."""

    num_inference_steps: PositiveInt | None = option("Steps of its untruncated grid.", None)
    timesteps: TimeSteps | list[NonNegativeInt] | None = option(
        '"even": as the solver spreads them; "gits": found on a few trajectories; or indices t - 1 from high to low.',
        None,
    )
    augmentation_level: NonNegativeInt | None = option("s of its low-resolution input.", None)
    truncated: bool = option("Whether the stage before stops at s, instead of being noised to it.", False)
    conditioning: Conditioning = option(
        '"generated" by the stages before, or real images of the "train" or "eval" split (Table 3b).', "generated"
    )
    scheduler: SolverName | None = option("Solver.", None)
    inference_schedule: InferenceSchedule | None = option("Of a ContinuousDDPMScheduler.", None)
    guidance_scale: float | None = option("w.", None)
    restart_timestep: PositiveInt | None = option("Of the base.", None)
    consistency: bool | None = option("Whether the stage keeps to the area averages of its input.", None)

    def __post_init__(self):
        if self.truncated and self.conditioning != "generated":
            raise ValueError(
                f"`truncated` with `conditioning` {self.conditioning!r}: real images come from no truncated process."
            )
        if isinstance(self.timesteps, list) and self.num_inference_steps not in (None, len(self.timesteps)):
            raise ValueError(
                f"`timesteps` are {len(self.timesteps)}, `num_inference_steps` is {self.num_inference_steps}: leave "
                "one of them out."
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON, without what does not apply."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def from_real_images(self) -> "Setting":
        """The same on real training images in place of generated ones."""
        return dataclasses.replace(self, conditioning="train", restart_timestep=None)

    def sampling_options(self, stage: str) -> dict[str, Any]:
        """Arguments of [`SampleConfig`]; what is None is left out."""
        per_stage = {
            "num_inference_steps": self.num_inference_steps,
            "timesteps": self.timesteps if isinstance(self.timesteps, list) else None,
            "augmentation_levels": self.augmentation_level,
            "scheduler": self.scheduler,
            "inference_schedules": self.inference_schedule,
            "guidance_scale": self.guidance_scale,
        }
        options = {name: {stage: value} for name, value in per_stage.items() if value is not None}
        options |= {"truncated": self.truncated, "restart_timestep": self.restart_timestep}
        return options | ({"consistency": True} if self.consistency else {})


@options
class SearchConfig(LabelledDataOptions):
    """
    Search steps, s, solver and guidance of a trained stage for the best samples; a search that was stopped resumes.

    Example:
        cdm search --pipeline checkpoints/fashion-mnist-32 --extractor checkpoints/fashion-mnist-classifier \\
            --train_data_dir /usr/share/datasets/fashion-mnist --padding 2 --stage super_res_1 \\
            --num_inference_steps 4 10 25 --schedulers ancestral unipc --output_dir runs/search
    """

    pipeline: str = option("Folder or Hub id of a cascade.")
    extractor: str = option("Network of the features; see evaluate.")
    output_dir: str = option("Folder for results. A search that was stopped there resumes.")
    padding: NonNegativeInt = option(PADDING, 0)
    stage: str | None = option("The stage that is searched. Default: the last.", None)
    measured_stage: str | None = option(
        "The stage whose images are measured, against real images averaged down to its size: the searched one (the "
        "default), or one after it, the stages between running at the pipeline's settings.",
        None,
    )
    grid: str | None = option(
        "What is searched, as JSON or a file of it: an object of lists, all combinations of which are tried, or a "
        f"list of such objects; keys are {', '.join(kinds_of(Setting))}. Instead of the options that follow.",
        None,
    )
    num_inference_steps: list[PositiveInt] | None = option("Steps of the stage.", None)
    timesteps: list[TimeSteps] | None = option(
        '"even": steps as the solver spreads them (the default); "gits": where a few trajectories of the stage, '
        "followed first, bend most.",
        None,
    )
    augmentation_levels: list[NonNegativeInt] | None = option("s of the stage.", None)
    truncated: list[bool] | None = option("false: z_0 is noised to s; true: the stage before stops at s.", None)
    conditionings: list[Conditioning] | None = option(
        '"generated", or real images of the "train" or "eval" split, averaged down.', None
    )
    schedulers: list[SolverName] | None = option("Solvers of the stage.", None)
    guidance_scales: list[float] | None = option("w of the stage.", None)
    restart_timesteps: list[PositiveInt] | None = option(
        "t to which the base's samples are noised and denoised again.", None
    )
    consistency: list[bool] | None = option("Whether the stage keeps to the area averages of its input.", None)
    real_inputs: bool = option(
        "Super-resolution: sample the setting of the smallest s from real training images too, to say whether "
        "augmentation can be expected to pay.",
        True,
    )
    seeds: Seeds = option("Each setting is sampled with each seed.", [0])
    num_images: TwoOrMore = option("Samples of each setting and seed.", 2600)
    batch_size: PositiveInt = option("Images per call of the pipeline and of the extractor.", 100)
    labels: str | None = option("Labels of the samples; see sample. Default: balanced.", None)
    classifier: str | None = option(
        "Folder of a classifier, for the share of samples recognised as their labels. Default: the extractor, if it "
        "is one.",
        None,
    )
    select: Literal["distance", "recognition", "crps"] = option(
        "What the best setting is best in: distance from real images; the share recognised by a classifier; or, of a "
        "super-resolution stage, the CRPS of several samples of each of some real inputs, beside which their spread "
        "over their error is measured (1: they differ by as much as they err).",
        "distance",
    )
    select_split: str | None = option(
        "The split by whose distance the best setting is selected, or from whose images the inputs of --select crps "
        "come; the other one's distance is reported. Default: the training split.",
        None,
    )
    ensemble_images: TwoOrMore = option(f"Inputs of --select crps, {MEMBERS} samples of each.", 100)
    max_evaluations: PositiveInt | None = option(
        "Select among settings of at most this many evaluations of the stage's network.", None
    )
    write_best: bool = option("Write the best setting into the pipeline's folder, as its default.", False)
    write_as: str | None = option(
        "Write the best setting into the pipeline's folder for those who ask for these settings by name: "
        "`pipe(..., settings=NAME)`.",
        None,
    )
    keep_samples: bool = option("Keep the samples of every setting.", False)
    dtype: Literal["float32", "bf16", "fp16"] = option("Type of the networks' weights.", "float32")
    cache_dir: str = option("Folder for statistics of real images.", CACHE_DIR)

    def __post_init__(self):
        splits = [self.dataset_split, self.eval_split]
        if splits[0] == splits[1]:
            raise ValueError(f"`dataset_split` and `eval_split` are both {splits[0]!r}; they must differ.")
        self.select_split = self.select_split or self.dataset_split
        if self.select_split not in splits:
            raise ValueError(f"`select_split` is {self.select_split!r}; it must be one of {splits}.")
        if self.write_best and self.write_as is not None:
            raise ValueError(f"`write_as` is {self.write_as!r}, and `write_best` is True: give one of them.")
        for name in ("write_best", "write_as"):
            if getattr(self, name) and not Path(self.pipeline).is_dir():
                raise ValueError(f"`pipeline` is {self.pipeline!r}; with `{name}` it must be a folder.")
        self.settings()

    def settings(self) -> list[Setting]:
        """
        All combinations of `grid`, or of the options for its axes.

        Raises:
            ValueError: both or neither are given, or a setting is not valid.
        """
        options = {
            "num_inference_steps": self.num_inference_steps,
            "timesteps": self.timesteps,
            "augmentation_level": self.augmentation_levels,
            "truncated": self.truncated,
            "conditioning": self.conditionings,
            "scheduler": self.schedulers,
            "guidance_scale": self.guidance_scales,
            "restart_timestep": self.restart_timesteps,
            "consistency": self.consistency,
        }
        options = {name: values for name, values in options.items() if values is not None}
        if (self.grid is None) == (not options):
            if not options:
                raise ValueError("`grid` is None, and no axis is given: give it, or num_inference_steps, ...")
            raise ValueError(f"`grid` is {self.grid!r}, and so is {', '.join(options)}: leave one of them out.")
        grids = [options] if self.grid is None else read_grid(self.grid)
        return [
            Setting(**dict(zip(axes, values, strict=True)))
            for axes in grids
            for values in itertools.product(*axes.values())
        ]


def read_grid(grid: str) -> list[dict[str, list]]:
    """
    Grids as JSON, or from a file of it: `{axis: [values]}` or a list of such; axes are the fields of [`Setting`].

    Raises:
        ValueError: it is something else.
    """
    try:
        content = json.loads(grid if grid.lstrip().startswith(("{", "[")) else Path(grid).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"`grid` is {grid!r}; it must be JSON or a file of it ({error}).") from error
    grids = content if isinstance(content, list) else [content]
    if not grids:
        raise ValueError("`grid` is empty; it must have at least one object of lists.")
    for axes in grids:
        if not isinstance(axes, dict) or not all(isinstance(values, list) and values for values in axes.values()):
            raise ValueError(f'`grid` has {axes!r}; it must be an object of lists, such as {{"truncated": [true]}}.')
        if unknown := sorted(set(axes) - set(kinds_of(Setting))):
            raise ValueError(f"`grid` has the axes {unknown}; they must be among {list(kinds_of(Setting))}.")
    return grids


# ------------------------------------------------------------------------------------------------------------------
# Configurations of reproduce
# ------------------------------------------------------------------------------------------------------------------


class Section:
    """
    A part of a configuration: its values as attributes, and `given`, the JSON that it came from. Names of folders are
    hashes of the latter: no defaults are filled in, and 1 is not 1.0.
    """

    given: dict[str, Any]

    @model_validator(mode="wrap")
    @classmethod
    def _keep_what_was_given(cls, values: Any, check: Callable[[Any], Any]) -> Any:
        checked = values
        if isinstance(values, dict):
            checked = {name: as_declared(value, kinds_of(cls).get(name)) for name, value in values.items()}
        section = check(checked)
        section.given = values
        return section


def names_of(kind: type) -> set[str]:
    """The names of all options."""
    return {field.name for field in dataclasses.fields(kind)}


def some_of(kind: type, names: set[str]) -> type:
    """The options `names` of a command as a [`Section`] in which all of them are optional."""
    kinds, declared = kinds_of(kind), []
    for field in dataclasses.fields(kind):
        if field.name in names:
            is_required = field.default is field.default_factory is dataclasses.MISSING
            default = dataclasses.field(default=field.default, default_factory=field.default_factory)
            declared.append((field.name, kinds[field.name] | None, None if is_required else default))
    return options(dataclasses.make_dataclass(kind.__name__, declared, bases=(Section,), kw_only=True))


DATA_OPTIONS = names_of(DataOptions)
HOW_IMAGES_ARE_READ = {"dataset_split", "source_resolution", "num_channels", "padding"}
HOW_IMAGES_ARE_READ |= {"num_classes", "streaming", "hold_in_memory"}
DataSection = some_of(TrainingConfig, DATA_OPTIONS | HOW_IMAGES_ARE_READ)

NOT_OF_STUDIES = {"preset", "output_dir", "seed", "pretrained_model_name_or_path"}
TrainingOptions = some_of(TrainingConfig, names_of(TrainingConfig) - NOT_OF_STUDIES)


@options
class TrainingSection(TrainingOptions):
    """Options of all trainings, and a training for each seed."""

    seeds: Seeds


@options
class SamplingSection(some_of(SampleConfig, {"batch_size", "dtype", "image_format"})):
    """The scale of all samples, and a set of them for each seed."""

    num_images: Measurable
    seeds: Seeds


EvaluationOptions = some_of(EvaluateConfig, names_of(EvaluateConfig) - DATA_OPTIONS - {"samples", "output", "padding"})


@options
class EvaluationSection(EvaluationOptions):
    """What samples are measured with, and the size of the real images."""

    extractor: str
    source_resolution: PositiveInt
    num_channels: PositiveInt


ClassificationOptions = some_of(
    ClassificationAccuracyConfig, names_of(ClassificationAccuracyConfig) - {"samples", "output_dir"}
)


@options
class ClassificationSection(ClassificationOptions):
    """How classifiers are trained, and on how many samples; by default on as many as there are training images."""

    num_images: Measurable | None = None


@options
class StageSource(Section):
    """A stage that is trained from a preset, or one (its only one without `stage`) of a pipeline that is there."""

    preset: str | None = None
    options: TrainingOptions | None = None
    pipeline: str | None = None
    stage: str | None = None

    def __post_init__(self):
        if (self.preset is None) == (self.pipeline is None) or (self.preset is not None and self.stage is not None):
            raise ValueError(
                f"a stage has `preset` {self.preset!r}, `pipeline` {self.pipeline!r} and `stage` {self.stage!r}; it "
                "must have a preset, or a pipeline and the name of its stage (none for a pipeline of one stage)."
            )
        if self.pipeline is not None and self.options is not None:
            raise ValueError("`options` are those of a training, and a stage of a `pipeline` is not trained.")
        if self.preset is not None:
            check_preset(self.preset)

    @property
    def is_given(self) -> bool:
        """Whether it is there already."""
        return self.pipeline is not None


HOW_STAGES_SAMPLE = {"num_inference_steps", "augmentation_levels", "guidance_scale"}
HOW_STAGES_SAMPLE |= {"restart_timestep", "inference_schedules"}


@options
class ExperimentSection(some_of(SampleConfig, HOW_STAGES_SAMPLE)):
    """How all arms of an experiment sample, and what it measures differently."""

    scheduler: SolverName | dict[str, SolverName] | None = None
    evaluation: EvaluationOptions | None = None


def section_of(experiment: Callable[..., Experiment]) -> type[ExperimentSection]:
    """What a configuration says of an experiment: the parameters of its function besides an [`ExperimentSection`]."""
    kinds, declared = get_type_hints(experiment, include_extras=True), []
    for name, parameter in inspect.signature(experiment).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            declared.append((name, kinds[name], *default))
    return options(dataclasses.make_dataclass(experiment.__name__, declared, bases=(ExperimentSection,), kw_only=True))


ExperimentSections = options(
    dataclasses.make_dataclass(
        "ExperimentSections",
        [(name, section_of(function) | None, None) for name, function in EXPERIMENTS.items()],
        bases=(Section,),
        kw_only=True,
    )
)


@options
class StudySettings(Section):
    """
    A configuration of `reproduce`.

    Args:
        name: of the data, for reports.
        data: the images.
        training, sampling, evaluation, classification: options of these commands that all experiments share.
        stages: what they train or take, by names of its own.
        experiments: those that can be reproduced, each with its stages and how they sample.
    """

    name: str
    data: DataSection
    training: TrainingSection
    sampling: SamplingSection
    evaluation: EvaluationSection
    stages: dict[str, StageSource]
    experiments: ExperimentSections
    classification: ClassificationSection | None = None

    def experiment(self, name: str) -> Experiment:
        """The experiment of that name with the stages and options of this configuration."""
        return EXPERIMENTS[name](**self.given["experiments"][name])


def experiment_names(name: str, file: str) -> list[str]:
    """
    The experiment of that name, or of "all" those that the configuration `file` has.

    Raises:
        ValueError, OSError: as `read_settings`.
    """
    if name != "all":
        return [name]
    return list(from_json(StudySettings, file).given["experiments"])


def read_settings(config: ReproduceConfig, name: str | None = None) -> StudySettings:
    """
    The configuration file with what the command line says otherwise, and as `evaluation` that of the experiment.

    Args:
        name: of the experiment. Default: `config.name`.

    Raises:
        ValueError: the file is not such a configuration, or does not have the experiment.
        OSError: the file cannot be read.
    """
    name = name or config.name
    given = from_json(StudySettings, config.config).given
    if given["experiments"].get(name) is None:
        raise ValueError(
            f"`name` is {name!r}; it must be one of the experiments of {config.config!r}, "
            f"{list(given['experiments'])}."
        )
    if config.dataset_name is not None or config.train_data_dir is not None:
        if config.dataset_name != given["data"].get("dataset_name"):
            given["data"].pop("dataset_revision", None)
        given["data"] |= {"dataset_name": config.dataset_name, "train_data_dir": config.train_data_dir}
    for part, option_name, value in (
        ("sampling", "num_images", config.num_images),
        ("sampling", "seeds", config.sampling_seeds),
        ("training", "seeds", config.training_seeds),
        ("training", "max_train_steps", config.max_train_steps),
    ):
        if value is not None:
            given[part][option_name] = value
    if config.max_train_steps is not None:
        for stage in given["stages"].values():
            (stage.get("options") or {}).pop("max_train_steps", None)
    given["evaluation"] |= given["experiments"][name].pop("evaluation", None) or {}
    return TypeAdapter(StudySettings).validate_json(json.dumps(given))
