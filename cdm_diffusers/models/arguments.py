"""What each argument of the network may be. How they must fit together, the network checks itself."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Values that an argument may have: in words, and whether a value is one."""

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


# Far above every published network. Without such bounds a damaged config builds for minutes, or takes all memory.
MOST_LEVELS = 16
MOST_BLOCKS = 64  # a level
MOST_WEIGHTS = 10**10

SIZE = _integer(1, 2**20)
SWITCH = Kind("True or False", lambda value: type(value) is bool)

ARGUMENTS = {
    "sample_size": SIZE,
    "in_channels": SIZE,
    "out_channels": SIZE,
    "learned_variance": SWITCH,
    "block_out_channels": _list_of(SIZE),
    "conv_in_channels": _optional(SIZE),
    "layers_per_block": _same_or_by_level(_integer(1, MOST_BLOCKS)),
    "attention_resolutions": _list_of(SIZE, shortest=0),
    "mid_block_attention": SWITCH,
    "num_attention_heads": _optional(_same_or_by_level(SIZE)),
    "attention_head_dim": _optional(_same_or_by_level(SIZE)),
    "dropout": Kind("a number in [0, 1)", lambda value: type(value) in (int, float) and 0 <= value < 1),
    "norm_num_groups": SIZE,
    "norm_eps": _number(0, 1),
    "resnet_time_scale_shift": _one_of("scale_shift", "default"),
    "downsample_type": _one_of("conv", "resnet", "conv_end_padding"),
    "upsample_type": _one_of("conv", "resnet"),
    "skip_rescale": SWITCH,
    "time_conditioning": _one_of("timestep", "noise_level"),
    "time_scale": _number(0, 1e6),
    "time_proj_dim": _optional(SIZE),
    "time_embedding_dim": _optional(SIZE),
    "time_embedding_hidden_dim": _optional(SIZE),
    "skip_time_act": SWITCH,
    "flip_sin_to_cos": SWITCH,
    "freq_shift": _integer(0, 2**20),
    "num_classes": _optional(SIZE),
    "null_class": SWITCH,
    "low_res_size": _optional(SIZE),
    "low_res_channels": _optional(SIZE),
    "low_res_interpolation": _one_of("bilinear", "bicubic", "pillow_bicubic"),
    "low_res_first": SWITCH,
    "augmentation_level_embedding": SWITCH,
    "patch_size": SIZE,
}


def check_arguments(config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an argument in `config` is of the wrong type or out of range.
    """
    for name, kind in ARGUMENTS.items():
        if not kind.has(config[name]):
            raise ValueError(f"`{name}` is {reprlib.repr(config[name])}; it must be {kind.words}.")
