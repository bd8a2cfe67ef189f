"""Splits of a data set of real images, at the size at which a stage of a cascade sees them."""

import dataclasses

from .averages import AreaAverages
from .config import DataConfig
from .labels import check_same_classes
from .memory import ImageData
from .sources import open_images


def open_split(config: DataConfig, size: int | None = None, id2label: dict[int, str] | None = None) -> ImageData:
    """
    The images of `config.dataset_split`.

    Args:
        config: which images, and how they are brought to their source resolution.
        size: of a stage's images, to which these are averaged down. Default: they stay at the source resolution.
        id2label: the classes that labelled images must have.

    Raises:
        ValueError: `size` does not divide the source resolution, the classes are others, or as [`open_images`].
    """
    if size is not None and config.source_resolution % size:
        raise ValueError(
            f"`source_resolution` is {config.source_resolution}; it must be a multiple of {size}, the size to which "
            "images are averaged down: give another, or leave it out."
        )
    data = open_images(config)
    if None not in (id2label, data.id2label):
        check_same_classes(f"the split {config.dataset_split!r}", data.id2label, id2label)
    if size in (None, config.source_resolution):
        return data
    return dataclasses.replace(data, dataset=AreaAverages(data.dataset, size), rows=None)


def open_splits(
    config: DataConfig, eval_split: str, size: int | None = None, id2label: dict[int, str] | None = None
) -> tuple[ImageData, ImageData]:
    """Two splits of the same classes, that of `config` and `eval_split`, each as [`open_split`] has it."""
    train = open_split(config, size, id2label)
    return train, open_split(dataclasses.replace(config, dataset_split=eval_split), size, train.id2label)
