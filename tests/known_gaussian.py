"""A network that denoises a known Gaussian exactly, so that what samplers make of it can be computed."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from cdm_diffusers.diffusion import per_image


class GaussianDenoiser(ModelMixin, ConfigMixin):
    r"""
    The best epsilon or v for data whose pixels are independent N(mean, std^2), with a `bias` on epsilon.

    Its config has what pipelines read of a `CascadedUNet2DModel`'s. `alphas_cumprod` is the training table, float64;
    `calls` records what it was given.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        learned_variance: bool = False,
        time_conditioning: str = "timestep",
        num_classes: int | None = None,
        null_class: bool = False,
        low_res_size: int | None = None,
        low_res_channels: int | None = None,
        augmentation_level_embedding: bool = False,
        patch_size: int = 1,
        low_res_skip: bool = False,
        block_out_channels: tuple[int, ...] = (1,),
        mean: float = 0.3,
        std: float = 0.25,
        bias: float = 0.0,
        prediction_type: str = "epsilon",
    ):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, sample, timestep, class_labels=None, low_res=None, augmentation_level=None, return_dict=True):
        config = self.config
        self.calls.append({"timestep": timestep, "low_res": low_res, "augmentation_level": augmentation_level})
        by_level = config.time_conditioning == "noise_level"
        alpha_bar = per_image(timestep.double() ** 2 if by_level else self.alphas_cumprod[timestep])
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        distance = (sample.double() - alpha * config.mean) / (alpha_bar * config.std**2 + 1 - alpha_bar)
        output = sigma * distance + config.bias
        x_0 = config.mean + alpha * config.std**2 * distance
        if config.prediction_type == "v_prediction":
            output = alpha * output - sigma * x_0
        elif config.prediction_type == "sample":
            output = x_0 + config.bias
        if config.learned_variance:
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        return (output.float(),)
