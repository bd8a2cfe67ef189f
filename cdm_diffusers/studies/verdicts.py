"""
What the features of an augmentation experiment's rows say: its statistics, intervals and words, as docs/results.md
("Design") has them.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..evaluation.metrics import FeatureStatistics
from ..evaluation.paired import PairedDistances, difference_in_differences, extrapolated, halves, over_trainings
from .experiments import FEW_STEPS, GOOD, TRAIN, WEAK, check_heading, control_heading


NUM_REPLICATES = 1000
BENEFIT, NONE, REFUTED, WORSE, UNDECIDED = "benefit", "none", "refuted", "worse", "undecided"
ARTEFACT, VOID, VOID_SOLVER = "artefact", "void", "void (solver)"
PREDICTIONS = {WEAK: BENEFIT, FEW_STEPS: BENEFIT, GOOD: NONE}
WORDS = {"verdict": "interval", "verdict_of_these_trainings": "interval_over_images"}

Statistic = Callable[[torch.Tensor], torch.Tensor]


class Verdicts:
    """
    Args:
        features: (N, D) of each training, by heading and s; more may be put there later.
        reference: the training images.
        labels: int64 (N,) of all rows, whose numbers of images are set; None without labels.
        margin: a share of the distance at the baseline.
    """

    def __init__(
        self,
        features: dict[str, dict[int, list[torch.Tensor]]],
        reference: FeatureStatistics,
        labels: torch.Tensor | None,
        margin: float,
    ):
        self.features, self.reference, self.labels, self.margin = features, reference, labels, margin
        self.values, self.distances = functools.cache(self.values), functools.cache(self.distances)

    # Distances

    def of_half(self, rows: list[torch.Tensor], half: int | None) -> list[torch.Tensor]:
        """One half of the images, or all of them."""
        return rows if half is None else halves(rows)[half]

    def labels_of(self, half: int | None) -> torch.Tensor | None:
        """Of the images of one half, or of all."""
        return None if self.labels is None else self.of_half([self.labels], half)[0]

    def values(self, heading: str, level: int, half: int | None = None) -> list[float]:
        """Of each training."""
        rows = self.of_half(self.features[heading][level], half)
        return [extrapolated(row, self.reference, half or 0, self.labels_of(half)) for row in rows]

    def distances(self, heading: str, level: int, half: int | None = None) -> PairedDistances:
        """Those of each training (K,), with their replicates (B, K), which pair rows of one half."""
        rows, labels = self.of_half(self.features[heading][level], half), self.labels_of(half)
        return PairedDistances.between(rows, self.reference, NUM_REPLICATES, seed=half or 0, labels=labels)

    def ratio(self, heading: str) -> float:
        """The mean distance at the smallest s over that of real training images."""
        level = min(self.features[heading])
        of_heading, truth = (statistics.fmean(self.values(name, level)) for name in (heading, TRAIN))
        return of_heading / truth if truth > 0 else math.inf

    # What is chosen

    def choose(self, heading: str, baseline: int) -> list[list[int]]:
        """
        For either half of the images, for each training: the s above the baseline of the lowest distance, mean over
        the other trainings, on that half. A single training chooses by itself.
        """
        levels = [level for level in sorted(self.features[heading]) if level > baseline]

        def of_others(values: list[float], training: int) -> float:
            return statistics.fmean(values[:training] + values[training + 1 :] or values)

        chosen = []
        for half in (0, 1):
            values = {level: self.values(heading, level, half) for level in levels}
            trainings = range(len(values[levels[0]]))
            chosen.append([min(levels, key=lambda s: of_others(values[s], k)) for k in trainings])
        return chosen

    def crossed(self, heading: str, other: str, chosen: list[list[int]], baseline: int) -> PairedDistances:
        """
        Distances (2, K, 4), on each half by what the other half chose: those of an input at the chosen s and at the
        baseline, and of another input at the same.
        """

        def of_trainings(heading: str, levels: Sequence[int], half: int) -> tuple[torch.Tensor, torch.Tensor]:
            rows = [self.distances(heading, level, half) for level in levels]
            picked = [(row.values[k], row.replicates[:, k]) for k, row in enumerate(rows)]
            return tuple(torch.stack(part, dim=-1) for part in zip(*picked, strict=True))

        columns = []
        for half in (0, 1):
            at_best, at_baseline = chosen[1 - half], [baseline] * len(chosen[half])
            cells = [of_trainings(name, s, half) for name in (heading, other) for s in (at_best, at_baseline)]
            columns.append([torch.stack(part, dim=-1) for part in zip(*cells, strict=True)])
        return PairedDistances(*(torch.stack(part, dim=-3) for part in zip(*columns, strict=True)))

    # What is concluded

    def judge(self, heading: str, prediction: str) -> dict[str, Any]:
        """What s does to an input beyond what it does to real images, from each of the two smallest s."""
        baselines = [self.judge_from(heading, level) for level in sorted(self.features[heading])[:2]]
        words = {word: agreed(*(one[word] for one in baselines)) for word in WORDS}
        return {"input": heading, "prediction": prediction, **words, "baselines": baselines}

    def judge_from(self, heading: str, baseline: int) -> dict[str, Any]:
        """The same from one baseline."""
        chosen = self.choose(heading, baseline)
        distances = self.crossed(heading, TRAIN, chosen, baseline)
        figures = {
            name: over_images_and_trainings(distances, statistic)
            for name, statistic in (("beyond_ground_truth", beyond), ("change", change), ("ground_truth", of_other))
        }
        distance = distances.values[..., 1].mean().item()
        words = {
            word: verdict_of(*(figure[interval] for figure in figures.values()), self.margin * distance)
            for word, interval in WORDS.items()
        }
        return {
            "baseline": baseline,
            "chosen": chosen,
            "chosen_agree": len({s for half in chosen for s in half}) == 1,
            "distance": distance,
            **figures,
            "ratio_of_ratios": over_images_and_trainings(distances, log_beyond, is_log=True),
            **words,
        }

    def interaction(self) -> dict[str, Any]:
        """What s, chosen with the weak base, changes with it beyond what it changes with the good one."""
        first = min(self.features[WEAK])
        distances = self.crossed(WEAK, GOOD, self.choose(WEAK, first), first)
        return over_images_and_trainings(distances, beyond)

    def first_step(self) -> dict[str, Any]:
        """The distance on real training images at the second smallest s over that at the smallest."""
        levels = sorted(self.features[TRAIN])[:2]
        rows = [self.distances(TRAIN, level) for level in levels]
        distances = PairedDistances(
            *(torch.stack([getattr(row, name) for row in rows], dim=-1) for name in ("values", "replicates"))
        )
        ratio = over_images_and_trainings(distances, lambda d: d[..., 1].log() - d[..., 0].log(), is_log=True)
        return {"levels": levels, "ratio": ratio}

    def solver_check(self) -> dict[str, Any]:
        """The first training's rows by both solvers, on the images that there are by both."""
        by_check = {name: self.features[check_heading(name)] for name in (WEAK, TRAIN)}
        first, level = sorted(by_check[WEAK])
        order = [(WEAK, level), (WEAK, first), (TRAIN, level), (TRAIN, first)]
        checked = [by_check[name][s][0] for name, s in order]
        count = len(checked[0])
        rows = [self.features[name][s][0][:count] for name, s in order] + checked
        labels = None if self.labels is None else self.labels[:count]
        distances = PairedDistances.between(rows, self.reference, NUM_REPLICATES, labels=labels)

        def by_solver(statistic: Statistic, d: torch.Tensor) -> torch.Tensor:
            return statistic(d.unflatten(-1, (2, 1, 1, 4)).movedim(-4, 0))[..., 0]

        def of_solvers(statistic: Statistic) -> list[dict[str, Any]]:
            return [vars(distances.estimate(lambda d, k=k: by_solver(statistic, d)[k])) for k in (0, 1)]

        between = vars(distances.estimate(lambda d: -by_solver(beyond, d).diff(dim=0)[0]))
        margin = self.margin * distances.values[1].item()
        low, high = between["interval"]
        return {
            "levels": [first, level],
            "num_images": count,
            "change": of_solvers(change),
            "beyond_ground_truth": of_solvers(beyond),
            "difference": between,
            "margin": margin,
            "agree": low <= margin and high >= -margin,
        }


# ------------------------------------------------------------------------------------------------------------------
# Statistics of distances (..., 2, K, 4), the mean over halves (..., K)
# ------------------------------------------------------------------------------------------------------------------


def beyond(d: torch.Tensor) -> torch.Tensor:
    """What s changes beyond its change on the other input."""
    return difference_in_differences(*d.unbind(-1)).mean(-2)


def change(d: torch.Tensor) -> torch.Tensor:
    """What it changes."""
    return (d[..., 0] - d[..., 1]).mean(-2)


def of_other(d: torch.Tensor) -> torch.Tensor:
    """What it changes on the other input."""
    return (d[..., 2] - d[..., 3]).mean(-2)


def log_beyond(d: torch.Tensor) -> torch.Tensor:
    """[`beyond`] of the distances' logarithms."""
    return beyond(d.log())


def over_images_and_trainings(
    distances: PairedDistances, statistic: Statistic, is_log: bool = False
) -> dict[str, Any] | None:
    """
    The mean over trainings with its interval over the draw of the images, what the trainings say by themselves, and
    the interval that holds both that and Student's over trainings.

    Args:
        statistic: takes distances (..., R) and returns a value for each training (..., K).
        is_log: whether it is of their logarithms, and value and intervals are wanted of the ratio itself; None where
            a distance or a resample is not above 0, as that of few images may be.
    """
    if is_log and min(distances.values.min(), distances.replicates.min()) <= 0:
        return None
    estimate = distances.estimate(lambda d: statistic(d).mean(-1))
    of_trainings = over_trainings(statistic(distances.values).tolist())
    intervals = [estimate.interval, *([of_trainings["interval"]] if of_trainings else [])]
    lows, highs = zip(*intervals, strict=True)
    kept = math.exp if is_log else float
    return {
        "value": kept(estimate.value),
        "standard_error" + "_of_log" * is_log: estimate.standard_error,
        "interval": [kept(min(lows)), kept(max(highs))],
        "interval_over_images": [kept(end) for end in estimate.interval],
        "over_trainings" + "_of_log" * is_log: of_trainings,
    }


# ------------------------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------------------------


def verdict_of(beyond: Sequence[float], change: Sequence[float], ground_truth: Sequence[float], margin: float) -> str:
    """
    Args:
        beyond: interval of what s changes beyond its change on real images.
        change, ground_truth: of what it changes, and of its change on real images.
        margin: an effect smaller than it, in the units of the distance, counts as none.
    """
    low, high = beyond
    if -margin <= low and high <= margin:
        return NONE
    if high < 0 and change[1] < 0:
        return ARTEFACT if ground_truth[1] < 0 else BENEFIT
    return WORSE if low > 0 else UNDECIDED


def agreed(first: str, second: str) -> str:
    """The word of both baselines."""
    return first if first == second else UNDECIDED


def conclude(
    compared: list[dict[str, Any]], control: dict[str, Any], solver_check: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """All inputs, the control last, with "refuted" and "void" as their words where it comes to that."""
    solvers_agree = solver_check is None or solver_check["agree"]
    for word in WORDS:
        for one in compared:
            if control[word] != BENEFIT:
                one[word] = VOID
            elif one["input"] == WEAK and one[word] == NONE:
                one[word] = REFUTED
        for one in () if solvers_agree else (*compared, control):
            one[word] = VOID_SOLVER
    return [*compared, control]


# ------------------------------------------------------------------------------------------------------------------
# Before anything is swept
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


def choose_noise(ratios: dict[float, float], weak: float) -> float:
    """
    The noise of the positive control: that whose ratio to ground truth is the largest not above the weak base's, or
    the smallest noise where all are above it.

    Args:
        ratios: by noise.
    """
    below = [noise for noise, ratio in ratios.items() if ratio <= weak]
    return max(below, key=ratios.get) if below else min(ratios)


def noise_ratios(verdicts: Verdicts, noises: Sequence[float]) -> dict[float, float]:
    """Of the distances at the smallest s to that on clean real images."""
    return {noise: verdicts.ratio(control_heading(noise)) for noise in noises}
