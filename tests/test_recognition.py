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
from cdm_diffusers.data.memory import InMemoryImages
from cdm_diffusers.evaluation.classifier import ClassifierConfig, build_classifier
from cdm_diffusers.evaluation.intervals import wilson_interval
from cdm_diffusers.evaluation.recognition import (
    NearestNeighbours,
    RecognitionConfig,
    draw_pairs,
    measure,
    measure_recognition,
)
from cdm_diffusers.evaluation.sample import SampleConfig, sample
from cdm_diffusers.evaluation.tables import recognition_tables


ID2LABEL = {0: "dark", 1: "bright"}


class BrightnessClassifier(torch.nn.Module):
    """Calls an image bright if its mean is above 0; its features are the mean and twice the first pixel."""

    config = SimpleNamespace(id2label=ID2LABEL)

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        return torch.stack([-mean, mean], dim=1), torch.stack([mean, 2 * images[:, 0, 0, 0]], dim=1)


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
    stages = {
        name: InMemoryImages(of, labels) for name, of in (("base", random_images(8, 2, 30)), ("super_res_1", images))
    }
    train, test = InMemoryImages(train_images, train_labels), InMemoryImages(test_images, test_labels)
    options = {"num_diversity_images": 3, "num_nearest_images": 5, "batch_size": 4}
    figures, nearest = measure(stages, BrightnessClassifier(), train, test, **options)
    return stages, train, test, figures, nearest


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
    stages, train, _, figures, _ = measured
    assert list(figures["stages"]) == ["base", "super_res_1"]
    for (name, stage), size in zip(figures["stages"].items(), (2, 4), strict=True):
        pixels, real = floats(stages[name].images), averaged(train.images, size)
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
    samples, train, figures = measured[0]["super_res_1"], measured[1], measured[3]

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
    stages, train, test, figures, nearest = measured
    samples = stages["super_res_1"]
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
        neighbours.update(*neighbours.nearer(batch))
    assert torch.equal(neighbours.distances(), torch.zeros(30))
    few = NearestNeighbours(images[:30], "cpu").nearer(images[30:32])
    assert len(few[0]) == 30 and len(few[-1]) <= 4  # an image is handed over once, however many queries it is for


def test_wilson_interval():
    """Its ends are the p whose own deviation puts the share z deviations away."""
    z = NormalDist().inv_cdf(0.975)
    assert wilson_interval(1.0, 24)[1] == 1.0 and wilson_interval(0.0, 24)[0] == 0.0  # without rounding
    for share, count in ((0.9, 2000), (0.5, 10), (1.0, 30)):
        for end in wilson_interval(share, count):
            assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, abs=1e-12)


def test_the_tables_hold_the_figures(measured):
    shown = recognition_tables(measured[3])
    assert "| all classes | 62.50% (" in shown and "| bright | 50.00% | 66.67% |" in shown
    mean = measured[3]["stages"]["super_res_1"]["difference"]["mean"]
    assert "| super_res_1 | 4 |" in shown and f"{mean:+.4f}" in shown


def test_a_picture_of_pairs():
    """A row per class of those that occur, as many pairs in each as the rarest has."""
    samples = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 64, 64)
    nearest = torch.full((5, 1, 64, 64), 1.0)
    picture = draw_pairs(InMemoryImages(samples, torch.tensor([2, 0, 0, 2, 0, 1])), nearest)
    centres = np.array(picture)[32::64, 32::64, 0]
    assert centres.tolist() == [[1, 255, 2, 255], [0, 255, 3, 255]]


# From folders


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


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A cascade's samples, an untrained classifier for them and pictures of 4x4 that 2 pixels of padding make 8x8."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sample_all(tiny_cascade(), tmp_path / "samples", "png")
    save_classifier(tmp_path / "classifier")
    for split, count in (("train", 6), ("test", 3)):
        for kind in ID2LABEL.values():
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            for i, image in enumerate(random_images(count, 4, seed=len(split) + len(kind))):
                Image.fromarray(image[0].numpy()).save(tmp_path / "data" / split / kind / f"{i}.png")
    return tmp_path


def sample_all(pipeline, folder, image_format="npz", **options):
    options = {"num_images": 8, "batch_size": 4, "keep_stages": True, "image_format": image_format, **options}
    sample(SampleConfig(pipeline="cascade", output_dir=str(folder), **options), pipeline)


def save_classifier(folder, id2label=ID2LABEL, **options):
    torch.manual_seed(0)
    options = {"output_dir": str(folder), "image_size": 8, "num_channels": 1, "padding": 2, **options}
    build_classifier(ClassifierConfig(**options), id2label).model.save_pretrained(folder)


def run(folders, **overrides):
    options = {
        "samples": str(folders / "samples"),
        "classifier": str(folders / "classifier"),
        "output": str(folders / "out" / "figures.json"),
        "train_data_dir": str(folders / "data"),
        "label_names": "dark,bright",
        "batch_size": 4,
        "device": "cpu",
    }
    return measure_recognition(RecognitionConfig(**{**options, **overrides}))


def test_from_folders_to_figures_and_picture(folders, capsys):
    report = run(folders, grid=str(folders / "out" / "grid.png"), num_nearest_images=6)
    assert json.loads((folders / "out" / "figures.json").read_text()) == report
    assert report["recognised"]["samples"]["num_images"] == 8 and report["recognised"]["test"]["num_images"] == 6
    assert report["settings"]["augmentation_levels"] == {"super_res_1": 5} and report["settings"]["seed"] == 0
    assert report["settings"]["guidance_scale"] == {"base": 1.5, "super_res_1": 1.0}
    assert report["settings"]["pipeline"] == "cascade" and report["settings"]["num_images"] == 8
    assert report["versions"]["torch"].startswith("2.") and report["command"].startswith("python ")
    assert capsys.readouterr().out.count("|---") > 3
    pixels = [
        np.pad(np.array(Image.open(file)), 2) / 127.5 - 1.0 for file in (folders / "data" / "train").rglob("*.png")
    ]
    assert report["stages"]["super_res_1"]["data"]["mean"] == pytest.approx(np.mean(pixels), abs=1e-6)
    kept = np.round(np.load(folders / "samples" / "low_res" / "base.npy") * 255) / 127.5 - 1
    of_base = report["stages"]["base"]
    assert of_base["samples"] == pytest.approx({"mean": kept.mean(), "std": kept.std()}, abs=1e-6)
    samples = [np.array(Image.open(file)) / 127.5 - 1 for file in (folders / "samples" / "images").rglob("*.png")]
    assert report["stages"]["super_res_1"]["samples"]["mean"] == pytest.approx(np.mean(samples), abs=1e-6)
    assert Image.open(folders / "out" / "grid.png").size == (2 * 3 * 64, 2 * 64)  # 2 classes, 3 pairs


def test_the_format_of_samples_makes_no_difference(folders):
    of_pngs = run(folders)
    sample_all(tiny_cascade(), folders / "npz", "npz")
    of_npz = run(folders, samples=str(folders / "npz"))
    names = ("recognised", "stages", "diversity", "nearest_training_image")
    assert [of_npz[name] for name in names] == [of_pngs[name] for name in names]


# Bad input


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        ({"id2label": {0: "dark", 1: "shiny"}}, "classifier has other classes: number 1 is 'shiny' and not 'bright'"),
        ({"id2label": {0: "a", 1: "b", 2: "c"}}, r"classifier has 3 classes \(a, b, c\) and not 2 \(dark, bright\)"),
        ({"num_channels": 3}, r"takes 8x8 images of 3 channels, .* samples are 8x8 of 1: .*--num_channels 1"),
        ({"image_size": 16}, r"takes 16x16 images of 1 channels, .* are 8x8 .*--image_size 8"),
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
        ({"train_data_dir": "no/such/folder"}, "`train_data_dir` is 'no/such/folder', which is not a folder"),
        ({"label_names": "dark,shiny"}, "split 'train' has other classes: number 1 is 'shiny'"),
        ({"eval_split": "dev"}, "`dataset_split` is 'dev', which is not in"),
        ({"padding": 1}, r"6x6 pixels with padding, less than `source_resolution` 8"),
        ({"samples": "no/such/folder"}, "settings.json' was not written by cdm sample-set"),
        ({"num_nearest_images": 0}, "`num_nearest_images` is 0"),
        ({"output": "."}, "`output` is '.', a folder"),
    ],
)
def test_bad_options(folders, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(folders, **overrides)
    assert not (folders / "out" / "figures.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_stages": False}, r"lacks the stages \['base'\].*--keep_stages"),
        ({"num_images": 3}, "has 1 images of some class; each class needs at least 2"),
    ],
)
def test_samples_that_are_not_enough(folders, options, message):
    sample_all(tiny_cascade(), folders / "few", **options)
    with pytest.raises(ValueError, match=message):
        run(folders, samples=str(folders / "few"))


def test_samples_without_classes(folders):
    sample_all(tiny_cascade(id2label=None), folders / "unnamed")
    with pytest.raises(ValueError, match=r"have no classes \(`id2label`\)"):
        run(folders, samples=str(folders / "unnamed"))


def test_a_class_without_training_images(measured):
    stages, train, test, _, _ = measured
    dark = InMemoryImages(train.images[train.labels == 0], train.labels[train.labels == 0])
    with pytest.raises(ValueError, match="training split has 0 images of class 'bright'"):
        measure(stages, BrightnessClassifier(), dark, test)
