"""Images laid out in one picture."""

import contextlib
import functools
import importlib.util
import unicodedata
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont

from .labels import printable


CELL_SIZE = 64
LABEL_WIDTH, MARGIN, FONT_SIZE = 110, 4, 12  # beside images of up to 143 pixels; several times that beside larger ones
# Fonts that systems have, and that Pillow finds by name. Its own font has no letters but a to z.
FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")


def grid_of(images: torch.Tensor, columns: int) -> Image.Image:
    """Images (B, C, H, W) in [0, 1] in rows of `columns`; small ones are enlarged, the last row filled with black."""
    size = max(CELL_SIZE, images.shape[-1])
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    cells = [Image.fromarray(cell.squeeze(-1) if cell.shape[-1] == 1 else cell) for cell in pixels]
    cells = [cell.convert("RGB").resize((size, size), Image.Resampling.NEAREST) for cell in cells]
    rows = -(-len(cells) // columns)
    cells += [Image.new("RGB", (size, size))] * (rows * columns - len(cells))
    return make_image_grid(cells, rows, columns)


def labelled_grid(rows: list[tuple[str, list[tuple[Image.Image, ...]]]], size: int) -> Image.Image:
    """
    A picture with a row per label.

    Args:
        rows: a label, and groups of images, which stand side by side: the stages of one sample. Rows may be of any
            length.
        size: side of each image in the picture, in pixels.
    """
    gap, times = 8, max(1, round(size / 96))
    font, label_width = label_font(times * FONT_SIZE), times * LABEL_WIDTH
    group_width = size * len(rows[0][1][0]) + gap
    columns = max(len(groups) for _, groups in rows)
    grid = Image.new("RGB", (label_width + group_width * columns, (size + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (label, groups) in enumerate(rows):
        top = row * (size + gap)
        text = fitting(label, font, label_width - 2 * MARGIN)
        draw.text((MARGIN, top + size // 2), text, fill="black", font=font, anchor="lm")
        for column, images in enumerate(groups):
            for place, image in enumerate(images):
                enlarged = image.convert("RGB").resize((size, size), Image.Resampling.NEAREST)
                grid.paste(enlarged, (label_width + column * group_width + place * size, top))
    return grid


@functools.cache
def label_font(size: int) -> ImageFont.FreeTypeFont:
    """The font with the most letters that is available here, `size` pixels high."""
    found = importlib.util.find_spec("matplotlib")
    files = [] if found is None else [str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / FONTS[0])]
    for name in (*files, *FONTS):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def fitting(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """
    A label on one line, as far as it fits into `width` pixels, then with an ellipsis. A letter that the font lacks
    becomes its ASCII letter or a question mark.
    """
    missing = bytes(font.getmask("\uffff"))
    label = unicodedata.normalize("NFC", printable(label))
    shown = "".join(_plain(letter) if bytes(font.getmask(letter)) == missing else letter for letter in label)
    end = len(shown)
    while font.getlength(shown[:end] + "…" * (end < len(shown))) > width:
        end -= 1
    return shown[:end] + "…" * (end < len(shown))


def _plain(letter: str) -> str:
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"
