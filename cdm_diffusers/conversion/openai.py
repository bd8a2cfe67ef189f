r"""
OpenAI's networks (improved-diffusion and guided-diffusion) as [`CascadedUNet2DModel`].

The architecture is read from the shapes of the weights. What shapes cannot tell (image size, attention heads and the
order of their weights, time scale, noise schedule) comes from arguments, or for the published files from
`known_files.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers.utils import logging

from ..models import CascadedUNet2DModel
from ..schedulers import CascadedDDPMScheduler
from .known_files import KNOWN_FILES, KnownFile
from .openai_structure import OpenAISettings, OpenAIStructure, read_structure
from .weights import check_qkv, fill_network, split_qkv


logger = logging.get_logger(__name__)

BETA_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}

# Parts of a layer: OpenAI's name to Diffusers'
RESIDUAL_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}


def unet_from_openai(
    state_dict: Mapping[str, torch.Tensor],
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    new_attention_order: bool | None = None,
    rescale_timesteps: bool | None = None,
    diffusion_steps: int | None = None,
    low_res: int | None = None,
    dropout: float | None = None,
    file_name: str | None = None,
) -> CascadedUNet2DModel:
    r"""
    The network of a state dict of improved-diffusion or guided-diffusion, base or upsampler.

    For the 19 published files no argument is needed; for other weights of such a structure, arguments replace what is
    known of the file.

    Args:
        state_dict (`dict[str, torch.Tensor]`): the weights; the network shares their memory where it can.
        image_size (`int`, *optional*): height and width of the images.
        num_heads, num_head_channels (`int`, *optional*): attention heads by number or by width; one of the two.
        new_attention_order (`bool`, *optional*):
            Whether queries, keys and values are split before the heads (`use_new_attention_order`).
        rescale_timesteps (`bool`, *optional*): whether the network is fed times rescaled to 0..1000.
        diffusion_steps (`int`, *optional*): T, which only matters to rescaled times.
        low_res (`int`, *optional*): height and width of an upsampler's low-resolution image.
        dropout (`float`, *optional*): for further training; 0 if nothing is known.
        file_name (`str`, *optional*): tells published files of the same structure apart.

    Returns:
        [`CascadedUNet2DModel`]: in float32 and evaluation mode.

    Raises:
        `ValueError`: the weights are of another architecture or incomplete, an argument is missing, or contradicts
            the weights.
    """
    given = OpenAISettings(
        image_size=image_size,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        new_attention_order=new_attention_order,
        rescale_timesteps=rescale_timesteps,
        diffusion_steps=diffusion_steps,
        low_res=low_res,
        dropout=dropout,
    )
    structure = read_structure(state_dict)
    settings, _, notes = resolve_settings(structure, given, file_name, needs_scheduler=False)
    for note in notes:
        logger.info(note)
    return build_unet(state_dict, structure, settings)


def build_unet(
    state_dict: Mapping[str, torch.Tensor], structure: OpenAIStructure, settings: OpenAISettings
) -> CascadedUNet2DModel:
    """The network, once everything about it is known."""
    weights = _renamed(state_dict, structure, settings)
    return fill_network(unet_config(structure, settings), weights, f"a network with {structure}")


def build_scheduler(structure: OpenAIStructure, settings: OpenAISettings) -> CascadedDDPMScheduler:
    """The diffusion process that the network was trained with; sampled by OpenAI's own respacing."""
    return CascadedDDPMScheduler(
        num_train_timesteps=settings.diffusion_steps,
        beta_schedule=BETA_SCHEDULES[settings.noise_schedule],
        variance_type="learned_range" if structure.learned_variance else "fixed_large",
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the shapes do not tell


def resolve_settings(
    structure: OpenAIStructure, given: OpenAISettings, file_name: str | None, needs_scheduler: bool
) -> tuple[OpenAISettings, KnownFile | None, list[str]]:
    r"""
    Settings from what was given and from what is known of published files.

    Args:
        structure ([`OpenAIStructure`]): of the network.
        given ([`OpenAISettings`]): what the caller says.
        file_name (`str`, *optional*): of the checkpoint; tells published files of the same structure apart.
        needs_scheduler (`bool`): whether the diffusion process must be known too.

    Returns:
        `tuple`: the settings, the published file that this seems to be (None if none, or several), and lines that say
        what was assumed and why.

    Raises:
        `ValueError`: something is missing or contradictory; names the argument.
    """
    _check_given(structure, given)
    alike = [file for file in KNOWN_FILES if file.structure == structure]
    named = next((file for file in alike if file.name == file_name), None)
    known = named or (alike[0] if len(alike) == 1 else None)
    if not alike:
        _check_complete(structure, given, needs_scheduler)
        believed, source = OpenAISettings(), ""
        notes = [f"structure: none of the published files'; {structure}"]
    else:
        names = " or ".join(file.name for file in alike) if known is None else known.name
        believed, source = (known or alike[0]).settings, f"as in {names}"
        if known is None and any(file.settings.dropout != believed.dropout for file in alike):
            believed = replace(believed, dropout=None)
        notes = [f"structure: that of {names}" + ("" if named else ", which these weights are taken to be")]
    if named is not None:
        _check_agreement(named, given)
    settings = _override(believed, given)
    if settings.dropout is None:
        settings = replace(settings, dropout=0.0)
    _check_fit(structure, settings)
    for name in (field.name for field in fields(settings)):
        if getattr(settings, name) is not None:
            known_value = source if getattr(believed, name) is not None else "nothing known"
            reason = known_value if getattr(given, name) is None else "given"
            notes.append(f"{name}: {getattr(settings, name)} ({reason})")
    if not structure.learned_variance:
        notes.append("variance: fixed_large (the default of the original code, where it is not learned)")
    return settings, known, notes


def _check_given(structure: OpenAIStructure, given: OpenAISettings):
    for name in ("image_size", "num_heads", "num_head_channels", "diffusion_steps", "low_res"):
        value = getattr(given, name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"`{name}` is {value!r}; it must be a positive integer.")
    if given.num_heads is not None and given.num_head_channels is not None:
        raise ValueError(
            f"`num_heads` is {given.num_heads} and `num_head_channels` is {given.num_head_channels}: give one of them."
        )
    if given.noise_schedule is not None and given.noise_schedule not in BETA_SCHEDULES:
        raise ValueError(f"`noise_schedule` is {given.noise_schedule!r}; it must be one of {list(BETA_SCHEDULES)}.")
    if given.low_res is not None and not structure.low_res_input:
        raise ValueError(
            f"`low_res` is {given.low_res}, but the first convolution takes {structure.image_channels} channels: this "
            "network has no low-resolution input. Leave it out."
        )


def _check_agreement(known: KnownFile, given: OpenAISettings):
    """A published file under its own name is not something else."""
    for name in (field.name for field in fields(given) if field.name != "dropout"):
        value, published = getattr(given, name), getattr(known.settings, name)
        if value is not None and value != published:
            raise ValueError(
                f"`{name}` is {value}, which contradicts the published {known.name}, where it is {published}: leave "
                "it out; or if these are other weights of the same structure, rename the file."
            )


def _check_complete(structure: OpenAIStructure, given: OpenAISettings, needs_scheduler: bool):
    needed = ["image_size", "new_attention_order", "rescale_timesteps"]
    if given.num_heads is None and given.num_head_channels is None:
        needed.append("num_heads")
    if structure.low_res_input:
        needed.append("low_res")
    if needs_scheduler:
        needed += ["noise_schedule", "diffusion_steps"]
    elif given.rescale_timesteps:
        needed.append("diffusion_steps")
    missing = [name for name in needed if getattr(given, name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in missing)} must be given: this is none of the published files "
            f"({structure}), and the shapes of the weights do not tell. `num_heads` may be replaced by "
            "`num_head_channels`."
        )


def _override(settings: OpenAISettings, given: OpenAISettings) -> OpenAISettings:
    changes: dict[str, Any] = {
        field.name: getattr(given, field.name) for field in fields(given) if getattr(given, field.name) is not None
    }
    if given.num_heads is not None:
        changes["num_head_channels"] = None
    if given.num_head_channels is not None:
        changes["num_heads"] = None
    return replace(settings, **changes)


def _check_fit(structure: OpenAIStructure, settings: OpenAISettings):
    factor = 2 ** (len(structure.block_out_channels) - 1)
    if settings.image_size % factor:
        raise ValueError(
            f"`image_size` is {settings.image_size}; a network of {len(structure.block_out_channels)} levels needs a "
            f"multiple of {factor}."
        )
    if structure.low_res_input and settings.low_res > settings.image_size:
        raise ValueError(f"`low_res` is {settings.low_res}, more than `image_size`, {settings.image_size}.")
    name = "num_heads" if settings.num_heads is not None else "num_head_channels"
    for level in {*structure.attention_levels, len(structure.block_out_channels) - 1}:
        channels = structure.block_out_channels[level]
        if channels % getattr(settings, name):
            raise ValueError(f"`{name}` is {getattr(settings, name)}, which does not divide {channels} channels.")


def unet_config(structure: OpenAIStructure, settings: OpenAISettings) -> dict[str, Any]:
    """Arguments of [`CascadedUNet2DModel`]."""
    resampling = "resnet" if structure.resblock_updown else "conv"
    return {
        "sample_size": settings.image_size,
        "in_channels": structure.image_channels,
        "out_channels": structure.image_channels,
        "learned_variance": structure.learned_variance,
        "block_out_channels": structure.block_out_channels,
        "layers_per_block": structure.layers_per_block,
        "attention_resolutions": tuple(settings.image_size // 2**level for level in structure.attention_levels),
        "num_attention_heads": settings.num_heads,
        "attention_head_dim": settings.num_head_channels,
        "dropout": settings.dropout,
        "resnet_time_scale_shift": "scale_shift" if structure.scale_shift else "default",
        "downsample_type": resampling,
        "upsample_type": resampling,
        "time_scale": 1000 / settings.diffusion_steps if settings.rescale_timesteps else 1.0,
        "time_proj_dim": structure.model_channels,
        "num_classes": structure.num_classes,
        "low_res_size": settings.low_res,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Names


def _renamed(
    state_dict: Mapping[str, torch.Tensor], structure: OpenAIStructure, settings: OpenAISettings
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Each weight with our name for it and its own; unknown ones keep their own."""
    layers = _layer_names(structure)
    for source, tensor in state_dict.items():
        layer = next((layer for layer in _prefixes(source) if layer in layers), None)
        if layer is None:
            yield source, source, tensor
            continue
        part, kind = source.removeprefix(layer).removeprefix(".").rpartition(".")[::2]
        ours = layers[layer]
        if part == "qkv":
            check_qkv(source, tensor, multiple=3 * (settings.num_heads or settings.num_head_channels))
            heads = settings.num_heads or tensor.shape[0] // 3 // settings.num_head_channels
            per_head = not settings.new_attention_order
            for name, weight in split_qkv(f"{ours}.", tensor, heads, per_head).items():
                yield name, source, weight
        elif ".attentions." in ours:
            tensor = tensor.flatten(1) if part == "proj_out" and tensor.ndim > 2 else tensor
            yield f"{ours}.{ATTENTION.get(part, part)}.{kind}", source, tensor
        elif part:
            yield f"{ours}.{RESIDUAL_BLOCK.get(part, part)}.{kind}", source, tensor
        else:
            yield f"{ours}.{kind}", source, tensor


def _prefixes(name: str) -> Iterator[str]:
    """ "a.b.c" gives "a.b" and "a"."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _layer_names(structure: OpenAIStructure) -> dict[str, str]:
    """OpenAI's name of each layer, to Diffusers'."""
    levels, per_level = len(structure.block_out_channels), structure.layers_per_block + 1
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    for level in range(levels):
        attends = level in structure.attention_levels
        for number in range(structure.layers_per_block):
            block = f"input_blocks.{1 + level * per_level + number}"
            names[f"{block}.0"] = f"down_blocks.{level}.resnets.{number}"
            if attends:
                names[f"{block}.1"] = f"down_blocks.{level}.attentions.{number}"
        if level < levels - 1:
            downsampler = f"input_blocks.{(level + 1) * per_level}.0"
            ours = f"down_blocks.{level}.downsamplers.0"
            names |= {downsampler: ours} if structure.resblock_updown else {f"{downsampler}.op": f"{ours}.conv"}
        up = levels - 1 - level
        for number in range(per_level):
            block = f"output_blocks.{up * per_level + number}"
            names[f"{block}.0"] = f"up_blocks.{up}.resnets.{number}"
            if attends:
                names[f"{block}.1"] = f"up_blocks.{up}.attentions.{number}"
        if level > 0:
            upsampler = f"output_blocks.{(up + 1) * per_level - 1}.{2 if attends else 1}"
            ours = f"up_blocks.{up}.upsamplers.0"
            names |= {upsampler: ours} if structure.resblock_updown else {f"{upsampler}.conv": f"{ours}.conv"}
    return names
