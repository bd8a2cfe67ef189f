"""Pictures that a saved pipeline makes: of classes, and of low-resolution images."""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from ..data.pictures import labelled_grid
from ..data.transforms import image_to_tensor, to_float, to_unit
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.solvers import scheduler_of
from ..pipelines.stages import num_classes_of
from .config import PicturesConfig, SuperResolveConfig
from .loading import load_on_device
from .terminal import show


NUM_SHOWN_CLASSES = 10


def sample_pictures(config: PicturesConfig) -> None:
    """
    Writes `config.output`: a grid, or a folder of PNGs.

    Raises:
        ValueError: the pipeline is not a cascade, or does not take what is asked for.
    """
    pipeline = load_on_device(config.pipeline, config.dtype, config.device)
    if not isinstance(pipeline, CascadedDiffusionPipeline):
        raise ValueError(f"`pipeline` is {config.pipeline!r}, a stage that takes images: see `cdm super-resolve`.")
    pipeline = pipeline.with_schedulers(config.scheduler, config.inference_schedules, config.last_stage)
    labels = class_labels(config.class_labels, pipeline.config.id2label)
    if labels is None and num_classes_of(pipeline.stages) is not None:
        labels = list(range(num_classes_of(pipeline.stages)))[:NUM_SHOWN_CLASSES]
    count, target = config.num_images_per_label, Path(config.output)
    is_grid = target.suffix.lower() == ".png"
    names = row_names(labels, pipeline.config.id2label)
    files = [f"{file_name(name)}-{place}.png" for name in names for place in range(count)]
    if is_grid and target.is_dir():
        raise ValueError(f"`output` is {config.output!r}, which is a folder; give a picture another name.")
    make_folder(target.parent if is_grid else target, [] if is_grid else files)
    output = pipeline(
        class_labels=labels,
        batch_size=count if labels is None else None,
        num_images_per_label=1 if labels is None else count,
        settings=config.settings,
        num_inference_steps=config.num_inference_steps,
        augmentation_levels=levels_of(config.augmentation_levels, pipeline),
        truncated=config.truncated,
        restart_timestep=config.restart_timestep,
        guidance_scale=config.guidance_scale,
        timesteps=config.timesteps,
        consistency=config.consistency,
        generator=torch.Generator(pipeline.device).manual_seed(config.seed),
        output_stages=True,
    )
    if is_grid:
        samples = list(zip(*output.stages.values(), strict=True))
        rows = [(name, samples[row * count : (row + 1) * count]) for row, name in enumerate(names)]
        size = output.images[0].width
        grid = labelled_grid(rows, size * (config.scale or (2 if size <= 64 else 1)))
        grid.save(target)
        if config.show:
            show(grid, sys.stdout, os.environ)
        print(f"Wrote {config.output}: {' | '.join(output.stages)} side by side, in {len(rows)} rows of {count}.")
    else:
        save_all(output.images, files, target)


def class_labels(given: list[str] | None, id2label: dict[int, str] | None) -> list[int | str] | None:
    """Numbers as ints, unless a class has that name."""
    if given is None:
        return None
    named = set((id2label or {}).values())
    return [int(label) if label.isdecimal() and label not in named else label for label in given]


def levels_of(given: int | dict[str, int] | None, pipeline: CascadedDiffusionPipeline) -> dict[str, int] | None:
    """s by stage: a single value is for all stages that take one."""
    if not isinstance(given, int):
        return given
    return {stage.name: given for stage in pipeline.stages if stage.noising_scheduler is not None}


def row_names(labels: list[int | str] | None, id2label: dict[int, str] | None) -> list[str]:
    """The label of each row: class names where there are any."""
    if labels is None:
        return [""]
    return [label if isinstance(label, str) else (id2label or {}).get(label, str(label)) for label in labels]


def file_name(label: str) -> str:
    """ "T-shirt_top" for "T-shirt/top"; "image" for an empty label."""
    return re.sub(r"[^\w.-]+", "_", label) or "image"


def super_resolve(config: SuperResolveConfig) -> None:
    """
    Writes a PNG into the folder `config.output` for each of `config.images`.

    Raises:
        ValueError: an image cannot be read or has a size that no stage takes, or the pipeline does not take what is
            asked for.
    """
    pipeline = load_on_device(config.pipeline, config.dtype, config.device)
    arguments = {"class_labels": class_labels(config.class_labels, pipeline.config.id2label)}
    if isinstance(pipeline, SuperResolutionPipeline):
        stages = [pipeline.stage]
        pipeline.scheduler = scheduler_of(pipeline.stage, config.scheduler)
        arguments["augmentation_level"] = config.augmentation_level
    else:
        pipeline = pipeline.with_schedulers(config.scheduler)
        stages = pipeline.stages[1:]
        arguments["augmentation_levels"] = levels_of(config.augmentation_level, pipeline)
    sizes = [stage.unet.config.low_res_size for stage in stages]
    if not sizes:
        raise ValueError(f"`pipeline` is {config.pipeline!r}, a base alone; it must have a super-resolution stage.")
    channels = stages[0].unet.config.out_channels
    folder, files = Path(config.output), [f"{Path(file).stem}.png" for file in config.images]
    images = torch.stack([read_image(file, channels, sizes, config.resize) for file in config.images])
    make_folder(folder, files)
    output = pipeline(
        image=images,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        consistency=config.consistency,
        generator=torch.Generator(pipeline.device).manual_seed(config.seed),
        **arguments,
    )
    save_all(output.images, files, folder)


def read_image(file: str, num_channels: int, sizes: list[int], resize: bool) -> torch.Tensor:
    """
    An image file as float32 (num_channels, h, h) in [0, 1], h one of `sizes`.

    Raises:
        ValueError: it is not an image, or of another size and not to be resized.
    """
    try:
        with Image.open(file) as opened:
            image = opened.copy()
    except OSError as error:
        raise ValueError(f"`images` has {file!r}, which cannot be read as an image ({error}).") from error
    if not resize and (image.width != image.height or image.width not in sizes):
        wanted = " or ".join(f"{size}x{size}" for size in sizes)
        raise ValueError(
            f"`images` has {file!r} of {image.width}x{image.height} pixels; it must be {wanted}: --resize crops and "
            f"shrinks larger ones to {min(sizes)}x{min(sizes)}."
        )
    try:
        pixels = image_to_tensor(image, min(sizes) if resize else image.width, num_channels)
    except ValueError as error:
        raise ValueError(f"`images` has {file!r}, which {error}.") from error
    return to_unit(to_float(pixels))


def make_folder(folder: Path, names: list[str]) -> None:
    """
    Makes `folder` for pictures of these names; called before sampling, so that a bad name costs nothing.

    Raises:
        ValueError: two pictures would have the same name.
        OSError: it cannot be made.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"{names} would be written to `output`, some over others: give images with different names.")
    folder.mkdir(parents=True, exist_ok=True)


def save_all(images: Iterable[Image.Image], names: list[str], folder: Path) -> None:
    """As PNGs."""
    for image, name in zip(images, names, strict=True):
        image.save(folder / name)
    print(f"Wrote {len(names)} pictures into {folder}.")
