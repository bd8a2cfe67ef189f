"""
Prints the tables of `docs/presets.md`: what networks cost, counted and measured.

    python benchmarks/preset_costs.py
    python benchmarks/preset_costs.py --measure avatars_16 avatars_16_to_64 avatars_64_to_256 --batch_size 8
    python benchmarks/preset_costs.py --measure avatars_64_to_256 --unet '{"patch_size": 2}' --crop_size 0

Networks are counted on torch's meta device, so no memory is needed. Multiply-adds are those of convolutions, linear
layers and attention in one call on one image; normalisation, activations and sums are not counted. Memory of training
is float32: weights, gradients, AdamW's moments and the average (20 bytes a parameter), and what the backward pass
keeps of each image. `--measure` takes the time of a call and of a training step (loss, backward pass, AdamW) where it
runs: on the CPU by process time with as many threads as OMP_NUM_THREADS says, on a GPU in bf16 autocast.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from cdm_diffusers.models.costs import build_on_meta, count_multiply_adds, inputs_of
from cdm_diffusers.models.unet_2d_cascaded import CascadedUNet2DModel
from cdm_diffusers.presets import PRESETS, StagePreset, get_preset


def count_kept_bytes(unet: CascadedUNet2DModel, size: int | None = None) -> int:
    """Bytes that the backward pass of `unet`, on the meta device, keeps of one image; parameters are not counted."""
    kept, parameters = {}, {parameter.untyped_storage()._cdata for parameter in unet.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet.train()(**inputs_of(unet, size)).sample  # dropout keeps its masks
    assert output.requires_grad
    return sum(kept.values())


def table() -> str:
    """The markdown table, one row per preset."""
    lines = [
        "| preset | parameters | multiply-adds per image and step | memory of training | steps |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, preset in PRESETS.items():
        unet = build_on_meta(preset.unet)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        giga = count_multiply_adds(unet) / 1e9
        size = preset.training.crop_size
        memory = f"{20 * parameters / 2**30:.2f} GiB + {count_kept_bytes(unet, size) / 2**20:,.0f} MiB per image"
        steps = preset.inference.num_inference_steps
        lines.append(f"| `{name}` | {parameters:,} | {giga:,.3f} G | {memory} | {steps} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Measured


def measure(preset: StagePreset, batch_size: int, rounds: int) -> dict[str, float]:
    """Images per second of a call (whole images, no gradients) and of a training step (crops where it takes them)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        unet = CascadedUNet2DModel(**asdict(preset.unet))
        whole, trained = inputs_of(unet, None, batch_size), inputs_of(unet, preset.training.crop_size, batch_size)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)

    def call():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            unet(**whole)

    def training_step():
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            output = unet(**trained).sample
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "images/s of a call": batch_size / seconds(call, device, rounds),
        "images/s of a training step": batch_size / seconds(training_step, device, rounds),
    }


def seconds(work: Callable[[], None], device: torch.device, rounds: int) -> float:
    """The median of `rounds` after one to warm up: process time on the CPU, time between events on a GPU."""
    work()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return statistics.median(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", metavar="PRESET", help="Measure these presets instead of counting.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--unet", type=json.loads, default={}, help="JSON: arguments of the networks, in place of theirs."
    )
    parser.add_argument("--crop_size", type=int, help="In place of the presets'; 0 for whole images.")
    options = parser.parse_args()
    for name in options.measure or ():
        preset = get_preset(name)
        unet = replace(preset.unet, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.unet.items()})
        if options.crop_size is not None:
            preset = replace(preset, training=replace(preset.training, crop_size=options.crop_size or None))
        figures = measure(replace(preset, unet=unet), options.batch_size, options.rounds)
        print(f"| `{name}` | " + " | ".join(f"{value:,.1f}" for value in figures.values()) + " |", flush=True)
    if not options.measure:
        print(table())
