"""One run at a time in a folder."""

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


LOCK_NAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without locks
_locked: dict[Path, int] = {}  # the locked files of this process, and their descriptors


@contextmanager
def locked(folder: Path, task: str) -> Iterator[bool]:
    """
    Keeps other processes out of `folder`, which is made if need be. The lock is the kernel's, on this host and on
    others with the same file system: it ends with the process that holds it, which may enter it again meanwhile. On a
    file system without locks, a warning takes its place.

    Args:
        task: what is done there, for the error that others get.

    Yields:
        `bool`: whether this call has taken the folder, so that nobody else should be at work there; False within
        another call of this process.

    Raises:
        ValueError: another process has it; says which. Or another user's process had it and was killed. Or it is a
            file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file, where a folder is to be written; give another name.")
    file = folder.resolve() / LOCK_NAME
    if file in _locked:
        yield False
        return
    is_new = not folder.exists()
    _locked[file] = lock = _lock(folder, task)
    try:
        yield True
    finally:
        if _locked.pop(file, None) is not None:  # else this is a child that was forked meanwhile
            if _is_open_as(lock, file):
                file.unlink()  # while it is locked, see _lock
            os.close(lock)
            if is_new:
                with contextlib.suppress(OSError):  # not if anything is in it
                    folder.rmdir()


def _lock(folder: Path, task: str) -> int:
    """A descriptor of the locked and signed file in `folder`; it is not locked where the file system has no locks."""
    file = folder.resolve() / LOCK_NAME
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the holder of a moment ago has removed the folder again
            continue
        except PermissionError:
            if not file.exists():
                raise
            raise ValueError(
                f"{str(folder)!r} cannot be locked, since {LOCK_NAME!r} in it belongs to another user: have it "
                "removed if no run of theirs is at work there, or choose another folder."
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                sentence = f"{str(folder)!r} cannot be locked ({error.strerror}): do not start a second run in it."
                warnings.warn(sentence, stacklevel=2)
                return lock
            holder = _signature(lock) or "by an unknown process"
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(
                f"{str(folder)!r} is in use {holder}: wait until that has ended, or choose another folder."
            ) from None
        if _is_open_as(lock, file):
            _sign(lock, task)
            return lock
        os.close(lock)  # its holder has removed it, and another process may have locked a new one


def _is_open_as(descriptor: int, file: Path) -> bool:
    """Whether `file` is still the name of what was opened under it."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _sign(lock: int, task: str) -> None:
    """Writes into the file who has locked it, unless the disk is full."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    signature = f"for {task} by process {os.getpid()} on {socket.gethostname()} since {since}"
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, signature.encode(), 0)


def _signature(lock: int) -> str:
    """What [`_sign`] wrote; empty if even reading is locked, as on SMB."""
    with contextlib.suppress(OSError):
        return os.pread(lock, 1000, 0).decode(errors="replace")
    return ""


def _leave_to_parent() -> None:
    """A forked process, such as a data loader's, does not keep locks alive when the one that took them is killed."""
    for lock in _locked.values():
        os.close(lock)
    _locked.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
