"""Foreign checkpoint files, opened without ever running what is in them."""

import re
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


SHARD_NAME = re.compile(r"-\d+-of-\d+\.|\.index\.json$")
READABLE_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # of compression, in torch's archives
UNFINISHED_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".tmp", ".aria2")


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    r"""
    The tensors of a checkpoint file: a plain PyTorch state dict (`.pt`, `.pth`, `.bin`) or safetensors.

    PyTorch files are opened with `weights_only=True`, and mapped rather than read where their format allows it (an
    archive that was not compressed later), so that tensors take memory only as they are used.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        `dict[str, torch.Tensor]`: tensors by name, on the CPU.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the file is cut off, damaged, encrypted, a shard, a web page, not a state dict, or asks for code
            to be run.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`checkpoint` is {str(path)!r}, which is not there: check the path.")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the checkpoint file.")
    if SHARD_NAME.search(path.name):
        raise ValueError(f"{path.name} is one part of a sharded checkpoint; it must be joined to a single file first.")
    if path.suffix in UNFINISHED_SUFFIXES:
        raise ValueError(f"{path.name} is an unfinished download, by its name: let it finish first.")
    start = _first_bytes(path)
    state_dict = _read_safetensors(path) if start[8:9] == b"{" else _read_torch(path, start)
    return _check_state_dict(path, state_dict)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path.name} is empty: the download failed.")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path.name} is a Git LFS pointer, not the checkpoint itself: run `git lfs pull`.")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError(
            f"{path.name} is a web page or a server's error message (HTML or XML), not a checkpoint: look at it, "
            "and download again."
        )
    return start


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is cut off or damaged ({error}): download it again.") from error


def _read_torch(path: Path, start: bytes) -> dict[str, torch.Tensor]:
    is_mapped = start.startswith(b"PK") and _check_zip(path) == {zipfile.ZIP_STORED}
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except UnpicklingError as error:
        # the name of what the pickle wanted to call stands in torch's message
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is not None:
            raise ValueError(
                f"{path.name} is refused: besides tensors its pickle asks for {wanted.group(1)!r}, and loading it "
                "would run that. A plain state dict never does. Take the file from its publisher, or a safetensors "
                "version of it."
            ) from error
        raise ValueError(
            f"{path.name} is not a checkpoint of tensors, or is cut off or damaged ({_first_sentence(error)})."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path.name} is not a plain PyTorch checkpoint, or is cut off or damaged ({_first_sentence(error)}): "
            "compare its size with the publisher's, and download it again."
        ) from error


def _check_zip(path: Path) -> set[int]:
    """
    The methods by which entries are compressed. A file that is cut off has lost its directory, one with holes in it
    fails the checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            encrypted = any(entry.flag_bits & 1 for entry in archive.infolist())
            methods = {entry.compress_type for entry in archive.infolist()}
            is_readable = not encrypted and methods <= READABLE_METHODS
            damaged = archive.testzip() if is_readable else None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path.name} is cut off (a download that did not finish, or one part of a split file): its "
            f"{path.stat().st_size:,} bytes end without a table of contents. Download it again, or join its parts."
        ) from error
    if encrypted:
        raise ValueError(f"{path.name} is an encrypted archive: unpack it with its password and give what is inside.")
    if damaged is not None:
        raise ValueError(f"{path.name} is damaged: the checksum of its {damaged!r} is wrong. Download it again.")
    if not methods <= READABLE_METHODS:
        raise ValueError(
            f"{path.name} is an archive that was compressed by a method that torch does not read: unpack it, and give "
            "what is inside, or pack that again without compression (`zip -0`)."
        )
    return methods


def _check_state_dict(path: Path, state_dict) -> dict[str, torch.Tensor]:
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError(f"{path.name} holds a {type(state_dict).__name__}; expected a state dict of named tensors.")
    if "optimizer" in state_dict:
        raise ValueError(
            f"{path.name} holds the state of an optimizer: the weights are in another file (for SR3 the one that "
            "ends in `_gen.pth`)."
        )
    for name, value in state_dict.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise ValueError(
                f"{path.name} is not a plain state dict: its entry {name!r} is a {type(value).__name__}. Save "
                "the state dict of the network by itself first."
            )
        if value.is_meta:
            raise ValueError(f"{path.name} has names and shapes, but no numbers ({name!r} is on the meta device).")
    return state_dict


def _first_sentence(error: Exception) -> str:
    """Without what torch says next: that the file would open if code in it were allowed to run."""
    return (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
