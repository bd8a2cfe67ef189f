"""Folders that are complete or not there, whatever ends the process, and that one process at a time writes to."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import torch
from forkserver import FORKSERVER

from cdm_diffusers import locks
from cdm_diffusers.files import errno_of, held, remove_temporaries, replace_folder, staged_folder, write_json, writing
from cdm_diffusers.locks import LOCK_NAME


class Killed(BaseException):
    """What stands for SIGKILL here: nothing of ours handles it."""


def kill_before(monkeypatch, name, count):
    """The `count`-th call of a function of `os` or `shutil` does not happen, and nothing after it."""
    module = shutil if hasattr(shutil, name) else os
    function, calls = getattr(module, name), []

    def counting(*args, **options):
        calls.append(args)
        if len(calls) == count:
            raise Killed
        return function(*args, **options)

    monkeypatch.setattr(module, name, counting)


def folder_of(path, content):
    path.mkdir()
    (path / "content").write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "count"), [("rename", 1), ("rename", 2), ("rename", 3), ("rmtree", 1), ("unlink", 1), ("rmdir", 1)]
)
def test_a_folder_is_there_wherever_its_replacement_is_killed(name, count, tmp_path):
    final = folder_of(tmp_path / "checkpoint-4", "old")
    new = folder_of(tmp_path / ".tmp-checkpoint-4", "new")
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        kill_before(monkeypatch, name, count)
        replace_folder(new, final)
    remove_temporaries(tmp_path)
    expected = "old" if (name, count) in (("rename", 1), ("rename", 2)) else "new"
    assert [path.name for path in tmp_path.iterdir()] == [final.name]
    assert (final / "content").read_text() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


SMALL_DISK = 8192


def grow_on_a_full_disk(write, folder):
    """Runs `write` where files end at 8 KiB, in this process, as the kernel refuses: errno 27, "File too large"."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, limits[1]))
    try:
        with writing("The picture", folder / ".tmp-x"):
            write(folder / ".tmp-x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("library", ["numpy", "torch", "safetensors"])
def test_a_full_disk_is_named_whichever_library_writes(library, tmp_path):
    from safetensors.numpy import save_file

    zeros = np.zeros(10_000)
    write = {
        "numpy": lambda file: file.write_bytes(bytes(100_000)),
        "torch": lambda file: torch.save(torch.from_numpy(zeros), file),
        "safetensors": lambda file: save_file({"x": zeros}, file),
    }[library]
    with pytest.raises(OSError, match=f"The picture could not be saved in '{tmp_path}': File too large") as refusal:
        grow_on_a_full_disk(write, tmp_path)
    assert refusal.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_errors_that_are_not_the_disks_pass(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"), writing("The picture", tmp_path / ".tmp-x"):
        (tmp_path / ".tmp-x").write_text("half")
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not list(tmp_path.iterdir())


def test_a_connection_is_not_a_disk(tmp_path):
    with pytest.raises(RuntimeError, match="reset by peer"), writing("The picture", tmp_path / ".tmp-x"):
        raise RuntimeError(f"gloo: {os.strerror(errno.ECONNRESET)}")
    assert errno_of(RuntimeError(f"torch: {os.strerror(errno.ENOSPC)}")) == errno.ENOSPC


def test_no_space_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = r"pipeline could not be saved in .*: No space left on device\. Make room there first"
    with pytest.raises(OSError, match=message) as refusal, staged_folder(tmp_path) as folder:
        (folder / "part").write_text("x")
    assert refusal.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# One process at a time


def hold(folder, pipe, forks=False):
    """Holds `folder` until told to go on, with or without a child that outlives it."""
    with held(folder, "a test"):
        if forks:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        pipe.send((os.getpid(), child if forks else None))
        pipe.recv()


@contextlib.contextmanager
def holder(folder, forks=False):
    """A process that holds `folder`, a child of it, and the way to let it go on."""
    ours, theirs = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=hold, args=(folder, theirs, forks))
    process.start()
    child = None
    try:
        child = ours.recv()[1]
        yield process, ours
    finally:
        process.kill()
        process.join()
        if child is not None:
            os.kill(child, signal.SIGKILL)


def test_a_held_folder_is_refused_with_the_name_of_its_holder(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as (process, pipe):
        (folder / ".tmp-of-the-holder").write_text("x")
        message = f"run' is in use for a test by process {process.pid} on {socket.gethostname()} since 20"
        with pytest.raises(ValueError, match=message), held(folder, "another"):
            pass
        with pytest.raises(ValueError, match=message), staged_folder(folder):
            pass
        assert (folder / ".tmp-of-the-holder").exists()
        pipe.send(None)
        process.join()
    assert [path.name for path in folder.iterdir()] == [".tmp-of-the-holder"]
    with held(folder, "another"):
        assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
        with held(folder, "a part of that"):  # by the same process
            pass
        assert (folder / LOCK_NAME).exists()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("forks", [False, True])
def test_a_killed_holder_holds_nothing(forks, tmp_path):
    """Nor do its children, which outlive it."""
    with holder(tmp_path / "run", forks) as (process, _):
        process.kill()
        process.join()
        with held(tmp_path / "run", "another"):
            pass
    assert not list((tmp_path / "run").iterdir())


def count_up(folder, count):
    """Adds one to a number in a file, without care for others who do so; waits for its turn."""
    for _ in range(count):
        while True:
            try:
                with held(folder, "counting"):
                    file = folder / "number"
                    number = int(file.read_text())
                    time.sleep(0.001)
                    file.write_text(str(number + 1))
                break
            except ValueError as error:
                assert "is in use" in str(error)
                time.sleep(0.0005)


def test_taking_turns(tmp_path):
    """The file is removed at the end of each turn: of those who wait for it, none holds one that has no name."""
    (tmp_path / "number").write_text("0")
    processes = [FORKSERVER.Process(target=count_up, args=(tmp_path, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "number").read_text() == "200"


def refusal(number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    (tmp_path / ".tmp-of-a-killed-run").write_text("x")
    monkeypatch.setattr(locks.fcntl, "flock", refusal(errno.ENOLCK))
    with pytest.warns(UserWarning, match="cannot be locked .*: do not start a second run"), held(tmp_path, "a test"):
        assert not (tmp_path / ".tmp-of-a-killed-run").exists()
        (tmp_path / ".tmp-of-this-run").write_text("x")
        with held(tmp_path, "a part of that"):
            assert (tmp_path / ".tmp-of-this-run").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-of-this-run"]


def test_a_lock_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", refusal(errno.EWOULDBLOCK))
    monkeypatch.setattr(locks.os, "pread", refusal(errno.EACCES))
    message = "is in use by an unknown process: wait"
    with pytest.raises(ValueError, match=message), held(tmp_path, "a test"):
        pass


def test_a_lock_of_another_user(tmp_path, monkeypatch):
    (tmp_path / LOCK_NAME).write_text("")
    monkeypatch.setattr(locks.os, "open", refusal(errno.EACCES))
    with pytest.raises(ValueError, match=r"'\.lock' in it belongs to another user"), held(tmp_path, "a test"):
        pass


def test_a_file_in_the_place_of_a_folder_stays(tmp_path):
    (tmp_path / "output").write_text("mine")
    message = "is a file, where a folder is to be written; give another name"
    with pytest.raises(ValueError, match=message), staged_folder(tmp_path / "output"):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
