"""What networks cost, counted on torch's meta device: no memory is needed, and nothing is computed."""

import dataclasses
import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from .arguments import UNetArguments, low_res_channels_of
from .unet_2d_cascaded import CascadedUNet2DModel


@functools.cache
def build_on_meta(arguments: UNetArguments) -> CascadedUNet2DModel:
    """The network without its weights, cached by its arguments."""
    with torch.device("meta"):
        return CascadedUNet2DModel(**dataclasses.asdict(arguments)).eval()


def inputs_of(unet: CascadedUNet2DModel, size: int | None = None, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Zeros for everything that `unet` takes, on the default device; `size` is `sample_size`, or a crop's."""
    config = unet.config
    size = size or config.sample_size
    is_continuous = config.time_conditioning == "noise_level"
    inputs = {
        "sample": torch.zeros(batch_size, config.in_channels, size, size),
        "timestep": torch.zeros(batch_size, dtype=torch.float32 if is_continuous else torch.int64),
    }
    if config.num_classes is not None:
        inputs["class_labels"] = torch.zeros(batch_size, dtype=torch.int64)
    if config.low_res_size is not None:
        low_res_size = size * config.low_res_size // config.sample_size
        channels = low_res_channels_of(config)
        inputs["low_res"] = torch.zeros(batch_size, channels, low_res_size, low_res_size)
    if config.augmentation_level_embedding:
        inputs["augmentation_level"] = torch.zeros(batch_size, dtype=torch.int64)
    return inputs


@functools.cache
def count_multiply_adds(unet: CascadedUNet2DModel, size: int | None = None) -> int:
    """
    Multiply-adds of convolutions, linear layers and attention in one call of `unet`, on the meta device, for one image
    of `size` pixels a side (by default `sample_size`); normalisation, activations and sums are not counted.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs_of(unet, size))
    return counter.get_total_flops() // 2
