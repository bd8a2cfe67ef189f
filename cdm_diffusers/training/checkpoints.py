"""Folders that are either complete or not there: training checkpoints, and what else must survive a crash."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NotRequired

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict

from ..files import errno_of, read_json, remove_folder
from ..options import NonNegativeInt


WEIGHTS_NAME, EMA_NAME = "model.safetensors", "ema.safetensors"
OPTIMIZER_NAME, SCALER_NAME = "optimizer.bin", "scaler.pt"
TEACHER_NAME = "teacher.safetensors"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENODEV)  # the last is safetensors' for a folder
DAMAGE = re.compile("PytorchStreamReader|corrupt|unexpected EOF|loading state_dict")  # PyTorch has no class for it


class Result(TypedDict):
    """What a checkpoint's `progress.json` says about it."""

    __pydantic_config__ = ConfigDict(extra="allow")

    step: NonNegativeInt
    loss: float | None


class Progress(Result):
    """What a run resumes from."""

    epoch: NonNegativeInt
    epoch_batches: NonNegativeInt
    ema_steps: NonNegativeInt
    lanes: NotRequired[list[dict[str, NonNegativeInt]]]  # of a stream, a `Place` each


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
            + (f'"latest" or one of {[str(path) for path in existing]}.' if existing else "another, or leave it out.")
        )
    return checkpoint


def last_good(output_dir: Path) -> str:
    """A sentence for error messages."""
    existing = checkpoints_in(output_dir)
    return f"The last good checkpoint is {existing[-1]}." if existing else "There is no checkpoint yet."


def how_to_go_on(output_dir: Path) -> str:
    """What to do when some processes of a run have ended."""
    return f"{last_good(output_dir)} Start all processes again, with `--resume_from_checkpoint latest`."


@contextmanager
def naming_last_good(output_dir: Path) -> Iterator[None]:
    """
    Around what a run does once it has started.

    Raises:
        OSError: the disk's, with a sentence about the last good checkpoint.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not a disk's
            raise
        said = error.strerror
        if said == os.strerror(error.errno):
            said = f"{error.filename or str(output_dir)!r}: {said}."
        raise OSError(error.errno, f"{said} {last_good(output_dir)}") from error


@contextmanager
def loading(checkpoint: Path) -> Iterator[None]:
    """
    Around everything that reads `checkpoint`.

    Raises:
        ValueError: if a file is missing or damaged; lists the other checkpoints.
        OSError: if the machine prevents it: its memory, its disk, its limits or its permissions.
    """
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, MemoryError, UnpicklingError, SafetensorError) as e:
        number = obstacle(e, checkpoint)
        if number is not None:
            raise OSError(
                number,
                f"`resume_from_checkpoint` is {str(checkpoint)!r}, which could not be read here: "
                f"{os.strerror(number)}. Nothing is known to be wrong with it: keep it, and resume once that is "
                "fixed.",
            ) from e
        if isinstance(e, RuntimeError) and not DAMAGE.search(str(e)):
            raise
        others = [str(path) for path in checkpoints_in(checkpoint.parent) if path != checkpoint]
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which is incomplete or damaged ({e}): remove it. "
            f"The other checkpoints beside it are {others}."
        ) from e


def obstacle(error: Exception, checkpoint: Path) -> int | None:
    """The errno of what kept `checkpoint` from being read, None where that was the checkpoint itself."""
    number = errno_of(error)
    if number is None or number in MISSING:
        try:  # safetensors reports everything it cannot open as missing
            for path in checkpoint.rglob("*"):
                if path.is_file():
                    path.open("rb").close()
        except OSError as refusal:
            number = refusal.errno
    return None if number in MISSING else number


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The resolved configuration and the progress of `checkpoint`.

    Raises:
        ValueError: as [`loading`].
    """
    with loading(checkpoint):
        saved = read_json(checkpoint / "training_config.json", dict[str, Any], "training")
        return saved, read_json(checkpoint / "progress.json", Progress, "training")


@dataclass
class TrainingState:
    """
    All tensors of a run, whole, whatever the number of processes.

    Args:
        weights, averages: of the network, by the names of its parameters.
        optimizer: its `state_dict`.
        scaler: that of the gradient scaler, None without one.
        teacher: weights of the student that a distillation learns from; None for other runs.
    """

    weights: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    teacher: dict[str, torch.Tensor] | None = None


def write_state(folder: Path, state: TrainingState) -> None:
    """Writes a new folder with the files of `state`."""
    folder.mkdir(parents=True)
    files = {WEIGHTS_NAME: state.weights, EMA_NAME: state.averages, TEACHER_NAME: state.teacher}
    for name, tensors in files.items():
        if tensors is not None:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
    torch.save(state.optimizer, folder / OPTIMIZER_NAME)
    if state.scaler is not None:
        torch.save(state.scaler, folder / SCALER_NAME)


def read_state(folder: Path, has_scaler: bool) -> TrainingState:
    """What [`write_state`] wrote, and what accelerate wrote in earlier versions."""
    return TrainingState(
        weights=load_file(folder / WEIGHTS_NAME),
        averages=load_file(folder / EMA_NAME),
        optimizer=torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True),
        scaler=torch.load(folder / SCALER_NAME, weights_only=True) if has_scaler else None,
        teacher=load_file(folder / TEACHER_NAME) if (folder / TEACHER_NAME).exists() else None,
    )


def rotate(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Keeps the `limit` last checkpoints up to `newest`, which has just been saved."""
    if limit is not None:
        older = [path for path in checkpoints_in(output_dir) if step_of(path) <= step_of(newest)]
        for path in older[:-limit]:
            remove_folder(path)
