"""
Prints the table of `docs/presets.md`: parameters, and multiply-adds of one network call for one image.

    python benchmarks/preset_costs.py

Networks are built on torch's meta device, so no memory is needed. Counted are the multiply-adds of convolutions,
linear layers and attention; normalisation, activations and sums are not.
"""

from dataclasses import asdict

import torch
from torch.utils.flop_counter import FlopCounterMode

from cdm_diffusers.models.unet_2d_cascaded import CascadedUNet2DModel
from cdm_diffusers.presets import PRESETS, UNetPreset


def build_on_meta(preset: UNetPreset) -> CascadedUNet2DModel:
    with torch.device("meta"):
        return CascadedUNet2DModel(**asdict(preset)).eval()


def count_multiply_adds(unet: CascadedUNet2DModel) -> int:
    """Multiply-adds of `unet`, on the meta device, for one image."""
    config = unet.config
    time_dtype = torch.float32 if config.time_conditioning == "noise_level" else torch.int64
    image = (1, config.in_channels)
    with torch.device("meta"):
        inputs = {
            "sample": torch.zeros(*image, config.sample_size, config.sample_size),
            "timestep": torch.zeros(1, dtype=time_dtype),
        }
        if config.num_classes is not None:
            inputs["class_labels"] = torch.zeros(1, dtype=torch.int64)
        if config.low_res_size is not None:
            inputs["low_res"] = torch.zeros(*image, config.low_res_size, config.low_res_size)
        if config.augmentation_level_embedding:
            inputs["augmentation_level"] = torch.zeros(1, dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(**inputs)
    return counter.get_total_flops() // 2


def table() -> str:
    """The markdown table, one row a preset."""
    lines = ["| preset | parameters | multiply-adds per image and step | steps |", "|---|---:|---:|---:|"]
    for name, preset in PRESETS.items():
        unet = build_on_meta(preset.unet)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        giga = count_multiply_adds(unet) / 1e9
        lines.append(f"| `{name}` | {parameters:,} | {giga:,.3f} G | {preset.inference.num_inference_steps} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
