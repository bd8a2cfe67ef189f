"""Splits of real images at a stage's size."""

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.splits import open_split, open_splits


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures of 8x8, two classes: three of each for training, two of each for tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (8, 8)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def config_for(folder, **options):
    return DataConfig(train_data_dir=str(folder), source_resolution=8, num_channels=1, **options)


def pixels_of(folder, split):
    return np.stack([np.array(Image.open(file)) for file in sorted((folder / split).rglob("*.png"))])


def test_a_split_at_its_source_resolution_and_averaged(folder):
    pixels = pixels_of(folder, "train")
    for size in (None, 8):
        data = open_split(config_for(folder), size)
        assert np.array_equal(torch.stack([item["image"][0] for item in data.dataset]).numpy(), pixels)
    averaged = open_split(config_for(folder), 4)
    expected = pixels.reshape(-1, 4, 2, 4, 2).mean((2, 4))
    found = torch.stack([item["image"][0] for item in averaged.dataset]).numpy()
    assert np.abs(found - expected).max() <= 0.51 and found.dtype == np.uint8
    assert averaged.id2label == {0: "a", 1: "b"} and averaged.dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert averaged.dataset.fingerprint() != data.dataset.fingerprint()


def test_two_splits(folder):
    train, test = open_splits(config_for(folder), "test", 2, {0: "a", 1: "b"})
    assert (len(train.dataset), len(test.dataset)) == (6, 4) and test.dataset[0]["image"].shape == (1, 2, 2)
    (folder / "test" / "b").rename(folder / "test" / "c")
    with pytest.raises(ValueError, match="split 'test' has other classes: number 1 is 'c' and not 'b'"):
        open_splits(config_for(folder), "test")


def test_what_does_not_fit(folder):
    with pytest.raises(ValueError, match="`source_resolution` is 8; it must be a multiple of 3"):
        open_split(config_for(folder), 3)
    with pytest.raises(ValueError, match="split 'train' has other classes: number 1 is 'b' and not 'z'"):
        open_split(config_for(folder), 4, {0: "a", 1: "z"})
    unlabelled = open_split(config_for(folder, class_conditional=False), 4, {0: "a", 1: "z"})
    assert unlabelled.id2label is None and unlabelled.dataset.labels is None
