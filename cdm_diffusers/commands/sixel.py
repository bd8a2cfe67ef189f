"""Pictures as sixels: columns of six pixels, a character each, as DEC's terminals of the eighties took them."""

import re

import numpy as np
from PIL import Image


NUM_COLOURS = 256
ROWS = 6  # of pixels in a band, the lowest bit on top
EMPTY = 63  # code of the character for no pixel


def sixel(image: Image.Image) -> str:
    """`image` in at most 256 colours (percentages of red, green, blue): band by band, colour by colour, in runs."""
    palettised = image.convert("RGB").quantize(NUM_COLOURS)
    palette = np.rint(np.array(palettised.getpalette()).reshape(-1, 3) / 2.55).astype(int)
    colours = "".join(f"#{number};2;{red};{green};{blue}" for number, (red, green, blue) in enumerate(palette))
    indices = np.asarray(palettised)
    bands = [_band(indices[top : top + ROWS]) for top in range(0, image.height, ROWS)]
    return f'\x1bP0;1q"1;1;{image.width};{image.height}{colours}{"-".join(bands)}\x1b\\'


def _band(indices: np.ndarray) -> str:
    """Up to six rows (R, W) of colour indices: a line of characters per colour, drawn over each other."""
    bits = 1 << np.arange(len(indices))[:, None]
    lines = []
    for colour in np.unique(indices):
        codes = EMPTY + ((indices == colour) * bits).sum(0)
        line = codes.astype(np.uint8).tobytes().decode().rstrip(chr(EMPTY))
        lines.append(f"#{colour}" + re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", line))
    return "$".join(lines)
