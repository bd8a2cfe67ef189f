"""Images of one size in npz files and PNGs, as data sets."""

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


PNG_MODES = {"L": 1, "RGB": 3}
# What Pillow raises for damaged files.
PNG_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class ImageSet(Dataset):
    """
    Images of one size: items `{"image": uint8 (C, H, W), "label": int64 ()}`, no "label" where there are none.

    Args:
        source: where they come from, for people to read.
        shape: (N, C, H, W).
        read: image number i as a uint8 array (C, H, W).
        labels: int64 (N,), or None.
        class_names: names of sub-folders; their places in the list are the labels.
        id2label: the classes of the cascade that made the images.
        source_resolution: size of the real images that a cascade's stages were trained on averages of, if known.
    """

    def __init__(
        self,
        source: str,
        shape: tuple[int, int, int, int],
        read: Callable[[int], np.ndarray],
        labels: torch.Tensor | None,
        class_names: list[str] | None = None,
        id2label: dict[int, str] | None = None,
        source_resolution: int | None = None,
    ):
        self.source, self.labels, self.class_names = source, labels, class_names
        self.id2label, self.source_resolution = id2label, source_resolution
        self.count, self.channels, self.size, _ = shape
        self._read = read

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {"image": torch.from_numpy(self._read(index))}
        if self.labels is not None:
            item["label"] = self.labels[index]
        return item

    def use_labels_of(self, id2label: dict[int, str]) -> None:
        """
        Numbers the labels as `id2label` does, going by the names of sub-folders.

        Raises:
            ValueError: sub-folders have other names.
        """
        if self.class_names is None:
            return
        number_of = {name: number for number, name in id2label.items()}
        unknown = [name for name in self.class_names if name not in number_of]
        if unknown:
            raise ValueError(
                f"{self.source!r} has the classes {unknown[:10]}, which are not among {list(number_of)[:10]}: "
                "--label_names gives the data's names; sub-folders may also be called by their numbers."
            )
        numbers = torch.tensor([number_of[name] for name in self.class_names])
        self.labels, self.class_names = numbers[self.labels], None

    def fingerprint(self) -> str:
        """A hash of all pixels and labels: the same for the same images in another format."""
        digest = hashlib.sha256(repr((self.count, self.channels, self.size)).encode())
        for index in range(self.count):
            digest.update(np.ascontiguousarray(self._read(index)))
        if self.labels is not None:
            digest.update(self.labels.numpy())
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------
# npz
# ------------------------------------------------------------------------------------------------------------------


class ArrayReader:
    """Images of a uint8 array (N, H, W, C)."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __call__(self, index: int) -> np.ndarray:
        """Image number `index`, uint8 (C, H, W)."""
        return np.ascontiguousarray(self.array[index].transpose(2, 0, 1))


def from_npz(path: Path) -> ImageSet:
    """An npz file as `load_image_set` takes it; ValueError if it is another."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{str(path)!r} is not a valid npz file.")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
            images, labels = (file[name] if name in names else None for name in ("arr_0", "arr_1"))
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is not a valid npz file ({error}).") from error
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        found = f"the arrays {names}" if images is None else f"arr_0 of {images.dtype} and shape {images.shape}"
        raise ValueError(
            f"{str(path)!r} has {found}; it must be in the OpenAI evaluator's format: arr_0, uint8 (N, H, W, 1 or 3)."
        )
    count, height, width, channels = images.shape
    if count == 0 or height != width:
        raise ValueError(
            f"{str(path)!r} has {count} images of {width}x{height} pixels; there must be at least one, all square."
        )
    if labels is not None:
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{str(path)!r} has {count} images and labels (arr_1) of {labels.dtype} and shape {labels.shape}; "
                f"they must be integers of shape ({count},)."
            )
        labels = torch.from_numpy(labels.astype(np.int64))
    return ImageSet(str(path), (count, channels, height, width), ArrayReader(images), labels)


# ------------------------------------------------------------------------------------------------------------------
# PNGs
# ------------------------------------------------------------------------------------------------------------------


class PngReader:
    """
    Images of PNG files.

    Args:
        files: one for each image.
        shape: (C, H, W) that all must have.
        read: the content of a file.
    """

    def __init__(
        self, files: list[Path], shape: tuple[int, int, int], read: Callable[[Path], bytes] = Path.read_bytes
    ):
        self.files, self.shape, self.read = files, shape, read

    def __call__(self, index: int) -> np.ndarray:
        """Image number `index`, uint8 (C, H, W)."""
        file = self.files[index]
        with _opened(file, BytesIO(self.read(file))) as image:
            found, pixels = _shape_of(image), np.array(image)  # (H, W) or (H, W, C)
        _check_shape(file, found, self.shape)
        return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))


@contextmanager
def _opened(file: Path, stream: BinaryIO) -> Iterator[Image.Image]:
    try:
        with Image.open(stream, formats=["PNG"]) as image:
            yield image
    except PNG_ERRORS as error:
        if getattr(error, "errno", None) is not None:  # of the disk, not of what is on it
            raise
        raise ValueError(f"{str(file)!r} is not a valid PNG ({error}): remove it, or make it again.") from error


def _shape_of(image: Image.Image) -> tuple[int | str, int, int]:
    """(C, H, W); a mode that is neither grey nor RGB stands for itself."""
    return PNG_MODES.get(image.mode, image.mode), image.height, image.width


def _check_shape(file: Path, found: tuple[int | str, int, int], shape: tuple[int | str, int, int]) -> None:
    if found != shape or shape[0] not in PNG_MODES.values() or shape[1] != shape[2]:
        raise ValueError(
            f"{str(file)!r} has (channels, height, width) = {found}, among images of {shape}; all must be square, of "
            "one size, and grey or RGB."
        )


def from_png_folder(folder: Path) -> ImageSet:
    """A folder of PNGs as `load_image_set` takes it; ValueError if it is another."""
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    files = sorted(folder.glob("*.png"))
    labels = class_names = None
    if classes:
        if files:
            raise ValueError(f"{str(folder)!r} has PNGs both in it and in sub-folders: {files[0].name!r}, for one.")
        numbered = all(child.name.isdecimal() for child in classes)
        labels = []
        for place, child in enumerate(classes):
            of_class = sorted(child.glob("*.png"))
            files += of_class
            labels += [int(child.name) if numbered else place] * len(of_class)
        labels = torch.tensor(labels)
        class_names = None if numbered else [child.name for child in classes]
    if not files:
        raise ValueError(f"{str(folder)!r} holds no PNGs, nor does a sub-folder of it.")
    _check_numbers(files)
    shape = png_shape(files)
    return ImageSet(str(folder), (len(files), *shape), PngReader(files, shape), labels, class_names)


def png_shape(files: list[Path]) -> tuple[int, int, int]:
    """(C, H, W) that all files share, from their headers."""
    shape = None
    for file in files:
        with open(file, "rb") as stream, _opened(file, stream) as image:
            found = _shape_of(image)
        shape = shape or found
        _check_shape(file, found, shape)
    return shape


def _check_numbers(files: list[Path]) -> None:
    """Files of one folder that are called by numbers, with or without leading zeros, have different ones."""
    seen = {}
    for file in files:
        if file.stem.isdecimal() and (other := seen.setdefault((file.parent, int(file.stem)), file)) is not file:
            raise ValueError(f"{str(file)!r} has the number of {other.name!r}: remove one of them.")
