"""Renamed and rearranged weights of a foreign network, put into ours without a second copy."""

from collections.abc import Iterable, Mapping

import torch

from ..models import CascadedUNet2DModel


PROJECTIONS = ("to_q", "to_k", "to_v")

# The weights whose second dimension tells about the network
READ_BEYOND_ROWS = ("input_blocks.0.0.weight", "time_embed.0.weight", "downs.0.weight")


def check_tensors(state_dict: Mapping[str, torch.Tensor]):
    """
    Raises:
        `ValueError`: something is not a plain tensor of floating point numbers, or has too few dimensions.
    """
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(
                f"`state_dict` has {name!r} of {tensor.dtype} and {tensor.layout}; weights are dense floating point "
                "numbers."
            )
        if tensor.ndim == 0 or (tensor.ndim == 1 and name.endswith(READ_BEYOND_ROWS)):
            raise ValueError(f"`state_dict` has {name!r} in the shape {tuple(tensor.shape)}: it is damaged.")


def check_qkv(name: str, qkv: torch.Tensor, multiple: int):
    """
    Raises:
        `ValueError`: the weight or bias `name` of a projection cannot be split into three parts of heads.
    """
    if qkv.ndim not in (1, 3, 4) or qkv.shape[0] == 0 or qkv.shape[0] % multiple:
        raise ValueError(
            f"`state_dict` has {name!r} in the shape {tuple(qkv.shape)}; queries, keys and values of these heads need "
            f"a convolution over pixels with a multiple of {multiple} rows."
        )


def split_qkv(name: str, qkv: torch.Tensor, heads: int, per_head: bool) -> dict[str, torch.Tensor]:
    r"""
    The weight or bias of one projection to queries, keys and values as those of three.

    Args:
        name (`str`): our attention layer, with a dot at the end.
        qkv (`torch.Tensor` of shape `(3C, C, 1)`, `(3C, C, 1, 1)` or `(3C,)`): of a convolution over pixels.
        heads (`int`): number of heads, which only matters with `per_head`.
        per_head (`bool`): whether the rows are ordered (heads, 3, d), and not (3, heads, d).
    """
    kind = "bias" if qkv.ndim == 1 else "weight"
    rows = qkv if kind == "bias" else qkv.flatten(1)  # (3C,) or (3C, C)
    order = (heads, 3, -1) if per_head else (1, 3, -1)
    rows = rows.unflatten(0, order).transpose(0, 1).flatten(1, 2)  # (3, C) or (3, C, C)
    return {f"{name}{part}.{kind}": part_rows.clone() for part, part_rows in zip(PROJECTIONS, rows, strict=True)}


def fill_network(config: dict, weights: Iterable[tuple[str, str, torch.Tensor]], what: str) -> CascadedUNet2DModel:
    r"""
    A network whose parameters are the given tensors themselves, wherever those are float32 already.

    Args:
        config (`dict`): arguments of [`CascadedUNet2DModel`].
        weights (iterable of `(name, source, tensor)`): our name of each weight, the name it came by, and the weight.
        what (`str`): what they should be, for error messages.

    Raises:
        `ValueError`: weights are missing, left over, or of another shape than the network's.
    """
    with torch.device("meta"):
        unet = CascadedUNet2DModel(**config)
    expected = {name: tuple(parameter.shape) for name, parameter in unet.state_dict().items()}
    found = {}
    for name, source, tensor in weights:
        if name not in expected:
            raise ValueError(f"`state_dict` has {source!r}, which has no place in {what}.")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"`state_dict` has {source!r} for {name!r} in the shape {tuple(tensor.shape)}; in {what} it is "
                f"{expected[name]}."
            )
        found[name] = _own_storage(tensor.detach().float())
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"`state_dict` lacks {len(missing)} weights of {what}, among them what becomes {missing[0]!r}: it is "
            "incomplete (one part of a sharded checkpoint?) or of another architecture."
        )
    unet.load_state_dict(found, strict=True, assign=True)
    return unet.eval()


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """
    The same memory as a storage of its own. OpenAI's training in half precision saves weights as parts of one buffer,
    and what shares a storage is written into one file however large.
    """
    return tensor if tensor.is_meta else torch.from_numpy(tensor.numpy())
