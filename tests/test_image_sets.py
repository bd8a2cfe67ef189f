"""Images on disk, read back: every format against the arrays it was written from, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cdm_diffusers.data.image_sets import load_image_set


def pixels(count, channels=1, size=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def save_png(file, image):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file)


def stacked(images):
    return torch.stack([item["image"] for item in images]).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, channels, save):
    images, labels = pixels(5, channels), np.array([3, 1, 0, 1, 2], dtype=np.int32)
    save(tmp_path / "set.npz", images, labels)
    loaded = load_image_set(tmp_path / "set.npz")
    assert (len(loaded), loaded.size, loaded.channels) == (5, 4, channels)
    assert np.array_equal(stacked(loaded), images)
    assert loaded.labels.dtype == torch.int64 and loaded.labels.tolist() == labels.tolist()
    batch = next(iter(DataLoader(loaded, batch_size=5)))
    assert batch["image"].shape == (5, channels, 4, 4) and batch["label"].tolist() == labels.tolist()
    save(tmp_path / "bare.npz", images)
    bare = load_image_set(str(tmp_path / "bare.npz"))
    assert bare.labels is None and set(bare[0]) == {"image"}


@pytest.mark.parametrize("channels", [1, 3])
def test_png_folders(tmp_path, channels):
    images = pixels(4, channels)
    for index, image in enumerate(images):
        save_png(tmp_path / "flat" / f"{index}.png", image)
        save_png(tmp_path / "numbered" / ("03" if index < 2 else "11") / f"{index}.png", image)
        save_png(tmp_path / "named" / ("cat" if index < 1 else "dog") / f"{index}.png", image)
    for name, labels in (("flat", None), ("numbered", [3, 3, 11, 11]), ("named", [0, 1, 1, 1])):
        loaded = load_image_set(tmp_path / name)
        assert np.array_equal(stacked(loaded), images) and loaded.channels == channels
        assert (loaded.labels is None) if labels is None else (loaded.labels.tolist() == labels)


def test_the_fingerprint_is_of_the_content(tmp_path):
    images, labels = pixels(4), np.array([0, 1, 1, 1])
    np.savez(tmp_path / "a.npz", images, labels)
    for index, image in enumerate(images):
        save_png(tmp_path / "b" / str(labels[index]) / f"{index}.png", image)
    np.savez(tmp_path / "c.npz", images, labels[::-1])
    changed = images.copy()
    changed[3, 2, 1] ^= 1
    np.savez(tmp_path / "d.npz", changed, labels)
    np.savez(tmp_path / "e.npz", images)
    a, b, *others = [
        load_image_set(tmp_path / name).fingerprint() for name in ("a.npz", "b", "c.npz", "d.npz", "e.npz")
    ]
    assert a == b and len({a, *others}) == 4


# Bad input


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": pixels(2).astype(np.float32)}, "arr_0 of float32"),
        ({"arr_0": pixels(2)[..., 0]}, r"arr_0 of uint8 and shape \(2, 4, 4\)"),
        ({"arr_0": pixels(2).transpose(0, 3, 1, 2)}, r"shape \(2, 1, 4, 4\)"),
        ({"arr_0": pixels(0)}, "has 0 images"),
        ({"arr_0": pixels(2)[:, :3]}, "2 images of 4x3 pixels"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"the arrays \['mu', 'sigma'\]"),
        ({"arr_0": pixels(2), "arr_1": np.zeros(3, dtype=np.int64)}, r"2 images and labels \(arr_1\)"),
        ({"arr_0": pixels(2), "arr_1": np.zeros(2)}, "labels .* of float64"),
    ],
)
def test_an_npz_of_another_format(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_image_set(tmp_path / "set.npz")


def test_files_that_are_no_npz(tmp_path):
    np.savez(tmp_path / "whole.npz", pixels(50))
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:500])
    np.save(tmp_path / "array.npy", pixels(2))
    (tmp_path / "text.npz").write_text("no array")
    np.savez(tmp_path / "objects.npz", np.array([None, 1]))
    (tmp_path / "empty.npz").touch()
    for name in ("half.npz", "array.npy", "text.npz", "objects.npz", "empty.npz"):
        with pytest.raises(ValueError, match=f"{name}' is not a valid npz file"):
            load_image_set(tmp_path / name)
    with pytest.raises(ValueError, match=r"nothing.npz' does not exist"):
        load_image_set(tmp_path / "nothing.npz")


def test_png_folders_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no PNGs"):
        load_image_set(tmp_path / "empty")
    for number, image in enumerate((pixels(1, size=6)[0], pixels(1, channels=3)[0])):
        save_png(tmp_path / f"mixed-{number}" / "0.png", pixels(1)[0])
        save_png(tmp_path / f"mixed-{number}" / "1.png", image)
        with pytest.raises(ValueError, match=r"1.png' has .* all must be"):
            load_image_set(tmp_path / f"mixed-{number}")
    save_png(tmp_path / "oblong" / "0.png", pixels(1)[0, :3])
    with pytest.raises(ValueError, match=r"\(1, 3, 4\).* must be square"):
        load_image_set(tmp_path / "oblong")
    save_png(tmp_path / "both" / "0.png", pixels(1)[0])
    save_png(tmp_path / "both" / "cat" / "0.png", pixels(1)[0])
    with pytest.raises(ValueError, match="both in it and in sub-folders"):
        load_image_set(tmp_path / "both")
    save_png(tmp_path / "cut" / "0.png", pixels(1, size=64)[0])
    content = (tmp_path / "cut" / "0.png").read_bytes()
    (tmp_path / "cut" / "0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"0.png' is not a valid PNG \(image file is truncated\)"):
        load_image_set(tmp_path / "cut")[0]
    (tmp_path / "cut" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0.png' is not a valid PNG"):
        load_image_set(tmp_path / "cut")


def test_png_folders_with_one_wrong_file(tmp_path):
    """Of a number that another has, in this folder alone; changed after the set was opened."""
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        save_png(tmp_path / name, pixels(1)[0])
    images = load_image_set(tmp_path)
    save_png(tmp_path / "a" / "2.png", pixels(1, channels=3)[0])
    with pytest.raises(ValueError, match=r"a/2.png' has .*\(3, 4, 4\), among images of \(1, 4, 4\)"):
        images[1]
    (tmp_path / "a" / "2.png").rename(tmp_path / "a" / "01.png")
    with pytest.raises(ValueError, match=r"a/1.png' has the number of '01.png': remove one of them"):
        load_image_set(tmp_path)
    for mode in ("RGBA", "P", "I;16"):
        Image.new(mode, (4, 4)).save(tmp_path / "a" / "01.png")
        (tmp_path / "a" / "1.png").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"a/01.png' has .* = \('{mode}', 4, 4\), .*grey or RGB"):
            load_image_set(tmp_path)


def test_a_half_written_sample_folder(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "settings.json").write_text(json.dumps({"num_images": 10, "stages": {"base": 4}, "channels": 1}))
    for name in ("00000000-4.safetensors", "00000004-4.safetensors", ".tmp-00000008-2.safetensors"):
        (tmp_path / "shards" / name).touch()
    with pytest.raises(ValueError, match="half-written: 8 of 10 images of stage 'base' are there"):
        load_image_set(tmp_path)
    for content in ("{}", "[1]", "null", '"text"', '{"num_images": "3"}', "{", "\xff", "[" * 100_000):
        (tmp_path / "settings.json").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=r"settings.json' was not written by cdm sample-set.*: give a folder"):
            load_image_set(tmp_path)
    with pytest.raises(ValueError, match=r"not an output_dir of cdm sample-set"):
        load_image_set(tmp_path / "shards", stage="base")
