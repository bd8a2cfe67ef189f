"""Hashes of a finished folder of samples, against which every file that is read from it is checked."""

import hashlib
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ..files import file_hash, read_json


HASHES_NAME = "hashes.json"
REMEDY = "start the command that made the samples again, and it makes what is missing or damaged."


class MicroBatch(TypedDict):
    """How a micro-batch was made, and the hash of this record and of its images."""

    record: dict[str, Any]
    hash: str


class Hashes(TypedDict):
    """What is in `hashes.json`: hashes of files by their paths, and micro-batches by the names of their shards."""

    files: dict[str, str]
    micro_batches: dict[str, MicroBatch]


class FolderHashes:
    """
    The hashes of a folder. Folders of earlier versions have none: what is in those is taken as it is.

    Args:
        folder: an `output_dir` of `cdm sample-set`.

    Raises:
        ValueError: `hashes.json` is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, file = folder, folder / HASHES_NAME
        self.are_known = file.is_file()
        known = read_json(file, Hashes, "cdm sample-set", REMEDY) if self.are_known else {}
        self.files: dict[str, str] = known.get("files", {})
        self.micro_batches: dict[str, MicroBatch] = known.get("micro_batches", {})

    def read(self, name: str) -> bytes:
        """The content of the file `name` below the folder; ValueError if it is missing, or not what was written."""
        self._check_there(name)
        content = (self.folder / name).read_bytes()
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def check(self, name: str) -> None:
        """As [`read`] checks it, whatever its size."""
        self._check_there(name)
        if self.are_known:
            self._compare(name, file_hash(self.folder / name))

    def _check_there(self, name: str) -> None:
        if not (self.folder / name).is_file():
            raise ValueError(f"{str(self.folder / name)!r} is missing: {REMEDY}")

    def _compare(self, name: str, found: str) -> None:
        if self.are_known and self.files.get(name) != found:
            raise ValueError(f"{str(self.folder / name)!r} is not what was written (its hash differs): {REMEDY}")
