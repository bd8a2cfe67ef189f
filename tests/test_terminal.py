"""Pictures in terminals: which can show them, and the bytes that they are sent."""

import base64
import io
import re

import pytest
from PIL import Image
from small_cascade import small_cascade

from cdm_diffusers.commands.main import main
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
