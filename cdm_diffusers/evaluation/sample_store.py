"""
Where samples are kept while they are made, and what they become: micro-batches as shards that are whole or not there,
then a folder of PNGs or an npz file, and the low-resolution stages as arrays. `image_sets.py` shows the folder.
"""

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, Subset

from ..data.image_sets import (
    IMAGES_FOLDER,
    LABELS_NAME,
    LOW_RES_FOLDER,
    NPZ_NAME,
    SETTINGS_NAME,
    SHARD_PATTERN,
    SHARDS_FOLDER,
    read_settings,
)
from ..data.transforms import area_resize, to_float, to_uint8, to_unit
from ..files import TEMPORARY_PREFIX, replace_folder, reveal, temporary_name, write_json
from .records import check_same_settings


RESULTS_NAME = "results.json"
FINAL_NAMES = {"png": IMAGES_FOLDER, "npz": NPZ_NAME}


class SampleStore:
    """
    An `output_dir` of `evaluation/sample.py`.

    Args:
        folder: the `output_dir`.
        settings: what is to be in it, as JSON; see `sample.py`. `num_images`, `batch_size`, `stages`, `channels`,
            `kept_stages` and `image_format` are used here.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder, self.settings = Path(folder), settings
        self.shards = self.folder / SHARDS_FOLDER
        self.final = self.folder / FINAL_NAMES[settings["image_format"]]

    @property
    def is_finished(self) -> bool:
        """Whether the set is whole."""
        return self.final.exists()

    def check(self) -> None:
        """
        Raises:
            ValueError: the folder holds something else, or samples of other settings.
        """
        file = self.folder / SETTINGS_NAME
        if not file.exists():
            if self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise ValueError(f"`output_dir` {str(self.folder)!r} holds other files: choose another folder.")
            return
        holder = f"`output_dir` {str(self.folder)!r} holds samples of other settings"
        remedy = "Choose another folder, or give the same settings."
        check_same_settings(json.loads(file.read_text()), self.settings, holder, remedy)

    def prepare(self, labels: torch.Tensor | None) -> None:
        """Writes settings and labels first, and removes what a killed run left half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SETTINGS_NAME).exists():
            write_json(self.folder / SETTINGS_NAME, self.settings)
        self.shards.mkdir(exist_ok=True)
        for folder in (self.folder, self.shards, self.folder / LOW_RES_FOLDER):
            for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if labels is not None:
            temporary = temporary_name(self.folder / LABELS_NAME)
            np.save(temporary, labels.numpy())
            reveal(temporary, self.folder / LABELS_NAME)

    # Micro-batches

    def micro_batches(self) -> list[torch.Tensor]:
        """Indices of the images of each micro-batch, which no number of processes changes."""
        return list(torch.arange(self.settings["num_images"]).split(self.settings["batch_size"]))

    def shard(self, indices: torch.Tensor) -> Path:
        """The file of a micro-batch."""
        return self.shards / f"{int(indices[0]):08d}-{len(indices)}.safetensors"

    def pending(self) -> list[torch.Tensor]:
        """The micro-batches that have no shard yet."""
        return [indices for indices in self.micro_batches() if not self.shard(indices).exists()]

    def num_finished(self) -> int:
        """Images, of all processes."""
        return sum(int(path.stem.split("-")[1]) for path in self.shards.glob(SHARD_PATTERN))

    def save_shard(self, indices: torch.Tensor, images: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        """
        Args:
            images: "images", the last stage as uint8 (B, C, H, W), and the kept stages by their names, float32.
            metadata: JSON; see `assemble`.
        """
        file = self.shard(indices)
        temporary = temporary_name(file)
        images = {name: tensor.contiguous().cpu() for name, tensor in images.items()}
        save_file(images, temporary, metadata={"record": json.dumps(metadata)})
        reveal(temporary, file)

    def load_shard(self, indices: torch.Tensor) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What [`save_shard`] was given; ValueError if the file is damaged."""
        file = self.shard(indices)
        try:
            with safe_open(file, "np") as shard:
                images = {name: shard.get_tensor(name) for name in ("images", *self.settings["kept_stages"])}
                return images, json.loads(shard.metadata()["record"])
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{str(file)!r} is damaged ({error}): remove it, and it is made again.") from error

    # The whole set

    def assemble(self) -> None:
        """Turns all shards into what the folder is for, one shard at a time."""
        record = {"evaluations": {}, "seconds": 0.0, "num_processes": 0, "num_images": self.settings["num_images"]}

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for indices in self.micro_batches():
                images, of_shard = self.load_shard(indices)
                assert len(images["images"]) == len(indices)
                record["evaluations"] = of_shard["evaluations"]
                record["seconds"] += of_shard["seconds"]
                record["num_processes"] = max(record["num_processes"], of_shard["num_processes"])
                yield images

        self.write(batches(), record)

    def write(self, batches: Iterable[dict[str, np.ndarray]], record: dict[str, Any]) -> None:
        """
        The low-resolution stages and the images of `batches`, in their order, and a record (`results.json`) that is
        complete when the last batch has been drawn. The images appear last: then the set is finished.
        """
        kept = {}
        for name in self.settings["kept_stages"]:
            (self.folder / LOW_RES_FOLDER).mkdir(exist_ok=True)
            size = self.settings["stages"][name]
            shape = (self.settings["num_images"], self.settings["channels"], size, size)
            temporary = temporary_name(self.folder / LOW_RES_FOLDER / f"{name}.npy")
            kept[name] = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        batches = _storing(kept, batches)
        temporary = temporary_name(self.final)
        labels = None
        if (self.folder / LABELS_NAME).exists():
            labels = np.load(self.folder / LABELS_NAME)
        if self.settings["image_format"] == "png":
            _write_pngs(temporary, batches, labels)
        else:
            size = list(self.settings["stages"].values())[-1]
            _write_npz(
                temporary, batches, (self.settings["num_images"], size, size, self.settings["channels"]), labels
            )
        for name, array in kept.items():
            array.flush()
            file = self.folder / LOW_RES_FOLDER / f"{name}.npy"
            reveal(temporary_name(file), file)
        write_json(self.folder / RESULTS_NAME, record)
        replace_folder(temporary, self.final) if temporary.is_dir() else reveal(temporary, self.final)


def _storing(
    kept: dict[str, np.ndarray], batches: Iterable[dict[str, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Copies the kept stages into their arrays; the first index of each batch, and its images (B, C, H, W)."""
    start = 0
    for batch in batches:
        for name, array in kept.items():
            array[start : start + len(batch[name])] = batch[name]
        yield start, batch["images"]
        start += len(batch["images"])


def _write_pngs(folder: Path, batches: Iterable[tuple[int, np.ndarray]], labels: np.ndarray | None) -> None:
    """`INDEX.png`, or `LABEL/INDEX.png`, both with leading zeros."""
    folder.mkdir()
    width = 0 if labels is None else len(str(labels.max()))
    for start, images in batches:
        for index, image in enumerate(images.transpose(0, 2, 3, 1), start):  # (H, W, C)
            parent = folder if labels is None else folder / f"{labels[index]:0{width}d}"
            parent.mkdir(exist_ok=True)
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(parent / f"{index:06d}.png")


def _write_npz(
    file: Path, batches: Iterable[tuple[int, np.ndarray]], shape: tuple[int, int, int, int], labels: np.ndarray | None
) -> None:
    """arr_0 uint8 (N, H, W, C) and arr_1 int64 (N,), without all of it in memory; the same bytes every time."""
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for _, images in batches:
                stream.write(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, labels)


# ------------------------------------------------------------------------------------------------------------------
# Low-resolution images: of an earlier run, and real ones
# ------------------------------------------------------------------------------------------------------------------


class LowResImages:
    """
    The output of one stage, kept by `evaluation/sample.py --keep_stages`.

    Args:
        folder: its `output_dir`.
        stage: the stage; by default the highest that was kept.

    Raises:
        ValueError: it did not finish, or did not keep this stage.
    """

    def __init__(self, folder: str | Path, stage: str | None = None):
        settings = read_settings(Path(folder))
        kept = settings["kept_stages"]
        if not kept or stage not in (None, *kept):
            raise ValueError(
                f"`low_res_dir` {str(folder)!r} has kept the stages {kept}, not {stage or 'any'}: sample it with "
                "--keep_stages."
            )
        self.stage = stage or kept[-1]
        self.images = np.load(Path(folder) / LOW_RES_FOLDER / f"{self.stage}.npy", mmap_mode="r")
        labels = Path(folder) / LABELS_NAME
        self.labels = torch.from_numpy(np.load(labels)) if labels.exists() else None
        self.settings = {name: value for name, value in settings.items() if name != "about"}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Float32 (B, C, h, w) in [0, 1]."""
        return torch.from_numpy(self.images[indices.numpy()])


def store_real_images(
    folder: str | Path, dataset: Dataset, stage: str, size: int, num_images: int, seed: int, batch_size: int = 100
) -> None:
    """
    Real images averaged down to what `stage` makes, in a folder like that of `evaluation/sample.py --keep_stages`: for
    its `--low_res_dir`, to condition the next stage on ground truth (Table 3b).

    Args:
        dataset: items {"image": uint8 (C, R, R)}, with "label" for class-conditional stages.
        size: of the stage's images.
        num_images: number of images, drawn without replacement, by `seed`.

    Raises:
        ValueError: there are fewer images, or the folder holds something else.
    """
    if num_images > len(dataset):
        raise ValueError(f"`num_images` is {num_images}, but there are only {len(dataset)} real images.")
    settings = {
        "num_images": num_images,
        "batch_size": batch_size,
        "seed": seed,
        "stages": {stage: size},
        "channels": dataset[0]["image"].shape[0],
        "kept_stages": [stage],
        "image_format": "npz",
        "real_images": dataset.fingerprint(),
    }
    store = SampleStore(folder, settings)
    store.check()
    if store.is_finished:
        return
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num_images]
    images, labels = [], []
    for batch in DataLoader(Subset(dataset, drawn.tolist()), batch_size):
        averaged = area_resize(to_float(batch["image"]), size)
        images.append({stage: to_unit(averaged).numpy(), "images": to_uint8(averaged).numpy()})
        labels.append(batch.get("label"))
    store.prepare(None if labels[0] is None else torch.cat(labels))
    store.write(images, {"evaluations": {}, "seconds": 0.0, "num_images": num_images})
    shutil.rmtree(store.shards)
