"""IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from .config import DataConfig
from .labels import LabelEncoding, check_num_classes, naming, read_label_names
from .memory import ImageData, InMemoryImages
from .transforms import grey_images_to_tensor


IDX_PREFIXES = {"train": "train", "test": "t10k"}


def open_idx(folder: Path, config: DataConfig) -> ImageData:
    """The images, and labels, of the pair of files in `folder` for the split that `config` names."""
    if config.streaming:
        raise ValueError(f"the IDX files in {str(folder)!r} are held in memory, not streamed: leave out --streaming.")
    file = _find_idx(folder, "images-idx3-ubyte", config.dataset_split)
    files = [file.relative_to(folder)]
    with naming(f"every image of {file}"):
        images = grey_images_to_tensor(
            _read_idx(file, 3), config.source_resolution, config.num_channels, config.padding
        )
    if not config.class_conditional:
        return ImageData(InMemoryImages(images, None), None, root=folder, files=files)
    file = _find_idx(folder, "labels-idx1-ubyte", config.dataset_split)
    files.append(file.relative_to(folder))
    values = _read_idx(file, 1)
    if len(values) != len(images):
        raise ValueError(f"{file} has {len(values)} labels for {len(images)} images: fetch the pair again.")
    labels = LabelEncoding(_idx_names(folder, values, config), from_strings=False)
    for row in np.unique(values, return_index=True)[1]:
        with naming(f"row {row} of {file}"):
            labels.encode(values[row])
    dataset = InMemoryImages(images, torch.from_numpy(values.astype(np.int64)))
    return ImageData(dataset, labels.id2label, root=folder, files=files)


def _idx_names(folder: Path, labels: np.ndarray, config: DataConfig) -> list[str]:
    """IDX files carry no names: from `label_names`, a `classes.txt` beside them, or the numbers themselves."""
    if config.label_names is not None:
        return check_num_classes(read_label_names(config.label_names), config.num_classes)
    if (folder / "classes.txt").is_file():
        return check_num_classes(read_label_names(str(folder / "classes.txt")), config.num_classes)
    return [str(index) for index in range(config.num_classes or int(labels.max()) + 1)]


def _find_idx(folder: Path, kind: str, split: str) -> Path:
    prefix = IDX_PREFIXES.get(split, split)
    found = sorted(folder.glob(f"*{prefix}-{kind}")) or sorted(folder.glob(f"*{prefix}-{kind}.gz"))
    if len(found) != 1:
        names = sorted(path.name for path in folder.glob("*-ubyte*"))
        raise ValueError(
            f"`train_data_dir` is {str(folder)!r}, which holds {names}; it must hold one file *{prefix}-{kind}[.gz] "
            f"for `dataset_split` {split!r}."
        )
    return found[0]


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Decode an IDX file, gzipped or not: two zeros, 8 for uint8, the number of axes, their sizes, the bytes."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be decompressed ({error}): fetch it again.") from error
    header = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:header], ">u4")) if len(content) >= header else ()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{file} is not a complete IDX file of {dimensions} axes of bytes: fetch it again.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
