"""Pictures in terminals that can show them: by kitty's protocol, by iTerm2's, or as sixels."""

import base64
import fcntl
import io
import os
import re
import select
import shutil
import struct
import sys
import termios
import time
from collections.abc import Mapping
from typing import TextIO

from PIL import Image

from .sixel import sixel


KITTY_CHUNK = 4096  # characters of base64 in one escape sequence
CELL_WIDTH = 8  # pixels, about
PATIENCE = 1.0  # seconds for the terminal's answer, which may come from the other end of an ssh connection
ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")  # the answer to CSI c: a class, then the terminal's features
SIXEL = b"4"


def show(image: Image.Image, stream: TextIO, environment: Mapping[str, str]) -> bool:
    """
    Writes `image` to `stream` if that is a terminal which shows pictures, as its `environment` or itself tells.

    Returns:
        Whether it was written.
    """
    if not stream.isatty():
        return False
    protocol = protocol_of(environment)
    if protocol is not None:
        file = io.BytesIO()
        image.save(file, "PNG")
        content = base64.b64encode(file.getvalue()).decode()
        written = kitty(content, image.width) if protocol == "kitty" else iterm(content)
    elif environment.get("TERM") != "dumb" and takes_sixels(stream):
        written = sixel(_no_wider_than(_pixels_across(stream), image))
    else:
        return False
    stream.write(written + "\n")
    stream.flush()
    return True


def protocol_of(environment: Mapping[str, str]) -> str | None:
    """ "kitty", "iterm" or None; None within tmux and screen, which do not let those through."""
    if "TMUX" in environment or "STY" in environment:
        return None
    program = environment.get("TERM_PROGRAM")
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "kitty" if program == "ghostty" else None


def takes_sixels(stream: TextIO) -> bool:
    """
    Asks the terminal behind `stream` and stdin whether it takes sixels, and waits for [`PATIENCE`] at most.

    It is not asked, and False is returned, if stdin is not a terminal, somebody is already typing, or this process is
    in the background.
    """
    try:
        keyboard, screen = sys.stdin.fileno(), stream.fileno()
        if os.tcgetpgrp(keyboard) != os.getpgrp():
            return False
        before = termios.tcgetattr(keyboard)
    except (AttributeError, OSError, ValueError, termios.error):  # no stdin, or a closed one, or not our terminal
        return False
    raw = [*before]
    raw[3] &= ~(termios.ICANON | termios.ECHO)  # bytes as they come, and none shown
    try:
        termios.tcsetattr(keyboard, termios.TCSANOW, raw)
        return not _has_input(keyboard, 0) and SIXEL in _attributes(keyboard, screen)
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _attributes(keyboard: int, screen: int) -> list[bytes]:
    """The features that the terminal reports; none if it does not answer in time."""
    os.write(screen, b"\x1b[c")
    answer, end = b"", time.monotonic() + PATIENCE
    while not (found := ATTRIBUTES.search(answer)):
        if not _has_input(keyboard, end - time.monotonic()) or not (more := os.read(keyboard, 1024)):
            return []
        answer += more
    return found[1].split(b";")[1:]


def _has_input(keyboard: int, seconds: float) -> bool:
    return bool(select.select([keyboard], [], [], max(0, seconds))[0])


def _pixels_across(stream: TextIO) -> int:
    _, _, across, _ = struct.unpack("HHHH", fcntl.ioctl(stream, termios.TIOCGWINSZ, bytes(8)))
    return across or CELL_WIDTH * shutil.get_terminal_size().columns  # many terminals do not report pixels


def _no_wider_than(width: int, image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((width, image.height))
    return image


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
