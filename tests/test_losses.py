"""Losses against a float64 computation of their own: the noise is read off x_t, all else is numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.special
import torch

from cdm_diffusers import CascadedDDPMScheduler, ContinuousDDPMScheduler, HybridLoss, SimpleLoss
from cdm_diffusers.diffusion import per_image


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cosine_alpha_bars(num_steps):
    """alpha-bar at the paper's t = 0..T in float64, beta clipped at 0.999."""
    f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    f[-1] = max(f[-1], 0.001 * f[-2])
    return f / f[0]


def eight_bit_images(batch_size, size=6):
    """Values of every kind of bin: many at the ends."""
    values = torch.randint(-60, 316, (batch_size, 2, size, size), generator=seeded(5)).clamp(0, 255)
    return values / 127.5 - 1


class Network:
    """A differentiable network of no meaning, which remembers what it was asked and what it said."""

    def __init__(self, channels):
        self.channels = channels

    def __call__(self, x_t, condition):
        assert x_t.dtype == torch.float32
        phase = condition[:, None, None, None] * 0.3
        prediction = x_t * 0.9 + 0.2 * torch.sin(4 * x_t + phase)
        raw_variance = 1.2 * torch.cos(3 * x_t - phase)
        output = torch.cat([prediction, raw_variance], dim=1)[:, : self.channels]
        self.x_t, self.condition = x_t, condition
        self.output = output.detach().clone().requires_grad_()
        return self.output


def in_float64(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


def noise_of(x_t, x_0, alpha_bar):
    return (x_t - np.sqrt(alpha_bar) * x_0) / np.sqrt(1 - alpha_bar)


# ---------------------------------------------------------------------------------------------------------------------
# Simple


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("channels", [2, 4])
def test_simple_loss_by_hand(prediction_type, channels):
    """Mean over an image's values of the squared error; a learned variance does not enter."""
    scheduler = CascadedDDPMScheduler(60, prediction_type=prediction_type)
    network, images = Network(channels), eight_bit_images(50)
    loss = SimpleLoss(scheduler)(network, images, seeded())
    x_0, x_t, output = in_float64(images, network.x_t, network.output)
    assert network.condition.dtype == torch.int64 and loss.shape == (50,) and loss.dtype == torch.float32
    alpha_bar = cosine_alpha_bars(60)[network.condition.numpy() + 1][:, None, None, None]
    noise = noise_of(x_t, x_0, alpha_bar)
    target = noise if prediction_type == "epsilon" else np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * x_0
    np.testing.assert_allclose(loss.detach(), ((output[:, :2] - target) ** 2).mean(axis=(1, 2, 3)), rtol=1e-4)
    # The noise is standard normal: 3,600 values, 5 standard errors.
    assert abs(noise.mean()) < 5 / 60 and abs(noise.std() - 1) < 5 / 60 / math.sqrt(2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_simple_loss_at_continuous_noise_levels(prediction_type):
    scheduler = ContinuousDDPMScheduler(60, beta_start=1e-4, beta_end=0.1, prediction_type=prediction_type)
    network, images = Network(2), eight_bit_images(50)
    loss = SimpleLoss(scheduler)(network, images, seeded())
    x_0, x_t, output, level = in_float64(images, network.x_t, network.output, network.condition)
    assert network.condition.dtype == torch.float32 and len(set(level)) == 50 and 0 < level.min() < level.max() < 1
    alpha_bar = level[:, None, None, None] ** 2
    noise = noise_of(x_t, x_0, alpha_bar)
    target = noise if prediction_type == "epsilon" else np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * x_0
    expected = ((output - target) ** 2).mean(axis=(1, 2, 3))
    is_told = level < 0.999  # above, a float32 level does not say sigma
    assert is_told.sum() > 40
    np.testing.assert_allclose(loss.detach()[is_told], expected[is_told], rtol=1e-3)


@pytest.mark.parametrize("scheduler_class", [CascadedDDPMScheduler, ContinuousDDPMScheduler])
def test_loss_of_a_predicted_x_0_is_that_of_its_v(scheduler_class):
    """v = (sqrt(alpha_bar) x_t - x_0) / sigma, of the predicted x_0 and of the true one; 1 / 0.09 of x_0's at most."""
    scheduler = scheduler_class(1000, "squaredcos_cap_v2", prediction_type="sample")
    network, images = Network(2), eight_bit_images(200)
    loss = SimpleLoss(scheduler)(network, images, seeded()).detach()
    condition = network.condition
    alpha = scheduler.table.alphas_cumprod[condition].sqrt() if condition.dtype == torch.int64 else condition
    alpha, sigma = alpha.double(), (1 - alpha.double() ** 2).sqrt()
    x_0, x_t, output = images.double(), network.x_t.double(), network.output.detach().double()
    velocity = (
        (per_image(alpha) * x_t - output) / per_image(sigma),
        (per_image(alpha) * x_t - x_0) / per_image(sigma),
    )
    expected = ((velocity[0] - velocity[1]) ** 2).mean(dim=(1, 2, 3))
    is_clear = sigma < 0.3
    assert is_clear.any() and not is_clear.all()
    expected[is_clear] = 1 / 0.09 * ((output - x_0) ** 2).mean(dim=(1, 2, 3))[is_clear]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_loss_of_the_true_noise_is_nothing():
    scheduler = CascadedDDPMScheduler(60)
    x_0 = torch.zeros(8, 2, 6, 6)
    alpha_bars = torch.from_numpy(cosine_alpha_bars(60))

    def oracle(x_t, index):
        return x_t / (1 - alpha_bars[index + 1]).sqrt()[:, None, None, None].float()

    assert SimpleLoss(scheduler)(oracle, x_0, seeded()).max() < 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# Hybrid


def reference_vlb(x_0, x_t, output, t, alpha_bars, prediction_type):
    """T * L_t in bits per dimension of one image, in float64; output is (2C, H, W)."""
    prediction, raw = np.split(output, 2)
    alpha_bar, alpha_bar_prev = alpha_bars[t], alpha_bars[t - 1]
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    predicted_x_0 = (x_t - sigma * prediction) / alpha
    if prediction_type == "v_prediction":
        predicted_x_0 = alpha * x_t - sigma * prediction

    def posterior_variance(t):
        return (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t]) * (1 - alpha_bars[t] / alpha_bars[t - 1])

    def posterior_mean(clean):
        """The mean of x_{t-1} = a' x_0 + s' epsilon_{t-1}, by regression on x_t."""
        gain = alpha / math.sqrt(alpha_bar_prev) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        return math.sqrt(alpha_bar_prev) * clean + gain * (x_t - alpha * clean)

    v = (raw + 1) / 2
    variance = np.exp(v * np.log(1 - alpha_bar / alpha_bar_prev) + (1 - v) * np.log(posterior_variance(max(t, 2))))
    mean = posterior_mean(predicted_x_0)
    if t == 1:
        scale = np.sqrt(variance)
        low = np.where(x_0 < -0.999, -np.inf, (x_0 - 1 / 255 - mean) / scale)
        high = np.where(x_0 > 0.999, np.inf, (x_0 + 1 / 255 - mean) / scale)
        flip = low + high > 0
        larger = scipy.special.log_ndtr(np.where(flip, -low, high))
        smaller = scipy.special.log_ndtr(np.where(flip, -high, low))
        nats = -(larger + np.log(-np.expm1(smaller - larger)))
    else:
        true_variance = posterior_variance(t)
        nats = 0.5 * (
            np.log(variance / true_variance) + (true_variance + (posterior_mean(x_0) - mean) ** 2) / variance - 1
        )
    return (len(alpha_bars) - 1) * nats.mean() / math.log(2)


def vlb_of(scheduler, network, images, generator, vlb_weight=1.0):
    """What the hybrid loss adds to the simple one, over lambda."""
    hybrid = HybridLoss(scheduler, vlb_weight)(network, images, generator)
    x_0, x_t, output = in_float64(images, network.x_t, network.output)
    alpha_bars = cosine_alpha_bars(len(scheduler))
    alpha_bar = alpha_bars[network.condition.numpy() + 1][:, None, None, None]
    target = noise_of(x_t, x_0, alpha_bar)
    if scheduler.config.prediction_type == "v_prediction":
        target = np.sqrt(alpha_bar) * target - np.sqrt(1 - alpha_bar) * x_0
    simple = ((output[:, :2] - target) ** 2).mean(axis=(1, 2, 3))
    return (hybrid.detach().double().numpy() - simple) / vlb_weight


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_vlb_against_float64_at_every_t(prediction_type):
    """T * L_t in bits per dimension, the decoder's likelihood at t = 1 included: within 0.1%."""
    scheduler = CascadedDDPMScheduler(20, prediction_type=prediction_type)
    network, images = Network(4), eight_bit_images(200)
    came = vlb_of(scheduler, network, images, seeded())
    times = network.condition.numpy() + 1
    assert set(times) == set(range(1, 21))
    arrays = in_float64(images, network.x_t, network.output)
    expected = [
        reference_vlb(*image, t, cosine_alpha_bars(20), prediction_type)
        for *image, t in zip(*arrays, times, strict=True)
    ]
    np.testing.assert_allclose(came, expected, rtol=1e-3, atol=1e-3)


def test_vlb_of_the_papers_schedule():
    """T = 4000, where variances are as small as 5e-6 and T times float32's rounding shows: within 1% or 0.02 bits."""
    scheduler = CascadedDDPMScheduler()
    network, images = Network(4), eight_bit_images(300)
    came = vlb_of(scheduler, network, images, seeded())
    arrays = in_float64(images, network.x_t, network.output)
    times = network.condition.numpy() + 1
    expected = [
        reference_vlb(*image, t, cosine_alpha_bars(4000), "epsilon") for *image, t in zip(*arrays, times, strict=True)
    ]
    np.testing.assert_allclose(came, expected, rtol=0.01, atol=0.02)


def test_vlb_of_the_true_posterior_is_nothing_above_t_1():
    """x_0 known and v = 0: the Kullback-Leibler terms vanish, the decoder's does not."""
    scheduler = CascadedDDPMScheduler(20)
    alpha_bars = torch.from_numpy(cosine_alpha_bars(20))
    asked = {}

    def oracle(x_t, index):
        asked["index"] = index
        noise = x_t / (1 - alpha_bars[index + 1]).sqrt()[:, None, None, None].float()
        return torch.cat([noise, -torch.ones_like(noise)], dim=1)

    loss = HybridLoss(scheduler, 1.0)(oracle, torch.zeros(200, 2, 6, 6), seeded())
    assert loss[asked["index"] > 0].max() < 1e-3 and loss[asked["index"] == 0].min() > 1


def test_lambda_weighs_the_vlb():
    scheduler = CascadedDDPMScheduler(20)
    images, values = eight_bit_images(100), {}
    for weight in (0.0, 0.001, 0.5):
        values[weight] = HybridLoss(scheduler, weight)(Network(4), images, seeded()).detach().double()
    simple = SimpleLoss(scheduler)(Network(4), images, seeded()).detach().double()
    assert torch.equal(values[0.0], simple)
    torch.testing.assert_close(values[0.001] - simple, (values[0.5] - simple) / 500, rtol=1e-2, atol=1e-5)
    default = HybridLoss(scheduler)(Network(4), images, seeded()).detach().double()
    assert torch.equal(default, values[0.001])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_vlb_moves_only_the_variance(prediction_type):
    """The mean's gradient is bitwise that of the simple loss, at every t; the variance's comes from L_vlb alone."""
    scheduler = CascadedDDPMScheduler(20, prediction_type=prediction_type)
    images, simple, hybrid = eight_bit_images(200), Network(4), Network(4)
    SimpleLoss(scheduler)(simple, images, seeded()).sum().backward()
    HybridLoss(scheduler, 1.0)(hybrid, images, seeded()).sum().backward()
    assert set(hybrid.condition.tolist()) == set(range(20))
    assert torch.equal(hybrid.output.grad[:, :2], simple.output.grad[:, :2])
    assert (simple.output.grad[:, :2].flatten(1).norm(dim=1) > 0).all()
    assert (simple.output.grad[:, 2:] == 0).all()
    assert (hybrid.output.grad[:, 2:].flatten(1).norm(dim=1) > 0).all()


def test_gradient_of_the_variance_is_that_of_the_float64_vlb():
    """Central differences of the reference along the gradient's own direction, each image: within 1%."""
    scheduler = CascadedDDPMScheduler(20)
    network, images = Network(4), eight_bit_images(100)
    HybridLoss(scheduler, 1.0)(network, images, seeded()).sum().backward()
    gradients = network.output.grad.double().numpy()
    arrays = in_float64(images, network.x_t, network.output)
    for x_0, x_t, output, gradient, index in zip(*arrays, gradients, network.condition.numpy(), strict=True):
        direction = np.concatenate([np.zeros_like(x_0), gradient[2:] / np.linalg.norm(gradient[2:])])
        ahead, behind = (
            reference_vlb(x_0, x_t, output + step * direction, index + 1, cosine_alpha_bars(20), "epsilon")
            for step in (1e-4, -1e-4)
        )
        assert np.linalg.norm(gradient[2:]) == pytest.approx((ahead - behind) / 2e-4, rel=0.01), index


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("scheduler_class", [CascadedDDPMScheduler, ContinuousDDPMScheduler])
def test_hybrid_loss_needs_a_learned_variance(scheduler_class, variance_type):
    with pytest.raises(ValueError, match=f"`variance_type` is '{variance_type}'.*use SimpleLoss"):
        HybridLoss(scheduler_class(variance_type=variance_type))


# ---------------------------------------------------------------------------------------------------------------------
# Both


@pytest.mark.parametrize("loss_class", [SimpleLoss, HybridLoss])
def test_loss_is_decided_by_the_generator(loss_class):
    loss, images = loss_class(CascadedDDPMScheduler(60)), eight_bit_images(4)
    one, same, other = (loss(Network(4), images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.isclose(one, other).any()


@pytest.mark.parametrize("loss_class", [SimpleLoss, HybridLoss])
def test_half_precision_networks_are_scored_in_float32(loss_class):
    loss, images, network = loss_class(CascadedDDPMScheduler(60)), eight_bit_images(4), Network(4)

    def in_half(x_t, condition):
        return network(x_t, condition).bfloat16()

    came = loss(in_half, images, seeded())
    assert came.dtype == torch.float32
    rounded = loss(lambda x_t, condition: network(x_t, condition).bfloat16().float(), images, seeded())
    assert torch.equal(came, rounded)
