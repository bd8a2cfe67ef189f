"""
Prints time and peak memory against batch, resolution, sampling steps, stages and processes, as JSON lines.

    OMP_NUM_THREADS=1 python -m benchmarks.memory --against batch resolution --plot training.png
    OMP_NUM_THREADS=1 python -m benchmarks.memory --against steps stages
    OMP_NUM_THREADS=1 python -m benchmarks.memory --presets imagenet_64 lsun_64

Every point is a process of its own, since a process keeps its peak. `batch` and `resolution` are training steps of the
network of `--width` that `benchmarks.training` compares with its peers; `processes` are the same steps of a batch that
they divide among each other (DDP with gloo on CPUs), the memory being that of the largest; `steps` and `stages` are
samples of a pipeline: so many steps in each stage, or its first stages. `milliseconds` is the median of the rounds, on
the wall, for the whole batch; `mebibytes` is the peak beyond what importing torch and this package takes. `--presets`
takes a sampling step and then a training step of presets at their full size, of one image in float32, with gradient
checkpointing, AdamW and the average of the weights.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import device_of, emit, our_unet, peak_memory, plot, rounded
from benchmarks.training import Network
from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.presets import PRESETS, get_preset
from cdm_diffusers.training.ema import LerpEMAModel


POINTS = {
    "batch": [1, 2, 4, 8, 16],
    "resolution": [16, 32, 64, 128, 256],
    "steps": [1, 2, 4, 8, 16],
    "stages": [1, 2, 3],
    "processes": [1, 2],
}


def training_step(options: argparse.Namespace, batch_size: int, resolution: int) -> Callable[[], None]:
    """A step of AdamW on noise; in a group of processes, on this process's share."""
    device, count = device_of(options.device), torch.distributed.get_world_size() if "RANK" in os.environ else 1
    unet = our_unet(resolution, options.width, options.blocks).to(device).train()
    network = torch.nn.parallel.DistributedDataParallel(unet) if count > 1 else unet
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    x = torch.randn(batch_size // count, 3, resolution, resolution, device=device)
    t = labels = torch.arange(len(x), device=device)

    def step() -> None:
        network(x, t, labels).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling(options: argparse.Namespace, steps: int | None = None, stages: int | None = None) -> Callable[[], None]:
    """A call of the pipeline."""
    pipeline = CascadedDiffusionPipeline.from_pretrained(options.pipeline).to(device_of(options.device))
    if stages is not None:
        pipeline = pipeline.with_schedulers(last_stage=pipeline.stages[stages - 1].name)
    pipeline.set_progress_bar_config(disable=True)
    given = {} if steps is None else {"num_inference_steps": steps}
    labels = [index % pipeline.base_unet.config.num_classes for index in range(options.batch_size)]
    return lambda: pipeline(labels, generator=torch.Generator().manual_seed(0), output_type="pt", **given)


def measure_point(against: str, value: int, options: argparse.Namespace) -> dict[str, float]:
    """In this process."""
    if against == "processes" and value > 1:
        torch.distributed.init_process_group("gloo")
    before = peak_memory(device_of(options.device))
    works = {
        "batch": lambda: training_step(options, value, options.resolution),
        "resolution": lambda: training_step(options, options.batch_size, value),
        "processes": lambda: training_step(options, options.batch_size, options.resolution),
        "steps": lambda: sampling(options, steps=value),
        "stages": lambda: sampling(options, stages=value),
    }
    work, taken = works[against](), []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    peak = peak_memory(device_of(options.device)) - before
    return {"milliseconds": rounded(1000 * statistics.median(taken[1:])), "mebibytes": rounded(peak)}


def full_size(name: str, device: torch.device) -> dict[str, dict[str, float]]:
    """A sampling step and a training step of a preset, in this process: seconds, and the peaks so far."""
    before = peak_memory(device)
    network = Network(get_preset(name), 1, device=device)
    network.unet.train().enable_gradient_checkpointing()
    parameters, figures = list(network.unet.parameters()), {}

    def training() -> None:
        average = LerpEMAModel(parameters, min_decay=0.999, foreach=True)
        network.step()
        average.step(parameters)

    for of, work in (("sampling", network.forward), ("training", training)):
        start = time.perf_counter()
        work()
        taken, peak = time.perf_counter() - start, peak_memory(device) - before
        figures[of] = {"seconds": rounded(taken), "gibibytes": rounded(peak / 2**10)}
    return figures


def point(against: str, value: int | str) -> dict[str, float]:
    """In processes of its own: the slowest and the largest of them, or what the only one says."""
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--point", against, str(value)]
    count, environments = value if against == "processes" else 1, [dict(os.environ)]
    if count > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        environments = [os.environ | group | {"RANK": str(rank)} for rank in range(count)]
    children = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"The point {against} = {value} failed.")
    figures = [json.loads(output) for output in outputs]
    if count == 1:
        return figures[0]
    return {name: max(one[name] for one in figures) for name in figures[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--values", type=int, nargs="+", help="In place of the usual ones.")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pipeline", default="checkpoints/fashion-mnist-32")
    parser.add_argument("--device", help="Default: a GPU where there is one.")
    parser.add_argument("--plot", metavar="FILE", help="Picture of time and memory, one curve for each of --against.")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, help="Measure these instead.")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        against, value = options.point
        if against == "preset":
            print(json.dumps(full_size(value, device_of(options.device))))
        else:
            print(json.dumps(measure_point(against, int(value), options)))
        return
    if options.presets:
        for name in options.presets:
            emit("memory", {"preset": name, **point("preset", name)}, device_of(options.device))
        return
    curves: dict[str, dict[str, Any]] = {"milliseconds": {}, "mebibytes": {}}
    for against in options.against:
        for value in options.values or POINTS[against]:
            figures = point(against, value)
            emit("memory", {"against": against, "value": value, **figures}, device_of(options.device))
            for name, curve in curves.items():
                curve.setdefault(against, []).append((value, figures[name]))
    if options.plot:
        plot(options.plot, curves, "value")


if __name__ == "__main__":
    main()
