"""Image operations of training: a decoded picture to a uint8 tensor, and what is done to batches on their device."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from ..draws import draw
from .config import parse_color


GREY_MODES = ("1", "L")


# ------------------------------------------------------------------------------------------------------------------
# One picture: PIL to a square uint8 tensor
# ------------------------------------------------------------------------------------------------------------------


class UnfitImage(ValueError):
    """What is wrong with a picture, whose name goes before it, and the remedy, the same for all with that fault."""

    def __init__(self, fault: str, remedy: str):
        super().__init__(f"{fault}: {remedy}.")
        self.fault, self.remedy = fault, remedy


@dataclass(frozen=True)
class ImageHeader:
    """
    What is known of a picture without decoding it.

    Args:
        size: width and height, in pixels.
        mode: PIL's mode.
        has_transparency: whether pixels can be transparent; whether any are, only they tell.
    """

    size: tuple[int, int]
    mode: str
    has_transparency: bool

    def check(self, source_resolution: int, padding: int = 0) -> None:
        """[`UnfitImage`], as from [`image_to_tensor`], for a size or mode that does not fit."""
        _check_mode(self.mode)
        _central_square(self.size[0] + 2 * padding, self.size[1] + 2 * padding, source_resolution)

    def is_decisive(self, num_channels: int, background: str | None = None) -> bool:
        """Whether the picture's pixels, if they can be read, hold nothing that [`image_to_tensor`] refuses."""
        is_opaque = not self.has_transparency or background is not None
        return is_opaque and (num_channels == 3 or self.mode in GREY_MODES or self.mode.startswith("I;16"))


def image_to_tensor(
    image: Image.Image, source_resolution: int, num_channels: int, padding: int = 0, background: str | None = None
) -> torch.Tensor:
    """
    Bring a picture to the square source resolution from which every stage of a cascade starts.

    It is rotated as its EXIF orientation says, and padded. The rest is BigGAN's preprocessing, which the paper uses
    (Section 4: "cropped and resized ImageNet in the same manner as BigGAN"): a centre crop to the short side, then
    PIL's antialiased bilinear resize.

    Args:
        image: a picture of any PIL mode but the 32-bit ones (`I`, `F`), whose range is unknown.
        source_resolution: side R of the result, in pixels.
        num_channels: 3 (grey is replicated) or 1 (colour is refused unless its channels are equal).
        padding: black pixels added on each of the four sides first.
        background: a colour (name or hex, as in CSS) that shows through transparent pixels.

    Returns:
        uint8 tensor of shape (num_channels, R, R).

    Raises:
        UnfitImage: the picture's mode, transparency, colour or size does not fit.
    """
    # Each step is left out where it would only copy.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = _to_channels(_without_transparency(_to_eight_bits(image), background), num_channels)
    if padding:
        image = ImageOps.expand(image, border=padding, fill=0)
    square = _central_square(image.width, image.height, source_resolution)
    if square != (0, 0, *image.size):
        image = image.crop(square)
    if image.width != source_resolution:
        image = image.resize((source_resolution, source_resolution), Image.Resampling.BILINEAR)
    # Band by band PIL copies in a third of the time that a copy of all and its transposition take.
    pixels = bytearray().join(image.tobytes("raw", band) for band in image.getbands())
    return torch.frombuffer(pixels, dtype=torch.uint8).view(num_channels, source_resolution, source_resolution)


def grey_images_to_tensor(
    images: np.ndarray, source_resolution: int, num_channels: int, padding: int = 0
) -> torch.Tensor:
    """
    `image_to_tensor` for many grey pictures of one size at once: uint8 (N, H, W) to uint8 (N, num_channels, R, R).

    Padding and cropping are single array operations; pictures go through PIL only if they are to be resized.
    """
    images = np.pad(images, ((0, 0), (padding, padding), (padding, padding)))
    left, top, right, bottom = _central_square(images.shape[2], images.shape[1], source_resolution)
    images = images[:, top:bottom, left:right]
    if right - left != source_resolution:
        size = (source_resolution, source_resolution)
        images = np.stack([Image.fromarray(image).resize(size, Image.Resampling.BILINEAR) for image in images])
    return torch.from_numpy(images)[:, None].repeat(1, num_channels, 1, 1)  # (N, C, R, R)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257.0).astype(np.uint8))  # 65535 / 257 = 255
    _check_mode(image.mode)
    return image


def _check_mode(mode: str) -> None:
    if mode in ("I", "F", "LAB"):
        raise UnfitImage(f"has PIL mode {mode!r}, of unknown range", "convert it to 8-bit RGB or grey")


def _without_transparency(image: Image.Image, background: str | None) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    if background is None:
        raise UnfitImage("has transparent pixels", "give the colour behind them, such as --background white")
    return Image.alpha_composite(Image.new("RGBA", image.size, parse_color(background)), image).convert("RGB")


def _to_channels(image: Image.Image, num_channels: int) -> Image.Image:
    mode = "RGB" if num_channels == 3 else "L"
    if image.mode == mode:
        return image
    if num_channels == 3 or image.mode in GREY_MODES:
        return image.convert(mode)
    red, green, blue = image.convert("RGB").split()
    if red.tobytes() != green.tobytes() or red.tobytes() != blue.tobytes():
        raise UnfitImage("is a colour picture and `num_channels` is 1", "train with --num_channels 3")
    return red


def _central_square(width: int, height: int, source_resolution: int) -> tuple[int, int, int, int]:
    """BigGAN's `CenterCropLongEdge`: (left, top, right, bottom), the offset rounded as torchvision does."""
    side = min(width, height)
    if side < source_resolution:
        raise UnfitImage(
            f"is {width}x{height} pixels with padding, less than `source_resolution` {source_resolution}",
            "give a smaller --source_resolution or a larger --padding, or remove it",
        )
    left, top = round((width - side) / 2), round((height - side) / 2)
    return left, top, left + side, top + side


# ------------------------------------------------------------------------------------------------------------------
# Batches, on their own device
# ------------------------------------------------------------------------------------------------------------------


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, C, H, W) to float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1. Floats stay as they are."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [-1, 1] to the nearest uint8, values outside clipped: the inverse of `to_float`."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def area_resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Shrink square float images to (B, C, size, size): each pixel is the mean of those it covers.

    Area averages compose (64 -> 32 -> 16 equals 64 -> 16), so all stages of a cascade that start from one source
    resolution see one distribution of low-resolution images.

    Raises:
        ValueError: the images are not square, or `size` does not divide their side.
    """
    height, width = images.shape[-2:]
    if height != width or size < 1 or height % size:
        raise ValueError(
            f"`size` is {size}; it must divide the side of square images, and these are {height}x{width}."
        )
    return F.avg_pool2d(images, height // size)


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image (B, C, H, W) left to right with probability 1/2, drawn from `generator` (on its device)."""
    flip = draw(torch.rand, (len(images),), generator, images.device) < 0.5  # (B,)
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def random_crop(
    images: torch.Tensor, low_res: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The same random square of each pair: images (B, C, R, R) and low-resolution images (B, C, r, r), r dividing R.

    Args:
        share: side of the square over that of the image, a whole number of low-resolution pixels. Offsets are whole
            low-resolution pixels too, all equally probable, so that averaging the crop is cropping the average.
        generator: decides the offsets, on its own device.
    """
    size = round(share * low_res.shape[-1])
    offset = partial(torch.randint, low_res.shape[-1] - size + 1)
    offsets = draw(offset, (2, len(low_res)), generator, images.device, batch_dim=1)
    ratio = images.shape[-1] // low_res.shape[-1]
    return _crop(images, offsets * ratio, size * ratio), _crop(low_res, offsets, size)


def _crop(images: torch.Tensor, offsets: torch.Tensor, size: int) -> torch.Tensor:
    """Squares of `size` from images (B, C, H, W), at their own offsets (2, B) from the top and from the left."""
    rows, columns = offsets[:, :, None] + torch.arange(size, device=images.device)  # (B, size)
    which = torch.arange(len(images), device=images.device)
    return images[which[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)  # (B, C, s, s)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Float images in [-1, 1] to [0, 1], values outside clipped."""
    return (images / 2 + 0.5).clamp(0, 1)
