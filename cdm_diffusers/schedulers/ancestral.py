"""What both schedulers share: the forward process, and ancestral sampling along any grid of its noise levels."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion import DiffusionTable, betas_for, diffuse, limit_x_0, look_up, prediction_for
from ..draws import draw
from ..plain import plain


MOST_STEPS = 10**6


class TrainingTimes(NamedTuple):
    """Times of a training batch, each (B,): what the network is conditioned on, sqrt(alpha_bar), sqrt(1 - alpha_bar),
    and the index i = t - 1 (None for continuous times)."""

    condition: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    index: torch.Tensor | None


class AncestralScheduler(SchedulerMixin, ConfigMixin):
    """Base of [`CascadedDDPMScheduler`] and [`ContinuousDDPMScheduler`]; their configs say everything else."""

    order = 1
    init_noise_sigma = 1.0
    variance_types = ("fixed_small", "fixed_large")
    # those of `SOLVERS` of the pipelines, as a test checks
    _compatibles = [
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "IPNDMScheduler",
        "LMSDiscreteScheduler",
        "UniPCMultistepScheduler",
    ]

    @classmethod
    def _get_compatibles(cls) -> list[type[SchedulerMixin]]:
        return [cls, *super()._get_compatibles()]

    refine: Callable[[torch.Tensor], torch.Tensor] | None = None  # applied to the limited x_0 of each step

    def _set_up(self):
        """Checks the config and builds the training table and the full-length grid; ends a subclass's `__init__`."""
        self.register_to_config(**plain(self.config))
        config = self.config
        if config.variance_type not in self.variance_types:
            raise ValueError(f"`variance_type` is {config.variance_type!r}; it must be one of {self.variance_types}.")
        _check_steps("num_train_timesteps", config.num_train_timesteps)
        if config.timestep_spacing != "linspace":
            raise ValueError(f"`timestep_spacing` is {config.timestep_spacing!r}; only 'linspace' is supported.")
        self.prediction = prediction_for(config.prediction_type)
        betas = betas_for(config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end)
        self.table = DiffusionTable.from_betas(betas)
        self.num_inference_steps = None
        self._set_grid(torch.arange(len(self.table), device="cpu"), self.table, "cpu")
        if config.beta_schedule == "linear":
            self.register_to_config(beta_start=float(betas[0]), beta_end=float(betas[-1]))
        # `from_config` of another class drops what this class left at its defaults; other classes' defaults differ.
        self.register_to_config(_use_default_values=[])

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """
        What `from_config` makes of a config. That of one of Diffusers' schedulers gives the same forward process, or
        an error.

        Its entries that were left at their defaults are taken too, since these classes have other defaults, and
        without a `variance_type` the variance is beta~, as in Diffusers. Its timestep spacing is not taken: here that
        is always "linspace".

        Raises:
            ValueError: this class has no such process or variance.
        """
        own, defaulted = cls._get_init_keys(cls), config_dict.get("_use_default_values", ())
        config = {name: value for name, value in config_dict.items() if name in own or name not in defaulted}
        config.pop("_use_default_values", None)
        is_own = config.get("_class_name", cls.__name__) in ("CascadedDDPMScheduler", "ContinuousDDPMScheduler")
        if "beta_schedule" not in config and (defaulted or not is_own):
            raise ValueError(
                f"The config of {config.get('_class_name', 'another class')} has no `beta_schedule`; it must be that "
                f"of a scheduler with betas, which {cls.__name__} can replace."
            )
        if "trained_betas" in config_dict:  # as in all schedulers of Diffusers that have betas
            cls._check_betas({**config, **kwargs})
            config.pop("timestep_spacing", None)
            if config.get("variance_type") is None:
                config["variance_type"] = "fixed_small"
        return super().extract_init_dict(config, **kwargs)

    @classmethod
    def _check_betas(cls, config: Mapping[str, Any]):
        """Refuses betas that are not a named schedule of `betas_for`."""
        if config.get("trained_betas") is not None:
            raise ValueError(
                f"`trained_betas` is a list of {len(config['trained_betas'])}; it must be None: {cls.__name__} has "
                "only named schedules (`beta_schedule`)."
            )
        if config.get("rescale_betas_zero_snr"):
            raise ValueError(
                f"`rescale_betas_zero_snr` is True; it must be False: {cls.__name__} has only processes that end with "
                "some signal."
            )

    def _linspace(self, num_inference_steps: int) -> torch.Tensor:
        """`num_inference_steps` indices spread evenly over 0..T-1, ascending; a single one is the last."""
        num_train_timesteps = self.config.num_train_timesteps
        if num_inference_steps > num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}; it must be at most {num_train_timesteps} (the "
                "training steps)."
            )
        if num_inference_steps == 1:
            return torch.tensor([num_train_timesteps - 1], device="cpu")
        # numpy's linspace, as in Diffusers: torch's rounds ties to other indices
        return torch.from_numpy(np.linspace(0, num_train_timesteps - 1, num_inference_steps).round().astype(np.int64))

    def _set_grid(self, timesteps: torch.Tensor, table: DiffusionTable, device: torch.device | str | None):
        """Sampling visits `timesteps` (ascending) from the last to the first; `table` has an entry for each."""
        self.inference_table = table
        self.timesteps = timesteps.flip(0).to(device)
        size = int(timesteps.max()) + 1 if len(timesteps) else 0
        positions = timesteps.new_full((size,), -1)
        positions[timesteps] = torch.arange(len(timesteps), device=timesteps.device)
        self._positions = positions.to(device)

    def _checked_choice(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | None
    ) -> tuple[int | None, list[int] | None]:
        """A number of steps, and the times of the training schedule, if these are given instead of a number."""
        if timesteps is None:
            return num_inference_steps, None
        if num_inference_steps is not None:
            raise ValueError("`num_inference_steps` and `timesteps` were both given; give one of them.")
        timesteps = check_timesteps("`timesteps`", timesteps, len(self.table))
        return len(timesteps), timesteps

    def _checked_grid(
        self, num_inference_steps: int, stop_at: int, start_at: int | None
    ) -> tuple[int, int, int | None]:
        """The arguments as Python's integers; refuses other types, and what is out of range."""
        num_inference_steps, stop_at, start_at = plain((num_inference_steps, stop_at, start_at))
        num_train_timesteps = self.config.num_train_timesteps
        _check_steps("num_inference_steps", num_inference_steps)
        for name, time in (("stop_at", stop_at), ("start_at", start_at)):
            if time is not None and (type(time) is not int or not 0 <= time <= num_train_timesteps):
                raise ValueError(
                    f"`{name}` is {time!r}; it must be an integer in 0..{num_train_timesteps} (the training steps)."
                )
        if start_at is not None and start_at <= stop_at:
            raise ValueError(f"`start_at` is {start_at}; it must be above `stop_at`, which is {stop_at}.")
        return num_inference_steps, stop_at, start_at

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
            float32 or wider, whatever the dtype of the input.
        """
        _check_images("sample", sample)
        _check_images("model_output", model_output)
        position = self._position(timestep, len(sample)).to(sample.device)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        sample, model_output = sample.to(dtype), model_output.to(dtype)
        channels = sample.shape[1]
        learns_variance = self.config.variance_type == "learned_range"
        if len(model_output) != len(sample) or model_output.shape[2:] != sample.shape[2:]:
            raise ValueError(
                f"`model_output` is of shape {tuple(model_output.shape)}; it must have as many images as `sample`, of "
                f"shape {tuple(sample.shape)}, and of the same size."
            )
        if model_output.shape[1] not in ((2 * channels,) if learns_variance else (channels, 2 * channels)):
            raise ValueError(
                f"`model_output` has {model_output.shape[1]} channels for a sample of {channels}; "
                f"`variance_type={self.config.variance_type!r}` needs {2 * channels if learns_variance else channels}."
            )

        prediction, raw_variance = model_output[:, :channels], model_output[:, channels:]
        prev_sample, x_0 = self.reverse_step(position, sample, prediction, raw_variance, generator)
        if not return_dict:
            return prev_sample, x_0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)

    def reverse_step(
        self,
        position: int | torch.Tensor,
        x_t: torch.Tensor,
        prediction: torch.Tensor,
        raw_variance: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        x_{t-1} ~ p_theta(x_{t-1} | x_t) and the limited x_0, from the arguments of [`reverse_moments`], without
        checks: what [`step`] does, once it has found the `position` of its `timestep` on the grid.
        """
        table = self.inference_table
        x_0, mean, log_variance = self.reverse_moments(table, position, x_t, prediction, raw_variance)
        noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
        deviation = table.noise_factor(position, x_t.device) * (0.5 * log_variance).exp()  # 0 at the clean end
        return mean + deviation * noise, x_0

    def reverse_moments(
        self,
        table: DiffusionTable,
        position: int | torch.Tensor,
        x_t: torch.Tensor,
        prediction: torch.Tensor,
        raw_variance: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        x_0 as predicted, limited to the range of images, and mean and log variance of p_theta(x_{t-1} | x_t).

        Args:
            table ([`DiffusionTable`]): of the grid.
            position (`int`, or `torch.Tensor` of shape `()` or `(B,)`):
                Of t on the grid; the step to its clean end is 0.
            x_t, prediction (`torch.Tensor` of shape `(B, C, H, W)`): the network's input and what it predicts.
            raw_variance (`torch.Tensor`): its raw variance, shaped like x_t if that is learned; else not used.
        """
        alpha, sigma = table.signal_and_noise(position + 1, x_t.device)
        x_0 = limit_x_0(self.prediction.x_0(prediction, x_t, alpha, sigma), self.config)
        x_0 = x_0 if self.refine is None else self.refine(x_0)
        if self.config.variance_type == "learned_range":
            log_variance = table.learned_range_log_variance(raw_variance, position)
        elif self.config.variance_type == "fixed_large":
            log_variance = table.log_beta(position, x_t.device)
        else:
            log_variance = table.posterior_log_variance(position, x_t.device)
        return x_0, table.posterior_mean(x_0, x_t, position), log_variance

    def _position(self, timestep: int | torch.Tensor, batch_size: int) -> torch.Tensor:
        is_index = type(timestep) is int or isinstance(timestep, np.integer)
        if not is_index and not (torch.is_tensor(timestep) and timestep.dtype in (torch.int64, torch.int32)):
            came = f"a {timestep.dtype} tensor" if torch.is_tensor(timestep) else repr(timestep)
            raise ValueError(f"`timestep` is {came}; it must be an integer or an int64 tensor, from `timesteps`.")
        timestep = torch.as_tensor(timestep, device=self._positions.device).long()
        if timestep.shape not in ((), (1,), (batch_size,)):
            raise ValueError(
                f"`timestep` is of shape {tuple(timestep.shape)}; it must be a single one, or one for each of "
                f"{batch_size} images."
            )
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
        noise = draw(partial(randn_tensor, dtype=torch.float32), x_0.shape, generator, x_0.device)
        return diffuse(x_0, noise, *self.table.signal_and_noise(s, x_0.device))

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t at indices `timesteps` = t - 1 in 0..T-1, with Diffusers' signature; see [`forward_marginal`] for s."""
        return diffuse(original_samples, noise, *self.table.signal_and_noise(timesteps + 1, original_samples.device))

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The v target at indices `timesteps`, with Diffusers' signature."""
        alpha, sigma = self.table.signal_and_noise(timesteps + 1, sample.device)
        return prediction_for("v_prediction").target(sample, noise, alpha, sigma)


def check_timesteps(name: str, timesteps: Sequence[int], count: int) -> list[int]:
    """
    `timesteps` as a list; errors call them `name`.

    Raises:
        ValueError: they are not strictly decreasing integers in 0..count - 1.
    """
    values = timesteps.tolist() if isinstance(timesteps, (torch.Tensor, np.ndarray)) else plain(timesteps)
    are_indices = isinstance(values, (list, tuple, range)) and all(type(value) is int for value in values)
    falls = are_indices and len(values) > 0 and all(one > next_one for one, next_one in pairwise(values))
    if not falls or values[0] >= count or values[-1] < 0:
        raise ValueError(f"{name} is {timesteps!r}; it must be a list of indices in 0..{count - 1}, from high to low.")
    return list(values)


def _check_steps(name: str, value: int):
    if type(value) is not int or not 1 <= value <= MOST_STEPS:
        raise ValueError(f"`{name}` is {value!r}; it must be an integer in 1..{MOST_STEPS}.")


def _check_images(name: str, images: torch.Tensor):
    if not torch.is_tensor(images) or images.ndim != 4 or not images.is_floating_point():
        came = f"{images.dtype} of shape {tuple(images.shape)}" if torch.is_tensor(images) else repr(images)
        raise ValueError(f"`{name}` is {came}; it must be floats of shape (B, C, H, W).")
