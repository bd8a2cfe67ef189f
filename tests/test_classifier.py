"""The classifier and its training: what it learns, what it reports, what it saves, and bad input."""

import json
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from forkserver import FORKSERVER
from PIL import Image
from transformers import ResNetForImageClassification

from cdm_diffusers.data.labels import check_same_classes
from cdm_diffusers.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    accuracies,
    build_classifier,
    build_lr_scheduler,
    build_optimizer,
    random_resized_crop,
    random_shift,
    train_classifier,
)


CLASSES = ("bright", "checked", "dark")


def picture(kind, seed):
    """A noisy 8x8 picture: bright, dark, or a checkerboard of both, which only its pattern tells from their mean."""
    noise = np.random.default_rng(seed).integers(-40, 41, (8, 8))
    board = np.where(np.indices((8, 8)).sum(0) % 2 == 0, 60, 190)
    level = {"bright": 190, "dark": 60, "checked": board}[kind]
    return Image.fromarray((level + noise).astype(np.uint8))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """48 training and 12 test pictures of each of three classes."""
    root = tmp_path_factory.mktemp("data")
    for split, count, first in (("train", 48, 0), ("test", 12, 1000)):
        for kind in CLASSES:
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                picture(kind, first + i).save(root / split / kind / f"{i:03}.png")
    return root


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def config_for(folder, output_dir, **overrides):
    options = {"train_data_dir": str(folder), "image_size": 8, "num_channels": 1, "train_batch_size": 16}
    return ClassifierConfig(output_dir=str(output_dir), **{**options, "num_train_epochs": 6, **overrides})


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("classifier")
    results = train_classifier(config_for(image_folder, output_dir, padding=0))
    return output_dir, results


def test_separable_classes_are_learned(trained):
    _, results = trained
    assert results["top_1"] >= 0.95 and results["top_5"] == 1.0
    assert list(results["per_class"]) == list(CLASSES)
    assert results["num_images"] == 36 and results["num_train_images"] == 144


def test_what_is_saved_needs_no_flags(trained, image_folder):
    """The folder alone reproduces the reported accuracy, from pictures read here."""
    output_dir, results = trained
    assert json.loads((output_dir / "results.json").read_text()) == results
    assert (output_dir / "model.safetensors").is_file()
    classifier = Classifier.from_pretrained(output_dir)
    assert not classifier.training
    config = classifier.config
    assert (config.num_channels, config.image_size, config.padding, config.upsampling) == (1, 8, 0, 2)
    assert config.id2label == dict(enumerate(CLASSES))
    for label, kind in config.id2label.items():
        files = sorted((image_folder / "test" / kind).iterdir())
        pixels = torch.from_numpy(np.stack([np.array(Image.open(file)) for file in files]))[:, None]
        with torch.no_grad():
            logits, features = classifier((pixels / 255 - config.image_mean) / config.image_std)
        assert (logits.argmax(1) == label).double().mean().item() == results["per_class"][kind]
        head = classifier.model.classifier[-1]
        torch.testing.assert_close(features @ head.weight.T + head.bias, logits)


def test_training_is_reproducible_and_depends_on_the_seed(image_folder, tmp_path):
    def weights(name, seed):
        config = config_for(image_folder, tmp_path / name, num_train_epochs=1, seed=seed)
        train_classifier(config)
        return ResNetForImageClassification.from_pretrained(tmp_path / name).state_dict()

    first, again, other = weights("a", 0), weights("b", 0), weights("c", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.1.weight"], other["classifier.1.weight"])


def test_resnet_50_has_the_parameters_of_he_et_al(tmp_path):
    config = ClassifierConfig(output_dir=str(tmp_path), architecture="resnet-50", image_size=224)
    with torch.device("meta"):
        classifier = build_classifier(config, {index: f"class {index}" for index in range(1000)})
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 25_557_032


def test_accuracies():
    logits = torch.zeros(4, 7)
    logits[torch.arange(4), torch.tensor([0, 1, 1, 3])] = 2.0
    logits[:, 6] = 1.0
    logits[:, 5] -= 1.0
    labels = torch.tensor([0, 1, 6, 5])  # right, right, second best, last
    result = accuracies(logits, labels, {index: f"c{index}" for index in range(7)})
    assert result["top_1"] == 0.5 and result["top_5"] == 0.75 and result["num_images"] == 4
    assert result["per_class"] == {"c0": 1, "c1": 1, "c2": None, "c3": None, "c4": None, "c5": 0, "c6": 0}


def test_random_shift_crops_the_padded_image_uniformly():
    images = torch.randint(1, 256, (600, 2, 4, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shifted = random_shift(images, 1, torch.Generator().manual_seed(1)).numpy()
    counts = np.zeros((3, 3), int)
    for image, result in zip(images.numpy(), shifted, strict=True):
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
        matches = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if np.array_equal(padded[:, top : top + 4, left : left + 3], result)
        ]
        assert len(matches) == 1
        counts[matches[0]] += 1
    assert counts.min() > 40 and counts.max() < 100  # 600 / 9 = 67, deviation 7.7
    assert torch.equal(random_shift(images, 0, torch.Generator()), images)


def test_a_resized_crop_is_a_rectangle_of_the_image():
    """On images whose pixels are their own coordinates, crops are coordinates again: affine, with the right spans."""
    places = (torch.arange(32) + 0.5) / 16 - 1  # centres of pixels in [-1, 1]
    images = torch.stack(torch.meshgrid(places, places, indexing="ij")).expand(500, 2, 32, 32)  # rows, columns
    crops = random_resized_crop(images, torch.Generator().manual_seed(0))
    assert crops.shape == images.shape
    height = (crops[:, 0, 24, 0] - crops[:, 0, 8, 0]) / (places[24] - places[8])  # inside, away from the border
    width = (crops[:, 1, 0, 24] - crops[:, 1, 0, 8]) / (places[24] - places[8])
    assert (crops[:, 0] - crops[:, 0, :, :1]).abs().max() < 1e-5 and (crops[:, 1] - crops[:, 1, :1]).abs().max() < 1e-5
    area, ratio = height * width, width / height
    assert 0.07 < area.min() < 0.12 and 0.8 < area.max() < 1.01 and 0.45 < area.mean() < 0.55
    assert 0.74 < ratio.min() < 0.78 and 1.29 < ratio.max() < 1.34
    middle = crops[:, 1, 0, 15:17].mean(1)
    assert (middle.abs() <= 1 - width + 1e-4).all() and middle.min() < -0.3 and middle.max() > 0.3


@pytest.mark.parametrize(
    ("lr_scheduler", "expected"),
    [
        ("step", {0: 0.0, 5: 0.5, 10: 1.0, 59: 1.0, 60: 0.1, 119: 0.1, 120: 0.01, 160: 0.001, 179: 0.001}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 95: 0.5, 179: 0.0}),
    ],
)
def test_learning_rates(lr_scheduler, expected):
    optimizer = build_optimizer(torch.nn.Linear(1, 1), "sgd", 0.2, 0.0)
    scheduler = build_lr_scheduler(optimizer, lr_scheduler, 0.2, 180)
    rates = []
    for _ in range(180):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert {step: rates[step] / 0.2 for step in expected} == pytest.approx(expected, abs=1e-3)


def test_recipes_are_defaults(tmp_path):
    config = ClassifierConfig(output_dir=str(tmp_path), architecture="resnet-50", num_train_epochs=3, random_shift=1)
    assert (config.num_train_epochs, config.random_shift) == (3, 1)
    assert (config.optimizer, config.lr_scheduler, config.learning_rate) == ("sgd", "step", 0.1)
    assert (config.train_batch_size, config.weight_decay, config.random_resized_crop) == (256, 1e-4, True)


def test_the_imagenet_recipe_learns(image_folder, tmp_path):
    """Its optimizer, schedule and crops, on the small network."""
    recipe = {"optimizer": "sgd", "lr_scheduler": "step", "learning_rate": 0.05, "random_resized_crop": True}
    results = train_classifier(config_for(image_folder, tmp_path, num_train_epochs=12, label_smoothing=0.1, **recipe))
    assert results["top_1"] > 0.9


# Bad input


def test_splits_with_other_classes_are_refused(image_folder, tmp_path):
    for split, kinds in (("train", CLASSES), ("test", CLASSES[:2])):
        for kind in kinds:
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            picture(kind, 0).save(tmp_path / "data" / split / kind / "0.png")
    with pytest.raises(ValueError, match=r"split 'test' has 2 classes \(bright, checked\) and not 3 .*--label_names"):
        train_classifier(config_for(tmp_path / "data", tmp_path / "out"))
    with pytest.raises(ValueError, match=r"`dataset_split` is 'dev', which is not in"):
        train_classifier(config_for(image_folder, tmp_path / "out", eval_split="dev"))
    assert not (tmp_path / "out").exists()


def test_classes_without_names_fit_any_of_their_number():
    named, numbered = {0: "boot", 1: "shirt"}, {0: "0", 1: "1"}
    check_same_classes("the data", named, dict(named))
    check_same_classes("the data", numbered, named)
    check_same_classes("the data", named, numbered)
    with pytest.raises(ValueError, match=r"the data has other classes: number 0 is 'shirt' and not 'boot'"):
        check_same_classes("the data", {0: "shirt", 1: "boot"}, named)


def test_no_classifier_in_the_folder(tmp_path, trained):
    with pytest.raises(ValueError, match=r"holds no classifier: give the --output_dir of cdm train classifier"):
        Classifier.from_pretrained(tmp_path / "missing")
    model = ResNetForImageClassification.from_pretrained(trained[0])
    del model.config.upsampling
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no \['upsampling'\]: train one"):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architecture": "resnet"}, r"`architecture` is 'resnet'; .* \['small', 'resnet-50'\]"),
        ({"num_train_epochs": 0}, "`num_train_epochs` is 0"),
        ({"train_batch_size": 1}, "`train_batch_size` is 1"),
        ({"random_shift": -1}, "`random_shift` is -1"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` is 1.0"),
        ({"num_channels": 2}, "`num_channels` is 2"),
        ({"train_data_dir": "no/such/folder"}, "`train_data_dir` is 'no/such/folder', which is not a folder"),
        ({"train_batch_size": 145}, "`train_batch_size` is 145 .* only 144 images"),
    ],
)
def test_bad_options(image_folder, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(config_for(image_folder, tmp_path, **overrides))


def test_fp16_on_a_cpu_is_refused(image_folder, tmp_path):
    config = config_for(image_folder, tmp_path / "out", mixed_precision="fp16")
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as pool:  # accelerate has one precision a process
        error = pool.submit(train_classifier, config).exception()
    assert isinstance(error, ValueError) and "`mixed_precision` is 'fp16'" in str(error)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_the_run(image_folder, tmp_path):
    with pytest.raises(RuntimeError, match=r"loss of epoch \d is .*nothing was saved.*--learning_rate"):
        train_classifier(config_for(image_folder, tmp_path, learning_rate=1e30))
    assert not (tmp_path / "model.safetensors").exists()
