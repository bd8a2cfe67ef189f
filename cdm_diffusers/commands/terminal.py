"""Pictures in terminals that can show them: by kitty's protocol, or by iTerm2's."""

import base64
import io
import shutil
from collections.abc import Mapping
from typing import TextIO

from PIL import Image


KITTY_CHUNK = 4096  # characters of base64 in one escape sequence
CELL_WIDTH = 8  # pixels, about


def show(image: Image.Image, stream: TextIO, environment: Mapping[str, str]) -> bool:
    """
    Writes `image` to `stream` where that is a terminal which, by its `environment`, shows pictures.

    Returns:
        Whether it was written.
    """
    protocol = protocol_of(environment) if stream.isatty() else None
    if protocol is None:
        return False
    file = io.BytesIO()
    image.save(file, "PNG")
    content = base64.b64encode(file.getvalue()).decode()
    stream.write((kitty(content, image.width) if protocol == "kitty" else iterm(content)) + "\n")
    stream.flush()
    return True


def protocol_of(environment: Mapping[str, str]) -> str | None:
    """ "kitty", "iterm" or None; None within tmux and screen, which do not let pictures through."""
    if "TMUX" in environment or "STY" in environment:
        return None
    program = environment.get("TERM_PROGRAM")
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "kitty" if program == "ghostty" else None


def kitty(content: str, width: int) -> str:
    """A PNG in base64, `width` pixels wide, as kitty takes it: in chunks, at most as wide as the terminal."""
    columns = shutil.get_terminal_size().columns
    keys = "a=T,f=100,q=2" + (f",c={columns}" if width > CELL_WIDTH * columns else "")
    chunks = [content[start : start + KITTY_CHUNK] for start in range(0, len(content), KITTY_CHUNK)]
    heads = [f"{keys},m=1", *["m=1"] * (len(chunks) - 2), "m=0"] if len(chunks) > 1 else [keys]
    return "".join(f"\x1b_G{head};{chunk}\x1b\\" for head, chunk in zip(heads, chunks, strict=True))


def iterm(content: str) -> str:
    """A PNG in base64 as iTerm2 takes it, which shrinks it to its width."""
    return f"\x1b]1337;File=inline=1:{content}\a"
