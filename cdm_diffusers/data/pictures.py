"""Images laid out in one picture."""

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw


CELL_SIZE = 64


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
    gap, label_width = 8, 110
    group_width = size * len(rows[0][1][0]) + gap
    columns = max(len(groups) for _, groups in rows)
    grid = Image.new("RGB", (label_width + group_width * columns, (size + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (label, groups) in enumerate(rows):
        top = row * (size + gap)
        draw.text((4, top + size // 2 - 5), label, fill="black")
        for column, images in enumerate(groups):
            for place, image in enumerate(images):
                enlarged = image.convert("RGB").resize((size, size), Image.Resampling.NEAREST)
                grid.paste(enlarged, (label_width + column * group_width + place * size, top))
    return grid
