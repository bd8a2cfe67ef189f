"""Folders as people have them, and what is said of data before anything long starts."""

import logging
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from scripts import run_script
from test_sources import config_for, png_bytes, random_pixels, write_idx, write_rows

from cdm_diffusers.commands.main import main
from cdm_diffusers.data import survey as survey_module
from cdm_diffusers.data.memory import held_in_memory
from cdm_diffusers.data.pictures import fitting, label_font, labelled_grid
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.data.splits import open_split
from cdm_diffusers.data.survey import check_before_training, description, spread, survey
from cdm_diffusers.data.transforms import image_to_tensor
from cdm_diffusers.options import errors_as_lines


SEE_THROUGH = np.full((4, 4, 4), 100, np.uint8)
OPAQUE = np.full((4, 4, 4), 255, np.uint8)
ODD_NAMES = ('it\'s "big"', "two\nlines", "<b>&amp;<br>", "[x]*", "50% #1?")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def save(file, pixels=None, seed=0, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_pixels((4, 4, 3), seed) if pixels is None else pixels).save(file, **options)


def save_classes(folder, count=3, pixels=None, names=("a", "b")):
    for name in names:
        for i in range(count):
            save(folder / name / f"{i}.png", pixels)
    return folder


def labels_of(data):
    return [data.id2label[int(item["label"])] for item in data.dataset]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_links_to_folders_and_files_are_followed(tmp_path):
    """Those of classes, of folders inside classes, and of the root; each image comes once."""
    elsewhere = save_classes(tmp_path / "elsewhere", names=("cats", "more"))
    root = save_classes(tmp_path / "root", count=2, names=("dog",))
    (root / "cat (1)").symlink_to(elsewhere / "cats")
    (root / "dog" / "linked.png").symlink_to(elsewhere / "more" / "0.png")
    for streaming in (False, True):
        data = open_images(config_for(root, streaming=streaming))
        assert sorted(labels_of(data)) == ["cat (1)"] * 3 + ["dog"] * 3
    (tmp_path / "way").symlink_to(root)
    assert len(open_images(config_for(tmp_path / "way")).dataset) == 6
    (root / "dog").rename(tmp_path / "dog")
    assert labels_of(open_images(config_for(root))) == ["cat (1)"] * 3


def test_links_inside_links(tmp_path):
    deep = save_classes(tmp_path / "deep", names=("birds",))
    (tmp_path / "middle").mkdir()
    (tmp_path / "middle" / "bird").symlink_to(deep / "birds")
    save_classes(tmp_path / "middle", names=("fish",))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "animals").symlink_to(tmp_path / "middle")
    assert labels_of(open_images(config_for(tmp_path / "root"))) == ["bird"] * 3 + ["fish"] * 3


@pytest.mark.parametrize("target", [".", "..", "a"])
def test_links_in_circles_are_refused(tmp_path, target):
    root = save_classes(tmp_path / "root")
    (root / "a" / "again").symlink_to(root / target)
    with pytest.raises(ValueError, match=r"root/a/again' is a link to '.*', in which it lies itself.*: remove it\.$"):
        open_images(config_for(root))


def test_one_class_trains(tmp_path):
    data = open_images(config_for(save_classes(tmp_path, names=("cat",))))
    assert data.id2label == {0: "cat"} and labels_of(data) == ["cat"] * 3
    data = open_images(config_for(tmp_path, streaming=True))
    assert data.id2label == {0: "cat"} and labels_of(data) == ["cat"] * 3


def test_images_beside_class_folders_are_refused_with_both_counts(tmp_path):
    save_classes(tmp_path)
    save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"holds 1 images beside its sub-folders, such as 'stray.png', and 6 in them"):
        open_images(config_for(tmp_path))
    assert len(open_images(config_for(tmp_path, class_conditional=False)).dataset) == 7


def test_images_without_class_folders(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"holds 2 images and no sub-folder with any: .* --unconditional"):
        open_images(config_for(tmp_path))
    assert len(open_images(config_for(tmp_path, class_conditional=False)).dataset) == 2


def test_images_at_different_depths_are_refused(tmp_path):
    save_classes(tmp_path)
    save(tmp_path / "b" / "c" / "0.png")
    with pytest.raises(ValueError, match=r"different depths, 6 like 'a/0\.png' and 1 like 'b/c/0\.png'"):
        open_images(config_for(tmp_path))


def test_metadata_files_say_which_class(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,boot\n1.png,shirt\n2.png,boot\n")
    assert labels_of(open_images(config_for(tmp_path))) == ["boot", "shirt", "boot"]


def test_what_is_left_out_is_counted(tmp_path):
    save_classes(tmp_path)
    (tmp_path / "a" / ".DS_Store").write_text("")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = open_images(config_for(tmp_path))
    assert data.left_out == {
        "hidden": [".git", "__MACOSX", "a/.DS_Store"],
        "links to nothing": ["b/gone.png"],
        "not images": ["b/notes.txt"],
    }
    assert len(data.dataset) == 6
    assert held_in_memory(data, 4, "cpu").left_out == open_split(config_for(tmp_path), 2).left_out == data.left_out
    assert "left out: 3 hidden, such as '.git'" in description(data).splitlines()


def test_a_link_to_itself_is_left_out(tmp_path, capfd):
    root = save_classes(tmp_path / "root")
    for loop in (root / "loop", root / "__loop", root / "a" / "loop.png"):
        loop.symlink_to(loop.name)
    data = open_images(config_for(root))
    assert data.left_out == {"links to nothing": ["__loop", "a/loop.png", "loop"]} and len(data.dataset) == 6
    assert capfd.readouterr().err == ""  # nothing is downloaded or shown as if it were


def test_folder_of_nothing_but_what_is_left_out(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no images, parquet, tar or IDX files \(left out: 1 not images\)"):
        open_images(config_for(tmp_path))


def test_class_names_arrive_intact_and_are_shown_on_one_line(tmp_path):
    data = open_images(config_for(save_classes(tmp_path, names=ODD_NAMES)))
    assert data.id2label == dict(enumerate(sorted(ODD_NAMES)))
    assert labels_of(data) == [name for name in sorted(ODD_NAMES) for _ in range(3)]
    lines = description(data).splitlines()
    assert len(lines) == 1 + len(ODD_NAMES) and "       3  two\\nlines" in lines


def test_names_that_datasets_cannot_read_are_refused(tmp_path):
    root = save_classes(tmp_path / "root")
    (root / "c [1]").symlink_to(root / "a")
    with pytest.raises(ValueError, match=r"root/c \[1\]' is a link and has one of .* rename it"):
        open_images(config_for(root))
    with pytest.raises(ValueError, match=r"std::list/0\.png' has '::' in its path"):
        open_images(config_for(save_classes(tmp_path / "other", names=("std::list", "b"))))
    with pytest.raises(ValueError, match=r"\(a::b\)/a/0\.png' has '::' in its path"):
        open_images(config_for(save_classes(tmp_path / "(a::b)")))
    root = save_classes(tmp_path / "rock", names=(r"AC\DC", "b"))
    with pytest.raises(ValueError, match=r"AC.*DC/0\.png' has a backslash in its path, .*: rename it\.$"):
        open_images(config_for(root))
    assert len(open_images(config_for(root, class_conditional=False)).dataset) == 6


# ---------------------------------------------------------------------------------------------------------------------
# EXIF


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_pictures_are_turned_as_exif_says(tmp_path, source):
    """Orientation 6: the first row of the stored pixels is the right edge."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = random_pixels((4, 4, 3))
    save(tmp_path / "a" / "0.png", stored, exif=exif)
    if source == "parquet":
        content = (tmp_path / "a" / "0.png").read_bytes()
        write_rows(tmp_path / "rows.parquet", [0], image=[{"bytes": content, "path": None}], label=[0])
    item = open_images(config_for(tmp_path)).dataset[0]
    expected = torch.from_numpy(np.rot90(stored, -1).copy()).permute(2, 0, 1)
    assert torch.equal(item["image"], expected)
    with Image.open(tmp_path / "a" / "0.png") as image:
        assert torch.equal(image_to_tensor(image, 4, 3), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What training would refuse


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_transparency_is_refused_before_training(tmp_path, source):
    if source == "folder":
        save_classes(tmp_path)
        save(tmp_path / "a" / "1.png", OPAQUE)
        save(tmp_path / "b" / "0.png", SEE_THROUGH)
        save(tmp_path / "b" / "2.png", SEE_THROUGH)
        place = r".*b/0\.png' \(row 3\)"
    else:
        pictures = [png_bytes(pixels) for pixels in (OPAQUE, OPAQUE, OPAQUE, SEE_THROUGH, OPAQUE, SEE_THROUGH)]
        pictures = [{"bytes": content, "path": None} for content in pictures]
        write_rows(tmp_path / "rows.parquet", [0] * 6, image=pictures, label=[0] * 6)
        place = "row 3"
    data = open_images(config_for(tmp_path))
    with pytest.raises(
        ValueError,
        match=rf"^{place} has transparent pixels, one of 2 such images among 6 checked: give the colour behind them, "
        r"such as --background white\.$",
    ):
        check_before_training(data, 1)
    check_before_training(open_images(config_for(tmp_path, background="white")), 1)


def test_few_pixels_are_decoded_where_some_are_transparent(tmp_path, monkeypatch):
    monkeypatch.setattr(survey_module, "FEW_PIXELS", 2)
    monkeypatch.setattr(survey_module, "MAX_PIXELS", 4)
    rows = open_images(config_for(save_classes(tmp_path, pixels=SEE_THROUGH))).dataset
    found = survey(rows, briefly=True)
    assert found.checked == 2 and sorted(found.unfit) == [0, 3]
    assert survey(rows).checked == 4
    for name in "ab":
        save(tmp_path / name / "0.png", OPAQUE)
    found = survey(open_images(config_for(tmp_path)).dataset, briefly=True)
    assert found.checked == 4 and len(found.unfit) == 2


def test_headers_tell_size_mode_and_damage(tmp_path):
    save_classes(tmp_path, count=4)
    save(tmp_path / "a" / "0.png", random_pixels((3, 9, 3)))
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    Image.new("F", (4, 4)).save(tmp_path / "a" / "2.tiff")
    found = survey(open_images(config_for(tmp_path)).dataset, briefly=True)
    assert {index: error.fault.partition(" (")[0] for index, error in found.unfit.items()} == {
        0: "is 9x3 pixels with padding, less than `source_resolution` 4",
        1: "cannot be read as an image",
        3: "has PIL mode 'F', of unknown range",
    }
    assert found.checked == 9 and len(found.headers) == 8 and len(found.refusals()) == 3


def test_damage_behind_the_header_is_found_by_a_full_survey_only(tmp_path):
    save_classes(tmp_path)
    file = tmp_path / "b" / "1.png"
    file.write_bytes(file.read_bytes()[:60])
    rows = open_images(config_for(tmp_path)).dataset
    assert survey(rows, briefly=True).unfit == {}
    assert list(survey(rows).unfit) == [4]


def test_colours_where_pictures_must_be_grey(tmp_path):
    save_classes(tmp_path, pixels=random_pixels((4, 4)))
    save(tmp_path / "a" / "2.png", np.repeat(random_pixels((4, 4, 1)), 3, axis=2))
    rows = open_images(config_for(tmp_path, num_channels=1)).dataset
    assert survey(rows, briefly=True).unfit == {}
    save(tmp_path / "a" / "2.png")
    rows = open_images(config_for(tmp_path, num_channels=1)).dataset
    assert list(survey(rows, briefly=True).unfit) == [2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_say_what_is_wrong_in_one_line(tmp_path, capsys, num_workers):
    save_classes(tmp_path)
    save(tmp_path / "a" / "2.png", SEE_THROUGH)  # the first is read by the main process
    data = open_images(config_for(tmp_path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, errors_as_lines("cdm train base"):
        held_in_memory(data, 4, "cpu", num_workers)
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"cdm train base: error: '\S*a/2\.png' \(row 2\) has transparent pixels: give the colour .* white\.", error
    )


def test_training_says_what_there_is_and_refuses_before_it_begins(tmp_path):
    save_classes(tmp_path / "images", pixels=SEE_THROUGH)
    words = ["--preset", "imagenet_16", "--train_data_dir", str(tmp_path / "images"), "--source_resolution", "4"]
    words += ["--sample_size", "4", "--output_dir", str(tmp_path / "run")]
    result = run_script("-m", "cdm_diffusers", "train", "base", *words)
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stdout.splitlines() == ["6 images in 2 classes", "       3  a", "       3  b"]
    assert "The data has 6 images, fewer than ten batches of 2,048" in result.stderr
    assert (
        "Traceback" not in result.stderr and "one of 6 such images among 6 checked" in result.stderr.splitlines()[-1]
    )


def test_spread():
    assert spread(range(5), 5) == spread(range(5), 9) == [0, 1, 2, 3, 4]
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(10), 0) == []


def test_few_images_are_warned_of(tmp_path, caplog):
    data = open_images(config_for(save_classes(tmp_path, count=10)))
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        check_before_training(data, 2)
        check_before_training(data, 3, announce=False)
        assert caplog.messages == []
        check_before_training(data, 3)
        (message,) = caplog.messages
        assert message.startswith("The data has 20 images, fewer than ten batches of 3")
    finally:
        logger.removeHandler(caplog.handler)


def test_description_counts_at_most_twenty_classes(tmp_path, capsys):
    names = [f"c{index:02}" for index in range(23)]
    save_classes(tmp_path, count=2, names=names)
    save(tmp_path / "c22" / "third.png")
    check_before_training(open_images(config_for(tmp_path)), 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "47 images in 23 classes"
    assert lines[1:21] == [f"       2  {name}" for name in names[:20]]
    assert lines[21:] == ["       7  in 3 more classes, of 2 to 3 images"]


# ---------------------------------------------------------------------------------------------------------------------
# cdm data


def test_command_says_what_training_would_refuse(tmp_path, capsys):
    save_classes(tmp_path / "images", pixels=SEE_THROUGH)
    save(tmp_path / "images" / "a" / "0.png", random_pixels((2, 2, 3)))
    with pytest.raises(SystemExit) as end:
        main(["data", str(tmp_path / "images"), "--sizes", "2", "4", "--output", str(tmp_path / "grid.png")])
    said = capsys.readouterr()
    assert end.value.code == 2 and not (tmp_path / "grid.png").exists()
    assert "sizes: 4x4 (5), 2x2 (1)" in said.out and "modes: RGBA (5), RGB (1)" in said.out
    assert "shortest side: 2" in said.out.splitlines()
    assert (
        "checked: 6 of 6 (pixels of 5)\nunfit: 6\n" in said.out
        and "b/2.png' (row 5) has transparent pixels" in said.out
    )
    (error,) = [line for line in said.err.splitlines() if ": error: " in line]
    assert "a/0.png' (row 0) is 2x2 pixels" in error and "one of 5 such images among 6 checked" in error


def test_command_draws_what_stages_will_see(tmp_path):
    """A row per class; averages of the source resolution, each pixel a square."""
    images = tmp_path / "images"
    for name, count in (("a", 1), ("b", 2)):
        for i in range(count):
            save(images / name / f"{i}.png", random_pixels((4, 4, 4), i))
    words = ["data", str(images), "--sizes", "2", "--source_resolution", "4", "--background", "white"]
    main([*words, "--output", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as picture:
        grid = np.asarray(picture)
    source = open_images(config_for(images, background="white")).dataset
    for index, (top, left) in enumerate([(0, 110), (72, 110), (72, 246)]):
        pixels = source[index]["image"].float()
        average = torch.nn.functional.avg_pool2d(pixels, 2)
        for place, expected in enumerate((average, pixels)):
            shown = grid[top : top + 64, left + 64 * place : left + 64 * (place + 1)].astype(float)
            expected = expected.permute(1, 2, 0).repeat_interleave(64 // expected.shape[-1], 0)
            expected = expected.repeat_interleave(64 // expected.shape[1], 1).numpy()
            assert np.abs(shown - expected).max() <= 1
    assert (grid[:64, 246:] == 255).all()


def test_command_takes_idx_files(tmp_path, capsys):
    write_idx(tmp_path, random_pixels((6, 4, 4)), np.array([2, 0, 1, 1, 2, 0], np.uint8))
    words = ["data", str(tmp_path), "--sizes", "2", "4", "--num_channels", "1", "--label_names", "x,y,z"]
    main([*words, "--output", str(tmp_path / "grid.png")])
    assert capsys.readouterr().out.startswith("6 images in 3 classes\n       2  x\n")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (110 + 2 * (2 * 64 + 8), 3 * 72)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "`data` is 'nothing', neither a folder nor a data set of the Hub (owner/name)"),
        ([".", "--sizes", "6", "16"], "`sizes` has 6; each must divide `source_resolution` 16"),
        ([".", "--output", "grid"], "`output` is 'grid'; it must be the name of a picture"),
        ([".", "--background", "wihte"], "`background` is 'wihte', which is not a colour"),
    ],
)
def test_mistakes(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(["data", *words])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_rows_of_a_grid_may_be_of_any_length():
    image = Image.new("RGB", (2, 2))
    assert labelled_grid([("a", [(image,)]), ("b", [(image,), (image,)])], 8).size == (110 + 2 * 16, 32)
    assert labelled_grid([("a", [(image,)])], 256).size == (330 + 264, 264)  # three times as large a label


@pytest.mark.parametrize("font", [label_font(12), ImageFont.load_default(12)], ids=["found", "Pillow's"])
def test_labels_are_letters_on_one_line_that_show_where_they_are_cut(font):
    assert fitting("Sneaker", font, 102) == "Sneaker"
    assert fitting("e\u0301moji & co", font, 102) in ("émoji & co", "emoji & co")
    assert fitting("日", font, 102) == "?" and fitting("two\nlines", font, 102) == r"two\nlines"
    cut = fitting("a very long name of a class of things", font, 102)
    assert cut.endswith("…") and font.getlength(cut) <= 102 and "a very long na".startswith(cut[:11])
