"""Figures about samples: against plain NumPy on images with known figures, and the script's way from end to end."""

import json
import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_diffusers import CascadedDDPMScheduler, CascadedDiffusionPipeline, CascadedUNet2DModel
from cdm_diffusers.evaluation.classifier import ClassifierConfig, build_classifier
from cdm_diffusers.evaluation.recognition import (
    NearestNeighbours,
    RecognitionConfig,
    Samples,
    draw_samples,
    measure,
    measure_recognition,
    sampling_options,
    tables,
    wilson_interval,
)


ID2LABEL = {0: "dark", 1: "bright"}


def config_for(**overrides):
    options = {"pipeline": "cascade", "classifier": "classifier", "output": "figures.json", "device": "cpu"}
    return RecognitionConfig(**{**options, "batch_size": 4, "num_images": 8, **overrides})


class BrightnessClassifier(torch.nn.Module):
    """Calls an image bright if its mean is above 0; its features are the mean and twice the first pixel."""

    config = SimpleNamespace(id2label=ID2LABEL)

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        return torch.stack([-mean, mean], dim=1), torch.stack([mean, 2 * images[:, 0, 0, 0]], dim=1)


class Items(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


def random_images(count, size, seed, low=0, high=256):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(low, high, (count, 1, size, size), dtype=np.uint8))


def labelled(count, size, seed, wrong=()):
    """Images dark and bright in turn, as their labels say, except for the indices `wrong`."""
    labels = torch.arange(count) % 2
    looks = labels.clone()
    looks[list(wrong)] = 1 - looks[list(wrong)]
    dark, bright = random_images(count, size, seed, 0, 90), random_images(count, size, seed + 1, 160, 256)
    return torch.where(looks[:, None, None, None] == 1, bright, dark), labels


@pytest.fixture(scope="module")
def measured():
    images, labels = labelled(8, 4, seed=0, wrong=(1, 2, 3))
    train_images, train_labels = labelled(7, 8, seed=10)  # 4 dark and 3 bright, larger than the samples
    test_images, test_labels = labelled(6, 8, seed=20, wrong=(5,))
    images[4] = train_images[2].reshape(1, 4, 2, 4, 2).float().mean((2, 4)).round().flip(-1).to(torch.uint8)
    samples = Samples({"base": random_images(8, 2, 30), "super_res_1": images}, labels)
    train, test = Items(train_images, train_labels), Items(test_images, test_labels)
    config = config_for(num_diversity_images=3, num_nearest_images=5)
    figures, nearest = measure(samples, BrightnessClassifier(), train, test, config)
    return samples, train, test, figures, nearest


def floats(images):
    return images.numpy().astype(np.float64) / 127.5 - 1


def averaged(images, size):
    block = images.shape[-1] // size
    return floats(images).reshape(len(images), 1, size, block, size, block).mean((3, 5))


def test_shares_recognised(measured):
    figures = measured[3]["recognised"]
    assert figures["samples"]["top_1"] == 5 / 8
    assert figures["samples"]["per_class"] == {"dark": 3 / 4, "bright": 2 / 4}
    assert figures["test"]["top_1"] == 5 / 6
    assert figures["test"]["per_class"] == {"dark": 1, "bright": 2 / 3}
    assert (figures["samples"]["num_images"], figures["test"]["num_images"]) == (8, 6)


def test_moments_of_each_stage_weigh_classes_equally(measured):
    samples, train, _, figures, _ = measured
    assert list(figures["stages"]) == ["base", "super_res_1"]
    for (name, stage), size in zip(figures["stages"].items(), (2, 4), strict=True):
        pixels, real = floats(samples.stages[name]), averaged(train.images, size)
        weights = np.where(train.labels == 0, 1 / 4, 1 / 3)  # 4 dark and 3 bright images
        mean = np.average(real.mean((1, 2, 3)), weights=weights)
        std = math.sqrt(np.average(((real - mean) ** 2).mean((1, 2, 3)), weights=weights))
        assert stage["size"] == size
        assert stage["samples"] == pytest.approx({"mean": pixels.mean(), "std": pixels.std()}, abs=1e-6)
        assert stage["data"] == pytest.approx({"mean": mean, "std": std}, abs=1e-6)
        assert stage["difference"] == pytest.approx(
            {"mean": pixels.mean() - mean, "std": pixels.std() - std}, abs=1e-6
        )


def mean_distance(vectors):
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i)]
    return np.mean([np.linalg.norm(vectors[i] - vectors[j]) for i, j in pairs])


def test_distances_within_classes(measured):
    samples, train, _, figures, _ = measured

    def features(pixels):
        return np.stack([pixels.mean((1, 2, 3)), 2 * pixels[:, 0, 0, 0]], axis=1)

    for space, function in (("pixels", lambda pixels: pixels), ("features", features)):
        found = figures["diversity"][space]
        assert found["images_per_class"] == 3
        for label, name in ID2LABEL.items():
            of_samples = mean_distance(function(floats(samples.images[samples.labels == label][:3])))
            assert found["per_class"][name]["samples"] == pytest.approx(of_samples, rel=1e-5)
        real = function(averaged(train.images[train.labels == 1], 4))  # all three bright ones, in any order
        assert found["per_class"]["bright"]["data"] == pytest.approx(mean_distance(real), rel=1e-5)
        sums = {key: sum(found["per_class"][name][key] for name in ID2LABEL.values()) for key in ("samples", "data")}
        assert found["ratio"] == pytest.approx(sums["samples"] / sums["data"])
        one = found["per_class"]["dark"]
        assert one["ratio"] == pytest.approx(one["samples"] / one["data"])


def test_nearest_training_images(measured):
    samples, train, test, figures, nearest = measured
    real = averaged(train.images, 4)
    real = np.concatenate([real, real[..., ::-1]])

    def distances(queries):
        return np.linalg.norm((queries[:, None] - real[None]).reshape(len(queries), len(real), -1), axis=2)

    of_samples = distances(floats(samples.images[:5]))
    found = figures["nearest_training_image"]
    smallest = of_samples.min(1)
    expected = {"mean": smallest.mean(), "median": np.median(smallest), "smallest": smallest.min()}
    assert found["samples"] == pytest.approx(expected, rel=1e-4)
    assert smallest[4] == smallest.min() < 0.02  # the mirrored copy of a training image
    np.testing.assert_allclose(nearest.numpy(), real[of_samples.argmin(1)], atol=1e-6)
    of_test = distances(averaged(test.images, 4)).min(1)
    means = [np.delete(of_test, left_out).mean() for left_out in range(6)]  # five of six, in any order
    assert np.abs(np.array(means) - found["test"]["mean"]).min() < 1e-4
    assert found["num_images"] == 5
    assert found["ratio_of_means"] == pytest.approx(found["samples"]["mean"] / found["test"]["mean"])


def test_distance_to_an_exact_copy_is_zero():
    images = torch.rand(40, 3, 16, 16) * 2 - 1
    neighbours = NearestNeighbours(images[:30], "cpu")
    for batch in images.split(15):
        neighbours.update(batch)
    assert torch.equal(neighbours.distances(), torch.zeros(30))


def test_wilson_interval():
    """Its ends are the p whose own deviation puts the share z deviations away."""
    z = NormalDist().inv_cdf(0.975)
    for share, count in ((0.9, 2000), (0.5, 10), (1.0, 30)):
        for end in wilson_interval(share, count):
            assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, abs=1e-12)


def test_tables_hold_the_figures(measured):
    shown = tables(measured[3])
    assert "| all classes | 62.50% (" in shown and "| bright | 50.00% | 66.67% |" in shown
    mean = measured[3]["stages"]["super_res_1"]["difference"]["mean"]
    assert "| super_res_1 | 4 |" in shown and f"{mean:+.4f}" in shown


# From the pipeline


def tiny_cascade(**options):
    """A random 4x4 base and a noised 4 -> 8 stage."""
    torch.manual_seed(0)
    shared = {
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "attention_resolutions": (),
        "mid_block_attention": False,
        "num_attention_heads": 1,
        "num_classes": 2,
    }
    base = CascadedUNet2DModel(sample_size=4, null_class=True, **shared)
    super_res = CascadedUNet2DModel(sample_size=8, low_res_size=4, augmentation_level_embedding=True, **shared)
    scheduler = CascadedDDPMScheduler(num_train_timesteps=20, variance_type="fixed_small")
    return CascadedDiffusionPipeline(
        base_unet=base,
        base_scheduler=scheduler,
        super_res_1_unet=super_res,
        super_res_1_scheduler=scheduler,
        super_res_1_noising_scheduler=scheduler,
        **{
            "id2label": ID2LABEL,
            "source_resolution": 8,
            "default_num_inference_steps": {"base": 3, "super_res_1": 2},
            "default_augmentation_levels": {"super_res_1": 5},
            "default_guidance_scales": {"base": 1.5},
            **options,
        },
    )


def draw(pipeline, **overrides):
    config = config_for(**overrides)
    return draw_samples(pipeline, config, sampling_options(pipeline, config))


def test_images_do_not_depend_on_batch_size_or_count():
    pipeline = tiny_cascade()
    whole = draw(pipeline, num_images=9, batch_size=9)
    assert whole.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert {name: tuple(images.shape) for name, images in whole.stages.items()} == {
        "base": (9, 1, 4, 4),
        "super_res_1": (9, 1, 8, 8),
    }
    cut = draw(pipeline, num_images=7, batch_size=4)
    for name, images in cut.stages.items():
        assert (images.int() - whole.stages[name][:7].int()).abs().max() <= 1
    other = draw(pipeline, num_images=7, batch_size=4, seed=1)
    assert (other.images.int() - cut.images.int()).abs().float().mean() > 5
    assert len(whole.images.flatten(1).unique(dim=0)) == 9


def test_settings_are_the_pipelines_own_unless_given():
    pipeline = tiny_cascade()
    assert sampling_options(pipeline, config_for()) == {
        "num_inference_steps": {"base": 3, "super_res_1": 2},
        "augmentation_levels": {"super_res_1": 5},
        "guidance_scale": {"base": 1.5, "super_res_1": 1.0},
    }
    assert sampling_options(pipeline, config_for(num_inference_steps=4, augmentation_level=0)) == {
        "num_inference_steps": {"base": 4, "super_res_1": 4},
        "augmentation_levels": {"super_res_1": 0},
        "guidance_scale": {"base": 1.5, "super_res_1": 1.0},
    }
    bare = tiny_cascade(default_num_inference_steps=None, default_augmentation_levels=None)
    assert sampling_options(bare, config_for())["num_inference_steps"] == {"base": 20, "super_res_1": 20}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A saved cascade, an untrained classifier for it and pictures of 4x4 that 2 pixels of padding make 8x8."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_cascade().save_pretrained(tmp_path / "cascade")
    save_classifier(tmp_path / "classifier")
    for split, count in (("train", 6), ("test", 3)):
        for kind in ID2LABEL.values():
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            for i, image in enumerate(random_images(count, 4, seed=len(split) + len(kind))):
                Image.fromarray(image[0].numpy()).save(tmp_path / "data" / split / kind / f"{i}.png")
    return tmp_path


def save_classifier(folder, id2label=ID2LABEL, **options):
    torch.manual_seed(0)
    options = {"output_dir": str(folder), "image_size": 8, "num_channels": 1, "padding": 2, **options}
    build_classifier(ClassifierConfig(**options), id2label).model.save_pretrained(folder)


def run(folders, **overrides):
    options = {
        "pipeline": str(folders / "cascade"),
        "classifier": str(folders / "classifier"),
        "output": str(folders / "out" / "figures.json"),
        "train_data_dir": str(folders / "data"),
        "label_names": "dark,bright",
    }
    return measure_recognition(config_for(**{**options, **overrides}))


def test_from_folders_to_figures_and_picture(folders, capsys):
    report = run(folders, grid=str(folders / "out" / "grid.png"), num_nearest_images=6)
    assert json.loads((folders / "out" / "figures.json").read_text()) == report
    assert report["recognised"]["samples"]["num_images"] == 8 and report["recognised"]["test"]["num_images"] == 6
    assert report["settings"]["augmentation_levels"] == {"super_res_1": 5} and report["settings"]["seed"] == 0
    assert report["settings"]["guidance_scale"] == {"base": 1.5, "super_res_1": 1.0}
    assert report["versions"]["torch"].startswith("2.") and report["command"].startswith("python ")
    assert capsys.readouterr().out.count("|---") > 3
    pixels = [
        np.pad(np.array(Image.open(file)), 2) / 127.5 - 1.0 for file in (folders / "data" / "train").rglob("*.png")
    ]
    assert report["stages"]["super_res_1"]["data"]["mean"] == pytest.approx(np.mean(pixels), abs=1e-6)
    assert Image.open(folders / "out" / "grid.png").size == (2 * 3 * 64, 2 * 64)  # 2 classes, 3 pairs


# Bad input


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        ({"id2label": {0: "dark", 1: "shiny"}}, "classifier has other classes: number 1 is 'shiny' and not 'bright'"),
        ({"id2label": {0: "a", 1: "b", 2: "c"}}, r"classifier has 3 classes \(a, b, c\) and not 2 \(dark, bright\)"),
        ({"num_channels": 3}, r"takes 8x8 images of 3 channels, .* makes 8x8 images of 1: .*--num_channels 1"),
        ({"image_size": 16}, r"takes 16x16 images of 1 channels, .* makes 8x8 .*--image_size 8"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(folders, classifier, message):
    save_classifier(folders / "classifier", **classifier)
    with pytest.raises(ValueError, match=message):
        run(folders)
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"classifier": "no/such/folder"}, "'no/such/folder' holds no classifier"),
        ({"train_data_dir": "no/such/folder"}, "train_data_dir='no/such/folder' is not a folder"),
        ({"label_names": "dark,shiny"}, "split 'train' has other classes: number 1 is 'shiny'"),
        ({"eval_split": "dev"}, "dataset_split='dev' is not in"),
        ({"padding": 1}, r"6x6 pixels with padding, less than source_resolution=8"),
        ({"num_images": 3}, "`num_images` is 3; 2 classes need at least 4"),
        ({"num_images": 0}, "`num_images` is 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": 21}, "num_inference_steps.*21"),
        ({"augmentation_level": 21}, "`augmentation_level` of stage `super_res_1` is 21"),
    ],
)
def test_bad_options(folders, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(folders, **overrides)
    assert not (folders / "out" / "figures.json").exists()


def test_pipelines_without_classes_or_augmentation(folders):
    tiny_cascade(id2label=None).save_pretrained(folders / "cascade")
    with pytest.raises(ValueError, match=r"the pipeline has no classes \(`id2label`\)"):
        run(folders)
    base = tiny_cascade()
    base = CascadedDiffusionPipeline(base.base_unet, base.base_scheduler, id2label=ID2LABEL)
    with pytest.raises(ValueError, match="`augmentation_level` is 5, but no stage of the pipeline takes one"):
        sampling_options(base, config_for(augmentation_level=5))


def test_a_class_without_training_images(measured):
    samples, train, test, _, _ = measured
    dark = Items(train.images[train.labels == 0], train.labels[train.labels == 0])
    with pytest.raises(ValueError, match="training split has 0 images of class 'bright'"):
        measure(samples, BrightnessClassifier(), dark, test, config_for())
