"""
Prints the tables of `docs/scaling.md`: what the paper's runs cost on 8, 64 and 256 GPUs, one table for each question.

    python -m benchmarks.scaling
    python -m benchmarks.scaling hours --gpus 16 --utilisation 0.4

Counted, not measured: multiply-adds and what the backward pass keeps are counted on torch's meta device
(`models/costs.py`, `benchmarks/preset_costs.py`), GPU-hours as `cdm reproduce --dry_run` does (`studies/plan.py`), and
the rest follows from the options, whose defaults are the page's assumptions.
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.preset_costs import count_kept_bytes
from cdm_diffusers.models.costs import build_on_meta, count_multiply_adds
from cdm_diffusers.presets import PRESETS, StagePreset, get_preset
from cdm_diffusers.studies.plan import CALLS_OF_A_STEP, CHECKPOINT_BYTES, H100_TFLOPS, PIPELINE_BYTES, UTILISATION
from cdm_diffusers.tables import markdown_table


PRESET_NAMES = [name for name in PRESETS if name.startswith(("imagenet", "lsun"))]
STATE_BYTES = 20  # a parameter's weight, gradient, AdamW's two moments and the average, in float32
GIB, MIB = 2**30, 2**20
FID_IMAGES = 50_000


@dataclass(frozen=True)
class Rates:
    """What is assumed; the options say what each is."""

    gpus: list[int]
    precision: str
    utilisation: float
    gpu_gib: float
    spare_gib: float
    gpus_a_node: int
    within_node: float
    between_nodes: float
    image_kilobytes: float
    decoded_a_second: float
    num_images: int
    checkpoints: int

    @property
    def flops(self) -> float:
        """Operations a second that a GPU reaches."""
        return H100_TFLOPS[self.precision] * 1e12 * self.utilisation


class Stage:
    """A preset and its counts."""

    def __init__(self, name: str):
        self.name = name
        self.preset: StagePreset = get_preset(name)
        unet = build_on_meta(self.preset.unet)
        self.parameters = unet.num_parameters()
        self.multiply_adds = count_multiply_adds(unet)
        self.kept = count_kept_bytes(unet)  # of an image, in float32
        self.batch_size, self.steps = self.preset.training.train_batch_size, self.preset.training.max_train_steps

    def step_seconds(self, rates: Rates, gpus: int) -> float:
        """Of a training step without waiting for anything."""
        return 2 * CALLS_OF_A_STEP * self.multiply_adds * self.batch_size / gpus / rates.flops

    def exchange_seconds(self, rates: Rates, gpus: int) -> float:
        """Of summing all GPUs' gradients in rings, which cross between nodes on all of a node's links at once."""
        speed = rates.within_node
        if gpus > rates.gpus_a_node:
            speed = min(speed, rates.gpus_a_node * rates.between_nodes)
        return 2 * (gpus - 1) / gpus * 4 * self.parameters / (speed * 1e9)

    def images_a_second(self, rates: Rates) -> float:
        """That one GPU trains on."""
        return rates.flops / (2 * CALLS_OF_A_STEP * self.multiply_adds)

    def micro_batch(self, rates: Rates, gpus: int) -> int | None:
        """The largest power of two that fits, of a GPU's share of the batch; None if not even one image fits."""
        room = (rates.gpu_gib - rates.spare_gib) * GIB - STATE_BYTES * self.parameters
        kept = self.kept / (1 if rates.precision == "float32" else 2)
        fitting = min(int(room // kept), self.batch_size // gpus)
        return None if fitting < 1 else 2 ** int(math.log2(fitting))


def hours(stages: list[Stage], rates: Rates) -> str:
    """How long do trainings and samples take?"""
    header = ["preset", "steps x batch", "GPU-hours", *(f"hours on {gpus}" for gpus in rates.gpus)]
    header.append(f"GPU-hours to sample {FID_IMAGES:,}")
    rows = []
    for stage in stages:
        taken = stage.steps * stage.step_seconds(rates, 1) / 3600
        sampled = (
            FID_IMAGES * stage.preset.inference.num_inference_steps * 2 * stage.multiply_adds / rates.flops / 3600
        )
        longer = [max(stage.step_seconds(rates, gpus), stage.exchange_seconds(rates, gpus)) for gpus in rates.gpus]
        hours_taken = [f"{stage.steps * seconds / 3600:,.1f}" for seconds in longer]
        batch = f"{stage.steps:,} x {stage.batch_size:,}"
        rows.append([f"`{stage.name}`", batch, f"{taken:,.0f}", *hours_taken, f"{sampled:,.0f}"])
    return markdown_table(header, rows)


def memory(stages: list[Stage], rates: Rates) -> str:
    """Does it fit, and into how many micro-batches is a step divided?"""
    header = ["preset", "state", f"state, in shards of {rates.gpus[0]}", "kept per image"]
    header += [f"micro-batches x images on {gpus}" for gpus in rates.gpus]
    rows = []
    for stage in stages:
        state, kept = STATE_BYTES * stage.parameters, stage.kept / (1 if rates.precision == "float32" else 2)
        divided = []
        for gpus in rates.gpus:
            micro_batch = stage.micro_batch(rates, gpus)
            divided.append(micro_batch and f"{stage.batch_size // gpus // micro_batch} x {micro_batch}")
        sizes = [f"{state / GIB:.1f} GiB", f"{state / rates.gpus[0] / GIB:.1f} GiB", f"{kept / MIB:,.0f} MiB"]
        rows.append([f"`{stage.name}`", *sizes, *divided])
    return markdown_table(header, rows)


def network(stages: list[Stage], rates: Rates) -> str:
    """How much of a step is the exchange of gradients, were it not hidden behind the backward pass?"""
    header = ["preset", "gradients"]
    header += [f"{what} on {gpus}" for gpus in rates.gpus for what in ("step", "exchange")]
    rows = []
    for stage in stages:
        size, cells = 4 * stage.parameters, []
        for gpus in rates.gpus:
            step, exchange = stage.step_seconds(rates, gpus), stage.exchange_seconds(rates, gpus)
            cells += [f"{1000 * step:,.0f} ms", f"{1000 * exchange:,.0f} ms ({exchange / step:.0%})"]
        rows.append([f"`{stage.name}`", f"{size / 1e9:.2f} GB", *cells])
    return markdown_table(header, rows)


def storage(stages: list[Stage], rates: Rates) -> str:
    """What is read and kept, and which CPUs decode it?"""
    header = ["preset", "images/s of a GPU", "decoding cores a GPU"]
    header += [f"read on {gpus}" for gpus in rates.gpus]
    header += ["passes over the data", "a checkpoint", f"{rates.checkpoints} checkpoints and the pipeline"]
    rows = []
    for stage in stages:
        rate, checkpoint = stage.images_a_second(rates), CHECKPOINT_BYTES * stage.parameters
        read = [f"{gpus * rate * rates.image_kilobytes / 1e3:,.0f} MB/s" for gpus in rates.gpus]
        passes = stage.steps * stage.batch_size / rates.num_images
        kept = rates.checkpoints * checkpoint + PIPELINE_BYTES * stage.parameters
        cores = f"{rate / rates.decoded_a_second:.1f}"
        sizes = [f"{passes:,.0f}", f"{checkpoint / 1e9:.1f} GB", f"{kept / 1e9:.0f} GB"]
        rows.append([f"`{stage.name}`", f"{rate:,.0f}", cores, *read, *sizes])
    return markdown_table(header, rows)


@functools.cache
def counted(name: str) -> Stage:
    """The stage of a preset, once for all questions."""
    return Stage(name)


QUESTIONS: dict[str, Callable[[list[Stage], Rates], str]] = {
    "hours": hours,
    "memory": memory,
    "network": network,
    "storage": storage,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"{', '.join(QUESTIONS)}. Default: all.")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESET_NAMES, help="Default: the paper's.")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--precision", choices=H100_TFLOPS, default="bf16", help="Of the network's calls.")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="Share of the peak that is reached.")
    parser.add_argument("--gpu_gib", type=float, default=80, help="Memory of a GPU.")
    parser.add_argument("--spare_gib", type=float, default=10, help="Of that, what stays free for all else.")
    parser.add_argument("--gpus_a_node", type=int, default=8)
    parser.add_argument("--within_node", type=float, default=300, help="GB/s of a GPU to its neighbours.")
    parser.add_argument("--between_nodes", type=float, default=40, help="GB/s of a GPU to those of other nodes.")
    parser.add_argument("--image_kilobytes", type=float, default=110, help="Of an encoded image, as ImageNet's.")
    parser.add_argument("--decoded_a_second", type=float, default=150, help="Images of 500 pixels, by a core.")
    parser.add_argument("--num_images", type=int, default=1_281_167, help="Of the data, as ImageNet has.")
    parser.add_argument("--checkpoints", type=int, default=5, help="That are kept.")
    options = parser.parse_args(arguments)
    for question in options.questions:
        if question not in QUESTIONS:
            parser.error(f"`QUESTION` is {question!r}; it must be one of {', '.join(QUESTIONS)}.")
    return options


def tables(options: argparse.Namespace) -> dict[str, str]:
    """By question."""
    rates = Rates(**{name: getattr(options, name) for name in Rates.__dataclass_fields__})
    stages = [counted(name) for name in options.presets]
    return {name: QUESTIONS[name](stages, rates) for name in options.questions or QUESTIONS}


if __name__ == "__main__":
    for name, text in tables(parse()).items():
        print(f"{QUESTIONS[name].__doc__}\n\n{text}\n")
