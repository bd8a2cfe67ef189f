"""Training losses (Section 2.1). A loss draws the diffusion times and noise itself and asks the network through
`denoise(x_t, condition)`, a closure over the labels and the low-resolution input."""

import math
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .diffusion import diffuse, discretized_gaussian_nll, gaussian_kl, prediction_for
from .draws import draw


Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SimpleLoss:
    r"""
    L_simple = E || epsilon_theta(x_t, t) - epsilon ||^2, or the same for v, as a mean over pixels. For a network that
    predicts x_0 it is the loss of v too, for sigma above 0.3: 1 / sigma^2 (11 at most) times that of x_0.

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
        """The loss (B,) of a network output; learned variances, where there are any, do not enter."""
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
