"""
Prints what networks cost: counted, as the table of `docs/presets.md`, or measured, as JSON lines.

    python -m benchmarks.preset_costs
    python -m benchmarks.preset_costs --measure avatars_16 avatars_16_to_64 avatars_64_to_256 --batch_size 8
    python -m benchmarks.preset_costs --measure avatars_64_to_256 --unet '{"patch_size": 2}' --crop_size 0

Networks are counted on torch's meta device, so no memory is needed. Multiply-adds are those of convolutions, linear
layers and attention in one call on one image; normalisation, activations and sums are not counted. Memory of training
is float32: weights, gradients, AdamW's moments and the average (20 bytes a parameter), and what the backward pass
keeps of each image. `--measure` takes the time of a call and of a training step (loss, backward pass, AdamW) where it
runs: on the CPU by process time with as many threads as OMP_NUM_THREADS says, on a GPU in bf16 autocast.
"""

import argparse
import json
import statistics
from dataclasses import asdict, replace

import torch

from benchmarks.measuring import device_of, emit, rounded, seconds
from cdm_diffusers.models.costs import build_on_meta, count_multiply_adds, inputs_of
from cdm_diffusers.models.unet_2d_cascaded import CascadedUNet2DModel
from cdm_diffusers.presets import PRESETS, StagePreset, get_preset
from cdm_diffusers.tables import markdown_table


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
    header = ("preset", "parameters", "multiply-adds per image and step", "memory of training", "steps")
    rows = []
    for name, preset in PRESETS.items():
        unet = build_on_meta(preset.unet)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        giga = count_multiply_adds(unet) / 1e9
        size = preset.training.crop_size
        memory = f"{20 * parameters / 2**30:.2f} GiB + {count_kept_bytes(unet, size) / 2**20:,.0f} MiB per image"
        steps = preset.inference.num_inference_steps
        rows.append((f"`{name}`", f"{parameters:,}", f"{giga:,.3f} G", memory, steps))
    return markdown_table(header, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Measured


def measure(preset: StagePreset, batch_size: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Images per second of a call (whole images, no gradients) and of a training step (crops where it takes them)."""
    with device:
        unet = CascadedUNet2DModel(**asdict(preset.unet))
        whole, trained = inputs_of(unet, None, batch_size), inputs_of(unet, preset.training.crop_size, batch_size)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def call():
        with torch.no_grad(), autocast:
            unet(**whole)

    def training_step():
        with autocast:
            output = unet(**trained).sample
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    figures = {}
    for name, work in (("call", call), ("training_step", training_step)):
        work()
        taken = statistics.median(seconds(work, device) for _ in range(rounds))
        figures[f"images_per_second_of_a_{name}"] = rounded(batch_size / taken)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", metavar="PRESET", help="Measure these presets instead of counting.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--unet", type=json.loads, default={}, help="JSON: arguments of the networks, in place of theirs."
    )
    parser.add_argument("--crop_size", type=int, help="In place of the presets'; 0 for whole images.")
    options, device = parser.parse_args(), device_of()
    for name in options.measure or ():
        preset = get_preset(name)
        unet = replace(preset.unet, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.unet.items()})
        if options.crop_size is not None:
            preset = replace(preset, training=replace(preset.training, crop_size=options.crop_size or None))
        figures = measure(replace(preset, unet=unet), options.batch_size, options.rounds, device)
        measured = {"preset": name, "unet": options.unet, "crop_size": preset.training.crop_size}
        emit("preset_costs", {**measured, "batch_size": options.batch_size, **figures}, device)
    if not options.measure:
        print(table())
