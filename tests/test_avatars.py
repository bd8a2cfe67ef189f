"""examples/avatars: what is rendered, how it is loaded, and that it does not depend on how often a run was begun."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.sources import open_images


FOLDER = Path(__file__).parent.parent / "examples" / "avatars"
NODE = shutil.which("node")
STYLES = ["adventurer", "big-smile", "dylan", "fun-emoji", "lorelei", "micah", "miniavs", "notionists", "open-peeps"]
STYLES += ["personas", "pixel-art", "thumbs", "toon-head"]
COUNTS = {"train": 4, "validation": 2}
SETTINGS = ["--images_per_style", "4", "--validation_images_per_style", "2", "--size", "32"]

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="Node is not installed"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules").is_dir(), reason="needs `npm ci --prefix examples/avatars` beforehand"
    ),
]


def render(*options: object) -> subprocess.CompletedProcess:
    return subprocess.run([NODE, FOLDER / "render.mjs", *map(str, options)], capture_output=True, text=True)


def render_into(folder: Path, *options: object) -> str:
    """The progress of a run that succeeds."""
    result = render("--output", folder, *SETTINGS, *options)
    assert result.returncode == 0, result.stderr
    return result.stderr


def metadata(folder: Path, split: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]
    return [row | {"attributes": json.loads(row["attributes"])} for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(folder: Path, split: str, row: dict) -> np.ndarray:
    return np.asarray(Image.open(folder / split / row["file_name"]))


def colour(text: str) -> list[int]:
    return list(bytes.fromhex(text.removeprefix("#")))


@pytest.fixture(scope="module")
def avatars(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("avatars") / "two-processes"
    render_into(folder, "--processes", 2)
    return folder


@pytest.fixture(scope="module")
def transparent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("avatars") / "transparent"
    render_into(folder, "--transparent", "--processes", 1)
    return folder


def test_every_style_has_its_images_and_nothing_unfinished_is_left(avatars):
    for split, count in COUNTS.items():
        names = {f"{split}/{style}/{number:05d}.png" for style in STYLES for number in range(count)}
        assert names <= contents(avatars).keys()
    assert len(contents(avatars)) == 13 * 6 + 3


def test_the_number_of_processes_changes_nothing(avatars, tmp_path):
    render_into(tmp_path / "one-process", "--processes", 1)
    assert contents(tmp_path / "one-process") == contents(avatars)


def test_a_second_start_renders_what_is_missing(avatars, tmp_path):
    folder = tmp_path / "interrupted"
    shutil.copytree(avatars, folder)
    kept = folder / "train" / "dylan" / "00000.png"
    os.utime(kept, (0, 0))
    for name in ("train/dylan/00003.png", "validation/thumbs/00001.png", "train/metadata.jsonl"):
        (folder / name).unlink()
    (folder / "train" / "dylan" / ".unfinished-00003.png").write_bytes(b"cut off")
    assert "rendered 2 images" in render_into(folder, "--processes", 1)
    assert contents(folder) == contents(avatars)
    assert kept.stat().st_mtime == 0


def test_the_splits_share_neither_seed_nor_drawing(avatars):
    train, validation = (metadata(avatars, split) for split in COUNTS)
    seeds = [row["seed"] for row in train + validation]
    assert len(set(seeds)) == len(seeds) == 13 * 6
    faces = [{str(row["attributes"]) for row in rows if row["label"] == "fun-emoji"} for rows in (train, validation)]
    assert faces[0].isdisjoint(faces[1])


@pytest.mark.parametrize("split", COUNTS)
def test_our_loader_names_the_classes_by_style(avatars, split):
    data = open_images(DataConfig(train_data_dir=str(avatars), source_resolution=32, dataset_split=split))
    assert data.id2label == dict(enumerate(STYLES))
    assert len(data.dataset) == 13 * COUNTS[split]
    by_image = {pixels(avatars, split, row).tobytes(): row["label"] for row in metadata(avatars, split)}
    for item in data.dataset:
        assert data.id2label[int(item["label"])] == by_image[item["image"].permute(1, 2, 0).numpy().tobytes()]


def test_imagefolder_has_both_splits_and_the_attributes(avatars, tmp_path):
    data = load_dataset("imagefolder", data_dir=str(avatars), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in data.items()} == {split: 13 * n for split, n in COUNTS.items()}
    row, written = data["validation"][-1], metadata(avatars, "validation")[-1]
    assert row["image"].mode == "RGB" and row["image"].size == (32, 32)
    assert (row["label"], row["seed"], row["background"]) == ("toon-head", written["seed"], written["background"])
    assert json.loads(row["attributes"]) == written["attributes"]


@pytest.mark.parametrize("split", COUNTS)
def test_metadata_agrees_with_folders_and_pictures(avatars, split):
    for row in metadata(avatars, split):
        image = pixels(avatars, split, row)
        assert image.shape == (32, 32, 3)
        assert row["file_name"].startswith(row["label"] + "/")
        if row["label"] in ("dylan", "fun-emoji", "lorelei", "personas"):  # nothing is drawn in their corners
            assert image[0, 0].tolist() == colour(row["background"])
        if row["label"] == "thumbs":  # a large shape of one colour, cut off by the lower edge
            assert image[31, 16].tolist() == colour(row["attributes"]["shapeColor"])


def test_attributes_name_only_parts_that_are_drawn(avatars):
    rows = [row["attributes"] for split in COUNTS for row in metadata(avatars, split) if row["label"] == "micah"]
    assert all(("glasses" in row) == ("glassesColor" in row) for row in rows)
    assert all(("earrings" in row) == ("earringColor" in row) for row in rows)
    assert all({"mouth", "hair", "hairColor"} <= row.keys() for row in rows)
    assert not any("base" in row or "ackground" in str(row) for row in rows)


def test_transparent_images_give_the_others_on_their_background(avatars, transparent):
    for row, see_through in zip(metadata(avatars, "train"), metadata(transparent, "train"), strict=True):
        assert see_through["background"] == "transparent" and see_through["seed"] == row["seed"]
        image = Image.open(transparent / "train" / see_through["file_name"])
        assert image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 0
        behind = Image.new("RGBA", image.size, tuple(colour(row["background"])))
        if row["label"] in ("adventurer", "dylan", "lorelei", "miniavs", "thumbs"):  # no blending with what is behind
            joined = np.asarray(Image.alpha_composite(behind, image).convert("RGB"), int)
            assert np.abs(joined - pixels(avatars, "train", row)).max() <= 4  # rounding of several layers


def test_a_folder_grows_to_what_it_would_have_been(avatars, tmp_path):
    render_into(tmp_path, "--images_per_style", 2, "--validation_images_per_style", 1)
    assert "39 of 78 images were there before" in render_into(tmp_path)
    assert contents(tmp_path) == contents(avatars)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--size", "64"], ["made with --size 32, not 64", "give another folder"]),
        (["--transparent"], ["made with --transparent false, not true"]),
        (["--images_per_style", "3"], ["made with --images_per_style 4, not 3", "or more images"]),
    ],
)
def test_other_settings_are_refused_in_the_same_folder(avatars, options, parts):
    before = contents(avatars)
    result = render("--output", avatars, *SETTINGS, *options)
    assert result.returncode == 2
    assert all(part in result.stderr for part in ["--output", *parts])
    assert contents(avatars) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--output '' names no folder; give one, such as --output avatars"),
        (["--output", FOLDER], f"--output '{FOLDER}' holds other files; give a new or empty folder"),
        (["--output", __file__], f"--output '{__file__}' is a file; give a folder"),
        (["--output", "x", "--size", "0"], "--size '0' must be a whole number from 1 to 4096"),
        (["--output", "x", "--processes", "two"], "--processes 'two' must be a whole number from 1 to 1024"),
        (["--output", "x", "--images_per_style"], "--images_per_style has no value; give one after it"),
        (["--output", "x", "--transparent=no"], "--transparent has the value 'no'; leave the value out"),
        (["--output", "x", "--colour", "red"], "--colour is not an option; give one of --output, "),
        (["avatars"], "'avatars' belongs to no option; give it after one, as in --output avatars"),
    ],
)
def test_bad_arguments_are_named_in_one_sentence(options, message):
    result = render(*options)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
