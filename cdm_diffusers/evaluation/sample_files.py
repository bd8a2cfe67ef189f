"""Files of sets of samples, written image by image, and read back where parts of them are damaged."""

import hashlib
import math
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image


def write_pngs(folder: Path, batches: Iterable[np.ndarray], names: list[str]) -> dict[str, str]:
    """
    A file for each image.

    Args:
        batches: uint8 (B, C, H, W).
        names: paths below `folder`, one for each image.

    Returns:
        `dict`: SHA-256 of each file by its name.
    """
    folder.mkdir()
    hashes, images = {}, (image for batch in batches for image in batch.transpose(0, 2, 3, 1))  # (H, W, C)
    for name, image in zip(names, images, strict=True):
        content = BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(content, "PNG")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.getvalue())
        hashes[name] = hashlib.sha256(content.getvalue()).hexdigest()
    return hashes


def write_npz(
    file: Path, batches: Iterable[np.ndarray], shape: tuple[int, int, int, int], labels: np.ndarray | None
) -> None:
    """
    arr_0 uint8 `shape` (N, H, W, C) and arr_1 int64 (N,), without all of it in memory; the same bytes every time.

    Args:
        batches: uint8 (B, C, H, W).
    """
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
            write_header(stream, np.uint8, shape)
            for images in batches:
                stream.write(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, labels)


def write_header(stream: BinaryIO, dtype: type, shape: tuple[int, ...]) -> None:
    """Of an array in the npy format, whose rows are to follow."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def read_rows(file: Path, start: int, count: int, dtype: type) -> np.ndarray:
    """
    Rows `start` to `start + count` of an npy file, or of the first array of an npz file that is not compressed, even
    where the end of the file is missing.

    Raises:
        ValueError: these rows are missing, or there is no such array.
    """
    with open(file, "rb") as stream:
        stream.seek(stream.read(1024).index(np.lib.format.MAGIC_PREFIX))
        np.lib.format.read_magic(stream)
        shape, _, found = np.lib.format.read_array_header_1_0(stream)
        size = count * math.prod(shape[1:]) * found.itemsize
        if found != dtype or size > file.stat().st_size:
            raise ValueError(f"{str(file)!r} has {found} of shape {shape}.")
        stream.seek(start * size // count, 1)
        return np.frombuffer(stream.read(size), dtype).reshape(count, *shape[1:])
