"""Renamed and rearranged weights of a foreign network, put into ours without a second copy."""

from collections.abc import Iterable, Mapping

import torch

from ..models import CascadedUNet2DModel


PROJECTIONS = ("to_q", "to_k", "to_v")


def check_tensors(state_dict: Mapping[str, torch.Tensor]):
    """
    Raises:
        `ValueError`: something is no tensor of floating point numbers.
    """
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            raise ValueError(f"`state_dict` has {name!r} of {tensor.dtype}; weights are floating point numbers.")


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
        found[name] = tensor.float()
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"`state_dict` lacks {len(missing)} weights of {what}, among them what becomes {missing[0]!r}: it is "
            "incomplete (one part of a sharded checkpoint?) or of another architecture."
        )
    unet.load_state_dict(found, strict=True, assign=True)
    return unet.eval()
