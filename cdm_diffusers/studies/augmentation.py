"""
Conditioning augmentation where there is an error to repair, and where there is none: quality over s on samples of
good and of weak bases, beside real images, by rows whose images are paired. The design is in docs/results.md; what the
features say is in `verdicts.py`.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from torch.utils.data import Dataset

from ..data.averages import averaged_to
from ..data.image_sets import load_image_set
from ..data.memory import ImageSubset
from ..evaluation.features import load_extractor, reference_features, reference_statistics
from ..evaluation.intervals import normal_interval
from ..evaluation.metrics import FeatureStatistics, frechet_standard_error
from ..evaluation.paired import extrapolated
from ..evaluation.records import digest
from ..evaluation.sample_store import LowResImages, drawn_images
from ..processes import from_main
from .experiments import (
    GOOD,
    SOLVER_CHECK,
    TRAIN,
    WEAK,
    Arm,
    AugmentationExperiment,
    Row,
    control_heading,
)
from .verdicts import BENEFIT, PREDICTIONS, Verdicts, check_gate, choose_noise, conclude, noise_ratios


if TYPE_CHECKING:
    from .reproduce import Study

logger = logging.get_logger(__name__)
IMAGES_PER_FEATURE = 2  # for extrapolated distances, in each half of the images
IGNORED_OPTIONS = ("num_images", "num_reference_images", "seed", "train_statistics", "eval_statistics")


def measure_augmentation(study: "Study", experiment: AugmentationExperiment) -> dict[str, Any]:
    """
    "rows" and conclusions of a report. The rows of the gate come first, then those of the positive control. What is
    decided is computed by the main process, for all.

    Raises:
        ValueError: the weak base is not weak enough, or the settings are not those of paired rows.
    """
    sweep, first = Sweep(study, experiment), experiment.levels[0]
    sweep.sample((WEAK, TRAIN), [first])
    verdicts = Verdicts(sweep.features, sweep.references["train"], sweep.labels, experiment.margin)
    gate = from_main(lambda: check_gate(*(verdicts.values(name, first) for name in (WEAK, TRAIN)), experiment.gate))
    control = sweep_control(sweep, verdicts, experiment, gate["ratio"])
    sweep.sample(heading for heading in sweep.groups if heading not in map(control_heading, experiment.control_noises))
    inputs = {heading: sweep.input_of(heading).relative_to(study.samples.output_dir) for heading in (GOOD, WEAK)}

    def conclusions() -> dict[str, Any]:
        ratios = {name: verdicts.ratio(name) for name in PREDICTIONS}
        check = verdicts.solver_check() if any(name.startswith(SOLVER_CHECK) for name in sweep.groups) else None
        compared = [verdicts.judge(name, prediction) for name, prediction in PREDICTIONS.items()]
        return {
            "rows": sweep.rows(),
            "inputs": {heading: folder.as_posix() for heading, folder in inputs.items()},
            "gate": {**gate, "level": first, "ratios": ratios},
            "control": {name: value for name, value in control.items() if name != "comparison"},
            "comparisons": conclude(compared, control["comparison"], check),
            "interaction": verdicts.interaction(),
            "first_step": verdicts.first_step(),
            **({} if check is None else {"solver_check": check}),
        }

    return from_main(conclusions)


def sweep_control(
    sweep: "Sweep", verdicts: Verdicts, experiment: AugmentationExperiment, ratio: float
) -> dict[str, Any]:
    """
    The positive control: "noise", that of the row that is swept, "ratios" of all of them, what is stored of them, and
    the "comparison".

    Args:
        ratio: of the weak base's distance to that on real images.
    """
    headings = {control_heading(noise): noise for noise in experiment.control_noises}
    sweep.sample(headings, experiment.levels[:1])
    ratios = from_main(lambda: noise_ratios(verdicts, experiment.control_noises))
    noise = choose_noise(ratios, ratio)
    sweep.sample((control_heading(noise), TRAIN), experiment.control_levels)
    comparison = from_main(lambda: verdicts.judge(control_heading(noise), BENEFIT))
    if comparison["verdict"] != BENEFIT:
        logger.warning(
            f"Void: the positive control's verdict is {comparison['verdict']!r}; it must be {BENEFIT!r} for any "
            "verdict on a base. Stop the run, or let it go on for the figures."
        )
    noises = [{"noise": one, "ratio": ratios[one], **sweep.stored_noise(heading)} for heading, one in headings.items()]
    return {"noise": noise, "noises": noises, "comparison": comparison}


def check_settings(study: "Study") -> None:
    """
    Raises:
        ValueError: there is more than one sampling seed, or an option of the evaluation has no effect.
    """
    seeds, evaluation = study.settings.sampling.seeds, study.settings.evaluation.given
    if len(seeds) != 1:
        raise ValueError(
            f"`sampling.seeds` is {seeds}; it must be one seed here, where images and not seeds are paired: give more "
            "`num_images`."
        )
    if ignored := [name for name in IGNORED_OPTIONS if evaluation.get(name) is not None]:
        raise ValueError(
            f"`evaluation` has {ignored}; they must be left out here, where all samples are compared with all real "
            "images."
        )


class Sweep:
    """The rows of an experiment: their samples, features and distances."""

    def __init__(self, study: "Study", experiment: AugmentationExperiment):
        self.study, self.seed = study, study.settings.sampling.seeds[0]
        self.last = experiment.rows[0].arm.names[-1]
        self.groups: dict[str, dict[int, list[Row]]] = {}  # rows that differ in the training only, by heading and s
        for row in experiment.rows:
            level = row.arm.sampling["augmentation_levels"][self.last]
            self.groups.setdefault(row.heading, {}).setdefault(level, []).append(row)
        self.check_trainings(self.groups[WEAK][experiment.levels[0]])
        self.features: dict[str, dict[int, list[torch.Tensor]]] = {}  # of what is sampled so far
        self.names: dict[tuple[str, int], list[tuple[str, str]]] = {}  # of trainings and of folders of samples
        self.labels: torch.Tensor | None = None
        self.measure_real_images(experiment.rows[0])
        self.check_count()

    def check_trainings(self, rows: list[Row]) -> None:
        """
        Raises:
            ValueError: two are the same.
        """
        found: dict[str, str] = {}
        for row in rows:
            recipe = row.arm.stages[-1]
            for seed in self.study.training_seeds(row.arm):
                name, key = training_name(row, seed), digest(self.study.stages.key(recipe, seed))
                if key in found:
                    raise ValueError(
                        f"The trainings {found[key]!r} and {name!r} of the last stage are the same; they must be "
                        "different ones: train with other seeds."
                    )
                found[key] = name

    def measure_real_images(self, row: Row) -> None:
        """Both splits as references, and what real images reach, at the size of the row's samples."""
        evaluation, device = self.study.settings.evaluation, self.study.state.device
        self.options = {"batch_size": evaluation.batch_size or 100, "device": device}
        with self.study.state.main_process_first():  # it may download
            self.extractor = load_extractor(evaluation.extractor, device)
        real = self.real_images(row)
        self.references = {
            split: reference_statistics(images, self.extractor, evaluation.cache_dir, **self.options)
            for split, images in real.items()
        }
        self.drawn = {split: self.draw(images, evaluation.cache_dir) for split, images in real.items()}

    def check_count(self) -> None:
        """
        Raises:
            ValueError: there are too few images for extrapolated distances of half of them.
        """
        count, width = self.study.settings.sampling.num_images, len(self.references["train"].mean)
        needed = 2 * IMAGES_PER_FEATURE * width
        if count // 2 < IMAGES_PER_FEATURE * width:
            raise ValueError(
                f"`num_images` is {count}; it must be at least {needed}, so that either half of the images is "
                f"{IMAGES_PER_FEATURE} times the {width} features."
            )

    def real_images(self, row: Row) -> dict[str, Dataset]:
        """Of both splits, at the size of the row's samples."""
        cascade = self.study.stages.cascade(row.arm.stages, self.study.training_seeds(row.arm)[0])
        return averaged_to(self.study.real_images(), cascade.stages[-1].unet.config.sample_size)

    def draw(self, images: Dataset, cache_dir: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features and labels of as many real images as there are samples in a row, or of all, if fewer."""
        order = drawn_images(images, 0, balanced=True)
        part = ImageSubset(images, order[: self.study.settings.sampling.num_images].tolist())
        return reference_features(part, self.extractor, cache_dir, **self.options)[0], part.labels

    def sample(self, headings: Iterable[str], levels: Iterable[int] | None = None) -> None:
        """Makes what is not there yet of these rows, and puts its features (N, D) into `features`."""
        for heading in headings:
            for level in sorted(self.groups[heading] if levels is None else levels):
                if (heading, level) not in self.names:
                    names, features = zip(*map(self.run, *self.runs_of(heading, level)), strict=True)
                    self.names[heading, level] = list(names)
                    self.features.setdefault(heading, {})[level] = list(features)

    def runs_of(self, heading: str, level: int) -> tuple[list[Row], list[int | None]]:
        """Rows and seeds of the trainings."""
        runs = [(row, seed) for row in self.groups[heading][level] for seed in self.study.training_seeds(row.arm)]
        return tuple(map(list, zip(*runs, strict=True)))

    def run(self, row: Row, training_seed: int | None) -> tuple[tuple[str, str], torch.Tensor]:
        """
        Names of the training and of the folder of its samples, made if not there, and their features (N, D).

        Raises:
            ValueError: the images have other labels than those of other rows.
        """
        folder = self.study.samples.of(row.arm, training_seed, self.seed)
        images, cache_dir = load_image_set(folder), self.study.samples.output_dir / "features"
        if not self.names:
            self.labels = images.labels
        labels = None if self.labels is None else self.labels[: len(images)]
        if labels is not None and (images.labels is None or not torch.equal(images.labels, labels)):
            raise ValueError(
                f"The images of {row.heading!r}, {row.label}, have other labels than those of {WEAK!r}; they must be "
                "the same: give data with the cascade's classes."
            )
        features, _ = reference_features(images, self.extractor, cache_dir, **self.options)
        return (training_name(row, training_seed), folder.name), features

    def arm_of(self, heading: str) -> Arm:
        """Of one of its rows."""
        return next(rows[0].arm for rows in self.groups[heading].values())

    def input_of(self, heading: str) -> Path:
        """The folder of what the last stage takes in these rows, made if not there."""
        arm = self.arm_of(heading)
        return self.study.samples.low_res(arm, self.study.training_seeds(arm)[0], self.seed)

    def stored_noise(self, heading: str) -> dict[str, float]:
        """What is left of a control's noise, of images in [-1, 1], where values are cut off."""
        arm = self.arm_of(heading)
        stage = arm.names[-2]
        clean = LowResImages(self.study.samples.ground_truth(arm, stage), stage)
        noise = 2 * (LowResImages(self.input_of(heading), stage).images.astype(float) - clean.images)
        return {"deviation": float(noise.std()), "shift": float(noise.mean())}

    def rows(self) -> list[dict[str, Any]]:
        """As the reports of `reproduce` have them, with distances that are extrapolated; those that were sampled."""
        order = [(heading, level) for heading, levels in self.groups.items() for level in levels]
        real_figures = self.real_figures()
        return [self.row(*key, real_figures) for key in order if key in self.names]

    def real_figures(self) -> dict[str, dict[str, Any]]:
        """What real images of the other split reach."""
        return {
            split: self.figure(*self.drawn[other], self.references[split])
            for split, other in itertools.permutations(self.drawn)
        }

    def row(self, heading: str, level: int, real_figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """One of `rows`."""
        runs, row = [], self.groups[heading][level][0]
        for (name, samples), features in zip(self.names[heading, level], self.features[heading][level], strict=True):
            labels = None if self.labels is None else self.labels[: len(features)]
            figures = {
                split: {"frechet_distance": {**self.figure(features, labels, reference), "real": real_figures[split]}}
                for split, reference in self.references.items()
            }
            runs.append(
                {
                    "training_seed": name,
                    "sampling_seed": self.seed,
                    "samples": samples,
                    "extractor": self.extractor.name,
                    "distance": f"{self.extractor.distance_name}, extrapolated,",
                    "figures": figures,
                }
            )
        return {"heading": heading, "label": row.label, "x": row.x, "paper": [], "runs": runs}

    def figure(
        self, features: torch.Tensor, labels: torch.Tensor | None, reference: FeatureStatistics
    ) -> dict[str, Any]:
        """A distance with its interval over the draw of the images."""
        value = extrapolated(features, reference, labels=labels)
        interval = normal_interval(value, frechet_standard_error(reference, features))
        return {"value": value, "interval": interval, "num_images": len(features)}


def training_name(row: Row, seed: int | None) -> str:
    """The name of the training that made the row's last stage."""
    name = row.arm.stages[-1].name
    return name if seed is None else f"{name}, seed {seed}"
