"""The mathematics of diffusion against closed forms and brute force in float64, computed here with numpy."""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from cdm_diffusers.diffusion import (
    DiffusionTable,
    betas_for,
    cosine_betas,
    diffuse,
    discretized_gaussian_nll,
    epsilon_from_x_0,
    gaussian_kl,
    held_to,
    limit_x_0,
    linear_betas,
    prediction_for,
)


def cosine_alpha_bar(t, num_steps):
    """alpha-bar of Improved DDPM at the paper's t; the clip of beta at 0.999 changes the last one only."""
    f = np.cos((np.asarray(t, np.float64) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("num_steps", [10, 1000, 4000])
def test_cosine_schedule_is_the_closed_form(num_steps):
    table = DiffusionTable.from_betas(cosine_betas(num_steps))
    t = np.arange(1, num_steps)
    closed = cosine_alpha_bar(t, num_steps)
    np.testing.assert_allclose(table.alphas_cumprod[:-1].numpy(), closed, rtol=1e-10)
    # The last beta would be 1: it is clipped.
    assert table.betas[-1].item() == pytest.approx(0.999, rel=1e-12)
    assert table.alphas_cumprod[-1].item() == pytest.approx(closed[-1] * 0.001, rel=1e-9)
    assert len(table) == num_steps and table.alphas_cumprod.dtype == torch.float64


def test_last_level_of_the_papers_schedule():
    assert DiffusionTable.from_betas(cosine_betas(4000)).alphas_cumprod[-1].item() == pytest.approx(1.5e-10, rel=0.05)


@pytest.mark.parametrize("num_steps", [100, 1000, 4000])
def test_linear_schedule_scales_with_the_number_of_steps(num_steps):
    betas = linear_betas(num_steps).numpy()
    expected = [0.1 / num_steps + (20 / num_steps - 0.1 / num_steps) * i / (num_steps - 1) for i in range(num_steps)]
    np.testing.assert_allclose(betas, expected, rtol=1e-12)
    # Scaled so, every T ends at about the alpha-bar of DDPM's 1000 steps, which is noise.
    end = math.exp(sum(math.log1p(-beta) for beta in expected))
    assert DiffusionTable.from_betas(torch.tensor(expected)).alphas_cumprod[-1].item() == pytest.approx(end, rel=1e-9)
    assert end < 5e-5


def test_linear_schedule_takes_end_points():
    np.testing.assert_allclose(linear_betas(4, 0.1, 0.4), [0.1, 0.2, 0.3, 0.4], rtol=1e-12)
    np.testing.assert_allclose(linear_betas(2000, 1e-6, 1e-2), np.linspace(1e-6, 1e-2, 2000), rtol=1e-12)


@pytest.mark.parametrize("end_points", [{}, {"beta_start": 0.1}, {"beta_end": 0.1}])
def test_linear_schedule_of_few_steps_needs_end_points(end_points):
    with pytest.raises(ValueError, match=r"99 steps has no default end points.*`beta_start` and `beta_end`"):
        linear_betas(99, **end_points)


def test_schedules_by_name():
    assert torch.equal(betas_for("squaredcos_cap_v2", 50), cosine_betas(50))
    assert torch.equal(betas_for("linear", 50, 0.01, 0.02), linear_betas(50, 0.01, 0.02))
    with pytest.raises(ValueError, match=r"`beta_schedule` is 'scaled_linear'.*'squaredcos_cap_v2' or 'linear'"):
        betas_for("scaled_linear", 50)


@pytest.mark.parametrize("alphas_cumprod", [[0.5, 0.6], [0.5, 0.5], [1.0, 0.5], [0.5, 0.0], [0.5, -0.1]])
def test_alpha_bar_must_fall(alphas_cumprod):
    with pytest.raises(ValueError, match="must fall strictly"):
        DiffusionTable(torch.tensor(alphas_cumprod))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_alpha_bar_counts_as_the_paper_does():
    table = DiffusionTable.from_betas(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64))
    assert [round(float(table.alpha_bar(t)), 12) for t in range(4)] == [1.0, 0.9, 0.72, 0.36]
    assert torch.allclose(table.alpha_bar(torch.tensor([3, 0])), torch.tensor([0.36, 1.0], dtype=torch.float64))
    alpha, sigma = table.signal_and_noise(torch.tensor([0, 2]))
    assert alpha.dtype == sigma.dtype == torch.float32
    np.testing.assert_allclose(alpha, [1, math.sqrt(0.72)], rtol=1e-7)
    np.testing.assert_allclose(sigma, [0, math.sqrt(0.28)], rtol=1e-7)


@pytest.mark.parametrize("t", [-1, 4])
def test_times_outside_the_table_are_refused(t):
    """t = -1 must not wrap around to pure noise."""
    table = DiffusionTable.from_betas(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64))
    with pytest.raises(IndexError):
        table.alpha_bar(t)
    with pytest.raises(IndexError):
        table.signal_and_noise(t)


def test_float32_tables_keep_their_digits():
    """float32 betas lose 0.3% of 1 - alpha-bar at the first of 4000 cosine steps."""
    table = DiffusionTable.from_betas(cosine_betas(4000))
    t = torch.arange(1, 4001)
    alpha, sigma = table.signal_and_noise(t)
    f_0, f_t = (math.cos((u + 0.008) / 1.008 * math.pi / 2) for u in (0, 1 / 4000))
    # 1 - cos^2(b)/cos^2(a) = sin(b - a) sin(b + a)/cos^2(a) has no cancellation.
    a, b = math.acos(f_0), math.acos(f_t)
    exact = math.sqrt(math.sin(b - a) * math.sin(b + a)) / f_0
    assert sigma[0].item() == pytest.approx(exact, rel=1e-6)
    angles = (torch.arange(1, 4000, dtype=torch.float64) / 4000 + 0.008) / 1.008 * math.pi / 2
    np.testing.assert_allclose(alpha[:-1], angles.cos() / f_0, rtol=1e-6)
    assert alpha[-1].item() == pytest.approx(f_0**-1 * math.cos(angles[-1]) * math.sqrt(1e-3), rel=1e-6)


@pytest.mark.parametrize("start", [1.0, 0.95])
def test_respacing_against_brute_force(start):
    """Each merged step multiplies the alphas of the steps that it jumps over."""
    betas = np.linspace(0.01, 0.4, 12)
    indices = [1, 2, 5, 9, 11]
    table = DiffusionTable.from_betas(torch.from_numpy(betas)).respace(torch.tensor(indices), start)
    alpha_bar = [math.prod(1 - betas[: i + 1]) for i in indices]
    np.testing.assert_allclose(table.alphas_cumprod, alpha_bar, rtol=1e-12)
    merged = [math.prod(1 - betas[i + 1 : j + 1]) for i, j in itertools.pairwise(indices)]
    np.testing.assert_allclose(table.betas, [1 - alpha_bar[0] / start] + [1 - m for m in merged], rtol=1e-10)
    np.testing.assert_allclose(table.alphas_cumprod_prev, [start, *alpha_bar[:-1]], rtol=1e-12)


def conditioned_gaussian(alpha_bar, alpha_bar_prev, x_0, x_t):
    """q(x_{t-1} | x_t, x_0) as a prior N(sqrt(a_prev) x_0, 1 - a_prev) of x_{t-1} times the likelihood of x_t."""
    alpha = alpha_bar / alpha_bar_prev
    prior_precision, likelihood_precision = 1 / (1 - alpha_bar_prev), alpha / (1 - alpha)
    variance = 1 / (prior_precision + likelihood_precision)
    mean = variance * (
        prior_precision * math.sqrt(alpha_bar_prev) * x_0 + likelihood_precision * x_t / math.sqrt(alpha)
    )
    return mean, variance


@pytest.mark.parametrize("start", [1.0, 0.995])
def test_posterior_is_gaussian_conditioning(start):
    full = DiffusionTable.from_betas(cosine_betas(1000))
    indices = torch.tensor([50, 120, 500, 998, 999])
    table = full.respace(indices, start)
    x_0, x_t = 0.7, -1.3
    first = 1 if start == 1 else 0  # at clean data the posterior is a point
    for i in range(first, 5):
        alpha_bar = full.alphas_cumprod[indices[i]].item()
        alpha_bar_prev = start if i == 0 else full.alphas_cumprod[indices[i - 1]].item()
        mean, variance = conditioned_gaussian(alpha_bar, alpha_bar_prev, x_0, x_t)
        came = table.posterior_mean(torch.full((1, 1, 1, 1), x_0), torch.full((1, 1, 1, 1), x_t), torch.tensor([i]))
        assert came.item() == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert table.posterior_variance[i].item() == pytest.approx(variance, rel=1e-8)
        assert table.posterior_log_variance(torch.tensor(i)).item() == pytest.approx(math.log(variance), rel=1e-6)
        log_beta = math.log(1 - alpha_bar / alpha_bar_prev)
        assert table.log_beta(torch.tensor(i)).item() == pytest.approx(log_beta, rel=1e-6)


def test_step_to_clean_data_is_x_0_itself():
    table = DiffusionTable.from_betas(cosine_betas(100)).respace(torch.tensor([3, 40]))
    x_0, x_t = torch.rand(2, 2, 1, 3, 3)
    assert torch.equal(table.posterior_mean(x_0, x_t, torch.tensor(0)), x_0)
    assert table.posterior_variance[0] == 0
    assert table.noise_factor(torch.tensor([0, 1])).flatten().tolist() == [0, 1]
    assert table.noise_factor(torch.tensor([0, 1])).shape == (2, 1, 1, 1)


def test_first_log_variance_is_the_second_of_the_respaced_table():
    full = DiffusionTable.from_betas(cosine_betas(4000))
    respaced = full.respace(torch.tensor([0, 80, 160, 3999]))
    for table in (full, respaced):
        second = conditioned_gaussian(table.alphas_cumprod[1].item(), table.alphas_cumprod[0].item(), 0, 0)[1]
        assert table.posterior_log_variance_clipped[0].item() == pytest.approx(math.log(second), rel=1e-9)
    # The two differ: which table is clipped decides the likelihood of the decoder.
    assert respaced.posterior_log_variance_clipped[0] - full.posterior_log_variance_clipped[0] > 0.5
    # A process that stops at z_s has a proper first variance, which is not touched.
    stopped = full.respace(torch.tensor([80, 160]), start=full.alpha_bar(40).item())
    first = conditioned_gaussian(full.alpha_bar(81).item(), full.alpha_bar(40).item(), 0, 0)[1]
    assert stopped.posterior_log_variance_clipped[0].item() == pytest.approx(math.log(first), rel=1e-9)


def test_learned_range_interpolates_log_variances():
    table = DiffusionTable.from_betas(linear_betas(100))
    index = torch.tensor([10, 70])
    raw = torch.tensor([-1.0, 1.0, 0.0, 0.5]).expand(2, 1, 1, 4)
    came = table.learned_range_log_variance(raw, index)
    for row, i in enumerate(index.tolist()):
        alpha_bar, alpha_bar_prev = table.alphas_cumprod[i].item(), table.alphas_cumprod[i - 1].item()
        low = math.log(conditioned_gaussian(alpha_bar, alpha_bar_prev, 0, 0)[1])
        high = math.log(1 - alpha_bar / alpha_bar_prev)
        assert low < high
        expected = [low, high, (low + high) / 2, 0.25 * low + 0.75 * high]
        np.testing.assert_allclose(came[row].flatten(), expected, rtol=1e-6)


def test_looking_up_never_waits_for_the_device():
    """Reading a value back from a meta tensor is an error, as it would be a wait on a GPU."""
    table = DiffusionTable.from_betas(cosine_betas(10))
    images = torch.zeros(2, 3, 4, 4, device="meta")
    for index in (torch.tensor(3, device="meta"), torch.tensor([3, 4], device="meta")):
        alpha, sigma = table.signal_and_noise(index, "meta")
        assert diffuse(images, images, alpha, sigma).shape == images.shape
        assert table.posterior_mean(images, images, index).shape == images.shape
        assert table.learned_range_log_variance(images, index).shape == images.shape


# ---------------------------------------------------------------------------------------------------------------------
# Forward noise


def test_diffused_moments():
    """Over 64 x 64 x 16 values the mean is within 5/256 deviations and the deviation within 5/362 of its own."""
    table = DiffusionTable.from_betas(cosine_betas(1000))
    generator = torch.Generator().manual_seed(0)
    for t in (1, 300, 700, 1000):
        noise = torch.randn(16, 1, 64, 64, generator=generator)
        x_t = diffuse(torch.full_like(noise, 0.6), noise, *table.signal_and_noise(t)).double()
        alpha_bar = table.alphas_cumprod[t - 1].item()
        sigma = math.sqrt(1 - alpha_bar)
        assert abs(x_t.mean().item() - 0.6 * math.sqrt(alpha_bar)) < 5 / 256 * sigma
        assert abs(x_t.std().item() / sigma - 1) < 5 / 362


def test_diffusing_to_0_is_the_identity_bitwise():
    table = DiffusionTable.from_betas(cosine_betas(4000))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[:, :, 0, :3] = torch.tensor([-1.0, 1.0, 1 / 3])
    for s in (0, torch.zeros(2, dtype=torch.int64)):
        assert torch.equal(diffuse(images, torch.randn(images.shape), *table.signal_and_noise(s)), images)


def test_each_image_has_its_own_noise_level():
    table = DiffusionTable.from_betas(linear_betas(100))
    x_0, noise = torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    times = [0, 17, 100]
    batched = diffuse(x_0, noise, *table.signal_and_noise(torch.tensor(times)))
    for i, t in enumerate(times):
        alpha_bar = 1.0 if t == 0 else table.alphas_cumprod[t - 1].item()
        expected = math.sqrt(alpha_bar) * x_0[i].double() + math.sqrt(1 - alpha_bar) * noise[i].double()
        np.testing.assert_allclose(batched[i], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_noised_in_float32(dtype):
    """fp16 sums would round the noise of the first step away: sigma is 0.006, and fp16 steps near 1 are 0.001."""
    table = DiffusionTable.from_betas(cosine_betas(4000))
    x_0 = torch.ones(1, 1, 8, 8, dtype=dtype)
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_1 = diffuse(x_0, noise, *table.signal_and_noise(1))
    assert x_1.dtype == torch.float32
    alpha_bar = table.alphas_cumprod[0].item()
    expected = math.sqrt(alpha_bar) + math.sqrt(1 - alpha_bar) * noise.double()
    np.testing.assert_allclose(x_1, expected, atol=1e-7)
    assert diffuse(x_0.double(), noise, *table.signal_and_noise(1)).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predictions_lead_back_to_x_0_and_epsilon(prediction_type):
    prediction = prediction_for(prediction_type)
    x_0, noise = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.tensor([0.1, 0.8, 1.5], dtype=torch.float64)
    alpha, sigma = angle.cos(), angle.sin()
    x_t = diffuse(x_0, noise, alpha, sigma)
    target = prediction.target(x_0, noise, alpha, sigma)
    torch.testing.assert_close(prediction.x_0(target, x_t, alpha, sigma), x_0)
    torch.testing.assert_close(epsilon_from_x_0(x_0, x_t, alpha, sigma), noise)


def test_velocity_is_the_derivative_of_x_t_by_the_angle():
    """Salimans and Ho (2022): v = d x_t / d phi for x_t = cos(phi) x_0 + sin(phi) epsilon."""
    x_0, noise = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    phi = torch.tensor(0.7, dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda a: diffuse(x_0, noise, a.cos(), a.sin()), (phi,), (torch.ones_like(phi),))
    torch.testing.assert_close(prediction_for("v_prediction").target(x_0, noise, phi.cos(), phi.sin()), derivative)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match=r"`prediction_type` is 'flow'.*\['epsilon', 'sample', 'v_prediction'\]"):
        prediction_for("flow")


def test_limits_of_x_0():
    config = {
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
        "clip_sample": True,
        "clip_sample_range": 0.5,
    }
    x_0 = torch.linspace(-3, 3, 22).reshape(2, 1, 1, 11)
    np.testing.assert_allclose(limit_x_0(x_0, config), np.clip(x_0.numpy(), -0.5, 0.5))
    assert torch.equal(limit_x_0(x_0, config | {"clip_sample": False}), x_0)


def test_dynamic_thresholding_against_numpy():
    """The limit of each image: the quantile of its |x_0|, at least 1 and at most `sample_max_value`."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(3, 3, 8, 8, generator=generator) * torch.tensor([0.2, 1.0, 5.0])[:, None, None, None]
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0, "clip_sample": True}
    came = limit_x_0(x_0, config)
    limits = np.quantile(np.abs(x_0.flatten(1).numpy()), 0.9, axis=1).clip(1, 3)
    assert limits[0] == 1 and 1 < limits[1] < 3 and limits[2] == 3
    for image, limit, expected in zip(came, limits, x_0, strict=True):
        np.testing.assert_allclose(image, np.clip(expected.numpy(), -limit, limit) / limit, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


def test_kl_against_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean_1, log_variance_1, mean_2, log_variance_2 = torch.randn(4, 1000, dtype=torch.float64, generator=generator) * 3
    normal_1 = torch.distributions.Normal(mean_1, (0.5 * log_variance_1).exp())
    normal_2 = torch.distributions.Normal(mean_2, (0.5 * log_variance_2).exp())
    expected = torch.distributions.kl_divergence(normal_1, normal_2)
    torch.testing.assert_close(gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2), expected)
    assert gaussian_kl(mean_1, log_variance_1, mean_1, log_variance_1).abs().max() == 0


def brute_force_nll(x_0, mean, scale):
    """-log of the mass of each bin, by scipy in float64, from the tail in which the bin lies."""
    low = (np.where(x_0 < -0.999, -np.inf, x_0 - 1 / 255) - mean) / scale
    high = (np.where(x_0 > 0.999, np.inf, x_0 + 1 / 255) - mean) / scale
    is_below = x_0 <= mean
    larger = scipy.special.log_ndtr(np.where(is_below, high, -low))
    smaller = scipy.special.log_ndtr(np.where(is_below, low, -high))
    return -(larger + np.log(-np.expm1(smaller - larger)))


@pytest.mark.parametrize("mean", [-1.7, -1.0, -0.3, 0.0, 0.999, 1.2])
@pytest.mark.parametrize("scale", [0.001, 0.005, 0.05, 0.5])
def test_nll_against_brute_force(mean, scale):
    """Every bin, the open ones at the ends included, up to 2700 deviations from the mean."""
    bins = -1 + 2 * np.arange(256) / 255
    expected = brute_force_nll(bins, mean, scale)
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
    exact = discretized_gaussian_nll(torch.from_numpy(bins), torch.tensor(mean, dtype=torch.float64), log_scale)
    np.testing.assert_allclose(exact, expected, rtol=1e-9, atol=1e-12)
    came = discretized_gaussian_nll(torch.from_numpy(bins).float(), torch.tensor(mean), log_scale.float())
    np.testing.assert_allclose(came, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("mean", [-3.0, -0.999, 0.1, 1.0])
@pytest.mark.parametrize("scale", [1e-4, 0.003, 0.1, 2.0])
def test_probabilities_of_the_bins_sum_to_1(mean, scale):
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    nll = discretized_gaussian_nll(bins, torch.tensor(mean).double(), torch.tensor(math.log(scale)).double())
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("x_0", [-1.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("mean", [-30.0, -1.0, 0.0, 0.001, 3.0])
@pytest.mark.parametrize("log_scale", [-100.0, -30.0, -23.0, -8.0, 0.0, 10.0])
def test_nll_and_its_gradients_stay_finite(x_0, mean, log_scale):
    mean, log_scale = torch.tensor(mean, requires_grad=True), torch.tensor(log_scale, requires_grad=True)
    nll = discretized_gaussian_nll(torch.tensor(x_0), mean, log_scale)
    nll.backward()
    assert nll >= 0 and nll.isfinite() and mean.grad.isfinite() and log_scale.grad.isfinite()


@pytest.mark.parametrize("x_0", [-1.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("deviations", [0.5, 3.0, 60.0, 1000.0, 1e5])
def test_gradients_of_the_nll_in_the_tails(x_0, deviations):
    """Far from the bin the gradient is that of z^2/2 at its nearest edge, where torch's own log_ndtr loses it."""
    scale = 0.002
    mean = x_0 - math.copysign(deviations * scale, x_0 - 0.1)
    step = 1e-6
    expected = (brute_force_nll(x_0, mean + step, scale) - brute_force_nll(x_0, mean - step, scale)) / (2 * step)
    mean = torch.tensor(mean, requires_grad=True)
    discretized_gaussian_nll(torch.tensor(x_0), mean, torch.tensor(math.log(scale))).backward()
    assert mean.grad.item() == pytest.approx(expected, rel=2e-3, abs=0.05)


def test_images_are_held_to_their_averages():
    """By the smallest change that there is, where nothing is clipped; and also where nearly all of it is."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(2, 3, 12, 12, generator=generator) - 0.5
    low_res = F.avg_pool2d(x_0, 4) + 0.3
    held = held_to(x_0, low_res)
    assert (held - x_0 - 0.3).abs().max() < 1e-6
    assert (held_to(held, low_res) - held).abs().max() < 1e-6
    for level in (-1.0, -0.98, 0.0, 0.98, 1.0):
        wanted = torch.full((2, 3, 3, 3), level)
        extreme = (4 * torch.randn(2, 3, 12, 12, generator=generator)).clamp(-1, 1)
        held = held_to(extreme, wanted)
        assert (F.avg_pool2d(held, 4) - wanted).abs().max() < 0.02 and held.abs().max() <= 1
        lacks = F.interpolate(wanted - F.avg_pool2d(extreme, 4), scale_factor=4)
        assert ((held - extreme) * lacks.sign() > -0.05).all()  # pixels move the way that the average has to
