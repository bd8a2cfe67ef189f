"""
Conditioning augmentation where there is an error to repair, and where there is none: quality over s on samples of a
good and of a weak base, beside real images, by rows whose images are paired. The design is in docs/results.md.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..data.averages import AreaAverages
from ..data.image_sets import load_image_set
from ..data.memory import ImageSubset
from ..evaluation.features import load_extractor
from ..evaluation.intervals import normal_interval
from ..evaluation.metrics import FeatureStatistics, frechet_standard_error
from ..evaluation.paired import (
    PairedDistances,
    difference_in_differences,
    extrapolated,
    halves,
    over_trainings,
)
from ..evaluation.references import reference_features, reference_statistics
from .experiments import CONTROL, GOOD, SOLVER_CHECK, TRAIN, WEAK, AugmentationExperiment, Row


if TYPE_CHECKING:
    from .reproduce import Study

NUM_REPLICATES = 1000
BENEFIT, REFUTED, NONE, WORSE, UNDECIDED, VOID = "benefit", "refuted", "none", "worse", "undecided", "void"
PREDICTIONS = {WEAK: BENEFIT, GOOD: NONE, CONTROL: BENEFIT}


def measure_augmentation(study: "Study", experiment: AugmentationExperiment) -> dict[str, Any]:
    """
    "rows", "gate", "comparisons" and "solver_check" of a report. The gate's rows come first.

    Raises:
        ValueError: the weak base is not weak enough, or there is more than one sampling seed.
    """
    sweep = Sweep(study, experiment)
    gate = check_gate(*(sweep.distances(heading, sweep.levels[0]) for heading in (WEAK, TRAIN)), experiment.gate)
    rows = sweep.rows()
    report = {"rows": rows, "gate": {**gate, "level": sweep.levels[0]}}
    report["gate"]["good"] = statistics.fmean(sweep.distances(GOOD, sweep.levels[0]))
    report["comparisons"] = compare_inputs(sweep.features_by_level(), sweep.references["train"], experiment.margin)
    check = next((row for row in experiment.rows if row.heading == SOLVER_CHECK), None)
    if check is not None:
        level = check.arm.sampling["augmentation_levels"][sweep.last]
        pairs = zip(sweep.features(WEAK, level), sweep.features(SOLVER_CHECK, level), strict=True)
        report["solver_check"] = {"label": check.label, **ratio_of(list(pairs), sweep.references["train"])}
    return report


class Sweep:
    """The rows of an experiment: their samples, features and distances."""

    def __init__(self, study: "Study", experiment: AugmentationExperiment):
        seeds = study.settings.sampling.seeds
        if len(seeds) != 1:
            raise ValueError(
                f"`sampling.seeds` is {seeds}; it must be one seed here, where images and not seeds are paired: give "
                "more `num_images`."
            )
        self.study, self.seed = study, seeds[0]
        self.last = f"super_res_{len(experiment.rows[0].arm.stages) - 1}"
        self.groups: dict[tuple[str, int], list[Row]] = {}  # rows that differ in the training only
        for row in experiment.rows:
            key = row.heading, row.arm.sampling["augmentation_levels"][self.last]
            self.groups.setdefault(key, []).append(row)
        self.levels = sorted({level for _, level in self.groups})
        self.cache: dict[tuple[str, int], list[tuple[str, str, torch.Tensor]]] = {}
        evaluation, device = study.settings.evaluation, study.state.device
        self.options = {"batch_size": evaluation.batch_size or 100, "device": device}
        with study.state.main_process_first():  # it may download
            self.extractor = load_extractor(evaluation.extractor, device)
        real = self.real_images(experiment.rows[0])
        self.references = {
            split: reference_statistics(images, self.extractor, evaluation.cache_dir, **self.options)
            for split, images in real.items()
        }
        self.real_figures = {
            split: self.figure(self.drawn(real[other], evaluation.cache_dir), self.references[split])
            for split, other in itertools.permutations(real)
        }

    def real_images(self, row: Row) -> dict[str, Dataset]:
        """Of both splits, at the size of the row's samples."""
        cascade = self.study.stages.cascade(row.arm.stages, self.study.training_seeds(row.arm)[0])
        size, images = cascade.stages[-1].unet.config.sample_size, self.study.real_images()
        return {
            split: dataset if dataset[0]["image"].shape[-1] == size else AreaAverages(dataset, size)
            for split, dataset in images.items()
        }

    def drawn(self, images: Dataset, cache_dir: str) -> torch.Tensor:
        """Features of as many real images as there are samples in a row, or of all, if fewer."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        part = ImageSubset(images, order[: self.study.settings.sampling.num_images].tolist())
        return reference_features(part, self.extractor, cache_dir, **self.options)[0]

    def runs(self, heading: str, level: int) -> list[tuple[str, str, torch.Tensor]]:
        """For each training its name, the folder of its samples, made if not there, and their features (N, D)."""
        key = heading, level
        if key not in self.cache:
            self.cache[key] = []
            for row in self.groups[key]:
                for training_seed in self.study.training_seeds(row.arm):
                    samples = self.study.samples.of(row.arm, training_seed, self.seed)
                    folder = self.study.samples.output_dir / "features"
                    features, _ = reference_features(load_image_set(samples), self.extractor, folder, **self.options)
                    name = row.arm.stages[-1].name
                    name = name if training_seed is None else f"{name}, seed {training_seed}"
                    self.cache[key].append((name, samples.name, features))
        return self.cache[key]

    def features(self, heading: str, level: int) -> list[torch.Tensor]:
        """(N, D) of each training."""
        return [features for *_, features in self.runs(heading, level)]

    def distances(self, heading: str, level: int) -> list[float]:
        """From the training images, of each training."""
        return [extrapolated(features, self.references["train"]) for features in self.features(heading, level)]

    def features_by_level(self) -> dict[str, dict[int, list[torch.Tensor]]]:
        """Of the compared inputs and of the real training images, by heading and s, for each training."""
        return {
            heading: {level: self.features(heading, level) for level in self.levels}
            for heading in (WEAK, GOOD, CONTROL, TRAIN)
        }

    def rows(self) -> list[dict[str, Any]]:
        """As the reports of `reproduce` have them, with distances that are extrapolated."""
        rows = []
        for (heading, level), (row, *_) in self.groups.items():
            runs = []
            for name, samples, features in self.runs(heading, level):
                figures = {
                    split: {"frechet_distance": {**self.figure(features, reference), "real": self.real_figures[split]}}
                    for split, reference in self.references.items()
                }
                distance = f"{self.extractor.distance_name}, extrapolated,"
                seeds = {"training_seed": name, "sampling_seed": self.seed}
                runs.append(
                    {**seeds, "samples": samples, "extractor": self.extractor.name, "distance": distance}
                    | {"figures": figures}
                )
            rows.append({"heading": heading, "label": row.label, "x": row.x, "paper": [], "runs": runs})
        return rows

    def figure(self, features: torch.Tensor, reference: FeatureStatistics) -> dict[str, Any]:
        """A distance with its interval over the draw of the images."""
        value = extrapolated(features, reference)
        interval = normal_interval(value, frechet_standard_error(reference, features))
        return {"value": value, "interval": interval, "num_images": len(features)}


# ------------------------------------------------------------------------------------------------------------------
# What the features say
# ------------------------------------------------------------------------------------------------------------------


def check_gate(weak: Sequence[float], ground_truth: Sequence[float], needed: float) -> dict[str, float]:
    """
    Args:
        weak, ground_truth: distances at the smallest s, of each training.
        needed: how many times the ground truth's mean the weak base's must be.

    Raises:
        ValueError: it is less: there is no error that augmentation could repair.
    """
    weak, ground_truth = statistics.fmean(weak), statistics.fmean(ground_truth)
    ratio = weak / ground_truth if ground_truth > 0 else math.inf
    if weak < needed * ground_truth:
        raise ValueError(
            f"The weak base's distance at the smallest s is {weak:.4g}, {ratio:.3g} times that on real training "
            f"images ({ground_truth:.4g}); it must be at least {needed:g} times, for an error that augmentation could "
            "repair: take a weaker base, or train the last stage longer."
        )
    return {"weak": weak, "ground_truth": ground_truth, "ratio": ratio, "needed": needed}


def compare_inputs(
    features: dict[str, dict[int, list[torch.Tensor]]], reference: FeatureStatistics, margin: float
) -> list[dict[str, Any]]:
    """
    What augmentation does on the samples of both bases and in the positive control; without the effect in the control
    the other verdicts are "void".

    Args:
        features: (N, D) of each training, by heading and s.
        reference: the training images.
        margin: a share of the distance at the smallest s.
    """
    compared = [
        {"input": heading, "prediction": prediction, **compare(features[heading], features[TRAIN], reference, margin)}
        for heading, prediction in PREDICTIONS.items()
    ]
    control = next(one for one in compared if one["input"] == CONTROL)
    for one in compared:
        for key in ("verdict", "verdict_of_these_trainings"):
            if one is not control and control[key] != BENEFIT:
                one[key] = VOID
            elif one["input"] == WEAK and one[key] == NONE:
                one[key] = REFUTED
    return compared


def compare(
    generated: dict[int, list[torch.Tensor]],
    truth: dict[int, list[torch.Tensor]],
    reference: FeatureStatistics,
    margin: float,
) -> dict[str, Any]:
    """
    The best s, chosen on the first half of the images, against the smallest, on the second half.

    Args:
        generated, truth: features (N, D) of each training by s, of one input and of real training images.
    """
    first, *levels = sorted(generated)
    chosen_by = {level: [extrapolated(half, reference) for half in halves(generated[level])[0]] for level in levels}
    best = min(levels, key=lambda level: statistics.fmean(chosen_by[level]))
    trainings = zip(generated[best], generated[first], truth[best], truth[first], strict=True)
    rows = halves([features for training in trainings for features in training])[1]
    distances = PairedDistances.between(rows, reference, NUM_REPLICATES)

    def of_trainings(d: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return d.unflatten(-1, (-1, 4)).unbind(-1)

    def beyond(d: torch.Tensor) -> torch.Tensor:
        return difference_in_differences(*of_trainings(d))

    def change(d: torch.Tensor) -> torch.Tensor:
        return of_trainings(d)[0] - of_trainings(d)[1]

    figures = {
        "beyond_ground_truth": over_images_and_trainings(distances, beyond),
        "change": over_images_and_trainings(distances, change),
    }
    distance = of_trainings(distances.values)[1].mean().item()
    words = {
        word: verdict_of(*(figure[interval] for figure in figures.values()), margin * distance)
        for word, interval in (("verdict", "interval"), ("verdict_of_these_trainings", "interval_over_images"))
    }
    return {"level": best, "distance": distance, **figures, **words}


def over_images_and_trainings(
    distances: PairedDistances, statistic: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """
    The mean over trainings with its interval over the draw of the images, what the trainings say by themselves, and
    the interval that holds both that and Student's over trainings.

    Args:
        statistic: takes distances (..., R) and returns a value for each training (..., K).
    """
    estimate = distances.estimate(lambda d: statistic(d).mean(-1))
    of_trainings = over_trainings(statistic(distances.values).tolist())
    intervals = [estimate.interval, *([of_trainings["interval"]] if of_trainings else [])]
    lows, highs = zip(*intervals, strict=True)
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "interval": [min(lows), max(highs)],
        "interval_over_images": estimate.interval,
        "over_trainings": of_trainings,
    }


def verdict_of(beyond: Sequence[float], change: Sequence[float], margin: float) -> str:
    """
    Args:
        beyond: interval of what s changes beyond its change on real images.
        change: interval of what it changes.
        margin: an effect smaller than it, in the units of the distance, is none.
    """
    low, high = beyond
    if -margin <= low and high <= margin:
        return NONE
    if high < 0 and change[1] < 0:
        return BENEFIT
    return WORSE if low > 0 else UNDECIDED


def ratio_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], reference: FeatureStatistics) -> dict[str, Any]:
    """Of the distances of features (N, D) in each pair, the mean over pairs, with its interval over images."""
    rows = [features for pair in pairs for features in pair]
    distances = PairedDistances.between(rows, reference, NUM_REPLICATES)
    return dataclasses.asdict(distances.estimate(lambda d: (d[..., ::2] / d[..., 1::2]).mean(-1)))
