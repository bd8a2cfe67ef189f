"""
Measures in ten minutes what a GPU does with this package: into one JSON file, which grows as it goes, and as a table.

    python -m benchmarks.gpu --output gpu.json --guided_diffusion guided-diffusion

In this order, each part in its share of the time, points that do not fit into it being left out and named: the rate
of matrix products and convolutions in bf16; one network in several implementations (`benchmarks.training`): ours as
it is, in channels_last, compiled and with CUDA graphs, Diffusers' UNet2DModel, and guided-diffusion in its own fp16
and in bf16 like the others; a profile of a training step; calls and training steps of each preset; the latency of the
shipped cascades; loaders; and the largest batches. `of_matmul` is the share of the measured rate of products that
multiply-adds (three calls of the network for a training step) make. Autocast in bf16 over float32 weights, unless it
says otherwise. `--toy` is the same with small numbers, on a CPU too.
"""

import argparse
import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import workers
from benchmarks.measuring import call, compare, device_of, openai_unet, operations, rivals, rounded, seconds, where
from benchmarks.training import Network, Peer
from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.files import write_json
from cdm_diffusers.models.costs import build_on_meta, count_multiply_adds
from cdm_diffusers.presets import PRESETS, get_preset
from cdm_diffusers.tables import markdown_table


ROOT = Path(__file__).parents[1]
# Shares of the time, in the order in which they are taken; what a part leaves goes to the next.
SHARES = {
    "rates": 0.03,
    "peers": 0.4,
    "profile": 0.05,
    "presets": 0.2,
    "latency": 0.08,
    "loaders": 0.1,
    "batches": 0.14,
}
LONGEST_POINT = 0.5  # of a part's share: so long a point may take, compilation included
CALLS_OF_A_STEP = 3
MOST_ROUNDS, FEWEST_ROUNDS, ENOUGH_SECONDS = 30, 3, 2.0
TOY_PRESETS, TOY_PEER = ["fashion_mnist_8", "fashion_mnist_8_to_16"], {"image_size": 16, "width": 32, "blocks": 1}
PEER = {"image_size": 64, "width": 192, "blocks": 3}  # 64x64_diffusion

Point = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


class OutOfTime(BaseException):
    """A point has taken too long. No `Exception`, which torch's compiler would catch and report as its own."""


@contextlib.contextmanager
def at_most(limit: float) -> Iterator[None]:
    """
    Raises:
        OutOfTime: after so many seconds.
    """

    def end(*_: Any) -> None:
        raise OutOfTime

    before, timer = signal.signal(signal.SIGALRM, end), signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


class Benchmark:
    """What is measured, on which device, at which size."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, device_of(options.device)
        self.toy, self.file = options.toy, Path(options.output)
        self.results: list[dict[str, Any]] = []
        self.matmul: float | None = None  # multiply-adds a second

    # -----------------------------------------------------------------------------------------------------------------
    # Running

    def run(self) -> None:
        """All parts, in their time."""
        end_of_part = time.monotonic()
        for part, share in SHARES.items():
            seconds_of_part = share * 60 * self.options.minutes
            end_of_part += seconds_of_part
            if part not in self.options.parts:
                continue
            for about, measure in getattr(self, part)():
                left = end_of_part - time.monotonic()
                self.note(part, about, measure, min(left, max(LONGEST_POINT * seconds_of_part, 30)))

    def note(self, part: str, about: dict[str, Any], measure: Callable[[], dict[str, Any]], limit: float) -> None:
        """One point: its figures, or why there are none."""
        start = time.monotonic()
        if limit <= 0:
            figures = {"left_out": "no time left for this part"}
        else:
            try:
                with at_most(limit):
                    figures = measure()
            except OutOfTime:
                figures = {"left_out": f"took more than {limit:.0f} s"}
            except Exception as error:  # the other points go on
                figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
        self.results.append({"part": part, **about, **figures, "took": round(time.monotonic() - start, 1)})
        write_json(self.file, {"where": where(self.device), "minutes": self.options.minutes, "results": self.results})
        print(json.dumps(self.results[-1]), flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def timed(self, work: Callable[[], Any]) -> float:
        """Median seconds: as many rounds as fit into two seconds, after two to warm up."""
        first = max(seconds(work, self.device) for _ in range(2))
        rounds = 1 if self.toy else int(min(max(ENOUGH_SECONDS / max(first, 1e-6), FEWEST_ROUNDS), MOST_ROUNDS))
        return sorted(seconds(work, self.device) for _ in range(rounds))[rounds // 2]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def rate_of(self, multiply_adds: float, taken: float) -> dict[str, float]:
        """Tera-operations a second, and their share of what products reach."""
        figures = {"tflops": rounded(2 * multiply_adds / taken / 1e12)}
        return figures | ({} if self.matmul is None else {"of_matmul": rounded(multiply_adds / taken / self.matmul)})

    # -----------------------------------------------------------------------------------------------------------------
    # Parts: points, each what it is about and what measures it

    def rates(self) -> Iterator[Point]:
        """Products of square matrices, and a 3x3 convolution as networks have it."""
        size, dtype = (128 if self.toy else 8192), torch.bfloat16

        def product() -> dict[str, Any]:
            a, b = torch.randn(2, size, size, device=self.device, dtype=dtype)
            self.matmul = size**3 / self.timed(lambda: a @ b)
            return {"tflops": rounded(2 * self.matmul / 1e12)}

        def convolution(memory_format: torch.memory_format) -> dict[str, Any]:
            batch, channels, side = (1, 32, 8) if self.toy else (64, 384, 32)
            layer = torch.nn.Conv2d(channels, channels, 3, padding=1, device=self.device, dtype=dtype)
            layer.to(memory_format=memory_format)
            x = torch.randn(batch, channels, side, side, device=self.device, dtype=dtype)
            x = x.to(memory_format=memory_format)
            with torch.no_grad():
                taken = self.timed(lambda: layer(x))
            return self.rate_of(batch * side**2 * channels**2 * 9, taken)

        yield {"of": "matmul", "size": size}, product
        yield {"of": "convolution, contiguous"}, partial(convolution, torch.contiguous_format)
        yield {"of": "convolution, channels_last"}, partial(convolution, torch.channels_last)

    def peers(self) -> Iterator[Point]:
        """One network by everybody: each point is one of the rivals in turns with ours as it is."""
        shape, batch_size = (TOY_PEER, 2) if self.toy else (PEER, 32)
        networks = rivals(self.options.guided_diffusion, **shape)
        make = lambda name: Peer(deepcopy(networks[name]), batch_size, shape["image_size"], self.device)  # noqa: E731
        ours = make("ours")
        multiply_adds = batch_size * count_multiply_adds(build_on_meta_like(networks["ours"]))

        def in_turns(rival: Callable[[], Any]) -> dict[str, Any]:
            peer, figures = rival(), {}
            for of in peer.measured:
                works = {"ours": self.within_autocast(ours, of), "rival": self.within_autocast(peer, of)}
                for work in works.values():  # whatever is compiled or tuned, now
                    work()
                times = compare(works, 1 if self.toy else 10, self.device)
                factor = 1 if of == "forward" else CALLS_OF_A_STEP
                taken = times["rival"]["milliseconds"] / 1000
                figures[of] = times["rival"] | self.rate_of(factor * multiply_adds, taken)
                figures[of]["ours_milliseconds"] = times["ours"]["milliseconds"]
            return figures

        def variant(channels_last: bool = False, mode: str | None = None, in_bfloat16: bool = False) -> Peer:
            peer = make("ours")
            if in_bfloat16:
                peer.network.to(torch.bfloat16)
                peer.x, peer.in_autocast, peer.measured = peer.x.to(torch.bfloat16), False, ("forward",)
            if channels_last:
                peer.network.to(memory_format=torch.channels_last)
                peer.x = peer.x.to(memory_format=torch.channels_last)
            if mode is not None:
                peer.network.compile(**({"backend": "eager"} if self.toy else {"mode": mode}))
            return peer

        about = {**shape, "batch_size": batch_size}
        yield {"of": "ours, again", **about}, partial(in_turns, variant)
        yield {"of": "ours, channels_last", **about}, partial(in_turns, partial(variant, True))
        for name in networks:
            if name != "ours":
                yield {"of": name, **about}, partial(in_turns, partial(make, name))
        if "guided-diffusion" in networks and self.device.type == "cuda":
            half = partial(GuidedInHalf, self.options.guided_diffusion, shape, batch_size, self.device)
            yield {"of": "guided-diffusion, its own fp16", **about}, partial(in_turns, half)
        yield {"of": "ours, bf16 weights", **about}, partial(in_turns, partial(variant, True, None, True))
        yield {"of": "ours, compiled", **about}, partial(in_turns, partial(variant, True, "default"))
        yield {"of": "ours, CUDA graphs", **about}, partial(in_turns, partial(variant, True, "reduce-overhead"))
        graphs_in_bfloat16 = partial(variant, True, "reduce-overhead", True)
        yield {"of": "ours, CUDA graphs, bf16 weights", **about}, partial(in_turns, graphs_in_bfloat16)

    def within_autocast(self, peer: Any, of: str) -> Callable[[], Any]:
        def work() -> None:
            with self.autocast() if peer.in_autocast else contextlib.nullcontext():
                (peer.forward if of == "forward" else peer.step)()

        return work

    def preset_names(self) -> list[str]:
        return TOY_PRESETS if self.toy else self.options.presets

    def network(self, name: str, batch_size: int) -> Network:
        return Network(get_preset(name), batch_size, channels_last=True, device=self.device)

    def profile(self) -> Iterator[Point]:
        """Of a training step: the operations in which the device spends its time."""
        name, batch_size = self.preset_names()[0], 2 if self.toy else 16

        def shares() -> dict[str, Any]:
            return {"share": operations(self.step_of(self.network(name, batch_size)), self.device)}

        yield {"preset": name, "batch_size": batch_size}, shares

    def step_of(self, network: Network) -> Callable[[], None]:
        def step() -> None:
            with self.autocast():
                loss = network.loss()
            network.update(loss)

        return step

    def presets(self) -> Iterator[Point]:
        """Calls and training steps, in channels_last."""

        def measure(name: str, batch_size: int) -> dict[str, Any]:
            network, preset = self.network(name, batch_size), get_preset(name)
            multiply_adds = batch_size * count_multiply_adds(build_on_meta(preset.unet))

            def forward() -> None:
                with self.autocast():
                    network.forward()

            figures = {}
            for of, work, factor in (("forward", forward, 1), ("step", self.step_of(network), CALLS_OF_A_STEP)):
                taken = self.timed(work)
                speed = {"milliseconds": rounded(1000 * taken), "images_per_second": rounded(batch_size / taken)}
                figures[of] = speed | self.rate_of(factor * multiply_adds, taken)
            if self.device.type == "cuda":
                figures["peak_gibibytes"] = rounded(torch.cuda.max_memory_allocated() / 2**30)
            return figures

        for name in self.preset_names():
            batch_size = 2 if self.toy else 16 if get_preset(name).unet.sample_size <= 64 else 4
            yield {"preset": name, "batch_size": batch_size}, partial(measure, name, batch_size)

    def latency(self) -> Iterator[Point]:
        """Of the shipped cascades with their defaults."""

        def measure(folder: Path, dtype: torch.dtype, count: int) -> dict[str, Any]:
            pipeline = CascadedDiffusionPipeline.from_pretrained(folder).to(self.device, dtype)
            pipeline.set_progress_bar_config(disable=True)
            labels = [index % pipeline.base_unet.config.num_classes for index in range(count)]
            taken = self.timed(lambda: pipeline(labels, output_type="pt"))
            return {"milliseconds": rounded(1000 * taken), "images_per_second": rounded(count / taken)}

        folders = [file.parent for file in sorted((ROOT / "checkpoints").glob("*/model_index.json"))]
        dtypes = [torch.float32, torch.bfloat16] if self.device.type == "cuda" else [torch.float32]
        for folder in folders[:1] if self.toy else folders:
            for dtype in dtypes:
                for count in (1,) if self.toy else (1, 8, 64, 512):
                    about = {"cascade": folder.name, "dtype": str(dtype).removeprefix("torch."), "images": count}
                    yield about, partial(measure, folder, dtype, count)

    def loaders(self) -> Iterator[Point]:
        """JPEGs of 256x256 pixels."""

        def measure(number: int) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                return next(workers(Path(folder), 16 if self.toy else 2048, [number]))

        for number in (0,) if self.toy else (0, 1, 2, 4, 8, 16):
            yield {"of": "loader"}, partial(measure, number)

    def batches(self) -> Iterator[Point]:
        """The largest power of two that a training step takes in bf16, without gradient checkpointing."""

        def measure(name: str) -> dict[str, Any]:
            largest = None
            for exponent in range(1 if self.toy else 12):
                try:
                    network = self.network(name, 2**exponent)
                    self.step_of(network)()
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
                except torch.OutOfMemoryError:
                    break
                largest = 2**exponent
                network = None
            return {"largest_batch": largest}

        for name in self.preset_names():
            yield {"preset": name}, partial(measure, name)


def build_on_meta_like(network: torch.nn.Module) -> Any:
    """The same network without weights, for counting."""
    with torch.device("meta"):
        return type(network).from_config(network.config).eval()


class GuidedInHalf(Peer):
    """guided-diffusion's network and its own training in fp16, with float32 master weights and a scaled loss."""

    in_autocast = False

    def __init__(self, folder: str, shape: dict[str, int], batch_size: int, device: torch.device):
        network = openai_unet(folder, **shape, use_fp16=True)
        super().__init__(network, batch_size, shape["image_size"], device)
        from guided_diffusion.fp16_util import MixedPrecisionTrainer

        self.trainer = MixedPrecisionTrainer(model=self.network, use_fp16=True)
        self.optimizer = torch.optim.AdamW(self.trainer.master_params, fused=True)

    def step(self) -> None:
        self.trainer.zero_grad()
        output = call(self.network, self.x, self.t, self.labels)
        self.trainer.backward((output[:, :3].float() - self.noise).square().mean())
        self.trainer.optimize(self.optimizer)


def table(results: list[dict[str, Any]]) -> str:
    """What was measured, for a person."""
    rows = []
    for result in results:
        about = ", ".join(
            str(result[key]) for key in ("of", "preset", "cascade", "dtype", "images", "workers") if key in result
        )
        missing = result.get("left_out") or result.get("failed")
        parts = {key: value for key, value in result.items() if key in ("forward", "step")} or {"": result}
        for of, figures in parts.items():
            cells = [figures.get(key) for key in ("milliseconds", "ratio", "images_per_second", "tflops", "of_matmul")]
            rows.append([result["part"], about, of, *cells, missing or result.get("largest_batch")])
    header = ["part", "of", "", "ms", "by ours", "images/s", "TFLOP/s", "of matmul", "largest batch, or why none"]
    return markdown_table(header, rows)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu.json", help="JSON file, written after every point.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=paper_presets(), help="Default: the paper's.")
    parser.add_argument("--guided_diffusion", metavar="DIR", help="Folder with the repository.")
    parser.add_argument("--device", help="Default: a GPU where there is one.")
    parser.add_argument("--toy", action="store_true", help="Small numbers, to see whether it works.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    benchmark = Benchmark(parse_args(arguments))
    benchmark.run()
    print(table(benchmark.results))


def paper_presets() -> list[str]:
    """Those of ImageNet and LSUN, what costs least first."""
    names = [name for name in PRESETS if name.startswith(("imagenet", "lsun"))]
    return sorted(names, key=lambda name: (name != "imagenet_64", get_preset(name).unet.sample_size))


if __name__ == "__main__":
    main()
