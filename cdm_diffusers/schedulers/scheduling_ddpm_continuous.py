"""The scheduler of stages conditioned on a noise level."""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers.configuration_utils import register_to_config

from ..diffusion import DiffusionTable, betas_for
from ..draws import draw
from .ancestral import AncestralScheduler, TrainingTimes


class ContinuousDDPMScheduler(AncestralScheduler):
    r"""
    Ancestral sampling for networks conditioned on a continuous noise level, so that the number of steps and the
    schedule are chosen after training (Section 4.4; WaveGrad, SR3).

    The paper says "conditioned on alpha_bar_t"; as in WaveGrad and SR3, the network is given its square root,
    sqrt(alpha_bar_t), drawn in training uniformly between neighbouring steps of a T-step schedule.

    Args:
        num_train_timesteps (`int`, defaults to 2000): T of the training schedule.
        beta_schedule (`"linear"` or `"squaredcos_cap_v2"`, defaults to `"linear"`): the training schedule.
        beta_start (`float`, defaults to 1e-6), beta_end (`float`, defaults to 1e-2): its end points, where linear.
        variance_type (`"fixed_large"` or `"fixed_small"`, defaults to `"fixed_large"`): beta (as in SR3) or beta~.
        prediction_type, clip_sample, clip_sample_range: as in [`CascadedDDPMScheduler`].
        thresholding, dynamic_thresholding_ratio, sample_max_value: likewise.
        timestep_spacing (`"linspace"`): likewise.
        inference_beta_schedule (`str`, *optional*):
            A schedule of its own for sampling, of as many steps as are asked for. By default the training schedule is
            respaced evenly.
        inference_beta_start, inference_beta_end (`float`, *optional*):
            End points of a linear inference schedule, found by search; required below 100 steps.

    Examples:

    ```python
    import torch

    from cdm_diffusers import CascadedUNet2DModel, ContinuousDDPMScheduler

    folder = "checkpoints/fashion-mnist-32"
    unet = CascadedUNet2DModel.from_pretrained(folder, subfolder="super_res_2_unet")
    scheduler = ContinuousDDPMScheduler.from_pretrained(folder, subfolder="super_res_2_scheduler")

    sample, low_res = torch.randn(2, 1, 32, 32), torch.rand(2, 1, 16, 16) * 2 - 1
    scheduler.set_timesteps(4)
    levels = scheduler.inference_table.alphas_cumprod.flip(0).sqrt()  # what the network is conditioned on
    for timestep, level in zip(scheduler.timesteps, levels):
        with torch.no_grad():
            output = unet(sample, level, low_res=low_res, class_labels=torch.tensor([8, 9])).sample
        sample = scheduler.step(output, timestep, sample).prev_sample
    ```
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        beta_schedule: str = "linear",
        beta_start: float | None = 1e-6,
        beta_end: float | None = 1e-2,
        variance_type: str = "fixed_large",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        inference_beta_schedule: str | None = None,
        inference_beta_start: float | None = None,
        inference_beta_end: float | None = None,
    ):
        self._set_up()
        times = torch.arange(num_train_timesteps + 1, device="cpu")
        self._distance_to_clean = (1 - self.table.alpha_bar(times).sqrt()).float()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        stop_at: int = 0,
        start_at: int | None = None,
        timesteps: Sequence[int] | None = None,
    ):
        r"""
        Lays out `num_inference_steps` noise levels, or those of `timesteps`, and keeps those between `stop_at` and
        `start_at`.

        The attribute `timesteps` then counts the levels, n-1..0; the levels themselves are in `inference_table`.

        Args:
            num_inference_steps (`int`, *optional*):
                Steps of the whole grid; at most T, unless the config names an inference schedule. Not with
                `timesteps`.
            device (`torch.device` or `str`, *optional*): where `timesteps` and the step's tables go.
            stop_at (`int`, defaults to 0), start_at (`int`, *optional*):
                Times of the training schedule in 0..T between which sampling runs, as in [`CascadedDDPMScheduler`].
            timesteps (`list[int]`, *optional*):
                Indices t - 1 of the training schedule in 0..T-1, from high to low, whatever the inference schedule.
        """
        num_inference_steps, timesteps = self._checked_choice(num_inference_steps, timesteps)
        num_inference_steps, stop_at, start_at = self._checked_grid(num_inference_steps, stop_at, start_at)
        self.num_inference_steps = num_inference_steps
        if timesteps is None:
            levels = self._inference_levels(num_inference_steps)
        else:
            levels = self.table.alphas_cumprod[timesteps[::-1]]
        if start_at is not None:
            first = self.table.alpha_bar(start_at)
            levels = torch.cat([levels[levels > first], first[None]])
        last = self.table.alpha_bar(stop_at)
        levels = levels[levels < last]
        self._set_grid(torch.arange(len(levels), device="cpu"), DiffusionTable(levels, start=float(last)), device)

    def _inference_levels(self, num_inference_steps: int) -> torch.Tensor:
        """alpha_bar on the whole grid, ascending in time."""
        config = self.config
        if config.inference_beta_schedule is not None:
            betas = betas_for(
                config.inference_beta_schedule,
                num_inference_steps,
                config.inference_beta_start,
                config.inference_beta_end,
            )
            return DiffusionTable.from_betas(betas).alphas_cumprod
        return self.table.respace(self._linspace(num_inference_steps)).alphas_cumprod

    def draw_training_times(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> TrainingTimes:
        """sqrt(alpha_bar) ~ U(sqrt(alpha_bar_t), sqrt(alpha_bar_{t-1})), t ~ U{1..T}, for each image."""
        t = draw(partial(torch.randint, 1, len(self.table) + 1), (batch_size,), generator, device)
        share = draw(torch.rand, (batch_size,), generator, device)
        # 1 - sqrt(alpha_bar) is interpolated, since near clean images float32 has no digits left for sqrt(alpha_bar).
        distance = self._distance_to_clean = self._distance_to_clean.to(device)
        distance = torch.lerp(distance[t - 1], distance[t], share)
        alpha, sigma = 1 - distance, (distance * (2 - distance)).sqrt()
        return TrainingTimes(alpha, alpha, sigma, None)
