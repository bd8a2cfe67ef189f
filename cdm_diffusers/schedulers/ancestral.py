"""What both schedulers share: the forward process, and ancestral sampling along any grid of its noise levels."""

from typing import NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion import DiffusionTable, betas_for, diffuse, limit_x_0, look_up, prediction_for


class TrainingTimes(NamedTuple):
    """Times of a training batch, each (B,): what the network is fed, sqrt(alpha_bar), sqrt(1 - alpha_bar), and the
    index i = t - 1 (None for continuous times)."""

    condition: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    index: torch.Tensor | None


class AncestralScheduler(SchedulerMixin, ConfigMixin):
    """Base of [`CascadedDDPMScheduler`] and [`ContinuousDDPMScheduler`]; their configs say everything else."""

    order = 1
    init_noise_sigma = 1.0
    variance_types = ("fixed_small", "fixed_large")

    def _set_up(self):
        """Checks the config and builds the training table and the full-length grid; ends a subclass's `__init__`."""
        config = self.config
        if config.variance_type not in self.variance_types:
            raise ValueError(f"`variance_type` is {config.variance_type!r}; it must be one of {self.variance_types}.")
        if config.num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` is {config.num_train_timesteps}; it must be at least 1.")
        if config.timestep_spacing != "linspace":
            raise ValueError(f"`timestep_spacing` is {config.timestep_spacing!r}; only 'linspace' is supported.")
        self.prediction = prediction_for(config.prediction_type)
        betas = betas_for(config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end)
        self.table = DiffusionTable.from_betas(betas)
        self.num_inference_steps = None
        self._set_grid(torch.arange(len(self.table)), self.table, "cpu")
        if config.beta_schedule == "linear":
            self.register_to_config(beta_start=float(betas[0]), beta_end=float(betas[-1]))
        # `from_config` of another class drops what this class left at its defaults; other classes' defaults differ.
        self.register_to_config(_use_default_values=[])

    def _linspace(self, num_inference_steps: int) -> torch.Tensor:
        """`num_inference_steps` indices spread evenly over 0..T-1, ascending; a single one is the last."""
        num_train_timesteps = self.config.num_train_timesteps
        if num_inference_steps > num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}; at most {num_train_timesteps} (the training steps)."
            )
        if num_inference_steps == 1:
            return torch.tensor([num_train_timesteps - 1])
        # numpy's linspace, as in Diffusers: torch's rounds ties to other indices
        return torch.from_numpy(np.linspace(0, num_train_timesteps - 1, num_inference_steps).round().astype(np.int64))

    def _set_grid(self, timesteps: torch.Tensor, table: DiffusionTable, device: torch.device | str | None):
        """Sampling visits `timesteps` (ascending) from the last to the first; `table` has an entry for each."""
        self.inference_table = table
        self.timesteps = timesteps.flip(0).to(device)
        size = int(timesteps.max()) + 1 if len(timesteps) else 0
        positions = torch.full((size,), -1)
        positions[timesteps] = torch.arange(len(timesteps))
        self._positions = positions.to(device)

    def _check_set_timesteps(self, num_inference_steps: int, stop_at: int, start_at: int | None):
        num_train_timesteps = self.config.num_train_timesteps
        if type(num_inference_steps) is not int or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; it must be a positive integer.")
        for name, time in (("stop_at", stop_at), ("start_at", start_at)):
            if time is not None and (type(time) is not int or not 0 <= time <= num_train_timesteps):
                raise ValueError(
                    f"`{name}` is {time!r}; it must be an integer in 0..{num_train_timesteps} (the training steps)."
                )
        if start_at is not None and start_at <= stop_at:
            raise ValueError(f"`start_at` is {start_at}; it must be above `stop_at`, which is {stop_at}.")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha_bar of the training process at indices t - 1, `(T,)`, float64 on the CPU."""
        return self.table.alphas_cumprod

    @property
    def betas(self) -> torch.Tensor:
        """beta of the training process at indices t - 1, `(T,)`, float64 on the CPU."""
        return self.table.betas

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: the network takes x_t itself."""
        return sample

    # -----------------------------------------------------------------------------------------------------------------
    # Reverse process

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        x_{t-1} ~ p_theta(x_{t-1} | x_t) (Section 2.1), where t - 1 is the next point of the grid.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, H, W)` or `(B, 2C, H, W)`):
                The network's prediction, followed by the raw variance output where the variance is learned.
            timestep (`int` or `torch.Tensor` of shape `()` or `(B,)`):
                An entry of `timesteps`, or one for each image.
            sample (`torch.Tensor` of shape `(B, C, H, W)`): x_t.
            generator (`torch.Generator` or a list of them, one per image, *optional*): decides the noise.
            return_dict (`bool`, defaults to `True`): whether to return a `DDPMSchedulerOutput` or a tuple.

        Returns:
            [`~schedulers.scheduling_ddpm.DDPMSchedulerOutput`]: `prev_sample` and the limited `pred_original_sample`,
            float32 or wider whatever came in.
        """
        position = self._position(timestep).to(sample.device)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        sample, model_output = sample.to(dtype), model_output.to(dtype)
        channels = sample.shape[1]
        learns_variance = self.config.variance_type == "learned_range"
        if model_output.shape[1] not in ((2 * channels,) if learns_variance else (channels, 2 * channels)):
            raise ValueError(
                f"`model_output` has {model_output.shape[1]} channels for a sample of {channels}; "
                f"`variance_type={self.config.variance_type!r}` needs {2 * channels if learns_variance else channels}."
            )

        # 1. mean and variance of p(x_{t-1} | x_t)
        prediction, raw_variance = model_output[:, :channels], model_output[:, channels:]
        table = self.inference_table
        x_0, mean, log_variance = self.reverse_moments(table, position, sample, prediction, raw_variance)

        # 2. noise, but none at the clean end
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
        prev_sample = mean + table.noise_factor(position) * (0.5 * log_variance).exp() * noise

        if not return_dict:
            return prev_sample, x_0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)

    def reverse_moments(
        self,
        table: DiffusionTable,
        position: torch.Tensor,
        x_t: torch.Tensor,
        prediction: torch.Tensor,
        raw_variance: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        x_0 as predicted, limited to the range of images, and mean and log variance of p_theta(x_{t-1} | x_t).

        Args:
            table ([`DiffusionTable`]): of the grid.
            position (`torch.Tensor` of shape `()` or `(B,)`): of t on the grid; the step to its clean end is 0.
            x_t, prediction (`torch.Tensor` of shape `(B, C, H, W)`): the network's input and what it predicts.
            raw_variance (`torch.Tensor`): its raw variance, like x_t where that is learned; else not used.
        """
        alpha, sigma = table.signal_and_noise(position + 1, x_t.device)
        x_0 = limit_x_0(self.prediction.x_0(prediction, x_t, alpha, sigma), self.config)
        if self.config.variance_type == "learned_range":
            log_variance = table.learned_range_log_variance(raw_variance, position)
        elif self.config.variance_type == "fixed_large":
            log_variance = table.log_beta(position)
        else:
            log_variance = table.posterior_log_variance(position)
        return x_0, table.posterior_mean(x_0, x_t, position), log_variance

    def _position(self, timestep: int | torch.Tensor) -> torch.Tensor:
        timestep = torch.as_tensor(timestep, device=self._positions.device)
        if timestep.device.type != "cpu":
            return look_up(self._positions, timestep)
        outside = (timestep < 0) | (timestep >= len(self._positions))
        if outside.any() or (self._positions[timestep] < 0).any():
            raise ValueError(
                f"`timestep` is {timestep.tolist()}; it must be one of `timesteps`, {self.timesteps.tolist()}."
            )
        return self._positions[timestep]

    # -----------------------------------------------------------------------------------------------------------------
    # Forward process

    def forward_marginal(
        self,
        x_0: torch.Tensor,
        s: int | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        r"""
        z_s ~ q(z_s | z_0) of the training process; `x_0` itself at s = 0 (Algorithm 2, line 10).

        Args:
            x_0 (`torch.Tensor` of shape `(B, C, H, W)`): images in [-1, 1].
            s (`int` or `torch.Tensor` of shape `(B,)`): the paper's time, 0..T.
            generator (`torch.Generator` or a list of them, one per image, *optional*): decides the noise.

        Returns:
            `torch.Tensor`: float32 or wider.
        """
        noise = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=torch.float32)
        return diffuse(x_0, noise, *self.table.signal_and_noise(s, x_0.device))

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t at indices `timesteps` = t - 1 in 0..T-1, with Diffusers' signature; see [`forward_marginal`] for s."""
        return diffuse(original_samples, noise, *self.table.signal_and_noise(timesteps + 1, original_samples.device))

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The v target at indices `timesteps`, with Diffusers' signature."""
        alpha, sigma = self.table.signal_and_noise(timesteps + 1, sample.device)
        return prediction_for("v_prediction").target(sample, noise, alpha, sigma)
