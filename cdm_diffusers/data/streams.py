"""
Streams of rows in an order of our own, which follows from a seed alone, is divided among processes without
communication, and can be resumed at any place.

A stream's shards (files, as a rule) are put into a new order each epoch, and dealt to *lanes*, of which every batch
takes equal numbers of rows. Each lane reads its shards one after the other, in blocks, and shuffles each block. So
four numbers describe a place, and going there means skipping within one shard and reading one block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    import datasets

    from .sources import RowDecoder


MOST_SHARDS = 1024  # more, as of folders of images, are joined
MOST_LANES, SHARDS_A_LANE = 32, 16
MOST_BYTES = 2**29  # of encoded images in the blocks of all lanes


@dataclass(frozen=True)
class Place:
    """
    Where a lane stands in an epoch.

    Args:
        shard, row: where its block begins: the number of the lane's shard, and how many rows of it are before.
        block: the block's number.
        taken: how many rows of the block, as shuffled, have been handed out.
    """

    shard: int = 0
    row: int = 0
    block: int = 0
    taken: int = 0


START = Place()


@dataclass(frozen=True)
class NamedRow:
    """An undecoded row, and what errors call it."""

    row: dict[str, Any]
    name: str


class RowStream(torch.utils.data.Dataset):
    """
    The rows of `rows` in lanes, for a data loader whose sampler hands out the rows themselves: its workers decode.

    Args:
        rows: undecoded and in the order of their files.
        decode: makes an item of tensors from a row.
        seed: of all shuffling.
        buffer_size: rows in the blocks of all lanes together; they also end at half a GiB of encoded images.
    """

    def __init__(self, rows: "datasets.IterableDataset", decode: "RowDecoder", seed: int, buffer_size: int):
        self.rows, self.decode, self.seed, self.buffer_size = rows, decode, seed, buffer_size
        self.num_shards = min(rows.num_shards, MOST_SHARDS)

    def __getitem__(self, row: NamedRow) -> dict[str, torch.Tensor]:
        return self.decode(row.row, row.name)

    def num_lanes(self, batch_size: int) -> int:
        """The largest power of two, up to 32, that divides a batch and leaves each lane 16 shards or more."""
        lanes = 1
        while lanes < MOST_LANES and batch_size % (2 * lanes) == 0 and self.num_shards >= 2 * lanes * SHARDS_A_LANE:
            lanes *= 2
        return lanes

    def lane(self, epoch: int, number: int, num_lanes: int, place: Place = START) -> Iterator[tuple[NamedRow, Place]]:
        """The rows of lane `number` of an epoch from `place` on, each with the place after it."""
        shards = self._permutation(self.num_shards, epoch)[number::num_lanes]
        rows = self._in_order(shards, place)
        while True:
            block, end = self._block(rows, num_lanes, place)
            if not block:
                return
            order = self._permutation(len(block), epoch, number, place.block)
            for taken in range(place.taken, len(block)):
                row, block[order[taken]] = block[order[taken]], None  # which frees its memory once it is decoded
                yield row, replace(place, taken=taken + 1)
            place = end

    def _in_order(self, shards: list[int], place: Place) -> Iterator[tuple[NamedRow, int, int]]:
        """Rows as they lie in the shards, each with the numbers of its shard and of the row after it."""
        for index in range(place.shard, len(shards)):
            start = place.row if index == place.shard else 0
            shard = self.rows.shard(self.num_shards, shards[index], contiguous=False).skip(start)
            for number, row in enumerate(shard, start):
                yield NamedRow(row, f"{number} of shard {shards[index]}"), index, number + 1

    def _block(
        self, rows: Iterator[tuple[NamedRow, int, int]], num_lanes: int, place: Place
    ) -> tuple[list[NamedRow | None], Place]:
        """The block at `place`, and the place of the next one."""
        block, size = [], 0
        for row, shard, following in islice(rows, max(self.buffer_size // num_lanes, 1)):
            block.append(row)
            place = replace(place, shard=shard, row=following)
            size += self.decode.size(row.row)
            if size >= MOST_BYTES // num_lanes:
                break
        return block, replace(place, block=place.block + 1, taken=0)

    def _permutation(self, size: int, *place: int) -> list[int]:
        seed = int(np.random.SeedSequence([self.seed, *place]).generate_state(1, np.uint64)[0])
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
