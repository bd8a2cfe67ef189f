"""
Training images from a Hub data set, a folder of images, parquet files, WebDataset's tar files or IDX files, map-style
or streamed.

Every source yields items `{"image": uint8 tensor (C, R, R), "label": int64 scalar tensor}` with R the source
resolution (no "label" for unconditional training). Images stay uint8 until they are on the training device, where
`to_float`, `random_flip` and `area_resize` make of a batch what a stage needs.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import ClassLabel, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import dataset_info
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from PIL import Image

from ..hub import ASKING_TIME, hub_errors
from .config import DataConfig
from .folders import files_of_split, holds_images, imagefolder_options, read_image_folder
from .idx import open_idx
from .labels import LabelEncoding, check_num_classes, naming, read_label_names
from .memory import ImageData, hash_of
from .streams import RowStream
from .transforms import ImageHeader, UnfitImage, image_to_tensor


IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")  # the last is WebDataset's

Rows = datasets.Dataset | datasets.IterableDataset


def open_images(config: DataConfig) -> ImageData:
    """
    Open the images that `config` names, whichever kind of source holds them.

    Raises:
        ValueError: a column, split or class name that is not there, or a label that is missing or out of range. Bad
            pictures raise it when they are read, naming file or row.
    """
    load_options = {"split": config.dataset_split, "streaming": config.streaming}
    if config.dataset_name is not None:
        _check_reached(config.dataset_name)
        try:
            rows = load_dataset(
                config.dataset_name, config.dataset_config_name, revision=config.dataset_revision, **load_options
            )
        except (DatasetNotFoundError, RepositoryNotFoundError) as error:
            at = "" if config.dataset_revision is None else f" at `dataset_revision` {config.dataset_revision!r}"
            raise ValueError(
                f"`dataset_name` is {config.dataset_name!r}{at}, neither on the Hub nor a local folder: check its "
                "spelling, log in if it is private or gated (`hf auth login`), or give --train_data_dir a folder."
            ) from error
        return _from_rows(rows, config)
    folder = Path(config.train_data_dir)
    if any(folder.glob("*images-idx3-ubyte*")):
        return open_idx(folder, config)
    if any(folder.rglob("*.tar")) and not holds_images(folder):
        archives = files_of_split(folder, "*.tar", config.dataset_split)
        data_files = {config.dataset_split: [str(folder / path) for path in archives]}
        with _without_bars():
            rows = load_dataset("webdataset", data_files=data_files, **load_options)
        return replace(_from_rows(rows, config), root=folder, files=archives)
    tables = [path.relative_to(folder) for path in folder.rglob("*.parquet")]
    if tables:
        data = _from_rows(load_dataset(str(folder), **load_options), config)
        return replace(data, root=folder, files=tables)
    contents = read_image_folder(folder, config)
    # Explicit files: left to itself, `datasets` takes a class named test_tube for the test split.
    with _without_bars():  # such as "Downloading data"
        rows = load_dataset("imagefolder", **imagefolder_options(contents, config), **load_options)
    data = _from_rows(rows, config)
    files = contents.images + contents.metadata
    return replace(data, left_out=contents.left_out, root=contents.root, files=files)


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _check_reached(name: str) -> None:
    """
    Asks the Hub once for a data set that is neither a folder nor in the cache; what it answers is left to `datasets`,
    which would ask six times in half a minute.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___"))
    if not (Path(name).is_dir() or cache.is_dir()):
        with hub_errors(name), suppress(HfHubHTTPError):
            dataset_info(name, timeout=ASKING_TIME)


# ------------------------------------------------------------------------------------------------------------------
# Labels
# ------------------------------------------------------------------------------------------------------------------


def _label_encoding(rows: Rows, column: str, config: DataConfig) -> LabelEncoding:
    """Class names from `label_names`, the data set's own ClassLabel, or (map-style) the labels that occur."""
    feature = rows.features[column]
    dtype = getattr(feature, "dtype", None)
    if not isinstance(dtype, str) or not (dtype.startswith(("int", "uint")) or dtype in ("string", "large_string")):
        raise ValueError(f"`label_column` is {column!r}, of type {feature}; labels must be integers or strings.")
    from_strings = dtype.endswith("string")
    if config.label_names is not None:
        names = read_label_names(config.label_names)
    elif isinstance(feature, ClassLabel):
        names = feature.names
    elif isinstance(rows, datasets.IterableDataset):
        if from_strings or config.num_classes is None:
            option = "--label_names" if from_strings else "--num_classes or --label_names"
            raise ValueError(f"`label_column` is {column!r}, streamed without class names: give {option}.")
        names = [str(index) for index in range(config.num_classes)]
    elif from_strings:
        names = sorted(label for label in rows.unique(column) if label is not None)
    else:
        largest = max((label for label in rows.unique(column) if label is not None), default=-1)
        names = [str(index) for index in range(config.num_classes or largest + 1)]
    return LabelEncoding(check_num_classes(names, config.num_classes), from_strings)


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

    def __call__(self, row: dict[str, Any], index: int | str) -> dict[str, torch.Tensor]:
        """The item of a row; `index` names it in errors."""
        with naming(self.place(row, index)):
            item = {"image": self.pixels(row)}
            if self.labels is not None:
                item["label"] = torch.tensor(self.labels.encode(row[self.label_column]))
        return item

    def size(self, row: dict[str, Any]) -> int:
        """Bytes of the row's image as it is encoded, 0 where it is still a file."""
        return len((row[self.image_column] or {}).get("bytes") or b"")

    def place(self, row: dict[str, Any], index: int | str) -> str:
        """The row and its file, as errors name them."""
        path = (row[self.image_column] or {}).get("path")
        return f"{path!r} (row {index})" if path else f"row {index}"

    def pixels(self, row: dict[str, Any]) -> torch.Tensor:
        """uint8 (C, R, R); [`UnfitImage`] if there are none."""
        with reading():
            image = self.opened(row)
            image.load()
        config = self.config
        return image_to_tensor(image, config.source_resolution, config.num_channels, config.padding, config.background)

    def header(self, row: dict[str, Any]) -> ImageHeader:
        """What is known of the row's image without decoding it; [`UnfitImage`] if it cannot be opened."""
        with reading(), self.opened(row) as image:
            return ImageHeader(image.size, image.mode, image.has_transparency_data)

    def opened(self, row: dict[str, Any]) -> Image.Image:
        """The row's image, fetched if it is a remote file."""
        file = self.file(row)
        if file["bytes"] is None and "://" in file["path"]:
            return datasets.Image().decode_example(file)
        return Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"]))

    def file(self, row: dict[str, Any]) -> dict[str, Any]:
        """Bytes and path of the row's image."""
        if row[self.image_column] is None:
            raise UnfitImage(f"has no image in column {self.image_column!r}", "remove it")
        return row[self.image_column]


@contextmanager
def reading() -> Iterator[None]:
    """Raises [`UnfitImage`] for what is not an image."""
    try:
        yield
    except UnfitImage:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise UnfitImage(f"cannot be read as an image ({error})", "remove it or convert it") from error


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

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """Read without decoding an image."""
        if self.decode.labels is None:
            return None
        return torch.tensor([self.decode.labels.encode(label) for label in self.rows[self.decode.label_column]])

    def fingerprint(self) -> str:
        """From the hash that the `datasets` library keeps, which follows files and their changes."""
        config = asdict(self.decode.config)
        del config["dataset_revision"]  # came later; what it chooses is in the hash of the rows
        return hash_of([self.rows._fingerprint, config])


def _from_rows(rows: Rows, config: DataConfig) -> ImageData:
    if rows.features is None:
        raise ValueError(
            f"`dataset_name` is {config.dataset_name!r}, which does not declare its columns and cannot be streamed: "
            "leave out --streaming."
        )
    image_column = _find_image_column(rows.features, config.image_column)
    label_column = labels = None
    if config.class_conditional:
        label_column = _find_label_column(rows.features, config.label_column)
        labels = _label_encoding(rows, label_column, config)
    rows = rows.select_columns([image_column] if labels is None else [image_column, label_column])
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    decode = RowDecoder(config, image_column, label_column, labels)
    stream = decoded = None
    if isinstance(rows, datasets.IterableDataset):
        stream = RowStream(rows, decode, config.seed, config.shuffle_buffer_size)
        rows = rows.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer_size)
        dataset = rows.map(decode, with_indices=True, remove_columns=rows.column_names)
    else:
        if labels is not None:
            _check_labels(rows, label_column, labels)
        dataset = decoded = DecodedRows(rows, decode)
    return ImageData(dataset, None if labels is None else labels.id2label, stream=stream, rows=decoded)


def _find_image_column(features: datasets.Features, asked: str | None) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found += [name for name in IMAGE_COLUMNS if name in features]
    return _column(asked, found, features, "image_column")


def _find_label_column(features: datasets.Features, asked: str | None) -> str:
    found = [name for name in LABEL_COLUMNS if name in features]
    class_labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(class_labels) == 1:
        found += class_labels
    return _column(asked, found, features, "label_column")


def _column(asked: str | None, found: list[str], features: datasets.Features, option: str) -> str:
    if asked is None and found:
        return found[0]
    if asked not in features:
        raise ValueError(f"`{option}` is {asked!r}; it must be one of the data set's columns {list(features)}.")
    return asked
