"""Conditioning augmentation (Section 3): what is done to a low-resolution image before it conditions a stage.

Both act on the low-resolution image itself, in [-1, 1]; the network upsamples the result (Algorithm 1, line 12).
"""

from functools import partial

import torch
import torch.nn.functional as F

from .draws import draw


class GaussianConditioningAugmentation:
    r"""
    z_s ~ q(z_s | z_0): forward process noise up to time s (Sections 3.2 and 3.3).

    Args:
        noising_scheduler ([`CascadedDDPMScheduler`] or [`ContinuousDDPMScheduler`]):
            The forward process of the preceding stage.
        level (`int`, *optional*):
            A fixed s in 0..T. By default s is drawn uniformly from 0..T for each image, which trains one network for
            every s (amortised).
        zero_level_probability (`float`, *optional*):
            The probability of s = 0, in [0, 1), of an amortised network; the other s stay equally probable. By default
            s = 0 is drawn like any other, once in T + 1 draws, and so hardly learned.
    """

    def __init__(self, noising_scheduler, level: int | None = None, zero_level_probability: float | None = None):
        num_levels = noising_scheduler.config.num_train_timesteps
        if level is not None and not 0 <= level <= num_levels:
            raise ValueError(f"`level` is {level}; it must lie in 0..{num_levels}, the noising scheduler's timesteps.")
        if zero_level_probability is not None and level is not None:
            raise ValueError(
                f"`zero_level_probability` is {zero_level_probability}, but `level` is fixed at {level}: leave one of "
                "them out."
            )
        if zero_level_probability is not None and not 0 <= zero_level_probability < 1:
            raise ValueError(f"`zero_level_probability` is {zero_level_probability}; it must lie in [0, 1).")
        self.noising_scheduler = noising_scheduler
        self.level = level
        self.zero_level_probability = zero_level_probability

    def __call__(self, low_res: torch.Tensor, generator: torch.Generator | None = None):
        """Returns z_s (float32, `low_res`'s shape) and the int64 s (B,) that the network is told."""
        if self.level is None:
            level = self._draw_levels(low_res.shape[0], generator, low_res.device)
        else:
            level = torch.full(low_res.shape[:1], self.level, device=low_res.device)
        return self.noising_scheduler.forward_marginal(low_res, level, generator), level

    def _draw_levels(self, batch_size: int, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
        num_levels = self.noising_scheduler.config.num_train_timesteps
        lowest = 0 if self.zero_level_probability is None else 1
        level = draw(partial(torch.randint, lowest, num_levels + 1), (batch_size,), generator, device)
        if self.zero_level_probability is not None:
            is_zero = draw(torch.rand, (batch_size,), generator, device) < self.zero_level_probability
            level = level.masked_fill(is_zero, 0)
        return level


class BlurConditioningAugmentation:
    r"""
    Gaussian blur of random width on a share of the examples (Section 3.1, Table 4a); none at inference.

    Args:
        kernel_size (`int`, defaults to 3): Odd filter size k in pixels of the low-resolution image.
        sigma_range (`tuple[float, float]`, defaults to `(0.4, 0.6)`): sigma ~ U(a, b) in pixels, drawn for each image.
        probability (`float`, defaults to 0.5): The share of examples that is blurred.
    """

    def __init__(self, kernel_size: int = 3, sigma_range: tuple[float, float] = (0.4, 0.6), probability: float = 0.5):
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` is {kernel_size}; it must be odd and positive.")
        if not 0 < sigma_range[0] <= sigma_range[1]:
            raise ValueError(f"`sigma_range` is {sigma_range}; it must be (low, high) with 0 < low <= high.")
        if not 0 <= probability <= 1:
            raise ValueError(f"`probability` is {probability}; it must lie in [0, 1].")
        self.kernel_size = kernel_size
        self.sigma_range = tuple(sigma_range)
        self.probability = probability

    def __call__(self, low_res: torch.Tensor, generator: torch.Generator | None = None):
        """Returns the images, some of them blurred, and None: the network is not told of the blur."""
        draws = draw(torch.rand, (2, low_res.shape[0]), generator, low_res.device, batch_dim=1)
        low, high = self.sigma_range
        blurred = gaussian_blur(low_res, low + (high - low) * draws[0], self.kernel_size)
        return torch.where((draws[1] < self.probability)[:, None, None, None], blurred, low_res), None


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, kernel_size: int = 3) -> torch.Tensor:
    """Separable Gaussian filter with its own sigma (B,) in pixels for each image (B, C, H, W); borders reflect."""
    batch_size, channels, height, width = images.shape
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1)  # (B, k)
    weights = weights.repeat_interleave(channels, dim=0).to(images.dtype)[:, None]  # (B*C, 1, k)
    planes = images.reshape(1, batch_size * channels, height, width)
    planes = F.pad(planes, (radius, radius, radius, radius), mode="reflect")
    planes = F.conv2d(planes, weights[..., None, :], groups=batch_size * channels)
    planes = F.conv2d(planes, weights[..., :, None], groups=batch_size * channels)
    return planes.reshape(images.shape)
