"""
Prints what a pipeline takes besides its networks, as one JSON line.

    OMP_NUM_THREADS=1 python -m benchmarks.sampling --num_images 8

A call of the pipeline and a loop written out by hand take turns in one process: the same networks at the same times on
as many images, guided alike, and then the `step` of a solver of Diffusers, or x_{t-1} = a x_0 + b x_t + c noise.
`ratio` is the call's time by the loop's, its median over the rounds, with the quartiles; on a CPU it is CPU time.
`besides_networks` is the share of either that is spent outside of the networks, and `milliseconds_a_step` that time by
the number of steps.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.models.arguments import low_res_channels_of
from cdm_diffusers.pipelines.denoising import AncestralSampler, make_sampler
from cdm_diffusers.pipelines.stages import CascadeStage


class Clock:
    """Time in all, and within the networks."""

    def __init__(self, pipeline: CascadedDiffusionPipeline):
        self.is_cpu = pipeline.device.type == "cpu"
        self.within_networks = 0.0
        for stage in pipeline.stages:
            stage.unet.forward = self.timed(stage.unet.forward)

    def now(self) -> float:
        if not self.is_cpu:
            torch.cuda.synchronize()
        return time.process_time() if self.is_cpu else time.perf_counter()

    def timed(self, forward: Any) -> Any:
        if not self.is_cpu:  # launches are all that could be timed without waiting
            return forward

        def timed_forward(*arguments, **options):
            start = self.now()
            output = forward(*arguments, **options)
            self.within_networks += self.now() - start
            return output

        return timed_forward

    def measure(self, call: Any) -> tuple[float, float]:
        self.within_networks, start = 0.0, self.now()
        call()
        return self.now() - start, self.within_networks


class HandWritten:
    """A loop over the steps of one stage, for one call; all else is prepared beforehand."""

    def __init__(self, stage: CascadeStage, options: dict[str, dict], labels: torch.Tensor):
        config, steps = stage.unet.config, options["num_inference_steps"][stage.name]
        self.unet, self.weight = stage.unet, options["guidance_scale"][stage.name]
        sampler = make_sampler(stage.name, stage.unet, stage.scheduler, steps, labels.device)
        self.times, self.scheduler = list(sampler.times), sampler.scheduler
        self.is_ancestral = isinstance(sampler, AncestralSampler)
        self.shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        copies = 1 if self.weight == 1 else 2
        self.conditions = {}
        if config.num_classes is not None:
            of_null = [torch.full_like(labels, config.num_classes)] * (copies - 1)
            self.conditions["class_labels"] = torch.cat([labels, *of_null])
        if config.low_res_size is not None:
            channels = low_res_channels_of(config)
            size = copies * len(labels), channels, config.low_res_size, config.low_res_size
            self.conditions["low_res"] = torch.rand(size, device=labels.device)
        if config.augmentation_level_embedding:
            level = options["augmentation_levels"][stage.name]
            self.conditions["augmentation_level"] = torch.tensor(level, device=labels.device)

    def __call__(self, generator: torch.Generator) -> None:
        def noise() -> torch.Tensor:
            return torch.randn(self.shape, generator=generator, device=generator.device).to(self.times[0].device)

        x = noise()
        for at, timestep in zip(self.times, self.scheduler.timesteps, strict=True):
            x_t = x if self.weight == 1 else torch.cat([x, x])
            output = self.unet(x_t, at, **self.conditions, return_dict=False)[0][:, : self.shape[1]]
            if self.weight != 1:
                of_class, of_null = output.chunk(2)
                output = of_null + self.weight * (of_class - of_null)
            if self.is_ancestral:
                x_0 = (0.8 * x - 0.6 * output).clamp(-1, 1)
                x = 0.5 * x_0 + 0.5 * x + 0.1 * noise()
            else:
                x = self.scheduler.step(output, timestep, x, return_dict=False)[0]


@torch.no_grad()
def measure(pipeline: CascadedDiffusionPipeline, num_images: int, rounds: int) -> dict[str, Any]:
    """`rounds` calls of the pipeline at its defaults, and as many loops by hand in turn with them."""
    pipeline.set_progress_bar_config(disable=True)
    options, clock = pipeline.stage_options(), Clock(pipeline)
    classes = pipeline.base_unet.config.num_classes
    labels = torch.arange(num_images, device=pipeline.device) % (classes or 1)
    by_label = {"batch_size": num_images} if classes is None else {"class_labels": labels}
    steps = sum(options["num_inference_steps"].values())

    def call() -> None:
        pipeline(**by_label, generator=torch.Generator().manual_seed(0), output_type="pt")

    def by_hand(loops: list[HandWritten]) -> None:
        generator = torch.Generator().manual_seed(0)
        for loop in loops:
            loop(generator)

    taken = []
    for _ in range(rounds + 1):
        loops = [HandWritten(stage, options, labels) for stage in pipeline.stages]
        taken.append((clock.measure(call), clock.measure(partial(by_hand, loops))))
    taken = taken[1:]  # the first ones warm up
    low, ratio, high = statistics.quantiles([called[0] / looped[0] for called, looped in taken], n=4)
    result = {"ratio": round(ratio, 4), "quartiles": [round(low, 4), round(high, 4)]}
    totals = [statistics.median(total for total, _ in side) for side in zip(*taken, strict=True)]
    result["milliseconds"] = [round(1000 * total, 2) for total in totals]
    if clock.is_cpu:
        besides = [statistics.median(total - within for total, within in side) for side in zip(*taken, strict=True)]
        result["besides_networks"] = [round(time / total, 4) for time, total in zip(besides, totals, strict=True)]
        result["milliseconds_a_step"] = [round(1000 * time / steps, 3) for time in besides]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="checkpoints/fashion-mnist-32")
    parser.add_argument("--num_images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    pipeline = CascadedDiffusionPipeline.from_pretrained(options.pipeline).to(options.device)
    result = measure(pipeline, options.num_images, options.rounds)
    versions = {"torch": torch.__version__, "device": options.device, "threads": torch.get_num_threads()}
    place = {"pipeline": options.pipeline, "num_images": options.num_images, "rounds": options.rounds}
    print(json.dumps({"benchmark": "sampling", **result, **place, **versions}))


if __name__ == "__main__":
    main()
