"""The scheduler of stages conditioned on a discrete time."""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers.configuration_utils import register_to_config

from ..draws import draw
from .ancestral import AncestralScheduler, TrainingTimes


class CascadedDDPMScheduler(AncestralScheduler):
    r"""
    Ancestral sampling at discrete times, with learned or fixed variances (Section 2.1), which can stop at any s > 0
    (truncated conditioning augmentation, Section 3.2).

    Its config keys are Diffusers' own: `DPMSolverMultistepScheduler.from_config(scheduler.config)` and the like work,
    and `CascadedDDPMScheduler.from_config` makes a scheduler with the same forward process from a config of
    Diffusers', or raises a ValueError if its schedule is none of these.

    Args:
        num_train_timesteps (`int`, defaults to 4000): the T of the forward process.
        beta_schedule (`"squaredcos_cap_v2"` or `"linear"`, defaults to `"squaredcos_cap_v2"`): cosine or linear.
        beta_start, beta_end (`float`, *optional*):
            End points of a linear schedule; by default 1e-4 * 1000/T and 0.02 * 1000/T, for T >= 100.
        variance_type (`"learned_range"`, `"fixed_small"` or `"fixed_large"`, defaults to `"learned_range"`):
            Between beta~ and beta as the network predicts; beta~; or beta.
        prediction_type (`"epsilon"`, `"v_prediction"` or `"sample"`, defaults to `"epsilon"`):
            What the network predicts; `"sample"` is x_0.
        clip_sample (`bool`, defaults to `True`), clip_sample_range (`float`, defaults to 1.0):
            Whether and where a predicted x_0 is clipped.
        thresholding (`bool`, defaults to `False`): Dynamic thresholding of a predicted x_0, instead of clipping.
        dynamic_thresholding_ratio (`float`, defaults to 0.995), sample_max_value (`float`, defaults to 1.0):
            The quantile of the absolute x_0 that is its threshold, and the largest threshold.
        timestep_spacing (`"linspace"`): how `set_timesteps` spreads steps, which is OpenAI's respacing.

    Examples:

    ```python
    import torch

    from cdm_diffusers import CascadedDDPMScheduler, CascadedUNet2DModel

    folder = "checkpoints/fashion-mnist-32"
    unet = CascadedUNet2DModel.from_pretrained(folder, subfolder="base_unet")
    scheduler = CascadedDDPMScheduler.from_pretrained(folder, subfolder="base_scheduler")

    sample, class_labels = torch.randn(2, 1, 8, 8), torch.tensor([8, 9])
    scheduler.set_timesteps(20, stop_at=100)  # the last step arrives at z_100
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = unet(sample, timestep, class_labels=class_labels).sample  # (2, 2, 8, 8), the variance included
        sample = scheduler.step(output, timestep, sample).prev_sample
    ```
    """

    variance_types = ("learned_range", "fixed_small", "fixed_large")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 4000,
        beta_schedule: str = "squaredcos_cap_v2",
        beta_start: float | None = None,
        beta_end: float | None = None,
        variance_type: str = "learned_range",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
    ):
        self._set_up()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        stop_at: int = 0,
        start_at: int | None = None,
        timesteps: Sequence[int] | None = None,
    ):
        r"""
        Spreads `num_inference_steps` evenly from t = 1 to T, or takes `timesteps`, and keeps those between `stop_at`
        and `start_at`.

        Args:
            num_inference_steps (`int`, *optional*): steps of the whole grid, 1..T; not with `timesteps`.
            device (`torch.device` or `str`, *optional*): where `timesteps` and the step's tables go.
            stop_at (`int`, defaults to 0):
                The paper's s in 0..T. Grid times above s are kept, and the last step, a noisy one, lands exactly on
                z_s. s = T leaves no step.
            start_at (`int`, *optional*):
                The paper's t in 1..T. Grid times below t are kept, and the first step starts exactly at x_t: for a
                restart (Section 4.2). T by default.
            timesteps (`list[int]`, *optional*): indices t - 1 in 0..T-1, from high to low.
        """
        num_inference_steps, timesteps = self._checked_choice(num_inference_steps, timesteps)
        num_inference_steps, stop_at, start_at = self._checked_grid(num_inference_steps, stop_at, start_at)
        self.num_inference_steps = num_inference_steps
        if timesteps is None:
            grid = self._linspace(num_inference_steps)
        else:
            grid = torch.tensor(timesteps[::-1], device="cpu")
        if start_at is not None:
            grid = torch.cat([grid[grid + 1 < start_at], grid.new_tensor([start_at - 1])])
        grid = grid[grid + 1 > stop_at]
        self._set_grid(grid, self.table.respace(grid, start=float(self.table.alpha_bar(stop_at))), device)

    def draw_training_times(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> TrainingTimes:
        """t ~ U{1..T} for each image (Algorithm 1, line 3)."""
        index = draw(partial(torch.randint, len(self.table)), (batch_size,), generator, device)
        alpha, sigma = self.table.signal_and_noise(index + 1, device)
        return TrainingTimes(index, alpha, sigma, index)
