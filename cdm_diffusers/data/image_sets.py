"""
Sets of images on disk, read back as data sets: npz files and PNGs (`image_files.py`), and what `cdm sample-set`
leaves behind.

In its `output_dir` there are:

    settings.json          what was sampled, and how
    labels.npy             int64 (N,), where the cascade is class-conditional
    images/ or samples.npz the last stage: PNGs named by index, in a sub-folder for each label; or arr_0 and arr_1
    low_res/base.npy, ...  float32 (N, C, h, w) in [0, 1]: stages before the last, exactly as they were passed on
    results.json           network evaluations and seconds
    hashes.json            of all these files, and of each micro-batch
    shards/                finished micro-batches, until all of them are there
"""

from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import torch
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from ..files import read_json
from ..options import PositiveInt
from .hashes import HASHES_NAME, REMEDY, FolderHashes
from .image_files import ImageSet, PngReader, from_npz, from_png_folder, png_shape
from .transforms import to_uint8


SETTINGS_NAME = "settings.json"
LABELS_NAME = "labels.npy"
IMAGES_FOLDER = "images"
NPZ_NAME = "samples.npz"
LOW_RES_FOLDER = "low_res"
SHARDS_FOLDER = "shards"
SHARD_PATTERN = "[0-9]*-[0-9]*.safetensors"  # first index and number of images


def load_image_set(path: str | Path, stage: str | None = None) -> ImageSet:
    """
    Opens a set of images. Only the npz format is held in memory. Files of an `output_dir` must be what was written:
    PNGs are checked when they are read, all else now.

    Args:
        path: an npz file of the OpenAI evaluator (`arr_0` uint8 (N, H, W, C), optionally `arr_1` integer labels (N,));
            a folder of PNGs, flat or with a sub-folder for each class (labels are the sub-folders' names if those are
            numbers, else their places in alphabetical order); or an `output_dir` of `cdm sample-set`.
        stage: of an `output_dir`, a stage that was kept ("base", ...) instead of the last one.

    Raises:
        ValueError: nothing is there, the format is another, images are missing or damaged, or their sizes differ.
    """
    path = Path(path)
    is_sample_dir = any((path / name).is_file() for name in (SETTINGS_NAME, HASHES_NAME))
    if stage is not None and not is_sample_dir:
        raise ValueError(f"`stage` is {stage!r}, but {str(path)!r} is not an output_dir of cdm sample-set.")
    if is_sample_dir:
        return SampleFolder(path).images(stage)
    if path.is_dir():
        return from_png_folder(path)
    if path.is_file():
        return from_npz(path)
    raise ValueError(f"{str(path)!r} does not exist: give an npz file, a folder of PNGs, or a folder of samples.")


class Settings(TypedDict):
    """What is needed of `settings.json`."""

    __pydantic_config__ = ConfigDict(extra="allow")

    num_images: PositiveInt
    stages: Annotated[dict[str, PositiveInt], Field(min_length=1)]  # sizes by names
    channels: NotRequired[PositiveInt]
    labels: NotRequired[str | None]
    kept_stages: NotRequired[list[str]]
    id2label: NotRequired[dict[Annotated[str, Field(pattern=r"^\d+$")], str] | None]
    source_resolution: NotRequired[PositiveInt | None]


def read_settings(folder: Path, remedy: str = "give a folder of samples.") -> dict[str, Any]:
    """
    The settings of the samples in an `output_dir` of `cdm sample-set`, whether or not it is finished.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    file = folder / SETTINGS_NAME
    if not file.is_file():
        raise ValueError(f"{str(file)!r} was not written by cdm sample-set: there is no such file.")
    return read_json(file, Settings, "cdm sample-set", remedy)


class SampleFolder:
    """
    A finished `output_dir` of `cdm sample-set`.

    Raises:
        ValueError: sampling has not finished, or a file is damaged or of another kind.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings, self.hashes = read_settings(self.folder), FolderHashes(self.folder)
        self.count, self.stages = self.settings["num_images"], list(self.settings["stages"])
        self.npz = self.folder / NPZ_NAME
        if not (self.folder / IMAGES_FOLDER).is_dir() and not self.npz.is_file():
            shards = (self.folder / SHARDS_FOLDER).glob(SHARD_PATTERN)
            there = sum(int(file.stem.split("-")[1]) for file in shards)
            raise ValueError(
                f"{str(folder)!r} is half-written: {there} of {self.count} images of stage {self.stages[-1]!r} are "
                "there. Run `cdm sample-set` again with the same settings to go on."
            )
        self.hashes.check(SETTINGS_NAME)

    def labels(self) -> np.ndarray | None:
        """int64 (N,), None where there are no classes; ValueError if they are missing or damaged."""
        file = self.folder / LABELS_NAME
        if not file.exists() and LABELS_NAME not in self.hashes.files and self.settings.get("labels") is None:
            return None
        labels = _load(file, BytesIO(self.hashes.read(LABELS_NAME)))
        return _checked(file, labels, np.int64, (self.count,))

    def kept_stage(self, stage: str) -> np.ndarray:
        """What a stage made, float32 (N, C, h, w) in [0, 1], mapped; ValueError if it is missing or damaged."""
        name, size = f"{LOW_RES_FOLDER}/{stage}.npy", self.settings["stages"][stage]
        self.hashes.check(name)
        images = _load(self.folder / name, self.folder / name, mmap_mode="r")
        channels = self.settings.get("channels", images.shape[1] if images.ndim == 4 else 0)
        return _checked(self.folder / name, images, np.float32, (self.count, channels, size, size))

    def images(self, stage: str | None = None) -> ImageSet:
        """
        The samples, or what another `stage` made.

        Raises:
            ValueError: the stage was not kept, or files are missing, damaged, moved or new.
        """
        if stage not in (None, self.stages[-1]):
            images = self._of_stage(stage)
        elif self.npz.is_file():
            images = self._from_npz()
        else:
            images = self._from_pngs()
        if self.settings.get("id2label") is not None:
            images.id2label = {int(label): name for label, name in self.settings["id2label"].items()}
        images.source_resolution = self.settings.get("source_resolution")
        return images

    def _of_stage(self, stage: str) -> ImageSet:
        kept = [path.stem for path in sorted((self.folder / LOW_RES_FOLDER).glob("*.npy"))]
        if stage not in self.stages or stage not in (*kept, *self.settings.get("kept_stages", [])):
            raise ValueError(
                f"`stage` is {stage!r}; {str(self.folder)!r} has the stages {[*kept, self.stages[-1]]}: --keep_stages "
                "of cdm sample-set keeps those before the last."
            )
        shape = self.kept_stage(stage).shape
        reader = StageReader(self.folder / LOW_RES_FOLDER / f"{stage}.npy")
        return ImageSet(f"{self.folder} ({stage})", shape, reader, _tensor(self.labels()))

    def _from_npz(self) -> ImageSet:
        self.hashes.check(NPZ_NAME)
        images, labels = from_npz(self.npz), self.labels()
        size = self.settings["stages"][self.stages[-1]]
        expected = (self.count, self.settings.get("channels", images.channels), size)
        if (len(images), images.channels, images.size) != expected:
            raise ValueError(
                f"{str(self.npz)!r} has {len(images)} images of {images.channels} channels and size {images.size}; "
                f"they must be (number, channels, size) = {expected}: {REMEDY}"
            )
        if labels is not None and (images.labels is None or not np.array_equal(images.labels, labels)):
            raise ValueError(f"{str(self.npz)!r} has other labels than {LABELS_NAME}: {REMEDY}")
        return images

    def _from_pngs(self) -> ImageSet:
        labels, folder = self.labels(), self.folder / IMAGES_FOLDER
        names = image_names(self.count, labels)
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*.png")}
        if missing := sorted({*names} - found):
            raise ValueError(f"{str(folder)!r} lacks {len(missing)} images, {missing[0]!r} for one: {REMEDY}")
        if others := sorted(found - {*names}):
            raise ValueError(f"{str(folder)!r} has images that were not sampled, {others[0]!r} for one: {REMEDY}")
        size = self.settings["stages"][self.stages[-1]]
        channels = self.settings.get("channels") or png_shape([folder / names[0]])[0]
        shape = (channels, size, size)
        reader = PngReader([folder / name for name in names], shape, self._read)
        return ImageSet(str(self.folder), (self.count, *shape), reader, _tensor(labels))

    def _read(self, file: Path) -> bytes:
        return self.hashes.read(file.relative_to(self.folder).as_posix())


class StageReader:
    """Images of a stage that was kept as floats (N, C, h, w) in [0, 1]."""

    def __init__(self, file: Path):
        self.file = file

    def __call__(self, index: int) -> np.ndarray:
        """Image number `index`, uint8 (C, H, W)."""
        images = np.load(self.file, mmap_mode="r")
        return to_uint8(2 * torch.from_numpy(images[index].copy()) - 1).numpy()


def image_names(count: int, labels: np.ndarray | None) -> list[str]:
    """Paths of the PNGs below `images`: `INDEX.png`, or `LABEL/INDEX.png`, both with leading zeros."""
    if labels is None:
        return [f"{index:06d}.png" for index in range(count)]
    width = len(str(labels.max()))
    return [f"{label:0{width}d}/{index:06d}.png" for index, label in enumerate(labels)]


def _tensor(labels: np.ndarray | None) -> torch.Tensor | None:
    return None if labels is None else torch.from_numpy(labels)


def _load(file: Path, source: Path | BytesIO, **options) -> np.ndarray:
    try:
        return np.load(source, **options)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}): {REMEDY}") from error


def _checked(file: Path, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{str(file)!r} is {array.dtype} of shape {array.shape}; it must be {np.dtype(dtype)} of {shape}: {REMEDY}"
        )
    return array
