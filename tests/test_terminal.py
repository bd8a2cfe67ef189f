"""Pictures in terminals: which can show them, and the bytes that they are sent."""

import base64
import fcntl
import io
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from PIL import Image
from scripts import ROOT
from small_cascade import small_cascade

from cdm_diffusers.commands.main import main
from cdm_diffusers.commands.sixel import sixel
from cdm_diffusers.commands.terminal import protocol_of, show


class Terminal(io.StringIO):
    def isatty(self):
        return True


def decoded(content: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content, validate=True)))


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, None),
        ({}, None),
    ],
)
def test_which_terminals_show_pictures(environment, protocol):
    assert protocol_of(environment) == protocol


@pytest.mark.parametrize("side", [2, 100, 300])
def test_kitty_is_sent_chunks_of_a_png(side, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")  # about 240 pixels
    image, terminal = Image.effect_noise((side, side), 50), Terminal()
    assert show(image, terminal, {"TERM": "xterm-kitty"})
    written = terminal.getvalue()
    sequences = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", written)
    assert "".join(f"\x1b_G{keys};{chunk}\x1b\\" for keys, chunk in sequences) + "\n" == written
    assert all(0 < len(chunk) <= 4096 for _, chunk in sequences)
    assert decoded("".join(chunk for _, chunk in sequences)).tobytes() == image.tobytes()
    (first, *rest), fit = [keys for keys, _ in sequences], ",c=30" if side == 300 else ""
    assert first == f"a=T,f=100,q=2{fit}" + (",m=1" if rest else "")
    assert rest == ["m=1"] * (len(rest) - 1) + ["m=0"] * bool(rest) and bool(rest) == (side > 2)


def test_iterm_is_sent_one_sequence():
    image, terminal = Image.effect_noise((50, 50), 50), Terminal()
    assert show(image, terminal, {"TERM_PROGRAM": "iTerm.app"})
    (content,) = re.fullmatch(r"\x1b\]1337;File=inline=1:(.*)\a\n", terminal.getvalue()).groups()
    assert decoded(content).tobytes() == image.tobytes()


def test_files_and_other_terminals_are_sent_nothing():
    image = Image.new("L", (4, 4))
    for stream, environment in ((io.StringIO(), {"TERM": "xterm-kitty"}), (Terminal(), {"TERM": "xterm"})):
        assert not show(image, stream, environment) and stream.getvalue() == ""


# ---------------------------------------------------------------------------------------------------------------------
# Sixels


def pixels_of(written: str) -> np.ndarray:
    """(H, W, 3) in percent, -1 where no pixel is: a decoder that knows of sixels what their manual says."""
    width, height, body = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\\n?', written).groups()
    pixels, colours, x, top = np.full((int(height) + 5, int(width), 3), -1), {}, 0, 0
    tokens = re.findall(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([?-~])|([$-])", body)
    for number, red, green, blue, count, repeated, single, control in tokens:
        if red:
            colours[number] = (int(red), int(green), int(blue))
        elif number:
            colour = colours[number]
        elif control:
            x, top = 0, top + 6 * (control == "-")
        else:
            rows = [top + row for row in range(6) if (ord(repeated or single) - 63) >> row & 1]
            pixels[rows, x : x + int(count or 1)] = colour
            x += int(count or 1)
    assert (pixels[int(height) :] == -1).all()
    return pixels[: int(height)]


def drawn(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    image.paste(Image.effect_noise((width // 2, height // 2), 60), (width // 3, height // 4))
    image.paste("red", (0, 0, width // 4 + 1, height // 4 + 1))
    return image


@pytest.mark.parametrize("size", [(1, 1), (3, 6), (40, 13), (130, 47)])
def test_sixels_are_the_picture_in_256_colours(size):
    image = drawn(*size)
    expected = np.asarray(image.quantize(256).convert("RGB")) / 2.55
    assert abs(pixels_of(sixel(image)) - expected).max() <= 0.5
    assert abs(expected - np.asarray(image) / 2.55).max() < 4
    grey = Image.linear_gradient("L").crop((0, 0, 9, 256))
    assert abs(pixels_of(sixel(grey))[..., 0] - np.asarray(grey) / 2.55).max() <= 0.5


@pytest.mark.skipif(shutil.which("sixel2png") is None, reason="there is no sixel2png (Debian: libsixel-bin)")
def test_sixels_are_read_by_libsixel(tmp_path):
    image = drawn(130, 47)
    subprocess.run(["sixel2png", "-o", tmp_path / "read.png"], input=sixel(image).encode(), check=True)
    read = Image.open(tmp_path / "read.png").convert("RGB")
    assert read.size == image.size
    expected = np.asarray(image.quantize(256).convert("RGB"), float)
    assert abs(np.asarray(read, float) - expected).max() < 3  # a percent and its rounding


SHOW = """
import os, sys
from PIL import Image
from cdm_diffusers.commands import terminal

terminal.PATIENCE = float(sys.argv[1])
shown = terminal.show(Image.new("L", (1000, 7)), sys.stdout, os.environ)
print("shown" if shown else "not shown", flush=True)
print("typed", input(), flush=True)
"""
BACKGROUND = ("bash", "-c", 'set -m; "$@" & trap "kill -KILL $!" TERM; wait $!', "bash")


class Screen:
    """A terminal of 50 columns, each 10 pixels wide, with a process that shows a picture in it."""

    def __init__(self, patience: float, typed: bytes = b"", before: tuple[str, ...] = (), **variables: str):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 50, 500, 400))
        self.before = termios.tcgetattr(self.slave)
        if typed:
            os.write(self.master, typed)

        def enter():
            os.setsid()
            fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", SHOW, str(patience)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.slave),
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "TERM": "xterm", **variables},
            preexec_fn=enter,
        )
        self.written = b""

    def until(self, *texts: bytes) -> bytes:
        """Everything that was written until one of `texts` came."""
        end = time.monotonic() + 60
        while not any(text in self.written for text in texts):
            assert select.select([self.master], [], [], max(0, end - time.monotonic()))[0], self.written
            self.written += os.read(self.master, 4096)
        return self.written

    def end(self) -> bytes:
        """What was written by the end; the terminal is as it was before."""
        self.until(b"shown")
        assert termios.tcgetattr(self.slave) == self.before
        os.write(self.master, b"hello\n")
        written = self.until(b"typed hello", b"typed early", b"Error")
        assert self.process.wait(60) == 0, written
        os.close(self.master)
        os.close(self.slave)
        return written


def test_a_terminal_that_says_it_takes_sixels_is_sent_them():
    screen = Screen(patience=60)
    screen.until(b"\x1b[c")
    os.write(screen.master, b"\x1b[?62;")  # in two parts
    time.sleep(0.05)
    os.write(screen.master, b"4;22c")
    written = screen.end().decode()
    assert "not shown" not in written and "typed hello" in written
    (picture,) = re.findall(r"\x1bP.*?\x1b\\", written, re.DOTALL)
    assert pixels_of(picture).shape == (4, 500, 3)  # no wider than the terminal


@pytest.mark.parametrize("answer", [b"\x1b[?62;22c", b"\x1b[?4;6c", b"\x1b[?64c", b"q"])
def test_a_terminal_that_says_nothing_of_sixels_is_sent_none(answer):
    screen = Screen(patience=60 if answer != b"q" else 0.2)
    screen.until(b"\x1b[c")
    os.write(screen.master, answer)
    written = screen.end()
    assert b"not shown" in written and b"\x1bP" not in written and b"typed hello" in written


@pytest.mark.parametrize(
    ("options", "typed"), [({"typed": b"early\n"}, b"typed early"), ({"TERM": "dumb"}, b"typed hello")]
)
def test_who_types_or_has_a_dumb_terminal_is_not_asked(options, typed):
    written = Screen(patience=60, **options).end()
    assert b"\x1b[c" not in written and b"not shown" in written and typed in written


def test_from_the_background_nothing_is_asked():
    screen = Screen(patience=60, before=BACKGROUND)  # where it would be stopped
    assert b"not shown" in screen.until(b"shown") and b"\x1b[c" not in screen.written
    screen.process.terminate()
    screen.process.wait(60)


@pytest.mark.parametrize(("words", "is_shown"), [([], True), (["--no_show"], False)])
def test_sample_shows_its_grid_and_says_where_it_lies(words, is_shown, tmp_path, monkeypatch):
    small_cascade().save_pretrained(tmp_path / "cascade")
    terminal, picture = Terminal(), tmp_path / "samples.png"
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    for name in ("TMUX", "STY", "KITTY_WINDOW_ID", "TERM"):
        monkeypatch.delenv(name, raising=False)
    main(["sample", str(tmp_path / "cascade"), "--output", str(picture), "--num_images_per_label", "1", *words])
    assert f"Wrote {picture}" in terminal.getvalue()
    shown = re.search(r"\x1b\]1337;File=inline=1:(.*)\a", terminal.getvalue())
    assert bool(shown) == is_shown
    if is_shown:
        assert decoded(shown[1]).tobytes() == Image.open(picture).tobytes()
