"""`evaluation/evaluate.py` and its stored references, on tiny data and a tiny classifier."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from cdm_diffusers import files
from cdm_diffusers.data.averages import AreaAverages
from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.image_sets import load_image_set
from cdm_diffusers.data.memory import ImageSubset, InMemoryImages
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.data.transforms import area_resize, to_float
from cdm_diffusers.evaluation.classifier import ClassifierConfig, build_classifier
from cdm_diffusers.evaluation.evaluate import EvaluateConfig, draw_samples, evaluate
from cdm_diffusers.evaluation.features import (
    ClassifierExtractor,
    FeatureExtractor,
    extract,
    load_extractor,
    read_statistics,
    reference_features,
    reference_statistics,
)
from cdm_diffusers.evaluation.metrics import (
    FeatureStatistics,
    extrapolated_frechet_distance,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    polynomial_kernel,
    precision_recall,
    rbf_kernel,
)
from cdm_diffusers.evaluation.records import provenance
from cdm_diffusers.model_cards import _figures_of


NUM_TRAIN, NUM_TEST, NUM_SAMPLES = 50, 30, 24


def pixels(count, seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)


def write_idx(folder, prefix, images):
    header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())


def save_classifier(folder, seed=0, size=8):
    torch.manual_seed(seed)
    config = ClassifierConfig(train_data_dir=".", output_dir="", image_size=size, num_channels=1)
    build_classifier(config, {0: "a", 1: "b", 2: "c"}).model.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, samples with 3 labels, and a classifier."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    write_idx(folder / "data", "train", pixels(NUM_TRAIN, 0))
    write_idx(folder / "data", "t10k", pixels(NUM_TEST, 1))
    np.savez(folder / "samples.npz", arr_0=pixels(NUM_SAMPLES, 2)[..., None], arr_1=np.arange(NUM_SAMPLES) % 3)
    save_classifier(folder / "net")
    return folder


@pytest.fixture
def config(world, tmp_path):
    return EvaluateConfig(
        samples=str(world / "samples.npz"),
        extractor=str(world / "net"),
        train_data_dir=str(world / "data"),
        output=str(tmp_path / "out" / "report.json"),
        cache_dir=str(tmp_path / "cache"),
        batch_size=7,
        device="cpu",
    )


@pytest.fixture
def images_seen(monkeypatch):
    """Batch sizes of everything that goes through an extractor."""
    seen = []
    forward = FeatureExtractor.forward

    def counted(self, images):
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(FeatureExtractor, "forward", counted)
    return seen


def features_of(config, images):
    extractor = load_extractor(config.extractor)
    return extract(extractor, InMemoryImages(torch.from_numpy(images)[:, None], None))[0]


def distance_of_few(x, y):
    """The Frechet distance without covariances: between few images, their Gram matrix has the same singular values."""
    x, y = x.double().numpy(), y.double().numpy()
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    return shift + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")


def test_report_is_recomputed(config, capsys):
    report = evaluate(config)
    assert report == json.loads(Path(config.output).read_text())
    samples, train, test = (
        features_of(config, pixels(count, seed)) for count, seed in ((NUM_SAMPLES, 2), (NUM_TRAIN, 0), (NUM_TEST, 1))
    )
    for split, reference, other in (("train", train, test), ("test", test, train)):
        figure = report["figures"][split]["frechet_distance"]
        assert figure["value"] == pytest.approx(distance_of_few(samples, reference), rel=1e-4)
        assert (figure["num_images"], figure["num_reference_images"]) == (NUM_SAMPLES, len(reference))
        assert figure["interval"][0] < figure["value"] < figure["interval"][1]
        # What real images reach is measured at the samples' number.
        assert figure["real"]["num_images"] == NUM_SAMPLES <= len(other)
    # All 24 images of each kind are compared, whose order does not matter.
    order = torch.randperm(NUM_TEST, generator=torch.Generator().manual_seed(0))[:NUM_SAMPLES]
    precision, recall = precision_recall(test[order], samples)
    assert report["figures"]["test"]["precision"]["value"] == pytest.approx(precision)
    assert report["figures"]["test"]["recall"]["value"] == pytest.approx(recall)
    assert set(report["figures"]) == {"train", "test", "inception_score"}
    assert report["extractor"] == "classifier net, 8x8, not resized"
    assert report["samples"]["images_per_label"] == [8, 8] and report["settings"] == dataclasses.asdict(config)
    assert any("covariance is singular" in warning for warning in report["warnings"])
    types = {type_ for type_, *_ in _figures_of(report)}
    assert types >= {"frechet_distance_extrapolated", "kernel_distance", "kernel_distance_rbf"}  # of a model card
    printed = capsys.readouterr().out
    assert "| Frechet distance, extrapolated, 'train' |" in printed and "| kernel distance (RBF), 'train' |" in printed
    assert "| Frechet distance, 'train' |" in printed and "FID" not in printed and "classifier net, 8x8" in printed


def test_floors_and_intervals_are_recomputed(config):
    """Real images of the other split in the samples' place; normal intervals, Student's over the ten splits."""
    report = evaluate(config)
    extractor = load_extractor(config.extractor)
    samples = features_of(config, pixels(NUM_SAMPLES, 2))
    in_order = draw_samples(load_image_set(config.samples), NUM_SAMPLES, seed=0).indices
    whole, drawn = {}, {}
    for split, count, seed in (("train", NUM_TRAIN, 0), ("test", NUM_TEST, 1)):
        images = torch.from_numpy(pixels(count, seed))[:, None]
        whole[split], logits = extract(extractor, InMemoryImages(images, None))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:NUM_SAMPLES]
        drawn[split], drawn_logits = whole[split][order], logits[order]  # in the end those of the test images
    for split, other in (("train", "test"), ("test", "train")):
        figures = report["figures"][split]
        floor = distance_of_few(drawn[other], whole[split])
        assert figures["frechet_distance"]["real"]["value"] == pytest.approx(floor, rel=1e-4)
        error = frechet_standard_error(FeatureStatistics.from_features(whole[split]), samples)
        low, high = figures["frechet_distance"]["interval"]
        assert (high - low) / 2 == pytest.approx(1.959964 * error, rel=1e-4)
        shares = precision_recall(drawn[split], drawn[other])
        assert [figures[name]["real"]["value"] for name in ("precision", "recall")] == pytest.approx(shares)
        limit = extrapolated_frechet_distance(
            samples[in_order],
            FeatureStatistics.from_features(whole[split]),
            generator=torch.Generator().manual_seed(0),
        )
        assert figures["frechet_distance_extrapolated"]["value"] == pytest.approx(limit, rel=1e-3)
        kernels = {"": polynomial_kernel, "_rbf": rbf_kernel(FeatureStatistics.from_features(whole[split]))}
        for name, kernel in kernels.items():
            value, error = kernel_distance(drawn[split], drawn[other], kernel)
            figure = figures[f"kernel_distance{name}"]["real"]
            assert (figure["value"], figure["standard_error"]) == pytest.approx((value, error), rel=1e-3, abs=1e-7)
            low, high = figure["interval"]
            assert (high - low) / 2 == pytest.approx(1.959964 * error, rel=1e-3, abs=1e-7)
    score, deviation = inception_score(drawn_logits)
    figure = report["figures"]["inception_score"]["real"]
    assert (figure["value"] - 1, figure["deviation"]) == pytest.approx((score - 1, deviation), rel=1e-3)
    low, high = figure["interval"]
    assert (high - low) / 2 == pytest.approx(2.262157 * deviation / 9**0.5, rel=1e-3)


def test_inception_score_takes_the_samples_in_their_order(config, tmp_path):
    """As the original; a set that is sorted by label is warned of."""
    report = evaluate(config)
    images = InMemoryImages(torch.from_numpy(pixels(NUM_SAMPLES, 2))[:, None], None)
    score, deviation = inception_score(extract(load_extractor(config.extractor), images)[1])
    figure = report["figures"]["inception_score"]
    assert (figure["value"] - 1, figure["deviation"]) == pytest.approx((score - 1, deviation), rel=1e-3)
    np.savez(tmp_path / "sorted.npz", arr_0=pixels(24, 2)[..., None], arr_1=np.arange(24) // 8)
    warnings = evaluate(dataclasses.replace(config, samples=str(tmp_path / "sorted.npz")))["warnings"]
    assert sum("sorted by label" in warning for warning in warnings) == 1
    assert not any("sorted by label" in warning for warning in report["warnings"])


def test_script(config, monkeypatch):
    """The command line gives what the function gives, and the report says what the command was."""
    options = ("samples", "extractor", "train_data_dir", "output", "cache_dir", "batch_size", "device")
    arguments = [f"--{name}={getattr(config, name)}" for name in options]
    monkeypatch.setattr("sys.argv", ["evaluation/evaluate.py", *arguments, "--inception_score", "false"])
    runpy.run_path(str(Path(__file__).parents[1] / "evaluation" / "evaluate.py"), run_name="__main__")
    report = json.loads(Path(config.output).read_text())
    assert "evaluation/evaluate.py --samples=" in report["command"]
    expected = evaluate(dataclasses.replace(config, inception_score=False))
    assert report["figures"] == expected["figures"] and report["settings"] == expected["settings"]


def test_a_stages_samples_are_compared_with_what_it_was_trained_on(config, tmp_path):
    """A folder of sample.py says from which size a stage's images were averaged down."""
    save_classifier(tmp_path / "small", size=4)
    (tmp_path / "samples").mkdir()
    np.savez(tmp_path / "samples" / "samples.npz", arr_0=pixels(NUM_SAMPLES, 2, size=4)[..., None])
    settings = {"num_images": NUM_SAMPLES, "stages": {"base": 4}, "source_resolution": 8, "id2label": {"0": "a"}}
    (tmp_path / "samples" / "settings.json").write_text(json.dumps(settings))
    options = {"samples": str(tmp_path / "samples"), "extractor": str(tmp_path / "small"), "inception_score": False}
    config = dataclasses.replace(config, **options)
    report = evaluate(config)
    assert report["settings"]["source_resolution"] == 8
    averages = torch.from_numpy(pixels(NUM_TEST, 1)).float().reshape(-1, 4, 2, 4, 2).mean((2, 4))
    test = features_of(config, averages.round().to(torch.uint8).numpy())
    expected = distance_of_few(features_of(config, pixels(NUM_SAMPLES, 2, size=4)), test)
    assert report["figures"]["test"]["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-2)
    assert load_image_set(tmp_path / "samples").id2label == {0: "a"}


def test_official_network_gives_fid(config, capsys, monkeypatch):
    monkeypatch.setattr(ClassifierExtractor, "distance_name", "FID")
    report = evaluate(config)
    assert report["distance"] == "FID" and "| FID, 'test' |" in capsys.readouterr().out


def test_references_are_computed_once(config, images_seen):
    first = evaluate(config)
    assert sum(images_seen) == NUM_SAMPLES + 2 * NUM_SAMPLES + NUM_TRAIN + NUM_TEST
    images_seen.clear()
    second = evaluate(config)
    assert sum(images_seen) == NUM_SAMPLES
    assert first["figures"] == second["figures"]


def test_fewer_reference_images(config, images_seen):
    report = evaluate(dataclasses.replace(config, num_reference_images=20))
    assert sum(images_seen) == NUM_SAMPLES + 20 + 20
    figure = report["figures"]["train"]["frechet_distance"]
    assert (figure["num_images"], figure["num_reference_images"], figure["real"]["num_images"]) == (24, 20, 20)
    assert any("only 20 images for 24 samples" in warning for warning in report["warnings"])
    with pytest.raises(ValueError, match=r"`num_reference_images` is 31, and the split 'test' has only\s+30"):
        evaluate(dataclasses.replace(config, num_reference_images=31))


def test_samples_are_drawn_balanced(tmp_path, config):
    """From a set sorted by label, of which one has few; and it is said that they were drawn."""
    labels = np.repeat([0, 1, 2], [40, 40, 5])
    np.savez(tmp_path / "sorted.npz", arr_0=pixels(85, 3)[..., None], arr_1=labels)
    config = dataclasses.replace(config, samples=str(tmp_path / "sorted.npz"), num_images=21)
    drawn = draw_samples(load_image_set(config.samples), 21, seed=0)
    assert np.bincount(labels[drawn.indices]).tolist() == [8, 8, 5] and len(set(drawn.indices)) == 21
    assert np.bincount(labels[drawn.indices[:12]]).tolist() == [4, 4, 4]  # so is the part that has neighbours
    report = evaluate(config)
    assert report["samples"]["images_per_label"] == [5, 8] and report["samples"]["drawn_from"] == 85
    assert "21 of 85 samples were drawn, balanced over their labels." in report["warnings"]


# Bad input


def test_missing_splits_are_found_before_any_is_embedded(config, images_seen):
    with pytest.raises(ValueError, match="validation"):
        evaluate(dataclasses.replace(config, eval_split="validation"))
    assert sum(images_seen) == NUM_SAMPLES


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_images", 19, "`num_images` is 19; it must be at least 20"),
        ("eval_split", "train", "both 'train'; they must differ"),
        ("batch_size", 0, "`batch_size` is 0"),
        ("output", ".", "`output` is '.', a folder"),
    ],
)
def test_options_out_of_range(config, option, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **{option: value})


def test_too_few_samples(config, tmp_path):
    with pytest.raises(ValueError, match="holds 24 images, and `num_images` asks for 30"):
        evaluate(dataclasses.replace(config, num_images=30))
    np.savez(tmp_path / "few.npz", arr_0=pixels(19, 3)[..., None])
    with pytest.raises(ValueError, match="holds 19 images, and at least 20 are needed"):
        evaluate(dataclasses.replace(config, samples=str(tmp_path / "few.npz")))


def test_samples_that_the_classifier_does_not_take(config, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=pixels(20, 3, size=16)[..., None])
    with pytest.raises(ValueError, match="takes 8x8 images of 1 channels, and these are 16x16 of 1"):
        evaluate(dataclasses.replace(config, samples=str(tmp_path / "large.npz")))
    np.savez(tmp_path / "other.npz", arr_0=pixels(20, 3)[..., None], arr_1=np.arange(20) % 5)
    with pytest.raises(ValueError, match=r"has the labels \[3, 4\], and classifier net knows 0\.\.2"):
        evaluate(dataclasses.replace(config, samples=str(tmp_path / "other.npz")))


def test_inception_score_needs_logits(config, monkeypatch):
    extract_both = ClassifierExtractor.extract
    monkeypatch.setattr(ClassifierExtractor, "extract", lambda self, images: (extract_both(self, images)[0], None))
    assert "inception_score" not in evaluate(config)["figures"]
    with pytest.raises(ValueError, match="`inception_score` needs logits"):
        evaluate(dataclasses.replace(config, inception_score=True))


# Stored references


def open_data(config, **changes):
    options = {"source_resolution": 8, "num_channels": 1, "class_conditional": False} | changes
    return open_images(DataConfig(train_data_dir=config.train_data_dir, **options)).dataset


def test_statistics_files_know_what_they_are_of(config, world, tmp_path):
    extractor, data = load_extractor(config.extractor), open_data(config)
    statistics = reference_statistics(data, extractor, config.cache_dir, batch_size=7)
    expected = FeatureStatistics.from_features(extract(extractor, data, 7)[0])
    torch.testing.assert_close(statistics.covariance, expected.covariance, rtol=1e-6, atol=1e-9)
    (file,) = (tmp_path / "cache").iterdir()
    with safe_open(file, framework="pt") as content:
        assert content.metadata()["extractor"] == extractor.name and content.metadata()["count"] == str(NUM_TRAIN)
    assert torch.equal(read_statistics(file, data, extractor).covariance, statistics.covariance)
    given = evaluate(dataclasses.replace(config, train_statistics=str(file)))
    assert given["figures"]["train"] == evaluate(config)["figures"]["train"]

    save_classifier(tmp_path / "other" / "net", seed=1)
    with pytest.raises(ValueError, match="of other weights"):
        read_statistics(file, data, load_extractor(str(tmp_path / "other" / "net")))
    save_classifier(tmp_path / "another")
    with pytest.raises(ValueError, match=r"another extractor: 'classifier net.* and not 'classifier another"):
        read_statistics(file, data, load_extractor(str(tmp_path / "another")))
    with pytest.raises(ValueError, match="of other images"):
        read_statistics(file, open_data(config, dataset_split="test"), extractor)
    with pytest.raises(ValueError, match="cannot be read"):
        read_statistics(world / "samples.npz", data, extractor)


def test_nothing_half_written_is_left(config, monkeypatch, tmp_path):
    def fails(file):
        raise OSError("disk full")

    monkeypatch.setattr(files, "sync_file", fails)
    with pytest.raises(OSError, match="disk full"):
        reference_features(open_data(config), load_extractor(config.extractor), config.cache_dir)
    assert not list((tmp_path / "cache").glob("features-*"))


def test_fingerprints_follow_the_images(tmp_path, config):
    data = open_data(config)
    part = ImageSubset(data, [3, 1])
    different = [
        data,
        part,
        ImageSubset(data, [1, 3]),
        AreaAverages(data, 4),
        AreaAverages(data, 2),
        open_data(config, padding=2),
        open_data(config, dataset_split="test"),
    ]
    assert len({dataset.fingerprint() for dataset in different}) == len(different)
    assert open_data(config).fingerprint() == data.fingerprint()
    averages = AreaAverages(data, 4)
    expected = area_resize(to_float(data[5]["image"][None]), 4)[0]
    assert (to_float(averages[5]["image"]) - expected).abs().max() < 1.001 / 255 and len(averages) == NUM_TRAIN


def test_fingerprints_follow_files(tmp_path):
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for index, picture in enumerate(pixels(3, 0)):
        Image.fromarray(picture).save(tmp_path / "pictures" / "a" / f"{index}.png")

    def fingerprint(**changes):
        options = {"source_resolution": 8, "num_channels": 1, "class_conditional": False} | changes
        return open_images(DataConfig(train_data_dir=str(tmp_path / "pictures"), **options)).dataset.fingerprint()

    first = fingerprint()
    assert fingerprint() == first != fingerprint(padding=1)
    Image.fromarray(pixels(1, 9)[0]).save(tmp_path / "pictures" / "a" / "2.png")
    assert fingerprint() != first


def test_kernel_distance_of_the_report(config):
    """Samples that are training images: nothing but the draw lies between them."""
    np.savez(config.cache_dir + ".npz", arr_0=pixels(NUM_TRAIN, 0)[..., None])
    report = evaluate(dataclasses.replace(config, samples=config.cache_dir + ".npz"))
    features = features_of(config, pixels(NUM_TRAIN, 0))
    figure = report["figures"]["train"]["kernel_distance"]
    expected = kernel_distance(features, features)
    assert (figure["value"], figure["standard_error"]) == pytest.approx(expected, rel=1e-3)
    assert abs(report["figures"]["train"]["frechet_distance"]["value"]) < 1e-6
    assert report["figures"]["train"]["precision"]["value"] == report["figures"]["train"]["recall"]["value"] == 1


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("/somewhere/cdm_diffusers/__main__.py", "python -m cdm_diffusers evaluate"),
        ("/somewhere/bin/cdm", "python -m cdm_diffusers evaluate"),
        ("evaluation/evaluate.py", "python evaluation/evaluate.py evaluate"),
    ],
)
def test_commands_of_reports_have_no_folder_of_an_installation(monkeypatch, file, command):
    monkeypatch.setattr("sys.argv", [file, "evaluate"])
    assert provenance()["command"] == command
