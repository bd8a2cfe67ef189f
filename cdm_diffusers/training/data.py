"""
Training images from a Hub data set, a folder of images, parquet files or IDX files, map-style or streamed.

Every source ends in items `{"image": uint8 tensor (C, R, R), "label": int64 scalar tensor}` with R the source
resolution (no "label" for unconditional training). Images stay uint8 until they are on the training device, where
`to_float`, `random_flip` and `area_resize` make of a batch what a stage needs.
"""

import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from tqdm.auto import tqdm

from .transforms import (
    area_resize,
    grey_images_to_tensor,
    image_to_tensor,
    parse_color,
    random_crop,
    random_flip,
    to_float,
    to_uint8,
)


__all__ = [
    "DataConfig",
    "TrainingData",
    "area_resize",
    "held_in_memory",
    "image_to_tensor",
    "load_training_data",
    "random_crop",
    "random_flip",
    "to_float",
    "to_uint8",
]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SPLIT_FOLDERS = ("train", "test", "val", "valid", "validation")
IDX_PREFIXES = {"train": "train", "test": "t10k"}

Rows = datasets.Dataset | datasets.IterableDataset


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


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put the file or row before the message of a ValueError about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


@dataclass
class TrainingData:
    """
    Args:
        dataset: a `torch.utils.data.Dataset` with length, or a `datasets.IterableDataset` (call `set_epoch` on it).
        id2label: name of every class id, None for unconditional training.
    """

    dataset: torch.utils.data.Dataset | datasets.IterableDataset
    id2label: dict[int, str] | None


def load_training_data(config: DataConfig) -> TrainingData:
    """
    Open the images that `config` names, whichever kind of source holds them.

    Raises:
        ValueError: a column, split or class name that is not there, a label that is missing or out of range. Bad
            pictures raise it when they are read, naming file or row.
    """
    load_options = {"split": config.dataset_split, "streaming": config.streaming}
    if config.dataset_name is not None:
        try:
            rows = load_dataset(config.dataset_name, config.dataset_config_name, **load_options)
        except (DatasetNotFoundError, RepositoryNotFoundError) as error:
            raise ValueError(
                f"dataset_name={config.dataset_name!r} is neither on the Hub nor a local folder; check its spelling, "
                "log in if it is private or gated (`hf auth login`), or give --train_data_dir a folder"
            ) from error
        return _from_rows(rows, config)
    folder = Path(config.train_data_dir)
    if any(folder.glob("*images-idx3-ubyte*")):
        return _from_idx(folder, config)
    if any(folder.rglob("*.parquet")):
        return _from_rows(load_dataset(str(folder), **load_options), config)
    # Explicit files: left to itself, `datasets` takes a class named test_tube for the test split.
    files = {config.dataset_split: [f"{glob.escape(str(_image_folder(folder, config)))}/**"]}
    return _from_rows(load_dataset("imagefolder", data_files=files, **load_options), config)


def _image_folder(folder: Path, config: DataConfig) -> Path:
    """The folder whose sub-folders are the classes: `folder`, or its sub-folder for the split."""
    names = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if names and all(name in SPLIT_FOLDERS for name in names):
        root = folder / config.dataset_split
    elif config.dataset_split == "train":
        root = folder
    else:
        root = None
    if root is None or not root.is_dir():
        raise ValueError(
            f"dataset_split={config.dataset_split!r} is not in {str(folder)!r}, whose sub-folders are {names}; "
            "give --dataset_split the name of one, or leave it out for a folder with one sub-folder a class"
        )
    extensions = Image.registered_extensions()
    if not any(path.suffix.lower() in extensions for path in root.rglob("*")):
        raise ValueError(
            f"{str(root)!r} holds no images, parquet files or IDX files; give --train_data_dir a folder with one "
            "sub-folder of images a class"
        )
    return root


# ------------------------------------------------------------------------------------------------------------------
# Labels
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class LabelEncoding:
    """Class names in the order of their ids; `encode` checks one label and turns it into its id."""

    names: list[str]
    from_strings: bool

    def __post_init__(self):
        self._ids = {name: index for index, name in enumerate(self.names)}
        if len(self._ids) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"label_names has {twice} more than once; class names must differ")

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    def encode(self, label: int | str | None) -> int:
        if label is None:
            raise ValueError("has no label; label it, remove it, or train without classes")
        if self.from_strings:
            if label not in self._ids:
                raise ValueError(f"has label {label!r}, not one of the classes {self.names}; fix it or --label_names")
            return self._ids[label]
        if not 0 <= label < len(self.names):
            raise ValueError(
                f"has label {label}, outside 0..{len(self.names) - 1}; fix or remove it, or give more classes by "
                "--num_classes or --label_names"
            )
        return int(label)


def _read_label_names(label_names: str) -> list[str]:
    if os.path.isfile(label_names):
        lines = Path(label_names).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    if "," not in label_names:
        raise ValueError(f"label_names={label_names!r} is neither a file nor a comma-separated list of names")
    return [name.strip() for name in label_names.split(",")]


def _check_num_classes(names: list[str], config: DataConfig) -> list[str]:
    if config.num_classes is not None and config.num_classes != len(names):
        raise ValueError(
            f"num_classes={config.num_classes}, but the data has {len(names)} class names ({', '.join(names[:10])}"
            f"{', ...' if len(names) > 10 else ''}); leave --num_classes out or make them agree"
        )
    return names


def _label_encoding(rows: Rows, column: str, config: DataConfig) -> LabelEncoding:
    """Class names from `label_names`, the data set's own ClassLabel, or (map-style) the labels that occur."""
    feature = rows.features[column]
    dtype = getattr(feature, "dtype", None)
    if not isinstance(dtype, str) or not (dtype.startswith(("int", "uint")) or dtype in ("string", "large_string")):
        raise ValueError(f"label_column={column!r} is of type {feature}; labels are integers or strings")
    from_strings = dtype.endswith("string")
    if config.label_names is not None:
        names = _read_label_names(config.label_names)
    elif isinstance(feature, ClassLabel):
        names = feature.names
    elif isinstance(rows, datasets.IterableDataset):
        if from_strings or config.num_classes is None:
            option = "--label_names" if from_strings else "--num_classes or --label_names"
            raise ValueError(f"label_column={column!r} is streamed without class names; give {option}")
        names = [str(index) for index in range(config.num_classes)]
    elif from_strings:
        names = sorted(label for label in rows.unique(column) if label is not None)
    else:
        largest = max((label for label in rows.unique(column) if label is not None), default=-1)
        names = [str(index) for index in range(config.num_classes or largest + 1)]
    return LabelEncoding(_check_num_classes(names, config), from_strings)


def _check_labels(rows: datasets.Dataset, column: str, labels: LabelEncoding) -> None:
    """Encode every label that occurs once, before training, and name the first row of one that is wrong."""
    for label in rows.unique(column):
        try:
            labels.encode(label)
        except ValueError as error:
            raise ValueError(f"row {list(rows[column]).index(label)} {error}") from error


# ------------------------------------------------------------------------------------------------------------------
# Rows of `datasets`: Hub data sets, image folders, parquet files
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class RowDecoder:
    """
    Turns a row of an undecoded data set into an item of tensors; `labels` is None for unconditional training.

    Errors name the row: its place in the data set, or in the stream as shuffled, and its file where that is known.
    """

    config: DataConfig
    image_column: str
    label_column: str | None
    labels: LabelEncoding | None

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        file = row[self.image_column]
        if file is None:
            raise ValueError(f"row {index} has no image in column {self.image_column!r}; remove it")
        where = f"{file['path']!r} (row {index})" if file["path"] else f"row {index}"
        try:
            image = datasets.Image().decode_example(file)
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and others
            raise ValueError(f"{where} cannot be read as an image ({error}); remove it or convert it") from error
        with _naming(where):
            size, channels = self.config.source_resolution, self.config.num_channels
            item = {"image": image_to_tensor(image, size, channels, self.config.padding, self.config.background)}
            if self.labels is not None:
                item["label"] = torch.tensor(self.labels.encode(row[self.label_column]))
        return item


class DecodedRows(torch.utils.data.Dataset):
    """A map-style data set whose rows are decoded when they are asked for."""

    def __init__(self, rows: datasets.Dataset, decode: RowDecoder):
        self.rows, self.decode = rows, decode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.decode(self.rows[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [self.decode(row, index) for row, index in zip(self.rows.__getitems__(indices), indices, strict=True)]


def _from_rows(rows: Rows, config: DataConfig) -> TrainingData:
    if rows.features is None:
        raise ValueError(
            f"dataset_name={config.dataset_name!r} does not declare its columns, so it cannot be streamed; "
            "leave out --streaming"
        )
    image_column = _find_image_column(rows.features, config)
    label_column = labels = None
    if config.class_conditional:
        label_column = _find_label_column(rows.features, config)
        labels = _label_encoding(rows, label_column, config)
    rows = rows.select_columns([image_column] if labels is None else [image_column, label_column])
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    decode = RowDecoder(config, image_column, label_column, labels)
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer_size)
        dataset = rows.map(decode, with_indices=True, remove_columns=rows.column_names)
    else:
        if labels is not None:
            _check_labels(rows, label_column, labels)
        dataset = DecodedRows(rows, decode)
    return TrainingData(dataset, None if labels is None else labels.id2label)


def _find_image_column(features: datasets.Features, config: DataConfig) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found += [name for name in IMAGE_COLUMNS if name in features]
    return _column(config.image_column, found, features, "image_column")


def _find_label_column(features: datasets.Features, config: DataConfig) -> str:
    found = [name for name in LABEL_COLUMNS if name in features]
    class_labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(class_labels) == 1:
        found += class_labels
    return _column(config.label_column, found, features, "label_column")


def _column(asked: str | None, found: list[str], features: datasets.Features, option: str) -> str:
    if asked is None and found:
        return found[0]
    if asked not in features:
        missing = f"no {option} was found in" if asked is None else f"{option}={asked!r} is not a column of"
        raise ValueError(f"{missing} the data set, whose columns are {list(features)}; give --{option} one of them")
    return asked


# ------------------------------------------------------------------------------------------------------------------
# IDX files (the format of MNIST and Fashion-MNIST)
# ------------------------------------------------------------------------------------------------------------------


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


def held_in_memory(
    data: TrainingData, size: int, device: torch.device | str, num_workers: int = 0, batch_size: int = 256
) -> TrainingData:
    """
    `data` decoded once and held on `device`: as uint8 where `size` is the source resolution, else as float32 averages
    of `size` x `size`, which are all that a stage of that size takes. Training on them is the same up to rounding.

    Raises:
        ValueError: for a stream, which has no end to wait for.
    """
    if isinstance(data.dataset, torch.utils.data.IterableDataset):
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
    return TrainingData(InMemoryImages(images, labels), data.id2label)


def _from_idx(folder: Path, config: DataConfig) -> TrainingData:
    if config.streaming:
        raise ValueError(f"the IDX files in {str(folder)!r} are held in memory, not streamed; leave out --streaming")
    file = _find_idx(folder, "images-idx3-ubyte", config)
    with _naming(f"every image of {file}"):
        images = grey_images_to_tensor(
            _read_idx(file, 3), config.source_resolution, config.num_channels, config.padding
        )
    if not config.class_conditional:
        return TrainingData(InMemoryImages(images, None), None)
    file = _find_idx(folder, "labels-idx1-ubyte", config)
    values = _read_idx(file, 1)
    if len(values) != len(images):
        raise ValueError(f"{file} has {len(values)} labels for {len(images)} images; fetch the pair again")
    labels = LabelEncoding(_idx_names(folder, values, config), from_strings=False)
    for row in np.unique(values, return_index=True)[1]:
        with _naming(f"row {row} of {file}"):
            labels.encode(values[row])
    return TrainingData(InMemoryImages(images, torch.from_numpy(values.astype(np.int64))), labels.id2label)


def _idx_names(folder: Path, labels: np.ndarray, config: DataConfig) -> list[str]:
    """IDX files carry no names: from `label_names`, a `classes.txt` beside them, or the numbers themselves."""
    if config.label_names is not None:
        return _check_num_classes(_read_label_names(config.label_names), config)
    if (folder / "classes.txt").is_file():
        return _check_num_classes(_read_label_names(str(folder / "classes.txt")), config)
    return [str(index) for index in range(config.num_classes or int(labels.max()) + 1)]


def _find_idx(folder: Path, kind: str, config: DataConfig) -> Path:
    prefix = IDX_PREFIXES.get(config.dataset_split, config.dataset_split)
    found = sorted(folder.glob(f"*{prefix}-{kind}")) or sorted(folder.glob(f"*{prefix}-{kind}.gz"))
    if len(found) != 1:
        names = sorted(path.name for path in folder.glob("*-ubyte*"))
        raise ValueError(
            f"train_data_dir={str(folder)!r} must hold one file *{prefix}-{kind}[.gz] for "
            f"dataset_split={config.dataset_split!r}; it holds {names}"
        )
    return found[0]


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Decode an IDX file, gzipped or not: two zeros, 8 for uint8, the number of axes, their sizes, the bytes."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be decompressed ({error}); fetch it again") from error
    header = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:header], ">u4")) if len(content) >= header else ()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{file} is not a complete IDX file of {dimensions} axes of bytes; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
