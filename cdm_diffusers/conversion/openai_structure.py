"""What the weights of an OpenAI network tell by their shapes, and what they do not."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .weights import check_tensors


# Channels of the first convolution: image channels, and whether a low-resolution image comes with them
INPUTS = {1: (1, False), 2: (1, True), 3: (3, False), 6: (3, True)}


@dataclass(frozen=True)
class OpenAIStructure:
    """What the shapes of the weights tell."""

    model_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[int, ...]
    scale_shift: bool
    resblock_updown: bool
    num_classes: int | None
    low_res_input: bool
    learned_variance: bool = True
    image_channels: int = 3

    def __str__(self) -> str:
        return (
            f"channels {self.block_out_channels}, {self.layers_per_block} blocks per level, attention at levels "
            f"{self.attention_levels}, {'resnet' if self.resblock_updown else 'convolution'} resampling, "
            f"{self.num_classes or 'no'} classes, {'a' if self.low_res_input else 'no'} low-resolution input"
        )


@dataclass(frozen=True)
class OpenAISettings:
    """What the weights do not tell; exactly one of `num_heads` and `num_head_channels`. None: not known."""

    image_size: int | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    new_attention_order: bool | None = None
    rescale_timesteps: bool | None = None
    noise_schedule: str | None = None
    diffusion_steps: int | None = None
    low_res: int | None = None
    dropout: float | None = None


def read_structure(state_dict: Mapping[str, torch.Tensor]) -> OpenAIStructure:
    r"""
    The structure of a network, from the shapes of its weights.

    Raises:
        `ValueError`: these are not weights of OpenAI's diffusion networks.
    """
    check_tensors(state_dict)
    _check_family(state_dict)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    outputs = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("output_blocks."))
    upsamplers = [index for index in range(outputs) if _upsampler(shapes, index) is not None]
    per_level = upsamplers[0] + 1 if upsamplers else outputs
    levels = outputs // per_level
    if upsamplers != [per_level * (level + 1) - 1 for level in range(levels - 1)] or levels * per_level != outputs:
        raise ValueError(
            f"`state_dict` has {outputs} output blocks, with upsampling after the blocks {upsamplers}: they do not "
            "divide into levels of equal depth, so weights are missing, or this is another architecture."
        )
    first_blocks = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    block_out_channels = tuple(_shape(shapes, f"{block}.0.out_layers.3.weight")[0] for block in first_blocks)
    in_channels = _shape(shapes, "input_blocks.0.0.weight")[1]
    out_channels = _shape(shapes, "out.2.weight")[0]
    image_channels, low_res_input = INPUTS.get(in_channels, (0, False))
    if image_channels == 0 or out_channels not in (image_channels, 2 * image_channels):
        raise ValueError(
            f"`state_dict` takes {in_channels} channels and returns {out_channels}; that fits no image of 1 or 3 "
            "channels, with or without a low-resolution image and a learned variance."
        )
    return OpenAIStructure(
        model_channels=_shape(shapes, "time_embed.0.weight")[1],
        block_out_channels=block_out_channels,
        layers_per_block=per_level - 1,
        attention_levels=tuple(level for level in range(levels) if f"{first_blocks[level]}.1.qkv.weight" in shapes),
        scale_shift=_shape(shapes, f"{first_blocks[0]}.0.emb_layers.1.weight")[0] == 2 * block_out_channels[0],
        resblock_updown=bool(upsamplers) and "in_layers.0.weight" in _upsampler(shapes, upsamplers[0]),
        num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        low_res_input=low_res_input,
        learned_variance=out_channels == 2 * image_channels,
        image_channels=image_channels,
    )


def _check_family(state_dict: Mapping[str, torch.Tensor]):
    names = state_dict.keys()
    if any(name.startswith("input_blocks.") for name in names) and "time_embed.0.weight" in names:
        if any(name.startswith("output_blocks.") for name in names):
            return
        raise ValueError(
            "`state_dict` has no `output_blocks`: it is a classifier (EncoderUNetModel), or one part of a checkpoint; "
            "only diffusion networks can be converted."
        )
    if any(name.startswith("denoise_fn.") for name in names):
        raise ValueError("`state_dict` is SR3's: use `unet_from_sr3` (conversion/convert_sr3_checkpoint.py).")
    raise ValueError(
        f"`state_dict` does not hold one of OpenAI's diffusion networks: names like {sorted(names)[0]!r} instead of "
        "'input_blocks.0.0.weight' and 'time_embed.0.weight'."
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(
            f"`state_dict` lacks {name!r}: it is incomplete (one part of a sharded checkpoint?) or of another "
            "architecture."
        )
    return shapes[name]


def _upsampler(shapes: Mapping[str, tuple[int, ...]], index: int) -> str | None:
    """The name that shows that an output block ends in upsampling: by convolution or by residual block."""
    candidates = [f"output_blocks.{index}.{place}.{part}" for place in (1, 2) for part in ("conv", "in_layers.0")]
    return next((f"{name}.weight" for name in candidates if f"{name}.weight" in shapes), None)
