"""What a data set holds and what is wrong with it, found out in seconds, before anything long starts."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from .labels import printable
from .memory import ImageData
from .sources import DecodedRows
from .transforms import ImageHeader, UnfitImage


logger = logging.get_logger(__name__)

MAX_HEADERS = 10_000
MAX_PIXELS, FEW_PIXELS = 1_000, 100
SHOWN_CLASSES = 20
CHUNK = 256


@dataclass
class Survey:
    """
    What is known of the images of a data set whose files are read on demand.

    Args:
        rows: the data set.
        checked: number of images whose header, or pixels where it is not enough, tell whether training refuses them.
        decoded: number of images whose pixels were read.
        headers: what was found of images that can be opened.
        unfit: what is wrong with those that training would refuse, by their index.
    """

    rows: DecodedRows
    checked: int
    decoded: int
    headers: list[ImageHeader]
    unfit: dict[int, UnfitImage]

    def place(self, index: int) -> str:
        """Row and file of an image."""
        return self.rows.decode.place(self.rows.rows[index], index)

    def by_remedy(self) -> dict[str, list[int]]:
        """Indices of unfit images by the remedy they need."""
        groups = {}
        for index in sorted(self.unfit):
            groups.setdefault(self.unfit[index].remedy, []).append(index)
        return groups

    def refusals(self) -> list[str]:
        """A sentence for each remedy: the first image that needs it, and how many do."""
        return [
            f"{self.place(indices[0])} {self.unfit[indices[0]].fault}, one of {len(indices):,} such images "
            f"among {self.checked:,} checked: {remedy}."
            for remedy, indices in self.by_remedy().items()
        ]


def survey(rows: DecodedRows, briefly: bool = False) -> Survey:
    """
    Looks at images without training on them: reads all headers and decodes at most 1,000, evenly spread over those
    whose header leaves open whether they are fit, then over the others, whose pixels may be damaged.

    Args:
        briefly: as before a training. Reads at most 10,000 headers, evenly spread over the data, decodes only images
            that they leave open, and no more than 100 where some of these are unfit.
    """
    decode, config = rows.decode, rows.decode.config
    indices = spread(range(len(rows)), MAX_HEADERS if briefly else len(rows))
    headers, unfit = _ask(rows, indices, decode.header)
    doubtful, others = [], []
    for index, header in headers.items():
        try:
            header.check(config.source_resolution, config.padding)
            is_decisive = header.is_decisive(config.num_channels, config.background)
            (others if is_decisive else doubtful).append(index)
        except UnfitImage as error:
            unfit[index] = error

    def unfit_pixels(indices: list[int]) -> dict[int, UnfitImage]:
        return _ask(rows, indices, lambda row: decode.pixels(row).shape)[1]

    few = spread(doubtful, FEW_PIXELS)
    decoded = few if briefly and unfit_pixels(few) else spread(doubtful, MAX_PIXELS)
    left_open = len(doubtful) - len(decoded)
    if not briefly:
        decoded += spread(others, MAX_PIXELS - len(decoded))
    unfit |= unfit_pixels(decoded)
    return Survey(rows, len(indices) - left_open, len(decoded), list(headers.values()), unfit)


def spread(items: Sequence[int], number: int) -> list[int]:
    """At most `number` of the items, at equal distances, the first among them."""
    if len(items) <= number:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items), number, endpoint=False).astype(int)]


def _ask(
    rows: DecodedRows, indices: list[int], question: Callable[[dict[str, Any]], Any]
) -> tuple[dict[int, Any], dict[int, UnfitImage]]:
    """Answers by index, and what is wrong with images that have none. Threads, since files are waited for."""

    def answer(row: dict[str, Any]) -> Any:
        try:
            return question(row)
        except UnfitImage as error:
            return error

    answers = {}
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK]
            answers |= zip(chunk, pool.map(answer, rows.rows.__getitems__(chunk)), strict=True)
    unfit = {index: value for index, value in answers.items() if isinstance(value, UnfitImage)}
    return {index: value for index, value in answers.items() if index not in unfit}, unfit


# ------------------------------------------------------------------------------------------------------------------
# Before a training
# ------------------------------------------------------------------------------------------------------------------


def check_before_training(data: ImageData, batch_size: int, announce: bool = True) -> None:
    """
    Prints what there is to train on, and refuses what would be refused later.

    Args:
        batch_size: images per optimizer step; where they are more than a tenth of all, there is a warning.
        announce: whether this process prints and warns.

    Raises:
        ValueError: for images that do not fit, in a sentence.
    """
    if announce:
        print(description(data), flush=True)
        warn_of_few_images(data, batch_size)
    if data.rows is not None:
        refusals = survey(data.rows, briefly=True).refusals()
        if refusals:
            raise ValueError(" ".join(refusals))


def warn_of_few_images(data: ImageData, batch_size: int) -> None:
    """Warns where the data makes fewer than ten batches."""
    if not data.is_stream and len(data.dataset) < 10 * batch_size:
        logger.warning(
            f"The data has {len(data.dataset):,} images, fewer than ten batches of {batch_size:,}, which a network "
            "may memorise: give more images or a smaller --train_batch_size."
        )


def description(data: ImageData) -> str:
    """Lines that say how many images there are of each class (of the first 20), and what was left out and why."""
    if data.is_stream:
        return "images as they are streamed, not counted"
    lines = [f"{len(data.dataset):,} images"]
    if data.id2label is not None:
        lines[0] += f" in {len(data.id2label):,} class{'es' * (len(data.id2label) > 1)}"
        lines += _class_lines(data.dataset.labels, data.id2label)
    for reason, paths in data.left_out.items():
        lines.append(f"left out: {len(paths):,} {reason}, such as {paths[0]!r}")
    return "\n".join(lines)


def _class_lines(labels: torch.Tensor, id2label: dict[int, str]) -> list[str]:
    counts = torch.bincount(labels.cpu(), minlength=len(id2label)).tolist()
    lines = [f"{counts[index]:8,}  {printable(name)}" for index, name in list(id2label.items())[:SHOWN_CLASSES]]
    rest = counts[SHOWN_CLASSES:]
    if rest:
        lines.append(f"{sum(rest):8,}  in {len(rest):,} more classes, of {min(rest):,} to {max(rest):,} images")
    return lines
