"""Power spectra of images: whether samples have as much detail as real images, octave by octave."""

import torch

from ..data.transforms import to_float


BATCH_SIZE = 128


def spectrum_ratios(images: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """Power of images over that of real ones, both uint8 (N, C, R, R), by octaves of the absolute frequency."""
    powers = [power_by_frequency(of) for of in (images, real)]
    size, ratios, low = images.shape[-1], {}, 1
    while low < size // 2:
        octave = [power[low : 2 * low].sum() for power in powers]
        ratios[f"{low} to {2 * low}"] = round((octave[0] / octave[1]).item(), 4)
        low *= 2
    return ratios


def power_by_frequency(images: torch.Tensor) -> torch.Tensor:
    """Mean power of uint8 images (N, C, R, R) at absolute frequencies of k to k + 1 cycles per image, k < R / 2."""
    size = images.shape[-1]
    frequency = torch.fft.fftfreq(size, 1 / size)
    bins = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().long().flatten()
    total = torch.zeros(bins.max() + 1, dtype=torch.float64)
    for batch in images.split(BATCH_SIZE):
        power = torch.fft.fft2(to_float(batch)).abs().square().double().mean(1).sum(0)
        total.index_add_(0, bins, power.flatten())
    return total[: size // 2] / len(images)
