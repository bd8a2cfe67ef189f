"""The network's arguments, and the values each may have. The network itself checks how they fit together."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple

from ..added import added


class Kind(NamedTuple):
    """The values that an argument may have: in words, and as a test of a value."""

    words: str
    has: Callable[[Any], bool]


def _integer(lowest: int, highest: int) -> Kind:
    return Kind(f"an integer in {lowest}..{highest}", lambda value: type(value) is int and lowest <= value <= highest)


def _number(above: float, highest: float) -> Kind:
    return Kind(
        f"a number above {above:g} and at most {highest:g}",
        lambda value: type(value) in (int, float) and above < value <= highest,
    )


def _one_of(*choices: str) -> Kind:
    return Kind(f"one of {choices}", lambda value: type(value) is str and value in choices)


def _optional(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or None", lambda value: value is None or kind.has(value))


def _list_of(kind: Kind, shortest: int = 1) -> Kind:
    return Kind(
        f"a list of {shortest} to {MOST_LEVELS} values, each {kind.words}",
        lambda value: (
            type(value) in (list, tuple) and shortest <= len(value) <= MOST_LEVELS and all(map(kind.has, value))
        ),
    )


def _same_or_by_level(kind: Kind) -> Kind:
    values = _list_of(kind)
    return Kind(f"{kind.words}, or one for each level", lambda value: kind.has(value) or values.has(value))


# Far above every published network. Without such bounds a damaged config takes minutes to build, or all memory.
MOST_LEVELS = 16
MOST_BLOCKS = 64  # per level
MOST_BLOCKS_IN_ALL = 128  # on the way down
MOST_WEIGHTS = 10**10

SIZE = _integer(1, 2**20)
FRACTION = Kind("a number in [0, 1)", lambda value: type(value) in (int, float) and 0 <= value < 1)
SWITCH = Kind("True or False", lambda value: type(value) is bool)


def argument(kind: Kind, default: Any = MISSING) -> Any:
    """A field whose value must be of `kind`."""
    return field(default=default, metadata={"kind": kind})


@dataclass(frozen=True)
class UNetArguments:
    """
    The arguments of [`CascadedUNet2DModel`] without importing torch: same names, types and defaults, as a test checks;
    `dataclasses.asdict` gives its keyword arguments.

    `attention_resolutions` are real resolutions in pixels, as in Appendix B; with patches, those of the feature maps.
    Exactly one of `num_attention_heads` and `attention_head_dim` is given where there is attention. `in_channels` and
    `out_channels` count channels of images: the network adds the low-resolution input and the learned variance.
    """

    # images
    sample_size: int = argument(SIZE)
    in_channels: int = argument(SIZE, 3)
    out_channels: int = argument(SIZE, 3)
    learned_variance: bool = argument(SWITCH, False)
    # levels
    block_out_channels: tuple[int, ...] = argument(_list_of(SIZE), (128, 256, 384, 512))
    conv_in_channels: int | None = argument(_optional(SIZE), None)
    layers_per_block: int | tuple[int, ...] = argument(_same_or_by_level(_integer(1, MOST_BLOCKS)), 2)
    attention_resolutions: tuple[int, ...] = argument(_list_of(SIZE, shortest=0), (16, 8))
    mid_block_attention: bool = argument(SWITCH, True)
    num_attention_heads: int | tuple[int, ...] | None = argument(_optional(_same_or_by_level(SIZE)), None)
    attention_head_dim: int | tuple[int, ...] | None = argument(_optional(_same_or_by_level(SIZE)), None)
    # residual blocks
    dropout: float = argument(FRACTION, 0.0)
    norm_num_groups: int = argument(SIZE, 32)
    norm_eps: float = argument(_number(0, 1), 1e-5)
    resnet_time_scale_shift: str = argument(_one_of("scale_shift", "default"), "scale_shift")
    downsample_type: str = argument(_one_of("conv", "resnet", "conv_end_padding"), "conv")
    upsample_type: str = argument(_one_of("conv", "resnet"), "conv")
    skip_rescale: bool = argument(SWITCH, False)
    # time or noise level
    time_conditioning: str = argument(_one_of("timestep", "noise_level"), "timestep")
    time_scale: float = argument(_number(0, 1e6), 1.0)
    time_proj_dim: int | None = argument(_optional(SIZE), None)
    time_embedding_dim: int | None = argument(_optional(SIZE), None)
    time_embedding_hidden_dim: int | None = argument(_optional(SIZE), None)
    skip_time_act: bool = argument(SWITCH, False)
    flip_sin_to_cos: bool = argument(SWITCH, True)
    freq_shift: int = argument(_integer(0, 2**20), 0)
    # classes
    num_classes: int | None = argument(_optional(SIZE), None)
    null_class: bool = argument(SWITCH, False)
    # low-resolution image and its augmentation level s
    low_res_size: int | None = argument(_optional(SIZE), None)
    low_res_channels: int | None = argument(_optional(SIZE), None)
    low_res_interpolation: str = argument(_one_of("bilinear", "bicubic", "pillow_bicubic"), "bilinear")
    low_res_first: bool = argument(SWITCH, False)
    augmentation_level_embedding: bool = argument(SWITCH, False)
    # added in later versions
    patch_size: int = added(1, kind=SIZE)
    low_res_skip: bool = added(False, kind=SWITCH)
    low_res_skip_threshold: float = added(0.0, kind=FRACTION)


def low_res_channels_of(config: Any) -> int:
    """Channels of the image that a super-resolution network is given; as many as x_t has where none are named."""
    return config.low_res_channels or config.in_channels


def check_arguments(config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an argument in `config` is of the wrong type or out of range.
    """
    for f in fields(UNetArguments):
        kind = f.metadata["kind"]
        if not kind.has(config[f.name]):
            raise ValueError(f"`{f.name}` is {reprlib.repr(config[f.name])}; it must be {kind.words}.")
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    blocks = levels * layers if isinstance(layers, int) else sum(layers)
    if blocks > MOST_BLOCKS_IN_ALL:
        raise ValueError(
            f"`layers_per_block` is {layers}, which makes {blocks} blocks in {levels} levels; it must make at most "
            f"{MOST_BLOCKS_IN_ALL}."
        )
