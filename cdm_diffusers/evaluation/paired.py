"""
Comparisons of rows of samples whose images are paired: image number i of every row was made from the same noise. What
the rows share cancels where they are compared, if the images are resampled for all of them at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .intervals import CONFIDENCE, mean_and_error, student_interval
from .metrics import FeatureStatistics, extrapolated_frechet_distance, frechet_distances


NUM_ORDERS = 5  # of images, for extrapolated distances
BLOCK = 2**22  # numbers in memory at once


@dataclass(frozen=True)
class Estimate:
    """
    Args:
        value: of a statistic.
        standard_error: its deviation over resamples of the images.
        interval: of 95%, between percentiles of the resamples.
    """

    value: float
    standard_error: float
    interval: list[float]

    @classmethod
    def of(cls, value: float, replicates: torch.Tensor) -> "Estimate":
        """
        Args:
            value: of the statistic on the images as they are.
            replicates: (B,), its values on the resamples.
        """
        tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=replicates.dtype)
        return cls(float(value), replicates.std().item(), replicates.quantile(tails).tolist())


# ------------------------------------------------------------------------------------------------------------------
# Over images
# ------------------------------------------------------------------------------------------------------------------


def draw_resamples(
    num_images: int, num_replicates: int, seed: int, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """int64 (B, N): the numbers of the images in each resample, drawn with replacement, within each label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(num_images, dtype=torch.int64) if labels is None else labels
    resamples = torch.empty(num_replicates, num_images, dtype=torch.int64)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        resamples[:, own] = own[torch.randint(len(own), (num_replicates, len(own)), generator=generator)]
    return resamples


def paired_bootstrap(
    rows: Sequence[torch.Tensor],
    statistic: Callable[[list[torch.Tensor]], float],
    num_replicates: int = 1000,
    seed: int = 0,
) -> Estimate:
    """
    Any statistic of rows of paired images: of the rows as they are, and of resamples, the same ones in every row.

    Args:
        rows: tensors (N, ...) of features or of other figures, image by image.
        statistic: of such rows; one that does not grow with the number of different images.

    Raises:
        ValueError: the rows differ in their number of images.
    """
    _check_paired(rows)
    resamples = draw_resamples(len(rows[0]), num_replicates, seed)
    replicates = torch.tensor([statistic([row[images] for row in rows]) for images in resamples], dtype=torch.float64)
    return Estimate.of(statistic(list(rows)), replicates)


@dataclass(frozen=True)
class PairedDistances:
    """
    Frechet distances of rows of paired images from one reference, extrapolated to infinitely many images.

    Args:
        values: (R,) float64, or of another shape, as the statistics take them.
        replicates: (B, R), how they vary together over resamples of the images. A resample has fewer different images
            than the rows, which makes its plain distances larger: what is kept is their deviation from their mean,
            around `values`. Where a row and the reference agree they deviate up to sqrt(2) times too much.
    """

    values: torch.Tensor
    replicates: torch.Tensor

    @classmethod
    def between(
        cls,
        rows: Sequence[torch.Tensor],
        reference: FeatureStatistics,
        num_replicates: int = 1000,
        seed: int = 0,
        labels: torch.Tensor | None = None,
    ) -> "PairedDistances":
        """
        Args:
            rows: features (N, D) of each row.
            seed: of the resamples and of the subsets that distances are extrapolated from; the same for all rows.
            labels: int64 (N,), where the numbers of images of each label are fixed, not drawn: resamples and subsets
                keep them.

        Raises:
            ValueError: the rows differ in their number of images, or have fewer than 10.
        """
        _check_paired(rows)
        values = torch.tensor([extrapolated(row, reference, seed, labels) for row in rows], dtype=torch.float64)
        resamples = draw_resamples(len(rows[0]), num_replicates, seed, labels)
        counts = torch.zeros(resamples.shape, dtype=torch.float64)
        counts.scatter_add_(1, resamples, torch.ones_like(counts))
        plain = torch.stack([weighted_distances(row, reference, counts) for row in rows], dim=1)
        return cls(values, values + plain - plain.mean(0))

    def estimate(self, statistic: Callable[[torch.Tensor], torch.Tensor]) -> Estimate:
        """A `statistic` of the distances; it takes them as (..., R) and returns (...)."""
        return Estimate.of(statistic(self.values).item(), statistic(self.replicates))


def extrapolated(
    features: torch.Tensor, reference: FeatureStatistics, seed: int = 0, labels: torch.Tensor | None = None
) -> float:
    """[`extrapolated_frechet_distance`] from subsets that are the same for all rows of equally many images."""
    generator = torch.Generator().manual_seed(seed)
    return extrapolated_frechet_distance(features, reference, NUM_ORDERS, labels=labels, generator=generator)


def weighted_distances(features: torch.Tensor, reference: FeatureStatistics, counts: torch.Tensor) -> torch.Tensor:
    """
    Plain Frechet distances (B,) of B sets of N images each.

    Args:
        features: (N, D), of all images that are in the sets.
        counts: (B, N) float64, how often each image is in each set.
    """
    features = features.double()
    count, centre = len(features), features.mean(0)
    centred, distances = features - centre, []
    for weights in counts.split(max(1, BLOCK // features.numel())):
        means = weights @ centred / count
        second = (weights[:, :, None] * centred).mT @ centred
        covariances = (second - count * means[:, :, None] * means[:, None]) / (count - 1)
        distances.append(frechet_distances(means + centre, covariances, reference))
    return torch.cat(distances)


def difference_in_differences(
    treated: torch.Tensor, untreated: torch.Tensor, control_treated: torch.Tensor, control_untreated: torch.Tensor
) -> torch.Tensor:
    """What a treatment changes beyond what it changes in the control."""
    return (treated - untreated) - (control_treated - control_untreated)


def halves(rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The first and the second half of the images of each row: what is chosen on one is tested on the other."""
    _check_paired(rows)
    middle = len(rows[0]) // 2
    return [row[:middle] for row in rows], [row[middle:] for row in rows]


def _check_paired(rows: Sequence[torch.Tensor]) -> None:
    counts = [len(row) for row in rows]
    if len(set(counts)) != 1:
        raise ValueError(f"`rows` are of {counts} images; they must have equally many: sample the same for all.")


# ------------------------------------------------------------------------------------------------------------------
# Over trainings
# ------------------------------------------------------------------------------------------------------------------


def over_trainings(values: Sequence[float]) -> dict[str, Any] | None:
    """
    A statistic over two or more trainings, each with its own value: mean and standard error, Student's 95% interval,
    and two-sided p-values against no effect, by the t test and by the sign test. With three trainings, that of the
    sign test is at least 0.25. None for a single training.
    """
    from scipy import stats

    if len(values) < 2:
        return None
    signs = [value > 0 for value in values if value != 0]
    return {
        **mean_and_error(values),
        "values": list(values),
        "interval": student_interval(values),
        "t_test": float(stats.ttest_1samp(values, 0).pvalue),
        "sign_test": float(stats.binomtest(sum(signs), len(signs)).pvalue) if signs else 1.0,
    }
