"""Conditioning augmentation: moments of the Gaussian one, the blur against numpy."""

import math

import numpy as np
import pytest
import torch

from cdm_diffusers import (
    BlurConditioningAugmentation,
    CascadedDDPMScheduler,
    ContinuousDDPMScheduler,
    GaussianConditioningAugmentation,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cosine_alpha_bar(t, num_steps):
    """alpha-bar at the paper's t < T."""
    f_t, f_0 = (math.cos((u / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, 0))
    return f_t / f_0


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian


@pytest.mark.parametrize("scheduler_class", [CascadedDDPMScheduler, ContinuousDDPMScheduler])
@pytest.mark.parametrize("s", [1, 30, 400, 999])
def test_moments_at_a_fixed_s(scheduler_class, s):
    """4 x 3 x 64 x 64 values: mean and deviation within 5 standard errors."""
    augment = GaussianConditioningAugmentation(scheduler_class(1000, "squaredcos_cap_v2"), level=s)
    z_0 = torch.full((4, 3, 64, 64), 0.8)
    z_s, level = augment(z_0, seeded(s))
    assert level.dtype == torch.int64 and level.tolist() == [s] * 4
    assert z_s.shape == z_0.shape and z_s.dtype == torch.float32
    alpha_bar = cosine_alpha_bar(s, 1000)
    sigma, count = math.sqrt(1 - alpha_bar), z_0.numel()
    assert abs(z_s.mean().item() - 0.8 * math.sqrt(alpha_bar)) < 5 * sigma / math.sqrt(count)
    assert abs(z_s.std().item() / sigma - 1) < 5 / math.sqrt(2 * count)


def test_s_0_is_the_identity_bitwise():
    z_0 = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1
    z_s, level = GaussianConditioningAugmentation(CascadedDDPMScheduler(1000), level=0)(z_0, seeded())
    assert torch.equal(z_s, z_0) and level.tolist() == [0] * 4


def test_s_t_is_noise():
    """At T nothing is left of the image: the same noise whatever it was."""
    augment = GaussianConditioningAugmentation(CascadedDDPMScheduler(), level=4000)
    white, black = (augment(torch.full((1, 1, 8, 8), value), seeded())[0] for value in (1.0, -1.0))
    torch.testing.assert_close(white, black, atol=5e-5, rtol=0)


def test_amortised_s_is_uniform_from_0_to_t():
    """Chi-square of 42,000 draws over 0..20, at 4.5 deviations."""
    augment = GaussianConditioningAugmentation(CascadedDDPMScheduler(20))
    _, level = augment(torch.zeros(42_000, 1, 1, 1), seeded())
    counts = torch.bincount(level, minlength=21)
    assert len(counts) == 21
    chi_square = ((counts - 2000) ** 2 / 2000).sum().item()
    assert abs(chi_square - 20) < 4.5 * math.sqrt(2 * 20)


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_s_0_has_the_probability_it_is_given(probability):
    """Chi-square of 42,000 draws at 4.5 deviations: s = 0 as often as asked, 1..20 equally often."""
    augment = GaussianConditioningAugmentation(CascadedDDPMScheduler(20), zero_level_probability=probability)
    _, level = augment(torch.zeros(42_000, 1, 1, 1), seeded())
    counts = torch.bincount(level, minlength=21).double()
    assert abs(counts[0] - 42_000 * probability) <= 4.5 * math.sqrt(42_000 * probability * (1 - probability))
    expected = 42_000 * (1 - probability) / 20
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 19 + 4.5 * math.sqrt(2 * 19)


def test_s_without_a_probability_of_0_is_drawn_as_ever():
    """The first draws of a generator, which runs of earlier versions go on with."""
    _, level = GaussianConditioningAugmentation(CascadedDDPMScheduler(1000))(torch.zeros(8, 1, 2, 2), seeded())
    assert torch.equal(level, torch.randint(0, 1001, (8,), generator=seeded()))


def test_amortised_images_carry_the_noise_of_their_own_s():
    """Per level, of some 9,500 values: mean and deviation within 5 standard errors; s = 0 bitwise clean."""
    augment = GaussianConditioningAugmentation(CascadedDDPMScheduler(20))
    z_s, level = augment(torch.full((200, 1, 32, 32), -0.6), seeded())
    assert set(level.tolist()) == set(range(21))
    for s in range(20):
        values = z_s[level == s]
        if s == 0:
            assert (values == torch.tensor(-0.6)).all()
            continue
        alpha_bar = cosine_alpha_bar(s, 20)
        sigma = math.sqrt(1 - alpha_bar)
        assert abs(values.mean().item() + 0.6 * math.sqrt(alpha_bar)) < 5 * sigma / math.sqrt(values.numel())
        assert abs(values.std().item() / sigma - 1) < 5 / math.sqrt(2 * values.numel())


@pytest.mark.parametrize("level", [None, 12])
def test_generator_decides_s_and_noise(level):
    augment = GaussianConditioningAugmentation(CascadedDDPMScheduler(100), level)
    z_0 = torch.zeros(4, 1, 4, 4)
    (one, s_one), (same, s_same), (other, s_other) = (augment(z_0, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and torch.equal(s_one, s_same)
    assert not torch.equal(one, other) and torch.equal(s_one, s_other) == (level is not None)


@pytest.mark.parametrize("level", [-1, 101])
def test_level_out_of_range_is_refused(level):
    with pytest.raises(ValueError, match=rf"`level` is {level}; it must lie in 0\.\.100"):
        GaussianConditioningAugmentation(CascadedDDPMScheduler(100), level)


@pytest.mark.parametrize(("level", "probability"), [(None, 1.0), (None, -0.1), (5, 0.1)])
def test_probability_of_s_0_out_of_range_or_of_one_s_is_refused(level, probability):
    with pytest.raises(ValueError, match=f"`zero_level_probability` is {probability}"):
        GaussianConditioningAugmentation(CascadedDDPMScheduler(20), level, probability)


# ---------------------------------------------------------------------------------------------------------------------
# Blur


def blurred_by_hand(image, sigma, radius=1):
    """Two-dimensional kernel, border reflected without repeating it, loops over the taps; (C, H, W) float64."""
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    _, height, width = image.shape
    result = np.zeros_like(image)
    for row in range(2 * radius + 1):
        for column in range(2 * radius + 1):
            result += kernel[row, column] * padded[:, row : row + height, column : column + width]
    return result


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_blur_against_numpy(kernel_size):
    images = torch.rand(2, 3, 7, 9, generator=seeded()) * 2 - 1
    augment = BlurConditioningAugmentation(kernel_size, sigma_range=(0.6, 0.6), probability=1)
    blurred, level = augment(images, seeded())
    assert level is None and blurred.dtype == torch.float32
    for came, image in zip(blurred, images, strict=True):
        expected = blurred_by_hand(image.double().numpy(), 0.6, kernel_size // 2)
        np.testing.assert_allclose(came, expected, atol=1e-6)


def sigma_of(blurred, probe):
    """A lone pixel keeps 1/(1 + 2w)^2 of itself, and w = exp(-1/(2 sigma^2))."""
    w = (1 / torch.sqrt(blurred[:, 0, probe, probe].double()) - 1) / 2
    return torch.sqrt(-1 / (2 * w.log()))


def test_sigma_is_uniform_in_its_range():
    """Of 4,000 images: every sigma in [0.4, 0.6], mean and deviation of U(0.4, 0.6) within 5 standard errors."""
    images = torch.zeros(4000, 1, 5, 5)
    images[:, :, 2, 2] = 1
    sigma = sigma_of(BlurConditioningAugmentation(probability=1)(images, seeded())[0], 2)
    assert sigma.min() > 0.4 - 1e-4 and sigma.max() < 0.6 + 1e-4
    deviation = 0.2 / math.sqrt(12)
    assert abs(sigma.mean().item() - 0.5) < 5 * deviation / math.sqrt(4000)
    assert abs(sigma.std().item() / deviation - 1) < 5 * math.sqrt(0.2 / 4000)  # kurtosis 1.8: (1.8 - 1)/4


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_share_of_blurred_images(probability):
    """Within 5 standard errors of 4,000; the others are untouched bitwise; sigma does not depend on the choice."""
    images = torch.rand(4000, 1, 5, 5, generator=seeded(1))
    images[:, :, 2, 2] = 1
    augmented, _ = BlurConditioningAugmentation(probability=probability)(images, seeded())
    is_blurred = (augmented != images).flatten(1).any(dim=1)
    share = is_blurred.double().mean().item()
    assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / 4000)
    images[:] = 0
    images[:, :, 2, 2] = 1
    sigma = sigma_of(BlurConditioningAugmentation(probability=probability)(images, seeded())[0][is_blurred], 2)
    assert abs(sigma.mean().item() - 0.5) < 5 * 0.2 / math.sqrt(12 * len(sigma))


def test_probabilities_0_and_1():
    images = torch.rand(200, 1, 5, 5, generator=seeded())
    assert torch.equal(BlurConditioningAugmentation(probability=0)(images, seeded())[0], images)
    blurred, _ = BlurConditioningAugmentation(probability=1)(images, seeded())
    assert (blurred != images).flatten(1).any(dim=1).all()


def test_constant_images_stay_constant():
    images = torch.tensor([-1.0, 0.3, 1.0])[:, None, None, None].expand(3, 3, 6, 6)
    blurred, _ = BlurConditioningAugmentation(probability=1)(images, seeded())
    torch.testing.assert_close(blurred, images, atol=2e-7, rtol=0)


def test_channels_and_images_do_not_mix():
    images = torch.zeros(2, 2, 5, 5)
    images[0, 1, 2, 2] = 1
    blurred, _ = BlurConditioningAugmentation(probability=1)(images, seeded())
    assert (blurred[0, 0] == 0).all() and (blurred[1] == 0).all() and (blurred[0, 1] != 0).sum() == 9


def test_channels_last_images_are_blurred_alike():
    images = torch.rand(4, 3, 6, 6, generator=seeded())
    augment = BlurConditioningAugmentation()
    expected, _ = augment(images, seeded())
    assert torch.equal(augment(images.to(memory_format=torch.channels_last), seeded())[0], expected)


def test_generator_decides_the_blur():
    images, augment = torch.rand(8, 1, 6, 6, generator=seeded()), BlurConditioningAugmentation()
    one, same, other = (augment(images, seeded(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    "name, value",
    [
        ("kernel_size", 2),
        ("kernel_size", 0),
        ("kernel_size", -1),
        ("sigma_range", (0.0, 0.6)),
        ("sigma_range", (0.6, 0.4)),
        ("sigma_range", (-0.4, 0.6)),
        ("probability", -0.1),
        ("probability", 1.1),
    ],
)
def test_arguments_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is "):
        BlurConditioningAugmentation(**{name: value})
