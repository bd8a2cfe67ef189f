"""Images laid out in one picture."""

import torch
from diffusers.utils import make_image_grid
from PIL import Image


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
