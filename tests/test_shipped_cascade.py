"""The cascade that ships with the repository still loads, fits its limits, and looks like clothes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from cdm_diffusers import CascadedDDPMScheduler, CascadedDiffusionPipeline, ContinuousDDPMScheduler
from cdm_diffusers.evaluation.classifier import Classifier
from cdm_diffusers.evaluation.sample import counted_evaluations
from cdm_diffusers.evaluation.tables import recognition_tables


CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
CASCADE = CHECKPOINTS / "fashion-mnist-32"
IMAGES_PER_CLASS = 8


@pytest.fixture(scope="module")
def pipe():
    pipe = CascadedDiffusionPipeline.from_pretrained(CASCADE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def samples(pipe):
    """Images [0, 1] of every stage, label-major, at the shipped settings."""
    generator = torch.Generator().manual_seed(7)
    arguments = {"generator": generator, "output_type": "pt", "output_stages": True}
    return pipe(list(range(10)), num_images_per_label=IMAGES_PER_CLASS, **arguments).stages


def test_it_is_small():
    assert sum(file.stat().st_size for file in CASCADE.rglob("*") if file.is_file()) <= 20e6


def test_its_stages_are_the_papers_kinds(pipe):
    base, first, second = pipe.stages
    assert [stage.unet.config.sample_size for stage in pipe.stages] == [8, 16, 32]
    assert isinstance(base.scheduler, CascadedDDPMScheduler)
    assert isinstance(first.scheduler, UniPCMultistepScheduler)  # found by search: docs/results.md
    for stage in (base, first):
        assert stage.unet.config.learned_variance and stage.scheduler.config.variance_type == "learned_range"
        assert stage.scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert stage.scheduler.config.num_train_timesteps == 4000
    assert base.scheduler.config.prediction_type == "epsilon"
    assert first.noising_scheduler is not None and first.unet.config.augmentation_level_embedding
    assert isinstance(second.scheduler, ContinuousDDPMScheduler) and second.noising_scheduler is None
    assert second.unet.config.time_conditioning == "noise_level"
    assert second.scheduler.config.num_train_timesteps == 2000
    assert pipe.config.id2label[9] == "Ankle boot"


def test_a_sample_costs_50_evaluations_of_the_base_and_10_of_a_super_resolution_network_at_most(pipe):
    with counted_evaluations(pipe) as evaluations:
        pipe(9, output_type="pt")
    assert evaluations == {"base": 50, "super_res_1": 10, "super_res_2": 4}


def test_samples_are_recognised(samples):
    classifier = Classifier.from_pretrained(CHECKPOINTS / "fashion-mnist-classifier")
    with torch.no_grad():
        logits, _ = classifier(2 * samples["super_res_2"] - 1)
    labels = torch.arange(10).repeat_interleave(IMAGES_PER_CLASS)
    # At a true rate of 90%, fewer than 64 of 80 has a probability of 0.2%.
    assert (logits.argmax(1) == labels).float().mean() >= 0.8


def test_the_brightness_of_samples_is_the_data_s(samples):
    recorded = json.loads((CASCADE / "recognition.json").read_text())["stages"]
    for name, images in samples.items():
        pixels = 2 * images - 1
        for moment, value in (("mean", pixels.mean()), ("std", pixels.std())):
            assert abs(recorded[name]["difference"][moment]) <= 0.03  # of 2,000 samples
            # 80 images: the standard error of the mean is 0.03, and so is that of the deviation at most
            assert value.item() == pytest.approx(recorded[name]["data"][moment], abs=0.12)


def test_samples_of_a_class_differ(samples):
    images = samples["super_res_2"].unflatten(0, (10, IMAGES_PER_CLASS)).flatten(2)
    distances = torch.cdist(images, images)
    others = ~torch.eye(IMAGES_PER_CLASS, dtype=torch.bool)
    assert distances[:, others].min() > 1  # in [0, 1] pixels; copies would be at 0


def test_the_card_tells_what_there_is():
    card = (CASCADE / "README.md").read_text()
    assert "| base | 8x8 |" in card and "epsilon" in card and "recognised" in card
    tables = recognition_tables(json.loads((CASCADE / "recognition.json").read_text()))
    assert "".join(tables.split()) in "".join(card.split())
    configs = json.loads((CASCADE / "training_config.json").read_text())
    assert set(configs) == {"base", "super_res_1", "super_res_2"}
