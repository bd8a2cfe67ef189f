"""
Sets of images on disk, read back as data sets: the OpenAI evaluator's npz files, folders of PNGs, and what
`evaluation/sample.py` leaves behind.

In its `output_dir` there are:

    settings.json          what was sampled, and how
    labels.npy             int64 (N,), where the cascade is class-conditional
    images/ or samples.npz the last stage: PNGs named by index, in a sub-folder for each label; or arr_0 and arr_1
    low_res/base.npy, ...  float32 (N, C, h, w) in [0, 1]: stages before the last, exactly as they were passed on
    shards/                finished micro-batches, until all of them are there
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .transforms import to_uint8


SETTINGS_NAME = "settings.json"
LABELS_NAME = "labels.npy"
IMAGES_FOLDER = "images"
NPZ_NAME = "samples.npz"
LOW_RES_FOLDER = "low_res"
SHARDS_FOLDER = "shards"
SHARD_PATTERN = "[0-9]*-[0-9]*.safetensors"  # first index and number of images

PNG_MODES = {"L": 1, "RGB": 3}


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


def load_image_set(path: str | Path, stage: str | None = None) -> ImageSet:
    """
    Opens a set of images. Only the npz format is held in memory.

    Args:
        path: an npz file of the OpenAI evaluator (`arr_0` uint8 (N, H, W, C), optionally `arr_1` integer labels (N,));
            a folder of PNGs, flat or with a sub-folder for each class (labels are the sub-folders' names if those are
            numbers, else their places in alphabetical order); or an `output_dir` of `evaluation/sample.py`.
        stage: of an `output_dir`, a stage that was kept ("base", ...) instead of the last one.

    Raises:
        ValueError: nothing is there, the format is another, images are missing, or their sizes differ.
    """
    path = Path(path)
    is_sample_dir = (path / SETTINGS_NAME).is_file()
    if stage is not None and not is_sample_dir:
        raise ValueError(f"`stage` is {stage!r}, but {str(path)!r} is not an output_dir of evaluation/sample.py.")
    if is_sample_dir:
        return _from_sample_dir(path, stage)
    if path.is_dir():
        return _from_png_folder(path)
    if path.is_file():
        return _from_npz(path)
    raise ValueError(f"{str(path)!r} does not exist: give an npz file, a folder of PNGs, or a folder of samples.")


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


def _from_npz(path: Path) -> ImageSet:
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
            f"{str(path)!r} has {count} images of {width}x{height} pixels; there must be some, all square."
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
    """Images of PNG files."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __call__(self, index: int) -> np.ndarray:
        """Image number `index`, uint8 (C, H, W)."""
        try:
            with Image.open(self.files[index]) as image:
                pixels = np.array(image)  # (H, W) or (H, W, C)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{str(self.files[index])!r} cannot be read ({error}).") from error
        return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))


def _from_png_folder(folder: Path) -> ImageSet:
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
    return ImageSet(str(folder), (len(files), *_png_shape(files)), PngReader(files), labels, class_names)


def _png_shape(files: list[Path]) -> tuple[int, int, int]:
    """(C, H, W) that all files share, from their headers."""
    shape = None
    for file in files:
        try:
            with Image.open(file) as image:
                found = (PNG_MODES.get(image.mode, image.mode), image.height, image.width)
        except OSError as error:
            raise ValueError(f"{str(file)!r} is not a valid PNG ({error}): remove it, or make it again.") from error
        shape = shape or found
        if found != shape or found[0] not in PNG_MODES.values() or found[1] != found[2]:
            raise ValueError(
                f"{str(file)!r} has (channels, height, width) = {found}, {files[0].name!r} has {shape}; all must be "
                "square, of one size, and grey or RGB."
            )
    return shape


# ------------------------------------------------------------------------------------------------------------------
# Folders of evaluation/sample.py
# ------------------------------------------------------------------------------------------------------------------


class StageReader:
    """Images of a stage that was kept as floats (N, C, h, w) in [0, 1]."""

    def __init__(self, file: Path):
        self.file = file

    def __call__(self, index: int) -> np.ndarray:
        """Image number `index`, uint8 (C, H, W)."""
        images = np.load(self.file, mmap_mode="r")
        return to_uint8(2 * torch.from_numpy(images[index].copy()) - 1).numpy()


def read_settings(folder: Path) -> dict[str, Any]:
    """
    The settings of the samples in an `output_dir` of `evaluation/sample.py`.

    Raises:
        ValueError: sampling has not finished, or the file is of another kind.
    """
    try:
        settings = json.loads((folder / SETTINGS_NAME).read_text())
        expected, stages = settings["num_images"], settings["stages"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / SETTINGS_NAME)!r} was not written by evaluation/sample.py.") from error
    if not (folder / IMAGES_FOLDER).is_dir() and not (folder / NPZ_NAME).is_file():
        there = sum(int(file.stem.split("-")[1]) for file in (folder / SHARDS_FOLDER).glob(SHARD_PATTERN))
        raise ValueError(
            f"{str(folder)!r} is half-written: {there} of {expected} images of stage {list(stages)[-1]!r} are there. "
            "Start evaluation/sample.py again with the same settings, and it goes on."
        )
    return settings


def _from_sample_dir(folder: Path, stage: str | None) -> ImageSet:
    settings = read_settings(folder)
    stages = settings["stages"]
    stage = stage or list(stages)[-1]
    labels = folder / LABELS_NAME
    labels = torch.from_numpy(np.load(labels)) if labels.is_file() else None
    if stage != list(stages)[-1]:
        file = folder / LOW_RES_FOLDER / f"{stage}.npy"
        if not file.is_file():
            kept = [path.stem for path in sorted((folder / LOW_RES_FOLDER).glob("*.npy"))]
            raise ValueError(
                f"`stage` is {stage!r}; {str(folder)!r} has the stages {[*kept, list(stages)[-1]]}: --keep_stages of "
                "evaluation/sample.py keeps those before the last."
            )
        images = ImageSet(f"{folder} ({stage})", np.load(file, mmap_mode="r").shape, StageReader(file), labels)
    elif (folder / NPZ_NAME).is_file():
        images = _from_npz(folder / NPZ_NAME)
    else:
        files = sorted((folder / IMAGES_FOLDER).rglob("*.png"), key=lambda file: int(file.stem))
        shape = (settings["channels"], stages[stage], stages[stage])
        images = ImageSet(str(folder), (len(files), *shape), PngReader(files), labels)
    if len(images) != settings["num_images"]:
        raise ValueError(
            f"{str(folder)!r} has {len(images)} of {settings['num_images']} images of stage {stage!r}: some have "
            "been removed."
        )
    if settings.get("id2label") is not None:
        images.id2label = {int(label): name for label, name in settings["id2label"].items()}
    images.source_resolution = settings.get("source_resolution")
    return images
