"""What there is to train on, what training would refuse, and what the stages of a cascade will see."""

import itertools
from collections import Counter
from collections.abc import Iterator

import torch
from PIL import Image

from ..data.config import DataCheckConfig
from ..data.labels import UnfitRow
from ..data.memory import ImageData
from ..data.pictures import labelled_grid
from ..data.sources import open_images
from ..data.survey import SHOWN_CLASSES, Survey, description, spread, survey
from ..data.transforms import area_resize, to_float, to_uint8


CELL_SIZE = 64
SHOWN_PROBLEMS = 5


def check_data(config: DataCheckConfig) -> None:
    """
    Prints what `config.data` holds and draws `config.output`.

    Raises:
        ValueError: for what training would refuse.
    """
    data = open_images(config.data_config())
    print(description(data), flush=True)
    refusals = []
    if data.rows is not None:
        found = survey(data.rows)
        refusals = found.refusals()
        print(as_text(found))
    if config.output is not None:
        sizes = sorted({*config.sizes, config.resolution})
        rows = picture_rows(data, sizes, config.images_per_class)
        if rows:
            labelled_grid(rows, max(CELL_SIZE, config.resolution)).save(config.output)
            print(f"{config.output}: each image at {', '.join(f'{size}x{size}' for size in sizes)}")
    if refusals:
        raise ValueError(" ".join(refusals))


def as_text(found: Survey) -> str:
    """Sizes and modes of the files, and the first images that training would refuse."""
    sizes = Counter(header.size for header in found.headers)
    modes = Counter(header.mode for header in found.headers)
    most_often = [f"{width}x{height} ({count:,})" for (width, height), count in sizes.most_common(3)]
    lines = [
        f"sizes: {', '.join(most_often)}" + f" and {len(sizes) - 3:,} others" * (len(sizes) > 3),
        f"shortest side: {min(map(min, sizes), default=0)}",
        f"modes: {', '.join(f'{mode} ({count:,})' for mode, count in modes.most_common())}",
        f"checked: {found.checked:,} of {len(found.rows):,} (pixels of {found.decoded:,})",
        f"unfit: {len(found.unfit):,}",
    ]
    for remedy, indices in found.by_remedy().items():
        lines.append(f"{remedy} ({len(indices):,} images):")
        lines += [f"  {found.place(index)} {found.unfit[index].fault}" for index in indices[:SHOWN_PROBLEMS]]
        lines += ["  ..."] * (len(indices) > SHOWN_PROBLEMS)
    return "\n".join(lines)


def picture_rows(
    data: ImageData, sizes: list[int], images_per_class: int
) -> list[tuple[str, list[tuple[Image.Image, ...]]]]:
    """For each of the first 20 classes that has fit images, its name and some of them at all sizes."""
    if data.id2label is None:
        indices = {"": range(len(data.dataset))}
    else:
        labels = data.dataset.labels
        classes = list(data.id2label.items())[:SHOWN_CLASSES]
        indices = {name: (labels == number).nonzero().flatten().tolist() for number, name in classes}
    rows = []
    for name, members in indices.items():
        images = fit_images(data, spread(members, 4 * images_per_class))
        groups = [views(image, sizes) for image in itertools.islice(images, images_per_class)]
        if groups:
            rows.append((name, groups))
    return rows


def fit_images(data: ImageData, indices: list[int]) -> Iterator[torch.Tensor]:
    """Those of the images at `indices` that training would take, at their source resolution."""
    for index in indices:
        try:
            yield data.dataset[index]["image"]
        except UnfitRow:
            continue


def views(image: torch.Tensor, sizes: list[int]) -> tuple[Image.Image, ...]:
    """An image (C, R, R), uint8, as stages of these sizes see it."""
    averages = [to_uint8(area_resize(to_float(image[None]), size))[0].permute(1, 2, 0).numpy() for size in sizes]
    return tuple(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels) for pixels in averages)
