"""
Where samples are kept while they are made, and what they become: micro-batches as shards that are whole or not there,
then a folder of PNGs or an npz file, and the low-resolution stages as arrays. `image_sets.py` shows the folder.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, Subset

from ..data.hashes import HASHES_NAME, FolderHashes
from ..data.image_files import PngReader
from ..data.image_sets import (
    IMAGES_FOLDER,
    LABELS_NAME,
    LOW_RES_FOLDER,
    NPZ_NAME,
    SETTINGS_NAME,
    SHARD_PATTERN,
    SHARDS_FOLDER,
    SampleFolder,
    image_names,
    read_settings,
)
from ..data.transforms import area_resize, to_float, to_uint8, to_unit
from ..files import (
    NO_SPACE,
    TEMPORARY_PREFIX,
    file_hash,
    held,
    own_prefix,
    remove_temporaries,
    replace_folder,
    reveal,
    temporary_name,
    write_json,
)
from .records import check_same_settings
from .sample_files import read_rows, write_header, write_npz, write_pngs


logger = logging.get_logger(__name__)
RESULTS_NAME = "results.json"
FINAL_NAMES = {"png": IMAGES_FOLDER, "npz": NPZ_NAME}


class SampleStore:
    """
    An `output_dir` of `cdm sample-set`.

    Args:
        folder: the `output_dir`.
        settings: what is to be in it, as JSON; see `sample.py`. `num_images`, `batch_size`, `stages`, `channels`,
            `kept_stages` and `image_format` are used here.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder, self.settings = Path(folder), settings
        self.shards = self.folder / SHARDS_FOLDER
        self.final = self.folder / FINAL_NAMES[settings["image_format"]]
        *_, size = settings["stages"].values()
        self.image_shape = (settings["channels"], size, size)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to be done; true only after [`prepare`] has found the set whole."""
        return self.final.exists() and not self.shards.exists()

    def check(self) -> None:
        """
        Raises:
            ValueError: the folder holds something else, or samples of other settings.
        """
        if not (self.folder / SETTINGS_NAME).exists():
            if self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise ValueError(f"`output_dir` {str(self.folder)!r} holds other files: choose another folder.")
            return
        holder = f"`output_dir` {str(self.folder)!r} holds samples of other settings"
        remedy = "Choose another folder, or give the same settings."
        earlier = read_settings(self.folder, "choose another folder.")
        check_same_settings(earlier, self.settings, holder, remedy)

    def prepare(self, labels: torch.Tensor | None) -> None:
        """
        Looks through a finished set. Where there is none, or it is no longer whole, writes settings and labels,
        removes what a killed run left half-written, and leaves shards of all that need not be made again.

        Raises:
            OSError: as [`writing`].
        """
        damage = self.damage()
        if damage is None:
            shutil.rmtree(self.shards, ignore_errors=True)
            return
        if self.final.exists():
            logger.warning(f"What is missing or damaged is made again: {damage}")
        with self.writing():
            self.shards.mkdir(parents=True, exist_ok=True)
            self._remove_temporaries()
            try:
                FolderHashes(self.folder).check(SETTINGS_NAME)
            except ValueError:
                write_json(self.folder / SETTINGS_NAME, self.settings)
            if labels is not None:
                temporary = temporary_name(self.folder / LABELS_NAME)
                np.save(temporary, labels.numpy())
                reveal(temporary, self.folder / LABELS_NAME)
            self._restore()

    def damage(self) -> str | None:
        """What is missing in a set that was finished, or is not as it was written; None if nothing is."""
        try:
            folder = SampleFolder(self.folder)
            for stage in self.settings["kept_stages"]:
                folder.kept_stage(stage)
            folder.hashes.check(RESULTS_NAME)
            images = folder.images()
            with ThreadPoolExecutor() as pool:
                for _ in pool.map(images.__getitem__, range(len(images))):
                    pass
        except ValueError as error:
            return str(error)
        return None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """
        Around everything that writes: where it fails, what this process has half-written is removed.

        Raises:
            OSError: the disk is full (ENOSPC, EDQUOT), with what to do; other errors as they are.
        """
        try:
            yield
        except OSError as error:
            self._remove_temporaries(own_prefix())
            if error.errno not in NO_SPACE:
                raise
            message = f"`output_dir` {str(self.folder)!r} is on a disk that is full: free some space, and start again "
            message += "with the same settings. What is finished is kept, and it goes on from there."
            raise OSError(error.errno, message) from error

    def _remove_temporaries(self, prefix: str = TEMPORARY_PREFIX) -> None:
        for folder in (self.folder, self.shards, self.folder / LOW_RES_FOLDER):
            remove_temporaries(folder, prefix)

    # Micro-batches

    def micro_batches(self) -> list[torch.Tensor]:
        """Indices of the images of each micro-batch, whatever the number of processes."""
        return list(torch.arange(self.settings["num_images"]).split(self.settings["batch_size"]))

    def shard(self, indices: torch.Tensor) -> Path:
        """The file of a micro-batch."""
        return self.shards / f"{int(indices[0]):08d}-{len(indices)}.safetensors"

    def pending(self) -> list[torch.Tensor]:
        """The micro-batches that have no shard yet."""
        return [indices for indices in self.micro_batches() if not self.shard(indices).exists()]

    def num_finished(self) -> int:
        """Finished images, of all processes."""
        return sum(int(path.stem.split("-")[1]) for path in self.shards.glob(SHARD_PATTERN))

    def save_shard(self, indices: torch.Tensor, images: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        """
        Args:
            images: "images", the last stage as uint8 (B, C, H, W), and the kept stages by their names, float32.
            metadata: JSON; see `assemble`.
        """
        file = self.shard(indices)
        temporary = temporary_name(file)
        images = {name: np.ascontiguousarray(array) for name, array in images.items()}
        texts = {"record": json.dumps(metadata), "hash": _hash_of(images, metadata)}
        with self.writing():
            temporary.write_bytes(safetensors.numpy.save(images, texts))
            reveal(temporary, file)

    def load_shard(self, indices: torch.Tensor) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What [`save_shard`] was given; ValueError if the file is missing or damaged."""
        file = self.shard(indices)
        try:
            with safe_open(file, "np") as shard:
                images = {name: shard.get_tensor(name) for name in ("images", *self.settings["kept_stages"])}
                texts = shard.metadata()
                record = json.loads(texts["record"])
        except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is damaged ({error}).") from error
        if "hash" in texts and texts["hash"] != _hash_of(images, record):  # earlier versions wrote none
            raise ValueError(f"{str(file)!r} is damaged (its hash differs).")
        return images, record

    def _restore(self) -> None:
        """Turns the intact images of a set that was finished back into shards."""
        try:
            known = FolderHashes(self.folder).micro_batches
        except ValueError:  # what should be there is not known
            return
        for indices in self.pending():
            found = known.get(self.shard(indices).stem)
            images = None if found is None else self._read_back(indices)
            if images is not None and _hash_of(images, found["record"]) == found["hash"]:
                self.save_shard(indices, images, found["record"])

    def _read_back(self, indices: torch.Tensor) -> dict[str, np.ndarray] | None:
        """A micro-batch of a set that was finished, whatever became of the others; None if a part is missing."""
        start, count = int(indices[0]), len(indices)
        try:
            images = {
                name: read_rows(self._kept_file(name), start, count, np.float32)
                for name in self.settings["kept_stages"]
            }
            if self.settings["image_format"] == "npz":
                images["images"] = read_rows(self.final, start, count, np.uint8).transpose(0, 3, 1, 2)
            else:
                names = self._image_names()[start : start + count]
                read = PngReader([self.final / name for name in names], self.image_shape)
                images["images"] = np.stack([read(place) for place in range(count)])
        except (FileNotFoundError, ValueError):
            return None
        return images

    def _kept_file(self, stage: str) -> Path:
        return self.folder / LOW_RES_FOLDER / f"{stage}.npy"

    def _labels(self) -> np.ndarray | None:
        file = self.folder / LABELS_NAME
        return np.load(file) if file.exists() else None

    def _image_names(self) -> list[str]:
        return image_names(self.settings["num_images"], self._labels())

    # The whole set

    def assemble(self, make: Callable[[torch.Tensor], None]) -> None:
        """
        Turns all shards into what the folder is for, one shard at a time.

        Args:
            make: saves the shard of a micro-batch; called for damaged ones.
        """
        record = {"evaluations": {}, "seconds": 0.0, "num_processes": 0, "num_images": self.settings["num_images"]}
        micro_batches = {}

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for indices in self.micro_batches():
                try:
                    images, of_shard = self.load_shard(indices)
                except ValueError as error:
                    logger.warning(f"Made again: {error}")
                    make(indices)
                    images, of_shard = self.load_shard(indices)
                assert len(images["images"]) == len(indices)
                record["evaluations"] = of_shard["evaluations"]
                record["seconds"] += of_shard["seconds"]
                record["num_processes"] = max(record["num_processes"], of_shard["num_processes"])
                hashed = {"record": of_shard, "hash": _hash_of(images, of_shard)}
                micro_batches[self.shard(indices).stem] = hashed
                yield images

        self.write(batches(), record, micro_batches)

    def write(
        self,
        batches: Iterable[dict[str, np.ndarray]],
        record: dict[str, Any],
        micro_batches: dict[str, Any] | None = None,
    ) -> None:
        """
        The low-resolution stages and the images of `batches`, in their order, and a record (`results.json`) that is
        complete when the last batch has been drawn, as are the hashes of micro-batches. The images appear last: then
        the set is finished.
        """
        temporary, labels, count = temporary_name(self.final), self._labels(), self.settings["num_images"]
        kept = {name: self._kept_file(name) for name in self.settings["kept_stages"]}
        with self.writing():
            with ExitStack() as streams:
                batches = _storing({name: streams.enter_context(self._kept_stream(name)) for name in kept}, batches)
                if self.settings["image_format"] == "png":
                    pngs = write_pngs(temporary, batches, self._image_names())
                    hashes = {f"{IMAGES_FOLDER}/{name}": value for name, value in pngs.items()}
                else:
                    channels, *size = self.image_shape
                    write_npz(temporary, batches, (count, *size, channels), labels)
                    hashes = {NPZ_NAME: file_hash(temporary)}
            for file in kept.values():
                reveal(temporary_name(file), file)
            write_json(self.folder / RESULTS_NAME, record)
            others = [self.folder / name for name in (SETTINGS_NAME, LABELS_NAME, RESULTS_NAME)] + [*kept.values()]
            for file in filter(Path.exists, others):
                hashes[file.relative_to(self.folder).as_posix()] = file_hash(file)
            write_json(self.folder / HASHES_NAME, {"files": hashes, "micro_batches": micro_batches or {}})
            replace_folder(temporary, self.final) if temporary.is_dir() else reveal(temporary, self.final)
            shutil.rmtree(self.shards)

    def fill(self, batches: Iterable[dict[str, np.ndarray]], labels: torch.Tensor | None, task: str) -> None:
        """
        The whole set at once, of images that no network makes.

        Args:
            task: what is done, for the error that others get meanwhile.

        Raises:
            ValueError: another process is at work in the folder.
            OSError: as [`writing`].
        """
        with held(self.folder, task):
            self.prepare(labels)
            self.write(batches, {"evaluations": {}, "seconds": 0.0, "num_images": self.settings["num_images"]})

    @contextmanager
    def _kept_stream(self, stage: str) -> Iterator[BinaryIO]:
        file, size = self._kept_file(stage), self.settings["stages"][stage]
        file.parent.mkdir(exist_ok=True)
        with open(temporary_name(file), "wb") as stream:
            write_header(stream, np.float32, (self.settings["num_images"], self.settings["channels"], size, size))
            yield stream


def _storing(streams: dict[str, BinaryIO], batches: Iterable[dict[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """Appends the kept stages of each batch to their files; its images, uint8 (B, C, H, W)."""
    for batch in batches:
        for name, stream in streams.items():
            stream.write(np.ascontiguousarray(batch[name]))
        yield batch["images"]


def _hash_of(images: dict[str, np.ndarray], record: dict[str, Any]) -> str:
    """Of a micro-batch and its record."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(images):
        digest.update(f"{name} {images[name].dtype} {images[name].shape}".encode())
        digest.update(np.ascontiguousarray(images[name]))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------
# Low-resolution images: of an earlier run, and real ones
# ------------------------------------------------------------------------------------------------------------------


class LowResImages:
    """
    The output of one stage, kept by `cdm sample-set --keep_stages`.

    Args:
        folder: its `output_dir`.
        stage: the stage; by default the highest that was kept.

    Raises:
        ValueError: it did not finish or did not keep this stage, or a file is damaged.
    """

    def __init__(self, folder: str | Path, stage: str | None = None):
        samples = SampleFolder(folder)
        settings, kept = samples.settings, samples.settings.get("kept_stages", [])
        if not kept or stage not in (None, *kept):
            raise ValueError(
                f"`low_res_dir` {str(folder)!r} has kept the stages {kept}, not {stage or 'any'}: sample it with "
                "--keep_stages."
            )
        self.stage = stage or kept[-1]
        self.images, labels = samples.kept_stage(self.stage), samples.labels()
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.settings = {name: value for name, value in settings.items() if name != "about"}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Float32 (B, C, h, w) in [0, 1]."""
        return torch.from_numpy(self.images[indices.numpy()])


def store_real_images(
    folder: str | Path,
    dataset: Dataset,
    stage: str,
    size: int,
    num_images: int,
    seed: int,
    batch_size: int = 100,
    balanced: bool = False,
) -> None:
    """
    Real images averaged down to what `stage` makes, in a folder like that of `cdm sample-set --keep_stages`: for
    its `--low_res_dir`, to condition the next stage on ground truth (Table 3b).

    Args:
        dataset: items {"image": uint8 (C, R, R)}, with "label" for class-conditional stages.
        size: of the stage's images.
        num_images: number of images, drawn without replacement, by `seed`.
        balanced: whether labels are 0, 1, ..., K - 1, 0, 1, ..., as those of samples are.

    Raises:
        ValueError: there are fewer images, or the folder holds something else.
    """
    drawn = drawn_images(dataset, seed, balanced)
    if num_images > len(drawn):
        kind = "real images, as many of each label" if balanced else "real images"
        raise ValueError(f"`num_images` is {num_images}, but there are only {len(drawn)} {kind}.")
    settings = {
        "num_images": num_images,
        "batch_size": batch_size,
        "seed": seed,
        "stages": {stage: size},
        "channels": dataset[0]["image"].shape[0],
        "kept_stages": [stage],
        "image_format": "npz",
        "real_images": dataset.fingerprint(),
        **({"balanced": True} if balanced else {}),
    }
    store = SampleStore(folder, settings)
    store.check()
    if store.damage() is None:
        return
    images, labels = [], []
    for batch in DataLoader(Subset(dataset, drawn[:num_images].tolist()), batch_size):
        averaged = area_resize(to_float(batch["image"]), size)
        images.append({stage: to_unit(averaged).numpy(), "images": to_uint8(averaged).numpy()})
        labels.append(batch.get("label"))
    store.fill(images, None if labels[0] is None else torch.cat(labels), "storing real images")


def drawn_images(dataset: Dataset, seed: int, balanced: bool = False) -> torch.Tensor:
    """
    int64: the numbers of all images in random order; or, `balanced`, of as many of each of the K labels, in an order
    in which image i has label i mod K. Without labels there is nothing to balance.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    if not balanced or dataset.labels is None:
        return order
    labels = dataset.labels[order]
    of_labels = [order[labels == label] for label in range(int(labels.max()) + 1)]
    return torch.stack([images[: min(map(len, of_labels))] for images in of_labels], dim=1).flatten()
