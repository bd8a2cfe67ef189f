"""Checkpoint selection: against distances computed by hand, resuming, both kinds of stages, and bad input."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cdm_diffusers import CascadedDiffusionPipeline, SuperResolutionPipeline
from cdm_diffusers.evaluation import select_checkpoint as module
from cdm_diffusers.evaluation.classifier import Classifier, ClassifierConfig, build_classifier
from cdm_diffusers.evaluation.sample import image_generator
from cdm_diffusers.evaluation.select_checkpoint import SelectionConfig, select_checkpoint
from cdm_diffusers.presets import PRESETS
from cdm_diffusers.training.config import TrainingConfig
from cdm_diffusers.training.resolve import preset_of, resolve_preset, run_description
from cdm_diffusers.training.stage import build_stage


CLASSES = {0: "bag", 1: "boot", 2: "coat"}
TINY = {
    "source_resolution": 8,
    "padding": 0,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "attention_resolutions": [0],
    "attention_head_dim": 4,
    "norm_num_groups": 2,
}
STAGES = {
    "base": TINY | {"preset": "fashion_mnist_8"},
    "super_res": TINY | {"preset": "fashion_mnist_8_to_16", "sample_size": 8, "low_res_size": 4},
}
SEED = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of two splits and three classes, and a classifier that gives features."""
    root = tmp_path_factory.mktemp("selection")
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 9)):
        for name in CLASSES.values():
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (8, 8)).astype(np.uint8)
                Image.fromarray(pixels).save(root / "data" / split / name / f"{i:02}.png")
    torch.manual_seed(0)
    config = ClassifierConfig(output_dir=str(root), image_size=8, num_channels=1)
    build_classifier(config, CLASSES).model.save_pretrained(root / "classifier")
    return root


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_run(root, run, kind, steps):
    """What a training leaves: its configuration, and checkpoints whose weights are drawn from their step."""
    config = TrainingConfig(output_dir=str(run), train_data_dir=str(root / "data"), **STAGES[kind])
    preset = resolve_preset(config, kind == "super_res")
    preset = dataclasses.replace(preset, unet=dataclasses.replace(preset.unet, num_classes=3))
    run.mkdir(exist_ok=True)
    (run / "training_config.json").write_text(json.dumps(run_description(config, preset, CLASSES, 36, 1)))
    for step in steps:
        torch.manual_seed(step)
        weights = {
            name: torch.randn_like(parameter) / parameter[0].numel() ** 0.5
            for name, parameter in build_stage(preset).unet.named_parameters()
        }
        (run / f"checkpoint-{step}").mkdir()
        save_file(weights, run / f"checkpoint-{step}" / "ema.safetensors")
    return run


def config_for(root, run, **overrides):
    options = {"extractor": str(root / "classifier"), "num_images": 8, "num_final_images": 10, "batch_size": 4}
    options |= {"num_inference_steps": 2, "seed": SEED, "cache_dir": str(root / "cache"), "device": "cpu"}
    return SelectionConfig(run=str(run), **{**options, **overrides})


def distance_by_hand(root, samples, split):
    """Frechet distance of float samples (N, 1, 8, 8) in [0, 1] to all pictures of a split, with scipy."""
    files = sorted((root / "data" / split).rglob("*.png"))
    real = np.stack([np.array(Image.open(file)) for file in files])[:, None]
    classifier = Classifier.from_pretrained(root / "classifier")
    moments = []
    for pixels in (real, (samples * 255).round().numpy()):
        with torch.no_grad():
            features = classifier(torch.from_numpy(pixels).float() / 127.5 - 1)[1].double().numpy()
        moments.append((features.mean(0), np.cov(features.T)))
    (mean, cov), (other_mean, other_cov) = moments
    root_of_product = scipy.linalg.sqrtm(cov @ other_cov).real
    return ((mean - other_mean) ** 2).sum() + np.trace(cov + other_cov - 2 * root_of_product)


def base_samples(pipeline, count, seed):
    generators = [image_generator(seed, index) for index in range(count)]
    labels = [index % 3 for index in range(count)]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(class_labels=labels, generator=generators, num_inference_steps=2, output_type="pt").images


# ------------------------------------------------------------------------------------------------------------------
# Selecting
# ------------------------------------------------------------------------------------------------------------------


def test_a_base_against_distances_by_hand(root, tmp_path, capsys):
    run = make_run(root, tmp_path / "run", "base", (10, 20, 30))
    report = select_checkpoint(config_for(root, run, export=str(tmp_path / "selected")))
    assert json.loads((run / "checkpoint_selection.json").read_text()) == report
    assert list(report["checkpoints"]) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    distances = {name: figures["distance"] for name, figures in report["checkpoints"].items()}
    assert len(set(distances.values())) == 3 and report["selected"] == min(distances, key=distances.get)

    pipeline = CascadedDiffusionPipeline.from_pretrained(tmp_path / "selected")
    assert pipeline.config.id2label == CLASSES and (tmp_path / "selected" / "README.md").is_file()
    by_hand = distance_by_hand(root, base_samples(pipeline, 8, SEED), "train")
    assert distances[report["selected"]] == pytest.approx(by_hand, rel=1e-3)
    by_hand = distance_by_hand(root, base_samples(pipeline, 10, SEED + 1), "test")
    assert report["final"]["distance"] == pytest.approx(by_hand, rel=1e-3)
    assert (report["final"]["split"], report["final"]["num_real_images"]) == ("test", 27)
    printed = capsys.readouterr().out
    assert f"{report['selected']}: {report['final']['distance']:.3f} ± " in printed

    chosen = torch.randperm(27, generator=torch.Generator().manual_seed(0))[:8]
    files = sorted((root / "data" / "test").rglob("*.png"))
    real = np.stack([np.array(Image.open(files[index])) for index in chosen])[:, None] / 255
    by_hand = distance_by_hand(root, torch.from_numpy(real), "train")
    assert report["real_images"]["train"] == pytest.approx(by_hand, rel=1e-3)
    assert f"of the other split: {report['real_images']['train']:.3f} and " in printed


def test_an_export_replaces_nothing_but_an_export(root, tmp_path):
    run = make_run(root, tmp_path / "run", "base", (10,))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`export` is .* which holds something else"):
        select_checkpoint(config_for(root, run, export=str(tmp_path / "other")))
    assert (tmp_path / "other" / "model_index.json").read_text() == "{}"
    assert not (run / "checkpoint_selection.json").exists()
    for _ in range(2):
        report = select_checkpoint(config_for(root, run, export=str(tmp_path / "selected")))
    assert json.loads((tmp_path / "selected" / "checkpoint_selection.json").read_text()) == report


def test_only_what_is_new_is_measured(root, tmp_path, monkeypatch):
    calls = []
    distances = {("train", 8): iter([5.0, 3.0, 4.0, 1.0]), ("test", 10): iter([6.0, 2.0])}

    def distance(self, pipeline, count, seed):
        calls.append((self.split, count, seed))
        return {"distance": next(distances[self.split, count]), "standard_error": 0.1, "num_samples": count}

    monkeypatch.setattr(module.Comparison, "distance", distance)
    run = make_run(root, tmp_path / "run", "base", (10, 20))
    first = select_checkpoint(config_for(root, run))
    assert first["selected"] == "checkpoint-20" and first["final"]["distance"] == 6.0
    assert calls == [("train", 8, SEED), ("train", 8, SEED), ("test", 10, SEED + 1)]
    make_run(root, run, "base", (30,))
    second = select_checkpoint(config_for(root, run))  # 30 is no better: no new final figure
    assert second["selected"] == "checkpoint-20" and second["final"] == first["final"] and len(calls) == 4
    make_run(root, run, "base", (40,))
    third = select_checkpoint(config_for(root, run))
    assert third["selected"] == "checkpoint-40" and third["final"]["distance"] == 2.0 and len(calls) == 6
    with pytest.raises(ValueError, match=r"report of other settings: num_images \(8 there, 9 now\)"):
        select_checkpoint(config_for(root, run, num_images=9))
    (run / "checkpoint_selection.json").write_text("[]")
    with pytest.raises(ValueError, match=r"checkpoint_selection.json' was not written by .*: give another `output`"):
        select_checkpoint(config_for(root, run))


def test_what_has_other_content_under_the_same_name_is_not_the_same(root, tmp_path):
    """A run begun anew in its folder, another classifier in its folder, other pictures in theirs."""
    run = make_run(root, tmp_path / "run", "base", (10, 20))
    for part in ("classifier", "data"):
        shutil.copytree(root / part, tmp_path / part)
    options = {"extractor": str(tmp_path / "classifier"), "train_data_dir": str(tmp_path / "data")}
    first = select_checkpoint(config_for(root, run, **options))
    best, other = first["selected"], min(first["checkpoints"].keys() - {first["selected"]})
    shutil.copy(run / other / "ema.safetensors", run / best / "ema.safetensors")
    second = select_checkpoint(config_for(root, run, **options))
    assert second["checkpoints"][other] == first["checkpoints"][other]
    assert second["checkpoints"][best]["distance"] == first["checkpoints"][other]["distance"]
    assert second["final"]["distance"] != first["final"]["distance"]

    weights = load_file(tmp_path / "classifier" / "model.safetensors")
    shifted = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(shifted, tmp_path / "classifier" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="report of other settings: extractor_fingerprint"):
        select_checkpoint(config_for(root, run, **options))
    shutil.rmtree(tmp_path / "classifier")
    shutil.copytree(root / "classifier", tmp_path / "classifier")
    picture = next((tmp_path / "data" / "test").rglob("*.png"))
    Image.new("L", Image.open(picture).size).save(picture)
    with pytest.raises(ValueError, match="report of other settings: data"):
        select_checkpoint(config_for(root, run, **options))


def test_a_super_resolution_stage_starts_from_real_images(root, tmp_path):
    run = make_run(root, tmp_path / "run", "super_res", (10,))
    report = select_checkpoint(config_for(root, run, export=str(tmp_path / "selected"), augmentation_level=100))
    pipeline = SuperResolutionPipeline.from_pretrained(tmp_path / "selected")
    pipeline.set_progress_bar_config(disable=True)
    for split, count, seed, figures in (
        ("train", 8, SEED, report["checkpoints"]["checkpoint-10"]),
        ("test", 10, SEED + 1, report["final"]),
    ):
        files = sorted((root / "data" / split).rglob("*.png"))
        chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        pixels = np.stack([np.array(Image.open(files[index])) for index in chosen]) / 255
        labels = [list(CLASSES.values()).index(files[index].parent.name) for index in chosen]
        samples = pipeline(
            torch.from_numpy(pixels.reshape(count, 1, 4, 2, 4, 2).mean((3, 5))).float(),
            class_labels=labels,
            augmentation_level=100,
            num_inference_steps=2,
            generator=[image_generator(seed, index, 1) for index in range(count)],
            output_type="pt",
        ).images
        assert figures["distance"] == pytest.approx(distance_by_hand(root, samples, split), rel=1e-3)


def test_a_super_resolution_stage_can_start_from_samples(root, tmp_path):
    run = make_run(root, tmp_path / "run", "super_res", (10,))
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1)).astype(np.uint8)
    np.savez(tmp_path / "low.npz", arr_0=images, arr_1=np.arange(12) % 3)
    on_samples = select_checkpoint(config_for(root, run, low_res=str(tmp_path / "low.npz")))
    on_real = select_checkpoint(config_for(root, run, output=str(tmp_path / "other.json")))
    name = "checkpoint-10"
    assert on_samples["checkpoints"][name]["distance"] != on_real["checkpoints"][name]["distance"]
    with pytest.raises(ValueError, match="13 samples were asked for, but there are 12 images to start from: give a"):
        select_checkpoint(
            config_for(root, run, low_res=str(tmp_path / "low.npz"), num_images=13, output=str(tmp_path / "a.json"))
        )
    np.savez(tmp_path / "wrong.npz", arr_0=images[:, :2, :2], arr_1=np.arange(12) % 3)
    with pytest.raises(ValueError, match="has 2x2 images of 1 channels; the stage takes 4x4 of 1"):
        select_checkpoint(config_for(root, run, low_res=str(tmp_path / "wrong.npz")))
    np.savez(tmp_path / "unlabelled.npz", arr_0=images)
    with pytest.raises(ValueError, match="has no labels, which the stage needs"):
        select_checkpoint(config_for(root, run, low_res=str(tmp_path / "unlabelled.npz")))


# ------------------------------------------------------------------------------------------------------------------
# Configurations, and bad input
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_presets_configuration_is_read_back(name, tmp_path):
    preset = PRESETS[name]
    config = TrainingConfig(preset=name, output_dir="run", train_data_dir=str(tmp_path))
    resolved = resolve_preset(config, preset.unet.low_res_size is not None)
    assert preset_of(run_description(config, resolved, None, None, 1)) == resolved


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_images": 1}, "`num_images` is 1"),
        ({"selecting_split": "test"}, "both 'test': the split that selects must not be the one"),
        ({"reporting_split": "dev"}, "`dataset_split` is 'dev', which is not in"),
        ({"low_res": "low.npz"}, "'low.npz' does not exist"),
        ({"extractor": "resnet"}, "`extractor` is 'resnet'"),
    ],
)
def test_bad_options(root, tmp_path, overrides, message):
    run = make_run(root, tmp_path / "run", "base", (10,))
    with pytest.raises(ValueError, match=message):
        select_checkpoint(config_for(root, run, **overrides))


def test_bad_runs(root, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoints of a training"):
        select_checkpoint(config_for(root, tmp_path))
    run = make_run(root, tmp_path / "run", "base", (10,))
    np.savez(tmp_path / "low.npz", arr_0=np.zeros((4, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="the run's stage is a base: leave it out"):
        select_checkpoint(config_for(root, run, low_res=str(tmp_path / "low.npz")))
    (run / "checkpoint-10" / "ema.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="checkpoint-10' is incomplete, damaged or has been rotated away"):
        select_checkpoint(config_for(root, run))


def test_the_papers_numbers_are_the_defaults(root, tmp_path, monkeypatch):
    """Or all images to start from, if fewer."""
    counts = []
    figures = {"distance": 1.0, "standard_error": 0.1, "num_samples": 1}
    monkeypatch.setattr(module.Comparison, "distance", lambda self, pipe, count, seed: counts.append(count) or figures)
    monkeypatch.setattr(module.Comparison, "distance_of_real_images", lambda self, other, count: 0.0)
    for stage in ("base", "super_res"):
        run = make_run(root, tmp_path / stage, stage, (10,))
        select_checkpoint(config_for(root, run, num_images=None, num_final_images=None))
    assert counts == [10_000, 50_000, 36, 27]
