"""Functions, mostly networks, applied to data sets batch by batch, by all processes together."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import gather_object, send_to_device
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
    What `function` returns for each batch, without gradients and on the CPU.

    With several processes, each takes its share of the batches, and has the results of all, in the order of the
    loader: they are the same for any number of processes. All must call it.

    Args:
        loader: of batches {"image": (B, C, H, W), "label": (B,) where there are labels}; the same in all processes.
        function: takes a batch whose tensors are on `device`, and returns tensors, or a tuple or a dictionary of them.
        desc: what the progress bar of the main process says.
        disable: whether there is none.
    """
    state = PartialState()
    disable = disable or not state.is_main_process
    batches = tqdm(share_of(loader, state), desc, unit="batch", leave=False, disable=disable)
    yield from in_order(send_to_device(function(send_to_device(batch, device)), "cpu") for batch in batches)


def share_of(loader: DataLoader, state: PartialState) -> DataLoader:
    """This process's batches of `loader`: whole ones, of which each process has one in turn."""
    share = BatchSamplerShard(loader.batch_sampler, state.num_processes, state.process_index, even_batches=False)
    kept = {name: getattr(loader, name) for name in ("num_workers", "collate_fn", "generator")}
    return DataLoader(loader.dataset, batch_sampler=share, **kept)


def in_order(parts: Iterable[Any]) -> Iterator[Any]:
    """What each process has of a sequence that they take in turn, as the whole sequence, in all processes."""
    parts = iter(parts)
    while of_all := gather_object(list(itertools.islice(parts, 1))):
        yield from of_all


def joined(parts: Iterable[tuple[torch.Tensor | None, ...]]) -> tuple[torch.Tensor | None, ...]:
    """Tuples of tensors, or of None, of successive batches as one tuple of tensors, or of None."""
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
