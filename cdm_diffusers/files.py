"""Files and folders that are either complete or not there."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from .locks import locked


TEMPORARY_PREFIX = ".tmp-"
REPLACED_PREFIX = f"{TEMPORARY_PREFIX}replaced-"  # of whole folders, needed until their successors are there
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Of disks, memory, limits and permissions; texts of libraries also name others, such as those of connections.
TOLD_BY_TEXT = (
    *NO_SPACE,
    *(errno.EIO, errno.EROFS, errno.EFBIG, errno.ENODEV, errno.ESTALE),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM),
)
PROBE_SIZE = 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Complete or not there


def replace_folder(temporary: Path, final: Path) -> None:
    """
    Makes a complete folder visible under its name. The old folder of that name is removed only once the new one is on
    disk; if a kill leaves neither in place, [`remove_temporaries`] brings the old one back.
    """
    sync_to_disk(temporary)
    replaced = final.with_name(f"{REPLACED_PREFIX}{final.name}")
    is_replaced = final.exists()
    if is_replaced:
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if is_replaced:
        remove_folder(replaced, final.name)


def remove_folder(folder: Path, name: str | None = None) -> None:
    """Renames it first: a removal that is interrupted must not leave half a folder under a name with a meaning."""
    removed = folder.with_name(f"{TEMPORARY_PREFIX}removed-{name or folder.name}")
    os.rename(folder, removed)
    shutil.rmtree(removed)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` beside `path` first, so that the file is never half there."""
    temporary = temporary_name(path)
    with removed_on_failure(temporary):
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        reveal(temporary, path)


def read_json(path: Path, kind: type, writer: str, remedy: str = "") -> dict[str, Any]:
    """
    The object in a JSON file.

    Args:
        kind: a `TypedDict` of what is needed of it; further names are returned as well.
        writer: what writes such files.
        remedy: ends the message, where the caller adds nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON, or not of this kind; names the first thing that is wrong.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"`{'.'.join(map(str, first['loc']))}`: " for _ in first["loc"][:1])
        problem = f"{str(path)!r} was not written by {writer}, or is damaged ({place}{first['msg']})"
        raise ValueError(f"{problem}: {remedy}" if remedy else problem) from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def remove_temporaries(output_dir: Path, prefix: str = TEMPORARY_PREFIX) -> None:
    """Removes what an interrupted run left behind, except for a folder that it was just replacing."""
    for path in output_dir.glob(f"{prefix}*"):
        final = output_dir / path.name.removeprefix(REPLACED_PREFIX)
        if path.name.startswith(REPLACED_PREFIX) and not final.exists():
            os.rename(path, final)
            sync_folder(output_dir)
        else:
            remove(path)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


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
def held(folder: Path, task: str) -> Iterator[None]:
    """A folder that is [`locked`], and cleared of what a killed run has left there."""
    with locked(folder, task) as is_locked_now:
        if is_locked_now:
            remove_temporaries(folder)
        yield


@contextmanager
def staged_folder(output_dir: Path) -> Iterator[Path]:
    """
    A new, empty folder whose content is moved into `output_dir` once the block has filled it; it never stays.

    Raises:
        ValueError: as [`locked`].
        OSError: as [`writing`].
    """
    temporary = temporary_name(output_dir / "pipeline")
    with held(output_dir, "saving a pipeline"), writing("The pipeline", temporary):
        temporary.mkdir()
        yield temporary
        publish(temporary, output_dir)
        temporary.rmdir()


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
    """This process's own: another one that works in the same folder by mistake never writes to the same file."""
    return final.with_name(f"{own_prefix()}{final.name}")


def own_prefix() -> str:
    """What the names of this process's temporary files begin with."""
    return f"{TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-"


def reveal(temporary: Path, final: Path) -> None:
    """Gives a temporary file its name, once it is on disk."""
    sync_file(temporary)
    os.rename(temporary, final)
    sync_folder(final.parent)


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


@contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """Around what fills the file or folder `temporary`, which is removed if that fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise


@contextmanager
def writing(what: str, temporary: Path) -> Iterator[None]:
    """
    [`removed_on_failure`] that says what could not be written, and where.

    Raises:
        OSError: with the errno of the disk's refusal, whichever library was writing and whatever it made of that.
    """
    with removed_on_failure(temporary):
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = temporary.parent
            number = errno_of(error) or _refusal_to_write(folder)
            if number is None:
                raise
            remedy = " Make room there first." if number in NO_SPACE else ""
            sentence = f"{what} could not be saved in {str(folder)!r}: {os.strerror(number)}.{remedy}"
            raise OSError(number, sentence) from error


def errno_of(error: Exception) -> int | None:
    """The number behind an error, which libraries in other languages put only into its text, if at all."""
    if getattr(error, "errno", None) is not None:
        return error.errno
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, of accelerators
        return errno.ENOMEM
    return next((number for number in TOLD_BY_TEXT if os.strerror(number) in str(error)), None)


def _refusal_to_write(folder: Path) -> int | None:
    """Why a file in `folder` cannot grow, found out by trying, since PyTorch does not say."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_SIZE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None
