"""Images as data sets, and those that are held in memory."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .streams import RowStream
from .transforms import area_resize, to_float


if TYPE_CHECKING:
    import datasets

    from .sources import DecodedRows


@dataclass
class ImageData:
    """
    Args:
        dataset: a `torch.utils.data.Dataset` with length, `labels` (int64 (N,), or None) and `fingerprint()`, a hash
            of the images and of how they are prepared; or a `datasets.IterableDataset` (call `set_epoch` on it).
        id2label: name of every class id, None for unconditional training.
        left_out: paths of files in the folder that are not read, by reason.
        root: the folder of local files.
        files: which of them the images come from, from `root`.
        stream: of a stream, its rows in an order of our own, see `streams.py`.
        rows: the data set once more, if its files are decoded on demand, and may yet prove unfit.
        identity: what tells these images from others; see `fingerprints.py`.
    """

    dataset: "torch.utils.data.Dataset | datasets.IterableDataset"
    id2label: dict[int, str] | None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    root: Path | None = None
    files: list[Path] = field(default_factory=list)
    identity: dict[str, Any] | None = None
    stream: RowStream | None = None
    rows: "DecodedRows | None" = None

    @property
    def is_stream(self) -> bool:
        """Whether the number of images is not known beforehand."""
        return self.stream is not None


class InMemoryImages(torch.utils.data.Dataset):
    """
    Images (N, C, R, R), uint8 or float32 in [-1, 1], and labels (N,) int64 or None, held as tensors on any device.

    A batch is fetched by one indexing operation and handed out as a list of views, which every collate function takes.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor | None):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        images = self.images[indices].unbind()
        if self.labels is None:
            return [{"image": image} for image in images]
        labels = self.labels[indices].unbind()
        return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]

    def fingerprint(self) -> str:
        """A hash of shape and pixels."""
        pixels = hashlib.sha256(self.images.contiguous().numpy()).hexdigest()
        return hash_of([list(self.images.shape), pixels])


class ImageSubset(torch.utils.data.Subset):
    """Some images of a data set, by their indices."""

    @property
    def labels(self) -> torch.Tensor | None:
        """Of these images, int64 (M,), or None."""
        labels = self.dataset.labels
        return None if labels is None else labels[torch.as_tensor(self.indices)]

    def fingerprint(self) -> str:
        """A hash of the whole data set, and of the indices."""
        return hash_of([self.dataset.fingerprint(), list(self.indices)])


def hash_of(parts: list) -> str:
    """SHA-256 of JSON content."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def held_in_memory(
    data: ImageData, size: int, device: torch.device | str, num_workers: int = 0, batch_size: int = 256
) -> ImageData:
    """
    `data` decoded once and held on `device`: as uint8 where `size` is the source resolution, else as float32 averages
    of `size` x `size`, which are all that a stage of that size takes. Training on them is the same up to rounding.

    Raises:
        ValueError: for a stream, which has no end to wait for.
    """
    if data.is_stream:
        raise ValueError("`hold_in_memory` is given with `streaming`: leave one of them out.")
    channels, source_resolution, _ = data.dataset[0]["image"].shape
    dtype = torch.uint8 if size == source_resolution else torch.float32
    images = torch.empty(len(data.dataset), channels, size, size, dtype=dtype, device=device)
    labels, start = [], 0
    loader = torch.utils.data.DataLoader(data.dataset, batch_size, num_workers=num_workers)
    for batch in tqdm(loader, desc="decoding", unit="batch"):
        decoded = batch["image"].to(device)
        end = start + len(decoded)
        images[start:end] = decoded if size == source_resolution else area_resize(to_float(decoded), size)
        labels.append(batch.get("label"))
        start = end
    labels = None if labels[0] is None else torch.cat(labels).to(device)
    return replace(data, dataset=InMemoryImages(images, labels), rows=None)
