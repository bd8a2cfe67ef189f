r"""
Time steps that suit a stage's trajectories (GITS; Chen et al., "On the Trajectory Regularity of ODE-based Diffusion
Sampling", 2024, Section 4).

Trajectories of the probability flow ODE have nearly the same shape whatever they end in, so a few of them tell where
steps may be long. They are followed on a fine grid; the cost of a jump between two of its points is how far one Euler
step misses the trajectory; and of all grids of N steps dynamic programming finds the one of least cost.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from ..pipelines.denoising import make_sampler
from ..pipelines.solvers import LOWEST_LOG_SNR, scheduler_of
from ..pipelines.stages import CascadeStage, StageOptions


NUM_POINTS = 64  # of the fine grid
GROWTH = 1.15  # by which an error counts for more the later it is made, as in the paper


class Trajectories(NamedTuple):
    r"""
    Solutions of the ODE in x / sqrt(alpha_bar), whose time is sigma / sqrt(alpha_bar).

    `timesteps` (n,): indices t - 1 from high to low. `sigmas` (n + 1,): the last is 0. `points` (n + 1, B, D) in
    float64: the last are clean images.
    """

    timesteps: list[int]
    sigmas: np.ndarray
    points: np.ndarray


def fine_grid(alphas_cumprod: torch.Tensor, num_points: int = NUM_POINTS) -> list[int]:
    """Indices t - 1, spread evenly in log-SNR from where solvers start to the cleanest; from high to low."""
    log_snr = torch.logit(alphas_cumprod.double()).numpy() / 2
    noisiest = int((log_snr >= LOWEST_LOG_SNR).sum()) - 1
    levels = np.linspace(log_snr[noisiest], log_snr[0], num_points)
    indices = np.interp(levels, log_snr[noisiest::-1], np.arange(noisiest, -1, -1)).round()
    return np.unique(indices.astype(np.int64))[::-1].tolist()


@torch.no_grad()
def follow(
    stage: CascadeStage,
    options: StageOptions,
    labels: torch.Tensor | None,
    low_res: torch.Tensor | None,
    generator: torch.Generator,
    num_images: int = 16,
    num_points: int = NUM_POINTS,
) -> Trajectories:
    """
    `num_images` trajectories of a stage, by Euler's method (which is DDIM) on the fine grid.

    Args:
        options: s and w.
        labels: int64 (B,), for a conditional stage.
        low_res: (B, C, h, w) in [-1, 1], clean, for a super-resolution stage.
        generator: of the noise.
    """
    timesteps = fine_grid(stage.scheduler.alphas_cumprod, num_points)
    config, device = stage.unet.config, stage.unet.device
    ddim = scheduler_of(stage, "ddim")
    sampler = make_sampler(stage.name, stage.unet, ddim, len(timesteps), device, timesteps)
    if stage.noising_scheduler is not None:
        low_res = stage.noising_scheduler.forward_marginal(low_res, options.augmentation_level, generator)
    denoise = stage.denoiser(labels, low_res, options.augmentation_level, options.guidance_scale)
    sample = randn_tensor(
        (num_images, config.in_channels, config.sample_size, config.sample_size), generator, device, torch.float32
    )
    samples = [sample]
    for index in range(len(timesteps)):
        samples.append(sampler.step(index, denoise, samples[-1], generator))
    alphas_cumprod = np.append(stage.scheduler.alphas_cumprod.double().numpy()[timesteps], 1.0)
    signal = np.sqrt(alphas_cumprod)
    points = torch.stack(samples).flatten(2).double().cpu().numpy() / signal[:, None, None]
    return Trajectories(timesteps, np.sqrt(1 - alphas_cumprod) / signal, points)


def jump_costs(trajectories: Trajectories) -> np.ndarray:
    """
    Mean distance (n, n + 1) between where one step of Euler from point i arrives at the time of j and the trajectory
    there; infinite where j does not come after i.
    """
    _, sigmas, points = trajectories
    num_points = len(sigmas)
    costs = np.full((num_points - 1, num_points), np.inf)
    for i in range(num_points - 1):
        slope = (points[i + 1] - points[i]) / (sigmas[i + 1] - sigmas[i])
        arrived = points[i] + (sigmas[i + 1 :] - sigmas[i])[:, None, None] * slope
        costs[i, i + 1 :] = np.linalg.norm(arrived - points[i + 1 :], axis=2).mean(axis=1)
    return costs


def best_grid(costs: np.ndarray, num_steps: int, growth: float = GROWTH) -> list[int]:
    """
    The points 0 = i_1 < ... < i_N from which to jump, the last to the end, so that the sum of growth^k c_k over the
    jumps k = 0, ..., N - 1 is least.

    Args:
        costs: (n, n + 1), of the jump from i to j; those that are infinite are not made.

    Raises:
        ValueError: there are fewer points than steps.
    """
    num_points = len(costs)
    if num_steps > num_points:
        raise ValueError(
            f"`num_inference_steps` is {num_steps}; it must be at most {num_points}, the points from which time steps "
            "are chosen."
        )
    to_go, next_points = costs[:, -1], []  # the least cost from each point to the end in a number of jumps
    for _ in range(num_steps - 1):
        through = costs[:, :-1] + growth * to_go
        next_points.append(through.argmin(axis=1))
        to_go = through.min(axis=1)
    grid = [0]
    for after in reversed(next_points):
        grid.append(int(after[grid[-1]]))
    return grid


def find_timesteps(trajectories: Trajectories, counts: Iterable[int]) -> dict[int, list[int]]:
    """
    The best time steps, indices t - 1 from high to low, for each number of steps.

    Raises:
        ValueError: as [`best_grid`].
    """
    costs = jump_costs(trajectories)
    return {count: [trajectories.timesteps[point] for point in best_grid(costs, count)] for count in counts}
