"""Training data: every source, BigGAN's preprocessing, the tensor operations of a batch, and bad input."""

import gzip
import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.memory import held_in_memory
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.data.transforms import area_resize, image_to_tensor, random_crop, random_flip, to_float, to_uint8


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def random_pixels(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_bytes(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def config_for(folder, **overrides):
    return DataConfig(**{"train_data_dir": str(folder), "source_resolution": 4, **overrides})


def by_image(dataset):
    """What a data set holds, whatever its order: a sorted list of (pixels, label)."""
    return sorted((item["image"].numpy().tobytes(), int(item["label"])) for item in dataset)


@pytest.fixture
def image_folder(tmp_path):
    """Three classes (one named like a split), four colour 4x4 pictures each; picture i of class k has seed 10k + i."""
    for k, name in enumerate(("boot", "shirt", "test_tube")):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(random_pixels((4, 4, 3), 10 * k + i)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "boot" / "notes.txt").write_text("not an image")
    return tmp_path


def write_rows(path, labels, seed=0, **columns):
    """A parquet file as people write them: bytes of PNGs in a struct, no metadata of `datasets`."""
    images = [{"bytes": png_bytes(random_pixels((4, 4, 3), seed + i)), "path": None} for i in range(len(labels))]
    pq.write_table(pa.table({"image": images, **({} if columns else {"label": labels}), **columns}), path)


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def write_idx(folder, images, labels, split="train", compress=False):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        name, content = f"{split}-{kind}-ubyte", idx_bytes(array)
        if compress:
            name, content = name + ".gz", gzip.compress(content)
        (folder / name).write_bytes(content)


# Sources


def test_image_folder_gives_sorted_class_names_and_exact_pixels(image_folder):
    data = open_images(config_for(image_folder))
    assert data.id2label == {0: "boot", 1: "shirt", 2: "test_tube"}
    assert len(data.dataset) == 12
    for index in range(12):
        item = data.dataset[index]
        k, i = divmod(index, 4)
        expected = torch.from_numpy(random_pixels((4, 4, 3), 10 * k + i)).permute(2, 0, 1)
        assert item["image"].dtype == torch.uint8 and torch.equal(item["image"], expected)
        assert item["label"].dtype == torch.int64 and item["label"].shape == () and item["label"] == k


def test_data_loader_collates_batches_of_rows(image_folder):
    data = open_images(config_for(image_folder))
    (batch,) = torch.utils.data.DataLoader(data.dataset, batch_size=12, num_workers=1)
    assert batch["image"].shape == (12, 3, 4, 4) and batch["image"].dtype == torch.uint8
    assert batch["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_unconditional_items_have_no_label(image_folder):
    data = open_images(config_for(image_folder, class_conditional=False))
    assert data.id2label is None
    assert set(data.dataset[0]) == {"image"}


def test_folder_of_splits_is_entered_at_the_split(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random_pixels((4, 4, 3), i)).save(tmp_path / split / name / f"{i}.png")
    assert len(open_images(config_for(tmp_path)).dataset) == 6
    data = open_images(config_for(tmp_path, dataset_split="test"))
    assert len(data.dataset) == 4 and data.id2label == {0: "a", 1: "b"}
    with pytest.raises(ValueError, match=r"`dataset_split` is 'validation', which is not in .*\['test', 'train'\]"):
        open_images(config_for(tmp_path, dataset_split="validation"))


def test_folder_whose_name_holds_glob_characters(tmp_path):
    folder = tmp_path / "pictures [2]*"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(random_pixels((4, 4, 3))).save(folder / name / "0.png")
    assert len(open_images(config_for(folder)).dataset) == 2


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path, compress):
    images, labels = random_pixels((6, 4, 4)), np.array([2, 0, 1, 1, 2, 0], np.uint8)
    write_idx(tmp_path, images, labels, compress=compress)
    write_idx(tmp_path, images[:2], labels[:2], split="t10k", compress=compress)
    data = open_images(config_for(tmp_path, source_resolution=8, padding=2, num_channels=1))
    assert data.id2label == {0: "0", 1: "1", 2: "2"}
    expected = np.zeros((6, 1, 8, 8), np.uint8)
    expected[:, 0, 2:6, 2:6] = images
    (batch,) = torch.utils.data.DataLoader(data.dataset, batch_size=6)
    assert torch.equal(batch["image"], torch.from_numpy(expected))
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == labels.tolist()
    assert torch.equal(data.dataset[3]["image"], batch["image"][3]) and data.dataset[3]["label"] == 1
    assert len(open_images(config_for(tmp_path, dataset_split="test")).dataset) == 2


def test_idx_images_are_prepared_as_pictures_are(tmp_path):
    images = random_pixels((3, 11, 14))
    write_idx(tmp_path, images, np.zeros(3, np.uint8))
    data = open_images(config_for(tmp_path, source_resolution=5, padding=1))
    for image, item in zip(images, data.dataset, strict=True):
        assert torch.equal(item["image"], image_to_tensor(Image.fromarray(image), 5, 3, padding=1))


def test_idx_class_names_from_a_list_or_a_file(tmp_path):
    write_idx(tmp_path, random_pixels((2, 4, 4)), np.array([1, 0], np.uint8))
    data = open_images(config_for(tmp_path, label_names="shirt, boot"))
    assert data.id2label == {0: "shirt", 1: "boot"}
    (tmp_path / "classes.txt").write_text("Ankle boot\nT-shirt/top\n")
    assert open_images(config_for(tmp_path)).id2label == {0: "Ankle boot", 1: "T-shirt/top"}
    names = tmp_path / "names"
    names.write_text("x\ny\nz\n")
    assert open_images(config_for(tmp_path, label_names=str(names))).id2label == {0: "x", 1: "y", 2: "z"}


def test_parquet_with_string_labels(tmp_path):
    write_rows(tmp_path / "part-0.parquet", ["shirt", "boot", "shirt"])
    data = open_images(config_for(tmp_path))
    assert data.id2label == {0: "boot", 1: "shirt"}
    assert [int(item["label"]) for item in data.dataset] == [1, 0, 1]
    assert torch.equal(data.dataset[2]["image"], torch.from_numpy(random_pixels((4, 4, 3), 2)).permute(2, 0, 1))
    data = open_images(config_for(tmp_path, label_names="shirt,boot"))
    assert [int(item["label"]) for item in data.dataset] == [0, 1, 0]


def test_parquet_with_integer_labels_and_named_columns(tmp_path):
    write_rows(tmp_path / "part-0.parquet", [0, 0], label=["x", "y"], kind=[0, 2])
    data = open_images(config_for(tmp_path, label_column="kind", image_column="image"))
    assert data.id2label == {0: "0", 1: "1", 2: "2"}
    assert [int(item["label"]) for item in data.dataset] == [0, 2]
    data = open_images(config_for(tmp_path, label_column="kind", num_classes=5))
    assert len(data.id2label) == 5


def test_repository_by_name_takes_its_split_and_class_labels(tmp_path):
    """A repository laid out as on the Hub: shards named by split, an Image and the only ClassLabel column."""
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "ant"])})
    for split, count in (("train", 4), ("test", 2)):
        pictures = [{"bytes": png_bytes(random_pixels((4, 4, 3), i)), "path": None} for i in range(count)]
        rows = datasets.Dataset.from_dict({"photo": pictures, "kind": [i % 2 for i in range(count)]}, features)
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    for split, count in (("train", 4), ("test", 2)):
        config = DataConfig(dataset_name=str(tmp_path), source_resolution=4, dataset_split=split)
        data = open_images(config)
        assert len(data.dataset) == count and data.id2label == {0: "cat", 1: "ant"}
        assert [int(item["label"]) for item in data.dataset] == [i % 2 for i in range(count)]


# Streaming


def test_stream_holds_what_the_map_style_set_holds(image_folder):
    stream = open_images(config_for(image_folder, streaming=True))
    mapped = open_images(config_for(image_folder))
    assert stream.id2label == mapped.id2label
    assert by_image(stream.dataset) == by_image(mapped.dataset)
    item = next(iter(stream.dataset))
    assert set(item) == {"image", "label"}
    assert item["image"].dtype == torch.uint8 and item["label"].dtype == torch.int64 and item["label"].shape == ()


def test_stream_order_depends_on_seed_and_epoch_only(image_folder):
    def order(seed, epoch):
        dataset = open_images(config_for(image_folder, streaming=True, seed=seed)).dataset
        dataset.set_epoch(epoch)
        return [item["image"].numpy().tobytes() for item in dataset]

    assert order(seed=0, epoch=1) == order(seed=0, epoch=1)
    assert order(seed=0, epoch=1) != order(seed=0, epoch=2)
    assert order(seed=0, epoch=1) != order(seed=1, epoch=1)


def test_stream_batches_and_stays_unconditional(image_folder):
    stream = open_images(config_for(image_folder, streaming=True, class_conditional=False)).dataset
    batches = list(torch.utils.data.DataLoader(stream, batch_size=5))
    assert [tuple(batch["image"].shape) for batch in batches] == [(5, 3, 4, 4), (5, 3, 4, 4), (2, 3, 4, 4)]
    assert set(batches[0]) == {"image"}


def test_stream_of_labels_without_names(tmp_path):
    write_rows(tmp_path / "part-0.parquet", ["shirt", "boot", "shirt"])
    with pytest.raises(ValueError, match=r"'label', streamed without class names: give --label_names"):
        open_images(config_for(tmp_path, streaming=True))
    data = open_images(config_for(tmp_path, streaming=True, label_names="boot,shirt"))
    assert sorted(int(item["label"]) for item in data.dataset) == [0, 1, 1]


def test_stream_of_integer_labels_needs_their_number(tmp_path):
    write_rows(tmp_path / "part-0.parquet", [0, 2, 1])
    with pytest.raises(ValueError, match=r"without class names: give --num_classes or --label_names"):
        open_images(config_for(tmp_path, streaming=True))
    data = open_images(config_for(tmp_path, streaming=True, num_classes=2))
    assert data.id2label == {0: "0", 1: "1"}
    with pytest.raises(ValueError, match=r"row \d has label 2, outside 0\.\.1"):
        list(data.dataset)


# Preprocessing


@pytest.mark.parametrize(("shape", "channels"), [((6, 6, 3), 3), ((6, 6), 1)])
def test_a_picture_that_fits_is_copied_only_into_its_tensor(shape, channels, monkeypatch):
    image, pixels = Image.fromarray(random_pixels(shape)), random_pixels(shape).reshape(6, 6, channels)
    for name in ("copy", "convert", "crop", "resize", "transpose", "paste"):
        monkeypatch.setattr(Image.Image, name, None)
    assert torch.equal(image_to_tensor(image, 6, channels), torch.from_numpy(pixels).permute(2, 0, 1))


def triangle_resize(pixels, size):
    """Antialiased bilinear resize of (H, H) float64 pixels by its definition: a tent as wide as the reduction."""
    scale = len(pixels) / size
    centers = (np.arange(size)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(len(pixels)) + 0.5 - centers) / scale)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ pixels @ weights.T


@pytest.mark.parametrize(("width", "height"), [(29, 16), (16, 23), (16, 16)])
def test_biggan_crop_and_resize(width, height):
    pixels = random_pixels((height, width))
    left, top = {29: 6, 16: 0}[width], {23: 4, 16: 0}[height]  # round half to even: 6.5 -> 6, 3.5 -> 4
    square = pixels[top : top + 16, left : left + 16].astype(np.float64)
    result = image_to_tensor(Image.fromarray(pixels), 16, 1)
    assert np.array_equal(result[0], square)
    result = image_to_tensor(Image.fromarray(pixels), 5, 1)
    assert np.abs(result[0].numpy() - triangle_resize(square, 5)).max() <= 1.0


def test_padding_is_black_and_comes_before_the_crop():
    pixels = np.full((2, 4, 3), 200, np.uint8)
    result = image_to_tensor(Image.fromarray(pixels), 4, 3, padding=1)  # 6x4, cropped to 4x4
    expected = torch.zeros(3, 4, 4, dtype=torch.uint8)
    expected[:, 1:3] = 200
    assert torch.equal(result, expected)


def test_grey_is_replicated_and_grey_colour_pictures_become_one_channel():
    pixels = random_pixels((4, 4))
    grey = torch.from_numpy(pixels)
    assert torch.equal(image_to_tensor(Image.fromarray(pixels), 4, 3), grey.expand(3, 4, 4))
    assert torch.equal(image_to_tensor(Image.fromarray(pixels).convert("RGB"), 4, 1), grey[None])
    with pytest.raises(ValueError, match=r"colour picture .* --num_channels 3"):
        image_to_tensor(Image.fromarray(random_pixels((4, 4, 3))), 4, 1)


def test_transparency():
    pixels = random_pixels((4, 4, 4))
    pixels[..., 3] = 255
    opaque = torch.from_numpy(pixels[..., :3].copy()).permute(2, 0, 1)
    assert torch.equal(image_to_tensor(Image.fromarray(pixels), 4, 3), opaque)
    pixels[0, 0, 3] = 0
    with pytest.raises(ValueError, match=r"transparent pixels: .* --background white"):
        image_to_tensor(Image.fromarray(pixels), 4, 3)
    result = image_to_tensor(Image.fromarray(pixels), 4, 3, background="#0a141e")
    expected = opaque.clone()
    expected[:, 0, 0] = torch.tensor([10, 20, 30])
    assert torch.equal(result, expected)


def test_palette_sixteen_bit_bilevel_and_cmyk_pictures():
    palette = Image.fromarray(random_pixels((4, 4)), "P")
    palette.putpalette(random_pixels(768).tolist())
    colours = np.array(palette.getpalette(), np.uint8).reshape(256, 3)[np.asarray(palette)]
    assert torch.equal(image_to_tensor(palette, 4, 3), torch.from_numpy(colours).permute(2, 0, 1))
    palette.info["transparency"] = int(np.asarray(palette)[1, 2])
    with pytest.raises(ValueError, match="transparent"):
        image_to_tensor(palette, 4, 3)
    deep = Image.fromarray(np.array([[0, 257], [65535, 32896]], np.uint16))
    assert image_to_tensor(deep, 2, 1).tolist() == [[[0, 1], [255, 128]]]
    bilevel = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert image_to_tensor(bilevel, 2, 1).tolist() == [[[0, 255], [255, 0]]]
    assert image_to_tensor(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), 2, 3)[:, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match=r"PIL mode 'F'.*convert"):
        image_to_tensor(Image.fromarray(np.zeros((4, 4), np.float32)), 4, 1)


# Tensor operations


def test_uint8_round_trip_of_all_values():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.001])).tolist() == [0, 255, 128]


def test_area_averages_are_exact_and_compose():
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert area_resize(images, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    images = to_float(torch.from_numpy(random_pixels((2, 3, 16, 16))))
    direct = area_resize(images, 4)
    torch.testing.assert_close(area_resize(area_resize(images, 8), 4), direct, rtol=0, atol=1e-6)
    blocks = images.double().reshape(2, 3, 4, 4, 4, 4).mean(dim=(3, 5))
    torch.testing.assert_close(direct.double(), blocks, rtol=0, atol=1e-6)
    assert torch.equal(area_resize(images, 16), images)


@pytest.mark.parametrize("size", [0, 5, 32])
def test_area_resize_refuses_sizes_that_do_not_divide(size):
    with pytest.raises(ValueError, match=rf"`size` is {size}; it must divide .* 16x16"):
        area_resize(torch.zeros(1, 1, 16, 16), size)


def test_flips_mirror_half_of_the_images_reproducibly():
    images = torch.from_numpy(random_pixels((1000, 1, 2, 4)))
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == torch.from_numpy(images.numpy()[..., ::-1].copy())).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 430 < mirrored.sum() < 570
    assert torch.equal(random_flip(images, torch.Generator().manual_seed(0)), flipped)
    assert not torch.equal(random_flip(images, torch.Generator().manual_seed(1)), flipped)


@pytest.mark.parametrize("size", [2, 4])
def test_images_held_in_memory(image_folder, size):
    """Pixels as they are at the source resolution, averages below it; labels and classes as they were."""
    data = open_images(config_for(image_folder))
    held = held_in_memory(data, size, "cpu", batch_size=2)
    assert held.id2label == data.id2label and len(held.dataset) == len(data.dataset)
    for ours, theirs in zip(held.dataset, data.dataset, strict=True):
        pixels = theirs["image"]
        expected = pixels if size == 4 else area_resize(to_float(pixels)[None], size)[0]
        assert ours["image"].dtype == expected.dtype and torch.equal(ours["image"], expected)
        assert ours["label"] == theirs["label"]
    with pytest.raises(ValueError, match="`hold_in_memory` is given with `streaming`"):
        held_in_memory(open_images(config_for(image_folder, streaming=True)), size, "cpu")


def test_random_crops_of_a_pair_show_the_same_place():
    """Averaging the crop is cropping the average; every offset in whole low-resolution pixels comes equally often."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2000, 2, 12, 12, generator=generator)
    low_res = area_resize(images, 4)
    crops, low_crops = random_crop(images, low_res, 0.5, generator)
    assert crops.shape == (2000, 2, 6, 6) and low_crops.shape == (2000, 2, 2, 2)
    torch.testing.assert_close(area_resize(crops, 2), low_crops)
    offsets = torch.zeros(3, 3)
    for image, crop in zip(low_res, low_crops, strict=True):
        places = image.unfold(1, 2, 1).unfold(2, 2, 1).permute(1, 2, 0, 3, 4)  # (3, 3, C, 2, 2)
        offsets += (places == crop).flatten(2).all(-1)
    assert offsets.sum() == 2000 and ((offsets - 2000 / 9) ** 2 / (2000 / 9)).sum() < 8 + 4.5 * 4
    again = random_crop(images, low_res, 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(again[0], random_crop(images, low_res, 0.5, torch.Generator().manual_seed(1))[0])
    assert not torch.equal(again[0], crops)


# Bad input


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_corrupt_file_is_named(image_folder, streaming, damage):
    file = image_folder / "shirt" / "2.png"
    content = {"text": b"not a picture", "truncated": file.read_bytes()[:60], "empty": b""}[damage]
    file.write_bytes(content)
    dataset = open_images(config_for(image_folder, streaming=streaming)).dataset
    with pytest.raises(ValueError, match=r"shirt/2\.png' \(row \d+\) cannot be read .*: remove it or convert it"):
        list(dataset)


def test_corrupt_row_is_named_by_a_worker_too(tmp_path):
    table = {"image": [png_bytes(random_pixels((4, 4))), b"no", None], "label": [0, 0, 0]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    dataset = open_images(config_for(tmp_path)).dataset
    assert dataset[0]["image"].shape == (3, 4, 4)
    with pytest.raises(ValueError, match="row 1 cannot be read as an image"):
        list(torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1))
    with pytest.raises(ValueError, match="row 2 has no image in column 'image'"):
        dataset[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_named_with_those_there_are(tmp_path, streaming):
    write_rows(tmp_path / "part-0.parquet", [0, 0], kind=[0, 1])
    for overrides, found in (
        ({}, "`label_column` is None"),
        ({"label_column": "y"}, "`label_column` is 'y'"),
        ({"image_column": "picture"}, "`image_column` is 'picture'"),
    ):
        with pytest.raises(
            ValueError, match=rf"{found}; it must be one of the data set's columns \['image', 'kind'\]"
        ):
            open_images(config_for(tmp_path, streaming=streaming, **overrides))


@pytest.mark.parametrize(
    ("labels", "overrides", "message"),
    [
        ([0, 1, -1], {}, r"row 2 has label -1, outside 0\.\.1"),
        ([0, 3, 1], {"num_classes": 3}, r"row 1 has label 3, outside 0\.\.2"),
        ([0, None, 1], {}, "row 1 has no label"),
        (["a", None, "b"], {}, "row 1 has no label"),
        (["a", "b", "c"], {"label_names": "a,b"}, r"row 2 has label 'c'; it must be one of the classes \['a', 'b'\]"),
        ([0.5, 1.0, 2.0], {}, "labels must be integers or strings"),
        ([[0], [1], [2]], {}, "labels must be integers or strings"),
        ([0, 1, 1], {"label_names": "a,b,c", "num_classes": 2}, "`num_classes` is 2, but the data has 3 class names"),
        ([0, 1, 1], {"label_names": "a,a"}, r"`label_names` has \['a'\] more than once"),
        ([0, 1, 1], {"label_names": "names.txt"}, "`label_names` is 'names.txt'; it must be a file or"),
    ],
)
def test_bad_labels_are_refused_before_training(tmp_path, labels, overrides, message):
    write_rows(tmp_path / "part-0.parquet", labels)
    with pytest.raises(ValueError, match=message):
        open_images(config_for(tmp_path, **overrides))


@pytest.mark.parametrize(
    ("pixels", "overrides", "message"),
    [
        (random_pixels((3, 9, 3)), {}, r"is 9x3 pixels .* `source_resolution` 4: .* --source_resolution .* --padding"),
        (random_pixels((4, 4, 4)), {}, "transparent pixels: .* --background"),
        (random_pixels((4, 4, 3)), {"num_channels": 1}, "colour picture .* --num_channels 3"),
    ],
)
def test_unfit_pictures_are_named(image_folder, pixels, overrides, message):
    for folder in image_folder.iterdir():
        for file in folder.glob("*.png"):
            Image.fromarray(random_pixels((4, 4))).save(file)
    Image.fromarray(pixels).save(image_folder / "boot" / "3.png")
    dataset = open_images(config_for(image_folder, **overrides)).dataset
    with pytest.raises(ValueError, match=rf"boot/3\.png' \(row 3\) .*{message}"):
        list(dataset)


def test_bad_idx_files(tmp_path):
    images, labels = random_pixels((3, 4, 4)), np.array([0, 1, 2], np.uint8)
    write_idx(tmp_path, images, labels)
    with pytest.raises(ValueError, match=r"row 2 of .*labels-idx1-ubyte has label 2, outside 0..1"):
        open_images(config_for(tmp_path, num_classes=2))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is 4x4 pixels .* `source_resolution` 8"):
        open_images(config_for(tmp_path, source_resolution=8))
    with pytest.raises(ValueError, match=r"one file \*t10k-images-idx3-ubyte.*`dataset_split` 'test'"):
        open_images(config_for(tmp_path, dataset_split="test"))
    with pytest.raises(ValueError, match="leave out --streaming"):
        open_images(config_for(tmp_path, streaming=True))
    write_idx(tmp_path, images, labels[:2])
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        open_images(config_for(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images)[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a complete IDX file"):
        open_images(config_for(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images))[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be decompressed"):
        open_images(config_for(tmp_path))


def test_folder_without_images(tmp_path):
    (tmp_path / "boot").mkdir()
    with pytest.raises(ValueError, match="holds no images, parquet, tar or IDX files"):
        open_images(config_for(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_data_dir": None}, "`train_data_dir` is None: give exactly one of them"),
        ({"dataset_name": "mnist"}, "`dataset_name` is 'mnist' and .*: give exactly one of them"),
        ({"train_data_dir": "no/such/folder"}, "`train_data_dir` is 'no/such/folder', which is not a folder"),
        ({"num_channels": 4}, "`num_channels` is 4"),
        ({"source_resolution": 0}, "`source_resolution` is 0; it must be at least 1"),
        ({"padding": -1}, "`padding` is -1"),
        ({"background": "wihte"}, "`background` is 'wihte', which is not a colour"),
    ],
)
def test_bad_options(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_for(**{"folder": tmp_path, **overrides})
