"""Metrics against scipy, torchmetrics, brute force and closed forms."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from cdm_diffusers.evaluation import metrics
from cdm_diffusers.evaluation.metrics import (
    FeatureStatistics,
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_distances,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    polynomial_kernel,
    precision_recall,
    rbf_kernel,
)
from cdm_diffusers.evaluation.spectra import spectrum_ratios


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


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_extrapolated_distance_is_that_of_infinitely_many_images(shift):
    """Normal features of a known distance: of what few images add, less than a tenth is left."""
    deviations, generator = torch.logspace(0.5, -1, 20, dtype=torch.float64), seeded(0)
    reference = FeatureStatistics(torch.zeros(20, dtype=torch.float64), deviations.square().diag(), 10**6)
    expected = 20 * shift**2 + ((1.2 - 1) * deviations).square().sum().item()
    plain, limits = [], []
    for seed in range(40):
        features = 1.2 * torch.randn(150, 20, generator=generator, dtype=torch.float64) * deviations + shift
        plain.append(frechet_distance(FeatureStatistics.from_features(features), reference))
        limits.append(extrapolated_frechet_distance(features, reference, 2, generator=seeded(seed)))
    bias, error = np.mean(plain) - expected, np.std(limits) / 40**0.5
    assert bias > 5 * error and abs(np.mean(limits) - expected) < 0.1 * bias + 2 * error


def test_extrapolated_distance_is_the_least_squares_line(two_sets):
    """Refitted by numpy from distances of the same subsets, drawn one by one."""
    features, reference = two_sets[0], FeatureStatistics.from_features(two_sets[1])
    order = torch.randperm(80, generator=seeded(5)).numpy()
    sets = [order] + [np.setdiff1d(order, part) for m in (2, 3, 4, 5) for part in np.array_split(order, m)]
    assert len(sets) == 15
    distances = [frechet_distance(FeatureStatistics.from_features(features[subset]), reference) for subset in sets]
    _, intercept = np.polyfit([1 / len(subset) for subset in sets], distances, 1)
    limit = extrapolated_frechet_distance(features, reference, generator=seeded(5))
    assert limit == pytest.approx(intercept, rel=1e-6)
    with pytest.raises(ValueError, match="at least 10 images, and there are 9"):
        extrapolated_frechet_distance(features[:9], reference, generator=seeded(0))


def test_distances_of_many_statistics_are_those_one_by_one(two_sets):
    reference = FeatureStatistics.from_features(two_sets[1])
    parts = [FeatureStatistics.from_features(part) for part in two_sets[0].split(20)]
    means, covariances = (torch.stack([getattr(part, name) for part in parts]) for name in ("mean", "covariance"))
    expected = torch.tensor([frechet_distance(part, reference) for part in parts], dtype=torch.float64)
    torch.testing.assert_close(frechet_distances(means, covariances, reference), expected, rtol=1e-8, atol=0)


# Inception Score


def original_inception_score(probabilities, num_splits):
    """Salimans et al.'s code, of probabilities (N, K): splits in order, deviation with denominator `num_splits`."""
    scores, count = [], len(probabilities)
    for place in range(num_splits):
        part = probabilities[place * count // num_splits : (place + 1) * count // num_splits]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("num_splits", [7, 10])
def test_inception_score_is_the_originals(num_splits):
    logits = 3 * torch.randn(123, 7, generator=seeded(0), dtype=torch.float64)
    expected = original_inception_score(scipy.special.softmax(logits.numpy(), 1), num_splits)
    assert inception_score(logits, num_splits) == pytest.approx(expected, rel=1e-12)


def test_inception_score_at_its_bounds():
    labels = torch.arange(60) % 6
    certain = 200.0 * torch.nn.functional.one_hot(labels, 6)
    assert inception_score(certain, 1) == pytest.approx((6, 0))
    assert inception_score(torch.zeros(60, 6)) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="at least 20 images, and there are 19"):
        inception_score(certain[:19])


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


def test_polynomial_kernel_distance_is_torchmetrics(two_sets):
    real, generated = two_sets[0][:60], two_sets[1]
    metric = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=60)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert kernel_distance(real, generated)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-9)


def kernels():
    """Ours, and as functions of two images."""
    reference = FeatureStatistics.from_features(draw(30, seed=9))
    width = reference.covariance.trace()
    return [
        (polynomial_kernel, lambda a, b: float((a @ b / NUM_FEATURES + 1) ** 3)),
        (rbf_kernel(reference), lambda a, b: float(((a - b).square().sum() / (-2 * width)).exp())),
    ]


@pytest.mark.parametrize(("kernel", "of_pair"), kernels(), ids=["polynomial", "rbf"])
def test_kernel_distance_by_its_formula(kernel, of_pair, monkeypatch):
    """Pairs one by one, for sets of different size that are not whole blocks; and leaving out images one by one."""
    monkeypatch.setattr(metrics, "CHUNK", 3)
    real, generated = draw(5, seed=0), draw(7, seed=1)

    def distance(x, y):
        within = [np.mean([of_pair(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
        return sum(within) - 2 * np.mean([of_pair(a, b) for a, b in itertools.product(x, y)])

    value, error = kernel_distance(real, generated, kernel)
    assert value == pytest.approx(distance(real, generated), rel=1e-10)
    without = [distance(real, torch.cat([generated[:i], generated[i + 1 :]])) for i in range(7)]
    assert error == pytest.approx((6 / 7 * np.square(without - np.mean(without)).sum()) ** 0.5, rel=1e-8)
    with pytest.raises(ValueError, match=r"`generated`.* at least 3 images, and there are 2"):
        kernel_distance(real, generated[:2], kernel)


def test_kernel_distances_of_normal_features_are_unbiased():
    """
    One feature, x ~ N(1, 2^2) and y ~ N(0.5, 1). The polynomial's expectation is 3 E[x^2] E[y^2] + 3 E[x] E[y] + 1 +
    E[x^3] E[y^3]; that of exp(-(x - y)^2 / 2w) is (w / v)^(1/2) exp(-(E[x] - E[y])^2 / 2v) with v = w + V[x] + V[y].
    Means over 300 draws of few images lie within 3 standard errors, and the errors that are given are the deviation.
    """
    moments = {"x": (1.0, 5.0, 13.0), "y": (0.5, 1.25, 1.625)}
    width = 3.0
    reference = FeatureStatistics(torch.zeros(1), torch.tensor([[width]], dtype=torch.float64), 2)

    def polynomial(a, b):
        (a1, a2, a3), (b1, b2, b3) = moments[a], moments[b]
        return a3 * b3 + 3 * a2 * b2 + 3 * a1 * b1 + 1

    def rbf(a, b):
        spread = width + sum(moments[name][1] - moments[name][0] ** 2 for name in (a, b))
        return (width / spread) ** 0.5 * np.exp(-((moments[a][0] - moments[b][0]) ** 2) / (2 * spread))

    generator = seeded(0)
    for kernel, expectation in ((polynomial_kernel, polynomial), (rbf_kernel(reference), rbf)):
        values, errors = [], []
        real = 0.5 + torch.randn(300, 1, generator=generator, dtype=torch.float64)
        for draw_number in range(300):
            generated = 1 + 2 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
            fresh = 0.5 + torch.randn(30, 1, generator=generator, dtype=torch.float64)
            values.append(kernel_distance(fresh, generated, kernel)[0])
            if draw_number < 100:
                errors.append(kernel_distance(real, generated, kernel))
        expected = expectation("x", "x") + expectation("y", "y") - 2 * expectation("x", "y")
        assert abs(np.mean(values) - expected) < 3 * np.std(values) / 300**0.5
        given, errors = np.array(errors).T
        # The deviation of 100 draws of heavy tails is itself uncertain by 20% or so.
        assert 0.7 < np.sqrt(np.mean(errors**2)) / given.std(ddof=1) < 1.4


def test_kernel_distance_never_holds_more_than_a_block(two_sets, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 16)
    sizes = []

    def kernel(x, y):
        assert x.dtype == y.dtype == torch.float64
        sizes.append((len(x), len(y)))
        return polynomial_kernel(x, y)

    blocks = kernel_distance(two_sets[0].float(), two_sets[1].float(), kernel)
    assert max(max(size) for size in sizes) == 16
    whole = kernel_distance(two_sets[0].float().double(), two_sets[1].float().double())
    assert blocks == pytest.approx(whole, rel=1e-10)


def test_spectra_of_noise():
    """Twice the deviation has four times the power in each octave; blur takes the highest one most."""
    noise = 40 * torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    of_noise, of_half = ((127.5 + factor * noise).clamp(0, 255).round().byte() for factor in (1, 0.5))
    ratios = spectrum_ratios(of_noise, of_half)
    assert list(ratios) == ["1 to 2", "2 to 4", "4 to 8", "8 to 16"]
    assert all(ratio == pytest.approx(4, rel=0.05) for ratio in ratios.values())
    blurred = torch.nn.functional.avg_pool2d(of_noise.float(), 3, 1, 1).round().byte()
    ratios = spectrum_ratios(blurred, of_noise)
    assert ratios["8 to 16"] < 0.2 < 0.8 < ratios["1 to 2"]
