"""Both schedulers against Diffusers, float64 recursions written here, and Gaussians whose exact denoiser is known."""

import copy
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr

from cdm_diffusers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from cdm_diffusers.pipelines.solvers import SOLVER_CLASSES


SOLVERS = [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
SCHEDULERS = [CascadedDDPMScheduler, ContinuousDDPMScheduler]
COSINE = "squaredcos_cap_v2"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cosine_alpha_bars(num_steps):
    """alpha-bar at the paper's t = 0..T in float64, beta clipped at 0.999."""
    f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    f[-1] = max(f[-1], 0.001 * f[-2])
    return f / f[0]


def linear_alpha_bars(num_steps, beta_start, beta_end):
    betas = [beta_start + (beta_end - beta_start) * i / (num_steps - 1) for i in range(num_steps)]
    return np.array([1.0, *np.exp(np.cumsum(np.log1p(-np.array(betas))))])


def posterior(alpha_bar, alpha_bar_prev):
    """(coefficient of x_0, of x_t, variance) of q(x_{t-1} | x_t, x_0), by adding precisions."""
    if alpha_bar_prev == 1:
        return 1.0, 0.0, 0.0
    alpha = alpha_bar / alpha_bar_prev
    prior, likelihood = 1 / (1 - alpha_bar_prev), alpha / (1 - alpha)
    variance = 1 / (prior + likelihood)
    return variance * prior * math.sqrt(alpha_bar_prev), variance * likelihood / math.sqrt(alpha), variance


def wavy_output(x_t, timestep, channels):
    """A network of no meaning, but of every sign and beyond the clip; the second half is a raw variance."""
    phase = timestep / 100
    output = 0.8 * x_t + 0.4 * torch.sin(5 * x_t + phase)
    return torch.cat([output, torch.cos(3 * x_t - phase)], dim=1)[:, :channels]


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers' DDPMScheduler, where it is right


def test_grid_is_that_of_diffusers_for_any_number_of_steps():
    ours = CascadedDDPMScheduler(1000)
    theirs = DDPMScheduler(1000, timestep_spacing="linspace")
    for num_steps in range(2, 1001):
        ours.set_timesteps(num_steps)
        theirs.set_timesteps(num_steps)
        assert torch.equal(ours.timesteps, theirs.timesteps), num_steps
    ours.set_timesteps(1)
    assert ours.timesteps.tolist() == [999]
    assert ours.timesteps.dtype == torch.int64 and len(ours) == 1000
    assert ours.order == 1 and ours.init_noise_sigma == 1.0


@pytest.mark.parametrize("limits", [{}, {"clip_sample_range": 0.5}, {"thresholding": True, "sample_max_value": 1.8}])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_trajectory_is_that_of_ddpm_scheduler(variance_type, prediction_type, limits):
    """Whole trajectories; x_0 within 1e-4, the limit of its float32 tables where it divides by alpha-bar."""
    config = {"variance_type": variance_type, "prediction_type": prediction_type, "timestep_spacing": "linspace"}
    config |= {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, **limits}
    ours, theirs = CascadedDDPMScheduler(1000, **config), DDPMScheduler(1000, **config)
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    x_ours = x_theirs = torch.randn(2, 3, 4, 4, generator=seeded())
    generator_ours, generator_theirs = seeded(1), seeded(1)
    for timestep in theirs.timesteps:
        channels = 6 if variance_type == "learned_range" else 3
        step_ours = ours.step(wavy_output(x_ours, timestep, channels), timestep, x_ours, generator_ours)
        step_theirs = theirs.step(wavy_output(x_theirs, timestep, channels), timestep, x_theirs, generator_theirs)
        torch.testing.assert_close(step_ours.pred_original_sample, step_theirs.pred_original_sample, atol=1e-4, rtol=0)
        x_ours, x_theirs = step_ours.prev_sample, step_theirs.prev_sample
        torch.testing.assert_close(x_ours, x_theirs, atol=2e-5, rtol=2e-5)


def test_continuous_trajectory_is_that_of_ddpm_scheduler():
    """At levels of the training schedule the continuous scheduler takes DDPMScheduler's steps."""
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "variance_type": "fixed_large"}
    ours = ContinuousDDPMScheduler(1000, **config)
    theirs = DDPMScheduler(1000, timestep_spacing="linspace", **config)
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    assert ours.timesteps.tolist() == list(range(49, -1, -1))
    x_ours = x_theirs = torch.randn(2, 3, 4, 4, generator=seeded())
    generator_ours, generator_theirs = seeded(1), seeded(1)
    for position, timestep in zip(ours.timesteps, theirs.timesteps, strict=True):
        x_ours = ours.step(wavy_output(x_ours, timestep, 3), position, x_ours, generator_ours).prev_sample
        x_theirs = theirs.step(wavy_output(x_theirs, timestep, 3), timestep, x_theirs, generator_theirs).prev_sample
        torch.testing.assert_close(x_ours, x_theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_forward_noise_and_velocity_have_diffusers_signatures(scheduler_class):
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    ours, theirs = scheduler_class(1000, **config), DDPMScheduler(1000, **config)
    x_0, noise = torch.randn(2, 3, 3, 4, 4, generator=seeded())
    timesteps = torch.tensor([0, 400, 999])
    torch.testing.assert_close(
        ours.add_noise(x_0, noise, timesteps), theirs.add_noise(x_0, noise, timesteps), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        ours.get_velocity(x_0, noise, timesteps), theirs.get_velocity(x_0, noise, timesteps), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(ours.scale_model_input(x_0, timesteps[0]), x_0)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's schedule, where float32 tables are not right: against float64


def reference_trajectory(x_t, noises, alpha_bars, times, stop_at):
    """Ancestral sampling with a learned variance in float64, from the equations of Section 2.1 (clip at 1)."""
    levels = [*times, stop_at]
    log_variances = []
    for t, t_prev in itertools.pairwise(levels):
        variance = posterior(alpha_bars[t], alpha_bars[t_prev])[2]
        log_variances.append(
            (math.log(variance) if variance else None, math.log(1 - alpha_bars[t] / alpha_bars[t_prev]))
        )
    for step, (t, t_prev) in enumerate(itertools.pairwise(levels)):
        output = wavy_output(torch.from_numpy(x_t), t - 1, 2).numpy()
        epsilon, raw = output[:, :1], output[:, 1:]
        x_0 = (x_t - math.sqrt(1 - alpha_bars[t]) * epsilon) / math.sqrt(alpha_bars[t])
        coef_x_0, coef_x_t, variance = posterior(alpha_bars[t], alpha_bars[t_prev])
        x_t = coef_x_0 * x_0.clip(-1, 1) + coef_x_t * x_t
        if variance:
            low, high = log_variances[step]
            x_t = x_t + np.exp(0.5 * ((raw + 1) / 2 * high + (1 - raw) / 2 * low)) * noises[step]
    return x_t


@pytest.mark.parametrize("stop_at", [0, 1, 1000, 3999])
@pytest.mark.parametrize("num_steps", [1, 7, 60])
def test_cosine_4000_trajectory_against_float64(num_steps, stop_at):
    """With the same noise; within 1e-4, since the first step divides by sqrt(alpha-bar) = 1e-5 what float32 rounds."""
    scheduler = CascadedDDPMScheduler()
    scheduler.set_timesteps(num_steps, stop_at=stop_at)
    grid = np.linspace(1, 4000, num_steps) if num_steps > 1 else np.array([4000.0])
    times = [int(t) for t in np.round(grid - 1)[::-1] + 1 if t > stop_at]
    assert (scheduler.timesteps + 1).tolist() == times
    x_t = torch.randn(1, 1, 16, 16, generator=seeded())
    generator = seeded(1)
    noises = [torch.randn(x_t.shape, generator=generator).double().numpy() for _ in times]
    expected = reference_trajectory(x_t.double().numpy(), noises, cosine_alpha_bars(4000), times, stop_at)
    generator = seeded(1)
    for timestep in scheduler.timesteps:
        x_t = scheduler.step(wavy_output(x_t, timestep, 2), timestep, x_t, generator).prev_sample
    np.testing.assert_allclose(x_t.double(), expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# A Gaussian N(m, c^2) whose exact denoiser is known

MEAN, DEVIATION = 0.3, 0.4
T = 200


class ExactDenoiser:
    """E[x_0 | x_t] of N(m, c^2) as epsilon or v, and the raw variance that makes every step exact."""

    def __init__(self, alpha_bars, prediction_type, best_variance):
        self.alpha_bars, self.prediction_type, self.best_variance = alpha_bars, prediction_type, best_variance

    def slope(self, alpha_bar):
        """of E[x_0 | x_t] = m + slope * (x_t - sqrt(alpha_bar) m)"""
        return DEVIATION**2 * math.sqrt(alpha_bar) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)

    def variance(self, alpha_bar, alpha_bar_prev):
        """of p(x_{t-1} | x_t): beta~ and what x_0 is uncertain by"""
        uncertainty = DEVIATION**2 * (1 - alpha_bar) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
        coef_x_0, _, variance = posterior(alpha_bar, alpha_bar_prev)
        return variance + coef_x_0**2 * uncertainty

    def __call__(self, x_t, t, t_prev):
        alpha_bar, alpha_bar_prev = self.alpha_bars[t], self.alpha_bars[t_prev]
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x_0 = MEAN + self.slope(alpha_bar) * (x_t - alpha * MEAN)
        epsilon = (x_t - alpha * x_0) / sigma
        outputs = {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * x_0, "sample": x_0}
        output = outputs[self.prediction_type]
        if not self.best_variance:
            return output
        raw = 0.0
        if alpha_bar_prev < 1:
            low = math.log(posterior(alpha_bar, alpha_bar_prev)[2])
            high = math.log(1 - alpha_bar / alpha_bar_prev)
            raw = 2 * (math.log(self.variance(alpha_bar, alpha_bar_prev)) - low) / (high - low) - 1
        return torch.cat([output, torch.full_like(output, raw)], dim=1)


def exact_recursion(denoiser, times, stop_at, variance_type):
    """Mean and variance of the sample in float64, from N(0, 1)."""
    mean, variance, levels = 0.0, 1.0, [*times, stop_at]
    for t, t_prev in itertools.pairwise(levels):
        alpha_bar, alpha_bar_prev = denoiser.alpha_bars[t], denoiser.alpha_bars[t_prev]
        coef_x_0, coef_x_t, added = posterior(alpha_bar, alpha_bar_prev)
        slope = denoiser.slope(alpha_bar)
        if variance_type == "fixed_large":
            added = 1 - alpha_bar / alpha_bar_prev
        elif variance_type == "learned_range":
            added = denoiser.variance(alpha_bar, alpha_bar_prev)
        added = 0 if t_prev == 0 else added
        gain = coef_x_0 * slope + coef_x_t
        mean = gain * mean + coef_x_0 * MEAN * (1 - slope * math.sqrt(alpha_bar))
        variance = gain**2 * variance + added
    return mean, variance


def measured_recursion(scheduler, denoiser, times, stop_at):
    """Mean and variance of the sample, from the affine map that each `step` turns out to be."""
    mean, variance, levels = 0.0, 1.0, [*times, stop_at]
    inputs = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None, None].expand(2, 1, 1, 32)
    noise = torch.randn(1, 1, 1, 32, generator=seeded(), dtype=torch.float64).flatten()
    design = torch.stack([torch.ones_like(noise), noise], dim=1)
    for timestep, t, t_prev in zip(scheduler.timesteps, times, levels[1:], strict=True):
        output = denoiser(inputs, t, t_prev)
        at_0, at_1 = scheduler.step(output, timestep, inputs, [seeded(), seeded()]).prev_sample.flatten(1)
        offset, scale = torch.linalg.lstsq(design, at_0[:, None]).solution.flatten().tolist()
        gain = (at_1 - at_0).mean().item()
        assert torch.allclose(at_0, offset + scale * noise, atol=1e-9)
        mean, variance = gain * mean + offset, gain**2 * variance + scale**2
    return mean, variance


def gaussian_case(variance_type, prediction_type="epsilon", num_steps=T, schedule="squaredcos_cap_v2"):
    scheduler = CascadedDDPMScheduler(
        num_steps, schedule, variance_type=variance_type, prediction_type=prediction_type, clip_sample=False
    )
    if schedule == "linear":
        alpha_bars = linear_alpha_bars(num_steps, 0.1 / num_steps, 20 / num_steps)
    else:
        alpha_bars = cosine_alpha_bars(num_steps)
    return scheduler, ExactDenoiser(alpha_bars, prediction_type, variance_type == "learned_range")


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_known_gaussian_follows_the_float64_recursion(variance_type, prediction_type, schedule):
    """For every n and s; within 1e-5, since tables are handed out in float32."""
    scheduler, denoiser = gaussian_case(variance_type, prediction_type, schedule=schedule)
    for num_steps in (1, 2, 5, 20, T):
        for stop_at in (0, 1, T // 4, T - 1, T):
            scheduler.set_timesteps(num_steps, stop_at=stop_at)
            times = (scheduler.timesteps + 1).tolist()
            expected = exact_recursion(denoiser, times, stop_at, variance_type)
            came = measured_recursion(scheduler, denoiser, times, stop_at)
            assert came == pytest.approx(expected, abs=1e-5), (num_steps, stop_at)
            if variance_type == "learned_range":
                # With the best variance every step is exact, but for the last one's missing noise at s = 0.
                alpha_bar = denoiser.alpha_bars[stop_at]
                assert came[0] == pytest.approx(math.sqrt(alpha_bar) * MEAN, abs=0.01)
                if stop_at > 0:
                    assert came[1] == pytest.approx(alpha_bar * DEVIATION**2 + 1 - alpha_bar, abs=0.01)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_sampled_moments_of_the_known_gaussian(variance_type):
    """The whole loop in float32 on 65,536 values: mean within 5 standard errors, deviation within 5."""
    scheduler, denoiser = gaussian_case(variance_type)
    for num_steps, stop_at in ((1, 50), (5, 0), (20, 1), (20, 50), (T, 0), (T, T)):
        scheduler.set_timesteps(num_steps, stop_at=stop_at)
        generator = seeded(num_steps)
        x_t = torch.randn(1, 1, 256, 256, generator=generator)
        times = (scheduler.timesteps + 1).tolist()
        for timestep, t, t_prev in zip(scheduler.timesteps, times, [*times, stop_at][1:], strict=True):
            x_t = scheduler.step(denoiser(x_t, t, t_prev), timestep, x_t, generator).prev_sample
        mean, variance = exact_recursion(denoiser, times, stop_at, variance_type)
        deviation = math.sqrt(variance)
        assert abs(x_t.mean().item() - mean) < 5 / 256 * deviation + 1e-4, (num_steps, stop_at)
        assert abs(x_t.std().item() - deviation) < 5 / 256 / math.sqrt(2) * deviation + 1e-4, (num_steps, stop_at)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_moments_reach_the_datas_as_steps_reach_t(variance_type):
    """The error of the deviation falls as 1/n, and at T = 4000 is below 0.2%."""
    scheduler, denoiser = gaussian_case(variance_type, num_steps=4000)
    errors = []
    for num_steps in (8, 64, 512, 4000):
        scheduler.set_timesteps(num_steps)
        mean, variance = measured_recursion(scheduler, denoiser, (scheduler.timesteps + 1).tolist(), 0)
        assert mean == pytest.approx(MEAN, abs=2e-4)
        errors.append(abs(math.sqrt(variance) / DEVIATION - 1))
    assert all(few > 4 * many for few, many in itertools.pairwise(errors)) and errors[-1] < 2e-3, errors


def test_restart_from_forward_noise_keeps_the_datas_moments():
    """x_t of the data at `start_at`, then down to z_s: its marginal again, in one step or many."""
    scheduler, denoiser = gaussian_case("learned_range", "v_prediction")
    for num_steps, start_at, stop_at in ((1, 150, 20), (7, 150, 20), (20, 33, 32), (T, 199, 3)):
        scheduler.set_timesteps(num_steps, stop_at=stop_at, start_at=start_at)
        generator = seeded(start_at)
        x_0 = MEAN + DEVIATION * torch.randn(1, 1, 256, 256, generator=generator)
        x_t = scheduler.forward_marginal(x_0, start_at, generator)
        times = (scheduler.timesteps + 1).tolist()
        assert times[0] == start_at
        for timestep, t, t_prev in zip(scheduler.timesteps, times, [*times, stop_at][1:], strict=True):
            x_t = scheduler.step(denoiser(x_t, t, t_prev), timestep, x_t, generator).prev_sample
        alpha_bar = denoiser.alpha_bars[stop_at]
        deviation = math.sqrt(alpha_bar * DEVIATION**2 + 1 - alpha_bar)
        assert abs(x_t.mean().item() - math.sqrt(alpha_bar) * MEAN) < 5 / 256 * deviation
        assert abs(x_t.std().item() / deviation - 1) < 5 / 256 / math.sqrt(2)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_continuous_sampling_of_the_known_gaussian(variance_type):
    """A schedule of its own at inference, of any number of steps: the float64 recursion on its levels."""
    config = {"variance_type": variance_type, "clip_sample": False, "inference_beta_schedule": "linear"}
    config |= {"inference_beta_start": 1e-4, "inference_beta_end": 0.1}
    scheduler = ContinuousDDPMScheduler(T, "squaredcos_cap_v2", **config)
    training = cosine_alpha_bars(T)
    for num_steps, stop_at in ((60, 0), (60, 50), (300, 0), (300, 1)):
        scheduler.set_timesteps(num_steps, stop_at=stop_at)
        levels = linear_alpha_bars(num_steps, 1e-4, 0.1)
        levels = np.array([training[stop_at], *levels[levels < training[stop_at]]])
        np.testing.assert_allclose(scheduler.inference_table.alphas_cumprod, levels[1:], rtol=1e-9)
        denoiser = ExactDenoiser(levels, "epsilon", False)
        times = list(range(len(levels) - 1, 0, -1))
        came = measured_recursion(scheduler, denoiser, times, 0)
        if stop_at == 0:
            assert came == pytest.approx(exact_recursion(denoiser, times, 0, variance_type), abs=1e-5)
        else:
            expected = exact_recursion(denoiser, times[:-1], 1, variance_type)
            coef_x_0, coef_x_t, added = posterior(levels[1], levels[0])
            added = 1 - levels[1] / levels[0] if variance_type == "fixed_large" else added
            slope = denoiser.slope(levels[1])
            gain = coef_x_0 * slope + coef_x_t
            mean = gain * expected[0] + coef_x_0 * MEAN * (1 - slope * math.sqrt(levels[1]))
            assert came == pytest.approx((mean, gain**2 * expected[1] + added), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Grids: truncation and restart


def test_truncation_keeps_the_grid_above_s_and_lands_on_z_s():
    scheduler = CascadedDDPMScheduler(1000)
    scheduler.set_timesteps(11)
    whole = (scheduler.timesteps + 1).tolist()
    for s in (0, 1, 100, 101, 102, 999, 1000):
        scheduler.set_timesteps(11, stop_at=s)
        assert (scheduler.timesteps + 1).tolist() == [t for t in whole if t > s]
        table = scheduler.inference_table
        assert len(table) == len(scheduler.timesteps)
        if s < 1000:
            assert table.alphas_cumprod_prev[0].item() == pytest.approx(cosine_alpha_bars(1000)[s], rel=1e-12)
    assert len(scheduler.timesteps) == 0


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_no_step_is_left_at_s_equal_to_t(scheduler_class):
    scheduler = scheduler_class(100)
    scheduler.set_timesteps(7, stop_at=100)
    assert scheduler.timesteps.shape == (0,) and len(scheduler.inference_table) == 0
    with pytest.raises(ValueError, match=r"must be one of `timesteps`, \[\]"):
        scheduler.step(torch.zeros(1, 2, 2, 2), 99, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_last_step_is_noisy_unless_it_arrives_at_clean_data(scheduler_class):
    scheduler = scheduler_class(100, variance_type="fixed_large")
    x_t, output = torch.randn(2, 1, 1, 4, 4, generator=seeded())
    for stop_at in (0, 1, 30):
        scheduler.set_timesteps(9, stop_at=stop_at)
        first, last = scheduler.timesteps[0], scheduler.timesteps[-1]
        a, b = (scheduler.step(output, last, x_t, seeded(seed)).prev_sample for seed in (0, 1))
        assert torch.equal(a, b) == (stop_at == 0)
        a, b = (scheduler.step(output, first, x_t, seeded(seed)).prev_sample for seed in (0, 1))
        assert not torch.equal(a, b)
    scheduler.set_timesteps(9)
    step = scheduler.step(output, scheduler.timesteps[-1], x_t)
    assert torch.equal(step.prev_sample, step.pred_original_sample)


def test_restart_begins_exactly_at_start_at():
    scheduler = CascadedDDPMScheduler(1000)
    scheduler.set_timesteps(11)
    whole = (scheduler.timesteps + 1).tolist()
    for start_at, stop_at in ((1000, 0), (1, 0), (500, 0), (701, 100), (101, 100)):
        scheduler.set_timesteps(11, start_at=start_at, stop_at=stop_at)
        expected = [start_at, *(t for t in whole if stop_at < t < start_at)]
        assert (scheduler.timesteps + 1).tolist() == expected
        assert scheduler.inference_table.alphas_cumprod[-1].item() == pytest.approx(
            cosine_alpha_bars(1000)[start_at], rel=1e-9
        )


def test_continuous_restart_and_truncation_cut_the_levels():
    scheduler = ContinuousDDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
    alpha_bars = linear_alpha_bars(1000, 1e-4, 0.02)
    times = np.round(np.linspace(0, 999, 11)).astype(int) + 1
    scheduler.set_timesteps(11, stop_at=150, start_at=820)
    expected = [alpha_bars[t] for t in times if 150 < t < 820] + [alpha_bars[820]]
    np.testing.assert_allclose(scheduler.inference_table.alphas_cumprod, expected, rtol=1e-9)
    assert scheduler.inference_table.alphas_cumprod_prev[0].item() == pytest.approx(alpha_bars[150], rel=1e-9)
    assert scheduler.timesteps.tolist() == list(range(len(expected) - 1, -1, -1))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [0, -3, 2.0, 2.5, "2", None, True, 101, 10**12])
def test_wrong_numbers_of_steps_are_refused(scheduler_class, num_steps):
    with pytest.raises(ValueError, match="`num_inference_steps` is"):
        scheduler_class(100).set_timesteps(num_steps)
    if num_steps != 101:
        with pytest.raises(ValueError, match=r"`num_train_timesteps` is .*; it must be an integer in 1\.\.1000000"):
            scheduler_class(num_steps)


@pytest.mark.parametrize("timesteps", [[999, 750, 321, 320, 0], [640, 80, 7], [5]])
def test_custom_timesteps_are_those_of_ddpm_scheduler(timesteps):
    """The same trajectory as Diffusers' own, which takes the step before to be the next of the list, too."""
    ours, theirs = CascadedDDPMScheduler(1000, "linear", 1e-4, 0.02, "fixed_small"), DDPMScheduler()
    ours.set_timesteps(timesteps=timesteps)
    theirs.set_timesteps(timesteps=timesteps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist() == timesteps
    assert ours.num_inference_steps == len(timesteps)
    x = y = torch.randn(2, 3, 4, 4, generator=seeded())
    one, other = seeded(1), seeded(1)
    for timestep in ours.timesteps:
        output = wavy_output(x, int(timestep), 3)
        x = ours.step(output, timestep, x, one).prev_sample
        y = theirs.step(output, timestep, y, other).prev_sample
        if timestep > 0:
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    ours.set_timesteps(timesteps=torch.tensor([30, 20, 10]), stop_at=15)
    assert ours.timesteps.tolist() == [30, 20]


@pytest.mark.parametrize(
    "timesteps", [[], [5, 5], [3, 4], [100, 3], [3, -1], [2.5, 1], ["3"], 7, "73", [[3, 2]], [True], torch.zeros(1)]
)
def test_wrong_custom_timesteps_are_refused(timesteps):
    with pytest.raises(ValueError, match=r"`timesteps` is .*; it must be a list of indices in 0\.\.99, from high"):
        CascadedDDPMScheduler(100).set_timesteps(timesteps=timesteps)


def test_custom_timesteps_replace_their_number():
    with pytest.raises(ValueError, match="`num_inference_steps` and `timesteps` were both given"):
        CascadedDDPMScheduler(100).set_timesteps(2, timesteps=[3, 2])


@pytest.mark.parametrize("scheduler_class", [CascadedDDPMScheduler, ContinuousDDPMScheduler])
def test_integers_of_numpy_are_taken(scheduler_class, tmp_path):
    scheduler, expected = scheduler_class(np.int64(100)), scheduler_class(100)
    scheduler.set_timesteps(np.int64(20), stop_at=np.int32(10), start_at=np.uint8(90))
    expected.set_timesteps(20, stop_at=10, start_at=90)
    assert torch.equal(scheduler.timesteps, expected.timesteps)
    assert torch.equal(scheduler.inference_table.alphas_cumprod, expected.inference_table.alphas_cumprod)
    assert type(scheduler.num_inference_steps) is int
    scheduler.save_pretrained(tmp_path)
    assert scheduler_class.from_pretrained(tmp_path).config.items() >= scheduler_class(100).config.items()
    for arguments in ({"num_inference_steps": np.bool_(True)}, {"num_inference_steps": 5, "stop_at": np.bool_(True)}):
        with pytest.raises(ValueError, match="is True; it must be an integer in"):
            scheduler.set_timesteps(**arguments)


def test_timesteps_of_numpy_are_taken():
    scheduler, expected = CascadedDDPMScheduler(100), CascadedDDPMScheduler(100)
    scheduler.set_timesteps(timesteps=[np.int64(70), np.int32(20)])
    expected.set_timesteps(timesteps=[70, 20])
    assert torch.equal(scheduler.timesteps, expected.timesteps)
    with pytest.raises(ValueError, match=r"`timesteps` is .*; it must be a list of indices"):
        scheduler.set_timesteps(timesteps=[np.int64(70), np.bool_(True)])


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_compatibles_are_the_supported_schedulers(scheduler_class):
    assert set(scheduler_class(10).compatibles) == {scheduler_class, *SOLVER_CLASSES}


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("name", ["stop_at", "start_at"])
@pytest.mark.parametrize("time", [-1, 101, 1.5])
def test_times_out_of_range_are_refused(scheduler_class, name, time):
    with pytest.raises(ValueError, match=rf"`{name}` is {time}; it must be an integer in 0\.\.100"):
        scheduler_class(100).set_timesteps(10, **{name: time})


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("stop_at, start_at", [(0, 0), (40, 40), (50, 40)])
def test_restart_below_truncation_is_refused(scheduler_class, stop_at, start_at):
    with pytest.raises(ValueError, match=f"`start_at` is {start_at}; it must be above `stop_at`, which is {stop_at}"):
        scheduler_class(100).set_timesteps(10, stop_at=stop_at, start_at=start_at)


# ---------------------------------------------------------------------------------------------------------------------
# Steps: batches, generators, dtypes


def learned_case(batch_size=3):
    scheduler = CascadedDDPMScheduler(100)
    scheduler.set_timesteps(10)
    x_t = torch.randn(batch_size, 2, 4, 4, generator=seeded())
    return scheduler, x_t, wavy_output(x_t, 50, 4)


def test_batched_timesteps_are_calls_of_each_image():
    scheduler, x_t, output = learned_case()
    timesteps = scheduler.timesteps[[0, 5, 9]]
    together = scheduler.step(output, timesteps, x_t, [seeded(i) for i in range(3)])
    for i in range(3):
        alone = scheduler.step(output[i : i + 1], int(timesteps[i]), x_t[i : i + 1], seeded(i))
        assert torch.equal(together.prev_sample[i], alone.prev_sample[0])
        assert torch.equal(together.pred_original_sample[i], alone.pred_original_sample[0])


def test_generators_decide_the_noise_image_by_image():
    scheduler, x_t, output = learned_case()
    timestep = scheduler.timesteps[3]
    together = scheduler.step(output, timestep, x_t, [seeded(i) for i in range(3)]).prev_sample
    for i in range(3):
        alone = scheduler.step(output[i : i + 1], timestep, x_t[i : i + 1], seeded(i)).prev_sample
        assert torch.equal(together[i], alone[0])
    one, same, other = (scheduler.step(output, timestep, x_t, seeded(s)).prev_sample for s in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)
    x_0 = torch.rand(3, 2, 4, 4)
    together = scheduler.forward_marginal(x_0, 60, [seeded(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(together[i], scheduler.forward_marginal(x_0[i : i + 1], 60, seeded(i))[0])


def test_step_without_noise_levels_of_the_grid_is_refused():
    scheduler, x_t, output = learned_case()
    for timestep in (50, -1, 100, torch.tensor([99, 98, 0])):
        with pytest.raises(ValueError, match=r"`timestep` is .*; it must be one of `timesteps`, \[99, 88, 77"):
            scheduler.step(output, timestep, x_t)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"timestep": None}, "`timestep` is None; it must be an integer or an int64 tensor"),
        ({"timestep": 2.5}, r"`timestep` is 2\.5; it must be an integer"),
        ({"timestep": "3"}, "`timestep` is '3'; it must be an integer"),
        ({"timestep": True}, "`timestep` is True; it must be an integer"),
        ({"timestep": torch.tensor(2.5)}, r"`timestep` is a torch\.float32 tensor; it must be an integer"),
        (
            {"timestep": torch.tensor([3, 3])},
            r"`timestep` is of shape \(2,\); it must be a single one, or one for each",
        ),
        ({"timestep": torch.tensor([[3]])}, r"`timestep` is of shape \(1, 1\); it must be a single one"),
        ({"sample": None}, r"`sample` is None; it must be floats of shape \(B, C, H, W\)"),
        ({"sample": torch.tensor(1.0)}, r"`sample` is torch\.float32 of shape \(\); it must be floats of shape"),
        ({"model_output": None}, "`model_output` is None; it must be floats"),
        ({"model_output": torch.zeros(2, 1, 4, 4)}, r"`model_output` is of shape \(2, 1, 4, 4\); .* as `sample`"),
        ({"model_output": torch.zeros(3, 1, 8, 8)}, r"`model_output` is of shape \(3, 1, 8, 8\); .* as `sample`"),
    ],
)
def test_wrong_arguments_of_a_step_are_named(scheduler_class, changes, message):
    scheduler = scheduler_class(10, variance_type="fixed_small")
    arguments = {"model_output": torch.zeros(3, 1, 4, 4), "timestep": 3, "sample": torch.zeros(3, 1, 4, 4)}
    scheduler.step(**arguments)
    with pytest.raises(ValueError, match=message):
        scheduler.step(**arguments | changes)


@pytest.mark.parametrize("variance_type, channels", [("learned_range", 2), ("learned_range", 3), ("fixed_small", 3)])
def test_wrong_channels_of_the_output_are_refused(variance_type, channels):
    scheduler = CascadedDDPMScheduler(100, variance_type=variance_type)
    needed = 4 if variance_type == "learned_range" else 2
    with pytest.raises(ValueError, match=rf"has {channels} channels for a sample of 2; .*{variance_type}.*{needed}"):
        scheduler.step(torch.zeros(1, channels, 4, 4), 3, torch.zeros(1, 2, 4, 4))


def test_fixed_variances_ignore_a_learned_one():
    scheduler = CascadedDDPMScheduler(100, variance_type="fixed_small")
    x_t = torch.randn(1, 2, 4, 4, generator=seeded())
    with_variance = scheduler.step(wavy_output(x_t, 50, 4), 50, x_t, seeded()).prev_sample
    assert torch.equal(with_variance, scheduler.step(wavy_output(x_t, 50, 2), 50, x_t, seeded()).prev_sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_run_in_float32_at_least(dtype):
    scheduler, x_t, output = learned_case()
    x_t, output, timestep = x_t.to(dtype), output.to(dtype), scheduler.timesteps[4]
    step = scheduler.step(output, timestep, x_t, seeded())
    assert step.prev_sample.dtype == step.pred_original_sample.dtype == torch.float32
    assert torch.equal(step.prev_sample, scheduler.step(output.float(), timestep, x_t.float(), seeded()).prev_sample)
    assert scheduler.step(output.double(), timestep, x_t.double(), seeded()).prev_sample.dtype == torch.float64
    assert scheduler.forward_marginal(x_t, 1, seeded()).dtype == torch.float32


def test_step_as_a_tuple():
    scheduler, x_t, output = learned_case()
    step = scheduler.step(output, 99, x_t, seeded())
    prev_sample, x_0 = scheduler.step(output, 99, x_t, seeded(), return_dict=False)
    assert torch.equal(prev_sample, step.prev_sample) and torch.equal(x_0, step.pred_original_sample)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("device", ["meta", None])
def test_sampling_never_waits_for_the_device(scheduler_class, device):
    """Reading a value from a meta tensor is an error, as it would be a wait on a GPU. The grid may be on the CPU."""
    scheduler = scheduler_class(100)
    scheduler.set_timesteps(10, device, stop_at=3)
    x_t = torch.zeros(2, 3, 4, 4, device="meta")
    for timestep in (scheduler.timesteps[0], scheduler.timesteps[:2]):
        assert timestep.device.type == (device or "cpu")
        output = torch.zeros(2, 6, 4, 4, device="meta")
        assert scheduler.step(output, timestep, x_t).prev_sample.shape == x_t.shape
    assert scheduler.forward_marginal(x_t, torch.zeros(2, dtype=torch.int64, device="meta")).shape == x_t.shape
    assert scheduler.draw_training_times(2, None, "meta").alpha.shape == (2,)


def test_sampling_under_inference_mode_leaves_training_possible():
    """Tables that were put on the device there are not inference tensors to autograd."""
    scheduler = CascadedDDPMScheduler(100)
    with torch.inference_mode():
        scheduler.step(torch.zeros(2, 2, 4, 4), 99, torch.zeros(2, 1, 4, 4))
        scheduler.forward_marginal(torch.zeros(2, 1, 4, 4), 3)
    output = torch.zeros(2, 2, 4, 4, requires_grad=True)
    scheduler.step(output, 99, torch.zeros(2, 1, 4, 4), seeded()).prev_sample.sum().backward()
    assert output.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Forward process


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_forward_marginal(scheduler_class):
    """z_s of 4 x 16,384 values, each image at its own s: moments within 5 standard errors; s = 0 bitwise z_0."""
    scheduler = scheduler_class(1000, "squaredcos_cap_v2")
    z_0 = torch.full((4, 1, 128, 128), -0.7)
    z_s = scheduler.forward_marginal(z_0, torch.tensor([0, 1, 500, 1000]), seeded())
    assert torch.equal(z_s[0], z_0[0])
    for image, s in zip(z_s[1:], (1, 500, 1000), strict=True):
        alpha_bar = cosine_alpha_bars(1000)[s]
        sigma = math.sqrt(1 - alpha_bar)
        assert abs(image.mean().item() + 0.7 * math.sqrt(alpha_bar)) < 5 / 128 * sigma
        assert abs(image.std().item() / sigma - 1) < 5 / 128 / math.sqrt(2)
    assert torch.equal(scheduler.forward_marginal(z_0, 0), z_0)
    with pytest.raises(IndexError):
        scheduler.forward_marginal(z_0, -1)


def test_forward_marginal_does_not_depend_on_the_grid():
    scheduler = CascadedDDPMScheduler(100)
    before = scheduler.forward_marginal(torch.ones(1, 1, 4, 4), 60, seeded())
    scheduler.set_timesteps(3, stop_at=20)
    assert torch.equal(scheduler.forward_marginal(torch.ones(1, 1, 4, 4), 60, seeded()), before)


# ---------------------------------------------------------------------------------------------------------------------
# Training times


def test_discrete_training_times_are_uniform():
    """Chi-square of 50,000 draws over 50 times, at 4.5 deviations; 0 and T - 1 included, nothing else."""
    scheduler = CascadedDDPMScheduler(50)
    times = scheduler.draw_training_times(50_000, seeded())
    assert times.condition.dtype == torch.int64 and torch.equal(times.condition, times.index)
    counts = torch.bincount(times.index, minlength=50)
    assert len(counts) == 50
    chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
    assert abs(chi_square - 49) < 4.5 * math.sqrt(2 * 49)
    alpha_bar = cosine_alpha_bars(50)[times.index.numpy() + 1]
    np.testing.assert_allclose(times.alpha, np.sqrt(alpha_bar), rtol=1e-6)
    np.testing.assert_allclose(times.sigma, np.sqrt(1 - alpha_bar), rtol=1e-6)


def level_distribution(levels):
    """CDF of sqrt(alpha-bar) ~ U(neighbouring levels), for neighbours drawn uniformly; `levels` fall from 1."""
    rising = levels[::-1]
    return lambda values: np.interp(values, rising, np.linspace(0, 1, len(rising)))


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_continuous_levels_are_uniform_between_neighbours(schedule):
    """Kolmogorov-Smirnov on 100,000 draws: a distance of 2.2/sqrt(n) has a chance of 1e-4."""
    scheduler = ContinuousDDPMScheduler(8, schedule, beta_start=0.02, beta_end=0.5)
    alpha_bars = linear_alpha_bars(8, 0.02, 0.5) if schedule == "linear" else cosine_alpha_bars(8)
    times = scheduler.draw_training_times(100_000, seeded())
    assert times.condition.dtype == torch.float32 and torch.equal(times.condition, times.alpha)
    assert times.index is None
    distance = scipy.stats.kstest(times.alpha.double().numpy(), level_distribution(np.sqrt(alpha_bars))).statistic
    assert distance < 2.2 / math.sqrt(100_000)
    np.testing.assert_allclose(times.alpha.double() ** 2 + times.sigma.double() ** 2, 1, atol=3e-7)


def test_continuous_sigma_keeps_its_digits_near_clean_images():
    """beta = 1e-6: float32 has nine values of sqrt(alpha-bar) left there, from which sigma could not be told."""
    scheduler = ContinuousDDPMScheduler(1, beta_start=1e-6, beta_end=1e-6)
    sigma = scheduler.draw_training_times(100_000, seeded()).sigma.double().numpy()
    farthest = 1 - math.sqrt(1 - 1e-6)
    distance_to_clean = 1 - np.sqrt(1 - sigma**2)
    distance = scipy.stats.kstest(distance_to_clean / farthest, "uniform").statistic
    assert distance < 2.2 / math.sqrt(100_000)
    assert sigma.min() >= 0 and sigma.max() <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_training_times_are_decided_by_the_generator(scheduler_class):
    scheduler = scheduler_class(1000)
    one, same, other = (scheduler.draw_training_times(8, seeded(s)).condition for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# Inference schedules of the continuous scheduler


def test_continuous_inference_defaults_to_respacing_the_training_schedule():
    scheduler = ContinuousDDPMScheduler(200, beta_start=1e-4, beta_end=0.05)
    alpha_bars = linear_alpha_bars(200, 1e-4, 0.05)
    for num_steps in (2, 3, 100, 200):
        scheduler.set_timesteps(num_steps)
        times = np.round(np.linspace(0, 199, num_steps)).astype(int) + 1
        np.testing.assert_allclose(scheduler.inference_table.alphas_cumprod, alpha_bars[times], rtol=1e-9)
    scheduler.set_timesteps(1)
    np.testing.assert_allclose(scheduler.inference_table.alphas_cumprod, alpha_bars[-1:], rtol=1e-9)


@pytest.mark.parametrize("num_steps", [4, 100, 1000])
def test_continuous_inference_schedule_of_its_own(num_steps):
    """Searched end points go with few steps; n may be above T."""
    scheduler = ContinuousDDPMScheduler(
        200, inference_beta_schedule="linear", inference_beta_start=1e-3, inference_beta_end=0.3
    )
    scheduler.set_timesteps(num_steps)
    levels = linear_alpha_bars(num_steps, 1e-3, 0.3)[1:]
    np.testing.assert_allclose(scheduler.inference_table.alphas_cumprod, levels, rtol=1e-8)
    assert scheduler.timesteps.tolist() == list(range(num_steps - 1, -1, -1))


def test_continuous_inference_schedule_without_end_points():
    scheduler = ContinuousDDPMScheduler(200, inference_beta_schedule="linear")
    scheduler.set_timesteps(100)
    levels = linear_alpha_bars(100, 1e-3, 0.2)[1:]
    np.testing.assert_allclose(scheduler.inference_table.alphas_cumprod, levels, rtol=1e-9)
    with pytest.raises(ValueError, match="99 steps has no default end points"):
        scheduler.set_timesteps(99)
    scheduler = ContinuousDDPMScheduler(200, inference_beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(30)
    np.testing.assert_allclose(scheduler.inference_table.alphas_cumprod, cosine_alpha_bars(30)[1:], rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
def test_save_and_load(scheduler_class, schedule, tmp_path):
    scheduler = scheduler_class(
        300, schedule, beta_start=None, beta_end=None, prediction_type="v_prediction", clip_sample_range=1.5
    )
    scheduler.save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    public = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    assert public == {name: value for name, value in loaded.config.items() if not name.startswith("_")}
    assert torch.equal(loaded.table.alphas_cumprod, scheduler.table.alphas_cumprod)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["num_train_timesteps"] == 300 and saved["_class_name"] == scheduler_class.__name__


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize(
    "scheduler_class, arguments",
    [
        (CascadedDDPMScheduler, {}),
        (CascadedDDPMScheduler, {"num_train_timesteps": 500, "beta_schedule": "linear"}),
        (CascadedDDPMScheduler, {"variance_type": "fixed_small", "prediction_type": "v_prediction"}),
        (ContinuousDDPMScheduler, {}),
        (ContinuousDDPMScheduler, {"beta_start": None, "beta_end": None, "inference_beta_schedule": "linear"}),
        (ContinuousDDPMScheduler, {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_solvers_of_diffusers_take_the_config(solver, is_loaded, scheduler_class, arguments, tmp_path):
    """Fresh or loaded, whether values were given or left at their defaults: the same forward process."""
    scheduler = scheduler_class(**arguments)
    if is_loaded:
        scheduler.save_pretrained(tmp_path)
        scheduler = scheduler_class.from_pretrained(tmp_path)
    converted = solver.from_config(scheduler.config)
    for name in ("num_train_timesteps", "beta_schedule", "prediction_type"):
        assert converted.config[name] == scheduler.config[name]
    assert len(converted.alphas_cumprod) == len(scheduler.table)
    expected = scheduler.table.alphas_cumprod
    if scheduler.config.beta_schedule == "squaredcos_cap_v2":
        expected = expected[:-1]  # Euler raises the last
    np.testing.assert_allclose(converted.alphas_cumprod[: len(expected)], expected, rtol=1e-3)
    back = scheduler_class.from_config(converted.config)
    assert torch.equal(back.table.alphas_cumprod, scheduler.table.alphas_cumprod)
    assert back.config.variance_type == scheduler.config.variance_type


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize(
    "arguments", [{}, {"beta_start": 0.001, "beta_end": 0.03}, {"num_train_timesteps": 300}, {"beta_schedule": COSINE}]
)
@pytest.mark.parametrize("foreign_class", [kind for kind in SOLVER_CLASSES if kind is not IPNDMScheduler])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_a_config_of_diffusers_names_the_same_process(scheduler_class, foreign_class, arguments, is_loaded, tmp_path):
    """Given or left at the other class's defaults, fresh or loaded from a folder that it was saved to."""
    foreign = foreign_class(prediction_type="v_prediction", **arguments)
    foreign.save_pretrained(tmp_path)
    own = scheduler_class.from_pretrained(tmp_path) if is_loaded else scheduler_class.from_config(foreign.config)
    expected = foreign.alphas_cumprod.double()
    if arguments.get("beta_schedule") == COSINE:
        expected = expected[:-1]  # Euler raises the last
    torch.testing.assert_close(own.alphas_cumprod[: len(expected)], expected, rtol=1e-4, atol=0)
    assert len(own.alphas_cumprod) == foreign.config.num_train_timesteps
    assert own.config.variance_type == "fixed_small"
    kept = ("prediction_type", "clip_sample", "clip_sample_range", "thresholding", "sample_max_value")
    for name in ("num_train_timesteps", "beta_schedule", *(name for name in kept if name in foreign.config)):
        assert own.config[name] == foreign.config[name], name
    own.set_timesteps(50)
    assert own.timesteps[0] == own.config.num_train_timesteps - 1 or scheduler_class is ContinuousDDPMScheduler
    assert torch.equal(scheduler_class.from_config(own.config).alphas_cumprod, own.alphas_cumprod)


@pytest.mark.parametrize("arguments", [{"variance_type": "fixed_large"}, {"clip_sample": False}])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_what_diffusers_ddpm_samples_with_is_taken_over(scheduler_class, arguments):
    own = scheduler_class.from_config(DDPMScheduler(**arguments).config)
    assert {name: own.config[name] for name in arguments} == arguments
    given = scheduler_class.from_config(DDPMScheduler(**arguments).config, variance_type="fixed_small", beta_end=0.01)
    assert given.config.variance_type == "fixed_small" and given.betas[-1].item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    "foreign, message",
    [
        (DDPMScheduler(trained_betas=[0.1] * 1000), "`trained_betas` is a list of 1000; it must be None"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "`rescale_betas_zero_snr` is True; it must be False"),
        (DDIMScheduler(beta_schedule="scaled_linear"), "`beta_schedule` is 'scaled_linear'; it must be"),
        (DDPMScheduler(beta_schedule="sigmoid"), "`beta_schedule` is 'sigmoid'; it must be"),
        (DDPMScheduler(variance_type="fixed_small_log"), "`variance_type` is 'fixed_small_log'; it must be one of"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "`prediction_type` is 'flow_prediction'"),
        (
            FlowMatchEulerDiscreteScheduler(),
            "has no `beta_schedule`; it must be that of a scheduler",
        ),
        (EDMEulerScheduler(), "has no `beta_schedule`; it must be that of a scheduler"),
        (IPNDMScheduler(), "has no `beta_schedule`; it must be that of a scheduler"),
    ],
)
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_processes_of_diffusers_that_cannot_be_kept_are_refused(scheduler_class, foreign, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scheduler_class.from_config(foreign.config)
    foreign.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        scheduler_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize(
    "name, value",
    [
        ("variance_type", "fixed_large_log"),
        ("variance_type", "learned"),
        ("prediction_type", "flow"),
        ("timestep_spacing", "leading"),
        ("timestep_spacing", "trailing"),
        ("beta_schedule", "scaled_linear"),
        ("num_train_timesteps", 0),
    ],
)
def test_unknown_settings_are_refused(scheduler_class, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}"):
        scheduler_class(**{name: value})


def test_continuous_scheduler_learns_no_variance():
    with pytest.raises(ValueError, match="`variance_type` is 'learned_range'"):
        ContinuousDDPMScheduler(variance_type="learned_range")


def test_short_linear_schedule_needs_end_points():
    with pytest.raises(ValueError, match="give `beta_start` and `beta_end`"):
        CascadedDDPMScheduler(50, "linear")
    assert CascadedDDPMScheduler(4, "linear", 0.1, 0.5).table.betas.numpy() == pytest.approx(np.linspace(0.1, 0.5, 4))


# ---------------------------------------------------------------------------------------------------------------------
# What Diffusers' training utilities read


def cosine_snr(timesteps):
    """alpha_bar_t = f(t) / f(0), away from the last betas, which are clipped."""
    f = torch.cos(((timesteps.double() + 1) / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    return alpha_bar / (1 - alpha_bar)


def linear_snr(timesteps):
    betas = np.linspace(1e-6, 1e-2, 2000)
    alpha_bar = torch.from_numpy(np.exp(np.cumsum(np.log1p(-betas))))[timesteps]
    return alpha_bar / (1 - alpha_bar)


@pytest.mark.parametrize(
    ("scheduler", "closed_form"),
    [(CascadedDDPMScheduler(4000), cosine_snr), (ContinuousDDPMScheduler(2000), linear_snr)],
    ids=["cosine", "linear"],
)
@pytest.mark.parametrize(
    "copied", [lambda it: it, copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))]
)
def test_compute_snr(scheduler, closed_form, copied):
    scheduler = copied(scheduler)
    scheduler.set_timesteps(10)
    timesteps = torch.tensor([[0, 1], [10, 999], [1500, 1998]])
    torch.testing.assert_close(compute_snr(scheduler, timesteps), closed_form(timesteps).float(), rtol=1e-5, atol=0)
    assert torch.equal(torch.cumprod(1 - scheduler.betas, dim=0).float(), scheduler.alphas_cumprod.float())
    assert scheduler.betas.shape == scheduler.alphas_cumprod.shape == (len(scheduler),)


def test_the_process_survives_saving_and_its_config_has_no_tables(tmp_path):
    scheduler = CascadedDDPMScheduler(100)
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(CascadedDDPMScheduler.from_pretrained(tmp_path).alphas_cumprod, scheduler.alphas_cumprod)
    assert not {"alphas_cumprod", "betas", "trained_betas"} & scheduler.config.keys()
