"""Sets of samples: what the pipeline draws, whatever the batches, processes and interruptions; and bad input."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from forkserver import FORKSERVER
from PIL import Image, ImageOps
from small_cascade import small_cascade

from cdm_diffusers import CascadedDDPMScheduler, CascadedDiffusionPipeline, ContinuousDDPMScheduler, files
from cdm_diffusers.data.image_sets import load_image_set
from cdm_diffusers.data.transforms import area_resize
from cdm_diffusers.evaluation import sample as sample_module
from cdm_diffusers.evaluation import sample_store
from cdm_diffusers.evaluation.sample import SampleConfig, SamplingJob, counted_evaluations, image_generator, sample
from cdm_diffusers.evaluation.sample_store import SampleStore
from cdm_diffusers.files import temporary_name
from cdm_diffusers.pipelines.fingerprints import fingerprint
from cdm_diffusers.pipelines.solvers import solver_name


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pipeline():
    return small_cascade()


def config_for(folder, **options):
    return SampleConfig(
        **{"pipeline": "cascade", "output_dir": str(folder), "num_images": 7, "batch_size": 3, **options}
    )


def pixels(folder, stage=None):
    return torch.stack([item["image"] for item in load_image_set(folder, stage)])


def content(folder):
    """All files below a folder and their bytes, but not what says when and how they were made."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    records = ("settings.json", "results.json", "hashes.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name not in records}


def as_uint8(images):
    return (images * 255).round().to(torch.uint8)


# What is sampled


def test_images_are_the_pipelines_own(tmp_path, pipeline):
    """In micro-batches by index, each image with its generator and label; kept stages to the last bit."""
    options = {"num_inference_steps": {"base": 4}, "augmentation_levels": {"super_res_1": 7}, "restart_timestep": 9}
    sample(config_for(tmp_path / "set", seed=5, keep_stages=True, **options), pipeline)
    kept = {name: np.load(tmp_path / "set" / "low_res" / f"{name}.npy") for name in ("base", "super_res_1")}
    for start in (0, 3, 6):
        indices = range(start, min(start + 3, 7))
        stages = pipeline(
            class_labels=[index % 3 for index in indices],
            generator=[image_generator(5, index) for index in indices],
            output_type="pt",
            output_stages=True,
            **options,
        ).stages
        for name, images in kept.items():
            assert images.dtype == np.float32 and np.array_equal(images[start : start + 3], stages[name].numpy())
        difference = pixels(tmp_path / "set")[list(indices)].int() - as_uint8(stages["super_res_2"]).int()
        assert difference.abs().max() <= 1  # a half may be rounded either way
    assert load_image_set(tmp_path / "set").labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    base = pixels(tmp_path / "set", "base")
    assert base.shape == (7, 1, 4, 4) and np.abs(base.numpy() / 255 - kept["base"]).max() < 0.5001 / 255
    record = json.loads((tmp_path / "set" / "results.json").read_text())
    assert record["evaluations"]["base"] == 4 + len([t for t in (0, 6, 13, 19) if t + 1 < 9]) + 1


def test_consistency(tmp_path, pipeline):
    """Averages of the last stage are its input's, in which 8 bits are rounded."""
    sample(config_for(tmp_path / "set", keep_stages=True, consistency=True), pipeline)
    kept = np.load(tmp_path / "set" / "low_res" / "super_res_1.npy")
    averages = area_resize(pixels(tmp_path / "set") / 255, kept.shape[-1])
    assert np.abs(averages.numpy() - kept).max() < 0.01
    with pytest.raises(ValueError, match="`consistency` and `truncated` are both True"):
        sample(config_for(tmp_path / "other", consistency=True, truncated=True), pipeline)


def test_batch_size_format_and_count_change_nothing(tmp_path, pipeline):
    sample(config_for(tmp_path / "a"), pipeline)
    sample(config_for(tmp_path / "b", batch_size=2, image_format="npz", num_images=5), pipeline)
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert (a[:5].int() - b.int()).abs().max() <= 1
    assert len(a.flatten(1).unique(dim=0)) == 7
    with np.load(tmp_path / "b" / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 16, 16, 1) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1] and file["arr_1"].dtype == np.int64
    files = sorted(str(file.relative_to(tmp_path / "a" / "images")) for file in (tmp_path / "a").rglob("*.png"))
    assert files == [f"{label}/{index:06d}.png" for label in range(3) for index in range(label, 7, 3)]
    assert not (tmp_path / "a" / "shards").exists()


def test_without_classes(tmp_path):
    pipeline = small_cascade(num_stages=2, num_classes=None)
    sample(config_for(tmp_path / "set", keep_stages=True), pipeline)
    images = load_image_set(tmp_path / "set")
    assert (
        images.labels is None
        and sorted(path.name for path in (tmp_path / "set" / "images").iterdir())[6] == "000006.png"
    )
    sample(config_for(tmp_path / "more", low_res_dir=str(tmp_path / "set")), pipeline)
    assert pixels(tmp_path / "more").shape == (7, 1, 8, 8)


def test_low_resolution_images_are_used_again(tmp_path, pipeline):
    """z_0 as it was passed on, with its labels, and with other noise than that it was made of."""
    options = {"seed": 2, "labels": "2,Trouser"}
    sample(config_for(tmp_path / "z", last_stage="base", keep_stages=True, **options), pipeline)
    sample(config_for(tmp_path / "whole", keep_stages=True, **options), pipeline)
    z, whole = (np.load(tmp_path / name / "low_res" / "base.npy") for name in ("z", "whole"))
    assert np.array_equal(z, whole)
    again = config_for(tmp_path / "again", seed=2, num_images=5, low_res_dir=str(tmp_path / "z"))
    sample(again, pipeline)
    assert load_image_set(tmp_path / "again").labels.tolist() == [2, 1, 2, 1, 2]
    generators = [image_generator(2, index, first_stage=1) for index in range(3)]
    expected = pipeline([2, 1, 2], image=torch.from_numpy(z[:3]), generator=generators, output_type="pt").images
    assert (pixels(tmp_path / "again")[:3].int() - as_uint8(expected).int()).abs().max() <= 1
    states = {bytes(image_generator(2, 0, first).get_state().numpy()) for first in range(3)}
    assert len(states) == 3
    assert image_generator(2, 0).get_state().equal(image_generator(2, 0, 0).get_state())


# Processes and interruptions


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("uninterrupted")
    pipeline.save_pretrained(folder / "cascade")
    sample(long_config(folder / "set", folder / "cascade"), pipeline)
    return folder


def long_config(folder, cascade):
    return config_for(folder, pipeline=str(cascade), num_images=24, batch_size=2, keep_stages=True)


def killed_when(condition, config):
    """A process that samples, ended by SIGKILL as soon as `condition` holds; whether it had not finished before."""
    process = FORKSERVER.Process(target=sample, args=(config,))
    process.start()
    while process.is_alive() and not condition():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_and_started_again_by_two_processes(tmp_path, uninterrupted):
    """No duplicate and no hole: every byte as if nothing had happened."""
    config = long_config(tmp_path / "set", uninterrupted / "cascade")
    shards, moments = tmp_path / "set" / "shards", random.Random(time.time_ns())

    def count():
        return len(list(shards.glob("[0-9]*.safetensors")))

    assert killed_when(lambda: (tmp_path / "set" / "settings.json").exists(), config)
    for target in sorted(moments.sample(range(1, 6), 2)):
        pause = moments.uniform(0, 0.05)
        assert killed_when(lambda t=target, p=pause: count() >= t and time.sleep(p) is None, config)
    assert 1 <= count() < 12
    with pytest.raises(ValueError, match=f"half-written: {2 * count()} of 24 images"):
        load_image_set(tmp_path / "set")

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["evaluation/sample.py", "--pipeline", config.pipeline, "--output_dir", config.output_dir]
    command += ["--num_images", "24", "--batch_size", "2", "--keep_stages"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "set" / "results.json").read_text())["num_processes"] == 2
    assert content(tmp_path / "set") == content(uninterrupted / "set")


def test_killed_while_it_is_put_together(tmp_path, uninterrupted, pipeline):
    config = long_config(tmp_path / "set", uninterrupted / "cascade")
    killed_when(lambda: list(tmp_path.glob("set/.tmp-*-images")), config)
    sample(config, pipeline)
    assert content(tmp_path / "set") == content(uninterrupted / "set")
    sample(config, pipeline)  # there is nothing left to do
    assert content(tmp_path / "set") == content(uninterrupted / "set")


def sample_as(rank, port, config, errors, fails):
    """One of two processes, as torchrun starts them; that fails, or not."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, ACCELERATE_USE_CPU="true")
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    if fails:
        SamplingJob.make = failing
    sample(config)


def failing(job, indices, num_processes):
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize(
    ("victim", "pattern", "message"),
    [
        (1, "shards/[0-9]*", "Process 1 of 2 was killed, or has crashed"),
        (0, "shards/[0-9]*", "Process 0 of 2 was killed, or has crashed"),
        (0, ".tmp-*-samples.npz", "Process 0 of 2 was killed, or has crashed"),
        (1, None, r"Process 1 of 2 has failed \(OSError: \[Errno 122\] Disk quota exceeded\)"),
    ],
)
def test_one_of_two_processes_is_lost(tmp_path, uninterrupted, victim, pattern, message):
    """The other ends at once, whether it samples or waits, and says why."""
    config = long_config(tmp_path / "set", uninterrupted / "cascade")
    config = dataclasses.replace(config, image_format="npz", keep_stages=False)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        fails = pattern is None and rank == victim
        arguments = (rank, port, config, str(tmp_path / f"errors-{rank}"), fails)
        processes.append(FORKSERVER.Process(target=sample_as, args=arguments))
        processes[-1].start()
    if pattern is None:
        processes[victim].join()
    else:
        while all(process.is_alive() for process in processes) and not list((tmp_path / "set").glob(pattern)):
            time.sleep(0.001)
        os.kill(processes[victim].pid, signal.SIGKILL)
    processes[1 - victim].join(10)
    assert processes[1 - victim].exitcode == 1
    for process in processes:
        process.join()
    advice = f"process {1 - victim} ends as well. What is finished is kept in '{tmp_path / 'set'}': start the command"
    assert re.search(f"{message}: {re.escape(advice)}", (tmp_path / f"errors-{1 - victim}").read_text())
    sample(config)
    assert torch.equal(pixels(tmp_path / "set"), pixels(uninterrupted / "set"))


def test_other_settings_are_refused(tmp_path, uninterrupted, pipeline):
    folder, cascade = uninterrupted / "set", uninterrupted / "cascade"
    config = long_config(folder, cascade)
    for name, value, message in (
        ("seed", 1, r"seed \(0 there, 1 now\)"),
        ("num_images", 25, r"labels .*; num_images \(24 there, 25 now\)"),
        ("labels", "1", "labels"),
        ("batch_size", 3, "batch_size"),
        ("augmentation_levels", {"super_res_1": 6}, r"options .*'super_res_1': 5.*'super_res_1': 6"),
        ("scheduler", {"base": "ddim"}, r"schedulers .*CascadedDDPMScheduler.*DDIMScheduler"),
    ):
        with pytest.raises(ValueError, match=f"holds samples of other settings: .*{message}"):
            sample(config_for(folder, **{**vars(config), name: value}), pipeline)
    other = small_cascade()
    next(iter(other.super_res_1_unet.parameters())).data += 1e-3
    with pytest.raises(ValueError, match="weights_and_schedulers"):
        sample(config, other)
    (tmp_path / "something").write_text("else")
    with pytest.raises(ValueError, match="holds other files"):
        sample(long_config(tmp_path, cascade), pipeline)


def test_samples_of_an_earlier_noise_rule(tmp_path, uninterrupted):
    """Half made by a version whose seeds made other images at s = 0 and when truncated: refused there alone."""
    folder, cascade = uninterrupted / "set", uninterrupted / "cascade"
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["noise_rule"] is None  # at s = 5
    changes = ({}, {"augmentation_levels": {"super_res_1": 0}}, {"truncated": True})
    for number, change in enumerate(changes):
        given = vars(long_config(tmp_path / str(number), cascade)) | {"keep_stages": False} | change
        job = SamplingJob(SampleConfig(**given), small_cascade())
        (tmp_path / str(number)).mkdir()
        earlier = {name: value for name, value in job.store.settings.items() if name != "noise_rule"}
        (tmp_path / str(number) / "settings.json").write_text(json.dumps(earlier))
        if not change:
            job.store.check()
            continue
        with pytest.raises(ValueError, match=r"holds samples of other settings: noise_rule \(None there"):
            job.store.check()


# Damage


def calls_of(monkeypatch):
    """The micro-batches that are sampled from now on."""
    made, make = [], SamplingJob.make

    def counted(job, indices, num_processes):
        made.append(indices.tolist())
        make(job, indices, num_processes)

    monkeypatch.setattr(SamplingJob, "make", counted)
    return made


def flip(file, place=0.5):
    damaged = bytearray(file.read_bytes())
    damaged[int(place * len(damaged))] ^= 4
    file.write_bytes(damaged)


def cut(file, place=0.9):
    file.write_bytes(file.read_bytes()[: int(place * file.stat().st_size)])


def invert(file):
    ImageOps.invert(Image.open(file)).save(file)


def resize(file):
    Image.open(file).resize((8, 8)).save(file)


PNG = "images/1/000007.png"  # of the micro-batch [6, 7]
PNG_DAMAGE = {
    "deleted": (lambda set_: (set_ / PNG).unlink(), "lacks 1 images, '1/000007.png' for one", [[6, 7]]),
    "cut": (lambda set_: cut(set_ / PNG), "000007.png' is not what was written", [[6, 7]]),
    "empty": (lambda set_: (set_ / PNG).write_bytes(b""), "000007.png' is not what was written", [[6, 7]]),
    "inverted": (lambda set_: invert(set_ / PNG), "000007.png' is not what was written", [[6, 7]]),
    "resized": (lambda set_: resize(set_ / PNG), "000007.png' is not what was written", [[6, 7]]),
    "colour": (lambda set_: Image.open(set_ / PNG).convert("RGB").save(set_ / PNG), "not what was written", [[6, 7]]),
    "moved": (lambda set_: (set_ / PNG).rename(set_ / "images/2/000007.png"), "lacks 1 images", [[6, 7]]),
    "doubled": (lambda set_: shutil.copy(set_ / PNG, set_ / "images/2/000010.png"), "were not sampled, '2/0000", []),
    "all": (
        lambda set_: shutil.rmtree(set_ / "images"),
        "half-written: 0 of 24",
        [[i, i + 1] for i in range(0, 24, 2)],
    ),
    "no labels": (lambda set_: (set_ / "labels.npy").unlink(), "labels.npy' is missing", []),
    "labels": (lambda set_: flip(set_ / "labels.npy", 0.9), "labels.npy' is not what was written", []),
    "results": (lambda set_: (set_ / "results.json").write_text("{}"), None, []),
    "settings": (lambda set_: flip_command(set_ / "settings.json"), "settings.json' is not what was written", []),
}


def flip_command(file):
    file.write_text(file.read_text().replace('"command": "', '"command": "x'))


def copy_of(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("kind", PNG_DAMAGE)
def test_damage_is_found_and_mended(tmp_path, uninterrupted, pipeline, monkeypatch, kind):
    """Where the set is read, and where it is sampled again: then only what is missing, to the last bit."""
    folder = copy_of(uninterrupted / "set", tmp_path)
    damage, message, again = PNG_DAMAGE[kind]
    damage(folder)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            pixels(folder)
    made = calls_of(monkeypatch)
    sample(long_config(folder, uninterrupted / "cascade"), pipeline)
    assert made == again
    assert_same(folder, uninterrupted / "set", results=not again)
    sample(long_config(folder, uninterrupted / "cascade"), pipeline)
    assert made == again


def assert_same(folder, expected, results=True):
    assert content(folder) == content(expected)
    for name in ("results.json", "hashes.json") if results else ():  # with the seconds that it took
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    pixels(folder)


@pytest.mark.parametrize(
    ("damage", "message", "again"),
    [
        (lambda npz: npz.unlink(), "half-written", 12),
        (lambda npz: cut(npz, 0.3), "samples.npz' is not what was written", None),
        (lambda npz: flip(npz, 0.3), "samples.npz' is not what was written", 1),
        (lambda npz: flip(npz, 0.99), "samples.npz' is not what was written", 0),
        (lambda npz: flip(npz, 0), "samples.npz' is not what was written", 0),
        (lambda npz: npz.write_bytes(b"PK"), "samples.npz' is not what was written", 12),
    ],
)
def test_a_damaged_npz(tmp_path, uninterrupted, pipeline, monkeypatch, damage, message, again):
    config = config_for(tmp_path / "a", num_images=24, batch_size=2, last_stage="base", image_format="npz")
    sample(config, pipeline)
    folder = copy_of(tmp_path / "a", tmp_path)
    damage(folder / "samples.npz")
    with pytest.raises(ValueError, match=message):
        load_image_set(folder)
    made = calls_of(monkeypatch)
    sample(dataclasses.replace(config, output_dir=str(folder)), pipeline)
    assert len(made) == again if again is not None else 0 < len(made) < 12
    assert_same(folder, tmp_path / "a", results=not made)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_stage(tmp_path, uninterrupted, pipeline, monkeypatch, damage):
    folder = copy_of(uninterrupted / "set", tmp_path)
    damage(folder / "low_res" / "base.npy")
    with pytest.raises(ValueError, match=r"low_res/base.npy' is (not what was written|missing)"):
        load_image_set(folder, "base")
    with pytest.raises(ValueError, match=r"low_res/base.npy' is (not what was written|missing)"):
        sample(config_for(tmp_path / "x", low_res_dir=str(folder), low_res_stage="base"), pipeline)
    pixels(folder)  # not damaged
    made = calls_of(monkeypatch)
    sample(long_config(folder, uninterrupted / "cascade"), pipeline)
    assert len(made) == (12 if damage == Path.unlink else 1) or (damage == cut and 1 < len(made) < 4)
    assert_same(folder, uninterrupted / "set", results=False)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda shard: shard.write_bytes(b"half")])
def test_a_damaged_shard(tmp_path, uninterrupted, pipeline, monkeypatch, damage):
    config = long_config(tmp_path / "set", uninterrupted / "cascade")
    job = SamplingJob(config, pipeline)
    job.store.prepare(job.labels)
    job.run(job.store.pending(), PartialState())
    assemble, made = SampleStore.assemble, calls_of(monkeypatch)

    def damaged_before(store, make):
        damage(store.shard(torch.tensor([6, 7])))
        assemble(store, make)

    monkeypatch.setattr(SampleStore, "assemble", damaged_before)
    sample(config, pipeline)
    assert made == [[6, 7]]
    assert_same(tmp_path / "set", uninterrupted / "set", results=False)


@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({}, "00000004-2.safetensors"),
        ({}, "base.npy"),
        ({}, "hashes.json"),
        ({"image_format": "npz"}, "samples.npz"),
    ],
)
def test_a_full_disk(tmp_path, uninterrupted, pipeline, monkeypatch, options, full):
    """Nothing half-written stays, and the message says what to do; then it goes on."""
    config = dataclasses.replace(long_config(tmp_path / "set", uninterrupted / "cascade"), **options)

    def on_full_disk(final):
        temporary = temporary_name(final)
        if final.name == full and not temporary.exists():
            temporary.symlink_to("/dev/full")
        return temporary

    for module in (files, sample_store):
        monkeypatch.setattr(module, "temporary_name", on_full_disk)
    with pytest.raises(OSError, match=f"`output_dir` '{tmp_path / 'set'}' is on a disk that is full: free") as error:
        sample(config, pipeline)
    assert error.value.errno == errno.ENOSPC
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    monkeypatch.undo()
    sample(config, pipeline)
    assert torch.equal(pixels(tmp_path / "set"), pixels(uninterrupted / "set"))


def test_folders_without_hashes(tmp_path, uninterrupted, pipeline, monkeypatch):
    """Of earlier versions: read as they are, but names, labels and formats must be right."""
    folder, made = copy_of(uninterrupted / "set", tmp_path), calls_of(monkeypatch)
    (folder / "hashes.json").unlink()
    assert torch.equal(pixels(folder), pixels(uninterrupted / "set"))
    sample(long_config(folder, uninterrupted / "cascade"), pipeline)
    assert made == [] and not (folder / "hashes.json").exists()
    for kind, message in (
        ("cut", "000007.png' is not a valid PNG"),
        ("empty", "000007.png' is not a valid PNG"),
        ("resized", r"000007.png' has .* = \(1, 8, 8\), among images of \(1, 16, 16\)"),
        ("colour", r"000007.png' has .* = \(3, 16, 16\)"),
        ("moved", "lacks 1 images, '1/000007.png' for one"),
        ("doubled", "that were not sampled, '2/000010.png'"),
        ("no labels", "labels.npy' is missing"),
    ):
        damaged = tmp_path / kind
        shutil.copytree(folder, damaged)
        PNG_DAMAGE[kind][0](damaged)
        with pytest.raises(ValueError, match=message):
            pixels(damaged)
    sample(long_config(damaged, uninterrupted / "cascade"), pipeline)
    assert_same(damaged, uninterrupted / "set", results=False)


def test_damaged_hashes(tmp_path, uninterrupted, pipeline):
    """Then nothing is known to be whole, and all of it is made again."""
    folder = copy_of(uninterrupted / "set", tmp_path)
    for text in ("", "[]", "{", '{"files": 3}', '{"files": {}}', '{"files": {}, "micro_batches": []}'):
        (folder / "hashes.json").write_text(text)
        with pytest.raises(ValueError, match=r"hashes.json' was not written by .*, or is damaged"):
            load_image_set(folder)
    sample(long_config(folder, uninterrupted / "cascade"), pipeline)
    assert_same(folder, uninterrupted / "set", results=False)


# Schedulers


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddim", DDIMScheduler),
        ("dpmsolver++", DPMSolverMultistepScheduler),
        ("sde-dpmsolver++", DPMSolverMultistepScheduler),
        ("unipc", UniPCMultistepScheduler),
    ],
)
def test_solvers_and_back(tmp_path, pipeline, name, kind):
    changed = pipeline.with_schedulers({"base": name, "super_res_2": name})
    assert [type(stage.scheduler) for stage in changed.stages] == [kind, CascadedDDPMScheduler, kind]
    assert solver_name(changed.base_scheduler) == name and solver_name(changed.super_res_1_scheduler) == "ancestral"
    assert changed.base_unet is pipeline.base_unet and isinstance(pipeline.base_scheduler, CascadedDDPMScheduler)
    changed.save_pretrained(tmp_path)
    back = CascadedDiffusionPipeline.from_pretrained(tmp_path).with_schedulers("ancestral")
    for stage, own in zip(back.stages, pipeline.stages, strict=True):
        assert type(stage.scheduler) is type(own.scheduler)
        assert torch.equal(stage.scheduler.table.alphas_cumprod, own.scheduler.table.alphas_cumprod)
        assert stage.scheduler.config.variance_type == own.scheduler.config.variance_type
    same = pipeline.with_schedulers()
    assert fingerprint(changed.stages) != fingerprint(pipeline.stages) == fingerprint(same.stages)


def test_inference_schedules(pipeline):
    scheduler = pipeline.with_schedulers(None, {"super_res_2": [0.01, 0.5]}).super_res_2_scheduler
    scheduler.set_timesteps(3)
    betas = np.array([0.01, 0.255, 0.5])
    assert scheduler.inference_table.alphas_cumprod.numpy() == pytest.approx(np.cumprod(1 - betas))
    cosine = pipeline.with_schedulers(None, {"super_res_2": "squaredcos_cap_v2"}).super_res_2_scheduler
    assert isinstance(cosine, ContinuousDDPMScheduler) and cosine.config.inference_beta_schedule == "squaredcos_cap_v2"


def test_a_cascade_cut_short(pipeline):
    cut = pipeline.with_schedulers(last_stage="super_res_1")
    assert [stage.name for stage in cut.stages] == ["base", "super_res_1"]
    assert cut.config.default_num_inference_steps == {"base": 3, "super_res_1": 3}


def test_evaluations_are_counted(pipeline):
    with counted_evaluations(pipeline) as counts:
        pipeline([0, 1], num_inference_steps={"base": 4, "super_res_1": 2}, guidance_scale={"super_res_1": 2.0})
    assert counts == {"base": 2 * 4, "super_res_1": 2 * 2 * 2, "super_res_2": 2 * 3}
    pipeline([0])
    assert counts["base"] == 8  # no longer


@pytest.mark.parametrize(
    ("schedulers", "call"),
    [
        ({}, {}),
        ({}, {"guidance_scale": {"super_res_1": 2.0}, "restart_timestep": 10}),
        ({}, {"truncated": True, "augmentation_levels": {"super_res_1": 7}, "num_inference_steps": {"base": 10}}),
        ({"scheduler": {"super_res_1": "heun"}}, {"num_inference_steps": 4}),
        ({"inference_schedules": {"super_res_2": [0.01, 0.9]}}, {"num_inference_steps": {"super_res_2": 7}}),
    ],
)
def test_evaluations_are_those_of_a_call(schedulers, call):
    pipeline = small_cascade().with_schedulers(**schedulers)
    pipeline.set_progress_bar_config(disable=True)
    with counted_evaluations(pipeline) as counts:
        pipeline([0], **call)
    assert pipeline.evaluations(**call) == counts


# Labels and bad input


def test_labels(tmp_path, pipeline):
    (tmp_path / "labels.txt").write_text("Ankle boot\n0\nT-shirt/top\n1\n")
    for given, expected in (
        (None, [0, 1, 2, 0]),
        ("balanced", [0, 1, 2, 0]),
        ("2", [2, 2, 2, 2]),
        ("Ankle boot, 1", [2, 1, 2, 1]),
        (str(tmp_path / "labels.txt"), [2, 0, 0, 1]),
    ):
        job = SamplingJob(config_for(tmp_path / "set", num_images=4, labels=given), pipeline)
        assert job.labels.dtype == torch.int64 and job.labels.tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "`num_images` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"seed": -1}, "`seed` is -1"),
        ({"image_format": "jpg"}, "`image_format` is 'jpg'"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"labels": "0,3"}, "has 3; it must lie in 0..2"),
        ({"labels": "Boot"}, "has 'Boot', which is not a class"),
        ({"num_inference_steps": "3"}, "`num_inference_steps` is '3'; it must be a whole number"),
        ({"num_inference_steps": {"base": 21}}, "`base`.*21"),
        ({"num_inference_steps": {"super_res_9": 2}}, r"names the stages \['super_res_9'\]"),
        ({"num_inference_steps": 0}, "num_inference_steps.* is 0"),
        ({"augmentation_levels": {"super_res_1": 21}}, "`augmentation_level` of stage `super_res_1` is 21"),
        ({"augmentation_levels": {"super_res_2": 1}}, "stage `super_res_2` is 1, but the stage takes none"),
        ({"restart_timestep": 21}, "`restart_timestep` is 21"),
        ({"scheduler": "rk4"}, "`scheduler` is 'rk4'; it must be one of"),
        ({"scheduler": {"base": "ddim"}, "truncated": True}, "Stage `base`: DDIMScheduler cannot stop"),
        ({"inference_schedules": {"base": [0.1, 0.2]}}, "stage `base`, which samples with CascadedDDPMScheduler"),
        ({"inference_schedules": {"super_res_2": [0.2, 0.1]}}, r"is \[0.2, 0.1\]; it must be the end points"),
        ({"last_stage": "super_res_3"}, "`last_stage` is 'super_res_3'"),
        ({"truncated": True, "keep_stages": True}, "`keep_stages` with `truncated`"),
        ({"low_res_stage": "base"}, "there is no `low_res_dir`"),
        ({"augmentation_levels": 100}, "`augmentation_levels` is 100; it must be a mapping of names"),
        ({"low_res_dir": "Z", "labels": "0"}, "with `low_res_dir` its labels are used"),
    ],
)
def test_bad_options(tmp_path, pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        sample(config_for(tmp_path / "set", **options), pipeline)
    assert not (tmp_path / "set").exists()


def test_low_resolution_images_that_do_not_fit(tmp_path, uninterrupted, pipeline):
    kept = str(uninterrupted / "set")
    sample(config_for(tmp_path / "bare", num_images=2, last_stage="base"), pipeline)
    unlabelled = small_cascade(num_classes=None)
    sample(config_for(tmp_path / "unlabelled", last_stage="base", keep_stages=True), unlabelled)
    for options, message in (
        ({"low_res_dir": kept, "num_images": 25}, "`num_images` is 25, but .* has 24"),
        ({"low_res_dir": kept, "truncated": True}, "`truncated` with `low_res_dir`"),
        ({"low_res_dir": kept, "last_stage": "super_res_1"}, "has images of stage `super_res_1`, which no stage of"),
        ({"low_res_dir": kept, "low_res_stage": "super_res_2"}, r"has kept the stages \['base', 'super_res_1'\]"),
        ({"low_res_dir": str(tmp_path / "bare"), "num_images": 2}, r"has kept the stages \[\], not any"),
        (
            {"low_res_dir": kept, "low_res_stage": "base", "truncated": True},
            r"here, \['super_res_2'\], none",
        ),
        ({"low_res_dir": str(tmp_path / "unlabelled")}, "has no labels, which stages after `base` take: sample all"),
        ({"low_res_dir": str(tmp_path)}, r"was not written by cdm sample-set"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(config_for(tmp_path / "set", **options), pipeline)


@pytest.mark.parametrize("told", [[[0, 1], [4]], None])
def test_what_is_left_to_be_made_is_said_by_the_main_process(told, monkeypatch):
    """What others see of the folder may be of a moment ago."""
    monkeypatch.setattr(sample_module, "broadcast_object_list", lambda objects: objects.__setitem__(0, told))
    job = object.__new__(SamplingJob)  # without a folder to look at
    pending = job.prepare(SimpleNamespace(is_main_process=False))
    assert (pending if pending is None else [indices.tolist() for indices in pending]) == told
