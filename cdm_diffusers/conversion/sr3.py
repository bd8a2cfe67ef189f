r"""
SR3's networks (Janspiry/Image-Super-Resolution-via-Iterative-Refinement, `_gen.pth` files) as
[`CascadedUNet2DModel`].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch
from diffusers.utils import logging

from ..models import CascadedUNet2DModel
from ..schedulers import ContinuousDDPMScheduler
from .weights import check_qkv, check_tensors, fill_network, split_qkv


logger = logging.get_logger(__name__)

REPOSITORY = "https://github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement"
PREFIX = "denoise_fn."

# Parts of a layer: SR3's name to Diffusers'
RESIDUAL_BLOCK = {
    "noise_func.noise_func.0": "time_emb_proj",
    "block1.block.0": "norm1",
    "block1.block.3": "conv1",
    "block2.block.0": "norm2",
    "block2.block.3": "conv2",
    "res_conv": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "out": "to_out.0"}


@dataclass(frozen=True)
class SR3Structure:
    """What the shapes of the weights tell; attention in the middle is always there."""

    inner_channel: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[int, ...]
    low_res_input: bool
    image_channels: int = 3

    def __str__(self) -> str:
        return (
            f"channels {self.block_out_channels}, {self.layers_per_block} blocks per level, attention at levels "
            f"{self.attention_levels} and in the middle, {'a' if self.low_res_input else 'no'} low-resolution input"
        )


@dataclass(frozen=True)
class SR3Settings:
    """What the weights do not tell. None: not known."""

    image_size: int | None = None
    low_res: int | None = None
    norm_groups: int | None = None
    diffusion_steps: int | None = None
    linear_start: float | None = None
    linear_end: float | None = None
    low_res_interpolation: str | None = None
    dropout: float | None = None


# The published networks. Their low-resolution images are enlarged by Pillow when the data is prepared.
_SCHEDULE = SR3Settings(
    diffusion_steps=2000, linear_start=1e-6, linear_end=1e-2, low_res_interpolation="pillow_bicubic"
)
_SETTINGS_128 = replace(_SCHEDULE, image_size=128, norm_groups=32, dropout=0.2)
_FACES_128 = SR3Structure(64, (64, 128, 256, 512, 512), 2, (3,), low_res_input=False)
KNOWN_NETWORKS = {
    replace(_FACES_128, low_res_input=True): ("sr_sr3_16_128", replace(_SETTINGS_128, low_res=16)),
    _FACES_128: ("sample_sr3_128", replace(_SETTINGS_128, low_res_interpolation=None)),
    SR3Structure(64, (64, 128, 256, 512, 1024), 1, (), low_res_input=True): (
        "sr_sr3_64_512",
        replace(_SCHEDULE, image_size=512, low_res=64, norm_groups=16, dropout=0.0),
    ),
}


def unet_from_sr3(
    state_dict: Mapping[str, torch.Tensor],
    *,
    image_size: int | None = None,
    low_res: int | None = None,
    norm_groups: int | None = None,
    low_res_interpolation: str | None = None,
    dropout: float | None = None,
) -> CascadedUNet2DModel:
    r"""
    The network of a state dict of SR3 (`which_model_G: sr3`), super-resolution or unconditional.

    For networks of the published configurations no argument is needed.

    Args:
        state_dict (`dict[str, torch.Tensor]`): the weights; the network shares their memory where it can.
        image_size (`int`, *optional*): height and width of the images.
        low_res (`int`, *optional*): height and width of the low-resolution image before it is enlarged.
        norm_groups (`int`, *optional*): groups of the group norms.
        low_res_interpolation (`"pillow_bicubic"`, `"bicubic"` or `"bilinear"`, *optional*):
            How it is enlarged; SR3's data preparation does so by Pillow, which is the default.
        dropout (`float`, *optional*): for further training; 0 if nothing is known.

    Returns:
        [`CascadedUNet2DModel`]: in float32 and evaluation mode, conditioned on the noise level.

    Raises:
        `ValueError`: the weights are of another architecture or incomplete, an argument is missing, or contradicts
            the weights.
    """
    structure = read_structure(state_dict)
    given = SR3Settings(
        image_size=image_size,
        low_res=low_res,
        norm_groups=norm_groups,
        low_res_interpolation=low_res_interpolation,
        dropout=dropout,
    )
    settings, notes = resolve_settings(state_dict, structure, given, needs_scheduler=False)
    for note in notes:
        logger.info(note)
    return build_unet(state_dict, structure, settings)


def build_unet(
    state_dict: Mapping[str, torch.Tensor], structure: SR3Structure, settings: SR3Settings
) -> CascadedUNet2DModel:
    """The network, once everything about it is known."""
    low_res = {}
    if structure.low_res_input:
        low_res = {"low_res_size": settings.low_res, "low_res_interpolation": settings.low_res_interpolation}
    config = {
        "sample_size": settings.image_size,
        "in_channels": structure.image_channels,
        "out_channels": structure.image_channels,
        "block_out_channels": structure.block_out_channels,
        "conv_in_channels": structure.inner_channel,
        "layers_per_block": structure.layers_per_block,
        "attention_resolutions": tuple(settings.image_size // 2**level for level in structure.attention_levels),
        "num_attention_heads": 1,
        "dropout": settings.dropout,
        "norm_num_groups": settings.norm_groups,
        "resnet_time_scale_shift": "default",
        "time_conditioning": "noise_level",
        "time_proj_dim": structure.inner_channel,
        "time_embedding_dim": structure.inner_channel,
        "time_embedding_hidden_dim": 4 * structure.inner_channel,
        "skip_time_act": True,
        "flip_sin_to_cos": False,
        "low_res_first": structure.low_res_input,
        **low_res,
    }
    return fill_network(config, _renamed(state_dict, structure), f"an SR3 network with {structure}")


def build_scheduler(settings: SR3Settings) -> ContinuousDDPMScheduler:
    """The diffusion process that the network was trained with; this code samples with the posterior's variance."""
    return ContinuousDDPMScheduler(
        num_train_timesteps=settings.diffusion_steps,
        beta_start=settings.linear_start,
        beta_end=settings.linear_end,
        variance_type="fixed_small",
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the shapes tell


def read_structure(state_dict: Mapping[str, torch.Tensor]) -> SR3Structure:
    r"""
    The structure of a network, from the shapes of its weights.

    Raises:
        `ValueError`: these are not weights of SR3's networks.
    """
    check_tensors(state_dict)
    shapes = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in state_dict.items()}
    if "noise_level_mlp.1.weight" not in shapes:
        what = "a network on timesteps (`which_model_G: ddpm`)" if "time_mlp.1.weight" in shapes else "something else"
        raise ValueError(
            f"`state_dict` has no 'denoise_fn.noise_level_mlp.1.weight': it is not an SR3 network but {what}; names "
            f"are like {sorted(state_dict)[0]!r}."
        )
    for name in ("downs.0.weight", "final_conv.block.3.weight"):
        if name not in shapes:
            raise ValueError(f"`state_dict` lacks {PREFIX + name!r}: it is incomplete.")
    levels: list[list[int]] = [[]]  # for each level, its blocks' places in `downs`
    for place in range(1, 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("downs."))):
        if f"downs.{place}.conv.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(place)
    if len({len(blocks) for blocks in levels}) != 1:
        raise ValueError(
            f"`state_dict` has levels of {[len(blocks) for blocks in levels]} blocks: weights are missing."
        )
    convolutions = [f"downs.{blocks[0]}.res_block.block1.block.3.weight" for blocks in levels]
    absent = [name for name in convolutions if name not in shapes]
    if absent:
        raise ValueError(f"`state_dict` lacks {PREFIX + absent[0]!r}: it is incomplete.")
    inputs, outputs = shapes["downs.0.weight"][1], shapes["final_conv.block.3.weight"][0]
    if inputs not in (outputs, 2 * outputs):
        raise ValueError(f"`state_dict` takes {inputs} channels and returns {outputs}; expected as many, or twice.")
    return SR3Structure(
        inner_channel=shapes["downs.0.weight"][0],
        block_out_channels=tuple(shapes[name][0] for name in convolutions),
        layers_per_block=len(levels[0]),
        attention_levels=tuple(
            level for level, blocks in enumerate(levels) if f"downs.{blocks[0]}.attn.qkv.weight" in shapes
        ),
        low_res_input=inputs == 2 * outputs,
        image_channels=outputs,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What they do not tell


def resolve_settings(
    state_dict: Mapping[str, torch.Tensor], structure: SR3Structure, given: SR3Settings, needs_scheduler: bool
) -> tuple[SR3Settings, list[str]]:
    r"""
    Settings from what was given, from the schedule that the file carries, and from the published configurations.

    Returns:
        `tuple`: the settings, and lines that say what was assumed and why.

    Raises:
        `ValueError`: something is missing or contradictory; names the argument.
    """
    name, believed = KNOWN_NETWORKS.get(structure, (None, SR3Settings()))
    sources = {field.name: f"as in {name}" for field in fields(believed)}
    if structure.low_res_input and believed.low_res_interpolation is None:
        believed = replace(believed, low_res_interpolation=_SCHEDULE.low_res_interpolation)
        sources["low_res_interpolation"] = "as in SR3's data preparation"
    carried = _carried_schedule(state_dict)
    believed = replace(believed, **carried)
    sources |= dict.fromkeys(carried, "in the file")
    changes = {f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) is not None}
    settings = replace(believed, **changes)
    needed = ["image_size", "norm_groups"] + ["low_res"] * structure.low_res_input
    needed += ["diffusion_steps", "linear_start", "linear_end"] * needs_scheduler
    missing = [f"`{field}`" for field in needed if getattr(settings, field) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be given: this is none of the published configurations ({structure}), and the "
            "shapes of the weights do not tell."
        )
    _check_fit(structure, settings)
    if settings.dropout is None:
        settings = replace(settings, dropout=0.0)
    notes = [f"structure: that of {name}" if name else f"structure: none of the published ones; {structure}"]
    for field in (field.name for field in fields(settings) if getattr(settings, field.name) is not None):
        reason = (
            "given"
            if field in changes
            else sources[field]
            if getattr(believed, field) is not None
            else "nothing known"
        )
        notes.append(f"{field}: {getattr(settings, field)} ({reason})")
    return settings, notes


def _carried_schedule(state_dict: Mapping[str, torch.Tensor]) -> dict[str, int | float]:
    """T and the end points of a linear schedule from the file's own table of betas."""
    if "betas" not in state_dict:
        return {}
    betas = state_dict["betas"].double()
    if betas.ndim != 1 or len(betas) < 2:
        return {}
    start, end = (float(f"{value:.6g}") for value in (betas[0], betas[-1]))  # float32 has seven digits
    if not torch.allclose(betas, torch.linspace(start, end, len(betas), dtype=torch.float64), rtol=1e-4):
        return {}
    return {"diffusion_steps": len(betas), "linear_start": start, "linear_end": end}


def _check_fit(structure: SR3Structure, settings: SR3Settings):
    if settings.low_res is not None and not structure.low_res_input:
        raise ValueError(f"`low_res` is {settings.low_res}, but this network has no low-resolution input.")
    factor = 2 ** (len(structure.block_out_channels) - 1)
    if settings.image_size % factor:
        raise ValueError(f"`image_size` is {settings.image_size}; this network needs a multiple of {factor}.")
    for channels in (*structure.block_out_channels, structure.inner_channel):
        if channels % settings.norm_groups:
            raise ValueError(f"`norm_groups` is {settings.norm_groups}, which does not divide {channels} channels.")


# ---------------------------------------------------------------------------------------------------------------------
# Names


def _renamed(
    state_dict: Mapping[str, torch.Tensor], structure: SR3Structure
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Each weight with our name for it and its own; not the schedule's tables, which lie outside the network."""
    layers = _layer_names(structure)
    wrapped = any(name.startswith(PREFIX) for name in state_dict)
    for source, tensor in state_dict.items():
        if wrapped and not source.startswith(PREFIX):
            continue
        name, kind = source.removeprefix(PREFIX).rpartition(".")[::2]
        block, _, part = name.partition(".res_block.")
        attention, _, attention_part = name.partition(".attn.")
        if part and block in layers:
            yield f"{layers[block]}.{RESIDUAL_BLOCK.get(part, part)}.{kind}", source, tensor
        elif attention_part and attention in layers:
            ours = layers[attention].replace("resnets", "attentions")
            if attention_part == "qkv":
                check_qkv(source, tensor, multiple=3)
                for weight_name, weight in split_qkv(f"{ours}.", tensor, heads=1, per_head=False).items():
                    yield weight_name, source, weight
                    # SR3 has no biases here
                    yield f"{weight_name.removesuffix('weight')}bias", source, torch.zeros_like(weight[:, 0])
            else:
                tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
                yield f"{ours}.{ATTENTION.get(attention_part, attention_part)}.{kind}", source, tensor
        else:
            yield f"{layers.get(name, name)}.{kind}", source, tensor


def _layer_names(structure: SR3Structure) -> dict[str, str]:
    """SR3's name of each layer, to Diffusers'."""
    names = {
        "noise_level_mlp.1": "time_embedding.linear_1",
        "noise_level_mlp.3": "time_embedding.linear_2",
        "downs.0": "conv_in",
        "mid.0": "mid_block.resnets.0",
        "mid.1": "mid_block.resnets.1",
        "final_conv.block.0": "conv_norm_out",
        "final_conv.block.3": "conv_out",
    }
    levels, blocks = len(structure.block_out_channels), structure.layers_per_block
    for level in range(levels):
        for number in range(blocks):
            names[f"downs.{1 + level * (blocks + 1) + number}"] = f"down_blocks.{level}.resnets.{number}"
        names[f"downs.{(level + 1) * (blocks + 1)}.conv"] = f"down_blocks.{level}.downsamplers.0.conv"
        for number in range(blocks + 1):
            names[f"ups.{level * (blocks + 2) + number}"] = f"up_blocks.{level}.resnets.{number}"
        names[f"ups.{level * (blocks + 2) + blocks + 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names
