"""What a training says of itself."""

import dataclasses
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
    assert "Goes on from runs/x/checkpoint-5." in introduction(*arguments, Path("runs/x/checkpoint-5"))


def test_farewell_says_what_to_type():
    assert "cdm sample runs/x\n" in farewell(config_of("small_16"), get_preset("small_16"))
    assert "--super_res runs/x " in farewell(config_of("small_16_to_64"), get_preset("small_16_to_64"))


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
    assert "after 20,000 steps, 13.5% of the average" in warning and "--ema_warmup" in warning
    assert not list(warnings(config_of("imagenet_16"), get_preset("imagenet_16")))
    assert not list(warnings(config_of("small_16"), get_preset("small_16")))


def test_a_validation_longer_than_training_is_warned_of():
    preset = trained("imagenet_16", train_batch_size=16, ema_warmup=True, ema_decay=0.999)
    (warning,) = warnings(config_of("imagenet_16"), preset)
    assert "20 images in 4,000 steps takes longer than the 1,000 training steps" in warning
    assert not list(warnings(config_of("imagenet_16", validation_inference_steps=50), preset))
    assert not list(warnings(config_of("imagenet_16", validation_steps=0), preset))
