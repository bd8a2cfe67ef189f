"""Samples drawn while a stage trains: a picture to look at, and their moments beside the data's."""

import itertools
from collections.abc import Callable

import torch
from PIL import Image

from ..data.memory import ImageData
from ..data.pictures import grid_of
from ..data.transforms import area_resize, to_float, to_unit
from ..presets import StagePreset
from .config import RunConfig


NUM_STATISTICS_IMAGES = 1024
MAX_GRID_CLASSES = 10


class Validation:
    """
    Samples of a base stage: `num_validation_images` over up to 10 classes, one class per row. Of a super-resolution
    stage: as many images of the data, each as low-resolution input, sample and original side by side.
    """

    def __init__(self, config: RunConfig, preset: StagePreset, data: ImageData):
        self.config, self.preset, self.id2label = config, preset, data.id2label
        self.is_base = preset.unet.low_res_size is None
        items = take(data, NUM_STATISTICS_IMAGES if self.is_base else config.num_validation_images)
        images = to_float(torch.stack([item["image"] for item in items])).cpu()
        self.real = area_resize(images, preset.unet.sample_size)
        if not self.is_base:
            self.low_res = to_unit(area_resize(images, preset.unet.low_res_size))
            self.labels = None if data.id2label is None else [int(item["label"]) for item in items]

    def __call__(self, pipeline, check: Callable[[], None]) -> tuple[Image.Image, dict[str, float]]:
        """
        A picture of samples, and mean and standard deviation (pixels in [-1, 1]) of samples and data.

        Args:
            check: called after each step of the sampler; what it raises ends the validation.
        """

        def on_step_end(pipeline, step, timestep, tensors):
            check()
            return tensors

        arguments = {
            "num_inference_steps": self.config.validation_inference_steps,
            "generator": torch.Generator().manual_seed(self.config.seed),
            "output_type": "pt",
            "callback_on_step_end": on_step_end,
        }
        pipeline.set_progress_bar_config(disable=True)
        if self.is_base:
            if self.id2label is None:
                columns, arguments["batch_size"] = MAX_GRID_CLASSES, self.config.num_validation_images
            else:
                labels = list(range(min(len(self.id2label), MAX_GRID_CLASSES)))
                columns = max(1, self.config.num_validation_images // len(labels))
                arguments |= {"class_labels": labels, "num_images_per_label": columns}
            cells = samples = pipeline(**arguments).images
        else:
            samples = pipeline(self.low_res, class_labels=self.labels, **arguments).images
            low_res = torch.nn.functional.interpolate(self.low_res, samples.shape[-1], mode="nearest")
            cells = torch.stack([low_res, samples.cpu(), to_unit(self.real)], dim=1).flatten(0, 1)
            columns = 3 * min(4, len(samples))
        samples = 2 * samples.cpu().float() - 1
        figures = {
            "sample_mean": samples.mean().item(),
            "sample_std": samples.std().item(),
            "data_mean": self.real.mean().item(),
            "data_std": self.real.std().item(),
        }
        return grid_of(cells.cpu().float(), columns), figures


def take(data: ImageData, count: int) -> list[dict[str, torch.Tensor]]:
    """`count` items, spread evenly where the data has a length, since folders are sorted by class."""
    if data.stream is not None:
        rows = data.stream.lane(epoch=0, number=0, num_lanes=1)
        return [data.stream[row] for row, _ in itertools.islice(rows, count)]
    count = min(count, len(data.dataset))
    return [data.dataset[i * len(data.dataset) // count] for i in range(count)]
