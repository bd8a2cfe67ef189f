"""Measurements by several processes: the figures of one, bit for bit, each process with its share of the work."""

import errno
import io
import json
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from forkserver import FORKSERVER
from small_cascade import small_cascade
from test_select_checkpoint import config_for, make_run, root  # noqa: F401
from test_training_loop import in_process_groups
from torch.utils.data import DataLoader

from cdm_diffusers import CascadedUNet2DModel
from cdm_diffusers.data.memory import InMemoryImages
from cdm_diffusers.evaluation.batches import joined, run_over
from cdm_diffusers.evaluation.classifier import Classifier, ClassifierConfig, accuracies_on, build_classifier
from cdm_diffusers.evaluation.config import EvaluateConfig, LikelihoodConfig, RecognitionConfig, SampleConfig
from cdm_diffusers.evaluation.evaluate import evaluate
from cdm_diffusers.evaluation.likelihood import measure_likelihood
from cdm_diffusers.evaluation.recognition import measure_recognition
from cdm_diffusers.evaluation.sample import sample
from cdm_diffusers.evaluation.select_checkpoint import select_checkpoint
from cdm_diffusers.processes import from_main, open_state
from cdm_diffusers.studies.config import ReproduceConfig, SearchConfig
from cdm_diffusers.studies.reproduce import reproduce
from cdm_diffusers.studies.search import search


def call_in(group, function, arguments):
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # or accelerate takes more threads
    group()
    return function(*arguments)


def in_processes(size, function, *arguments):
    """What `function` returns in each of `size` processes; raises the first exception."""
    with ProcessPoolExecutor(size, mp_context=FORKSERVER) as pool:
        futures = [pool.submit(call_in, group, function, arguments) for group in in_process_groups(size)]
        return [future.result() for future in futures]


# One for all


def what_main_says(error):
    """What comes of a function that counts its calls, in this process, and of one that fails."""
    open_state()
    calls = []
    length = from_main(lambda: calls.append(0) or len(calls))

    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        from_main(fail)
    return length, len(calls), str(raised.value)


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOSPC, "No space", "results.json")])
def test_the_main_process_speaks_for_all(error):
    assert in_processes(2, what_main_says, error) == [(1, 1, str(error)), (1, 0, str(error))]


# One loop


def batches_seen(num_images):
    """The first pixel of each image that all processes see, and the number of the process that saw it."""
    state = open_state()
    images = torch.arange(num_images, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    order = torch.Generator().manual_seed(5)
    loader = DataLoader(InMemoryImages(images, None), 2, shuffle=True, generator=order)

    def of_batch(batch):
        first = batch["image"][:, 0, 0, 0]
        return first, torch.full_like(first, state.process_index), None

    pixels, processes, nothing = joined(run_over(loader, of_batch, "cpu", "test"))
    assert nothing is None
    return pixels.tolist(), processes.tolist()


@pytest.mark.parametrize("num_images", [12, 11, 1])
def test_batches_are_shared_out_and_come_back_in_their_order(num_images):
    """Six batches, the last of them half in the second case; or fewer than processes."""
    (one,), (first, second) = (in_processes(size, batches_seen, num_images) for size in (1, 2))
    assert first == second
    assert first[0] == one[0] and sorted(one[0]) == list(range(num_images))
    whole_batches = [process for batch in range(6) for process in [batch % 2] * 2]
    assert first[1] == whole_batches[:num_images]


# Instruments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cascade of two stages, its samples, a classifier, and labelled images in IDX files."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = small_cascade(num_stages=2)
    pipeline.save_pretrained(folder / "cascade")
    classes = pipeline.config.id2label
    torch.manual_seed(1)
    for name, size in (("classifier", 8), ("classifier-of-base", 4)):
        options = ClassifierConfig(output_dir="", train_data_dir=".", image_size=size, num_channels=1)
        build_classifier(options, classes).model.save_pretrained(folder / name)
    (folder / "data").mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 50), ("t10k", 33)):
        images = generator.integers(0, 256, (count, 16, 16), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 3)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / "data" / f"{prefix}-{kind}-ubyte").write_bytes(header + values.tobytes())
    of_samples = {"pipeline": str(folder / "cascade"), "output_dir": str(folder / "samples"), "keep_stages": True}
    sample(SampleConfig(num_images=24, batch_size=8, image_format="npz", **of_samples), pipeline)
    return folder, {"train_data_dir": str(folder / "data"), "label_names": ",".join(classes.values())}


def measured(measure, config, network):
    """What a process finds and prints, and how many images its networks of this class have seen."""
    seen, forward, printed = [], network.forward, io.StringIO()

    def counted(self, images, *arguments, **options):
        seen.append(len(images))
        return forward(self, images, *arguments, **options)

    network.forward = counted
    with redirect_stdout(printed):
        result = measure(config)
    assert PartialState().num_processes == int(os.environ["WORLD_SIZE"])
    return json.dumps(result), printed.getvalue(), sum(seen)


def of_one_and_of_many(measure, config, made, network):
    """What one process and then two make, from nothing: outcomes of `measured`, and the bytes of the file `made`."""
    for size in (1, 2):
        yield in_processes(size, measured, measure, config, network), Path(made).read_bytes()
        Path(made).unlink()
        shutil.rmtree(Path(made).parent)


def check_same_work(measure, config, made, network=Classifier):
    ((one,), file), ((first, second), file_of_two) = of_one_and_of_many(measure, config, made, network)
    assert file_of_two == file
    assert first[0] == second[0] == one[0]
    assert first[1] == one[1] != "" and second[1] == ""
    return one[2], first[2], second[2]


def test_quality(world, tmp_path):
    folder, data = world
    options = {"samples": str(folder / "samples"), "extractor": str(folder / "classifier"), "batch_size": 7}
    options |= {"output": str(tmp_path / "out" / "report.json"), "cache_dir": str(tmp_path / "out" / "cache")}
    config = EvaluateConfig(**options, **data, num_reference_images=30)
    alone, first, second = check_same_work(evaluate, config, config.output)
    # Batches of 7: 4 of the samples, and of each split 4 of the drawn images and 5 of all.
    assert alone == 24 + 2 * (24 + 30)
    assert (first, second) == (14 + 2 * (14 + 16), 10 + 2 * (10 + 14))


def evaluate_and_die(config, errors):
    """In the second batch, with what is said about it in a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    forward, is_main = Classifier.forward, open_state().is_main_process
    calls = []

    def dying(self, images):
        calls.append(len(images))
        if len(calls) == 2 and not is_main:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, images)

    Classifier.forward = dying
    evaluate(config)


def test_when_a_process_is_killed_the_other_ends(world, tmp_path):
    folder, data = world
    options = {"samples": str(folder / "samples"), "extractor": str(folder / "classifier"), "batch_size": 7}
    config = EvaluateConfig(**options, **data, output=str(tmp_path / "report.json"), cache_dir=str(tmp_path))
    with ExitStack() as stack:  # a pool each: one that loses a process kills the others
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=FORKSERVER)) for _ in range(2)]
        for pool, group in zip(pools, in_process_groups(2), strict=True):
            arguments = config, str(tmp_path / f"errors-{group.rank}")
            future = pool.submit(call_in, group, evaluate_and_die, arguments)
        assert isinstance(future.exception(), BrokenProcessPool)
    last_line = (tmp_path / "errors-0").read_text().splitlines()[-1]
    sentence = "Process 1 of 2 was killed, or has crashed: process 0 ends as well. Start the command again."
    assert last_line == sentence and not (tmp_path / "report.json").exists()


def test_recognition(world, tmp_path):
    folder, data = world
    options = {"samples": str(folder / "samples"), "classifier": str(folder / "classifier"), "batch_size": 7}
    options |= {"output": str(tmp_path / "out" / "report.json"), "grid": str(tmp_path / "out" / "grid.png")}
    config = RecognitionConfig(**options, **data, num_diversity_images=9, num_nearest_images=20)
    alone, first, second = check_same_work(measure_recognition, config, config.output)
    assert alone == 24 + 33 + 27 == first + second and min(first, second) > 0.35 * alone


def test_likelihood(world, tmp_path):
    folder, data = world
    output = str(tmp_path / "out" / "report.json")
    options = {"pipeline": str(folder / "cascade"), "num_images": 10, "num_terms": 2, "batch_size": 3}
    config = LikelihoodConfig(output=output, cascade="super_res_1", **options, **data)
    alone, first, second = check_same_work(measure_likelihood, config, output, CascadedUNet2DModel)
    assert alone == first + second and second == alone * 4 / 10  # images, in batches of 3


def test_checkpoint_selection(root, tmp_path):  # noqa: F811
    run = make_run(root, tmp_path / "run", "base", (2, 4, 6))
    config = config_for(root, run, output=str(tmp_path / "out" / "report.json"), cache_dir=str(tmp_path / "out"))
    alone, first, second = check_same_work(select_checkpoint, config, config.output, CascadedUNet2DModel)
    # In batches of 4, 8 samples of each checkpoint and 10 of the best, in two steps.
    assert (alone, first, second) == (2 * (3 * 8 + 10), 2 * (3 * 4 + 6), 2 * (3 * 4 + 4))


def buffers_that_differ(folder):
    """A classifier's buffers after its accuracy was measured, which each process had changed before."""
    open_state()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    classifier = Classifier.from_pretrained(folder)
    for buffer in classifier.buffers():
        buffer += accelerator.process_index
    size = classifier.config.image_size
    images = InMemoryImages(torch.zeros(4, 1, size, size, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    accuracies_on(DataLoader(images, 2), accelerator.prepare(classifier), classifier.config.id2label, accelerator)
    return [buffer.tolist() for buffer in classifier.buffers()]


def test_accuracies_are_of_one_network(world):
    first, second = in_processes(2, buffers_that_differ, str(world[0] / "classifier"))
    assert first == second


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def search_without_times(config):
    """A search, whose file keeps what does not depend on the clock."""
    rows = search(config)
    state = open_state()
    file = Path(config.output_dir) / "results.jsonl"
    if state.is_main_process:
        file.write_text(json.dumps(without_times(map(json.loads, file.read_text().splitlines()))))
    state.wait_for_everyone()
    return [(row["setting"], row["figures"]) for row in rows]


def test_search(world, tmp_path):
    folder, data = world
    options = {"pipeline": str(folder / "cascade"), "extractor": str(folder / "classifier"), "batch_size": 5}
    options |= {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "out" / "cache"), "num_images": 10}
    config = SearchConfig(**options, **data, stage="super_res_1", num_inference_steps=[1, 2])
    alone, first, second = check_same_work(search_without_times, config, tmp_path / "out" / "results.jsonl")
    # Three times 10 samples, once from real images, and of both splits all images and as many as there are samples.
    assert alone == 3 * 10 + 50 + 33 + 2 * 10 == first + second and min(first, second) > 0.35 * alone


def experiment(world, folder, base):
    """Of a stage `base`, in a folder."""
    files, data = world
    content = {
        "name": "tiny",
        "data": {"train_data_dir": data["train_data_dir"]},
        "training": {"seeds": [0], "num_channels": 1},
        "sampling": {"num_images": 20, "seeds": [0], "batch_size": 6},
        "evaluation": {"source_resolution": 16, "num_channels": 1, "batch_size": 7},
        "stages": {"base": base},
        "experiments": {"table2a": {"base": "base", "num_inference_steps": {"base": 2}, "restart_timestep": 9}},
    }
    content["evaluation"] |= {
        "extractor": str(files / "classifier-of-base"),
        "cache_dir": str(folder / "out" / "cache"),
    }
    (folder / "config.json").write_text(json.dumps(content))
    return ReproduceConfig(name="table2a", config=str(folder / "config.json"), output_dir=str(folder / "out"))


def test_reproduction_with_a_training(world, tmp_path):
    """The training leaves the processes connected."""
    options = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4, "train_batch_size": 4}
    size = CascadedUNet2DModel.load_config(world[0] / "cascade", subfolder="base_unet")["sample_size"]
    options |= {"sample_size": size, "source_resolution": 16, "padding": 0, "attention_resolutions": [0]}
    base = {"preset": "fashion_mnist_8", "options": {**options, "max_train_steps": 1, "label_dropout": 0.0}}
    first, second = in_processes(2, reproduce, experiment(world, tmp_path, base))
    assert first == second and first["rows"][0]["runs"][0]["training_seed"] == 0


def test_reproduction(world, tmp_path):
    config = experiment(world, tmp_path, {"pipeline": str(world[0] / "cascade"), "stage": "base"})
    alone, first, second = check_same_work(reproduce, config, tmp_path / "out" / "table2a.json")
    assert alone == 2 * 20 + 2 * 20 + 50 + 33 == first + second and min(first, second) > 0.35 * alone
