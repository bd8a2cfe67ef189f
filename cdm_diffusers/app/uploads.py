"""Pictures of visitors: checked, shrunk in memory to what a stage takes, and their files removed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageOps

from ..data.transforms import area_resize, image_to_tensor, to_float, to_unit
from .config import Limits


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def take_upload(file: Path, size: int, num_channels: int, limits: Limits) -> torch.Tensor:
    """
    The picture in `file`, cropped and shrunk. The file is removed, whatever happens.

    Returns:
        uint8 (C, size, size).

    Raises:
        ValueError: it cannot be read as a picture, or is too large or too small.
    """
    try:
        return _read(file, size, num_channels, limits)
    finally:
        file.unlink(missing_ok=True)


def _read(file: Path, size: int, num_channels: int, limits: Limits) -> torch.Tensor:
    with _errors_as_sentences():
        megabytes = file.stat().st_size / 2**20
    if megabytes > limits.max_upload_megabytes:
        raise ValueError(
            f"The file has {megabytes:.1f} megabytes; it must have at most {limits.max_upload_megabytes}."
        )
    with _errors_as_sentences():
        image = Image.open(file, formats=FORMATS)
    with image:
        _check_size(image, size, limits)
        with _errors_as_sentences():
            shown = ImageOps.exif_transpose(image)
            if num_channels == 1 and not shown.mode.startswith("I;16"):
                shown = shown.convert("LA" if shown.has_transparency_data else "L")
            return image_to_tensor(shown, size, num_channels, background="white")


@contextlib.contextmanager
def _errors_as_sentences() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError("The file is gone, as when two visitors upload the same at once: upload it again.") from error
    except Exception as error:  # Pillow raises errors of many types for broken metadata
        raise ValueError(f"The file cannot be read as a picture; it must be one of {', '.join(FORMATS)}.") from error


def _check_size(image: Image.Image, size: int, limits: Limits) -> None:
    given = f"The picture has {image.width}x{image.height} pixels"
    if image.width * image.height > limits.max_upload_megapixels * 1e6:
        raise ValueError(f"{given}; it must have at most {limits.max_upload_megapixels} million: shrink it first.")
    if min(image.size) < size:
        raise ValueError(f"{given}; it must have at least {size}x{size}.")


def low_res_of(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """A picture as [`take_upload`] returns it as the input (1, C, size, size), in [0, 1], of a stage."""
    return to_unit(area_resize(to_float(pixels[None]), size))
