"""Several samples of the same input: how near they are to the truth, and whether they differ as much as they err."""

import torch


def crps(members: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """
    Continuous ranked probability score of images (N, C, H, W) by samples (K, N, C, H, W) of each: mean over pixels
    (N,), unbiased for few samples; the lower, the better.
    """
    error = (members - truth).abs().mean(0)
    spread = sum((one - members).abs().sum(0) for one in members) / (len(members) * (len(members) - 1))
    return (error - spread / 2).flatten(1).mean(1)


def squared_spread_and_error(members: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Of each image (N,), means over pixels: the samples' variance, and the squared error of their mean. Their expected
    values are equal if the truth could be one of the samples.
    """
    variance = members.var(0) * (1 + 1 / len(members))
    error = (members.mean(0) - truth).square()
    return variance.flatten(1).mean(1), error.flatten(1).mean(1)
