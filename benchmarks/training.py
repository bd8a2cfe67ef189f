"""
Prints what training steps take, ours by peers', and what options of ours save or cost, as JSON lines.

    OMP_NUM_THREADS=1 python -m benchmarks.training --measure peers --guided_diffusion guided-diffusion
    OMP_NUM_THREADS=1 python -m benchmarks.training --presets fashion_mnist_8 --measure channels_last average

All sides take turns in one process; a ratio is a side's time by the first side's in the same round: the median over
the rounds, with the quartiles, in CPU time on a CPU. `peers` is guided-diffusion's 64x64_diffusion at another width
in three implementations, with equal weights: ours, ours in channels_last, Diffusers' UNet2DModel, and
guided-diffusion's own, where `--guided_diffusion` names a folder with it. The others are of presets: what
compilation, the channels_last format and `LerpEMAModel` change, and in which operations a step spends its time.
`--width` and `--sample_size` scale the networks, all else in proportion.
"""

import argparse
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from benchmarks.measuring import CPU, call, compare, device_of, emit, operations, rivals
from cdm_diffusers.presets import StagePreset, get_preset
from cdm_diffusers.training.ema import LerpEMAModel
from cdm_diffusers.training.loop import compile_network
from cdm_diffusers.training.stage import build_stage


MEASURES = ("peers", "compile", "channels_last", "average", "profile")


class Network:
    """A preset's network with its loss, its optimizer and a batch of noise."""

    def __init__(
        self,
        preset: StagePreset,
        batch_size: int,
        channels_last: bool = False,
        compiled: bool = False,
        device: torch.device = CPU,
    ):
        torch.manual_seed(0)
        with torch.device(device):
            self.stage, unet = build_stage(preset), preset.unet
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
        self.unet = self.stage.unet.to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
        if compiled:
            compile_network(self.unet, device)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), fused=True)

    def loss(self) -> torch.Tensor:
        return self.stage.loss(lambda x_t, t: self.unet(x_t, t, **self.conditions).sample, self.images).mean()

    @torch.no_grad()
    def forward(self) -> None:
        self.loss()

    def step(self) -> None:
        self.update(self.loss())

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Peer:
    """One implementation of a network, with its optimizer and a batch of noise; trained to predict noise."""

    in_autocast, measured = True, ("forward", "step")

    def __init__(self, network: torch.nn.Module, batch_size: int, size: int, device: torch.device):
        self.network = network.to(device).train()
        self.optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        generator = torch.Generator().manual_seed(0)
        self.x, self.noise = torch.randn(2, batch_size, 3, size, size, generator=generator).to(device).unbind()
        self.t = torch.arange(batch_size, device=device) * 37 % 1000
        self.labels = torch.arange(batch_size, device=device)

    def output(self) -> torch.Tensor:
        return call(self.network, self.x, self.t, self.labels)

    @torch.no_grad()
    def forward(self) -> None:
        self.output()

    def step(self) -> None:
        (self.output()[:, :3].float() - self.noise).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peers_of(folder: str | None, size: int, width: int, blocks: int, batch_size: int, device: torch.device):
    """By name; checked to compute the same."""
    networks = rivals(folder, size, width, blocks)
    networks["ours, channels_last"] = deepcopy(networks["ours"]).to(memory_format=torch.channels_last)
    peers = {name: Peer(network, batch_size, size, device) for name, network in networks.items()}
    with torch.no_grad():
        expected = peers["ours"].output()
        for peer in peers.values():
            torch.testing.assert_close(peer.output(), expected, rtol=1e-3, atol=1e-3)
    return peers


def measure(name: str, preset: StagePreset, batch_size: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Of a preset: by what is measured, the times without and with the option."""
    first = Network(preset, batch_size)
    if name == "profile":
        return {"training_step": {"share": operations(first.step, CPU)}}
    if name == "average":
        parameters = list(first.unet.parameters())
        old, new = (kind(parameters, min_decay=0.999, foreach=True) for kind in (EMAModel, LerpEMAModel))
        steps = {"EMAModel": lambda: old.step(parameters), "LerpEMAModel": lambda: new.step(parameters)}
        return {"average": compare(steps, rounds)}
    second = Network(preset, batch_size, channels_last=name == "channels_last", compiled=name == "compile")
    result = {"training_step": compare({"without": first.step, "with": second.step}, rounds)}
    if name == "channels_last":
        result["forward"] = compare({"without": first.forward, "with": second.forward}, rounds)
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
    parser.add_argument("--guided_diffusion", metavar="DIR", help="Folder with the repository, for `peers`.")
    parser.add_argument("--blocks", type=int, default=3, help="Residual blocks per level, for `peers`.")
    parser.add_argument(
        "--width", type=int, help="Channels of the first level. Default: the preset's; 64 for `peers`."
    )
    parser.add_argument("--sample_size", type=int, help="Default: the preset's; 64 for `peers`.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", help="For `peers`. Default: a GPU where there is one.")
    options = parser.parse_args()
    if "peers" in options.measure:
        device, size, width = device_of(options.device), options.sample_size or 64, options.width or 64
        peers = peers_of(options.guided_diffusion, size, width, options.blocks, options.batch_size, device)
        place = {"sample_size": size, "width": width, "blocks": options.blocks, "batch_size": options.batch_size}
        for of in ("forward", "training_step"):
            works = {name: peer.forward if of == "forward" else peer.step for name, peer in peers.items()}
            emit("training", {"measure": "peers", "of": of, **compare(works, options.rounds, device), **place}, device)
    for name in options.presets:
        preset = scaled(get_preset(name), options.width, options.sample_size)
        channels, size = preset.unet.block_out_channels, preset.unet.sample_size
        place = {"preset": name, "block_out_channels": channels, "sample_size": size, "batch_size": options.batch_size}
        for measured in options.measure:
            if measured != "peers":
                for of, result in measure(measured, preset, options.batch_size, options.rounds).items():
                    emit("training", {"measure": measured, "of": of, **result, **place}, CPU)


if __name__ == "__main__":
    main()
