"""What a training says of itself."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from cdm_diffusers.presets import get_preset
from cdm_diffusers.training.config import TrainingConfig
from cdm_diffusers.training.ema import LerpEMAModel
from cdm_diffusers.training.progress import farewell, introduction, share_of_start, warnings


def config_of(preset, **options):
    return TrainingConfig(preset=preset, output_dir="runs/x", train_data_dir="images", **options)


def trained(name, **changes):
    preset = get_preset(name)
    return dataclasses.replace(preset, training=dataclasses.replace(preset.training, **changes))


def test_introduction_says_what_where_and_whence():
    preset = get_preset("small_16_to_64")
    arguments = (config_of("small_16_to_64"), preset, 2_883_884, 7800, torch.device("cpu"), 1)
    text = introduction(*arguments, None)
    assert "small_16_to_64: super-resolution, 16x16 to 64x64, 2.88 million parameters" in text
    assert "on 7,800 images, 10 classes" in text
    assert f"3,000 steps of 32 images on 1 x cpu ({torch.get_num_threads()} threads)" in text and "A new run." in text
    assert "runs/x/checkpoint-*" in text and "runs/x/samples" in text and "tensorboard --logdir runs/x/logs" in text
    preset = dataclasses.replace(preset, unet=dataclasses.replace(preset.unet, num_classes=1))
    assert "7,800 images, 1 class." in introduction(arguments[0], preset, *arguments[2:], None)
    assert "Goes on from runs/x/checkpoint-5." in introduction(*arguments, Path("runs/x/checkpoint-5"))
    weights = {"stage": "super_res_1", "pipeline": "runs/y", "fingerprint": "6f"}
    assert "A new run, with the weights of super_res_1 of runs/y." in introduction(*arguments, None, weights)


@pytest.fixture
def finished(tmp_path):
    """Pretends that a stage was trained in a folder beside the others."""

    def finish(name, preset, id2label=None):
        folder = tmp_path / name
        folder.mkdir()
        config = dataclasses.asdict(get_preset(preset))
        config["data"] |= {"source_resolution": 256, "id2label": id2label}
        (folder / "training_config.json").write_text(json.dumps(config))
        (folder / "model_index.json").write_text("{}")
        return folder

    return finish


def test_farewell_says_what_to_type(finished):
    base = finished("base", "small_16")
    sample = f"The stage is in {base}. Next, for example:\n  cdm sample {base} --output samples.png"
    assert farewell(base) == sample
    middle = finished("my sr", "small_16_to_64")
    join = f"cdm assemble --base {base} --super_res '{middle}' --output my-cascade"
    assert farewell(middle) == f"The stage is in {middle}. Next, for example:\n  {join}"
    assert farewell(base) == f"{sample}\n  {join}"
    last = finished("last", "small_64_to_256")
    assert f"--base {base} --super_res '{middle}' {last} --output" in farewell(last)
    cascade = base.parent / "cascade"
    cascade.mkdir()
    (cascade / "training_config.json").write_text(json.dumps({"base": {}}))
    finished("other data", "small_16", id2label={"0": "a"})
    (finished("damaged", "small_16") / "training_config.json").write_text("{")
    (finished("a stranger's", "small_16") / "training_config.json").write_text('{"unet": {}}')
    assert join in farewell(middle)


def test_farewell_guesses_no_stage(finished, monkeypatch):
    last = finished("last", "small_16_to_64")
    assert "--base BASE --super_res" in farewell(last) and "(BASE: the folder of a 16x16 stage.)" in farewell(last)
    finished("one", "small_16")
    finished("another", "small_16")
    assert "--base BASE " in farewell(last)
    monkeypatch.chdir(last)
    assert "--super_res . " in farewell(Path())


@pytest.mark.parametrize("ema_warmup", [True, False])
def test_share_of_the_start_is_what_the_average_holds(ema_warmup):
    """An average of weights that are 1 after the first step and then 0."""
    training = trained("small_16", max_train_steps=40, ema_decay=0.9, ema_warmup=ema_warmup).training
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    average = LerpEMAModel([weight], decay=0.9, min_decay=0.0 if ema_warmup else 0.9)
    for _ in range(training.max_train_steps):
        average.step([weight])
        weight.data.zero_()
    assert share_of_start(training) == pytest.approx(average.shadow_params[0].item(), rel=1e-9)


def test_an_average_that_keeps_its_start_is_warned_of():
    config = config_of("imagenet_16", max_train_steps=20_000)
    (warning,) = warnings(config, trained("imagenet_16", max_train_steps=20_000))
    assert "after 20,000 steps, 13.5% of the average" in warning and "give --ema_warmup, or train longer" in warning
    (warning,) = warnings(config_of("small_16"), trained("small_16", max_train_steps=3))
    assert "`ema_warmup` True" in warning and warning.endswith(
        "the weights it began with: train longer (--max_train_steps)."
    )
    assert not list(warnings(config_of("imagenet_16"), get_preset("imagenet_16")))
    assert not list(warnings(config_of("small_16"), get_preset("small_16")))


def test_a_validation_longer_than_training_is_warned_of():
    preset = trained("imagenet_16", train_batch_size=16, ema_warmup=True, ema_decay=0.999)
    (warning,) = warnings(config_of("imagenet_16"), preset)
    assert "20 images in 4,000 steps takes longer than the 1,000 training steps" in warning
    assert "give --validation_steps 1667 or --validation_inference_steps 2400." in warning
    assert not list(warnings(config_of("imagenet_16", validation_steps=1667), preset))
    assert not list(warnings(config_of("imagenet_16", validation_inference_steps=2400), preset))
    assert not list(warnings(config_of("imagenet_16", validation_steps=0), preset))


def test_few_steps_are_not_advised():
    """Nor more than there are."""
    (warning,) = warnings(config_of("small_16", validation_steps=1, num_validation_images=100), get_preset("small_16"))
    assert "in 20 steps" in warning and "--validation_inference_steps" not in warning


@pytest.mark.parametrize(("preset", "advice"), [("imagenet_64_to_256", "."), ("lsun_64_to_128", " or ")])
def test_steps_that_a_schedule_does_not_have_are_not_advised(preset, advice):
    """A linear schedule has no end points of its own below 100 steps; a cosine one needs none."""
    config = config_of(preset, validation_steps=50, validation_inference_steps=100, num_validation_images=20)
    (warning,) = warnings(config, trained(preset, train_batch_size=8, ema_warmup=True, ema_decay=0.999))
    assert re.search(rf"give --validation_steps \d+{re.escape(advice)}", warning)


@pytest.mark.parametrize(("crop_size", "longer"), [(None, 25), (32, 100)])
def test_validations_of_super_resolution_are_counted_by_the_stage_alone(crop_size, longer):
    """Crops of half the side are a quarter of the cost, and so is a training step on them."""
    preset = trained("small_16_to_64", train_batch_size=8, crop_size=crop_size, whole_image_fraction=0.0)
    options = {"validation_inference_steps": 30, "num_validation_images": 20}
    (warning,) = warnings(config_of("small_16_to_64", validation_steps=longer - 1, **options), preset)
    assert f"give --validation_steps {longer} " in warning
    assert not list(warnings(config_of("small_16_to_64", validation_steps=longer, **options), preset))
