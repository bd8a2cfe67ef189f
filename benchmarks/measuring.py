"""What the benchmarks share: the time of rivals that take turns, peak memory, peers, a line of JSON, a plot."""

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from torch.profiler import ProfilerActivity, profile

from cdm_diffusers.conversion import unet_from_openai
from cdm_diffusers.conversion.unet_2d import unet_to_diffusers
from cdm_diffusers.models import CascadedUNet2DModel


CPU = torch.device("cpu")


def device_of(name: str | None = None) -> torch.device:
    """The one of this name; by default a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """What `work` takes: on a CPU the process's CPU time, on a GPU the time between its events."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def compare(
    works: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device = CPU,
    clock: Callable[[Callable[[], Any], torch.device], float] = seconds,
) -> dict[str, dict[str, Any]]:
    """
    The time of each of `works`, which take turns in an order that is turned round each time, after a round to warm up.

    Returns:
        For each: "milliseconds", the median over the rounds, and its "quartiles"; "ratio", the median of its time by
        the first one's in the same round, and "ratio_quartiles".
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        names = list(works)
        for name in names if number % 2 else reversed(names):
            took = clock(works[name], device)
            if number:
                taken[name].append(took)
    first = next(iter(taken.values()))
    return {name: summary(times, first) for name, times in taken.items()}


def summary(times: list[float], first: list[float]) -> dict[str, Any]:
    """Of times in seconds, and of those that they are compared with, round for round."""
    ratios = [time / by for time, by in zip(times, first, strict=True)]
    return {
        "milliseconds": rounded(1000 * statistics.median(times)),
        "quartiles": quartiles([1000 * time for time in times]),
        "ratio": rounded(statistics.median(ratios)),
        "ratio_quartiles": quartiles(ratios),
    }


def operations(work: Callable[[], Any], device: torch.device, most: int = 12) -> dict[str, float]:
    """The shares of the operations that take most of the device's time in `work`, after a first time to warm up."""
    work()
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        work()
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key[:80]: getattr(event, kind) for event in profiled.key_averages()}
    total = sum(times.values())
    return {name: rounded(times[name] / total) for name in sorted(times, key=times.get, reverse=True)[:most]}


def quartiles(values: list[float]) -> list[float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return [rounded(value) for value in 2 * values]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [rounded(low), rounded(high)]


def rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def peak_memory(device: torch.device) -> float:
    """Of this process since it began, in MiB: resident on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def where(device: torch.device) -> dict[str, Any]:
    """Device and versions, which every figure goes with."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **versions,
    }


def processor() -> str:
    """The CPU's name, as far as it is known."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def emit(benchmark: str, figures: dict[str, Any], device: torch.device) -> None:
    """One line of JSON."""
    print(json.dumps({"benchmark": benchmark, **figures, **where(device)}), flush=True)


def plot(file: str, panels: dict[str, dict[str, Iterable[tuple[float, float]]]], x_label: str) -> None:
    """
    A picture with a panel for each of `panels`: curves by name, points (x, y), axes logarithmic to base 2 and 10.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (y_label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend()
    figure.savefig(file, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Peers


def openai_unet(folder: str, image_size: int, width: int, blocks: int, use_fp16: bool = False) -> torch.nn.Module:
    """
    guided-diffusion's network with the options of its 64x64_diffusion, from a folder with that repository.

    Raises:
        ValueError: there is no such thing in `folder`.
    """
    if not (Path(folder) / "guided_diffusion" / "unet.py").is_file():
        raise ValueError(
            f"`guided_diffusion` is {folder!r}; it must be a folder with https://github.com/openai/guided-diffusion: "
            "clone it there."
        )
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from guided_diffusion.unet import UNetModel

    levels = multipliers(image_size)
    model = UNetModel(
        image_size,
        in_channels=3,
        model_channels=width,
        out_channels=6,
        num_res_blocks=blocks,
        attention_resolutions=tuple(image_size // size for size in ATTENTION if size <= image_size),
        channel_mult=levels,
        num_classes=1000,
        use_fp16=use_fp16,
        num_head_channels=head_width(width),
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
    )
    if use_fp16:
        model.convert_to_fp16()
    return model


ATTENTION = (32, 16, 8)


def multipliers(image_size: int) -> tuple[int, ...]:
    """Of the channels, level by level, as guided-diffusion's `create_model` chooses them for a size."""
    return {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2), 16: (1, 2)}[image_size]


def head_width(width: int) -> int:
    """Of attention: 64 as published, less in narrower networks."""
    return min(64, width)


def our_unet(image_size: int, width: int, blocks: int) -> CascadedUNet2DModel:
    """The same network of ours."""
    return CascadedUNet2DModel(
        sample_size=image_size,
        in_channels=3,
        out_channels=3,
        learned_variance=True,
        block_out_channels=tuple(width * multiplier for multiplier in multipliers(image_size)),
        layers_per_block=blocks,
        attention_resolutions=tuple(size for size in ATTENTION if size <= image_size),
        attention_head_dim=head_width(width),
        num_classes=1000,
        downsample_type="resnet",
        upsample_type="resnet",
    )


def rivals(folder: str | None, image_size: int, width: int, blocks: int) -> dict[str, torch.nn.Module]:
    """
    One network in three implementations with the same weights: "ours"; "UNet2DModel", Diffusers'; and
    "guided-diffusion", where `folder` has it. Each takes (x, t, labels).
    """
    if folder is None:
        ours, others = without_zeros(our_unet(image_size, width, blocks)), {}
    else:
        openai = without_zeros(openai_unet(folder, image_size, width, blocks))
        settings = {"image_size": image_size, "num_head_channels": head_width(width), "new_attention_order": True}
        ours = unet_from_openai(openai.state_dict(), rescale_timesteps=False, **settings)
        others = {"guided-diffusion": openai}
    ours = deepcopy(ours)
    diffusers_unet: UNet2DModel = deepcopy(unet_to_diffusers(ours))
    return {"ours": ours, "UNet2DModel": diffusers_unet, **others}


@torch.no_grad()
def without_zeros(network: torch.nn.Module) -> torch.nn.Module:
    """The network with noise for the weights that begin as zeros, which would hide differences."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return network


def call(network: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What comes out of one of [`rivals`]."""
    output = network(x, t, labels)
    return output if isinstance(output, torch.Tensor) else output.sample
