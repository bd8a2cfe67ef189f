"""Comparisons of paired rows: against closed forms, scipy, and simulated sets of which the truth is known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from cdm_diffusers.evaluation.metrics import (
    FeatureStatistics,
    evenly_mixed,
    extrapolated_frechet_distance,
    frechet_distance,
)
from cdm_diffusers.evaluation.paired import (
    PairedDistances,
    difference_in_differences,
    draw_resamples,
    extrapolated,
    halves,
    over_trainings,
    paired_bootstrap,
    weighted_distances,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(count, width, seed):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64)


def standard(width):
    """The reference N(0, 1) of infinitely many images: N(m, c^2) is m^2 + (c - 1)^2 away in each direction."""
    return FeatureStatistics(torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64), 10**6)


# Over images


def test_the_bootstrap_of_a_mean_is_its_closed_form():
    """Standard error: the deviation (denominator N) over the root of N; the interval is normal."""
    values = normal(400, 1, 0)[:, 0]
    estimate = paired_bootstrap([values], lambda rows: rows[0].mean(), 4000)
    error = values.std(correction=0).item() / 20
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.standard_error == pytest.approx(error, rel=0.04)
    expected = [estimate.value + sign * 1.959964 * error for sign in (-1, 1)]
    assert estimate.interval == pytest.approx(expected, abs=0.1 * error)


def test_the_same_images_are_resampled_in_all_rows():
    """So a difference has the noise of the difference only, and rows that are resampled apart have that of both."""
    shared, own = normal(300, 2, 1)[:, 0], normal(300, 2, 2)[:, 0]
    rows = [shared, shared + 0.1 * own]
    paired = paired_bootstrap(rows, lambda rows: rows[1].mean() - rows[0].mean())
    assert paired.standard_error == pytest.approx(0.1 * own.std().item() / math.sqrt(300), rel=0.1)
    apart = [paired_bootstrap([row], lambda rows: rows[0].mean(), seed=seed) for seed, row in enumerate(rows)]
    assert paired.standard_error < math.hypot(*(one.standard_error for one in apart)) / 10
    assert paired_bootstrap([shared, shared], lambda rows: (rows[1] - rows[0]).mean()).interval == [0, 0]


def test_weighted_distances_are_those_of_resampled_features():
    features, reference = normal(50, 6, 0) * 3 + 5, FeatureStatistics.from_features(normal(80, 6, 1))
    resamples = draw_resamples(50, 7, 0)
    assert resamples.shape == (7, 50) and len({len(images.unique()) for images in resamples}) > 1
    counts = torch.stack([images.bincount(minlength=50) for images in resamples]).double()
    expected = [frechet_distance(FeatureStatistics.from_features(features[images]), reference) for images in resamples]
    assert weighted_distances(features, reference, counts).tolist() == pytest.approx(expected, rel=1e-9)


def test_distances_are_the_extrapolated_ones():
    """The resamples vary around them: what few different images add to a distance is not in the interval."""
    rows, reference = [normal(200, 8, 0) * 1.2, normal(200, 8, 1)], standard(8)
    distances = PairedDistances.between(rows, reference, 200)
    expected = [extrapolated_frechet_distance(row, reference, 5, generator=seeded(0)) for row in rows]
    assert distances.values.tolist() == pytest.approx(expected)
    assert distances.replicates.mean(0).tolist() == pytest.approx(expected)
    estimate = distances.estimate(lambda d: d[..., 0] / d[..., 1])
    assert estimate.value == pytest.approx(expected[0] / expected[1])


def test_paired_distances_leave_shared_noise_out():
    """Two rows of the same noise, a hundredth apart, against two rows of noise of their own."""
    noise, reference = normal(300, 5, 0), standard(5)

    def error(other):
        distances = PairedDistances.between([1.3 * noise, other], reference, 300)
        return distances.estimate(lambda d: d[..., 1] - d[..., 0])

    paired, unpaired = error(1.31 * noise), error(1.31 * normal(300, 5, 1))
    assert paired.standard_error < unpaired.standard_error / 10
    assert paired.interval[0] > 0 and unpaired.interval[0] < 0 < unpaired.interval[1]
    exact = 5 * (0.31**2 - 0.3**2)
    assert paired.value == pytest.approx(exact, abs=3 * paired.standard_error)


def test_intervals_cover_the_truth():
    """
    A difference in differences of four rows that share half of their noise, 100 times: the 95% interval covers it 90
    to 99 times (which has a deviation of 2.2), and the standard errors are 1 to sqrt(2) times what the estimates
    deviate by (the deviation of 100 estimates is uncertain by 7%).
    """
    scales, reference = (1.25, 1.4, 1.1, 1.15), standard(4)
    truth = 4 * ((0.25**2 - 0.4**2) - (0.1**2 - 0.15**2))
    estimates = []
    for trial in range(100):
        shared, *own = normal(120 * 5, 4, 1000 + trial).split(120)
        rows = [scale * (shared + noise) / 2**0.5 for scale, noise in zip(scales, own, strict=True)]
        distances = PairedDistances.between(rows, reference, 200, seed=trial)
        estimates.append(distances.estimate(lambda d: difference_in_differences(*d.unbind(-1))))
    assert 90 <= sum(one.interval[0] <= truth <= one.interval[1] for one in estimates) <= 99
    errors = np.mean([one.standard_error for one in estimates])
    assert 0.9 < errors / np.std([one.value for one in estimates]) < 1.1 * 2**0.5


def test_resamples_and_subsets_keep_the_numbers_of_images_of_each_label():
    labels = torch.arange(100) % 10
    resamples = draw_resamples(100, 50, 0, labels)
    assert torch.equal(labels[resamples], labels.expand(50, 100)) and len(resamples[:, 3].unique()) > 5
    order = torch.randperm(100, generator=seeded(0))
    mixed = evenly_mixed(order, labels)
    assert torch.equal(mixed.sort().values, torch.arange(100)) and not torch.equal(
        mixed, evenly_mixed(order.flip(0), labels)
    )
    for num_parts in (2, 3, 4, 5):
        for part in mixed.tensor_split(num_parts):
            counts = labels[part].bincount(minlength=10)
            assert counts.max() - counts.min() <= 1
    uneven = torch.tensor([0] * 90 + [1] * 10)
    assert [int(uneven[part].sum()) for part in evenly_mixed(order, uneven).tensor_split(5)] == [2] * 5


def test_numbers_of_images_that_are_set_are_no_noise():
    """Means of two labels far apart: what their numbers would vary by is not in the interval, nor in the limit."""
    labels, reference = torch.arange(200) % 2, standard(3)
    errors, limits = {True: [], False: []}, {True: [], False: []}
    for trial in range(20):
        row = normal(200, 3, trial) + 6 * labels[:, None]
        for is_told in (True, False):
            told = labels if is_told else None
            distances = PairedDistances.between([row], reference, 100, trial, told)
            errors[is_told].append(distances.estimate(lambda d: d[..., 0]).standard_error)
            limits[is_told].append(extrapolated(row, reference, trial, told))
    assert np.mean(errors[True]) == pytest.approx(np.std(limits[True], ddof=1), rel=0.45)
    assert np.mean(errors[True]) < np.mean(errors[False]) / 2


def test_what_is_chosen_is_tested_on_other_images():
    """The best of 30 equal rows is too good on the images that chose it, and on the others it is not."""
    noise, reference = normal(600, 3, 0), standard(3)
    rows = [noise + 0.3 * normal(600, 3, seed) for seed in range(1, 31)]
    chosen_by, tested_on = halves(rows)
    assert all(len(a) == len(b) == 300 for a, b in zip(chosen_by, tested_on, strict=True))
    assert torch.equal(torch.cat([chosen_by[3], tested_on[3]]), rows[3])
    first, second = (PairedDistances.between(part, reference, 50).values for part in (chosen_by, tested_on))
    best = first.argmin()
    assert first[best] < first.mean() - 1.5 * first.std() and second[best] > second.mean() - 1.5 * second.std()


def test_rows_of_other_counts_are_refused():
    rows = [normal(20, 3, 0), normal(21, 3, 0)]
    for function in (
        lambda: halves(rows),
        lambda: PairedDistances.between(rows, standard(3)),
        lambda: paired_bootstrap(rows, lambda rows: 0.0),
    ):
        with pytest.raises(ValueError, match=r"`rows` are of \[20, 21\] images; they must have equally many"):
            function()


# Over trainings


def test_three_trainings_by_student_and_by_sign():
    values = [-0.5, -0.7, -0.3]
    result = over_trainings(values)
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert result["mean"] == pytest.approx(-0.5) and result["standard_error"] == pytest.approx(0.2 / math.sqrt(3))
    assert result["interval"] == pytest.approx([-0.5 - half, -0.5 + half], rel=1e-5)
    t = -0.5 / (0.2 / math.sqrt(3))
    assert result["t_test"] == pytest.approx(1 + t / math.sqrt(2 + t**2))  # Student's distribution of 2 degrees
    assert result["sign_test"] == pytest.approx(2 / 2**3)
    assert over_trainings([0.5]) is None


def test_tests_over_trainings_are_scipys():
    values = np.random.default_rng(0).normal(0.4, 1, 9).tolist()
    result = over_trainings([*values, 0.0])
    assert result["t_test"] == pytest.approx(scipy.stats.ttest_1samp([*values, 0.0], 0).pvalue)
    positive = sum(value > 0 for value in values)
    tail = sum(math.comb(9, k) for k in range(max(positive, 9 - positive), 10)) / 2**9  # without the zero
    assert result["sign_test"] == pytest.approx(min(1, 2 * tail))
    assert over_trainings([0.0, 0.0])["sign_test"] == 1
