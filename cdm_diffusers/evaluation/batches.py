"""Functions, mostly networks, applied to data sets batch by batch."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


@torch.no_grad()
def run_over(
    loader: DataLoader,
    function: Callable[[dict[str, torch.Tensor]], Any],
    device: str | torch.device,
    desc: str,
    disable: bool = False,
) -> Iterator[Any]:
    """
    What `function` returns for each batch, without gradients.

    Args:
        loader: of batches {"image": (B, C, H, W), "label": (B,) where there are labels}.
        function: takes a batch whose tensors are on `device`.
        desc: what the progress bar says.
        disable: whether there is none.
    """
    for batch in tqdm(loader, desc=desc, unit="batch", leave=False, disable=disable):
        yield function({name: tensor.to(device) for name, tensor in batch.items()})


def joined(parts: Iterable[tuple[torch.Tensor | None, ...]]) -> tuple[torch.Tensor | None, ...]:
    """Tuples of tensors, or of None, of successive batches as one tuple of tensors, or of None, on the CPU."""
    parts = [[None if tensor is None else tensor.cpu() for tensor in part] for part in parts]
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
