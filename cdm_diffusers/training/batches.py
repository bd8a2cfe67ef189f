"""Which images and which noise each process takes: an equal part of a step's batch for each micro-batch."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..data.streams import START, NamedRow, Place, RowStream
from ..draws import PartGenerator
from ..processes import largest


# What a run draws its noise for in one go. Runs of earlier versions drew it for each part separately, and treated each
# micro-batch as a batch of its own, with which an epoch could end.
BATCH, MICRO_BATCH = "batch", "micro_batch"


@dataclass(frozen=True)
class Split:
    """
    A step's batch in equal parts: part p of micro-batch m and process n is m * num_processes + n.

    Args:
        part_size: images of one part.
        num_processes, process_index: of all processes, this one.
        num_micro_batches: parts of each process.
        by_process: whether parts are numbered n * num_micro_batches + m, as for streams in lanes.
    """

    part_size: int
    num_processes: int
    process_index: int
    num_micro_batches: int
    by_process: bool = False

    @property
    def num_parts(self) -> int:
        """Parts of a batch."""
        return self.num_processes * self.num_micro_batches

    @property
    def batch_size(self) -> int:
        """Images of a batch."""
        return self.num_parts * self.part_size

    def part(self, micro_batch: int) -> int:
        """Which part of the batch this process has in its `micro_batch`-th micro-batch."""
        if self.by_process:
            return self.process_index * self.num_micro_batches + micro_batch
        return micro_batch * self.num_processes + self.process_index


class Noise:
    """
    The randomness of each part, a function of its position. What is drawn for each image with `generator` is the
    same however a batch is split. Dropout masks, which layers draw from the global state for their own inputs, are
    those of a part: the same for 2 processes and for 2 micro-batches, but not for the undivided batch.
    """

    def __init__(self, seed: int, split: Split, drawn_for: str, device: torch.device):
        self.seed, self.split, self.drawn_for = seed, split, drawn_for
        self.generator = PartGenerator(device)

    def start(self, step: int, micro_batch: int) -> None:
        """Seeds `generator` and the global state for this process's part."""
        part = self.split.part(micro_batch)
        if self.drawn_for == BATCH:
            self.generator.part, self.generator.num_parts = part, self.split.num_parts
            places = [step, 0, 0], [step, part, 0]
        else:
            places = [[step, micro_batch, self.split.process_index]] * 2
        (for_images, _), (_, for_dropout) = (
            np.random.SeedSequence([self.seed, *place]).generate_state(2, np.uint64).tolist() for place in places
        )
        self.generator.manual_seed(for_images)
        torch.manual_seed(for_dropout)


class PartSampler(Sampler[list[int]]):
    """
    Indices of this process's parts, batch by batch. Each epoch is a new order of all images, batches are consecutive
    pieces of it, and a remainder that does not fill one is dropped.
    """

    def __init__(self, num_images: int, split: Split, seed: int):
        self.num_images, self.split, self.seed = num_images, split, seed
        self.epoch = self.first_batch = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_images, generator=generator).tolist()
        split = self.split
        for batch in range(self.first_batch, self.num_images // split.batch_size):
            for micro_batch in range(split.num_micro_batches):
                start = batch * split.batch_size + split.part(micro_batch) * split.part_size
                yield order[start : start + split.part_size]


class ImageBatches:
    """This process's parts of the batches of a data set with a length, on the device that trains."""

    def __init__(self, dataset: Dataset, split: Split, seed: int, device: torch.device, **options):
        if len(dataset) < split.batch_size:
            raise ValueError(
                f"`train_batch_size` is {split.part_size} in each of {split.num_processes} processes x "
                f"{split.num_micro_batches} micro-batches, but the data has only {len(dataset)} images: "
                "give a smaller one."
            )
        self.sampler, self.device = PartSampler(len(dataset), split, seed), device
        self.loader = DataLoader(dataset, batch_sampler=self.sampler, **options)

    def epoch(self, number: int, first_batch: int) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches of an epoch from its `first_batch`-th batch on."""
        self.sampler.epoch, self.sampler.first_batch = number, first_batch
        for batch in self.loader:
            yield send_to_device(batch, self.device, non_blocking=True)


class LaneSampler(Sampler[list[NamedRow]]):
    """
    Undecoded rows of this process's parts. Lane l has the l-th equal share of each batch, so that a process reads only
    the lanes with shares in its parts. An epoch ends where one of them has no rows for another batch.
    """

    def __init__(self, stream: RowStream, split: Split, num_lanes: int):
        self.stream, self.split, self.num_lanes = stream, split, num_lanes
        self.share = split.batch_size // num_lanes
        self.parts = [split.part(micro_batch) for micro_batch in range(split.num_micro_batches)]
        first, last = self.parts[0] * split.part_size, (self.parts[-1] + 1) * split.part_size
        self.rows = range(first, last)  # of a batch, that are this process's
        self.lanes = range(first // self.share, -(-last // self.share))
        self.start(0, {})

    def start(self, epoch: int, places: dict[int, Place]) -> None:
        """Where to begin: the epoch, and the places of lanes that are not at its beginning."""
        self.epoch, self.places = epoch, places
        self.after: deque[dict[int, Place]] = deque()  # the places after each batch that was handed out

    def __iter__(self) -> Iterator[list[NamedRow]]:
        starts = {number: self.places.get(number, START) for number in self.lanes}
        lanes = {n: self.stream.lane(self.epoch, n, self.num_lanes, place) for n, place in starts.items()}
        while True:
            batch, places = [], {}
            for number, lane in lanes.items():
                taken = list(islice(lane, self.share))
                if len(taken) < self.share:
                    return
                batch += [row for row, _ in taken]
                places[number] = taken[-1][1]
            self.after.append(places)
            start, size = self.rows.start - self.lanes.start * self.share, self.split.part_size
            for place in range(start, start + len(self.rows), size):
                yield batch[place : place + size]


class LaneBatches:
    """
    This process's parts of the batches of a stream in lanes, on the device that trains.

    Args:
        together: the processes' group on the host, by which they find out whether all have another batch.
    """

    def __init__(
        self,
        stream: RowStream,
        split: Split,
        num_lanes: int,
        device: torch.device,
        together: "torch.distributed.ProcessGroup | None",
        **options,
    ):
        self.sampler, self.device, self.together = LaneSampler(stream, split, num_lanes), device, together
        self.loader = DataLoader(stream, batch_sampler=self.sampler, **options)
        self.places: dict[int, Place] = {}

    def epoch(self, number: int, first_batch: int) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches of an epoch from its `first_batch`-th batch on, where `places` are, if it is not the first."""
        self.sampler.start(number, self.places if first_batch else {})
        loader = iter(self.loader)
        while True:
            first = next(loader, None)
            if largest(first is None, self.together):
                return
            self.places = self.sampler.after.popleft()
            for micro_batch in chain([first], islice(loader, self.sampler.split.num_micro_batches - 1)):
                yield send_to_device(micro_batch, self.device, non_blocking=True)


class StreamBatches:
    """
    Parts of a stream as runs of 0.1.0 took them: one process reads it, in the order of `datasets`, and hands them out.
    A batch's micro-batches are held until it is complete: where a stream ends is not known beforehand.
    """

    def __init__(self, dataset: IterableDataset, split: Split, accelerator: Accelerator, **options):
        self.num_micro_batches = split.num_micro_batches
        self.loader = accelerator.prepare(DataLoader(dataset, split.part_size, drop_last=True, **options))

    def epoch(self, number: int, first_batch: int) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches of an epoch from its `first_batch`-th batch on."""
        self.loader.set_epoch(number)
        skipped = first_batch * self.num_micro_batches
        loader = iter(skip_first_batches(self.loader, skipped) if skipped else self.loader)
        for micro_batches in zip(*[loader] * self.num_micro_batches, strict=False):
            yield from micro_batches
