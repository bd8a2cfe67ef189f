"""Classification Accuracy Score: what is trained on what, the figures, resuming, pictures, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.memory import InMemoryImages
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.evaluation import classification_accuracy_score as module
from cdm_diffusers.evaluation.classification_accuracy_score import (
    REPORT_NAME,
    ClassificationAccuracyConfig,
    class_rows,
    classification_accuracy_score,
    per_class_figure,
    same_counts,
    summary,
)


CLASSES = ("bright", "checked", "dark")


def pixels_of(kind, seed, size=8):
    """Noisy bright, dark, or checkered pixels; the checkerboard's mean is between the other two."""
    noise = np.random.default_rng(seed).integers(-30, 31, (size, size))
    board = np.where(np.indices((size, size)).sum(0) % 2 == 0, 60, 190)
    return ({"bright": 190, "dark": 60, "checked": board}[kind] + noise).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real images (20 + 10 a class), and samples (12 a class) of which the checkered ones look bright."""
    folder = tmp_path_factory.mktemp("cas")
    for split, count, first in (("train", 20, 0), ("test", 10, 1000)):
        for kind in CLASSES:
            (folder / "data" / split / kind).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels_of(kind, first + i)).save(folder / "data" / split / kind / f"{i:02}.png")
    looks = {"bright": "bright", "checked": "bright", "dark": "dark"}
    images = [pixels_of(looks[CLASSES[i % 3]], 2000 + i) for i in range(36)]
    save_samples(folder / "samples.npz", images, np.arange(36) % 3)
    return folder


def save_samples(file, images, labels):
    arrays = {} if labels is None else {"arr_1": np.asarray(labels)}
    np.savez(file, arr_0=np.stack(images)[..., None], **arrays)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def config_for(folder, output_dir, **overrides):
    options = {"samples": str(folder / "samples.npz"), "train_data_dir": str(folder / "data"), "num_seeds": 2}
    options |= {"output_dir": str(output_dir), "train_batch_size": 12, "num_train_epochs": 6}
    return ClassificationAccuracyConfig(**{**options, **overrides})


class FakeTraining:
    """In place of `fit_classifier`: accuracies that are a function of seed and data; may fail at a call."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def __call__(self, config, train, test):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((config, train, test))
        accuracy = 0.5 + 0.1 * config.seed + 0.01 * (len(train.dataset) % 7)
        per_class = {name: accuracy - 0.1 * index for index, name in train.id2label.items()}
        figures = {"top_1": accuracy, "top_5": 1.0, "per_class": per_class, "num_images": len(test)}
        return {**figures, "num_train_images": len(train.dataset), "config": {"seed": config.seed}}


# ------------------------------------------------------------------------------------------------------------------
# The whole way
# ------------------------------------------------------------------------------------------------------------------


def test_samples_that_mislead_are_found_out(folder, tmp_path, capsys):
    """Checkered samples look bright: a classifier trained on them fails there, one trained on real images does not."""
    longer = {"num_train_epochs": 20, "random_shift": 0, "num_seeds": 1}
    report = classification_accuracy_score(config_for(folder, tmp_path, **longer))
    assert json.loads((tmp_path / REPORT_NAME).read_text()) == report
    of_samples, of_real = report["accuracies"]["samples"], report["accuracies"]["real"]
    assert of_real["top_1"]["mean"] > 0.9 and of_samples["per_class"]["dark"] > 0.9
    assert of_samples["per_class"]["checked"] + of_samples["per_class"]["bright"] < 1.5
    assert of_samples["top_1"]["mean"] < of_real["top_1"]["mean"]
    assert of_samples["num_train_images"] == of_real["num_train_images"] == 36 and of_samples["num_images"] == 30
    assert report["share_of_real_top_1"] == of_samples["top_1"]["mean"] / of_real["top_1"]["mean"]
    for name in ("per_class.png", "best_classes.png", "worst_classes.png"):
        Image.open(tmp_path / name).verify()
    assert (tmp_path / "samples-0" / "model.safetensors").is_file()
    assert "| trained on | images | seeds | top-1 on 30 of 'test' | top-5 |" in capsys.readouterr().out


def test_fewer_samples_than_training_images_are_told_of(folder, tmp_path, monkeypatch, caplog):
    """The protocol (Ravuri and Vinyals, 2019) replaces the whole training set."""
    monkeypatch.setattr(module, "fit_classifier", FakeTraining())
    classification_accuracy_score(config_for(folder, tmp_path / "few"))
    assert "are 36 images; the score is defined for as many as the training split has, 60" in caplog.text
    caplog.clear()
    images = [pixels_of(CLASSES[i % 3], i) for i in range(60)]
    save_samples(tmp_path / "as-many.npz", images, np.arange(60) % 3)
    classification_accuracy_score(config_for(folder, tmp_path / "out", samples=str(tmp_path / "as-many.npz")))
    assert "the score is defined" not in caplog.text


def test_what_is_trained_on_what(folder, tmp_path, monkeypatch):
    training = FakeTraining()
    monkeypatch.setattr(module, "fit_classifier", training)
    recipe = {"learning_rate": 0.01, "label_smoothing": 0.1, "random_flip": False}
    report = classification_accuracy_score(config_for(folder, tmp_path, real="both", **recipe))
    assert list(report["runs"]) == ["samples", "real", "all_real"]
    assert [config.seed for config, _, _ in training.calls] == [0, 0, 0, 1, 1, 1]
    for config, _, test in training.calls:
        assert (config.image_size, config.num_channels) == (8, 1)
        assert (config.learning_rate, config.label_smoothing, config.random_flip) == (0.01, 0.1, False)
        assert len(test) == 30
    samples, real, all_real = (train.dataset for _, train, _ in training.calls[:3])
    assert torch.equal(samples[3]["image"][0], torch.from_numpy(pixels_of("bright", 2003))) and len(samples) == 36
    assert len(all_real) == 60 and torch.stack([item["label"] for item in real]).bincount().tolist() == [12, 12, 12]
    shown = {item["image"].numpy().tobytes() for item in real}
    assert len(shown) == 36 and shown < {item["image"].numpy().tobytes() for item in all_real}
    assert report["compared_with"] == "real"


def test_larger_real_images_are_averaged_down(folder, tmp_path, monkeypatch):
    training = FakeTraining()
    monkeypatch.setattr(module, "fit_classifier", training)
    images = [pixels_of(CLASSES[i % 3], i, size=4) for i in range(6)]
    save_samples(tmp_path / "small.npz", images, np.arange(6) % 3)
    config = config_for(folder, tmp_path, samples=str(tmp_path / "small.npz"), source_resolution=8)
    classification_accuracy_score(config)
    train, test = training.calls[1][1].dataset, training.calls[1][2]
    expected = pixels_of("bright", 1000).reshape(4, 2, 4, 2).mean((1, 3))
    assert np.abs(test[0]["image"][0].numpy() - expected).max() <= 0.5
    assert train[0]["image"].shape == (1, 4, 4) and len(train) == 6


def test_finished_trainings_are_not_repeated(folder, tmp_path, monkeypatch):
    whole = FakeTraining()
    monkeypatch.setattr(module, "fit_classifier", whole)
    expected = classification_accuracy_score(config_for(folder, tmp_path / "whole"))
    monkeypatch.setattr(module, "fit_classifier", FakeTraining(fail_at=3))
    with pytest.raises(KeyboardInterrupt):
        classification_accuracy_score(config_for(folder, tmp_path / "stopped"))
    rest = FakeTraining()
    monkeypatch.setattr(module, "fit_classifier", rest)
    report = classification_accuracy_score(config_for(folder, tmp_path / "stopped"))
    assert [(config.seed, len(train.dataset)) for config, train, _ in rest.calls] == [(1, 36)]
    assert {**report, "settings": None} == {**expected, "settings": None}
    more = FakeTraining()
    monkeypatch.setattr(module, "fit_classifier", more)
    report = classification_accuracy_score(config_for(folder, tmp_path / "stopped", num_seeds=3))
    assert [config.seed for config, _, _ in more.calls] == [2, 2]
    assert report["accuracies"]["samples"]["num_seeds"] == 3
    with pytest.raises(ValueError, match=r"report of other settings: learning_rate \(0.002 there, 0.1 now\)"):
        classification_accuracy_score(config_for(folder, tmp_path / "stopped", learning_rate=0.1))


def test_other_data_in_the_same_place_are_other_settings(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit_classifier", FakeTraining())
    shutil.copytree(folder / "data", tmp_path / "data")
    options = {"train_data_dir": str(tmp_path / "data"), "num_seeds": 1}
    classification_accuracy_score(config_for(folder, tmp_path / "out", **options))
    Image.fromarray(pixels_of("dark", 5000)).save(tmp_path / "data" / "train" / "dark" / "00.png")
    with pytest.raises(ValueError, match=r"report of other settings: data \(.* Give another `output_dir`"):
        classification_accuracy_score(config_for(folder, tmp_path / "out", **options))


def test_classes_go_by_their_names(folder, tmp_path, monkeypatch):
    """Sub-folders are numbered in alphabetical order; where the data numbers its classes otherwise, names decide."""
    for kind in CLASSES:
        (tmp_path / "samples" / kind).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(pixels_of(kind, i)).save(tmp_path / "samples" / kind / f"{i}.png")
    training = FakeTraining()
    monkeypatch.setattr(module, "fit_classifier", training)
    options = {"samples": str(tmp_path / "samples"), "label_names": "dark,checked,bright", "num_seeds": 1}
    classification_accuracy_score(config_for(folder, tmp_path / "out", **options))
    train = training.calls[0][1]
    assert train.id2label == {0: "dark", 1: "checked", 2: "bright"}
    shown = {train.id2label[int(item["label"])]: item["image"].float().mean() for item in train.dataset}
    assert abs(shown["bright"] - 190) < 30 and abs(shown["dark"] - 60) < 30
    (tmp_path / "samples" / "dark").rename(tmp_path / "samples" / "gloomy")
    with pytest.raises(ValueError, match=r"has the classes \['gloomy'\], which are not among .* --label_names"):
        classification_accuracy_score(config_for(folder, tmp_path / "other", **options))


def test_a_cascades_classes_are_those_of_the_data(folder, tmp_path):
    shutil.copy(folder / "samples.npz", tmp_path / "samples.npz")
    settings = {"num_images": 36, "stages": {"base": 8}, "id2label": {"0": "dark", "1": "checked", "2": "bright"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="other classes: number 0 is 'dark' and not 'bright'"):
        classification_accuracy_score(config_for(folder, tmp_path / "out", samples=str(tmp_path)))


# ------------------------------------------------------------------------------------------------------------------
# Figures and pictures
# ------------------------------------------------------------------------------------------------------------------


def result(top_1, **per_class):
    return {"top_1": top_1, "top_5": 1.0, "per_class": per_class, "num_images": 9, "num_train_images": 5}


def test_summary():
    runs = {
        "samples": {"0": result(0.4, a=0.2, b=0.9, c=None), "1": result(0.6, a=0.4, b=0.7, c=None)},
        "real": {"0": result(0.7, a=0.8, b=0.7, c=None), "1": result(0.9, a=0.8, b=0.7, c=None)},
    }
    report = summary(runs)
    top_1 = report["accuracies"]["samples"]["top_1"]
    assert top_1 == pytest.approx({"mean": 0.5, "standard_error": 0.1})  # sqrt(0.02) / sqrt(2)
    assert report["share_of_real_top_1"] == pytest.approx(0.5 / 0.8)
    assert report["gain_over_real"] == pytest.approx({"b": 0.1, "a": -0.5})
    assert list(report["gain_over_real"]) == ["b", "a"]
    assert report["classes_where_samples_beat_real"] == 1 and report["num_classes"] == 2
    alone = summary({"samples": {"0": result(0.4, a=0.2)}, "real": {}})
    assert alone["accuracies"]["samples"]["top_1"]["standard_error"] is None and "gain_over_real" not in alone


def test_per_class_figure():
    of_samples = {"per_class": {"a": 0.2, "b": 0.9, "c": None, "d": 0.5}}
    of_real = {"per_class": {"a": 0.8, "b": 0.3, "c": None, "d": 0.6}}
    ranked, scatter = per_class_figure(of_samples, of_real).axes
    assert [line.get_ydata().tolist() for line in ranked.lines] == [[0.3, 0.6, 0.8], [0.9, 0.5, 0.2]]
    assert scatter.lines[1].get_xydata().tolist() == [[0.3, 0.9], [0.6, 0.5], [0.8, 0.2]]
    assert scatter.get_title() == "samples are better on 1 of 3 classes"


def test_rows_of_samples_beside_real_images():
    def flat(levels, labels):
        images = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
        return InMemoryImages(images, torch.tensor(labels))

    picture = class_rows(flat([10, 20, 30], [0, 1, 1]), flat([40, 50, 60], [1, 0, 0]), [1, 0], 2)
    cell = picture.height // 2
    centres = np.asarray(picture)[cell // 2 :: cell, cell // 2 :: cell, 0]
    assert centres.tolist() == [[20, 30, 0, 40, 0], [10, 0, 0, 50, 60]]


def test_labels_without_decoding(folder, monkeypatch):
    config = DataConfig(source_resolution=8, num_channels=1, train_data_dir=str(folder / "data"))
    dataset = open_images(config).dataset
    expected = torch.stack([item["label"] for item in dataset])
    monkeypatch.setattr(type(dataset), "__getitem__", None)
    assert torch.equal(dataset.labels, expected)


def test_same_counts():
    labels, wanted = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), torch.tensor([1, 0, 1, 0, 0])
    indices = same_counts(labels, wanted)
    assert len(set(indices)) == 5 and labels[indices].bincount().tolist() == [3, 2]
    with pytest.raises(ValueError, match="3 samples of class 2, but only 2 real training images"):
        same_counts(labels, torch.tensor([2, 2, 2]))


# ------------------------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "have no labels"),
        ([0, 1, 2, 3], r"have the labels \[3\], but the data has 3 classes, 0..2"),
        ([0, 0, 2, 2], r"have no image of 1 of 3 classes \(checked\)"),
    ],
)
def test_labels_that_do_not_fit(folder, tmp_path, labels, message):
    save_samples(tmp_path / "samples.npz", [pixels_of("dark", i) for i in range(4)], labels)
    with pytest.raises(ValueError, match=message):
        classification_accuracy_score(config_for(folder, tmp_path, samples=str(tmp_path / "samples.npz")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_seeds": 0}, "`num_seeds` is 0"),
        ({"train_batch_size": 1}, "`train_batch_size` is 1"),
        ({"source_resolution": 12}, "`source_resolution` is 12; it must be a multiple of 8"),
        ({"source_resolution": 16}, "8x8 pixels with padding, less than `source_resolution` 16"),
        ({"eval_split": "dev"}, "`dataset_split` is 'dev'"),
        ({"samples": "nothing.npz"}, "'nothing.npz' does not exist"),
    ],
)
def test_bad_options(folder, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        classification_accuracy_score(config_for(folder, tmp_path, **overrides))
