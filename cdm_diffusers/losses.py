"""Training losses (Section 2.1). A loss draws the diffusion times and noise itself and calls the network through
`denoise(x_t, condition)`, a closure over the labels and the low-resolution input."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor

from .diffusion import (
    ddim_step,
    diffuse,
    discretized_gaussian_nll,
    gaussian_kl,
    look_up,
    per_image,
    prediction_for,
)
from .draws import draw


Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SimpleLoss:
    r"""
    L_simple = E || epsilon_theta(x_t, t) - epsilon ||^2, or the same for v, as a mean over pixels. For a network that
    predicts x_0 it is also the loss of v, for sigma above 0.3: that of x_0 times 1 / sigma^2 (at most 11).

    Args:
        scheduler ([`CascadedDDPMScheduler`] or [`ContinuousDDPMScheduler`]):
            The forward process, what the network predicts (`prediction_type`) and how times are drawn.
    """

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.prediction = prediction_for(scheduler.config.prediction_type)

    def __call__(self, denoise: Denoise, x_0: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        r"""
        Args:
            denoise (`Callable`): `denoise(x_t, condition)` returns the network's output, `(B, C or 2C, H, W)`.
            x_0 (`torch.Tensor` of shape `(B, C, H, W)`): clean images in [-1, 1].
            generator (`torch.Generator`, *optional*): decides times and noise.

        Returns:
            `torch.Tensor` of shape `(B,)`: the loss of each image.
        """
        times = self.scheduler.draw_training_times(x_0.shape[0], generator, x_0.device)
        noise = draw(randn_tensor, x_0.shape, generator, x_0.device)
        x_t = diffuse(x_0, noise, times.alpha, times.sigma)
        output = denoise(x_t, times.condition).float()
        target = self.prediction.target(x_0, noise, times.alpha, times.sigma)
        return self.of_output(output, target, x_0, x_t, times)

    def of_output(self, output, target, x_0, x_t, times) -> torch.Tensor:
        """The loss (B,) of a network output; learned variances, if any, are ignored."""
        errors = ((output[:, : x_0.shape[1]] - target) ** 2).mean(dim=(1, 2, 3))
        return self.prediction.loss_weight(times.sigma) * errors


class HybridLoss(SimpleLoss):
    r"""
    L_hybrid = L_simple + lambda * L_vlb (Nichol and Dhariwal, 2021), for networks that learn their variance.

    L_vlb of Eq. (1) is estimated from one term, T * L_t, in bits per dimension. The predicted mean inside it is
    detached, so that it trains only the variance.

    Args:
        scheduler ([`CascadedDDPMScheduler`]): with `variance_type="learned_range"`.
        vlb_weight (`float`, defaults to 0.001): lambda.
    """

    def __init__(self, scheduler, vlb_weight: float = 0.001):
        if scheduler.config.variance_type != "learned_range":
            raise ValueError(
                "HybridLoss trains a learned variance, but the scheduler's `variance_type` is "
                f"{scheduler.config.variance_type!r}: set it to 'learned_range', or use SimpleLoss."
            )
        super().__init__(scheduler)
        self.vlb_weight = vlb_weight

    def of_output(self, output, target, x_0, x_t, times) -> torch.Tensor:
        """The loss (B,) of a network output, variances included."""
        prediction, raw_variance = output.split(x_0.shape[1], dim=1)
        predicted_x_0 = self.prediction.x_0(prediction.detach(), x_t, times.alpha, times.sigma)
        vlb = len(self.scheduler.table) * self.vlb_term(predicted_x_0, raw_variance, x_0, x_t, times.index)
        return super().of_output(output, target, x_0, x_t, times) + self.vlb_weight * vlb

    def vlb_term(self, predicted_x_0, raw_variance, x_0, x_t, index) -> torch.Tensor:
        """L_t of each image (B,) in bits per dimension: the decoder's term at t = 1, else the posteriors' KL."""
        table = self.scheduler.table
        mean = table.posterior_mean(predicted_x_0, x_t, index)
        log_variance = table.learned_range_log_variance(raw_variance, index)
        true_mean = table.posterior_mean(x_0, x_t, index)
        kl = gaussian_kl(true_mean, table.posterior_log_variance(index), mean, log_variance)
        decoder = discretized_gaussian_nll(x_0, mean, 0.5 * log_variance)
        nats = torch.where((index == 0)[:, None, None, None], decoder, kl)
        return nats.mean(dim=(1, 2, 3)) / math.log(2)


class GridTimes(NamedTuple):
    """Times on a grid, each (B,): what the network is conditioned on, sqrt(alpha_bar) and sqrt(1 - alpha_bar)."""

    condition: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor


PredictX0 = Callable[[torch.Tensor, GridTimes], torch.Tensor]


class DistillationLoss:
    r"""
    A student learns to cover in one step of DDIM what otherwise takes several (Salimans and Ho, 2022).

    The teacher's grid has N times, the student's every m-th of them. From x_t, the teacher takes one DDIM step to the
    time t' before t, where a second prediction is made; with both, DDIM would arrive at x_t'', the next time of the
    student's grid. What the student has to predict at x_t so as to arrive there at once,

        x~ = (x_t'' - (sigma'' / sigma) x_t) / (alpha'' - (sigma'' / sigma) alpha),

    is a weighted mean of the two predictions: x~ = (1 - c) x_0 + c x_0',
    c = (alpha'' - sigma'' alpha' / sigma') / (alpha'' - sigma'' alpha / sigma). So x~ is in the range of images if
    they are, and no step divides by an alpha near 0.

    - Progressive distillation: m = 2, t is on the student's grid, and the teacher predicts both times.
    - Consistency distillation (Song et al., 2023): t is anywhere on the teacher's grid, and the second prediction is
      the student's own, without a gradient. For a student of one step, whose t'' is 0, x~ is that prediction; for one
      of several these are multistep consistency models (Heek et al., 2024), whose sampler is DDIM too.
    - m = 1: the student predicts what the teacher does, in as many steps. t' = t'', c = 0.

    The student predicts v or x_0. The loss of x~ times SNR + 1 = 1 / sigma^2 is that of v; times max(SNR, 1), it is
    max(alpha^2, sigma^2) times that of v. Neither is limited where there is little noise, as [`SimpleLoss`] of x_0 is.

    Args:
        alphas_cumprod (`torch.Tensor` of shape `(N,)`): alpha_bar of the teacher's grid, from low to high noise.
        conditions (`torch.Tensor` of shape `(N,)`): the times or noise levels that the networks are given there.
        student_steps (`int`): times of the student's grid, a divisor of N; its last is the teacher's.
        anywhere (`bool`, defaults to `False`): whether t is drawn from the teacher's grid, not the student's.
        weighting (`"truncated_snr"` or `"snr_plus_one"`, defaults to `"truncated_snr"`):
            max(SNR, 1) or SNR + 1, times the loss of x~.
        prediction_type (`"v_prediction"` or `"sample"`, defaults to `"v_prediction"`): what the student predicts.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor,
        conditions: torch.Tensor,
        student_steps: int,
        *,
        anywhere: bool = False,
        weighting: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr",
        prediction_type: Literal["v_prediction", "sample"] = "v_prediction",
    ):
        if prediction_type not in ("v_prediction", "sample"):
            raise ValueError(f"`prediction_type` is {prediction_type!r}; it must be 'v_prediction' or 'sample'.")
        num_times = len(alphas_cumprod)
        stride, remainder = divmod(num_times, student_steps)
        if remainder:
            raise ValueError(
                f"`student_steps` is {student_steps}; it must divide the teacher's {num_times}, since the student's "
                "times are some of the teacher's."
            )
        self.stride, self.weighting, self.prediction_type = stride, weighting, prediction_type
        # Entry 0 of what follows is t = 0, clean data.
        levels = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alphas_cumprod.double().cpu()])
        alpha, sigma = levels.sqrt(), (1 - levels).sqrt()
        time = torch.arange(num_times + 1, device="cpu")
        before, after = (time - 1).clamp(min=0), (time - 1).clamp(min=0) // stride * stride
        ratio = torch.where(time > 0, alpha / sigma, 0.0)
        share = (alpha[after] - sigma[after] * ratio[before]) / (alpha[after] - sigma[after] * ratio)
        share = torch.where(before == after, 0.0, share)
        self.tables = {
            "alpha": alpha.float(),
            "sigma": sigma.float(),
            "condition": torch.cat([conditions[:1], conditions]).cpu(),  # no network is called at t = 0
            "share": share.float(),
            "start": time[1:] if anywhere else time[stride::stride],
        }

    def __call__(
        self,
        student: Denoise,
        teacher: PredictX0,
        second: PredictX0,
        x_0: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            student (`Callable`): `student(x_t, condition)` returns v or x_0, `(B, C, H, W)`.
            teacher, second (`Callable`):
                `teacher(x_t, times)` returns x_0 `(B, C, H, W)`; `second` is called at t'. No gradients.
            x_0 (`torch.Tensor` of shape `(B, C, H, W)`): clean images in [-1, 1].
            generator (`torch.Generator`, *optional*): decides times and noise.

        Returns:
            `torch.Tensor` of shape `(B,)`: the loss of each image.
        """
        tables = self.tables = {name: table.to(x_0.device) for name, table in self.tables.items()}
        drawn = draw(partial(torch.randint, len(tables["start"])), x_0.shape[:1], generator, x_0.device)
        time = look_up(tables["start"], drawn)
        times = self.times(time)
        x_t = diffuse(x_0, draw(randn_tensor, x_0.shape, generator, x_0.device), times.alpha, times.sigma)
        target = self.target(teacher, second, x_t, time)
        target = prediction_for(self.prediction_type).of_x_0(target, x_t, times.alpha, times.sigma)
        errors = ((student(x_t, times.condition).float() - target) ** 2).mean(dim=(1, 2, 3))
        if self.prediction_type == "sample":  # the loss of the v that follows from x_0
            errors = errors / times.sigma**2
        if self.weighting == "truncated_snr":
            return torch.maximum(times.alpha, times.sigma) ** 2 * errors
        return errors

    def times(self, time: torch.Tensor) -> GridTimes:
        """The times of the teacher's grid that are numbered `time` (B,) in 1..N."""
        return GridTimes(*(look_up(self.tables[name], time) for name in GridTimes._fields))

    @torch.no_grad()
    def target(self, teacher: PredictX0, second: PredictX0, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x~ (B, C, H, W) at x_t, for the numbers `time` (B,) of its times."""
        times = self.times(time)
        x_0 = teacher(x_t, times)
        if self.stride == 1:
            return x_0
        before = self.times(time - 1)
        x_before = ddim_step(x_t, x_0, times.alpha, times.sigma, before.alpha, before.sigma)
        return torch.lerp(x_0, second(x_before, before), per_image(look_up(self.tables["share"], time)))
