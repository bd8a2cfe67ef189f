"""Diffusers' schedulers as drop-ins on every kind of stage, against data whose distribution is known."""

import inspect
import itertools

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from known_gaussian import GaussianDenoiser

from cdm_diffusers import CascadedDDPMScheduler, CascadedUNet2DModel, ContinuousDDPMScheduler
from cdm_diffusers.pipelines import CascadedDiffusionPipeline
from cdm_diffusers.pipelines.denoising import Denoiser, make_sampler
from cdm_diffusers.pipelines.solvers import SOLVER_CLASSES


FIRST_ORDER = (DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler)
# Largest error of mean and deviation at 50 steps with exact denoisers, of these the sampling error of 16,384 pixels is
# 0.006 and 0.004 (3 standard errors); the rest is the solver's discretisation.
HIGHER_ORDER = {
    DEISMultistepScheduler: 0.016,
    DPMSolverMultistepScheduler: 0.008,
    DPMSolverSinglestepScheduler: 0.020,
    HeunDiscreteScheduler: 0.008,
    IPNDMScheduler: 0.008,
    LMSDiscreteScheduler: 0.006,
    UniPCMultistepScheduler: 0.008,
}
MEAN, STD, PIXELS = 0.3, 0.25, 16384

# Training schedule, network and number of channels of four stages: cosine with learned variance, grey and colour;
# v-prediction; continuous noise levels.
STAGES = {
    "learned": (CascadedDDPMScheduler(4000), {"learned_variance": True}, 1),
    "learned colour": (CascadedDDPMScheduler(4000), {"learned_variance": True}, 3),
    "velocity": (
        CascadedDDPMScheduler(4000, prediction_type="v_prediction", variance_type="fixed_small"),
        {"prediction_type": "v_prediction"},
        1,
    ),
    "x_0": (
        CascadedDDPMScheduler(4000, prediction_type="sample", variance_type="fixed_small"),
        {"prediction_type": "sample"},
        1,
    ),
    "continuous": (ContinuousDDPMScheduler(variance_type="fixed_small"), {"time_conditioning": "noise_level"}, 1),
}


@pytest.fixture(autouse=True)
def quiet():
    """Diffusers logs the config entries that a scheduler class does not know."""
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(before)


def known_stage(stage: str, **overrides) -> tuple[CascadedDDPMScheduler, GaussianDenoiser]:
    """A scheduler that limits x_0 ten deviations from the mean, and the exact denoiser."""
    scheduler, arguments, channels = STAGES[stage]
    scheduler = type(scheduler).from_config(scheduler.config, clip_sample_range=3.0)
    size = 64 if channels == 1 else 32
    unet = GaussianDenoiser(size, channels, channels, **{"mean": MEAN, "std": STD, **arguments, **overrides})
    unet.alphas_cumprod = scheduler.table.alphas_cumprod
    return scheduler, unet


def sample(
    unet, scheduler, steps: int | None, batch_size: int | None = None, seed: int = 0, **options
) -> torch.Tensor:
    """Samples, float32 and not clamped."""
    pipe = CascadedDiffusionPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    last = {}

    def keep(pipe, step, timestep, tensors):
        last.update(tensors)
        return {}

    config = unet.config
    batch_size = batch_size or -(-PIXELS // (config.in_channels * config.sample_size**2))
    generator = torch.Generator().manual_seed(seed)
    options |= {"num_inference_steps": steps, "generator": generator, "callback_on_step_end": keep}
    pipe(batch_size=batch_size, **options)
    return last["sample"]


def first_order_moments(alpha_bars: torch.Tensor, is_stochastic: bool) -> tuple[float, float]:
    r"""
    Mean and deviation of exactly denoised samples along `alpha_bars` (descending levels, 1 at the end), in float64.

    With the best epsilon, x_0 = m + g (x - a m) at every level, g = a c^2 / (a^2 c^2 + s^2). A DDIM step goes to
    a' x_0 + s' (x - a x_0) / s; an ancestral one to the posterior's mean plus its variance. Both are affine in x.
    """
    mean, variance = torch.tensor(0.0).double(), torch.tensor(1.0).double()
    for alpha_bar, following in itertools.pairwise(alpha_bars):
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        gain = alpha * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
        noise_variance = 0
        if is_stochastic:
            beta = 1 - alpha_bar / following
            on_x_0 = following.sqrt() * beta / (1 - alpha_bar)
            on_x = (1 - following) * (1 - beta).sqrt() / (1 - alpha_bar)
            noise_variance = (1 - following) / (1 - alpha_bar) * beta
        else:
            on_x = (1 - following).sqrt() / sigma
            on_x_0 = following.sqrt() - alpha * on_x
        slope = on_x_0 * gain + on_x
        mean = slope * mean + on_x_0 * (1 - gain * alpha) * MEAN
        variance = slope**2 * variance + noise_variance
    return mean.item(), variance.sqrt().item()


def grid_levels(scheduler_class, scheduler, steps: int) -> torch.Tensor:
    """alpha_bar at `steps` evenly spread training times with lambda >= -5.1, descending, and the clean end."""
    table = scheduler.table.alphas_cumprod
    table = table[torch.logit(table) / 2 >= -5.1]
    times = torch.linspace(len(table) - 1, 0, steps, dtype=torch.float64)
    if scheduler_class in (DDIMScheduler, DDPMScheduler):
        levels = table[times.round().long()]
    else:  # sigma = sqrt((1 - alpha_bar) / alpha_bar) is interpolated between training times
        sigmas = (1 / table - 1).sqrt()
        low = times.floor().long()
        high = times.ceil().long()
        levels = 1 / (1 + torch.lerp(sigmas[low], sigmas[high], times - low) ** 2)
    return torch.cat([levels, torch.ones(1)])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scheduler_class", FIRST_ORDER)
def test_first_order_samplers_follow_the_affine_recursion(scheduler_class, stage):
    scheduler, unet = known_stage(stage)
    samples = sample(unet, scheduler_class.from_config(scheduler.config), 20)
    is_stochastic = scheduler_class in (DDPMScheduler, EulerAncestralDiscreteScheduler)
    mean, std = first_order_moments(grid_levels(scheduler_class, scheduler, 20), is_stochastic)
    assert samples.mean().item() == pytest.approx(mean, abs=0.007)
    assert samples.std().item() == pytest.approx(std, abs=0.006)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scheduler_class", HIGHER_ORDER)
def test_higher_order_samplers_reach_the_data(scheduler_class, stage):
    scheduler, unet = known_stage(stage)
    samples = sample(unet, scheduler_class.from_config(scheduler.config), 50)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.007)
    assert samples.std().item() == pytest.approx(STD, abs=HIGHER_ORDER[scheduler_class])


@pytest.mark.parametrize("stage", STAGES)
def test_the_noisy_dpm_solver_reaches_the_data(stage):
    scheduler, unet = known_stage(stage)
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++")
    samples = sample(unet, solver, 50)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.007)
    assert samples.std().item() == pytest.approx(STD, abs=HIGHER_ORDER[DPMSolverMultistepScheduler])
    assert not torch.equal(samples, sample(unet, DPMSolverMultistepScheduler.from_config(scheduler.config), 50))


@pytest.mark.parametrize("scheduler_class", SOLVER_CLASSES)
def test_a_biased_denoiser_moves_the_mean_a_little(scheduler_class):
    """An epsilon off by 0.003 costs the mean 0.015 at most, though at t = T it means an x_0 off by 250."""
    _, unet = known_stage("learned", bias=0.003)
    scheduler = CascadedDDPMScheduler(4000)
    samples = sample(unet, scheduler_class.from_config(scheduler.config), 50)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, abs=0.035)


def test_solvers_share_their_start_and_their_ode():
    """DDIM and Euler are one method in two coordinates: the same noise gives the same images."""
    scheduler = ContinuousDDPMScheduler(200, beta_start=1e-5, beta_end=0.08, clip_sample_range=3.0)
    unet = GaussianDenoiser(64, time_conditioning="noise_level")
    ddim = sample(unet, DDIMScheduler.from_config(scheduler.config), 200, batch_size=1)
    euler = sample(unet, EulerDiscreteScheduler.from_config(scheduler.config), 200, batch_size=1)
    torch.testing.assert_close(ddim, euler, rtol=0, atol=2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Options of Diffusers' schedulers


def taking(*options: str) -> list[tuple[type, str]]:
    """Pairs of a supported class and one of `options` that it takes."""
    known = {kind: inspect.signature(kind.__init__).parameters for kind in SOLVER_CLASSES}
    return [(kind, option) for kind in SOLVER_CLASSES for option in options if option in known[kind]]


@pytest.mark.parametrize(
    ("scheduler_class", "option"), taking("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
)
def test_other_spacings_of_levels_reach_the_data(scheduler_class, option):
    """
    The first times may round to one integer. The oracle is the map of the ODE: x_0 - m = c / sqrt(a^2 c^2 + s^2)
    (x_T - a m). Euler's rule is off by its first order, LMS on levels that grow geometrically by its fourth.
    """
    process = CascadedDDPMScheduler(1000, beta_schedule="linear", beta_end=0.008, clip_sample_range=3.0)
    unet = GaussianDenoiser(64, learned_variance=True, mean=MEAN, std=STD)
    unet.alphas_cumprod = process.table.alphas_cumprod
    solver = scheduler_class.from_config(process.config, **{option: True})
    samples = sample(unet, solver, 100)
    last = unet.alphas_cumprod[-1]
    slope = STD / (last * STD**2 + 1 - last).sqrt()
    assert samples.mean().item() == pytest.approx(MEAN * (1 - slope * last.sqrt()).item(), abs=0.007)
    tolerance = {EulerDiscreteScheduler: 0.016, LMSDiscreteScheduler: 0.022}.get(scheduler_class, 0.008)
    assert samples.std().item() == pytest.approx(slope.item(), abs=tolerance)


@pytest.mark.parametrize(
    ("scheduler_class", "option"), taking("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
)
def test_other_spacings_take_any_number_of_steps(scheduler_class, option):
    scheduler = CascadedDDPMScheduler(1000)
    unet = GaussianDenoiser(4, learned_variance=True)
    unet.alphas_cumprod = scheduler.table.alphas_cumprod
    solver = scheduler_class.from_config(scheduler.config, **{option: True})
    for steps in (1, 2, 7, 20, 100):
        unet.calls.clear()
        assert sample(unet, solver, steps, batch_size=2).isfinite().all()
        assert len(unet.calls) == (2 * steps - 1 if scheduler_class is HeunDiscreteScheduler else steps)


def rescaled(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """alpha_bar moved and stretched so that it ends at 0 (Lin et al., 2024, Algorithm 1), in float64."""
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


@pytest.mark.parametrize("process", [CascadedDDPMScheduler(4000), CascadedDDPMScheduler(1000, "linear")])
@pytest.mark.parametrize(("scheduler_class", "option"), taking("rescale_betas_zero_snr"))
def test_a_process_without_terminal_signal_is_rescaled_once(scheduler_class, option, process):
    """A network trained on such a process is told the times of its levels, and its samples follow the recursion."""
    process = CascadedDDPMScheduler.from_config(process.config, clip_sample_range=3.0)
    process.table.alphas_cumprod = rescaled(process.table.alphas_cumprod)
    unet = GaussianDenoiser(64, learned_variance=True, mean=MEAN, std=STD)
    unet.alphas_cumprod = process.table.alphas_cumprod
    solver = scheduler_class.from_config(process.config, **{option: True})
    sampler = make_sampler("base", unet, solver, 50, "cpu")
    told, levels = unet.alphas_cumprod[sampler.times], sampler.alpha.double() ** 2
    assert (
        (told.logit() - levels.logit()).abs() / 2 < 0.036
    ).all()  # whole times: half the distance of noisy neighbours
    samples = sample(unet, solver, 50)
    mean, std = MEAN, STD
    if scheduler_class in FIRST_ORDER:
        is_stochastic = scheduler_class in (DDPMScheduler, EulerAncestralDiscreteScheduler)
        mean, std = first_order_moments(grid_levels(scheduler_class, process, 50), is_stochastic)
    assert samples.mean().item() == pytest.approx(mean, abs=0.007)
    assert samples.std().item() == pytest.approx(std, abs=HIGHER_ORDER.get(scheduler_class, 0.006))


@pytest.mark.parametrize("stage", ["learned", "continuous"])
def test_levels_away_from_the_solver_s_times_are_told(stage):
    """Diffusers' log-linear levels belong to other times than the evenly spread ones that it calls them by."""
    scheduler, unet = known_stage(stage)
    solver = EulerDiscreteScheduler.from_config(scheduler.config, interpolation_type="log_linear")
    samples = sample(unet, solver, 50)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.007)
    assert samples.std().item() == pytest.approx(STD, abs=0.016)


@pytest.mark.parametrize(("scheduler_class", "option"), taking("use_flow_sigmas"))
def test_levels_of_flow_matching_are_refused(scheduler_class, option):
    scheduler, unet = known_stage("learned")
    with pytest.raises(ValueError, match="`base`: `use_flow_sigmas` is True; it must be False: "):
        sample(unet, scheduler_class.from_config(scheduler.config, **{option: True}), 5)


def test_heun_by_name_is_nearer_to_its_limit():
    """Of a denoiser with the errors that networks have; DDIM in many steps is the limit."""
    process = CascadedDDPMScheduler(4000)
    unet = GaussianDenoiser(64, learned_variance=True, mean=MEAN, std=STD, bias=0.01)
    unet.alphas_cumprod = process.table.alphas_cumprod
    limit = sample(unet, DDIMScheduler.from_config(process.config), 400, batch_size=1)

    def error(solver):
        return (sample(unet, solver, 20, batch_size=1) - limit).square().mean().sqrt().item()

    by_name = CascadedDiffusionPipeline(unet, process).with_schedulers("heun").base_scheduler
    assert error(by_name) < 0.03
    assert error(HeunDiscreteScheduler.from_config(process.config)) > 0.06


# ---------------------------------------------------------------------------------------------------------------------
# Limits of x_0


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("thresholding", [False, True])
def test_x_0_is_limited_as_the_config_says(scheduler_class, thresholding):
    """One step to clean data ends in the limited x_0 itself, whose oracle is Diffusers' own."""
    options = {"clip_sample_range": 0.8, "thresholding": thresholding, "dynamic_thresholding_ratio": 0.9}
    scheduler = CascadedDDPMScheduler(4000, sample_max_value=1.7, **options)
    unet = GaussianDenoiser(8, mean=0.0, std=4.0)
    unet.alphas_cumprod = scheduler.table.alphas_cumprod
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = make_sampler("base", unet, scheduler_class.from_config(scheduler.config), 1, "cpu")
    x_0 = sampler.step(0, Denoiser(unet), noise * sampler.scheduler.init_noise_sigma, None)

    alpha_bar = sampler.alpha.double() ** 2
    x_t = (
        noise
        * sampler.scheduler.init_noise_sigma
        * (alpha_bar.sqrt() if sampler.scheduler.init_noise_sigma > 1 else 1)
    )
    unlimited = alpha_bar.sqrt() * 16 / (alpha_bar * 16 + 1 - alpha_bar) * x_t
    expected = unlimited.clamp(-0.8, 0.8)
    if thresholding:
        expected = DDPMScheduler(**options, sample_max_value=1.7)._threshold_sample(unlimited)
    torch.testing.assert_close(x_0, expected.float(), rtol=0, atol=1e-3)


def test_x_0_is_clipped_at_one_where_a_config_says_nothing():
    unet = GaussianDenoiser(4)
    unet.alphas_cumprod = torch.linspace(0.99, 0.01, 50, dtype=torch.float64)
    sampler = make_sampler("base", unet, DPMSolverMultistepScheduler(50), 10, "cpu")
    assert sampler.limits["clip_sample"] and sampler.limits["clip_sample_range"] == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Real networks: every stage, fresh and loaded


def small_unet(size: int, channels: int, low_res_size: int | None = None, **arguments) -> CascadedUNet2DModel:
    torch.manual_seed(size)
    unet = CascadedUNet2DModel(
        size, channels, channels, block_out_channels=(8,), layers_per_block=1, attention_resolutions=(),
        mid_block_attention=False, attention_head_dim=8, norm_num_groups=4, low_res_size=low_res_size, **arguments,
    )  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet.eval()


def small_cascade(channels: int) -> CascadedDiffusionPipeline:
    """The paper's kinds of stages: learned variance; the same with Gaussian augmentation; continuous noise levels."""
    pipe = CascadedDiffusionPipeline(
        small_unet(4, channels, learned_variance=True),
        CascadedDDPMScheduler(200),
        small_unet(8, channels, 4, learned_variance=True, augmentation_level_embedding=True),
        CascadedDDPMScheduler(300, beta_schedule="linear"),
        CascadedDDPMScheduler(200, variance_type="fixed_small"),
        small_unet(16, channels, 8, time_conditioning="noise_level", time_scale=1000.0),
        ContinuousDDPMScheduler(400, beta_start=1e-5, beta_end=0.05),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cascades(tmp_path_factory):
    """By number of channels, a fresh cascade and the same one saved and loaded."""
    pairs = {}
    for channels in (1, 3):
        fresh = small_cascade(channels)
        folder = tmp_path_factory.mktemp(f"cascade-{channels}")
        fresh.save_pretrained(folder)
        loaded = CascadedDiffusionPipeline.from_pretrained(folder)
        loaded.set_progress_bar_config(disable=True)
        pairs[channels] = fresh, loaded
    return pairs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scheduler_class", SOLVER_CLASSES)
def test_every_stage_takes_every_solver_fresh_and_loaded(cascades, scheduler_class, channels):
    images = []
    for pipe in cascades[channels]:
        components = pipe.components
        for stage in pipe.stages:
            converted = scheduler_class.from_config(stage.scheduler.config)
            assert converted.config.num_train_timesteps == stage.scheduler.config.num_train_timesteps
            if scheduler_class is not IPNDMScheduler:  # which takes its grid from DDIM
                table = stage.scheduler.table.alphas_cumprod
                torch.testing.assert_close(converted.alphas_cumprod.double(), table, rtol=2e-4, atol=1e-7)
            components[f"{stage.name}_scheduler"] = converted
        swapped = CascadedDiffusionPipeline(**components)
        swapped.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        output = swapped(
            batch_size=2, num_inference_steps=4, augmentation_levels={"super_res_1": 50}, generator=generator,
            output_type="pt", output_stages=True,
        )  # fmt: skip
        images.append(output.stages)
    for name, size in (("base", 4), ("super_res_1", 8), ("super_res_2", 16)):
        assert images[0][name].shape == (2, channels, size, size)
        assert images[0][name].std() > 0.01
        torch.testing.assert_close(images[0][name], images[1][name], rtol=0, atol=1e-4)


def test_a_converted_scheduler_survives_saving(cascades, tmp_path):
    """Limits of x_0 that DPM-Solver does not know itself travel as hidden config entries."""
    pipe = CascadedDiffusionPipeline(cascades[1][0].base_unet, CascadedDDPMScheduler(200, clip_sample_range=0.7))
    pipe.base_scheduler = DPMSolverMultistepScheduler.from_config(pipe.base_scheduler.config)
    pipe.save_pretrained(tmp_path)
    loaded = CascadedDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.base_scheduler, DPMSolverMultistepScheduler)
    sampler = make_sampler("base", loaded.base_unet, loaded.base_scheduler, 5, "cpu")
    assert sampler.limits["clip_sample_range"] == 0.7
    assert sampler.scheduler.config.variance_type is None
    assert pipe.base_scheduler.config.variance_type == "learned_range"  # the pipeline's own is left alone


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_stochastic_solvers_draw_from_each_image_s_generator(cascades, scheduler_class):
    pipe = CascadedDiffusionPipeline(cascades[1][0].base_unet, cascades[1][0].base_scheduler)
    pipe.base_scheduler = scheduler_class.from_config(pipe.base_scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def images(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(batch_size=len(seeds), num_inference_steps=5, generator=generators, output_type="pt").images

    together = images([3, 4])
    torch.testing.assert_close(together[1:], images([4]), rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_an_untested_scheduler_is_refused():
    unet = small_unet(4, 1)
    pipe = CascadedDiffusionPipeline(unet, KDPM2DiscreteScheduler(50))
    with pytest.raises(
        ValueError, match=r"`base`: KDPM2DiscreteScheduler is not supported; use one of .*DDIMScheduler"
    ):
        pipe(num_inference_steps=2)


@pytest.mark.parametrize("scheduler_class", SOLVER_CLASSES)
def test_more_steps_than_levels_are_refused(scheduler_class):
    process = DDIMScheduler(num_train_timesteps=50, trained_betas=[0.1] * 50)
    pipe = CascadedDiffusionPipeline(small_unet(4, 1), scheduler_class.from_config(process.config))
    with pytest.raises(ValueError, match=r"`base`: `num_inference_steps` is 51; .* takes 50 at most"):
        pipe(num_inference_steps=51)


def test_ipndm_begins_as_ddim():
    """Its first step is DDIM's, and its order shows afterwards: nearer to DDIM in many steps than DDIM in as few."""
    scheduler, unet = known_stage("velocity")
    ddim, ipndm = (kind.from_config(scheduler.config) for kind in (DDIMScheduler, IPNDMScheduler))
    middle = {"timesteps": [2000]}  # at the noisiest time, alpha = 0.006 divides the rounding
    torch.testing.assert_close(
        sample(unet, ipndm, None, 1, **middle), sample(unet, ddim, None, 1, **middle), rtol=0, atol=1e-5
    )
    limit = sample(unet, ddim, 400, 1)
    error = {kind: (sample(unet, kind, 10, 1) - limit).square().mean().sqrt() for kind in (ddim, ipndm)}
    assert error[ipndm] < error[ddim] / 3
    back = CascadedDDPMScheduler.from_config(ipndm.config)
    assert torch.equal(back.alphas_cumprod, scheduler.alphas_cumprod) and back.config == scheduler.config


def test_steps_that_would_repeat_a_level_are_refused():
    pipe = CascadedDiffusionPipeline(small_unet(4, 1), DPMSolverMultistepScheduler(50, trained_betas=[0.1] * 50))
    with pytest.raises(ValueError, match="cannot make 50 different noise levels out of 50 timesteps: use fewer"):
        pipe(num_inference_steps=50)


def test_unknown_predictions_are_refused():
    pipe = CascadedDiffusionPipeline(small_unet(4, 1), DDIMScheduler(50, prediction_type="flow"))
    with pytest.raises(ValueError, match="`prediction_type` is 'flow'"):
        pipe(num_inference_steps=5)


def test_a_noise_level_scheduler_needs_a_noise_level_network():
    pipe = CascadedDiffusionPipeline(small_unet(4, 1), ContinuousDDPMScheduler(100))
    with pytest.raises(ValueError, match="`base`: The network is conditioned on timesteps, but ContinuousDDPM"):
        pipe(num_inference_steps=5)
