"""
Distances between two sets of features, in float64, as functions of tensors: which network made the features, and of
which images, is for the caller to say beside every figure.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import linear_regression

import torch


CHUNK = 1000
MAX_PARTS = 5


@dataclass
class FeatureStatistics:
    """
    What the Frechet distance needs to know of a set of features.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64, with denominator N - 1.
        count: N, the number of images.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int

    @classmethod
    def from_features(cls, features: torch.Tensor) -> "FeatureStatistics":
        """Of features (N, D), N at least 1."""
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / max(len(features) - 1, 1), len(features))

    @classmethod
    def merge(cls, parts: Iterable["FeatureStatistics"]) -> "FeatureStatistics":
        """
        The statistics of the union of disjoint sets (Chan, Golub and LeVeque, 1979): sets too large for memory are
        added up batch by batch.
        """
        parts = list(parts)
        count = sum(part.count for part in parts)
        mean = sum(part.count * part.mean for part in parts) / count
        scatter = torch.zeros_like(parts[0].covariance)
        for part in parts:
            shift = part.mean - mean
            scatter += (part.count - 1) * part.covariance + part.count * torch.outer(shift, shift)
        return cls(mean, scatter / max(count - 1, 1), count)

    @cached_property
    def root(self) -> torch.Tensor:
        """(D, r) with `root @ root.T` the covariance, whose rank is r."""
        eigenvalues, eigenvectors = torch.linalg.eigh(self.covariance)
        threshold = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
        kept = eigenvalues > threshold.clamp(min=0)
        return eigenvectors[:, kept] * eigenvalues[kept].sqrt()


# ------------------------------------------------------------------------------------------------------------------
# Frechet distance:  |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))  (Heusel et al., 2017, Eq. 6)
# ------------------------------------------------------------------------------------------------------------------


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """
    The squared 2-Wasserstein distance of two normal distributions.

    With C = R R^T, the trace of (C_a C_b)^(1/2) is the sum of the singular values of R_a^T R_b: no square root of a
    rounding error is taken, so that it is exact for singular covariances too, which fewer images than features have.

    Raises:
        ValueError: for features of different width, and for fewer than 2 images.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"`a` is of {len(a.mean)} features and `b` of {len(b.mean)}: they must come from the same extractor."
        )
    for name, statistics in (("a", a), ("b", b)):
        _check_count(f"the Frechet distance (`{name}`)", statistics.count, 2)
    overlap = torch.linalg.svdvals(a.root.T @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return distance.item()


def frechet_distances(means: torch.Tensor, covariances: torch.Tensor, reference: FeatureStatistics) -> torch.Tensor:
    """
    [`frechet_distance`] of many means (B, D) and covariances (B, D, D) from one reference, (B,) float64. It takes the
    roots of the eigenvalues of R^T C R: several times faster, and accurate to about 8 digits of the traces.
    """
    eigenvalues = torch.linalg.eigvalsh(reference.root.T @ covariances @ reference.root)
    traces = covariances.diagonal(dim1=1, dim2=2).sum(1) + reference.covariance.trace()
    return (means - reference.mean).square().sum(1) + traces - 2 * eigenvalues.clamp(min=0).sqrt().sum(1)


def extrapolated_frechet_distance(
    features: torch.Tensor,
    reference: FeatureStatistics,
    num_orders: int = 1,
    *,
    labels: torch.Tensor | None = None,
    generator: torch.Generator,
) -> float:
    """
    The distance that infinitely many images would have (Chong and Forsyth, 2020): the finite number N of `features`
    (N, D) adds about b / N to it, so a line in 1 / N, fitted by least squares, is extrapolated to 0.

    The line goes through the distance of all images and those of 14 subsets: all but one of m equal parts of the
    images in random order, m = 2, ..., 5. Every size takes each image equally often.

    Below about 2 D images the distance is no longer linear in 1 / N, and the result too small.

    Args:
        num_orders: random orders of the images whose subsets are used. More of them reduce the noise that one adds
            (in simulations with N = 4 D and 8 D a deviation of 1.2 to 2.1 times that of the plain distance with 1
            order, 1.0 to 1.3 times with 5).
        labels: int64 (N,), where as many images of each were drawn as the distribution has: every subset has its
            share of each label, as the whole has.
        generator: of the orders, on the CPU.

    Raises:
        ValueError: for fewer than 10 images.
    """
    _check_count("the extrapolated Frechet distance", len(features), 2 * MAX_PARTS)
    whole = frechet_distance(FeatureStatistics.from_features(features), reference)
    points = [(1 / len(features), whole)] * num_orders
    for _ in range(num_orders):
        order = torch.randperm(len(features), generator=generator)
        order = (order if labels is None else evenly_mixed(order, labels)).to(features.device)
        for num_parts in range(2, MAX_PARTS + 1):
            parts = [FeatureStatistics.from_features(features[part]) for part in order.tensor_split(num_parts)]
            subsets = [FeatureStatistics.merge(parts[:place] + parts[place + 1 :]) for place in range(num_parts)]
            means, covariances = (torch.stack([getattr(s, name) for s in subsets]) for name in ("mean", "covariance"))
            distances = frechet_distances(means, covariances, reference).tolist()
            points += [(1 / subset.count, distance) for subset, distance in zip(subsets, distances, strict=True)]
    return linear_regression(*zip(*points, strict=True)).intercept


def evenly_mixed(order: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The `order` (N,) of images with `labels` (N,), changed so that every part of it has its share of each label."""
    places = torch.empty(len(order), dtype=torch.float64)
    for label in labels.unique():
        own = (labels[order] == label).nonzero()[:, 0]
        places[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
    return order[places.argsort(stable=True)]


def frechet_standard_error(reference: FeatureStatistics, features: torch.Tensor) -> float:
    """
    How much the distance of `features` (N, D) from `reference` varies with the draw of the N images, by the delta
    method: the deviation of each image's influence, over the square root of N.

    The distance's derivative by the covariance C of `features` is I - T, where T = R (R^T C R)^(-1/2) R^T with
    R R^T the reference's covariance is the optimal transport from one normal distribution to the other.

    Where the two distributions agree, these first derivatives vanish: the result is then about sqrt(2) times too
    large (in simulations with normal features 1.3 to 1.6 times, and 1.7 with fewer images than features). The bias,
    by which few images make the distance larger, is not part of it.
    """
    statistics = FeatureStatistics.from_features(features)
    root = reference.root
    eigenvalues, eigenvectors = torch.linalg.eigh(root.T @ statistics.covariance @ root)
    kept = eigenvalues > len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
    half = root @ (eigenvectors[:, kept] * eigenvalues[kept].pow(-0.25))  # (D, r), T = half @ half.T
    centred = features.double() - statistics.mean
    influence = 2 * centred @ (statistics.mean - reference.mean)  # (N,)
    influence += centred.square().sum(1) - (centred @ half).square().sum(1)
    return (influence.std() / len(features) ** 0.5).item()


# ------------------------------------------------------------------------------------------------------------------
# Inception Score:  exp(E_x KL(p(y|x) || p(y)))  (Salimans et al., 2016)
# ------------------------------------------------------------------------------------------------------------------


def inception_score(logits: torch.Tensor, num_splits: int = 10) -> tuple[float, float]:
    """
    Mean and deviation (denominator `num_splits`) over splits of the images in their order, as in the original code.

    Args:
        logits: (N, K), of any classifier; the score is in [1, K]. The images must not be sorted by class: each split
            would have few classes, and the score be far too low.
        num_splits: number of parts of equal size into which the images are split.

    Raises:
        ValueError: for fewer than 2 images in a split.
    """
    _check_count(f"the Inception Score over {num_splits} splits", len(logits), 2 * num_splits)
    bounds = [place * len(logits) // num_splits for place in range(1, num_splits)]
    scores = []
    for log_p in logits.double().log_softmax(1).tensor_split(bounds):
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))  # (K,)
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)  # (N / num_splits,)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


# ------------------------------------------------------------------------------------------------------------------
# Improved precision and recall (Kynkaanniemi et al., 2019)
# ------------------------------------------------------------------------------------------------------------------


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """
    The share of `generated` (M, D) inside the manifold of `real` (N, D), and the share of `real` inside that of
    `generated`. A set's manifold is the union of balls around its points, each as large as the distance to the
    point's k-th nearest neighbour in the set.

    Both grow with the size of the sets: compare only figures of equal N and of equal M.

    Raises:
        ValueError: for sets without k neighbours.
    """
    for name, features in (("real", real), ("generated", generated)):
        _check_count(f"precision and recall with k = {k} (`{name}`)", len(features), k + 1)
    real, generated = real.double(), generated.double()
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


def _share_inside(points: torch.Tensor, manifold: torch.Tensor, k: int) -> float:
    # The nearest of all is the point itself.
    radii = torch.cat([torch.cdist(chunk, manifold).kthvalue(k + 1).values for chunk in manifold.split(CHUNK)])
    inside = [(torch.cdist(chunk, manifold) <= radii).any(1) for chunk in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


# ------------------------------------------------------------------------------------------------------------------
# Kernel distance:  the squared maximum mean discrepancy  E k(x, x') + E k(y, y') - 2 E k(x, y)  (Gretton et al., 2012)
# ------------------------------------------------------------------------------------------------------------------


Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (N, D), (M, D) -> (N, M)


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(x.y / D + 1)^3, the kernel of the KID (Binkowski et al., 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def rbf_kernel(reference: FeatureStatistics) -> Kernel:
    """
    `exp(-|x - y|^2 / (2 w))`, w being the trace of the reference's covariance: half the mean squared distance between
    two of its images. So whatever is compared with the same reference is compared by the same kernel.
    """
    width = reference.covariance.trace().item()
    return lambda x, y: (torch.cdist(x, y).square() / (-2 * width)).exp()


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, kernel: Kernel = polynomial_kernel
) -> tuple[float, float]:
    """
    The unbiased estimate of the squared maximum mean discrepancy from all pairs of different images (the U-statistic),
    computed in blocks, and its standard error. Unlike the Frechet distance, its expectation does not depend on the
    counts.

    The standard error is the jackknife's over the images of `generated`, with `real` as it is. Like that of the
    Frechet distance it is up to sqrt(2) times too large where the two distributions agree.

    Args:
        real, generated: (M, D), (N, D).

    Raises:
        ValueError: for fewer than 3 images of a kind.
    """
    for name, features in (("real", real), ("generated", generated)):
        _check_count(f"the kernel distance (`{name}`)", len(features), 3)
    count = len(generated)
    within, within_real = _sums_over_others(kernel, generated), _sums_over_others(kernel, real)
    across = _row_sums(kernel, generated, real) / len(real)
    value = within.mean() / (count - 1) + within_real.mean() / (len(real) - 1) - 2 * across.mean()
    # What leaving out each image changes, up to a constant.
    changes = 2 * across / (count - 1) - 2 * within / ((count - 1) * (count - 2))
    return value.item(), (changes.std() * (count - 1) / count**0.5).item()


def _sums_over_others(kernel: Kernel, x: torch.Tensor) -> torch.Tensor:
    """(N,) sums over all images but the row's own."""
    own = torch.cat([kernel(rows.double(), rows.double()).diagonal() for rows in x.split(CHUNK)])
    return _row_sums(kernel, x, x) - own


def _row_sums(kernel: Kernel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(N,) float64 sums of the kernel's values (N, M), of which no more than a block exists at a time."""
    return torch.cat(
        [sum(kernel(rows.double(), columns.double()).sum(1) for columns in y.split(CHUNK)) for rows in x.split(CHUNK)]
    )


def _check_count(what: str, count: int, needed: int) -> None:
    if count < needed:
        raise ValueError(f"{what} needs at least {needed} images, and there are {count}: give more images.")
