"""
The paper's experiments as data: for each table or figure its rows, what each row trains and how it samples, and what
the paper found.

An experiment is a function of its section in a configuration (`configs/*.json`), which names stages and says how they
sample; see `docs/evaluation.md`. The annotations of its parameters are what the section is checked against.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..options import NonNegativeFloat, NonNegativeInt, PositiveInt


PAPER_COLUMNS = ("FID vs train", "FID vs validation", "IS")
PAPER_LEVELS = (251, 501, 751, 1001, 1251, 1501)


@dataclass(frozen=True)
class StageRecipe:
    """
    Which stage an arm samples with.

    Args:
        name: that of a stage in the configuration's `stages`.
        options: of its training, where this arm differs from the configuration.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """
    What is compared: stages, and how they sample.

    Args:
        stages: from the base on.
        sampling: options of [`SampleConfig`], `num_inference_steps` and the like.
        ground_truth: the split ("train" or "validation") whose images, averaged down, the last stage takes instead of
            samples.
        blur_sigma: blurs what the last stage takes by a Gaussian of this width, in pixels.
        noise: adds Gaussian noise of this deviation, of images in [-1, 1], to what the last stage takes, which is not
            conditioned on it.
        balanced: whether the real images have labels as samples have them, that of image i being i mod K.
        num_images: of the last stage, if fewer than those of other arms.
        low_res_sampling: options of the stages before the last one, if arms that share their images differ in what
            `sampling` says about these.
    """

    stages: tuple[StageRecipe, ...]
    sampling: dict[str, Any] = field(default_factory=dict)
    ground_truth: str | None = None
    blur_sigma: float | None = None
    noise: float | None = None
    balanced: bool = False
    num_images: int | None = None
    low_res_sampling: dict[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        """What the cascade calls its stages."""
        return stage_names(len(self.stages))

    @property
    def shares_low_res(self) -> bool:
        """Whether what the last stage takes is made before it, once for all arms that have it in common."""
        return len(self.stages) > 1 and not self.sampling.get("truncated", False)

    @property
    def low_res_options(self) -> dict[str, Any]:
        """The options that concern the stages before the last one."""
        return restricted(self.sampling if self.low_res_sampling is None else self.low_res_sampling, self.names[:-1])

    @property
    def last_options(self) -> dict[str, Any]:
        """The options that concern the last stage."""
        return restricted(self.sampling, self.names[-1:])

    def key(self, stages: list[Any]) -> list[Any]:
        """What decides the samples, but for their number and seed; `stages` has what decides each stage."""
        key = stages, self.ground_truth, self.blur_sigma
        key += () if self.noise is None else (self.noise,)
        key += ("balanced",) if self.balanced else ()
        return [key, self.sampling]

    def low_res_key(self, stages: list[Any]) -> list[Any]:
        """The same of what the stages before the last one make."""
        return [stages[:-1], self.low_res_options]


def stage_names(count: int) -> list[str]:
    """What a cascade of `count` stages calls them."""
    return ["base", *(f"super_res_{place}" for place in range(1, count))]


def restricted(sampling: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The options that concern the stages `names`."""
    return {
        key: {name: value[name] for name in names if name in value} if isinstance(value, dict) else value
        for key, value in sampling.items()
    }


def check_names(sampling: dict[str, Any], names: list[str]) -> None:
    """
    Raises:
        ValueError: an option is given for another stage than those of `names`.
    """
    for option, value in sampling.items():
        if unknown := sorted(value.keys() - set(names)) if isinstance(value, dict) else []:
            raise ValueError(f"`{option}` has {unknown}; they must be among {names}.")


@dataclass(frozen=True)
class Row:
    """
    Args:
        heading: of the group of rows.
        label: of the row.
        arm: what is measured.
        x: where the row stands in the figure; None if it is not in it.
        paper: the paper's values, column by column; empty where the paper has no such row.
        paper_accuracies: where classifiers are trained on the row (Table 1b), the paper's top-1 and top-5 after
            training on "samples" and on "real" images, as far as it has them.
    """

    heading: str
    label: str
    arm: Arm
    x: float | None = None
    paper: tuple[str, ...] = ()
    paper_accuracies: dict[str, tuple[str, str]] | None = None


@dataclass(frozen=True)
class Experiment:
    """
    Args:
        title: of the table, with the paper's number.
        rows: in the order of the table.
        x_label: of the figure's horizontal axis; None for an experiment that is only a table.
        log_x: whether that axis is logarithmic.
        paper_columns: what `Row.paper` holds.
        images: whether the figure is a picture of samples, with a row for each row of the table (Figure 9).
        classification: whether classifiers are trained on the last row's samples (Table 1b, Figure 7), and perhaps on
            others'.
        entries: those of its section in a configuration by which rows differ in how they sample.
    """

    title: str
    rows: tuple[Row, ...]
    x_label: str | None = None
    log_x: bool = False
    paper_columns: tuple[str, ...] = PAPER_COLUMNS
    images: bool = False
    classification: bool = False
    entries: tuple[str, ...] = ()


@dataclass(frozen=True)
class AugmentationExperiment(Experiment):
    """
    Rows of one heading and label differ in the training of the last stage. See docs/results.md for the words.

    Args:
        gate: how many times the ground truth's distance the weak base's must be before s is swept.
        margin: a share of the distance; an effect within it counts as none.
        levels: the s of the bases and of real training images.
        control_levels: those of the positive control and of the few-step base.
        control_noises: from the smallest on, the noise of each positive control.
    """

    gate: float = 1.3
    margin: float = 0.03
    levels: tuple[int, ...] = ()
    control_levels: tuple[int, ...] = ()
    control_noises: tuple[float, ...] = ()


# ------------------------------------------------------------------------------------------------------------------
# Section 4.2 and 4.3
# ------------------------------------------------------------------------------------------------------------------


def table2a(base: str, restart_timestep: PositiveInt = 2000, **sampling) -> Experiment:
    """More sampling steps by restart (Section 4.2)."""
    arm = Arm((StageRecipe(base),), sampling)
    restarted = replace(arm, sampling={**sampling, "restart_timestep": restart_timestep})
    return Experiment(
        "Table 2a: a baseline without a cascade, and more sampling steps",
        (
            Row("", "one pass", arm, paper=("2.44", "2.91", "49.81 ± 0.65")),
            Row("", "+ more sampling steps", restarted, paper=("2.35", "2.91", "52.72 ± 1.15")),
        ),
    )


SMALL_CASCADE = {0: ("6.02", "5.84", "35.59 ± 1.19"), 101: ("3.41", "3.67", "44.72 ± 1.12")}
SMALL_CASCADE |= {1001: ("2.13", "2.79", "54.47 ± 1.05")}


def table2b(
    no_cascading: str,
    base: str,
    super_res: str,
    num_inference_steps: dict[str, PositiveInt],
    levels: list[NonNegativeInt] = (0, 101, 1001),
    no_cascading_restart_timestep: PositiveInt | None = None,
    **sampling,
) -> Experiment:
    """
    No cascade against a cascade of the same super-resolution architecture, a network for each s (Section 4.3).

    Args:
        no_cascading_restart_timestep: of the baseline, which in the paper is Table 2a's with more sampling steps.

    Raises:
        ValueError: the steps of "super_res_1", which are also those of the baseline, are not given.
    """
    if "super_res_1" not in num_inference_steps:
        raise ValueError(f"`num_inference_steps` is {num_inference_steps}; it must have 'super_res_1'.")
    plain = {**sampling, "num_inference_steps": {"base": num_inference_steps["super_res_1"]}}
    if no_cascading_restart_timestep is not None:
        plain["restart_timestep"] = no_cascading_restart_timestep
    sampling["num_inference_steps"] = num_inference_steps
    rows = [Row("", "no cascading", Arm((StageRecipe(no_cascading),), plain), paper=("2.35", "2.91", "52.72 ± 1.15"))]
    for level in levels:
        stages = StageRecipe(base), StageRecipe(super_res, {"augmentation_level": level})
        arm = Arm(stages, {**sampling, "augmentation_levels": {"super_res_1": level}})
        rows.append(Row("cascading", f"s = {level}", arm, level, SMALL_CASCADE.get(level, ())))
    return Experiment("Table 2b: no cascading and cascading", tuple(rows), "truncation time s", entries=("levels",))


def figure9(
    no_cascading: str,
    base: str,
    super_res: str,
    num_inference_steps: dict[str, PositiveInt],
    levels: list[NonNegativeInt] = (0, 101, 1001),
    no_cascading_restart_timestep: PositiveInt | None = None,
    **sampling,
) -> Experiment:
    """Samples of Table 2b's models."""
    restart = no_cascading_restart_timestep
    table = table2b(no_cascading, base, super_res, num_inference_steps, levels, restart, **sampling)
    return replace(table, title="Figure 9: samples for varying s", images=True)


LARGE_CASCADE = {
    "s = 0": ("1.71", "2.46", "61.34 ± 1.58"),
    "truncated": {
        251: ("1.50", "2.44", "66.76 ± 1.76"),
        501: ("1.48", "2.48", "67.95 ± 1.97"),
        751: ("1.48", "2.51", "68.48 ± 1.77"),
        1001: ("1.49", "2.51", "67.95 ± 1.51"),
        1251: ("1.51", "2.54", "67.20 ± 1.94"),
        1501: ("1.54", "2.56", "67.09 ± 1.67"),
    },
    "non-truncated": {
        251: ("1.58", "2.50", "66.21 ± 1.51"),
        501: ("1.53", "2.51", "67.59 ± 1.85"),
        751: ("1.48", "2.47", "67.48 ± 1.31"),
        1001: ("1.49", "2.48", "66.51 ± 1.59"),
        1251: ("1.48", "2.46", "66.28 ± 1.49"),
        1501: ("1.50", "2.47", "65.59 ± 0.86"),
    },
    "train": {
        0: ("0.76", "1.76", "74.84 ± 1.43"),
        251: ("0.87", "1.85", "71.79 ± 0.89"),
        501: ("0.92", "1.91", "70.68 ± 1.26"),
        751: ("0.95", "1.94", "69.93 ± 1.40"),
        1001: ("0.98", "1.97", "69.03 ± 1.26"),
        1251: ("1.03", "1.99", "67.92 ± 1.65"),
        1501: ("1.11", "2.04", "66.7 ± 1.21"),
    },
    "validation": {
        0: ("1.20", "0.59", "64.33 ± 1.24"),
        251: ("1.27", "0.96", "63.17 ± 1.19"),
        501: ("1.32", "1.17", "62.65 ± 0.76"),
        751: ("1.38", "1.32", "62.21 ± 0.94"),
        1001: ("1.42", "1.44", "61.53 ± 1.39"),
        1251: ("1.47", "1.54", "60.58 ± 0.93"),
        1501: ("1.53", "1.64", "60.02 ± 0.84"),
    },
}


def table3a(base: str, super_res: str, levels: list[NonNegativeInt] = PAPER_LEVELS, **sampling) -> Experiment:
    """Quality over s, truncated and not, on the base model's samples."""
    stages = StageRecipe(base), StageRecipe(super_res)

    def arm(level: int, truncated: bool) -> Arm:
        return Arm(stages, {**sampling, "augmentation_levels": {"super_res_1": level}, "truncated": truncated})

    rows = [Row("no conditioning augmentation (baseline)", "s = 0", arm(0, False), 0, LARGE_CASCADE["s = 0"])]
    for heading, truncated in (("truncated", True), ("non-truncated", False)):
        for level in levels:
            paper = LARGE_CASCADE[heading].get(level, ())
            rows.append(
                Row(f"{heading} conditioning augmentation", f"s = {level}", arm(level, truncated), level, paper)
            )
    title = "Table 3a: base model for low resolution conditioning"
    return Experiment(title, tuple(rows), "truncation time s", entries=("levels",))


def table3b(base: str, super_res: str, levels: list[NonNegativeInt] = (0, *PAPER_LEVELS), **sampling) -> Experiment:
    """Quality over s on real low-resolution images."""
    stages = StageRecipe(base), StageRecipe(super_res)
    rows = []
    for split in ("train", "validation"):
        heading = f"ground truth {'training' if split == 'train' else split} data"
        for level in levels:
            options = {**sampling, "augmentation_levels": {"super_res_1": level}}
            arm = Arm(stages, options, ground_truth=split)
            rows.append(Row(heading, f"s = {level}", arm, level, LARGE_CASCADE[split].get(level, ())))
    title = "Table 3b: ground truth for low resolution conditioning"
    return Experiment(title, tuple(rows), "truncation time s", entries=("levels",))


# ------------------------------------------------------------------------------------------------------------------
# Section 4.4
# ------------------------------------------------------------------------------------------------------------------

BLUR = {
    0.6: ("6.18", "5.57", "142.71 ± 2.83"),
    0.8: ("6.90", "6.31", "136.57 ± 4.34"),
    1.0: ("6.35", "5.76", "141.40 ± 4.34"),
}


def table4a(
    before: list[str],
    super_res: str,
    noise_levels: list[NonNegativeInt] = (0, 101),
    plain_batch_size: PositiveInt | None = None,
    **sampling,
) -> Experiment:
    """
    Blur of the conditioning: the paper's rows; the settings it names without figures (blur on all examples, blur at
    inference); and Gaussian noise in its place.

    Args:
        plain_batch_size: with it the last stage is trained as Table 4b's baseline, which the paper's second row is.
    """
    shared = {} if plain_batch_size is None else plain_training(plain_batch_size)
    last = f"super_res_{len(before)}"
    earlier = tuple(StageRecipe(name) for name in before)

    def arm(options: dict[str, Any], **further) -> Arm:
        return Arm((*earlier, StageRecipe(super_res, shared | options)), **{"sampling": sampling, **further})

    none = arm({"conditioning_augmentation": "none"})
    rows = [Row("blur", "sigma = 0 (no blur)", none, paper=("7.26", "6.42", "134.53 ± 2.97"))]
    for high, paper in BLUR.items():
        blurred = arm({"conditioning_augmentation": "blur", "blur_sigma_range": [0.4, high]})
        rows.append(Row("blur", f"sigma ~ U(0.4, {high})", blurred, paper=paper))
    everywhere = {"conditioning_augmentation": "blur", "blur_sigma_range": [0.4, 0.6], "blur_probability": 1.0}
    rows += [
        Row("further settings", "U(0.4, 0.6) on all examples", arm(everywhere)),
        Row("further settings", "the same, and 0.5 at inference", arm(everywhere, blur_sigma=0.5)),
    ]
    for level in noise_levels:
        options = {**sampling, "augmentation_levels": {**sampling.get("augmentation_levels", {}), last: level}}
        noised = arm({"conditioning_augmentation": "gaussian"}, sampling=options)
        rows.append(Row("Gaussian noise instead", f"s = {level}", noised))
    return Experiment("Table 4a: Gaussian blur in the conditioning", tuple(rows), entries=("noise_levels",))


def plain_training(batch_size: int) -> dict[str, Any]:
    """Options of Table 4b's baseline: no classes, a small batch, no flips."""
    return {"unconditional": True, "train_batch_size": batch_size, "random_flip": False}


def table4b(before: list[str], super_res: str, batch_sizes: tuple[PositiveInt, PositiveInt], **sampling) -> Experiment:
    """Class conditioning, large batches and flips for the super-resolution stage, added one by one."""
    small, large = batch_sizes
    plain = plain_training(small)
    with_classes = {**plain, "unconditional": False}
    large_batch = {**with_classes, "train_batch_size": large}
    steps = (
        ("baseline", plain, ("6.18", "5.57", "142.71 ± 2.83")),
        ("+ class conditioning", with_classes, ("5.75", "5.27", "152.17 ± 2.29")),
        ("+ large batch training", large_batch, ("5.00", "4.71", "157.84 ± 2.60")),
        ("+ flip LR", {**large_batch, "random_flip": True}, ("4.88", "4.63", "158.71 ± 2.26")),
    )
    earlier = tuple(StageRecipe(name) for name in before)
    rows = (
        Row("", label, Arm((*earlier, StageRecipe(super_res, options)), sampling), paper=paper)
        for label, options, paper in steps
    )
    return Experiment("Table 4b: further improvements on super-resolution", tuple(rows))


def figure10(
    before: list[str],
    super_res: str,
    num_inference_steps: dict[str, PositiveInt],
    steps: list[PositiveInt] = (4, 8, 16, 25, 50, 100, 1000),
    end_points: dict[str, tuple[float, float]] | None = None,
    **sampling,
) -> Experiment:
    """
    Quality over the last stage's inference steps.

    Args:
        end_points: by the number of steps, beta_start and beta_end of the last stage's linear inference schedule; for
            the others its own.

    Raises:
        ValueError: there are end points of other numbers of steps.
    """
    if unknown := sorted((end_points or {}).keys() - set(map(str, steps))):
        raise ValueError(f"`end_points` has {unknown}; they must be among `steps`, {list(steps)}.")
    stages = tuple(StageRecipe(name) for name in (*before, super_res))
    last = f"super_res_{len(before)}"
    rows, low_res_sampling = [], {**sampling, "num_inference_steps": num_inference_steps}
    for number in steps:
        options = {**sampling, "num_inference_steps": {**num_inference_steps, last: number}}
        if ends := (end_points or {}).get(str(number)):
            options["inference_schedules"] = {**sampling.get("inference_schedules", {}), last: ends}
        arm = Arm(stages, options, low_res_sampling=low_res_sampling)
        rows.append(Row("", f"{number} steps", arm, number))
    title = "Figure 10: quality over inference steps of super-resolution"
    return Experiment(title, tuple(rows), "inference steps", log_x=True, entries=("steps", "end_points"))


# ------------------------------------------------------------------------------------------------------------------
# Section 4.5
# ------------------------------------------------------------------------------------------------------------------

UNCONDITIONAL = {
    0: ("2.30", "40.68", "3.29", "42.21"),
    251: ("2.06", "40.47", "2.97", "42.14"),
    501: ("2.08", "40.44", "2.93", "42.17"),
    751: ("2.14", "40.45", "2.89", "42.20"),
    1001: ("2.18", "40.53", "2.86", "42.26"),
    1251: ("2.24", "40.58", "2.83", "42.28"),
    1501: ("2.28", "40.58", "2.84", "42.31"),
}


def table5(base: str, super_res: str, levels: list[NonNegativeInt] = (0, *PAPER_LEVELS), **sampling) -> Experiment:
    """Quality over s without labels, non-truncated."""
    stages = tuple(StageRecipe(name, {"unconditional": True}) for name in (base, super_res))
    rows = []
    for level in levels:
        arm = Arm(stages, {**sampling, "augmentation_levels": {"super_res_1": level}})
        rows.append(Row("", f"s = {level}", arm, level, UNCONDITIONAL.get(level, ())))
    columns = tuple(f"{name}, FID vs {split}" for name in ("Bedroom", "Church") for split in ("train", "validation"))
    title, axis = "Table 5: without labels", "truncation time s"
    return Experiment(title, tuple(rows), axis, paper_columns=columns, entries=("levels",))


# ------------------------------------------------------------------------------------------------------------------
# Section 4.1
# ------------------------------------------------------------------------------------------------------------------

MAIN_RESULTS = {
    "32x32": ("1.11", "1.99", "26.01 ± 0.59"),
    "64x64": ("1.48", "2.48", "67.95 ± 1.97"),
    "128x128": ("3.52", "3.76", "128.80 ± 2.51"),
    "256x256": ("4.88", "4.63", "158.71 ± 2.26"),
}
ACCURACIES = {
    "128x128": {"samples": ("59.84%", "81.79%"), "real": ("68.82%", "88.79%")},
    "256x256": {"samples": ("63.02%", "84.06%"), "real": ("73.09%", "91.47%")},
}
PAPER_SIZES = ("32x32", "64x64", "256x256")  # of the stages of its cascade


def table1(
    stages: list[str],
    instead_of_last: str | None = None,
    truncated_levels: dict[str, NonNegativeInt] | None = None,
    **sampling,
) -> Experiment:
    """
    Quality of each stage's samples, and the classification accuracy score of the last one's.

    Args:
        instead_of_last: a stage of other images that takes the last one's place, with a row of its own before it
            (128x128).
        truncated_levels: s of stages whose own row is sampled truncated; the rows after it are not.

    Raises:
        ValueError: there are levels of something other than super-resolution stages, or options of no stage.
    """
    truncated_levels = truncated_levels or {}
    check_names({"truncated_levels": truncated_levels}, stage_names(len(stages))[1:])
    check_names(sampling, stage_names(len(stages)))
    sizes = itertools.zip_longest(range(1, len(stages) + 1), PAPER_SIZES[: len(stages)])
    cascades = [(stages[:count], size) for count, size in sizes]
    if instead_of_last is not None:
        cascades.insert(-1, ([*stages[:-1], instead_of_last], "128x128" if len(stages) == len(PAPER_SIZES) else None))
    rows = []
    for cascade, size in cascades:
        names = stage_names(len(cascade))
        options = restricted(sampling, names)
        if (level := truncated_levels.get(names[-1])) is not None:
            levels = {**options.get("augmentation_levels", {}), names[-1]: level}
            options |= {"augmentation_levels": levels, "truncated": True}
        arm = Arm(tuple(map(StageRecipe, cascade)), options)
        label = f"{names[-1]} (paper: {size})" if size else names[-1]
        accuracies = ACCURACIES.get(size, {}) if len(cascade) == len(stages) else None
        rows.append(Row("", label, arm, paper=MAIN_RESULTS.get(size, ()), paper_accuracies=accuracies))
    return Experiment("Table 1: main results", tuple(rows), classification=True)


def figure7(stages: list[str], **sampling) -> Experiment:
    """Accuracy class by class of a classifier trained on samples, beside one trained on real images."""
    whole = table1(stages, **sampling)
    return replace(whole, title="Figure 7: classification accuracy score by class", rows=whole.rows[-1:])


# ------------------------------------------------------------------------------------------------------------------
# Section 3: conditioning augmentation where there is an error to repair, and where there is none
# ------------------------------------------------------------------------------------------------------------------

GOOD, WEAK, FEW_STEPS = "good base", "weak base", "few-step base"
TRAIN, VALIDATION = "ground truth training data", "ground truth validation data"
SOLVER_CHECK = "solver check"
NUM_CHECKED_IMAGES = 500
SWEPT_LEVELS = (0, 100, 250, 500, 1000, 1500, 2000, 2500, 3200)


def control_heading(noise: float) -> str:
    """Of the rows of the positive control with noise of this deviation."""
    return f"positive control: noise {noise:g}"


def check_heading(checked: str) -> str:
    """Of the rows that check the solver on those of the heading `checked`."""
    return f"{SOLVER_CHECK}: {checked}"


def augmentation(
    good: list[str],
    weak: list[str],
    super_res: list[str],
    num_inference_steps: dict[str, PositiveInt],
    weak_num_inference_steps: dict[str, PositiveInt] | None = None,
    few_steps: PositiveInt = 5,
    levels: list[NonNegativeInt] = SWEPT_LEVELS,
    control_levels: list[NonNegativeInt] = (0, 250, 1000, 2000, 3200),
    validation_levels: list[NonNegativeInt] = (0, 1000, 2500),
    control_noises: list[NonNegativeFloat] = (0.05, 0.1, 0.2, 0.3, 0.4),
    check_steps: PositiveInt | None = None,
    gate: NonNegativeFloat = 1.3,
    margin: NonNegativeFloat = 0.03,
    **sampling,
) -> Experiment:
    """
    Quality over s on samples of a good and of a weak base and on real images, with several trainings of the
    super-resolution stage (docs/results.md, "Design").

    Args:
        good, weak: stages up to the last one's input.
        super_res: trainings of the last stage.
        weak_num_inference_steps: where the weak stages take other steps than `num_inference_steps`.
        few_steps: of the good base as a second weak one.
        control_levels: of the positive control and of the few-step base.
        control_noises: deviations of the noise on real images, in [-1, 1], one of which the positive control repairs.
        check_steps: ancestral steps that check the solver.

    Raises:
        ValueError: there are fewer than three levels, or other ones for the control; no trainings, or one twice; no
            noise; or bases of other numbers of stages.
    """
    _check_sweep(good, weak, super_res, levels, control_levels, control_noises)
    levels, control_levels, control_noises = (sorted(set(axis)) for axis in (levels, control_levels, control_noises))
    last = f"super_res_{len(good)}"
    weak_steps = {**num_inference_steps, **(weak_num_inference_steps or {})}
    real = {"ground_truth": "train", "balanced": True}

    def rows(
        heading: str, before: list[str], levels: Sequence[int], steps=num_inference_steps, trainings=super_res, **arm
    ) -> Iterator[Row]:
        how = {**sampling, "num_inference_steps": steps, **arm.pop("sampling", {})}
        for level, name in itertools.product(levels, trainings):
            stages = tuple(StageRecipe(stage) for stage in (*before, name))
            options = {**how, "augmentation_levels": {last: level}}
            yield Row(heading, f"s = {level}", Arm(stages, options, **arm), level)

    def checks(checked: str, before: list[str], steps: dict[str, int], **arm) -> Iterator[Row]:
        """Few images of the first training, by the other solver."""
        scheduler = {**_per_stage(sampling.get("scheduler"), len(good)), last: "ancestral"}
        arm |= {"num_images": NUM_CHECKED_IMAGES, "sampling": {"scheduler": scheduler}}
        ends = levels[0], levels[len(levels) // 2]
        for row in rows(check_heading(checked), before, ends, {**steps, last: check_steps}, super_res[:1], **arm):
            yield replace(row, label=f"{row.label}, {check_steps} ancestral steps", x=None)

    table = [*rows(GOOD, good, levels), *rows(WEAK, weak, levels, weak_steps)]
    table += rows(FEW_STEPS, good, control_levels, {**num_inference_steps, "base": few_steps})
    table += rows(TRAIN, good, levels, **real)
    table += rows(VALIDATION, good, sorted(set(validation_levels)), **real | {"ground_truth": "validation"})
    for noise in control_noises:
        table += rows(control_heading(noise), good, control_levels, **real, noise=noise)
    if check_steps is not None:
        table += [*checks(WEAK, weak, weak_steps), *checks(TRAIN, good, num_inference_steps, **real)]
    return AugmentationExperiment(
        "Conditioning augmentation where there is an error to repair",
        tuple(table),
        "s (augmentation level)",
        paper_columns=(),
        entries=("levels", "control_levels", "validation_levels", "check_steps"),
        gate=gate,
        margin=margin,
        levels=tuple(levels),
        control_levels=tuple(control_levels),
        control_noises=tuple(control_noises),
    )


def _check_sweep(good, weak, super_res, levels, control_levels, control_noises) -> None:
    if len(good) != len(weak) or not super_res or not control_noises:
        raise ValueError(
            f"`good` is {good}, `weak` {weak}, `super_res` {super_res} and `control_noises` {list(control_noises)}; "
            "there must be as many good stages as weak ones, a training and a noise."
        )
    if len(set(super_res)) < len(super_res):
        raise ValueError(f"`super_res` is {super_res}; it must be different trainings, each of them once.")
    if len(set(control_levels)) < 3 or not set(control_levels) <= set(levels) or min(control_levels) != min(levels):
        raise ValueError(
            f"`control_levels` are {list(control_levels)}; they must be three of `levels`, {list(levels)}, or more, "
            "among them the smallest."
        )


def _per_stage(value: Any, count: int) -> dict[str, Any]:
    """A value for all stages before the last, or for some of them, by stage."""
    return dict(value or {}) if isinstance(value, dict | None) else dict.fromkeys(stage_names(count), value)


EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    function.__name__: function
    for function in (
        table1, table2a, table2b, table3a, table3b, table4a, table4b, table5, figure7, figure9, figure10, augmentation
    )
}  # fmt: skip
