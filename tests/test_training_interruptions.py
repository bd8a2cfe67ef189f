"""What befalls runs from outside: other runs, kills, signals, the machine's limits, other data."""

import errno
import fcntl
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import load_dataset
from forkserver import FORKSERVER
from PIL import Image
from safetensors.torch import load_file, save_file
from test_files import holder
from test_sources import write_rows
from test_training_loop import (
    BASE,
    EXACT,
    assert_same_run,
    images,  # noqa: F401
    run,
    run_in_processes,
    train_here,
    unbroken,  # noqa: F401
)

from cdm_diffusers.data import fingerprints, sources
from cdm_diffusers.locks import LOCK_NAME
from cdm_diffusers.options import errors_as_lines
from cdm_diffusers.processes import Stopped
from cdm_diffusers.training import loop
from cdm_diffusers.training.checkpoints import loading
from cdm_diffusers.training.loop import Trainer
from cdm_diffusers.training.same_data import check_same_data
from cdm_diffusers.training.sharding import load_optimizer
from cdm_diffusers.training.signals import ONE_WISH, STOPPING, Interrupted, StopSignals


@pytest.fixture
def options(images, tmp_path):  # noqa: F811
    """A run of six steps in `tmp_path`."""
    return BASE | EXACT | {"train_data_dir": str(images), "output_dir": str(tmp_path)}


# ---------------------------------------------------------------------------------------------------------------------
# Other runs


def find_lock_taken():
    """While a run reads, trains and saves its pipeline, nobody else gets the lock of its folder."""

    def watched(function):
        def wrapper(*args, **kwargs):
            with open(wrapper.folder / LOCK_NAME, "a") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return function(*args, **kwargs)

        return wrapper

    def checkpoint_to_resume(resume_from_checkpoint, output_dir):
        for function in watching:
            function.folder = output_dir
        return watching[0](resume_from_checkpoint, output_dir)

    watching = [watched(loop.checkpoint_to_resume), watched(Trainer.optimizer_step), watched(loop.save_pipeline)]
    loop.checkpoint_to_resume, Trainer.optimizer_step, loop.save_pipeline = checkpoint_to_resume, *watching[1:]


def test_a_run_holds_its_folder_from_start_to_end(options, tmp_path):
    run(options, find_lock_taken)
    assert not (tmp_path / LOCK_NAME).exists() and (tmp_path / "model_index.json").exists()


def test_a_second_run_is_refused(options, unbroken, tmp_path):  # noqa: F811
    """Before it reads, cleans or writes anything; by all of its processes at once."""
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    with holder(tmp_path) as (process, _):
        (tmp_path / ".tmp-checkpoint-6").mkdir()
        for start in (run, partial(run_in_processes, 2)):
            with pytest.raises(ValueError, match=f"is in use for a test by process {process.pid} on"):
                start(options)
    assert sorted(os.listdir(tmp_path)) == [LOCK_NAME, ".tmp-checkpoint-6", "checkpoint-4"]


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def die_between_renames():
    """SIGKILL where a checkpoint that is replaced is under neither of its names."""
    rename = os.rename

    def dying(source, target):
        if os.path.basename(target) == "checkpoint-6" and not os.path.exists(target):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = dying


def test_a_checkpoint_outlives_a_kill_while_it_is_replaced(options, unbroken, tmp_path):  # noqa: F811
    for step in (4, 6):
        shutil.copytree(unbroken / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    with pytest.raises(BrokenProcessPool):
        run(options | {"resume_from_checkpoint": str(tmp_path / "checkpoint-4")}, die_between_renames)
    assert not (tmp_path / "checkpoint-6").exists()
    run(options | {"resume_from_checkpoint": "latest", "checkpointing_steps": 1})
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert_same_run(tmp_path, unbroken)
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# The machine's limits


def out_of_memory():
    torch.empty(2**60)


def out_of_accelerator_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def without_permission():
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "model.safetensors")


def on_a_broken_disk():
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def with_too_many_files(checkpoint):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with loading(checkpoint):
            load_file(checkpoint / "model.safetensors")  # says that there is no such file
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        (out_of_memory, errno.ENOMEM),
        (out_of_accelerator_memory, errno.ENOMEM),
        (without_permission, errno.EACCES),
        (on_a_broken_disk, errno.EIO),
        (with_too_many_files, errno.EMFILE),
    ],
)
def test_a_good_checkpoint_is_not_called_damaged(fault, number, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    save_file({"weight": torch.zeros(3)}, checkpoint / "model.safetensors")
    sentence = rf"checkpoint-2', which could not be read here: {os.strerror(number)}\. .* keep it"
    with pytest.raises(OSError, match=sentence) as refusal:
        if fault is with_too_many_files:
            fault(checkpoint)
        with loading(checkpoint):
            fault()
    assert refusal.value.errno == number
    assert not re.search("damaged|remove", str(refusal.value))


def test_bugs_are_not_the_checkpoints_damage(tmp_path):
    with pytest.raises(RuntimeError, match=r"^device-side assert$"), loading(tmp_path):
        raise RuntimeError("device-side assert")


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"weights": {}},
        {"state": {0: {"step": 3}}},
        {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
        {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}}},
        {
            "state": {
                n: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)} for n in (0, 1)
            }
        },
    ],
)
def test_the_state_of_another_optimizer_is_damage(state, tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"damaged \(the optimizer's state is that of another"), loading(tmp_path):
        load_optimizer(optimizer, state)
    assert not optimizer.state_dict()["state"]


def test_a_failed_gathering_is_not_the_disks(tmp_path):
    """What the other processes were at when one of them was lost has its own sentence."""

    def gathering(keep):
        raise RuntimeError(f"gloo: {os.strerror(errno.ENOMEM)}")

    trainer = SimpleNamespace(
        check_finite=lambda: None,
        output_dir=tmp_path,
        step=3,
        state=gathering,
        accelerator=SimpleNamespace(is_main_process=True),
    )
    with pytest.raises(RuntimeError, match=r"^gloo: "):
        Trainer.save_checkpoint(trainer)


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class SignalAfter:
    """A signal to this process, or to its group, when `function` of the trainer has returned for the n-th time."""

    def __init__(self, number, count=3, function="batch_loss", to_group=False, repeat=False):
        self.number, self.count, self.function = number, count, function
        self.to_group, self.repeat = to_group, repeat

    def __call__(self):
        function, calls = getattr(Trainer, self.function), []
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background ignore
        if self.to_group:
            os.setpgrp()

        def signalling(*args):
            result = function(*args)
            calls.append(args)
            if len(calls) == self.count:
                self.send()
            return result

        setattr(Trainer, self.function, signalling)

    def send(self):
        if self.to_group:
            subprocess.run(["kill", f"-{self.number}", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)
        else:
            os.kill(os.getpid(), self.number)
        if self.repeat:
            time.sleep(2 * ONE_WISH)
            os.kill(os.getpid(), self.number)


def command(options, before):
    with errors_as_lines("cdm train base"):
        train_here(options, False, before)


def exit_code(options, before):
    """Of a command that trains."""
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool, pytest.raises(SystemExit) as end:
        pool.submit(command, options, before).result()
    return end.value.code


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)]
)
def test_a_signal_saves_after_the_step_at_hand(number, workers, options, unbroken, tmp_path):  # noqa: F811
    """In the second step's first micro-batch: to the process, or to the group with its data loader's workers."""
    options |= {"dataloader_num_workers": workers, "checkpointing_steps": 6}
    assert exit_code(options, SignalAfter(number, to_group=workers > 0)) == 128 + number
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "training_config.json"]
    run(options | {"resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path, unbroken)


def test_a_signal_during_validation_ends_it(options, tmp_path):
    options |= {"validation_steps": 3, "validation_inference_steps": 3, "checkpointing_steps": 6}
    with pytest.raises(SystemExit):
        run(options, SignalAfter(signal.SIGTERM, count=1, function="ema_pipeline"))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "training_config.json"]
    with pytest.raises(SystemExit):  # in the last validation
        run(
            options | {"resume_from_checkpoint": "latest"},
            SignalAfter(signal.SIGTERM, count=1, function="ema_pipeline"),
        )
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "checkpoint-6", "training_config.json"]
    run(options | {"resume_from_checkpoint": "latest"})
    assert (tmp_path / "model_index.json").exists()


def test_a_second_signal_ends_at_once(options, tmp_path):
    with pytest.raises(BrokenProcessPool):
        run(options, SignalAfter(signal.SIGTERM, count=1, repeat=True))
    assert exit_code(options, SignalAfter(signal.SIGINT, count=1, repeat=True)) == 130
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, Stopped)])
def test_one_of_two_processes_gets_the_signal(number, end, options, tmp_path):
    """Both stop after the same step, and end alike."""
    options |= {"train_batch_size": 3, "checkpointing_steps": 6}
    before = (None, SignalAfter(number))
    with pytest.raises(end) as ended:
        run_in_processes(2, options, before)
    assert getattr(ended.value, "code", 130) == 128 + number
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "training_config.json"]


@pytest.fixture
def default_handler():
    """Of Ctrl-C, which jobs in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back_and_other_threads_have_none(default_handler):
    handlers = [signal.getsignal(number) for number in STOPPING]
    signals = StopSignals(PartialState(cpu=True))
    with signals:
        assert all(signal.getsignal(number) not in handlers for number in STOPPING)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # by the launcher, which the group's signal has reached as well
    assert [signal.getsignal(number) for number in STOPPING] == handlers
    assert signals.agreed() == signal.SIGTERM
    with pytest.raises(Interrupted):
        signals.check()

    def enter():
        with StopSignals(PartialState(cpu=True)):
            seen.extend(signal.getsignal(number) for number in STOPPING)

    seen = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == handlers


# ---------------------------------------------------------------------------------------------------------------------
# Other data


def test_other_images_of_the_same_number_are_refused(options, images, unbroken, tmp_path):  # noqa: F811
    folder = tmp_path / "moved"
    shutil.copytree(images, folder)
    options |= {"train_data_dir": str(folder), "output_dir": str(tmp_path / "run")}
    options |= {"resume_from_checkpoint": str(unbroken / "checkpoint-4"), "hold_in_memory": True}
    run(options)
    file = folder / "boot" / "3.png"
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    with pytest.raises(ValueError, match=r"other data than .*: content of 1 of 21 files compared, such as 'boot/3.p"):
        run(options | {"output_dir": str(tmp_path / "other")})


def look_at_no_images():
    fingerprints._of_files = None


def test_one_process_looks_at_the_images_for_all(options, images, unbroken, tmp_path):  # noqa: F811
    options |= {"output_dir": str(tmp_path / "run"), "train_batch_size": 2}
    options |= {"resume_from_checkpoint": str(unbroken / "checkpoint-4")}
    run_in_processes(2, options, (None, look_at_no_images))
    ours, theirs = (folder / "checkpoint-6" / "data.json" for folder in (tmp_path / "run", unbroken))
    assert ours.read_bytes() == theirs.read_bytes()
    shutil.copytree(images, tmp_path / "other")
    file = tmp_path / "other" / "boot" / "3.png"
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    options |= {"train_data_dir": str(tmp_path / "other"), "output_dir": str(tmp_path / "refused")}
    with pytest.raises(ValueError, match=r"other data than .*: content of 1 of 21 files compared"):
        run_in_processes(2, options, (None, look_at_no_images))


class PretendHub:
    """A data set of the Hub that is a local folder; its branch main is at the commit `main`, the tag v1 at a's."""

    def __init__(self, folder, main):
        self.folder, self.main = str(folder), main * 40

    def __call__(self):
        fingerprints.HfApi, sources.load_dataset = (lambda: self), self.load
        sources.dataset_info = self.dataset_info

    def dataset_info(self, name, revision=None, timeout=None):
        return SimpleNamespace(sha={None: self.main, "main": self.main, "v1": "a" * 40}[revision])

    def load(self, name, config_name, revision, **options):
        assert name == "someone/pictures" and revision in (None, "a" * 40, "b" * 40)
        return load_dataset(self.folder, **options)


def ask_no_hub():
    fingerprints.HfApi = None


def test_folders_have_no_revision(options, tmp_path):
    options |= {"output_dir": str(tmp_path / "run"), "dataset_revision": "main"}
    with pytest.raises(ValueError, match="`dataset_revision` is 'main', but a folder has none"):
        run(options, ask_no_hub)


def test_a_stream_goes_on_at_its_revision_after_a_commit(options, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.parquet", [0, 1] * 8)
    options = {name: value for name, value in options.items() if name != "train_data_dir"}
    options |= {"dataset_name": "someone/pictures", "streaming": True, "num_classes": 2, "num_channels": 3}
    options |= {"source_resolution": 4, "sample_size": 4, "train_batch_size": 2, "checkpointing_steps": 2}
    options |= {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest", "max_train_steps": 2}
    run(options, PretendHub(data, main="a"))
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["data"]["dataset_revision"] is None
    options["max_train_steps"] = 3
    message = rf"revision \('{'a' * 40}' in the checkpoint, '{'b' * 40}' now\). .* \(`--dataset_revision {'a' * 40}`\)"
    with pytest.raises(ValueError, match=message):
        run(options, PretendHub(data, main="b"))
    run(options | {"dataset_revision": "v1"}, PretendHub(data, main="b"))
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["data"]["dataset_revision"] == "a" * 40


def test_checkpoints_that_do_not_say_their_data_resume_with_a_note(tmp_path, caplog):
    logging.getLogger("cdm_diffusers").addHandler(caplog.handler)
    try:
        check_same_data(tmp_path, {"kind": "files"})
    finally:
        logging.getLogger("cdm_diffusers").removeHandler(caplog.handler)
    assert "does not say what it was trained on" in caplog.text
