"""Which images, and how they are brought to one size: in Python, and as options of commands."""

import dataclasses
import os
from dataclasses import dataclass

from PIL import ImageColor

from ..training.config import option


@dataclass(kw_only=True)
class DataConfig:
    """
    Which images to train on, and how they are brought to one square size.

    Args:
        source_resolution: side, in pixels, to which every image is cropped and resized (BigGAN's way).
        class_conditional: whether items carry labels.
        dataset_name: Hub id (or local repository) of a data set. Give this or `train_data_dir`.
        dataset_config_name: configuration of the Hub data set.
        train_data_dir: local folder of IDX files, of parquet files, or with one sub-folder of images a class. A
            folder whose sub-folders are all named like splits (train, test, val, ...) is entered at `dataset_split`.
        dataset_split: split to train on.
        image_column, label_column: their names; found by type and by usual names if None.
        label_names: class names in the order of their ids: a file with a name a line, or a comma-separated list.
        streaming: read while training, nothing prepared beforehand. Pays for Hub data sets larger than the disk: a
            local folder is read from its files either way, and a stream is shuffled only within its buffer.
        shuffle_buffer_size: how many examples a stream is shuffled within.
        padding: black pixels added on each side before cropping (Fashion-MNIST, 28 to 32 pixels: 2).
        background: colour (name or hex) behind transparent pixels.
        num_channels: 3, or 1 for grey images.
        num_classes: number of classes; needed only to stream integer labels that come without names.
        seed: of the shuffling of a stream.
    """

    source_resolution: int
    class_conditional: bool = True
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    dataset_split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    label_names: str | None = None
    streaming: bool = False
    shuffle_buffer_size: int = 10_000
    padding: int = 0
    background: str | None = None
    num_channels: int = 3
    num_classes: int | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"give one of --dataset_name and --train_data_dir, not dataset_name={self.dataset_name!r} and "
                f"train_data_dir={self.train_data_dir!r}"
            )
        if self.train_data_dir is not None and not os.path.isdir(self.train_data_dir):
            raise ValueError(f"train_data_dir={self.train_data_dir!r} is not a folder; give the path of one")
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels={self.num_channels} must be 3 (colour) or 1 (grey)")
        for name, least in (("source_resolution", 1), ("padding", 0), ("shuffle_buffer_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.background is not None:
            parse_color(self.background)


def parse_color(color: str) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of a colour name or hex string; ValueError if it is neither."""
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise ValueError(f"background={color!r} is not a colour; use a name (white) or hex (#ffffff)") from error


@dataclass(kw_only=True)
class DataOptions:
    """Command line options that name a data set of images."""

    dataset_name: str | None = option("A data set of the Hub, e.g. zalando-datasets/fashion_mnist.")
    dataset_config_name: str | None = option("Configuration of the Hub data set.")
    train_data_dir: str | None = option(
        "Folder of images (one sub-folder a class), of parquet files, or of MNIST-style IDX files."
    )
    image_column: str | None = option("Column with the images. Default: found by its type.")
    label_column: str | None = option("Column with the class labels. Default: found by its type.")
    label_names: str | None = option(
        "Names of the classes 0, 1, ...: a file with one a line, or a comma-separated list."
    )
    background: str | None = option("Colour behind transparent images. Without it, such images are an error.")

    def split_config(self, split: str, **further) -> DataConfig:
        """[`DataConfig`] of one split; `further` are its arguments that no option here gives."""
        names = [f.name for f in dataclasses.fields(DataOptions)]
        return DataConfig(dataset_split=split, **{name: getattr(self, name) for name in names}, **further)


@dataclass(kw_only=True)
class LabelledDataOptions(DataOptions):
    """Command line options of scripts that train on one split of labelled images and measure on another."""

    dataset_split: str = option("Split for training.", "train")
    eval_split: str = option("Split of the same data that no training sees.", "test")

    def data_config(self, source_resolution: int, num_channels: int, padding: int) -> DataConfig:
        """The training split's; the other's has `dataset_split=eval_split`."""
        return self.split_config(
            self.dataset_split, source_resolution=source_resolution, num_channels=num_channels, padding=padding
        )
