"""Which images and which noise each process takes: an equal part of a step's batch for each micro-batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..draws import PartGenerator


# What a run draws its noise for at once. Runs of earlier versions drew it for each part by itself, and took each
# micro-batch for a batch of its own, that an epoch could end with.
BATCH, MICRO_BATCH = "batch", "micro_batch"


@dataclass(frozen=True)
class Split:
    """
    A step's batch in equal parts: part p of micro-batch m and process n is m * num_processes + n.

    Args:
        part_size: images of one part.
        num_processes, process_index: of all processes, this one.
        num_micro_batches: parts of each process.
    """

    part_size: int
    num_processes: int
    process_index: int
    num_micro_batches: int

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
        return micro_batch * self.num_processes + self.process_index


class Noise:
    """
    The randomness of each part, a function of where it stands. What is drawn for each image with `generator` is the
    same however a batch is split. The masks of dropout, which layers draw from the global state for what they are
    given, are those of a part: the same for 2 processes and for 2 micro-batches, but not for the undivided batch.
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
    Indices of this process's parts, batch for batch. Each epoch is a new order of all images, batches are consecutive
    pieces of it, and the rest that does not fill one is left out.
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


class StreamBatches:
    """
    The same of a stream, in the order in which it comes: with several processes, one reads it and hands out the parts.
    A batch's micro-batches are held until it is whole, since nobody knows before where a stream ends.
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
