"""Area averages: what a stage of some size is trained on of a data set at its source resolution."""

import hashlib
from collections.abc import Mapping

import torch
from torch.utils.data import Dataset

from .transforms import area_resize, to_float, to_uint8


def averaged_to(datasets: Mapping[str, Dataset], size: int) -> dict[str, Dataset]:
    """Data sets by name, each as it is where its images are of this size, else as [`AreaAverages`]."""
    return {
        name: dataset if dataset[0]["image"].shape[-1] == size else AreaAverages(dataset, size)
        for name, dataset in datasets.items()
    }


class AreaAverages(Dataset):
    """Images of a data set as a stage of this size is trained on them, rounded to uint8 as samples are."""

    def __init__(self, dataset: Dataset, size: int):
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.dataset[index]
        return {**item, "image": to_uint8(area_resize(to_float(item["image"][None]), self.size))[0]}

    @property
    def labels(self) -> torch.Tensor | None:
        """int64 (N,), or None."""
        return self.dataset.labels

    def fingerprint(self) -> str:
        """A hash of the images that are averaged, and of the size."""
        return hashlib.sha256(f"{self.dataset.fingerprint()} {self.size}".encode()).hexdigest()
