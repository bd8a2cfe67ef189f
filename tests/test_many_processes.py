"""Training in several processes, which differs from training in one by rounding only."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import SeedableRandomSampler
from forkserver import FORKSERVER
from safetensors.torch import load_file
from scripts import ROOT
from test_training_loop import (
    SUPER_RES,
    InProcessGroup,
    images,
    in_process_groups,
    run,
    run_in_processes,
    train_here,
    weights,
)
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler

from cdm_diffusers import processes
from cdm_diffusers.options import parse
from cdm_diffusers.pipelines import SuperResolutionPipeline
from cdm_diffusers.training.batches import BATCH, MICRO_BATCH, PartSampler, Split
from cdm_diffusers.training.config import TrainingConfig
from cdm_diffusers.training.loop import Trainer
from cdm_diffusers.training.resolve import check_resumable, drawn_for, resolve_preset
from cdm_diffusers.training.sharding import check_sharding
from cdm_diffusers.training.signals import end_by


__all__ = ["images"]  # a fixture

# 21 images in batches of 8 are 2 batches an epoch, whose end falls into the second of the three steps' intervals.
STEPS = SUPER_RES | {
    "max_train_steps": 3,
    "checkpointing_steps": 1,
    "dropout": 0.0,
    "label_dropout": 0.3,
    "random_flip": True,
    "zero_level_probability": 0.2,
    "learning_rate": 1e-2,
    # Adam divides by the size of the gradient, which for some parameters is only rounding.
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.1,
}


def split_run(num_processes, micro_batches, options, before=None):
    """A run of batches of 8 images."""
    part = {"train_batch_size": 8 // num_processes // micro_batches, "gradient_accumulation_steps": micro_batches}
    if num_processes == 1:
        run(part | options, before, super_resolution=True)
    else:
        run_in_processes(num_processes, part | options, before, super_resolution=True)


def assert_close_runs(output_dir, reference, step=3):
    for ours, theirs in zip(
        weights(output_dir / f"checkpoint-{step}"), weights(reference / f"checkpoint-{step}"), strict=True
    ):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    ours, theirs = (
        json.loads((folder / f"checkpoint-{step}" / "progress.json").read_text()) for folder in (output_dir, reference)
    )
    assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)  # of the batch, not of one's part
    assert ours == theirs


@pytest.fixture(scope="module")
def options(images):
    return STEPS | {"train_data_dir": str(images)}


@pytest.fixture(scope="module")
def undivided(options, tmp_path_factory):
    """A run of one process without accumulation."""
    output_dir = tmp_path_factory.mktemp("undivided")
    split_run(1, 1, options | {"output_dir": str(output_dir)})
    return output_dir


@pytest.mark.parametrize(
    ("num_processes", "micro_batches"),
    [(1, 2), (2, 1), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow("four processes on few cores"))],
)
def test_any_split_takes_the_same_steps(num_processes, micro_batches, options, undivided, tmp_path):
    split_run(num_processes, micro_batches, options | {"output_dir": str(tmp_path)})
    assert_close_runs(tmp_path, undivided)


def parts_of(num_processes, micro_batches, num_images=21, first_batch=0):
    """Batches of 8 of an epoch, put together again."""
    processes = []
    for process in range(num_processes):
        split = Split(8 // num_processes // micro_batches, num_processes, process, micro_batches)
        sampler = PartSampler(num_images, split, seed=5)
        sampler.epoch, sampler.first_batch = 2, first_batch
        processes.append(list(sampler))
    parts = [part for step in zip(*processes, strict=True) for part in step]
    size = num_processes * micro_batches
    return [list(chain.from_iterable(parts[start : start + size])) for start in range(0, len(parts), size)]


def test_one_order_of_images_for_all_splits():
    """It is accelerate's, in which runs of one process have always been."""
    sampler = SeedableRandomSampler(range(21), data_seed=5)
    sampler.set_epoch(2)
    expected = list(BatchSampler(sampler, 8, drop_last=True))
    assert len(expected) == 2
    for split in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 2)):
        assert parts_of(*split) == expected
        assert parts_of(*split, first_batch=1) == expected[1:]


def test_a_run_goes_on_with_other_numbers_of_processes(options, undivided, tmp_path):
    """One process, then two, then one with two micro-batches."""
    shutil.copytree(undivided / "checkpoint-1", tmp_path / "checkpoint-1")
    resumed = options | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    split_run(2, 1, resumed | {"max_train_steps": 2})
    split_run(1, 2, resumed)
    assert_close_runs(tmp_path, undivided)
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} == {
        path.name for path in (undivided / "checkpoint-2").iterdir()
    }
    with pytest.raises(ValueError, match=r"training.train_batch_size \(8 in the checkpoint, 16 now\)"):
        split_run(1, 1, resumed | {"output_dir": str(undivided), "train_batch_size": 16})


def test_streams_are_split_alike(options, tmp_path):
    stream = options | {"streaming": True}
    for name, split in (("undivided", (1, 1)), ("micro-batches", (1, 2)), ("processes", (2, 2))):
        split_run(*split, stream | {"output_dir": str(tmp_path / name)})
    assert_close_runs(tmp_path / "micro-batches", tmp_path / "undivided")
    assert_close_runs(tmp_path / "processes", tmp_path / "undivided")


def test_a_run_that_drew_noise_for_each_micro_batch_keeps_its_split(tmp_path):
    earlier = Path(__file__).parent / "data" / "run-0.1.0" / "checkpoint-4"
    saved = json.loads((earlier / "training_config.json").read_text())
    assert saved["training"]["gradient_accumulation_steps"] == 2 and drawn_for(saved) == MICRO_BATCH
    resolved = saved | {"training": saved["training"] | {"drawn_for": MICRO_BATCH}}
    check_resumable(saved, resolved, earlier)
    resolved["training"]["num_processes"] = 2
    with pytest.raises(ValueError, match=r"training.num_processes \(1 in the checkpoint, 2 now\)"):
        check_resumable(saved, resolved, earlier)
    saved["training"]["gradient_accumulation_steps"] = 1
    assert drawn_for(saved) == BATCH


class KillBeforeStep:
    """SIGKILL to the process of `rank`."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def __call__(self):
        optimizer_step = Trainer.optimizer_step

        def killing(trainer, batches):
            if trainer.accelerator.process_index == self.rank and trainer.step == self.step - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer_step(trainer, batches)

        Trainer.optimizer_step = killing


class WithErrorsIn:
    """Sends the errors of a process to a file, before its fault."""

    def __init__(self, file, fault):
        self.file, self.fault = file, fault

    def __call__(self):
        os.dup2(os.open(self.file, os.O_WRONLY | os.O_CREAT), 2)
        self.fault()


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_is_killed_the_other_says_so_and_ends(killed, options, tmp_path):
    folder = tmp_path / "run"
    options = options | {"output_dir": str(folder), "train_batch_size": 4}
    fault = KillBeforeStep(killed, step=3)
    groups = in_process_groups(2, tuple(WithErrorsIn(str(tmp_path / f"errors-{rank}"), fault) for rank in range(2)))
    with contextlib.ExitStack() as stack:  # a pool each: one that loses a process kills the others
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=FORKSERVER)) for _ in groups]
        futures = [pool.submit(train_here, options, True, group) for pool, group in zip(pools, groups, strict=True)]
        assert isinstance(futures[killed].exception(), BrokenProcessPool)
        assert isinstance(futures[1 - killed].exception(timeout=10), BrokenProcessPool)
    lines = (tmp_path / f"errors-{1 - killed}").read_text().splitlines()
    assert (
        f"Process {killed} of 2 was killed, or has crashed: process {1 - killed} ends as well. The last good "
        f"checkpoint is {folder / 'checkpoint-2'}. Start all processes again, with `--resume_from_checkpoint latest`."
    ) in lines


class SetEnvironment:
    def __init__(self, variables):
        self.variables = variables

    def __call__(self):
        os.environ |= self.variables


def have_no_patience():
    processes.SECONDS_TO_MEET = 1


def come(group):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    group()
    processes.open_state()


@pytest.mark.parametrize(
    ("size", "missing"), [(2, (1,)), (2, (0,)), (4, (1, 3))], ids=["the other one", "the main process", "two of four"]
)
def test_processes_do_not_wait_forever_for_those_that_never_come(size, missing):
    groups = [group for group in in_process_groups(size, have_no_patience) if group.rank not in missing]
    with ProcessPoolExecutor(len(groups), mp_context=FORKSERVER) as pool:
        futures = [pool.submit(come, group) for group in groups]
    named = f"Of {size} processes, these did not come within 1 seconds: {', '.join(map(str, missing))}."
    for group, future in zip(groups, futures, strict=True):
        with pytest.raises(SystemExit, match=f"{named} Process {group.rank} ends as well"):
            future.result()


class OfOtherJob(SetEnvironment):
    def __call__(self):
        super().__call__()
        have_no_patience()


def test_processes_of_another_job_at_the_same_port_are_no_part_of_it():
    ours = in_process_groups(2, SetEnvironment({"SLURM_JOB_ID": "1"}))
    job = OfOtherJob({"SLURM_JOB_ID": "2"})
    main, other = (InProcessGroup(rank, ours[0].port, 2, job) for rank in range(2))
    with (
        ProcessPoolExecutor(2, mp_context=FORKSERVER) as pool,
        ProcessPoolExecutor(1, mp_context=FORKSERVER) as strangers,
    ):
        list(pool.map(come, ours))
        with pytest.raises(SystemExit, match=r"did not come within 1 seconds: 0\. Process 1 ends as well"):
            strangers.submit(come, other).result()
        with pytest.raises(ValueError, match=f"MASTER_PORT are 127.0.0.1 and {main.port}, where the .* cannot listen"):
            strangers.submit(come, main).result()


def test_other_commands_refuse_what_no_command_takes(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="asks for DeepSpeed, which is not supported here"):
        processes.open_state()


class WatchOfTwo:
    """Notes how it is left."""

    def __init__(self, *_):
        self.links, self.left = {}, []
        WATCHES.append(self)

    def leave(self, word):
        self.left.append(word)

    def fail(self, error):
        self.left.append(error)


WATCHES = []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_all_agreed_upon_is_no_failure(number, monkeypatch):
    monkeypatch.setattr(processes, "Watch", WatchOfTwo)
    with (
        pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit),
        processes.ending_together(SimpleNamespace(num_processes=2), str),
    ):
        end_by(number)
    assert WATCHES[-1].left == [processes.FAREWELL]
    with pytest.raises(KeyboardInterrupt), processes.ending_together(SimpleNamespace(num_processes=2), str):
        raise KeyboardInterrupt
    assert WATCHES[-1].left != [processes.FAREWELL]


def test_a_process_ends_even_if_it_cannot_say_why(monkeypatch, capsys):
    def no_advice():
        raise OSError("no disk")

    monkeypatch.setattr(processes, "_connect", lambda state: {})
    watch = processes.Watch(SimpleNamespace(process_index=1, num_processes=2), no_advice)
    watch.verdict = "Process 0 of 2 was killed"
    codes = []
    monkeypatch.setattr(processes.os, "_exit", codes.append)
    watch._end()
    assert codes == [1]
    assert "Process 0 of 2 was killed: process 1 ends as well." in capsys.readouterr().err


def test_without_a_port_processes_are_not_watched(monkeypatch):
    def refuse(*args, **options):
        raise OSError("Too many open files")

    monkeypatch.setattr(processes.socket, "create_server", refuse)
    monkeypatch.setattr(processes, "broadcast_object_list", lambda objects: objects)
    state = SimpleNamespace(is_main_process=True, num_processes=2, process_index=0)
    assert processes._connect(state) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Sharded networks


def held(tensors):
    """How many numbers this process holds, and how many there are."""
    tensors = [tensor for tensor in tensors if tensor.ndim]
    assert all(isinstance(tensor, DTensor) for tensor in tensors)
    return sum(tensor.to_local().numel() for tensor in tensors), sum(tensor.numel() for tensor in tensors)


def shard_and_check():
    """As `accelerate launch --use_fsdp --fsdp_version 2` asks for it; at the end, each process has its share only."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    finish = Trainer.finish

    def checked(trainer):
        moments = [value for values in trainer.optimizer.state.values() for value in values.values()]
        for tensors in (trainer.stage.unet.parameters(), trainer.ema.shadow_params, moments):
            ours, all_of_them = held(tensors)
            assert 0 < ours < 1.2 * all_of_them / trainer.accelerator.num_processes
        finish(trainer)

    Trainer.finish = checked


def test_sharded_runs_take_the_same_steps(options, undivided, tmp_path):
    """Two steps in two processes, and then a third in one, which holds all."""
    run_options = options | {"output_dir": str(tmp_path), "validation_steps": 2, "validation_inference_steps": 1}
    run_options |= {"resume_from_checkpoint": "latest", "num_validation_images": 1}
    split_run(2, 2, run_options | {"max_train_steps": 2}, shard_and_check)
    assert_close_runs(tmp_path, undivided, step=2)
    exported = SuperResolutionPipeline.from_pretrained(tmp_path).unet.state_dict()
    averages = load_file(tmp_path / "checkpoint-2" / "ema.safetensors")
    assert all(torch.equal(exported[name], average) for name, average in averages.items())
    assert list((tmp_path / "samples").iterdir())
    split_run(1, 1, run_options)
    assert_close_runs(tmp_path, undivided)


@pytest.mark.slow("four processes on few cores")
def test_a_run_of_one_process_goes_on_in_four_shards(options, undivided, tmp_path):
    shutil.copytree(undivided / "checkpoint-1", tmp_path / "checkpoint-1")
    resumed = options | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest", "mixed_precision": "no"}
    split_run(4, 1, resumed | {"gradient_checkpointing": True}, shard_and_check)
    assert_close_runs(tmp_path, undivided)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "asks for DeepSpeed, .* support.*: trainings take `--use_fsdp",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"`fsdp_version` is 1; it must be 2: add `--fsdp_version 2`"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "`--fsdp_offload_params`, which .* leave it"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "among processes, and there is only 1: give `--num_processes`",
        ),
    ],
)
def test_what_the_launcher_asks_for_in_vain_is_refused(variables, message, images, tmp_path):
    options = SUPER_RES | {"train_data_dir": str(images), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=message):
        run(options, SetEnvironment(variables), super_resolution=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["compile", "channels_last"])
def test_options_that_shards_do_not_take_are_refused(name):
    config = TrainingConfig(preset="fashion_mnist_8", train_data_dir="images", output_dir="run", **{name: True})
    with pytest.raises(ValueError, match=f"`{name}` is True, which FSDP does not take: leave out `--{name}`"):
        check_sharding(config, num_processes=2)


@pytest.mark.parametrize("name", ["one_gpu", "several_gpus", "several_gpus_sharded", "two_cpu_processes"])
def test_configurations_are_accelerates(name):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == {"one_gpu": 1, "two_cpu_processes": 2}.get(name, 8)
    expected = {"fsdp_version": 2, "fsdp_reshard_after_forward": True} if name == "several_gpus_sharded" else {}
    assert config.fsdp_config == expected


def test_the_slurm_script_is_a_script():
    script = ROOT / "configs" / "accelerate" / "train.slurm"
    subprocess.run(["bash", "-n", script], check=True)
    words = re.search(r"training/train_sr.py (.*)\"", script.read_text().replace("\\\n", " ")).group(1).split()
    preset = resolve_preset(parse(TrainingConfig, words), super_resolution=True, num_processes=32)
    assert preset.training.train_batch_size == 32 * 4 * 8


@pytest.mark.parametrize(("code", "is_signalled"), [(143, True), (1, True), (137, True), (0, True), (1, False)])
def test_only_a_job_that_was_stopped_is_queued_again(code, is_signalled, tmp_path):
    """As SLURM signals it: the processes, but not the shell that waits for them."""
    end = f"echo $$ > {tmp_path}/pid; while true; do sleep 0.05; done" if is_signalled else f"exit {code}"
    commands = {"srun": f"trap 'exit {code}' TERM; {end}", "scontrol": f'echo "$@" >> {tmp_path}/scontrol'}
    for name, command in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "4", "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", ROOT / "configs" / "accelerate" / "train.slurm"], env=environment) as job:
        if is_signalled:
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
                time.sleep(0.02)
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert job.returncode == code
    assert ("requeue 7" in (tmp_path / "scontrol").read_text()) == (code == 143)


def test_the_slurm_script_starts_one_process_for_each_gpu(tmp_path):
    variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION")
    commands = {
        "srun": 'SLURM_PROCID=9 SLURM_LOCALID=1 "${@:2}"',  # one of its tasks
        "scontrol": "echo first; echo second",
        "python": f"echo {' '.join(f'${name}' for name in variables)} $1 > {tmp_path}/started",
    }
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "32"}
    for name, command in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["bash", ROOT / "configs" / "accelerate" / "train.slurm"], env=environment, check=True)
    assert (tmp_path / "started").read_text().split() == ["9", "1", "32", "8", "first", "bf16", "training/train_sr.py"]
