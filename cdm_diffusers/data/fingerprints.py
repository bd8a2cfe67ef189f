"""What tells training images from others, found in seconds however many there are and wherever they lie."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from .config import DataConfig
from .memory import ImageData, hash_of
from .sources import DecodedRows
from .survey import spread


MOST_CONTENTS = 1_000  # files or rows whose content counts
MOST_BYTES = 2**30  # that are read in all, unless many files are large:
FEWEST_BYTES = 2**22  # so many of each are always read
BLOCK = 2**20


def identity_of(data: ImageData, config: DataConfig) -> dict[str, Any]:
    """
    What tells `data`, as `config` has opened it, from other images; JSON:

        kind        "files", "rows" of a data set, or "stream"
        number      of the files or rows
        names       a hash of the files' names, from the folder of them all
        sizes       a hash of the files' sizes, in bytes
        labels      a hash of the labels of all images
        contents    hashes of at most 1,000 files or rows at equal distances, by name
        revision    of a data set that is streamed from the Hub
    """
    if data.files:
        identity = _of_files(data.root, [path.as_posix() for path in data.files])
    elif data.is_stream:
        identity = _of_stream(config.dataset_name, config.dataset_revision)
    else:
        identity = _of_rows(data.dataset)
    if not data.is_stream and data.dataset.labels is not None:
        identity["labels"] = hash_of(data.dataset.labels.tolist())
    return identity


def commit_of(name: str, revision: str | None) -> str:
    """
    The commit, 40 hexadecimal digits, that a branch or tag of a data set of the Hub is at now; by default its newest.

    Raises:
        ValueError: there is no such revision.
    """
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision  # without asking, since it may be cached
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except RevisionNotFoundError as error:
        raise ValueError(
            f"`dataset_revision` is {revision!r}; it must be a branch, tag or commit of {name}: check its spelling."
        ) from error


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same in two identities, for a sentence; most telling first."""
    kind = saved["kind"]
    if kind != now["kind"]:
        return [f"kind of source ({kind} in the checkpoint, {now['kind']} now)"]
    found = [
        f"{name} ({saved[name]!r} in the checkpoint, {now[name]!r} now)"
        for name in ("number", "revision")
        if name in saved and saved[name] != now[name]
    ]
    before, after = saved.get("contents", {}), now.get("contents", {})
    if saved.get("names") != now.get("names"):
        lost = next(iter(sorted(before.keys() - after.keys())), None)
        is_complete = max(saved["number"], now["number"]) <= MOST_CONTENTS
        found.append(f"names ({lost!r} is not there now)" if is_complete and lost else "names")
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    if changed:
        found.append(f"content of {len(changed)} of {len(before)} {kind} compared, such as {changed[0]!r}")
    elif saved.get("sizes") != now.get("sizes") and not found:
        found.append("sizes of files")
    if saved.get("labels") != now.get("labels"):
        found.append("labels")
    return found


def _of_files(root: Path, names: list[str]) -> dict[str, Any]:
    names = sorted(names)
    sizes = [os.stat(root / name).st_size for name in names]
    compared = [names[index] for index in spread(range(len(names)), MOST_CONTENTS)]
    most = max(MOST_BYTES // max(len(compared), 1), FEWEST_BYTES)
    contents = _by_name(compared, lambda name: _hash_of_file(root / name, most))
    return {
        "kind": "files",
        "number": len(names),
        "names": hash_of(names),
        "sizes": hash_of(sizes),
        "contents": contents,
    }


def _of_rows(dataset: DecodedRows) -> dict[str, Any]:
    indices = spread(range(len(dataset)), MOST_CONTENTS)
    rows = dict(zip((f"row {index}" for index in indices), dataset.rows.__getitems__(indices), strict=True))

    def hash_of_row(name: str) -> str | None:
        image = rows[name][dataset.decode.image_column]
        if image is None or image["bytes"] is None:
            return None if image is None else _hash_of_file(Path(image["path"]), MOST_BYTES)
        return hashlib.sha256(image["bytes"]).hexdigest()

    return {"kind": "rows", "number": len(dataset), "contents": _by_name(rows, hash_of_row)}


def _of_stream(name: str, revision: str | None = None) -> dict[str, Any]:
    if Path(name).is_dir():
        files = [path.relative_to(name).as_posix() for path in Path(name).rglob("*") if path.is_file()]
        return _of_files(Path(name), [file for file in files if not file.startswith(".")])
    return {"kind": "stream", "revision": commit_of(name, revision)}


def _by_name(names: Iterable[str], hash_of_content: Callable[[str], str | None]) -> dict[str, str | None]:
    """In threads, since most of the time goes into waiting for files."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(hash_of_content, names), strict=True))


def _hash_of_file(path: Path, most: int) -> str:
    """SHA-256 of a file; of one with more than `most` bytes, of that many in blocks at equal distances."""
    digest, size = hashlib.sha256(), path.stat().st_size
    places = range(0, size, BLOCK)
    if size > most:
        places = np.linspace(0, size - BLOCK, most // BLOCK).astype(int).tolist()
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
