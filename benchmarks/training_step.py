"""
Prints what compilation, the channels_last format and `LerpEMAModel` save or cost in CPU time, as JSON lines.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --presets fashion_mnist_8 --measure channels_last average

Both sides take turns in one process. A ratio is the second side's time by the first's: its median over the rounds,
with the quartiles. `--width` and `--sample_size` scale a preset's network, all else in proportion.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from cdm_diffusers.presets import StagePreset, get_preset
from cdm_diffusers.training.ema import LerpEMAModel
from cdm_diffusers.training.loop import compile_network
from cdm_diffusers.training.stage import build_stage


MEASURES = ("compile", "channels_last", "average")


class Network:
    """A preset's network with its loss, its optimizer and a batch of noise."""

    def __init__(self, preset: StagePreset, batch_size: int, channels_last: bool = False, compiled: bool = False):
        torch.manual_seed(0)
        self.stage, unet = build_stage(preset), preset.unet
        self.unet = self.stage.unet.to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
        if compiled:
            compile_network(self.unet, torch.device("cpu"))
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), fused=True)
        self.images = torch.randn(batch_size, unet.in_channels, unet.sample_size, unet.sample_size).clamp(-1, 1)
        self.conditions = {}
        if unet.num_classes is not None:
            self.conditions["class_labels"] = torch.arange(batch_size) % unet.num_classes
        if unet.low_res_size is not None:
            self.conditions["low_res"] = torch.randn(
                batch_size, unet.in_channels, unet.low_res_size, unet.low_res_size
            )
        if unet.augmentation_level_embedding:
            self.conditions["augmentation_level"] = torch.arange(batch_size)

    def loss(self) -> torch.Tensor:
        return self.stage.loss(lambda x_t, t: self.unet(x_t, t, **self.conditions).sample, self.images).mean()

    @torch.no_grad()
    def forward(self) -> None:
        self.loss()

    def step(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare(first: Callable[[], None], second: Callable[[], None], rounds: int) -> dict[str, Any]:
    """CPU time of `second` by that of `first`, after two rounds to warm up."""
    times = []
    for _ in range(rounds + 2):
        start = time.process_time()
        first()
        middle = time.process_time()
        second()
        times.append((middle - start, time.process_time() - middle))
    low, ratio, high = statistics.quantiles([second / first for first, second in times[2:]], n=4)
    milliseconds = [round(1000 * statistics.median(column), 2) for column in zip(*times[2:], strict=True)]
    return {"ratio": round(ratio, 3), "quartiles": [round(low, 3), round(high, 3)], "milliseconds": milliseconds}


def measure(name: str, preset: StagePreset, batch_size: int, rounds: int) -> dict[str, dict[str, Any]]:
    first = Network(preset, batch_size)
    if name == "average":
        parameters = list(first.unet.parameters())
        old, new = (kind(parameters, min_decay=0.999, foreach=True) for kind in (EMAModel, LerpEMAModel))
        return {"average": compare(lambda: old.step(parameters), lambda: new.step(parameters), rounds)}
    second = Network(preset, batch_size, channels_last=name == "channels_last", compiled=name == "compile")
    result = {"training_step": compare(first.step, second.step, rounds)}
    if name == "channels_last":
        result["forward"] = compare(first.forward, second.forward, rounds)
    return result


def scaled(preset: StagePreset, width: int | None, sample_size: int | None) -> StagePreset:
    unet = preset.unet
    by_width = (width or unet.block_out_channels[0]) / unet.block_out_channels[0]
    by_size = (sample_size or unet.sample_size) / unet.sample_size
    unet = replace(
        unet,
        block_out_channels=tuple(int(channels * by_width) for channels in unet.block_out_channels),
        sample_size=int(unet.sample_size * by_size),
        attention_resolutions=tuple(int(size * by_size) for size in unet.attention_resolutions),
        low_res_size=None if unet.low_res_size is None else int(unet.low_res_size * by_size),
    )
    return replace(preset, unet=unet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets", nargs="+", default=["fashion_mnist_8", "fashion_mnist_8_to_16", "fashion_mnist_16_to_32"]
    )
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--width", type=int)
    parser.add_argument("--sample_size", type=int)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for name in options.presets:
        preset = scaled(get_preset(name), options.width, options.sample_size)
        for measured in options.measure:
            for what, result in measure(measured, preset, options.batch_size, options.rounds).items():
                channels, size = preset.unet.block_out_channels, preset.unet.sample_size
                place = {"preset": name, "block_out_channels": channels, "sample_size": size}
                place |= {"batch_size": options.batch_size, "threads": torch.get_num_threads()}
                print(json.dumps({"measure": measured, "of": what, **result, **place}), flush=True)


if __name__ == "__main__":
    main()
