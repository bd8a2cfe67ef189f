"""Trainings that begin with the weights of an existing stage."""

import contextlib
import dataclasses
import json
import shutil
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from safetensors.torch import load_file
from small_cascade import small_cascade
from test_training_loop import (
    BASE,
    EXACT,
    AtDiskCalls,
    KillAt,
    assert_same_run,
    images,  # noqa: F401
    run,
    unbroken,  # noqa: F401
)

from cdm_diffusers import CascadedUNet2DModel
from cdm_diffusers.models.arguments import UNetArguments
from cdm_diffusers.pipelines import CascadedDiffusionPipeline
from cdm_diffusers.presets import get_preset
from cdm_diffusers.training.pretrained import CLASSES, load_pretrained
from cdm_diffusers.training.resolve import section


def averages(folder):
    return load_file(folder / "base_unet" / "diffusion_pytorch_model.safetensors")


def largest_change(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def test_a_training_begins_with_the_weights_and_their_average(images, unbroken, tmp_path):  # noqa: F811
    """Which a learning rate of next to nothing leaves as they are, whatever is predicted from now on."""
    options = BASE | EXACT | {"train_data_dir": str(images), "prediction_type": "sample", "ema_decay": 0.5}
    options |= {"seed": 1, "max_train_steps": 2, "learning_rate": 1e-12, "ema_warmup": False}
    run(options | {"output_dir": str(tmp_path / "new")})
    run(options | {"output_dir": str(tmp_path / "from"), "pretrained_model_name_or_path": str(unbroken)})
    expected = averages(unbroken)
    assert largest_change(averages(tmp_path / "from"), expected) < 1e-6
    assert largest_change(averages(tmp_path / "new"), expected) > 0.1
    scheduler = CascadedDiffusionPipeline.from_pretrained(tmp_path / "from").base_scheduler
    assert scheduler.config.prediction_type == "sample"


def test_a_killed_run_resumes_to_the_same_weights(images, unbroken, tmp_path):  # noqa: F811
    """From the same stage alone, which may have moved."""
    for name in ("first", "moved", "other"):
        shutil.copytree(unbroken, tmp_path / name)
    other = CascadedDiffusionPipeline.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        other.base_unet.conv_in.bias.add_(1)
    other.save_pretrained(tmp_path / "other")
    options = BASE | EXACT | {"train_data_dir": str(images)}
    whole = options | {"pretrained_model_name_or_path": str(tmp_path / "first"), "output_dir": str(tmp_path / "whole")}
    run(whole)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "whole", unbroken)
    killed = whole | {"output_dir": str(tmp_path / "killed")}
    with contextlib.suppress(BrokenProcessPool):
        run(killed, AtDiskCalls(KillAt(64)))
    assert (tmp_path / "killed" / "checkpoint-2").exists() and not (tmp_path / "killed" / "base_unet").exists()
    killed |= {"resume_from_checkpoint": "latest"}
    for name in (str(tmp_path / "other"), None):
        with pytest.raises(ValueError, match=r"this is another run: pretrained\.fingerprint"):
            run(killed | {"pretrained_model_name_or_path": name})
    run(killed | {"pretrained_model_name_or_path": str(tmp_path / "moved")})
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    said = json.loads((tmp_path / "killed" / "training_config.json").read_text())["pretrained"]
    assert said["pipeline"] == str(tmp_path / "moved") and said["stage"] == "base" and len(said["fingerprint"]) == 64
    card = (tmp_path / "killed" / "README.md").read_text()
    assert f"base began with the weights of stage base of moved (fingerprint {said['fingerprint'][:12]})" in card


def test_the_stage_is_that_of_the_same_sizes(tmp_path):
    cascade = small_cascade()
    cascade.save_pretrained(tmp_path / "cascade")
    cascade.stage_pipeline("super_res_2").save_pretrained(tmp_path / "stage")
    for stage in cascade.stages:
        arguments = section(UNetArguments, stage.unet.config)
        found = load_pretrained(str(tmp_path / "cascade"), arguments).stage
        assert found.name == stage.name and torch.equal(found.unet.conv_in.weight, stage.unet.conv_in.weight)
    alone = load_pretrained(str(tmp_path / "stage"), arguments).stage
    assert torch.equal(alone.unet.conv_in.weight, stage.unet.conv_in.weight)
    with pytest.raises(ValueError) as raised:
        load_pretrained(str(tmp_path / "cascade"), get_preset("fashion_mnist_32").unet)
    assert str(raised.value) == (
        f"`pretrained_model_name_or_path` is {str(tmp_path / 'cascade')!r}, which has no stage of 32x32; it has "
        "of 4x4, from 4x4 to 8x8, from 8x8 to 16x16."
    )


def test_only_classes_may_be_others(tmp_path):
    cascade = small_cascade()
    cascade.save_pretrained(tmp_path)
    given = cascade.base_unet
    arguments = section(UNetArguments, given.config)
    pretrained = load_pretrained(str(tmp_path), arguments)
    for classes in ({"num_classes": 7}, {"num_classes": 4, "null_class": False}):  # with four embeddings as well
        unet = CascadedUNet2DModel.from_config(given.config, **classes)
        own = unet.class_embedding.weight.clone()
        pretrained.give_weights(unet)
        weights, expected = unet.state_dict(), given.state_dict()
        assert torch.equal(weights.pop(CLASSES), own) and expected.pop(CLASSES) is not None
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    unconditional = CascadedUNet2DModel.from_config(given.config, num_classes=None, null_class=False)
    pretrained.give_weights(unconditional)
    assert torch.equal(unconditional.conv_in.weight, given.conv_in.weight)
    for change, said in (
        ({"block_out_channels": (12,)}, r"its `block_out_channels` is \(8,\), here it is \(12,\)"),
        ({"time_scale": 2.0}, r"its `time_scale` is 1\.0, here it is 2\.0"),
    ):
        with pytest.raises(ValueError, match=rf"whose stage base is another network: {said}\. Give the preset"):
            load_pretrained(str(tmp_path), dataclasses.replace(arguments, **change))
