"""
Distances between two sets of features, in float64, as functions of tensors: which network made the features, and of
which images, is for the caller to say beside every figure.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch


CHUNK = 1000


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
        Those of the union of disjoint sets (Chan, Golub and LeVeque, 1979): sets too large for memory are added up
        batch by batch.
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


def inception_score(logits: torch.Tensor, num_splits: int = 10, *, generator: torch.Generator) -> tuple[float, float]:
    """
    Mean and deviation over random splits of the images.

    Args:
        logits: (N, K), of any classifier; the score is in [1, K].
        num_splits: number of disjoint parts of equal size into which the images are split.
        generator: of the splits, on the CPU.

    Raises:
        ValueError: for fewer than 2 images in a split.
    """
    _check_count(f"the Inception Score over {num_splits} splits", len(logits), 2 * num_splits)
    order = torch.randperm(len(logits), generator=generator).to(logits.device)
    scores = []
    for log_p in logits.double()[order].log_softmax(1).tensor_split(num_splits):
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))  # (K,)
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)  # (N / num_splits,)
        scores.append(divergence.mean().exp())
    return _mean_and_deviation(torch.stack(scores))


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
# Kernel distance:  the squared maximum mean discrepancy under (x.y / D + 1)^3  (Binkowski et al., 2018)
# ------------------------------------------------------------------------------------------------------------------


def kernel_distance(
    real: torch.Tensor,
    generated: torch.Tensor,
    num_subsets: int = 10,
    max_subset_size: int = 1000,
    *,
    generator: torch.Generator,
) -> tuple[float, float]:
    """
    Mean and deviation of the unbiased estimate over random subsets.

    The subsets are disjoint: their values are independent draws, and the mean's standard error is the deviation over
    the square root of their number. Unlike the Frechet distance, its expectation does not depend on the counts.

    Args:
        real, generated: (N, D), (M, D).
        num_subsets: number of pairs of subsets.
        max_subset_size: a subset has this many images, or min(N, M) / num_subsets where that is smaller.
        generator: of the subsets, on the CPU.

    Raises:
        ValueError: for fewer than 2 images in a subset.
    """
    count = min(len(real), len(generated))
    _check_count(f"the kernel distance over {num_subsets} subsets", count, 2 * num_subsets)
    size = min(max_subset_size, count // num_subsets)
    subsets = []
    for features in (real, generated):
        order = torch.randperm(len(features), generator=generator)[: num_subsets * size].to(features.device)
        subsets.append(features[order].double().split(size))
    return _mean_and_deviation(torch.stack([squared_mmd(x, y) for x, y in zip(*subsets, strict=True)]))


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate from x (N, D) and y (M, D): pairs of an image with itself are left out."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    k_xx, k_yy = kernel(x, x), kernel(y, y)
    within_x = (k_xx.sum() - k_xx.trace()) / (len(x) * (len(x) - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (len(y) * (len(y) - 1))
    return within_x + within_y - 2 * kernel(x, y).mean()


def _mean_and_deviation(values: torch.Tensor) -> tuple[float, float]:
    """The deviation has denominator N - 1; that of one value is NaN."""
    return values.mean().item(), values.std().item() if len(values) > 1 else math.nan


def _check_count(what: str, count: int, needed: int) -> None:
    if count < needed:
        raise ValueError(f"{what} needs at least {needed} images, and there are {count}: give more images.")
