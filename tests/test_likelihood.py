"""Bounds of the likelihood: against NumPy, the sampler, closed forms of Gaussians, and the training loss."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from scipy import stats

from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    CascadedUNet2DModel,
    ContinuousDDPMScheduler,
    SuperResolutionPipeline,
)
from cdm_diffusers.evaluation.likelihood import (
    LikelihoodConfig,
    StageBound,
    cascade_figures,
    cascade_up_to,
    cut_strata,
    measure_likelihood,
    nats_of,
    stage_figures,
)
from cdm_diffusers.losses import HybridLoss
from cdm_diffusers.pipelines.stages import CascadeStage


def fake_unet(time_conditioning="timestep", **config):
    return SimpleNamespace(
        config=SimpleNamespace(time_conditioning=time_conditioning, augmentation_level_embedding=False, **config)
    )


def bound_of(scheduler, stop_at=0, num_terms=None):
    continuous = isinstance(scheduler, ContinuousDDPMScheduler)
    unet = fake_unet("noise_level" if continuous else "timestep")
    return StageBound(CascadeStage("base", unet, scheduler), num_terms, stop_at)


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def eight_bit_images(*shape, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, shape)
    values.flat[:2] = 0, 255
    return torch.from_numpy(values / 127.5 - 1)


class Recorder:
    """Returns what was drawn beforehand, whatever it is asked, and remembers what it was asked."""

    def __init__(self, shape, raw_channels=0, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.prediction = torch.randn(shape, generator=generator)
        self.raw = torch.randn(shape[0], raw_channels, *shape[2:], generator=generator)

    def __call__(self, x_t, time):
        self.x_t, self.time = x_t, time
        return self.prediction, self.raw


# ------------------------------------------------------------------------------------------------------------------
# One term
# ------------------------------------------------------------------------------------------------------------------

T = 40
SCHEDULERS = {
    "learned range": CascadedDDPMScheduler(T),
    "beta~, v": CascadedDDPMScheduler(T, variance_type="fixed_small", prediction_type="v_prediction"),
    "beta, not clipped": CascadedDDPMScheduler(T, variance_type="fixed_large", clip_sample=False),
    "continuous": ContinuousDDPMScheduler(T, beta_end=0.3, variance_type="fixed_small"),
}


def numpy_reverse(scheduler, recorder, t, s=0):
    """Section 2.1 in NumPy: mean and log variance of p(x_{t-1} | x_t), and of q(x_{t-1} | x_t, x_0) given x_0."""
    alpha_bar = np.concatenate([[1.0], np.asarray(scheduler.table.alphas_cumprod)])
    beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
    tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
    if t == 1:  # the value of the second step
        tilde = (1 - alpha_bar[1]) / (1 - alpha_bar[2]) * (1 - alpha_bar[2] / alpha_bar[1])
    x_t, output = recorder.x_t.numpy(), recorder.prediction.numpy().astype(float)
    signal, noise = math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t])
    if scheduler.config.prediction_type == "epsilon":
        x_0 = (x_t - noise * output) / signal
    else:
        x_0 = signal * x_t - noise * output
    if scheduler.config.clip_sample:
        x_0 = x_0.clip(-1, 1)
    kind, v = scheduler.config.variance_type, (recorder.raw.numpy() + 1) / 2
    log_variance = {"fixed_small": math.log(tilde), "fixed_large": math.log(beta)}.get(kind)
    if kind == "learned_range":
        log_variance = v * math.log(beta) + (1 - v) * math.log(tilde)

    def posterior_mean(x_0):
        from_x_0 = math.sqrt(alpha_bar[t - 1]) * beta / (1 - alpha_bar[t]) * x_0
        return (
            from_x_0 + math.sqrt(alpha_bar[t] / alpha_bar[t - 1]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * x_t
        )

    return posterior_mean(x_0), log_variance, posterior_mean, math.log(tilde)


def check_x_t(scheduler, recorder, x_0, t):
    """x_t is x_0 noised to t, by standard normal noise."""
    alpha_bar = float(scheduler.table.alphas_cumprod[t - 1])
    noise = (recorder.x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize(("t", "s"), [(2, 0), (25, 0), (T, 0), (9, 8), (30, 8)])
def test_kl_against_numpy(scheduler, t, s):
    x_0 = eight_bit_images(3, 2, 4, 4)
    recorder = Recorder(x_0.shape, 2 * (scheduler.config.variance_type == "learned_range"))
    kl = bound_of(scheduler, s).kl(x_0, recorder, torch.full((3,), t - s - 1), generators(3))
    mean, log_variance, posterior_mean, log_tilde = numpy_reverse(scheduler, recorder, t)
    distance = (posterior_mean(x_0.numpy()) - mean) ** 2
    expected = 0.5 * (
        log_variance - log_tilde + np.exp(log_tilde - log_variance) + distance * np.exp(-log_variance) - 1
    )
    np.testing.assert_allclose(kl.numpy(), np.broadcast_to(expected, x_0.shape).sum((1, 2, 3)), rtol=2e-5)
    check_x_t(scheduler, recorder, x_0, t)
    told = float(scheduler.table.alphas_cumprod[t - 1]) ** 0.5
    assert recorder.time.tolist() == pytest.approx(
        [told if isinstance(scheduler, ContinuousDDPMScheduler) else t - 1] * 3
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_decoder_against_scipy(scheduler):
    x_0 = eight_bit_images(3, 2, 4, 4)
    recorder = Recorder(x_0.shape, 2 * (scheduler.config.variance_type == "learned_range"))
    recorder.prediction *= 0.1
    nats = bound_of(scheduler).decoder(x_0, recorder, generators(3))
    mean, log_variance, _, _ = numpy_reverse(scheduler, recorder, 1)
    normal = stats.norm(mean, np.exp(0.5 * log_variance))
    pixels = x_0.numpy()
    below, above = normal.logcdf(pixels + 1 / 255), normal.logsf(pixels - 1 / 255)
    near_tail = np.where(pixels > mean, normal.sf(pixels - 1 / 255), normal.cdf(pixels + 1 / 255))
    far_tail = np.where(pixels > mean, normal.sf(pixels + 1 / 255), normal.cdf(pixels - 1 / 255))
    inside = np.log(np.maximum(near_tail - far_tail, 1e-300))
    expected = np.where(pixels < -0.999, below, np.where(pixels > 0.999, above, inside))
    assert inside.min() > -600, "float64 must be able to check this"
    np.testing.assert_allclose(nats.numpy(), -expected.sum((1, 2, 3)), rtol=1e-4)


def test_prior_against_closed_form():
    scheduler = ContinuousDDPMScheduler(T, beta_end=0.3)
    x_0 = eight_bit_images(3, 2, 4, 4)
    alpha_bar = float(scheduler.table.alphas_cumprod[-1])
    expected = 0.5 * (alpha_bar * x_0**2 + (1 - alpha_bar) - 1 - math.log(1 - alpha_bar)).sum((1, 2, 3))
    for s in (0, 7, T):
        torch.testing.assert_close(bound_of(scheduler, s).prior(x_0), expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize(("position", "s"), [(0, 0), (20, 0), (0, 8), (20, 8)])
def test_the_distribution_is_the_samplers(scheduler, position, s):
    """`scheduler.step` draws from what is bounded: the same mean, and the same variance."""
    x_0 = eight_bit_images(3, 2, 4, 4)
    recorder = Recorder(x_0.shape, 2 * (scheduler.config.variance_type == "learned_range"))
    x_t, mean, log_variance = bound_of(scheduler, s).reverse(x_0, recorder, torch.full((3,), position), generators(3))
    sampler = type(scheduler).from_config(scheduler.config)
    sampler.set_timesteps(T, stop_at=s)
    output = torch.cat([recorder.prediction, recorder.raw], dim=1).double()
    timestep = sampler.timesteps[len(sampler.timesteps) - 1 - position]
    prev_sample = sampler.step(output, timestep, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    draws_noise = position > 0 or s > 0
    torch.testing.assert_close(prev_sample, mean + draws_noise * (0.5 * log_variance).exp() * noise)


def test_all_terms_are_the_training_losss():
    """L_vlb of [`HybridLoss`], in expectation over its uniform t: the sum of all terms, in bits per dimension."""
    scheduler = CascadedDDPMScheduler(T, clip_sample=False)
    loss = HybridLoss(scheduler)
    x_0 = eight_bit_images(3, 2, 4, 4)
    recorder = Recorder(x_0.shape, 2)
    vlb = torch.zeros(3)

    def denoiser(generators):
        def denoise(x_t, time):
            prediction, raw = recorder(x_t, time)
            alpha, sigma = scheduler.table.signal_and_noise(time + 1)
            predicted_x_0 = scheduler.prediction.x_0(prediction, x_t.float(), alpha, sigma)
            vlb.add_(loss.vlb_term(predicted_x_0, raw, x_0.float(), x_t.float(), time))
            return prediction, raw

        return denoise

    terms = bound_of(scheduler)(x_0, denoiser, generators(3))
    bits = (terms["kl"] + terms["decoder"]) / (x_0[0].numel() * math.log(2))
    torch.testing.assert_close(bits.float(), vlb, rtol=2e-4, atol=0)


# ------------------------------------------------------------------------------------------------------------------
# Which terms
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [CascadedDDPMScheduler(1000), ContinuousDDPMScheduler(500)])
@pytest.mark.parametrize("s", [0, 300])
@pytest.mark.parametrize("num_terms", [1, 7, 100, 10_000, None])
def test_strata_partition_the_times(scheduler, s, num_terms):
    bound = bound_of(scheduler, s, num_terms)
    covered = [position for low, high in bound.strata for position in range(low, high)]
    assert covered == list(range(s == 0, len(scheduler.table) - s))
    assert len(bound.strata) <= (num_terms or math.inf)
    if num_terms == 100:
        assert len(bound.strata) > 60
    assert cut_strata(bound.table, 0, None) == [(i, i + 1) for i in range(len(bound.table))]


def test_s_equal_to_T_leaves_the_prior():
    scheduler = SCHEDULERS["beta~, v"]
    terms = bound_of(scheduler, T)(eight_bit_images(2, 1, 2, 2), None, generators(2))
    assert terms["kl"].tolist() == terms["decoder"].tolist() == [0, 0] and (terms["prior"] > 0).all()


def test_few_terms_estimate_all():
    scheduler = CascadedDDPMScheduler(60, variance_type="fixed_small", clip_sample=False)
    denoise = gaussian_denoise(scheduler, 0.1, 0.3)
    x_0 = torch.full((200, 1, 4, 4), 0.4)
    kl = {n: bound_of(scheduler, 0, n)(x_0, lambda _: denoise, generators(200))["kl"] for n in (None, 10)}
    error = math.sqrt(sum(values.var().item() / 200 for values in kl.values()))
    assert abs(kl[None].mean() - kl[10].mean()) < 4 * error < 0.25 * kl[None].mean()


# ------------------------------------------------------------------------------------------------------------------
# A known Gaussian with its exact denoiser
# ------------------------------------------------------------------------------------------------------------------


def to_grid(images):
    """The nearest 8-bit values."""
    return (((images.double() + 1) * 127.5).round().clamp(0, 255)) / 127.5 - 1


def gaussian_denoise(scheduler, mean, std):
    """E[epsilon | x_t] for pixels N(mean, std^2)."""

    def denoise(x_t, time):
        alpha_bar = scheduler.table.alphas_cumprod[time][:, None, None, None]
        epsilon = (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar)
        return epsilon, x_t[:, :0]

    return denoise


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("s", [0, 10])
def test_expected_kl_of_a_gaussian(variance_type, s):
    """E KL_t has a closed form: E (x_0 - E[x_0 | x_t])^2 is the variance of x_0 given x_t."""
    mean, std = 0.1, 0.3
    scheduler = CascadedDDPMScheduler(40, variance_type=variance_type, clip_sample=False)
    alpha_bar = np.concatenate([[1.0], np.asarray(scheduler.table.alphas_cumprod)])
    t = np.arange(max(s, 1) + 1, 41)
    beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
    tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
    variance = {"fixed_small": tilde, "fixed_large": beta}[variance_type]
    given_x_t = std**2 * (1 - alpha_bar[t]) / (alpha_bar[t] * std**2 + 1 - alpha_bar[t])
    factor = np.sqrt(alpha_bar[t - 1]) * beta / (1 - alpha_bar[t])
    expected = 0.5 * (np.log(variance / tilde) + tilde / variance - 1 + factor**2 * given_x_t / variance)

    x_0 = mean + std * torch.randn(150, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = bound_of(scheduler, s)(x_0, lambda _: gaussian_denoise(scheduler, mean, std), generators(150))
    kl = terms["kl"] / 64
    assert abs(kl.mean() - expected.sum()) < 4 * kl.std() / math.sqrt(150) < 0.06 * expected.sum()


def test_the_bound_approaches_the_entropy():
    """-log p(x_0) averages to the entropy of 8-bit values, which no bound is below; more steps bring it nearer."""
    mean, std = 0.0, 0.25
    edges = np.arange(-256, 258, 2) / 255
    cdf = stats.norm(mean, std).cdf(edges)
    cdf[0], cdf[-1] = 0, 1
    probabilities = np.diff(cdf)
    entropy = stats.entropy(probabilities)
    x_0 = to_grid(std * torch.randn(60, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    # what this sample of images has, instead of its expectation: far less noise
    exact = -np.log(probabilities)[((x_0 + 1) * 127.5).round().long().numpy()].mean()
    assert exact == pytest.approx(entropy, abs=0.02)
    gaps = []
    for steps in (10, 40, 160):
        scheduler = CascadedDDPMScheduler(steps, variance_type="fixed_large", clip_sample=False)
        denoise = gaussian_denoise(scheduler, mean, std)
        terms = bound_of(scheduler)(x_0, lambda _, denoise=denoise: denoise, generators(60))
        gaps.append(sum(terms.values()).mean().item() / 256 - exact)
    assert gaps[0] > 2 * gaps[1] > 0 and gaps[1] > gaps[2] > -0.005
    assert gaps[2] < 0.015 * entropy


class BlockGaussian(torch.nn.Module):
    r"""
    The exact denoiser of images whose 2x2 blocks have a mean u ~ N(0, U) and four deviations of variance D that add up
    to 0; or, as a base, of the images of the block means alone.
    """

    U, D, dtype = 0.2**2, 0.1**2, torch.float64

    def __init__(self, scheduler, sample_size, low_res_size=None):
        super().__init__()
        self.alphas_cumprod, self.is_base = scheduler.table.alphas_cumprod, low_res_size is None
        self.config = SimpleNamespace(
            patch_size=1,
            low_res_skip=False,
            block_out_channels=(1,),
            time_conditioning="timestep",
            augmentation_level_embedding=not self.is_base,
            num_classes=None,
            sample_size=sample_size,
            low_res_size=low_res_size,
            out_channels=1,
        )

    def forward(self, x_t, time, low_res=None, augmentation_level=None, return_dict=True):
        alpha_bar = self.alphas_cumprod[time][:, None, None, None]
        precision, weighted = 1 / self.U, 0
        mean_of_blocks, noise = x_t, 1 - alpha_bar
        if not self.is_base:
            mean_of_blocks, noise = torch.nn.functional.avg_pool2d(x_t, 2), (1 - alpha_bar) / 4
            if augmentation_level < len(self.alphas_cumprod):
                of_z = self.alphas_cumprod[augmentation_level - 1]
                precision, weighted = precision + of_z / (1 - of_z), of_z.sqrt() / (1 - of_z) * low_res
        u = (weighted + alpha_bar.sqrt() / noise * mean_of_blocks) / (precision + alpha_bar / noise)
        x_0 = u
        if not self.is_base:
            deviations = x_t - upsample(mean_of_blocks)
            gain = alpha_bar.sqrt() * self.D / (alpha_bar * self.D + 1 - alpha_bar)
            x_0 = upsample(u) + gain * deviations
        return ((x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt(),)


def upsample(images):
    return images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index]}


@pytest.fixture(scope="module")
def gaussian_cascade():
    """Both stages, images of their distribution, and -log p(x_0) of each image in nats."""
    scheduler = CascadedDDPMScheduler(100, variance_type="fixed_large", clip_sample=False)
    base = CascadeStage("base", BlockGaussian(scheduler, 4), scheduler)
    upper = CascadeStage("super_res_1", BlockGaussian(scheduler, 8, 4), scheduler, scheduler)
    draw = np.random.default_rng(0)
    deviations = draw.normal(0, BlockGaussian.D**0.5, (100, 4, 2, 4, 2))
    deviations -= deviations.mean((2, 4), keepdims=True)
    blocks = draw.normal(0, BlockGaussian.U**0.5, (100, 4, 1, 4, 1)) + deviations
    images = ((blocks.reshape(100, 1, 8, 8) + 1) * 127.5).round().astype(np.uint8)
    of_block = images.reshape(100, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4) / 127.5 - 1
    covariance = BlockGaussian.U * np.ones((4, 4)) + BlockGaussian.D * (np.eye(4) - 0.25)
    log_density = stats.multivariate_normal(np.zeros(4), covariance).logpdf(of_block)
    exact = -(log_density + 4 * math.log(2 / 255)).reshape(100, 16).sum(1)
    return base, upper, Images(torch.from_numpy(images)), torch.from_numpy(exact)


OPTIONS = {"seed": 0, "batch_size": 100, "device": "cpu"}


@pytest.mark.parametrize("s", [20, 60, 100])
def test_equation_3_is_tight_for_an_exact_cascade(gaussian_cascade, s):
    """q(z_s | x_0) is the posterior of z_s under such a cascade, so all the slack is that of few, fixed variances."""
    base, upper, dataset, exact = gaussian_cascade
    bounds = [StageBound(base, stop_at=s), StageBound(upper)]
    nats = nats_of([(bounds[0], None), (bounds[1], s)], dataset, list(range(100)), **OPTIONS)
    slack = (sum(sum(terms.values()) for terms in nats.values()) - exact) / 64
    error = slack.std().item() / math.sqrt(100)
    assert -3 * error < slack.mean() < 0.07 and error < 0.02
    # the base's part is what z_s says about z_0, at least
    snr = float(base.scheduler.table.alpha_bar(s) / (1 - base.scheduler.table.alpha_bar(s)))
    information = 0.5 * math.log(1 + snr * BlockGaussian.U)
    of_base = sum(nats["base"].values()).mean().item() / 16
    assert information - 0.02 < of_base < 1.1 * information + 0.02

    figures = cascade_figures(bounds, nats, {"base": None, "super_res_1": s})
    bits = figures["bits_per_dimension"]
    assert bits["mean"] == pytest.approx((exact.mean().item() / 64 + slack.mean().item()) / math.log(2))
    assert bits["mean"] == pytest.approx(sum(part["mean"] for part in figures["stages"].values()))
    assert figures["nats"]["mean"] == pytest.approx(bits["mean"] * 64 * math.log(2))
    total = sum(sum(terms.values()) for terms in nats.values()) / (64 * math.log(2))
    assert bits["standard_error"] == pytest.approx(float(total.std()) / 10)


def test_batches_make_no_difference(gaussian_cascade):
    _, upper, dataset, _ = gaussian_cascade
    bound = StageBound(upper, 5)
    together = nats_of([(bound, 40)], dataset, [7, 3, 5], **OPTIONS | {"batch_size": 3})["super_res_1"]
    apart = nats_of([(bound, 40)], dataset, [7, 3, 5], **OPTIONS | {"batch_size": 2})["super_res_1"]
    for name, values in together.items():
        torch.testing.assert_close(values, apart[name], rtol=1e-6, atol=0)
    figures = stage_figures(bound, together, 40)
    assert figures["num_terms"] == 6 and figures["of_terms"] == 100 and figures["augmentation_level"] == 40
    parts = [figures["terms"][name]["mean"] for name in ("prior", "kl", "decoder")]
    assert sum(parts) == pytest.approx(figures["bits_per_dimension"]["mean"])


# ------------------------------------------------------------------------------------------------------------------
# The script's way, and bad input
# ------------------------------------------------------------------------------------------------------------------


def tiny_unet(size, **arguments):
    torch.manual_seed(size)
    return CascadedUNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        layers_per_block=1,
        attention_resolutions=(),
        mid_block_attention=False,
        attention_head_dim=4,
        norm_num_groups=2,
        num_classes=2,
        **arguments,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cascade 2 -> 4 (noise) -> 8 (blur), its middle stage alone, and pictures of two classes."""
    folder = tmp_path_factory.mktemp("likelihood")
    base_scheduler = CascadedDDPMScheduler(12)
    noising_scheduler = CascadedDDPMScheduler(12, variance_type="fixed_small")
    middle = tiny_unet(4, learned_variance=True, low_res_size=2, augmentation_level_embedding=True)
    labels = {"id2label": {0: "bright", 1: "dark"}, "source_resolution": 8}
    cascade = CascadedDiffusionPipeline(
        base_unet=tiny_unet(2, learned_variance=True),
        base_scheduler=base_scheduler,
        super_res_1_unet=middle,
        super_res_1_scheduler=CascadedDDPMScheduler(12),
        super_res_1_noising_scheduler=noising_scheduler,
        super_res_2_unet=tiny_unet(8, low_res_size=4, time_conditioning="noise_level"),
        super_res_2_scheduler=ContinuousDDPMScheduler(10),
        default_augmentation_levels={"super_res_1": 3},
        **labels,
    )
    cascade.save_pretrained(folder / "cascade")
    SuperResolutionPipeline(middle, CascadedDDPMScheduler(12), noising_scheduler, **labels).save_pretrained(
        folder / "middle"
    )
    draw = np.random.default_rng(0)
    for label, level in (("bright", 128), ("dark", 0)):
        for i in range(4):
            (folder / "data" / "test" / label).mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(level, level + 128, (8, 8)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / "test" / label / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def config_for(folder, **overrides):
    options = {"pipeline": str(folder / "cascade"), "train_data_dir": str(folder / "data"), "device": "cpu"}
    return LikelihoodConfig(**{**options, "output": str(folder / "figures" / "figures.json"), **overrides})


def test_from_end_to_end(folder, capsys):
    report = measure_likelihood(config_for(folder, cascade="super_res_1"))
    assert json.loads((folder / "figures" / "figures.json").read_text()) == report
    assert list(report["stages"]) == ["base", "super_res_1", "super_res_2"] and report["num_images"] == 8
    assert [stage["of_terms"] for stage in report["stages"].values()] == [12, 12, 10]
    assert [stage["augmentation_level"] for stage in report["stages"].values()] == [None, 3, None]
    cascade = report["cascade"]
    assert cascade["size"] == 4 and cascade["augmentation_levels"] == {"super_res_1": 3}
    assert cascade["num_terms"] == {"base": 9, "super_res_1": 12}
    # the last stage's part is its own figure, and the base's less than its own
    alone = report["stages"]
    assert cascade["stages"]["super_res_1"] == alone["super_res_1"]["bits_per_dimension"]
    assert 0 < cascade["stages"]["base"]["mean"] * 4 < alone["base"]["bits_per_dimension"]["mean"]
    assert "Cascade, 4x4 images (Eq. 3; s = 3 into super_res_1)" in capsys.readouterr().out


def test_one_stage_and_few_images(folder):
    report = measure_likelihood(
        config_for(folder, pipeline=str(folder / "middle"), num_images=3, augmentation_level=5)
    )
    figures = report["stages"]["super_res"]
    assert report["num_images"] == 3 and figures["augmentation_level"] == 5 and figures["low_res_size"] == 2
    chosen = measure_likelihood(config_for(folder, stages=["super_res_2"], num_terms=4))
    assert list(chosen["stages"]) == ["super_res_2"] and chosen["stages"]["super_res_2"]["num_terms"] <= 5


def test_the_bound_is_the_ancestral_sampler_s_whatever_the_pipeline_samples_with(folder, tmp_path):
    ancestral = measure_likelihood(config_for(folder, cascade="super_res_1"))
    pipe = CascadedDiffusionPipeline.from_pretrained(folder / "cascade")
    pipe.with_schedulers({"base": "ddim", "super_res_1": "unipc"}).save_pretrained(tmp_path)
    solved = measure_likelihood(config_for(folder, pipeline=str(tmp_path), cascade="super_res_1"))
    assert solved["stages"] == ancestral["stages"] and solved["cascade"] == ancestral["cascade"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_images": 1}, "`num_images` is 1; it must be at least 2"),
        ({"num_images": 9}, r"`num_images` is 9; the split 'test' has 8"),
        ({"num_terms": 0}, "`num_terms` is 0"),
        ({"stages": ["top"]}, r"`stages` has \['top'\]; the pipeline has \['base', "),
        ({"cascade": "top"}, r"`cascade` is 'top'; give one of .*'super_res_2'"),
        ({"cascade": "super_res_2"}, r"'super_res_2' takes none \(no Gaussian .*`cascade=super_res_1`"),
        (
            {"cascade": "super_res_1", "augmentation_level": 0},
            "'super_res_1' is given s = 0.*at least 1.*cascade=base",
        ),
        ({"augmentation_level": 13}, r"`augmentation_level` of stage `super_res_1` is 13; .*0\.\.12"),
        ({"split": "train"}, "`dataset_split` is 'train', which is not in"),
        ({"label_names": "bright,dark,red"}, "split 'test' has 3 classes"),
    ],
)
def test_bad_input(folder, overrides, message):
    with pytest.raises(ValueError, match=message):
        measure_likelihood(config_for(folder, **overrides))


def test_what_has_no_bound(gaussian_cascade):
    base, upper, _, _ = gaussian_cascade
    other = CascadeStage("super_res_1", upper.unet, upper.scheduler, CascadedDDPMScheduler(200))
    with pytest.raises(ValueError, match=r"noised by a .* of 200 steps, but stage `base` diffuses by a .* of 100"):
        cascade_up_to([base, other], {"base": None, "super_res_1": 5}, "super_res_1")
    with pytest.raises(ValueError, match="give one of the stages of a cascade with a base"):
        cascade_up_to([upper], {"super_res_1": 5}, "super_res_1")
    with pytest.raises(ValueError, match=r"'base' samples with DDIMScheduler, .* load the pipeline with Cascaded"):
        StageBound(CascadeStage("base", base.unet, DDIMScheduler()))
