"""Folders that are either complete or not there: training checkpoints, and what else must survive a crash."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from ..files import TEMPORARY_PREFIX


EMA_NAME = "ema.safetensors"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was saved after."""
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name).group(1))


def checkpoint_to_resume(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """
    The folder that `resume_from_checkpoint` means; None starts a new run.

    Raises:
        ValueError: if the folder is not a checkpoint, or a new run would mix with the checkpoints of an earlier one.
    """
    existing = checkpoints_in(output_dir)
    if resume_from_checkpoint is None:
        if existing:
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds the checkpoints of an earlier run, the last of them "
                f"{existing[-1].name}: add `--resume_from_checkpoint latest`, or choose another folder."
            )
        return None
    if resume_from_checkpoint == "latest":
        return existing[-1] if existing else None
    checkpoint = Path(resume_from_checkpoint)
    if not (checkpoint / "progress.json").is_file():
        raise ValueError(
            f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, which is not a checkpoint of this package: give "
            f'"latest" or one of {[str(path) for path in existing]}.'
        )
    return checkpoint


def last_good(output_dir: Path) -> str:
    """A sentence for error messages."""
    existing = checkpoints_in(output_dir)
    return f"The last good checkpoint is {existing[-1]}." if existing else "There is no checkpoint yet."


@contextmanager
def saving(what: str, temporary: Path) -> Iterator[None]:
    """
    Around everything that writes into `temporary`: a failure (a full disk, say) removes it and says what is left.

    Raises:
        OSError: naming the last good checkpoint, from the error of whichever library was writing.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"{what} could not be saved ({error}). {last_good(temporary.parent)}") from error


@contextmanager
def loading(checkpoint: Path) -> Iterator[None]:
    """
    Around everything that reads `checkpoint`.

    Raises:
        ValueError: if a file is missing or damaged; lists the other checkpoints.
    """
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
        others = [str(path) for path in checkpoints_in(checkpoint.parent) if path != checkpoint]
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which is incomplete or damaged ({error}): remove it. "
            f"The other checkpoints beside it are {others}."
        ) from error


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The resolved configuration and the progress of `checkpoint`.

    Raises:
        ValueError: as [`loading`].
    """
    with loading(checkpoint):
        saved = json.loads((checkpoint / "training_config.json").read_text())
        return saved, json.loads((checkpoint / "progress.json").read_text())


def rotate(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Keeps the `limit` last checkpoints up to `newest`, which has just been saved."""
    if limit is not None:
        older = [path for path in checkpoints_in(output_dir) if step_of(path) <= step_of(newest)]
        for path in older[:-limit]:
            # Renamed first: a removal that is interrupted must not leave half a checkpoint under its name.
            removed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
            os.rename(path, removed)
            shutil.rmtree(removed)
