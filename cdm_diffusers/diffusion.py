"""Gaussian diffusion on tensors: schedules, marginals, posteriors, learned variances, likelihood terms.

The paper counts t = 1..T and writes t = 0 for clean data; Diffusers and the networks count i = t - 1 = 0..T-1.
`DiffusionTable` is indexed by i. Only [`DiffusionTable.alpha_bar`] and [`DiffusionTable.signal_and_noise`] take the
paper's t (or s), so they alone convert between the two.

Tables are float64; what they hand out for use on images is float32.
"""

import math

import torch
import torch.nn.functional as F


HOLDING_ROUNDS = 4  # see `held_to`


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def cosine_betas(num_train_timesteps: int) -> torch.Tensor:
    """alpha_bar(t) = f(t)/f(0), f(t) = cos^2((t/T + 0.008)/1.008 * pi/2), beta <= 0.999 (Nichol, Dhariwal, 2021)."""
    t = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def linear_betas(
    num_train_timesteps: int, beta_start: float | None = None, beta_end: float | None = None
) -> torch.Tensor:
    """betas from `beta_start` to `beta_end`; without them 1e-4 * 1000/T to 0.02 * 1000/T, which needs T >= 100."""
    if beta_start is None or beta_end is None:
        if num_train_timesteps < 100:
            raise ValueError(
                f"A linear schedule of {num_train_timesteps} steps has no default end points (its last beta would be "
                f"{20 / num_train_timesteps:.2g}): give `beta_start` and `beta_end`, or use 100 steps or more."
            )
        beta_start = 0.1 / num_train_timesteps if beta_start is None else beta_start
        beta_end = 20 / num_train_timesteps if beta_end is None else beta_end
    return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64, device="cpu")


def betas_for(
    beta_schedule: str, num_train_timesteps: int, beta_start: float | None = None, beta_end: float | None = None
) -> torch.Tensor:
    """float64 betas of a named schedule, in Diffusers' names: `"squaredcos_cap_v2"` (cosine) or `"linear"`."""
    if beta_schedule == "squaredcos_cap_v2":
        return cosine_betas(num_train_timesteps)
    if beta_schedule == "linear":
        return linear_betas(num_train_timesteps, beta_start, beta_end)
    raise ValueError(f"`beta_schedule` is {beta_schedule!r}; it must be 'squaredcos_cap_v2' or 'linear'.")


# ---------------------------------------------------------------------------------------------------------------------
# The forward process and its posterior


class DiffusionTable:
    r"""
    A discrete forward process: alpha_bar at n noise levels, growing noisier, and what follows from it.

    Args:
        alphas_cumprod (`torch.Tensor` of shape `(n,)`):
            alpha_bar, strictly decreasing within (0, 1); entry i belongs to the paper's t = i + 1.
        start (`float`, defaults to 1.0):
            alpha_bar of the level that the last reverse step arrives at: 1 for clean data, alpha_bar_s for a reverse
            process that is truncated at s (Section 3.2).
    """

    def __init__(self, alphas_cumprod: torch.Tensor, start: float = 1.0):
        self.alphas_cumprod = alphas_cumprod.to("cpu", torch.float64)
        levels = torch.cat([self.alphas_cumprod.new_tensor([start]), self.alphas_cumprod])
        if not (levels.diff() < 0).all() or levels[-1] <= 0:
            raise ValueError(f"alpha-bar must fall strictly from {start} and stay above 0, got {self.alphas_cumprod}.")
        self.alphas_cumprod_prev = levels[:-1]
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        self.log_betas = self.betas.log()
        # beta~_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) * beta_t
        self.posterior_variance = (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod) * self.betas
        self.posterior_log_variance_clipped = self._clipped_log(self.posterior_variance)
        # mean of q(x_{t-1} | x_t, x_0) = coef_x_0 * x_0 + coef_x_t * x_t
        self.coef_x_0 = self.alphas_cumprod_prev.sqrt() * self.betas / (1 - self.alphas_cumprod)
        self.coef_x_t = (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)
        # Reverse steps draw noise, except the one that arrives at clean data.
        self.draws_noise = (self.alphas_cumprod_prev < 1).double()
        self._alpha_bar = levels
        self._signal, self._noise = levels.sqrt(), (1 - levels).sqrt()
        self._on_device: dict[tuple[str, torch.device], torch.Tensor] = {}

    @classmethod
    def from_betas(cls, betas: torch.Tensor) -> "DiffusionTable":
        """The process whose steps add noise of variance beta `(n,)`."""
        return cls(torch.cumprod(1 - betas.double(), dim=0))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def respace(self, indices: torch.Tensor, start: float = 1.0) -> "DiffusionTable":
        """The process that visits only `indices` (ascending), with the same marginals there."""
        return DiffusionTable(self.alphas_cumprod[indices], start)

    def alpha_bar(self, t: int | torch.Tensor) -> torch.Tensor:
        """float64 alpha_bar at the paper's t in 0..T; `start` (1: clean) at t = 0."""
        return look_up(self._alpha_bar, t if isinstance(t, int) else torch.as_tensor(t, device="cpu"))

    def signal_and_noise(self, t: int | torch.Tensor, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) at the paper's t in 0..T, float32 on `device`."""
        t = t if isinstance(t, int) else torch.as_tensor(t, device=device)
        return self._float32("_signal", t, device), self._float32("_noise", t, device)

    # `index` is an int, or a tensor () or (B,), which has to be on `device`. An int costs no work there.

    def posterior_mean(self, x_0: torch.Tensor, x_t: torch.Tensor, index: int | torch.Tensor) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) for images (B, C, H, W)."""
        coef_x_0 = per_image(self._float32("coef_x_0", index, x_t.device))
        coef_x_t = per_image(self._float32("coef_x_t", index, x_t.device))
        return coef_x_0 * x_0 + coef_x_t * x_t

    def posterior_log_variance(
        self, index: int | torch.Tensor, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """log beta~, shaped to broadcast over images; the clean end takes the value of the step after it."""
        return per_image(self._float32("posterior_log_variance_clipped", index, device))

    def log_beta(self, index: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
        """log beta, shaped to broadcast over images."""
        return per_image(self._float32("log_betas", index, device))

    def noise_factor(self, index: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
        """1, but 0 for the step that arrives at clean data, shaped to broadcast over images."""
        return per_image(self._float32("draws_noise", index, device))

    def learned_range_log_variance(self, raw: torch.Tensor, index: int | torch.Tensor) -> torch.Tensor:
        """log Sigma = v log beta + (1 - v) log beta~ (Section 2.1), where v = (raw + 1) / 2 of the raw output."""
        v = (raw + 1) / 2
        return v * self.log_beta(index, raw.device) + (1 - v) * self.posterior_log_variance(index, raw.device)

    @staticmethod
    def _clipped_log(variance: torch.Tensor) -> torch.Tensor:
        # beta~ is 0 where a step arrives at clean data; its log takes the second step's value, as in Improved DDPM.
        if len(variance) > 1 and variance[0] == 0:
            variance = torch.cat([variance[1:2], variance[1:]])
        return variance.clamp(min=1e-20).log()

    def _float32(self, name: str, index: int | torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
        key = name, torch.device(device or "cpu") if isinstance(index, int) else index.device
        if key not in self._on_device:
            self._on_device[key] = getattr(self, name).to(device=key[1], dtype=torch.float32)
        return look_up(self._on_device[key], index)


def look_up(values: torch.Tensor, index: int | torch.Tensor) -> torch.Tensor:
    """`values[index]` for an index of any shape, but never waits for the device, and refuses a negative index."""
    if isinstance(index, int):
        if index < 0:
            raise IndexError(f"The index {index} is out of range.")
        return values[index]
    return values.index_select(0, index.flatten()).view(index.shape)


def per_image(values: torch.Tensor) -> torch.Tensor:
    """Scalars () or one value per image (B,) so that they broadcast over (B, C, H, W)."""
    return values if values.ndim == 0 else values[..., None, None, None]


def diffuse(x_0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    r"""
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon: a sample of q(x_t | x_0).

    The one place that makes forward noise: for training, for conditioning augmentation (Algorithm 1, line 12) and for
    restarts (Section 4.2). Never below float32, where small noise would be rounded away.

    Args:
        x_0, noise (`torch.Tensor` of shape `(B, C, H, W)`): images in [-1, 1] and standard normal noise.
        alpha, sigma (`torch.Tensor` of shape `()` or `(B,)`): what [`DiffusionTable.signal_and_noise`] returns.
    """
    dtype = torch.promote_types(x_0.dtype, torch.float32)
    return per_image(alpha) * x_0.to(dtype) + per_image(sigma) * noise.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# What the network predicts


class EpsilonPrediction:
    """The network predicts the noise epsilon (Section 2.1)."""

    def target(self, x_0, noise, alpha, sigma):
        """What the network should output, like `x_0`, for images `x_0` and `noise` mixed by `alpha` and `sigma`."""
        return noise

    def x_0(self, prediction, x_t, alpha, sigma):
        """The clean images that an output `prediction` at `x_t` stands for."""
        return (x_t - per_image(sigma) * prediction) / per_image(alpha)

    def loss_weight(self, sigma):
        """The factor of each image's squared error."""
        return 1.0


class VelocityPrediction:
    """The network predicts v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans and Ho, 2022)."""

    def target(self, x_0, noise, alpha, sigma):
        """What the network should output, like `x_0`, for images `x_0` and `noise` mixed by `alpha` and `sigma`."""
        return per_image(alpha) * noise - per_image(sigma) * x_0

    def x_0(self, prediction, x_t, alpha, sigma):
        """The clean images that an output `prediction` at `x_t` stands for."""
        return per_image(alpha) * x_t - per_image(sigma) * prediction

    def of_x_0(self, x_0, x_t, alpha, sigma):
        """The output at `x_t` that stands for the clean images `x_0`: the inverse of [`x_0`], for sigma > 0."""
        return (per_image(alpha) * x_t - x_0) / per_image(sigma)

    def loss_weight(self, sigma):
        """The factor of each image's squared error."""
        return 1.0


class SamplePrediction:
    """
    The network predicts x_0, and the loss is that of the v which follows from it (Li and He, 2025): no noise has to
    pass through a network whose patches have more values than its first level has channels.

    v = (sqrt(alpha_bar) x_t - x_0) / sigma, so its loss is that of x_0 times 1 / sigma^2. The factor stays at 11 below
    sigma = 0.3: one that grows to 400, at 0.05, learned more slowly at all levels of noise in one short trial of
    `avatars_64_to_256`.
    """

    def target(self, x_0, noise, alpha, sigma):
        """What the network should output, like `x_0`, for images `x_0` and `noise` mixed by `alpha` and `sigma`."""
        return x_0

    def x_0(self, prediction, x_t, alpha, sigma):
        """The clean images that an output `prediction` at `x_t` stands for."""
        return prediction

    def of_x_0(self, x_0, x_t, alpha, sigma):
        """The output at `x_t` that stands for the clean images `x_0`: the inverse of [`x_0`]."""
        return x_0

    def loss_weight(self, sigma):
        """The factor of each image's squared error."""
        return 1 / sigma.clamp(min=0.3) ** 2


Prediction = EpsilonPrediction | VelocityPrediction | SamplePrediction
PREDICTIONS = {
    "epsilon": EpsilonPrediction(),
    "v_prediction": VelocityPrediction(),
    "sample": SamplePrediction(),
}


def prediction_for(prediction_type: str) -> Prediction:
    """The object behind a Diffusers `prediction_type`."""
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"`prediction_type` is {prediction_type!r}; it must be one of {sorted(PREDICTIONS)}.")
    return PREDICTIONS[prediction_type]


def epsilon_from_x_0(x_0: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """epsilon = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)."""
    return (x_t - per_image(alpha) * x_0) / per_image(sigma)


def ddim_step(
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    alpha_after: torch.Tensor,
    sigma_after: torch.Tensor,
) -> torch.Tensor:
    """
    DDIM's step (Song et al., 2020): the noise that is in x_t (B, C, H, W) beside its x_0, mixed with x_0 by
    `alpha_after` and `sigma_after` in place of `alpha` and `sigma`, each () or (B,).
    """
    return diffuse(x_0, epsilon_from_x_0(x_0, x_t, alpha, sigma), alpha_after, sigma_after)


def limit_x_0(x_0: torch.Tensor, config) -> torch.Tensor:
    r"""
    Clips a predicted x_0, or thresholds it dynamically (Imagen, Section 2.3), as a scheduler's config says.

    Args:
        x_0 (`torch.Tensor` of shape `(B, C, H, W)`): a prediction of clean images.
        config (`Mapping`): `thresholding`, `dynamic_thresholding_ratio`, `sample_max_value`, `clip_sample` and
            `clip_sample_range`, with Diffusers' meanings.
    """
    if config["thresholding"]:
        limit = torch.quantile(x_0.flatten(1).abs(), config["dynamic_thresholding_ratio"], dim=1)
        limit = per_image(limit.clamp(1, max(1, config["sample_max_value"])))
        return x_0.clamp(-limit, limit) / limit
    if config["clip_sample"]:
        return x_0.clamp(-config["clip_sample_range"], config["clip_sample_range"])
    return x_0


def held_to(x_0: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
    """
    x_0 (B, C, H, W) moved so that its area averages are `low_res` (B, C, h, w), both in [-1, 1]: those pixels of each
    block that have not reached the limit are shifted by what the average lacks, and clipped; `HOLDING_ROUNDS` times,
    since clipping undoes a part.
    """
    factor = x_0.shape[-1] // low_res.shape[-1]
    for _ in range(HOLDING_ROUNDS):
        lacking = F.interpolate(low_res - F.avg_pool2d(x_0, factor), scale_factor=factor)
        is_free = ((x_0 < 1) & (lacking > 0) | (x_0 > -1) & (lacking < 0)).to(x_0.dtype)
        share = F.interpolate(F.avg_pool2d(is_free, factor), scale_factor=factor)
        x_0 = (x_0 + is_free * lacking / share.clamp(min=1 / factor**2)).clamp(-1, 1)
    return x_0


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood terms of Eq. (1), in nats per value


def gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2) -> torch.Tensor:
    """KL(N(mean_1, exp(log_variance_1)) || N(mean_2, exp(log_variance_2))), elementwise, in nats."""
    variance_ratio = (log_variance_1 - log_variance_2).exp()
    distance = (mean_1 - mean_2) ** 2 * (-log_variance_2).exp()
    return 0.5 * (log_variance_2 - log_variance_1 + variance_ratio + distance - 1)


def discretized_gaussian_nll(x_0: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    r"""
    -log p(x_0 | x_1): the Gaussian's mass in the bin of an 8-bit value, the end bins open (Ho et al., 2020, Eq. 13).

    Args:
        x_0 (`torch.Tensor`): 8-bit values scaled to [-1, 1], so that bins are 2/255 wide.
        mean, log_scale (`torch.Tensor`): mean and log standard deviation, broadcastable to `x_0`.

    Returns:
        `torch.Tensor`: nats, elementwise.
    """
    # A scale of exp(-30) is a point already; squares of much smaller ones overflow.
    distance, inverse_scale, half_bin = x_0 - mean, (-log_scale).clamp(max=30).exp(), 1 / 255
    # The bin mirrored to the lower tail, where differences of the distribution function keep their digits.
    log_upper = log_ndtr((half_bin - distance.abs()) * inverse_scale)
    log_lower = log_ndtr((-half_bin - distance.abs()) * inverse_scale)
    log_inner = log_upper + torch.log(-torch.expm1(log_lower - log_upper).clamp(max=-1e-12))
    log_below = log_ndtr((distance + half_bin) * inverse_scale)
    log_above = log_ndtr((half_bin - distance) * inverse_scale)
    return -torch.where(x_0 < -0.999, log_below, torch.where(x_0 > 0.999, log_above, log_inner))


def log_ndtr(z: torch.Tensor) -> torch.Tensor:
    """log Phi(z). The gradient of torch's own loses its digits in the lower tail and is infinite or 0 far out."""
    low = z.clamp(max=-1)
    log_tail = torch.log(torch.special.erfcx(-low / math.sqrt(2)) / 2) - low**2 / 2
    return torch.where(z < -1, log_tail, torch.special.log_ndtr(z.clamp(min=-1)))
