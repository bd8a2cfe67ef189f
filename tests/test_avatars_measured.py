"""examples/avatars/measure.py: what is read from pixels, and how samples are compared with renders."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cdm_diffusers.evaluation.sample_store import SampleStore


SCRIPT = Path(__file__).parent.parent / "examples" / "avatars" / "measure.py"
COLORS = {"#ff0000": (255, 0, 0), "#0000ff": (0, 0, 255)}


@pytest.fixture(scope="module")
def measure():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def avatars(tmp_path_factory):
    """Two "styles", a square on the left or right, whose hair is its colour; pure backgrounds."""
    folder = tmp_path_factory.mktemp("avatars")
    for split, count in (("train", 128), ("validation", 16)):
        rows = []
        for index in range(2 * count):
            style, background, hair = ("left", "right")[index % 2], list(COLORS)[index // 2 % 2], index // 4 % 2
            image = Image.new("RGB", (32, 32), background)
            top, left = 8 + (split == "train"), 2 if style == "left" else 18  # so that no image is in both splits
            image.paste((255, 255, 255) if hair else (0, 0, 0), (left, top, left + 12, top + 16))
            name = f"{style}/{index:05d}.png"
            (folder / split / style).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / name)
            options = {"hair": "white" if hair else "black", "eyes": "none"} if style == "left" else {"eyes": "none"}
            rows.append(
                {"file_name": name, "label": style, "background": background, "attributes": json.dumps(options)}
            )
        (folder / split / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_rows_have_the_attributes_of_their_style(measure, avatars):
    left, right = measure["read_rows"](avatars, "validation")[:2]
    assert left | {"file": ""} == {"file": "", "style": "left", "background": "#ff0000", "hair": "black"}
    assert set(right) == {"file", "style", "background"}


def test_a_reader_is_trained_and_reads_samples(measure, avatars, tmp_path, monkeypatch, capsys):
    reader, samples, output = (str(tmp_path / name) for name in ("reader", "samples", "attributes.json"))
    monkeypatch.setitem(measure["main"].__globals__, "SMALLEST", 32)  # as large as the images
    common = ["measure.py", "train", "--avatars", str(avatars), "--output", reader]
    monkeypatch.setattr(sys, "argv", [*common, "--size", "32", "--num_train_epochs", "16"])
    measure["main"]()
    results = json.loads((tmp_path / "reader" / "results.json").read_text())
    assert results == {"read_right": {"style": 1.0, "background": 1.0, "hair": 1.0}, "num_images": 32}

    # samples with two of the four combinations of the style on the left, and 3 of 8 images of the wrong style
    images = torch.zeros(8, 3, 32, 32)
    images[:, 0] = 1
    images[:5, :, 8:24, 2:14], images[5:, :, 8:24, 18:30] = 1, 1
    images[0, :, 8:24, 2:14] = 0
    images[1] = images[1].roll(1, 1)  # a training image
    settings = {
        "num_images": 8,
        "batch_size": 8,
        "stages": {"base": 32},
        "channels": 3,
        "id2label": {"0": "left"},
        "kept_stages": [],
    }
    store = SampleStore(tmp_path / "samples", {**settings, "image_format": "png", "labels": "balanced"})
    store.fill([{"images": (images * 255).byte().numpy()}], torch.zeros(8, dtype=torch.int64), "storing")
    capsys.readouterr()
    command = ["measure.py", "samples", "--avatars", str(avatars), "--reader", reader, "--samples", samples]
    monkeypatch.setattr(sys, "argv", [*command, "--output", output, "--pairs", str(tmp_path / "pairs.png")])
    measure["main"]()
    report = json.loads(Path(output).read_text())
    assert report["recognised"]["share"] == 5 / 8
    assert report["differences"]["background"]["samples"] == 0.5  # all red, where half are rendered blue
    assert report["never_rendered"]["renders"] == 0
    nearest = report["nearest_render"]
    assert nearest["samples"]["smallest"] == 0 < nearest["test"]["smallest"]
    with Image.open(tmp_path / "pairs.png") as pairs:
        assert pairs.size == (8 * 64, 2 * 64)  # four pairs in a row
    assert "style recognised: 62.5% of 8" in capsys.readouterr().out


def test_differences_of_frequencies(measure):
    rows = [{"style": "a", "hair": "x"}] * 3 + [{"style": "a", "hair": "y"}] + [{"style": "b"}]
    read = [{"hair": "x"}, {"hair": "y"}, {}]
    difference = measure["frequency_difference"](read, ["a", "a", "b"], rows, "hair")
    assert difference == pytest.approx(0.25)  # 1/2 for 3/4, twice, halved; the style without hair does not count


def test_combinations_that_were_never_rendered(measure):
    rows = [{"style": "a", "background": "#fff", "hair": "x"}, {"style": "b", "background": "#000"}]
    read = [{"background": "#fff", "hair": "x"}, {"background": "#000", "hair": "x"}, {"background": "#000"}]
    assert measure["never_rendered"](read, ["a", "a", "b"], rows) == pytest.approx(1 / 3)
