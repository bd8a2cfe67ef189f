"""Files and folders that are either complete or not there."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


TEMPORARY_PREFIX = ".tmp-"


def replace_folder(temporary: Path, final: Path) -> None:
    """Makes a complete folder visible under its name. What had that name goes only when the new one is on disk."""
    sync_to_disk(temporary)
    if final.exists():
        replaced = final.with_name(f"{TEMPORARY_PREFIX}replaced-{final.name}")
        os.rename(final, replaced)
        os.rename(temporary, final)
        shutil.rmtree(replaced)
    else:
        os.rename(temporary, final)
    sync_folder(final.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` beside `path` first, so that the file is never half there."""
    temporary = temporary_name(path)
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    reveal(temporary, path)


def remove_temporaries(output_dir: Path) -> None:
    """What an interrupted run left behind."""
    for path in output_dir.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_to_disk(folder: Path) -> None:
    """Makes sure that a folder and all in it are on disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(parent) / name)
        sync_folder(Path(parent))


def sync_file(path: Path) -> None:
    """Makes sure that a file is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes sure that the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged_folder(output_dir: Path) -> Iterator[Path]:
    """A new, empty folder that is emptied into `output_dir` once the block has filled it, and never stays."""
    temporary = output_dir / f"{TEMPORARY_PREFIX}pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, output_dir: Path) -> None:
    """
    Moves a complete pipeline folder to its final place part by part. `model_index.json`, without which nothing loads,
    goes first and comes back last: an interruption leaves no folder that half loads.
    """
    sync_to_disk(temporary)
    index = output_dir / "model_index.json"
    index.unlink(missing_ok=True)
    for part in sorted(temporary.iterdir(), key=lambda part: part.name == index.name):
        final = output_dir / part.name
        if final.is_dir():
            shutil.rmtree(final)
        os.rename(part, final)
    sync_folder(output_dir)


def temporary_name(final: Path) -> Path:
    """Of this process: another that works in the same folder by mistake never writes to the same file."""
    return final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{final.name}")


def reveal(temporary: Path, final: Path) -> None:
    """A file that is on disk gets its name."""
    sync_file(temporary)
    os.rename(temporary, final)
    sync_folder(final.parent)
