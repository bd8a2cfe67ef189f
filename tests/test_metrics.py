"""Metrics against scipy, torchmetrics, brute force and closed forms."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from cdm_diffusers.evaluation import metrics
from cdm_diffusers.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    precision_recall,
)


NUM_FEATURES = 6


class Features(torch.nn.Identity):
    """What torchmetrics takes for a network: the images are the features."""

    num_features = NUM_FEATURES


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(count, seed, shift=0.0, width=NUM_FEATURES):
    """Skewed, correlated features of very different scales."""
    generator = seeded(seed)
    mix = torch.randn(width, width, generator=seeded(1), dtype=torch.float64) * torch.logspace(-2, 1, width)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).exp() @ mix + shift


@pytest.fixture
def two_sets():
    return draw(80, seed=2), 1.3 * draw(60, seed=3, shift=0.5)


# Statistics and the Frechet distance


def test_statistics_are_those_of_numpy(two_sets):
    features, _ = two_sets
    statistics = FeatureStatistics.from_features(features.float())
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64 and statistics.count == 80
    expected = np.cov(features.float().double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("sizes", [(80,), (40, 40), (33, 46, 1), (1, 1, 78)])
def test_merged_statistics_are_those_of_the_union(two_sets, sizes):
    features = two_sets[0] + 100  # far from zero: sums of squares would lose digits
    merged = FeatureStatistics.merge(FeatureStatistics.from_features(part) for part in features.split(list(sizes)))
    whole = FeatureStatistics.from_features(features)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-10)
    assert merged.count == 80


def test_frechet_distance_is_scipys(two_sets):
    a, b = (FeatureStatistics.from_features(features) for features in two_sets)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_distance_is_torchmetrics(two_sets):
    metric = FrechetInceptionDistance(feature=Features())
    for features, real in zip(two_sets, (True, False), strict=True):
        for batch in features.split(25):
            metric.update(batch, real=real)
    a, b = (FeatureStatistics.from_features(features) for features in two_sets)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-8)


def test_frechet_distance_of_singular_covariances():
    """Closed form for diagonal covariances, most of whose directions are empty."""
    variances_a = torch.zeros(50, dtype=torch.float64)
    variances_b = variances_a.clone()
    variances_a[:4] = torch.tensor([9.0, 4.0, 1e-6, 1.0])
    variances_b[1:6] = torch.tensor([1.0, 1e-2, 1.0, 25.0, 7.0])
    rotation = torch.linalg.qr(torch.randn(50, 50, generator=seeded(0), dtype=torch.float64)).Q
    a, b = (
        FeatureStatistics(torch.zeros(50, dtype=torch.float64), rotation @ variances.diag() @ rotation.T, 100)
        for variances in (variances_a, variances_b)
    )
    expected = (variances_a.sqrt() - variances_b.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_few_images_from_themselves_is_zero():
    few = FeatureStatistics.from_features(draw(12, seed=5, width=40))
    assert abs(frechet_distance(few, few)) < 1e-10 * few.covariance.trace()


def test_standard_error_is_the_deviation_over_draws():
    generator = seeded(0)
    features = torch.randn(42_000, NUM_FEATURES, generator=generator, dtype=torch.float64).abs()
    reference = FeatureStatistics.from_features(features[:2000])
    draws = (1.3 * features[2000:] + 0.2).split(400)
    distances = torch.tensor([frechet_distance(FeatureStatistics.from_features(d), reference) for d in draws])
    errors = torch.tensor([frechet_standard_error(reference, d) for d in draws])
    # The deviation of 100 draws is itself uncertain by 7%.
    assert 0.8 < (errors.square().mean().sqrt() / distances.std()).item() < 1.25


def test_frechet_distance_refuses_other_widths_and_single_images(two_sets):
    a = FeatureStatistics.from_features(two_sets[0])
    with pytest.raises(ValueError, match="same extractor"):
        frechet_distance(a, FeatureStatistics.from_features(two_sets[1][:, :5]))
    with pytest.raises(ValueError, match=r"`b`.* at least 2 images, and there are 1"):
        frechet_distance(a, FeatureStatistics.from_features(two_sets[1][:1]))


# Inception Score


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save:UserWarning")
def test_inception_score_is_torchmetrics():
    logits = 3 * torch.randn(120, 7, generator=seeded(0), dtype=torch.float64)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=10)
    metric.update(logits)
    torch.manual_seed(3)  # torchmetrics permutes by the global generator
    expected = [value.item() for value in metric.compute()]
    assert inception_score(logits, generator=seeded(3)) == pytest.approx(expected, rel=1e-12)


def test_inception_score_at_its_bounds():
    labels = torch.arange(60) % 6
    certain = 200.0 * torch.nn.functional.one_hot(labels, 6)
    assert inception_score(certain, 1, generator=seeded(0))[0] == pytest.approx(6)
    assert inception_score(torch.zeros(60, 6), generator=seeded(0)) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="at least 20 images, and there are 19"):
        inception_score(certain[:19], generator=seeded(0))


# Precision and recall


def brute_force_share(points, manifold, k):
    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    radii = np.sort(distances(manifold, manifold), axis=1)[:, k]
    return (distances(points, manifold) <= radii).any(1).mean()


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(two_sets, k, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    real, generated = two_sets
    expected = [brute_force_share(x.numpy(), y.numpy(), k) for x, y in ((generated, real), (real, generated))]
    assert precision_recall(real, generated, k) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and expected[0] != expected[1]


def test_precision_and_recall_of_a_missing_mode():
    """Two modes, of which the samples have one: what they show is right, and half is missing."""
    centres = torch.tensor([[0.0], [100.0]], dtype=torch.float64)
    real = torch.cat([draw(50, seed, width=3).clamp(-5, 5) + centre for seed, centre in enumerate(centres)])
    precision, recall = precision_recall(real, real[:50])
    assert precision == 1 and recall == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"`generated`.* at least 4 images, and there are 3"):
        precision_recall(real, real[:3])


# Kernel distance


def test_kernel_distance_is_torchmetrics(two_sets):
    real, generated = two_sets[0][:60], two_sets[1]
    metric = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=60)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    mean, _ = kernel_distance(real, generated, num_subsets=1, generator=seeded(0))
    assert mean == pytest.approx(metric.compute()[0].item(), rel=1e-9)


def test_kernel_distance_by_its_formula():
    """Pairs one by one, for sets of different size."""
    x, y = draw(5, seed=0), draw(7, seed=1)

    def kernel(a, b):
        return float((a @ b / NUM_FEATURES + 1) ** 3)

    expected = np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
    expected += np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
    expected -= 2 * np.mean([kernel(a, b) for a, b in itertools.product(x, y)])
    assert metrics.squared_mmd(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_over_disjoint_subsets(monkeypatch):
    """Every image is in at most one subset, and mean and deviation are those of the subsets' values."""
    pairs = []

    def value(x, y):
        pairs.append((x, y))
        return torch.tensor(float(len(pairs)), dtype=torch.float64)

    monkeypatch.setattr(metrics, "squared_mmd", value)
    real, generated = torch.arange(47.0)[:, None], torch.arange(100.0, 165.0)[:, None]
    assert kernel_distance(real, generated, generator=seeded(0)) == pytest.approx((5.5, np.std(range(10), ddof=1)))
    for subsets, features in zip(zip(*pairs, strict=True), (real, generated), strict=True):
        drawn = torch.cat(subsets).flatten().tolist()
        assert [len(subset) for subset in subsets] == [4] * 10
        assert len(set(drawn)) == 40 and set(drawn) <= set(features.flatten().tolist())
    kernel_distance(real, generated, max_subset_size=3, generator=seeded(0))
    assert len(pairs[-1][0]) == 3


def test_kernel_distance_is_unbiased():
    """Of two draws from one distribution, whatever the counts, it is zero on average."""
    features = torch.randn(4000, 3, generator=seeded(0), dtype=torch.float64)
    mean, deviation = kernel_distance(features[:1000], features[1000:], 50, generator=seeded(1))
    assert abs(mean) < 4 * deviation / 50**0.5
    with pytest.raises(ValueError, match="at least 20 images, and there are 19"):
        kernel_distance(features[:19], features, generator=seeded(0))
