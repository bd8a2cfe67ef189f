"""The network of every stage."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    ResnetDownsampleBlock2D,
    ResnetUpsampleBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
)

from ..plain import plain
from .arguments import MOST_WEIGHTS, check_arguments, low_res_channels_of


# Dtypes of indices and of noise levels: in half precision a noise level has already lost its digits.
_INDEX_DTYPES = (torch.int64, torch.int32)
_LEVEL_DTYPES = (torch.float32, torch.float64)

# What networks have computed from conditions, within `constant_conditions`
_made_of_conditions: ContextVar[dict | None] = ContextVar("made_of_conditions", default=None)


@contextlib.contextmanager
def constant_conditions() -> Iterator[None]:
    """
    Within it, networks compute what depends on a condition alone (the embeddings of class and s, the upsampled
    low-resolution image) once, and again only for another tensor. Weights and the tensors' values must not change.
    Compiled networks compute it at each call.
    """
    token = _made_of_conditions.set({})
    try:
        yield
    finally:
        _made_of_conditions.reset(token)


class CascadedUNet2DModel(ModelMixin, AttentionMixin, PeftAdapterMixin, ConfigMixin):
    r"""
    The U-Net of every stage of a cascade (Section 2.3, Figure 3, Appendix B): it sees a noisy image and a diffusion
    time or noise level, and where configured a class, a low-resolution image and that image's augmentation level.

    A network without any attention also takes images of other sizes, as long as image and low-resolution image keep
    the ratio of `sample_size` to `low_res_size`: it can be trained on crops and used on whole images.

    `compile_repeated_blocks` compiles a graph for each level; `compile` makes one of the whole network.

    Args:
        sample_size (`int`): Height and width of the images.
        in_channels (`int`, defaults to 3): Channels of the noisy image, the low-resolution image not counted.
        out_channels (`int`, defaults to 3): Channels of the prediction, the variance not counted.
        learned_variance (`bool`, defaults to `False`): Whether the output has extra channels for the variance.
        block_out_channels (`tuple[int]`): Channels of each level, from the highest resolution to the lowest.
        conv_in_channels (`int`, *optional*): Channels of the first convolution; the first level's by default.
        patch_size (`int`, defaults to 1):
            Side p of the patches that the network works on: p x p pixels become channels before the first convolution
            (space to depth) and pixels again after the last one, so the first level has 1/p of the resolution.
        layers_per_block (`int` or `tuple[int]`, defaults to 2):
            Residual blocks per level going down; one more going up. A tuple gives one number per level: few at high
            resolutions and many at low ones give Imagen's Efficient U-Net.
        attention_resolutions (`tuple[int]`):
            Resolutions whose residual blocks are followed by attention: sides of feature maps, `sample_size` over
            `patch_size` at the first level.
        mid_block_attention (`bool`, defaults to `True`): Whether the middle has attention.
        num_attention_heads, attention_head_dim (`int` or `tuple[int]`, *optional*):
            Attention heads by their number or by their width: exactly one of the two, or none where there is no
            attention. A tuple gives one per level.
        dropout (`float`, defaults to 0.0): Dropout in the residual blocks.
        norm_num_groups (`int`, defaults to 32), norm_eps (`float`, defaults to 1e-5): Group normalisation.
        resnet_time_scale_shift (`"scale_shift"` or `"default"`): Whether embeddings scale and shift, or are added.
        downsample_type, upsample_type (`"conv"` or `"resnet"`, defaults to `"conv"`):
            Resampling by a convolution or by a residual block (BigGAN's). Going down also `"conv_end_padding"`: a
            convolution that pads at the right and the bottom only, as in DDPM's original networks.
        skip_rescale (`bool`, defaults to `False`): Whether residual sums are scaled by 1/sqrt(2), as in SR3.
        time_conditioning (`"timestep"` or `"noise_level"`): Whether `timestep` is the index t - 1 or sqrt(alpha_bar).
        time_scale (`float`, defaults to 1.0): Multiplies it before the sinusoids.
        time_proj_dim (`int`, *optional*): Sinusoidal features; the first level's channels by default.
        time_embedding_dim (`int`, *optional*): Width of the embedding; 4 times the sinusoidal features by default.
        time_embedding_hidden_dim (`int`, *optional*): Hidden width of the embedding's MLP; the same by default.
        skip_time_act (`bool`, defaults to `False`): Whether blocks project the embedding without a SiLU first.
        flip_sin_to_cos (`bool`, defaults to `True`), freq_shift (`int`, defaults to 0): As in Diffusers.
        num_classes (`int`, *optional*): Classes of a class-conditional network.
        null_class (`bool`, defaults to `False`): Whether there is an extra class, `num_classes`, that means no class.
        low_res_size (`int`, *optional*): Size of the low-resolution image of a super-resolution network.
        low_res_channels (`int`, *optional*): Its channels; `in_channels` by default.
        low_res_interpolation (`"bilinear"`, `"bicubic"` or `"pillow_bicubic"`, defaults to `"bilinear"`):
            How it is upsampled inside, to the first level's resolution; Pillow's bicubic kernel (a = -0.5) is softer
            than torch's (a = -0.75). An image of that resolution is used as it is, a larger one in patches.
        low_res_first (`bool`, defaults to `False`): Whether it is concatenated before the noisy image.
        low_res_skip (`bool`, defaults to `False`):
            Whether the upsampled low-resolution image is added to the prediction, so that the layers only add what it
            lacks: for networks that predict x_0, and inputs without Gaussian noise, which would have to be removed.
        low_res_skip_threshold (`float`, defaults to 0.0):
            The layers' output is moved towards 0 by this, in units of [-1, 1], and is 0 below it (soft thresholding),
            in training too: flat areas stay as flat as the upsampled image is there. Output below it gets no gradient,
            so training with it must start from weights that already produce details.
        augmentation_level_embedding (`bool`, defaults to `False`): Whether the network takes s (Section 3.2).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "Attention"]
    # whole levels: residual blocks differ in channels, and Dynamo limits the number of graphs of one forward
    _repeated_blocks = [
        "AttnDownBlock2D",
        "AttnUpBlock2D",
        "DownBlock2D",
        "ResnetDownsampleBlock2D",
        "ResnetUpsampleBlock2D",
        "UNetMidBlock2D",
        "UpBlock2D",
    ]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "class_embedding", "augmentation_embedding"]

    @register_to_config
    def __init__(
        self,
        # images
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        learned_variance: bool = False,
        # levels
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        conv_in_channels: int | None = None,
        layers_per_block: int | tuple[int, ...] = 2,
        attention_resolutions: tuple[int, ...] = (16, 8),
        mid_block_attention: bool = True,
        num_attention_heads: int | tuple[int, ...] | None = None,
        attention_head_dim: int | tuple[int, ...] | None = None,
        # residual blocks
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        skip_rescale: bool = False,
        # time or noise level
        time_conditioning: str = "timestep",
        time_scale: float = 1.0,
        time_proj_dim: int | None = None,
        time_embedding_dim: int | None = None,
        time_embedding_hidden_dim: int | None = None,
        skip_time_act: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        # classes
        num_classes: int | None = None,
        null_class: bool = False,
        # low-resolution image and its augmentation level s
        low_res_size: int | None = None,
        low_res_channels: int | None = None,
        low_res_interpolation: str = "bilinear",
        low_res_first: bool = False,
        augmentation_level_embedding: bool = False,
        # added in later versions
        patch_size: int = 1,
        low_res_skip: bool = False,
        low_res_skip_threshold: float = 0.0,
    ):
        super().__init__()
        self.register_to_config(**plain(self.config))
        check_arguments(self.config)
        self._check_fit()
        self._check_number_of_weights()
        # loading builds without weights too, but first allocates each of them, which `torch.device("meta")` avoids
        is_empty = torch.nn.LayerNorm(1).weight.is_meta
        with torch.device("meta") if is_empty else contextlib.nullcontext():
            self._build()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "CascadedUNet2DModel":
        """
        [`ModelMixin.from_pretrained`], except that weights must be exactly the network's: Diffusers only warns about
        missing ones, which it leaves random, and about surplus ones.

        Raises:
            `OSError`: there is no such file or folder, or its weights do not match its config.
            `ValueError`: an argument, or an entry of the config, is out of range.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        name = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(name, output_loading_info=True, **kwargs)
        except (ValueError, RuntimeError) as error:
            if "expected shape" in str(error) or "size mismatch" in str(error):
                what, _, _ = str(error).partition(". If you want")
                raise OSError(f"The weights of {name} have another architecture than its config: {what}.") from error
            raise
        missing, surplus = _missing_and_surplus(model, info)
        if missing or surplus:
            what = f"lacks {len(missing)} of" if missing else f"has {len(surplus)} weights besides"
            raise OSError(
                f"The checkpoint {name} {what} the network's weights, {min(missing or surplus)!r} among them: it is "
                "incomplete, or of another architecture than its config."
            )
        return (model, info) if wants_info else model

    def set_attention_backend(self, backend: str) -> None:
        """
        [`ModelMixin.set_attention_backend`], which changes nothing for the processors of this network: they call
        torch's scaled dot product attention, which is "native" and chooses its kernel itself.

        Raises:
            `ValueError`: `backend` is not "native", and the network has processors that take no backend.
        """
        deaf = {type(p).__name__ for p in self.attn_processors.values() if not hasattr(p, "_attention_backend")}
        if deaf and backend != "native":
            raise ValueError(
                f"`backend` is {backend!r}; it must be 'native', since {', '.join(sorted(deaf))} calls torch's scaled "
                "dot product attention: choose its kernel by `torch.nn.attention.sdpa_kernel`, or set processors that "
                "take one by `set_attn_processor`."
            )
        super().set_attention_backend(backend)

    # -----------------------------------------------------------------------------------------------------------------
    # Construction

    def _check_fit(self):
        """Whether arguments that are individually valid fit together."""
        config = self.config
        levels = len(config.block_out_channels)
        factor = _patch_factor(config)
        if config.sample_size % factor:
            raise ValueError(
                f"`sample_size` is {config.sample_size}; with `patch_size` {config.patch_size} and {levels} levels, "
                f"which halve it {levels - 1} times, it must be a multiple of {factor}."
            )
        if len(self._layers_per_block()) != levels:
            raise ValueError(
                f"`layers_per_block` is {config.layers_per_block}; it must be one number, or one for each of the "
                f"{levels} levels."
            )
        widths = (self._channels_before(0), *config.block_out_channels)
        if any(channels % config.norm_num_groups for channels in widths):
            raise ValueError(
                f"`block_out_channels` {widths[1:]} (after `conv_in_channels`, {widths[0]}) must be multiples of "
                f"`norm_num_groups`, which is {config.norm_num_groups}."
            )
        resolutions = [self._resolution(level) for level in range(levels)]
        unknown = [resolution for resolution in config.attention_resolutions if resolution not in resolutions]
        if unknown:
            raise ValueError(f"`attention_resolutions` has {unknown}; the levels have the resolutions {resolutions}.")
        if config.null_class and config.num_classes is None:
            raise ValueError("`null_class` needs `num_classes`: without classes there is none to leave out.")
        if config.augmentation_level_embedding and config.low_res_size is None:
            raise ValueError("`augmentation_level_embedding` needs `low_res_size`: s belongs to that image.")
        if config.low_res_size is not None and config.low_res_size > config.sample_size:
            raise ValueError(
                f"`low_res_size` is {config.low_res_size}; it must lie in 1..`sample_size`, {config.sample_size}."
            )
        if config.low_res_skip and (config.low_res_size is None or low_res_channels_of(config) != config.out_channels):
            raise ValueError(
                "`low_res_skip` is True; it needs a `low_res_size`, and as many `low_res_channels` as `out_channels`."
            )
        if config.low_res_skip_threshold > 0 and not config.low_res_skip:
            raise ValueError(
                f"`low_res_skip_threshold` is {config.low_res_skip_threshold}; it needs `low_res_skip`, whose "
                "upsampled image is all that remains below it."
            )
        grid = self._resolution(0)
        if config.low_res_size is not None and config.low_res_size > grid and config.low_res_size % grid:
            raise ValueError(
                f"`low_res_size` is {config.low_res_size}, above the resolution of {grid} that `patch_size` "
                f"{config.patch_size} leaves; it must be a multiple of that."
            )

        if config.freq_shift > 0 and config.freq_shift >= self._time_proj_dim() // 2:
            raise ValueError(
                f"`freq_shift` is {config.freq_shift}; it must be below half of the {self._time_proj_dim()} "
                "sinusoidal features (`time_proj_dim`)."
            )

    def _check_number_of_weights(self):
        """Counts them on the meta device, which allocates none, unless there are obviously few."""
        config = self.config
        into, out_of, first = self._input_channels(), self._output_channels(), self._channels_before(0)
        widths = (into, out_of, first, *config.block_out_channels, self._embedding_dim())
        widest = max(*widths, config.time_embedding_hidden_dim or 1, config.num_classes or 1)
        if 300 * sum(self._layers_per_block()) * widest**2 < MOST_WEIGHTS:
            return
        number = 9 * max(into * first, out_of * config.block_out_channels[0])  # the convolutions at both ends
        if number <= MOST_WEIGHTS:
            with torch.device("meta"):
                self._build()
            number = self.num_parameters()
        if number > MOST_WEIGHTS:
            raise ValueError(
                f"The network would have {number:.1e} weights or more; it must have at most {MOST_WEIGHTS:.0e}: "
                f"`block_out_channels` is {config.block_out_channels}, `in_channels` is {config.in_channels}."
            )

    def _build(self):
        self._build_embeddings()
        self._build_layers()
        self._initialize()

    def _build_embeddings(self):
        """Embeddings of the time, of s and of the class."""
        config = self.config
        time_proj_dim = self._time_proj_dim()
        hidden_dim = config.time_embedding_hidden_dim or self._embedding_dim()
        self.time_proj = Timesteps(time_proj_dim, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(time_proj_dim, hidden_dim, out_dim=self._embedding_dim())
        self.augmentation_embedding = None
        if config.augmentation_level_embedding:
            self.augmentation_embedding = TimestepEmbedding(time_proj_dim, hidden_dim, out_dim=self._embedding_dim())
        self.class_embedding = None
        if config.num_classes is not None:
            self.class_embedding = torch.nn.Embedding(config.num_classes + config.null_class, self._embedding_dim())

    def _build_layers(self):
        """Input, down, middle, up, output."""
        config = self.config
        self.conv_in = torch.nn.Conv2d(self._input_channels(), self._channels_before(0), kernel_size=3, padding=1)

        levels, head_dims = range(len(config.block_out_channels)), self._head_dims()
        common = {
            "temb_channels": self._embedding_dim(),
            "dropout": config.dropout,
            "resnet_eps": config.norm_eps,
            "resnet_groups": config.norm_num_groups,
            "resnet_time_scale_shift": config.resnet_time_scale_shift,
            "output_scale_factor": math.sqrt(2) if config.skip_rescale else 1.0,
        }
        self.down_blocks = torch.nn.ModuleList(self._down_block(level, head_dims[level], common) for level in levels)
        self.mid_block = UNetMidBlock2D(
            config.block_out_channels[-1],
            attention_head_dim=head_dims[-1],
            attn_groups=config.norm_num_groups,  # without it, scale-shift networks lose this norm
            add_attention=config.mid_block_attention,
            **common,
        )
        self.up_blocks = torch.nn.ModuleList(
            self._up_block(level, head_dims[level], common) for level in reversed(levels)
        )

        self.conv_norm_out = torch.nn.GroupNorm(
            config.norm_num_groups, config.block_out_channels[0], eps=config.norm_eps
        )
        self.conv_act = torch.nn.SiLU()
        self.conv_out = torch.nn.Conv2d(
            config.block_out_channels[0], self._output_channels(), kernel_size=3, padding=1
        )

    def _input_channels(self) -> int:
        config = self.config
        channels = config.in_channels * config.patch_size**2
        if config.low_res_size is not None:
            channels += low_res_channels_of(config) * self._low_res_patch_size() ** 2
        return channels

    def _output_channels(self) -> int:
        config = self.config
        return config.out_channels * (2 if config.learned_variance else 1) * config.patch_size**2

    def _time_proj_dim(self) -> int:
        return self.config.time_proj_dim or self.config.block_out_channels[0]

    def _embedding_dim(self) -> int:
        return self.config.time_embedding_dim or 4 * self._time_proj_dim()

    def _head_dims(self) -> list[int]:
        """Width of the attention heads at each level; without attention, that of the level."""
        channels = self.config.block_out_channels
        by_number, by_width = self.config.num_attention_heads, self.config.attention_head_dim
        if by_number is None and by_width is None and not any(map(self._attends, range(len(channels)))):
            return list(channels)
        if (by_number is None) == (by_width is None):
            raise ValueError(
                "Give exactly one of `num_attention_heads` and `attention_head_dim`, "
                f"got {by_number!r} and {by_width!r}."
            )
        given = by_width if by_number is None else by_number
        given = [given] * len(channels) if isinstance(given, int) else list(given)
        name = "attention_head_dim" if by_number is None else "num_attention_heads"
        if len(given) != len(channels):
            raise ValueError(f"`{name}` has {len(given)} entries for {len(channels)} levels.")
        for level, (width, value) in enumerate(zip(channels, given, strict=True)):
            if self._attends(level) and width % value:
                raise ValueError(f"`{name}` is {value} where there are {width} channels: it must divide them.")
        if by_number is None:
            return given
        return [width // number for width, number in zip(channels, given, strict=True)]

    def _layers_per_block(self) -> tuple[int, ...]:
        layers = self.config.layers_per_block
        return (layers,) * len(self.config.block_out_channels) if isinstance(layers, int) else tuple(layers)

    def _low_res_patch_size(self) -> int:
        """Side of the patches of a low-resolution image above the first level's resolution; 1 for others."""
        return max(1, self.config.low_res_size // self._resolution(0))

    def _resolution(self, level: int) -> int:
        return self.config.sample_size // self.config.patch_size // 2**level

    def _attends(self, level: int) -> bool:
        is_middle = level == len(self.config.block_out_channels) - 1 and self.config.mid_block_attention
        return is_middle or self._resolution(level) in self.config.attention_resolutions

    def _channels_before(self, level: int) -> int:
        channels = self.config.block_out_channels
        return channels[level - 1] if level > 0 else self.config.conv_in_channels or channels[0]

    def _down_block(self, level: int, head_dim: int, common: dict) -> torch.nn.Module:
        channels = self.config.block_out_channels
        is_last = level == len(channels) - 1
        sizes = {
            "in_channels": self._channels_before(level),
            "out_channels": channels[level],
            "num_layers": self._layers_per_block()[level],
        }
        by_resnet = self.config.downsample_type == "resnet"
        # Diffusers' padding of 0 stands for one row and column at the end
        padding = {"downsample_padding": 0 if self.config.downsample_type == "conv_end_padding" else 1}
        if self._resolution(level) in self.config.attention_resolutions:
            downsample_type = None if is_last else "resnet" if by_resnet else "conv"
            sizes |= {"attention_head_dim": head_dim, "downsample_type": downsample_type}
            return AttnDownBlock2D(**sizes, **padding, **common)
        if by_resnet:
            return ResnetDownsampleBlock2D(**sizes, add_downsample=not is_last, **common)
        return DownBlock2D(**sizes, **padding, add_downsample=not is_last, **common)

    def _up_block(self, level: int, head_dim: int, common: dict) -> torch.nn.Module:
        channels = self.config.block_out_channels
        sizes = {
            "in_channels": self._channels_before(level),
            "out_channels": channels[level],
            "prev_output_channel": channels[min(level + 1, len(channels) - 1)],
            "num_layers": self._layers_per_block()[level] + 1,
        }
        if self._resolution(level) in self.config.attention_resolutions:
            upsample_type = self.config.upsample_type if level > 0 else None
            return AttnUpBlock2D(**sizes, attention_head_dim=head_dim, upsample_type=upsample_type, **common)
        block = UpBlock2D if self.config.upsample_type == "conv" else ResnetUpsampleBlock2D
        return block(**sizes, add_upsample=level > 0, **common)

    def _initialize(self):
        """Every residual branch and the output start at zero, as in DDPM."""
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                module.skip_time_act = self.config.skip_time_act
                torch.nn.init.zeros_(module.conv2.weight)
                torch.nn.init.zeros_(module.conv2.bias)
            elif isinstance(module, Attention):
                torch.nn.init.zeros_(module.to_out[0].weight)
                torch.nn.init.zeros_(module.to_out[0].bias)
        torch.nn.init.zeros_(self.conv_out.weight)
        torch.nn.init.zeros_(self.conv_out.bias)

    # -----------------------------------------------------------------------------------------------------------------
    # Forward

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        augmentation_level: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, sample_size, sample_size)`):
                x_t; networks without attention take other heights and widths too, with `low_res` in the same ratio.
            timestep (`torch.Tensor` of shape `()`, `(1,)` or `(B,)`, or a number):
                The int64 index t - 1, or the float32 noise level sqrt(alpha_bar_t), as `time_conditioning` says.
            class_labels (`torch.Tensor` of shape `(B,)`, *optional*): int64 class indices.
            low_res (`torch.Tensor` of shape `(B, low_res_channels, low_res_size, low_res_size)`, *optional*):
                The low-resolution image, augmented or not; it is upsampled inside.
            augmentation_level (`torch.Tensor` of shape `()` or `(B,)`, *optional*): int64 s in 0..T.
            return_dict (`bool`, defaults to `True`): whether to return a `UNet2DOutput` or a tuple.

        Returns:
            [`~models.unets.unet_2d.UNet2DOutput`]: the prediction `(B, out_channels, H, W)`; twice the channels with
            `learned_variance`, the second half being the raw variance.

        Raises:
            `ValueError`: a condition is missing, surplus, or of the wrong shape or dtype.
        """
        timestep = self._time(timestep)
        self._check_inputs(sample, timestep, class_labels, low_res, augmentation_level)

        # 1. embeddings: float32 until after the sinusoids, since bf16 cannot tell 4000 times apart
        emb = self.time_embedding(self._sinusoids(timestep, sample))
        if augmentation_level is not None:
            emb = emb + self._once(self._level_embedding, augmentation_level, sample)
        if class_labels is not None:
            emb = emb + self._once(self._class_embedding, class_labels, sample)

        # 2. input
        skip = self._once(self._upsampled, low_res, sample) if self.config.low_res_skip else None
        sample = F.pixel_unshuffle(sample, self.config.patch_size)  # (B, p * p * C, H / p, W / p)
        if low_res is not None:
            condition = self._once(self._to_first_level, low_res, sample)
            pair = (condition, sample) if self.config.low_res_first else (sample, condition)
            sample = torch.cat(pair, dim=1)
        hidden = self.conv_in(sample)

        # 3. down, middle, up
        skips = (hidden,)
        for block in self.down_blocks:
            hidden, block_skips = block(hidden, temb=emb)
            skips += block_skips
        hidden = self.mid_block(hidden, emb)
        for block in self.up_blocks:
            block_skips, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            hidden = block(hidden, block_skips, temb=emb)

        # 4. output
        prediction = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        prediction = F.pixel_shuffle(prediction, self.config.patch_size)
        if skip is not None:
            details, *variance = prediction.split(skip.shape[1], dim=1)
            if self.config.low_res_skip_threshold > 0:
                details = F.softshrink(details, self.config.low_res_skip_threshold)
            prediction = torch.cat((skip + details, *variance), dim=1)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def _time(self, timestep: torch.Tensor | float | int) -> torch.Tensor:
        """Numbers as tensors, as UNet2DModel takes them: indices are ints, noise levels may be either."""
        takes_level = self.config.time_conditioning == "noise_level"
        if type(timestep) is int or (takes_level and type(timestep) is float):
            if takes_level and not 0 <= timestep <= 1:
                raise ValueError(f"`timestep` is {timestep}; it must be a noise level, sqrt(alpha_bar), in 0..1.")
            return torch.tensor(timestep, dtype=torch.float32 if takes_level else torch.int64, device="cpu")
        return timestep[0] if torch.is_tensor(timestep) and timestep.shape == (1,) else timestep

    def _sinusoids(self, values: torch.Tensor, sample: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        scale = self.config.time_scale if scale is None else scale
        values = values.to(device=sample.device, dtype=torch.float32).expand(sample.shape[0])
        return self.time_proj(scale * values).to(sample.dtype)  # (B, time_proj_dim)

    def _once(self, make: Callable, condition: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """`make(condition, sample)`, a function of the dtype and shape of `sample`; see [`constant_conditions`]."""
        made = None if torch.compiler.is_compiling() else _made_of_conditions.get()
        if made is None:
            return make(condition, sample)
        key = self, make.__name__, id(condition), sample.dtype, sample.shape
        if key not in made:
            made[key] = condition, make(condition, sample)  # keeps the condition, so that its id is not reused
        return made[key][1]

    def _level_embedding(self, augmentation_level: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return self.augmentation_embedding(self._sinusoids(augmentation_level, sample, scale=1.0))

    def _class_embedding(self, class_labels: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return self.class_embedding(class_labels)

    def _to_first_level(self, low_res: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The low-resolution image at the resolution of `sample`, the first level's: upsampled, or in patches."""
        if low_res.shape[-1] >= sample.shape[-1]:
            return F.pixel_unshuffle(low_res, self._low_res_patch_size())
        return self._upsampled(low_res, sample)

    def _upsampled(self, low_res: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The low-resolution image at the size of `sample`."""
        mode, size = self.config.low_res_interpolation, sample.shape[-2:]
        if mode != "pillow_bicubic":
            return F.interpolate(low_res, size, mode=mode, align_corners=False)
        # torch antialiases with Pillow's kernel; when upsampling, the kernel is all that changes
        upsampled = F.interpolate(low_res.float(), size, mode="bicubic", align_corners=False, antialias=True)
        return upsampled.to(low_res.dtype)

    def _check_inputs(self, sample, timestep, class_labels, low_res, augmentation_level):
        """Presence, shapes and dtypes only: pipelines and loaders check values, outside the compiled graph."""
        config = self.config
        if not torch.is_tensor(sample) or sample.ndim != 4:
            came = f"of shape {tuple(sample.shape)}" if torch.is_tensor(sample) else repr(sample)
            raise ValueError(f"`sample` is {came}; it must be a tensor of shape (B, {config.in_channels}, H, W).")
        batch_size = sample.shape[0]
        height, width = self._check_size(sample)
        _check_shape("sample", sample, (batch_size, config.in_channels, height, width))
        takes_level = config.time_conditioning == "noise_level"
        _check_vector("timestep", timestep, _LEVEL_DTYPES if takes_level else _INDEX_DTYPES, batch_size)
        _check_presence("class_labels", class_labels, config.num_classes is not None)
        _check_presence("augmentation_level", augmentation_level, config.augmentation_level_embedding)
        if class_labels is not None:
            _check_vector("class_labels", class_labels, _INDEX_DTYPES, batch_size)
        if augmentation_level is not None:
            _check_vector("augmentation_level", augmentation_level, _INDEX_DTYPES, batch_size)
        if (low_res is None) != (config.low_res_size is None):
            raise ValueError(
                f"`low_res` is missing; this network takes images of size {config.low_res_size}."
                if low_res is None
                else "`low_res` was given to a network without a low-resolution input."
            )
        if low_res is not None:
            channels = low_res_channels_of(config)
            height, width = (side * config.low_res_size // config.sample_size for side in (height, width))
            _check_shape("low_res", low_res, (batch_size, channels, height, width))

    def _check_size(self, sample: torch.Tensor) -> tuple[int, int]:
        """Height and width that `sample` may have: its own for networks without attention, else `sample_size`."""
        config = self.config
        has_attention = config.mid_block_attention or len(config.attention_resolutions) > 0
        if has_attention:
            return config.sample_size, config.sample_size
        height, width = sample.shape[-2:]
        factor = side_factor(config)
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(f"`sample` is of size {height}x{width}; its sides must be multiples of {factor}.")
        return height, width


def side_factor(config: Any) -> int:
    """
    What the sides of images and of crops must be multiples of, in a network that takes several sizes: whole patches on
    every level, and whole pixels of the low-resolution image. `config` is the network's, or [`UNetArguments`].
    """
    ratio = config.sample_size // math.gcd(config.sample_size, config.low_res_size or config.sample_size)
    return math.lcm(_patch_factor(config), ratio)


def _missing_and_surplus(model: CascadedUNet2DModel, info: dict[str, Any]) -> tuple[list[str], list[str]]:
    """
    Names of missing and of surplus weights, from Diffusers' loading `info` and from the network itself.

    A quantizer may add entries of its own to those of a layer, which are not surplus, and Quanto's does not report
    missing parts of a quantized weight: they stay on the meta device.
    """
    missing, surplus = info["missing_keys"], info["unexpected_keys"]
    if getattr(model, "hf_quantizer", None) is None:
        return missing, surplus
    weights = {name: weight for name, weight in model.state_dict().items() if torch.is_tensor(weight)}
    layers = tuple(name.rpartition(".")[0] + "." for name in weights)
    if not getattr(model, "hf_device_map", None):  # a device map may leave weights on disk
        missing = [*missing, *(name for name, weight in weights.items() if weight.is_meta)]
    return missing, [name for name in surplus if not name.startswith(layers)]


def _patch_factor(config: Any) -> int:
    return config.patch_size * 2 ** (len(config.block_out_channels) - 1)


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]):
    if not torch.is_tensor(tensor) or tuple(tensor.shape) != shape or not tensor.is_floating_point():
        came = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if torch.is_tensor(tensor) else repr(tensor)
        raise ValueError(f"`{name}` is {came}; expected floats of shape {shape}.")


def _check_presence(name: str, values: torch.Tensor | None, expected: bool):
    if (values is not None) != expected:
        raise ValueError(
            f"`{name}` is missing; this network was trained with it."
            if expected
            else f"`{name}` was given to a network that was trained without it."
        )


def _check_vector(name: str, values: torch.Tensor, dtypes: tuple[torch.dtype, ...], batch_size: int):
    if not torch.is_tensor(values) or values.dtype not in dtypes:
        came = values.dtype if torch.is_tensor(values) else type(values).__name__
        raise ValueError(f"`{name}` is of type {came}; expected a {dtypes[0]} tensor.")
    if values.ndim > 1 or (values.ndim == 1 and values.shape[0] != batch_size):
        raise ValueError(f"`{name}` has shape {tuple(values.shape)}; expected ({batch_size},) or ().")
