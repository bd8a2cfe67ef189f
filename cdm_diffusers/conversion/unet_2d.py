"""Diffusers' own `UNet2DModel` (the DDPM family) as [`CascadedUNet2DModel`], and back where it can express ours."""

from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DModel
from diffusers.models.attention_processor import Attention

from ..models import CascadedUNet2DModel
from ..schedulers import CascadedDDPMScheduler
from .weights import fill_network


# What UNet2DModel's config must say for ours to express it
EXPECTED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "class_embed_type": (None,),
}
RESAMPLING_OF_BLOCK = {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet"}
ATTENTION_BLOCK = "AttnDownBlock2D"


def unet_from_diffusers(model: UNet2DModel) -> CascadedUNet2DModel:
    r"""
    A base network with the weights of `model`, whose memory it shares.

    Raises:
        `ValueError`: `model` has parts that [`CascadedUNet2DModel`] does not have.
    """
    config = model.config
    for name, allowed in EXPECTED.items():
        if config[name] not in allowed:
            raise ValueError(f"`{name}` of the UNet2DModel is {config[name]!r}; only {allowed} can be converted.")
    if not isinstance(config.sample_size, int):
        raise ValueError(f"`sample_size` of the UNet2DModel is {config.sample_size!r}; only squares can be converted.")
    kinds = list(config.down_block_types)
    mirrored = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    known = {*RESAMPLING_OF_BLOCK, ATTENTION_BLOCK}
    if not known.issuperset(kinds) or mirrored != list(config.up_block_types):
        raise ValueError(
            f"`down_block_types` are {kinds} and `up_block_types` {list(config.up_block_types)}; only mirrored blocks "
            f"of {sorted(known)} can be converted."
        )
    resampling = _resampling(config)
    if config.resnet_time_scale_shift == "scale_shift" and config.add_attention and not config.attn_norm_num_groups:
        raise ValueError(
            "`attn_norm_num_groups` is None: the middle's attention has no norm, which cannot be converted."
        )
    if config.attn_norm_num_groups not in (None, config.norm_num_groups):
        raise ValueError(f"`attn_norm_num_groups` is {config.attn_norm_num_groups}; it must be `norm_num_groups`.")
    heads = {"num_attention_heads": 1} if config.attention_head_dim is None else {}
    learned_variance = config.out_channels == 2 * config.in_channels
    arguments = {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels if learned_variance else config.out_channels,
        "learned_variance": learned_variance,
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "attention_resolutions": tuple(
            config.sample_size // 2**level for level, kind in enumerate(kinds) if kind == ATTENTION_BLOCK
        ),
        "mid_block_attention": config.add_attention,
        "attention_head_dim": config.attention_head_dim,
        "dropout": config.dropout,
        "norm_num_groups": config.norm_num_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": config.resnet_time_scale_shift,
        "downsample_type": "conv_end_padding"
        if (resampling, config.downsample_padding) == ("conv", 0)
        else resampling,
        "upsample_type": resampling,
        "time_embedding_dim": config.time_embedding_dim,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": config.freq_shift,
        "num_classes": config.num_class_embeds,
        **heads,
    }
    weights = ((name, name, tensor) for name, tensor in model.state_dict().items())
    return fill_network(arguments, weights, "such a UNet2DModel")


def _resampling(config) -> str:
    """Going down and up alike: all levels by convolution, or all by residual block. The lowest has no resampling."""
    kinds = {
        config.downsample_type if kind == ATTENTION_BLOCK else RESAMPLING_OF_BLOCK[kind]
        for kind in config.down_block_types[:-1]
    }
    kinds |= {config.upsample_type} if ATTENTION_BLOCK in config.down_block_types[1:] else set()
    if len(kinds) > 1:
        raise ValueError(
            f"The levels of the UNet2DModel ({list(config.down_block_types)}, `downsample_type` "
            f"{config.downsample_type!r}, `upsample_type` {config.upsample_type!r}) resample in different ways; only "
            "networks with one way can be converted."
        )
    return kinds.pop() if kinds else "conv"


def scheduler_from_diffusers(scheduler: SchedulerMixin, unet: CascadedUNet2DModel) -> CascadedDDPMScheduler:
    r"""
    The diffusion process of one of Diffusers' discrete schedulers.

    Raises:
        `ValueError`: it has another noise schedule or prediction than [`CascadedDDPMScheduler`] knows.
    """
    config = scheduler.config
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError("`trained_betas` and `rescale_betas_zero_snr` of a scheduler cannot be converted.")
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "clip_sample")
    names += ("clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
    arguments: dict[str, Any] = {name: config[name] for name in names if name in config}
    variance_type = "learned_range" if unet.config.learned_variance else config.get("variance_type", "fixed_small")
    return CascadedDDPMScheduler(**arguments, variance_type=variance_type)


def unet_to_diffusers(unet: CascadedUNet2DModel) -> UNet2DModel:
    r"""
    A `UNet2DModel` with the weights of a base network, whose memory it shares; twice the channels come out of it where
    the variance is learned, and the null class of guidance is its last class.

    Raises:
        `ValueError`: the network has something that UNet2DModel cannot express; names all of it.
    """
    config = unet.config
    channels = list(config.block_out_channels)
    expected = {
        "conv_in_channels": (None, channels[0]),
        "low_res_size": (None,),
        "time_conditioning": ("timestep",),
        "time_scale": (1.0,),
        "time_proj_dim": (None, channels[0]),
        "time_embedding_hidden_dim": (None, config.time_embedding_dim or 4 * channels[0]),
        "skip_time_act": (False,),
        "skip_rescale": (False,),
        "patch_size": (1,),
    }
    surplus = [f"`{name}` {config[name]!r}" for name, allowed in expected.items() if config[name] not in allowed]
    if not isinstance(config.layers_per_block, int):
        surplus.append(f"`layers_per_block` {config.layers_per_block!r}, a number for each level")
    by_resnet = config.downsample_type == "resnet"
    if by_resnet != (config.upsample_type == "resnet"):
        surplus.append("`downsample_type` and `upsample_type` that differ")
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    widths = {attention.inner_dim // attention.heads for attention in attentions}
    one_head = all(attention.heads == 1 for attention in attentions)
    if len(widths) > 1 and not one_head:
        surplus.append(f"attention heads of the widths {sorted(widths)}")
    if surplus:
        raise ValueError(f"UNet2DModel cannot express {', '.join(surplus)}.")
    plain = "ResnetDownsampleBlock2D" if by_resnet else "DownBlock2D"
    sizes = [config.sample_size // 2**level for level in range(len(channels))]
    kinds = [ATTENTION_BLOCK if size in config.attention_resolutions else plain for size in sizes]
    with torch.device("meta"):
        model = UNet2DModel(
            sample_size=config.sample_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels * (2 if config.learned_variance else 1),
            time_embedding_dim=config.time_embedding_dim,
            freq_shift=config.freq_shift,
            flip_sin_to_cos=config.flip_sin_to_cos,
            down_block_types=tuple(kinds),
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
            block_out_channels=tuple(channels),
            layers_per_block=config.layers_per_block,
            downsample_padding=0 if config.downsample_type == "conv_end_padding" else 1,
            downsample_type="resnet" if by_resnet else "conv",
            upsample_type="resnet" if by_resnet else "conv",
            dropout=config.dropout,
            attention_head_dim=None if one_head else widths.pop(),
            norm_num_groups=config.norm_num_groups,
            attn_norm_num_groups=config.norm_num_groups,
            norm_eps=config.norm_eps,
            resnet_time_scale_shift=config.resnet_time_scale_shift,
            add_attention=config.mid_block_attention,
            num_class_embeds=None if config.num_classes is None else config.num_classes + config.null_class,
        )
    model.load_state_dict(unet.state_dict(), strict=True, assign=True)
    return model.eval()
