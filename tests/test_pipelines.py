"""Pipelines: Algorithm 2, conditions, restarts, guidance, inputs, outputs, saving and loading."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import PipelineCallback
from known_gaussian import GaussianDenoiser
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from cdm_diffusers import CascadedDDPMScheduler, CascadedUNet2DModel, ContinuousDDPMScheduler
from cdm_diffusers.pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from cdm_diffusers.pipelines.denoising import Denoiser
from cdm_diffusers.pipelines.loading import load_without_weights
from cdm_diffusers.pipelines.solver_names import SOLVER_NAMES


T = 40
NAMES = {0: "cat", 1: "dog", 2: "crane", 3: "crane"}
STEPS = {"base": 5, "super_res_1": 4, "super_res_2": 3}


def make_unet(size: int, low_res_size: int | None = None, channels: int = 1, **arguments) -> CascadedUNet2DModel:
    """A network of random weights, so that everything it is told matters."""
    torch.manual_seed(size)
    unet = CascadedUNet2DModel(
        **{
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": (8,),
            "layers_per_block": 1,
            "attention_resolutions": (),
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "num_classes": 4,
            "low_res_size": low_res_size,
            **arguments,
        }
    )
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return unet.eval()


def make_scheduler(**arguments) -> CascadedDDPMScheduler:
    return CascadedDDPMScheduler(T, **{"variance_type": "fixed_small", **arguments})


def make_base(channels: int = 1, **arguments) -> CascadedDiffusionPipeline:
    unet = make_unet(4, channels=channels, learned_variance=True, **arguments)
    return CascadedDiffusionPipeline(
        unet,
        make_scheduler(variance_type="learned_range"),
        id2label=NAMES if unet.config.num_classes else None,
        source_resolution=16,
        default_num_inference_steps={"base": STEPS["base"]},
    )


def make_super_res_1(channels: int = 1, **arguments) -> SuperResolutionPipeline:
    unet = make_unet(8, 4, channels, **{"learned_variance": True, "augmentation_level_embedding": True, **arguments})
    return SuperResolutionPipeline(
        unet,
        make_scheduler(variance_type="learned_range"),
        make_scheduler(),
        id2label=NAMES if unet.config.num_classes else None,
        source_resolution=16,
        default_num_inference_steps=STEPS["super_res_1"],
        default_augmentation_level=10,
    )


def make_super_res_2(channels: int = 1, **arguments) -> SuperResolutionPipeline:
    unet = make_unet(16, 8, channels, **{"time_conditioning": "noise_level", "time_scale": 1000.0, **arguments})
    scheduler = ContinuousDDPMScheduler(50, beta_start=1e-3, beta_end=0.2)
    return SuperResolutionPipeline(unet, scheduler, default_num_inference_steps=STEPS["super_res_2"])


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_cascade(channels: int = 1, **arguments) -> CascadedDiffusionPipeline:
    """The paper's three kinds of stages, 4 -> 8 -> 16."""
    stages = [make(channels, **arguments) for make in (make_base, make_super_res_1, make_super_res_2)]
    return quiet(CascadedDiffusionPipeline.from_stages(*stages))


@pytest.fixture(scope="module")
def cascade():
    return make_cascade()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(pipe, *arguments, **options) -> torch.Tensor:
    return pipe(*arguments, **{"output_type": "pt", "generator": seeded(), **options}).images


def record_calls(monkeypatch, unet) -> list[dict]:
    """What the network is called with, from now on."""
    calls, forward = [], unet.forward

    def recording(sample, timestep, **conditions):
        calls.append({"sample": sample, "timestep": timestep, **conditions})
        return forward(sample, timestep, **conditions)

    monkeypatch.setattr(unet, "forward", recording)
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# Stages, labels, steps


def test_stages_and_defaults(cascade, monkeypatch):
    assert [stage.name for stage in cascade.stages] == ["base", "super_res_1", "super_res_2"]
    assert cascade.stages[1].noising_scheduler is cascade.super_res_1_noising_scheduler
    assert cascade.config.default_num_inference_steps == STEPS
    assert cascade.config.default_augmentation_levels == {"super_res_1": 10}
    calls = {stage.name: record_calls(monkeypatch, stage.unet) for stage in cascade.stages}
    tensors(cascade, [0])
    assert {name: len(of_stage) for name, of_stage in calls.items()} == STEPS
    assert {call["augmentation_level"].item() for call in calls["super_res_1"]} == {10}
    assert all("augmentation_level" not in call for call in calls["super_res_2"])
    tensors(cascade, [0], num_inference_steps={"super_res_1": 2}, augmentation_levels={"super_res_1": 7})
    assert {name: len(of_stage) for name, of_stage in calls.items()} == {
        "base": 10,
        "super_res_1": 6,
        "super_res_2": 6,
    }
    assert calls["super_res_1"][-1]["augmentation_level"].item() == 7
    tensors(cascade, [0], num_inference_steps=2)
    assert {name: len(of_stage) for name, of_stage in calls.items()} == {
        "base": 12,
        "super_res_1": 8,
        "super_res_2": 8,
    }


def test_steps_without_defaults(monkeypatch):
    """T for ancestral sampling at discrete times; 100 for others, limited by T or T/2; s is then 0."""
    pipe = CascadedDiffusionPipeline(make_unet(4), make_scheduler())
    assert pipe.stages[0].default_num_inference_steps(None) == T
    pipe.base_scheduler = DDIMScheduler(300)
    assert pipe.stages[0].default_num_inference_steps(None) == 100
    assert pipe.stages[0].default_num_inference_steps(250) == 100
    assert pipe.stages[0].default_num_inference_steps(20) == 20
    pipe.base_scheduler = DDIMScheduler.from_config(make_scheduler().config)
    assert pipe.stages[0].default_num_inference_steps(None) == T // 2
    assert len(tensors(quiet(pipe), 0)) == 1
    pipe = SuperResolutionPipeline(make_super_res_2().unet, ContinuousDDPMScheduler(50))
    assert pipe.stage.default_num_inference_steps(None) == 50
    pipe = quiet(SuperResolutionPipeline(make_super_res_1().unet, make_scheduler(), make_scheduler()))
    calls = record_calls(monkeypatch, pipe.unet)
    tensors(pipe, torch.zeros(1, 4, 4), 0, num_inference_steps=1)
    assert calls[0]["augmentation_level"].item() == 0


def test_labels_by_index_name_and_tensor(cascade, monkeypatch):
    calls = record_calls(monkeypatch, cascade.base_unet)
    images = tensors(cascade, [1, 0])
    assert calls[0]["class_labels"].tolist() == [1, 0]
    for labels in (
        ["dog", 0],
        ("dog", "cat"),
        torch.tensor([1, 0]),
        [np.int64(1), "cat"],
        np.array([1, 0]),
        np.array(["dog", "cat"]),
    ):
        assert torch.equal(tensors(cascade, labels), images)
    for label in (1, "dog", torch.tensor(1), [1]):
        tensors(cascade, label)
        assert calls[-1]["class_labels"].tolist() == [1]


def test_images_of_a_label_come_together(cascade, monkeypatch):
    calls = record_calls(monkeypatch, cascade.super_res_1_unet)
    assert len(tensors(cascade, [2, 0], num_images_per_label=3)) == 6
    assert calls[0]["class_labels"].tolist() == [2, 2, 2, 0, 0, 0]


def test_unconditional_cascade():
    pipe = make_cascade(num_classes=None)
    assert tensors(pipe).shape == (1, 1, 16, 16)
    assert tensors(pipe, batch_size=3).shape == (3, 1, 16, 16)
    assert tensors(pipe, batch_size=2, num_images_per_label=2).shape == (4, 1, 16, 16)


def test_an_unconditional_stage_in_a_conditional_cascade(monkeypatch):
    pipe = quiet(CascadedDiffusionPipeline.from_stages(make_base(), make_super_res_1(num_classes=None)))
    calls = record_calls(monkeypatch, pipe.super_res_1_unet)
    assert len(tensors(pipe, ["cat", 3])) == 2
    assert all("class_labels" not in call for call in calls)
    # its images alone need no labels
    assert len(tensors(pipe, image=torch.rand(2, 1, 4, 4))) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 2 and restarts, on a base that samples a known Gaussian


def gaussian_cascade(num_train_timesteps: int = 1000, size: int = 64) -> CascadedDiffusionPipeline:
    scheduler = CascadedDDPMScheduler(num_train_timesteps, variance_type="fixed_large", clip_sample_range=3.0)
    base, super_res = (
        GaussianDenoiser(size),
        GaussianDenoiser(size, low_res_size=size, augmentation_level_embedding=True),
    )
    base.alphas_cumprod = super_res.alphas_cumprod = scheduler.table.alphas_cumprod
    return quiet(CascadedDiffusionPipeline(base, scheduler, super_res, scheduler, scheduler))


def conditioning(pipe, level: int, batch_size: int = 4, **options) -> torch.Tensor:
    """The low-resolution input of the super-resolution stage."""
    pipe.super_res_1_unet.calls.clear()
    tensors(pipe, batch_size=batch_size, augmentation_levels={"super_res_1": level}, **options)
    call = pipe.super_res_1_unet.calls[0]
    assert call["augmentation_level"].item() == level
    return call["low_res"]


@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("level", [150, 600])
def test_the_low_resolution_input_is_z_s(level, truncated):
    """z_s has the marginal of q(z_s), whichever way it was made; the 100-step base is nearly exact."""
    pipe = gaussian_cascade()
    z_s = conditioning(pipe, level, truncated=truncated, num_inference_steps={"base": 100, "super_res_1": 1})
    alpha_bar = pipe.base_scheduler.table.alpha_bar(level).item()
    assert z_s.mean().item() == pytest.approx(alpha_bar**0.5 * 0.3, abs=0.025)
    assert z_s.std().item() == pytest.approx((alpha_bar * 0.25**2 + 1 - alpha_bar) ** 0.5, abs=0.02)


def test_truncated_sampling_stops_at_s():
    """Grid times above s only, and the super-resolution stage is handed the last sample as it is."""
    pipe = gaussian_cascade(size=8)
    samples = []

    def keep(pipe, step, timestep, tensors):
        samples.append((pipe.current_stage, timestep, tensors["sample"]))
        return {}

    options = {"num_inference_steps": {"base": 20, "super_res_1": 1}, "callback_on_step_end": keep}
    z_s = conditioning(pipe, 400, truncated=True, **options)
    base = [(timestep.item(), sample) for name, timestep, sample in samples if name == "base"]
    grid = np.linspace(0, 999, 20).round()[::-1]
    assert [timestep for timestep, _ in base] == [time for time in grid if time + 1 > 400]
    assert torch.equal(base[-1][1], z_s)


def test_non_truncated_sampling_noises_the_finished_sample():
    pipe = gaussian_cascade(size=8)
    options = {"batch_size": 1, "num_inference_steps": {"base": 20, "super_res_1": 1}}
    z_0 = conditioning(pipe, 0, generator=seeded(3), **options)
    z_s = conditioning(pipe, 400, generator=seeded(3), **options)
    generator = seeded(3)
    for _ in range(1 + 20 + 1):  # the base's first noise, that of its steps, and that of z_s
        noise = torch.randn(1, 1, 8, 8, generator=generator)
    alpha_bar = pipe.base_scheduler.table.alpha_bar(400).item()
    expected = alpha_bar**0.5 * z_0 + (1 - alpha_bar) ** 0.5 * noise
    torch.testing.assert_close(z_s, expected, rtol=0, atol=1e-5)


def test_truncation_at_0_is_full_sampling_and_at_T_none(cascade, monkeypatch):
    options = {"augmentation_levels": {"super_res_1": 0}, "output_stages": True, "output_type": "pt"}
    truncated, full = (
        cascade([0, 1], truncated=value, generator=seeded(), **options).stages for value in (True, False)
    )
    for name in STEPS:
        assert torch.equal(truncated[name], full[name])
    calls = record_calls(monkeypatch, cascade.base_unet)
    tensors(cascade, [0], truncated=True, augmentation_levels={"super_res_1": T})
    assert not calls


def initial_noise(monkeypatch) -> list[torch.Tensor]:
    """What every stage starts from, as calls go on."""
    drawn, draw = [], CascadedDiffusionPipeline._initial_noise

    def recording(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    for pipeline in (CascadedDiffusionPipeline, SuperResolutionPipeline):
        monkeypatch.setattr(pipeline, "_initial_noise", recording)
    return drawn


@pytest.mark.parametrize("as_list", [False, True])
def test_rows_that_differ_in_s_see_the_same_noise(cascade, monkeypatch, as_list):
    """Every stage's x_T, whatever s is: 0 too, and truncated where the stage before draws as much."""
    drawn, image = initial_noise(monkeypatch), torch.rand(2, 1, 4, 4)
    truncations = {None: ((0, True),), image: ((0, True), (1, True), (T, True))}
    for given, truncated_rows in truncations.items():
        rows = []
        for level, truncated in ((0, False), (1, False), (T, False), *truncated_rows):
            options = {"augmentation_levels": {"super_res_1": level}, "truncated": truncated, "image": given}
            tensors(cascade, [0, 1], generator=[seeded(1), seeded(2)] if as_list else seeded(), **options)
            rows.append(torch.cat([noise.flatten() for noise in drawn]))
            drawn.clear()
        assert all(torch.equal(row, rows[0]) for row in rows)


def test_a_stage_alone_sees_the_same_noise_whatever_s(monkeypatch):
    drawn = initial_noise(monkeypatch)
    pipe, image = quiet(make_super_res_1()), torch.rand(2, 1, 4, 4)
    for level in (0, 1, 15):
        tensors(pipe, image, [0, 1], augmentation_level=level, num_inference_steps=2)
    assert len(drawn) == 3 and all(torch.equal(noise, drawn[0]) for noise in drawn)


def test_a_restart_noises_to_its_time_and_denoises_again():
    """Section 4.2: the finished sample noised to t, then the grid times below t; still the data's distribution."""
    pipe, first = gaussian_cascade(), {}

    def keep(pipe, step, timestep, tensors):
        if step == 0 and pipe.current_stage == "base":
            first[timestep.item()] = tensors["sample"]
        return {}

    steps = {"base": 100, "super_res_1": 1}
    low_res = conditioning(pipe, 0, restart_timestep=500, num_inference_steps=steps, callback_on_step_end=keep)
    times = [call["timestep"].item() for call in pipe.base_unet.calls]
    grid = np.linspace(0, 999, 100).round()[::-1].tolist()
    below = [time for time in grid if time + 1 < 500]
    assert times == [*grid, 499, *below]
    # one step below t
    alpha_bar = pipe.base_scheduler.table.alpha_bar(int(below[0]) + 1).item()
    assert first[499].mean().item() == pytest.approx(alpha_bar**0.5 * 0.3, abs=0.025)
    assert first[499].std().item() == pytest.approx((alpha_bar * 0.25**2 + 1 - alpha_bar) ** 0.5, abs=0.02)
    # all the way
    assert low_res.mean().item() == pytest.approx(0.3, abs=0.01)
    assert low_res.std().item() == pytest.approx(0.25, abs=0.015)


def test_a_restart_can_be_truncated():
    pipe = gaussian_cascade(size=8)
    options = {"num_inference_steps": {"base": 10, "super_res_1": 1}}
    conditioning(pipe, 300, truncated=True, restart_timestep=500, **options)
    grid = np.linspace(0, 999, 10).round()[::-1].tolist()
    times = [call["timestep"].item() for call in pipe.base_unet.calls]
    assert times == grid + [499] + [time for time in grid if 300 < time + 1 < 500]


def test_noise_level_networks_are_told_the_level(monkeypatch):
    pipe = quiet(make_super_res_2())
    calls = record_calls(monkeypatch, pipe.unet)
    tensors(pipe, torch.zeros(1, 8, 8), 0, num_inference_steps=3)
    indices = torch.tensor([49, 24, 0])  # evenly spread over 0..49, 24.5 rounds to even
    expected = pipe.scheduler.table.alphas_cumprod[indices].sqrt().float()
    torch.testing.assert_close(torch.stack([call["timestep"] for call in calls]), expected, rtol=0, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


class LabelNetwork(GaussianDenoiser):
    """epsilon = label + 1, raw variance = 100 * label."""

    def forward(self, sample, timestep, class_labels, return_dict=True):
        self.calls.append(len(sample))
        labels = class_labels[:, None, None, None].float()
        return (torch.cat([labels.expand_as(sample) + 1, (100 * labels).expand_as(sample)], dim=1),)


def test_guidance_formula():
    """epsilon_null + w (epsilon_class - epsilon_null) in one call of a doubled batch, the variance of the class."""
    unet = LabelNetwork(4, learned_variance=True, num_classes=10, null_class=True)
    x_t, labels = torch.randn(2, 1, 4, 4), torch.tensor([3, 8])
    prediction, raw_variance = Denoiser(unet, labels, guidance_scale=2.5)(x_t, torch.tensor(0))
    assert unet.calls == [4]
    for index, label in enumerate(labels.tolist()):
        assert (prediction[index] == 11 + 2.5 * (label + 1 - 11)).all()
        assert (raw_variance[index] == 100 * label).all()
    prediction, _ = Denoiser(unet, labels)(x_t, torch.tensor(0))
    assert unet.calls == [4, 2]
    assert prediction[:, 0, 0, 0].tolist() == [4, 9]


def test_guidance_in_every_stage(monkeypatch):
    pipe = make_cascade(null_class=True)
    plain = tensors(pipe, [0, 1])
    calls = [record_calls(monkeypatch, stage.unet) for stage in pipe.stages]
    guided = tensors(pipe, [0, 1], guidance_scale=3.0)
    assert (guided - plain).abs().max() > 1e-3
    for of_stage in calls:
        assert of_stage[0]["class_labels"].tolist() == [0, 1, 4, 4]
        assert torch.equal(of_stage[0]["sample"][:2], of_stage[0]["sample"][2:])
    for of_stage in calls[1:]:
        assert torch.equal(of_stage[0]["low_res"][:2], of_stage[0]["low_res"][2:])
    tensors(pipe, [0, 1], guidance_scale={"super_res_2": 3})
    assert [len(of_stage[-1]["sample"]) for of_stage in calls] == [2, 2, 4]


def test_default_guidance(monkeypatch, tmp_path):
    """Stages bring their recommended w along; a call's own w replaces it, for all stages or for those it names."""
    stages = [make(null_class=True) for make in (make_base, make_super_res_1, make_super_res_2)]
    stages[0].register_to_config(default_guidance_scales={"base": 2.0})
    stages[2].register_to_config(default_guidance_scale=1.5)
    pipe = CascadedDiffusionPipeline.from_stages(*stages)
    assert pipe.config.default_guidance_scales == {"base": 2.0, "super_res_2": 1.5}
    pipe.save_pretrained(tmp_path)
    pipe = quiet(CascadedDiffusionPipeline.from_pretrained(tmp_path))
    explicit = tensors(pipe, [0], guidance_scale={"base": 2.0, "super_res_1": 1.0, "super_res_2": 1.5})
    assert torch.equal(tensors(pipe, [0]), explicit)
    calls = [record_calls(monkeypatch, stage.unet) for stage in pipe.stages]
    for scale, batches in [(None, [2, 1, 2]), ({"base": 1.0}, [1, 1, 2]), (1.0, [1, 1, 1])]:
        tensors(pipe, [0], guidance_scale=scale)
        assert [len(of_stage[-1]["sample"]) for of_stage in calls] == batches
    super_res = quiet(stages[2])
    low_res = torch.rand(1, 1, 8, 8)
    assert torch.equal(tensors(super_res, low_res, 0), tensors(super_res, low_res, 0, guidance_scale=1.5))
    assert not torch.equal(tensors(super_res, low_res, 0), tensors(super_res, low_res, 0, guidance_scale=1.0))
    with pytest.raises(ValueError, match=r"`guidance_scale` of stage `base` is 2.0, but .* without label dropout"):
        CascadedDiffusionPipeline(make_unet(4), make_scheduler(), default_guidance_scales={"base": 2.0})


def samples_of(pipe, scale, after_first=lambda pipe, sample: {}) -> list[torch.Tensor]:
    """The base's sample after each step; `after_first` is the callback of its first step."""
    samples = []

    def callback(pipe, step, timestep, tensors):
        samples.append(tensors["sample"])
        return after_first(pipe, samples[0]) if step == 0 else {}

    tensors(pipe, [0, 1], guidance_scale=scale, callback_on_step_end=callback)
    return samples


@pytest.mark.parametrize(("first", "then"), [(1.0, 3.0), (3.0, 1.0), (2.0, 3)])
def test_a_callback_changes_the_weight_of_the_next_step(monkeypatch, first, then):
    """As in a run with the second weight alone that is handed the first's sample after one step."""
    pipe = quiet(make_base(null_class=True))
    calls = record_calls(monkeypatch, pipe.base_unet)

    def change(pipe, sample):
        assert pipe.guidance_scale == first
        pipe._guidance_scale = then
        return {}

    changed = samples_of(pipe, first, change)
    assert [len(call["sample"]) for call in calls] == [2 if scale == 1 else 4 for scale in (first, *[then] * 4)]
    expected = samples_of(pipe, then, lambda *_: {"sample": changed[0]})
    assert all(torch.equal(*pair) for pair in zip(changed[1:], expected[1:], strict=True))
    assert pipe.guidance_scale == then
    assert not torch.equal(changed[1], samples_of(pipe, first)[1])


def test_each_stage_starts_with_its_own_weight_and_count_of_steps():
    pipe, seen = make_cascade(null_class=True), []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe.guidance_scale, pipe.num_timesteps))
        pipe._guidance_scale = 1.0
        return {}

    tensors(pipe, [0], guidance_scale={"base": 2.0, "super_res_1": 3.0}, callback_on_step_end=callback)
    base, super_res_1, super_res_2 = [(2.0, 5)] + [(1.0, 5)] * 4, [(3.0, 4)] + [(1.0, 4)] * 3, [(1.0, 3)] * 3
    assert seen == base + super_res_1 + super_res_2


@pytest.mark.parametrize("when", [0, 4])
def test_a_restart_goes_on_with_the_weight_that_a_callback_set(monkeypatch, when):
    pipe, seen = quiet(make_base(null_class=True)), []
    calls = record_calls(monkeypatch, pipe.base_unet)

    def callback(pipe, step, timestep, tensors):
        seen.append(pipe.guidance_scale)
        if len(seen) == when + 1:
            pipe._guidance_scale = 3.0
        return {}

    tensors(pipe, [0], guidance_scale=1.0, restart_timestep=25, callback_on_step_end=callback)
    before = when + 1
    assert seen == [1.0] * before + [3.0] * (len(seen) - before) and len(seen) > 5
    assert [len(call["sample"]) for call in calls] == [1] * before + [2] * (len(seen) - before)


def test_weights_that_callbacks_set_are_checked(cascade):
    for pipe, scale, message in (
        (cascade, 2.0, "`guidance_scale` of stage `base` is 2.0, but its network was trained without label dropout"),
        (make_cascade(null_class=True), float("nan"), "`guidance_scale` of stage `base` is nan; it must be a finite"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([0], callback_on_step_end=lambda pipe, *_, scale=scale: setattr(pipe, "_guidance_scale", scale) or {})


# ---------------------------------------------------------------------------------------------------------------------
# Starting from an image


@pytest.mark.parametrize(("size", "first"), [(4, "super_res_1"), (8, "super_res_2")])
def test_starting_from_an_image(cascade, monkeypatch, size, first):
    """Every kind of image gives the same, at the stage that takes its size."""
    calls = record_calls(monkeypatch, cascade.base_unet)
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 1), dtype=np.uint8)
    array = pixels.astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    pil = [PIL.Image.fromarray(image[..., 0]) for image in pixels]
    output = cascade([0, 1], image=tensor, generator=seeded(), output_type="pt", output_stages=True)
    assert list(output.stages) == list(STEPS)[list(STEPS).index(first) :]
    for image in (array, pil, list(tensor), list(array), [tensor[:1], tensor[1:]], tensor.double()):
        assert torch.equal(tensors(cascade, [0, 1], image=image), output.images)
    other = tensors(cascade, [0, 1], image=1 - tensor)
    assert (other - output.images).abs().max() > 1e-3
    assert not calls


def test_one_image_for_all_labels_and_one_label_for_all_images(cascade, monkeypatch):
    calls = record_calls(monkeypatch, cascade.super_res_2_unet)
    images = torch.rand(3, 1, 8, 8)
    tensors(cascade, [0, 1], image=images[0], num_images_per_label=2)
    assert calls[-1]["class_labels"].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(calls[-1]["low_res"], (2 * images[:1] - 1).expand(4, -1, -1, -1))
    tensors(cascade, "dog", image=images)
    assert calls[-1]["class_labels"].tolist() == [1, 1, 1]
    torch.testing.assert_close(calls[-1]["low_res"], 2 * images - 1)


def test_a_given_image_is_noised_also_when_truncated(cascade, monkeypatch):
    calls = record_calls(monkeypatch, cascade.super_res_1_unet)
    image = torch.rand(1, 1, 4, 4)
    options = {"image": image, "augmentation_levels": {"super_res_1": 20}}
    full, truncated = tensors(cascade, [0], **options), tensors(cascade, [0], truncated=True, **options)
    assert torch.equal(full, truncated)
    noise = torch.randn(1, 1, 4, 4, generator=seeded())
    alpha_bar = cascade.base_scheduler.table.alpha_bar(20).item()
    expected = alpha_bar**0.5 * (2 * image - 1) + (1 - alpha_bar) ** 0.5 * noise
    torch.testing.assert_close(calls[0]["low_res"], expected, rtol=0, atol=1e-6)


def test_super_resolution_pipeline_is_the_stage_of_a_cascade(cascade):
    image = torch.rand(2, 1, 8, 8)
    alone = tensors(quiet(make_super_res_2()), image, [0, 1])
    assert torch.equal(alone, tensors(cascade, [0, 1], image=image))
    two_stages = quiet(CascadedDiffusionPipeline.from_stages(make_base(), make_super_res_1()))
    image = torch.rand(2, 1, 4, 4)
    options = {"num_images_per_label": 2, "num_inference_steps": 3}
    alone = tensors(quiet(make_super_res_1()), image, ["cat", 1], augmentation_level=15, **options)
    joined = tensors(two_stages, ["cat", 1], image=image, augmentation_levels={"super_res_1": 15}, **options)
    assert torch.equal(alone, joined)


# ---------------------------------------------------------------------------------------------------------------------
# Generators, outputs, callbacks


def test_seeds(cascade):
    assert torch.equal(tensors(cascade, [0, 1]), tensors(cascade, [0, 1]))
    assert not torch.equal(tensors(cascade, [0, 1]), tensors(cascade, [0, 1], generator=seeded(1)))


def test_a_list_of_generators_makes_images_independent_of_their_batch(cascade):
    """Up to float rounding: 1e-5 of a range of 1, over 12 steps of three networks."""
    options = {"restart_timestep": 20}
    together = tensors(cascade, [0, 1, 2], generator=[seeded(5), seeded(6), seeded(7)], **options)
    for index in range(3):
        alone = tensors(cascade, [index], generator=[seeded(5 + index)], **options)
        torch.testing.assert_close(alone, together[index : index + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = make_cascade(channels)
    pt = tensors(pipe, [0, 1])
    array = pipe([0, 1], output_type="np", generator=seeded()).images
    pil = pipe([0, 1], generator=seeded()).images
    assert pt.shape == (2, channels, 16, 16) and pt.dtype == torch.float32 and 0 <= pt.min() <= pt.max() <= 1
    assert array.shape == (2, 16, 16, channels) and array.dtype == np.float32
    assert [image.mode for image in pil] == [mode, mode] and pil[0].size == (16, 16)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype(np.uint8).squeeze())


def test_output_stages_and_tuples(cascade):
    output = cascade([0, 1], output_stages=True, generator=seeded())
    assert [len(images) for images in output.stages.values()] == [2, 2, 2]
    assert [images[0].size for images in output.stages.values()] == [(4, 4), (8, 8), (16, 16)]
    assert output.images is output.stages["super_res_2"]
    assert cascade([0]).stages is None
    assert len(cascade([0], return_dict=False)) == 1
    images, stages = cascade([0], return_dict=False, output_stages=True)
    assert images is stages["super_res_2"]
    (images,) = quiet(make_super_res_2())(torch.rand(1, 8, 8), 0, return_dict=False)
    assert images[0].size == (16, 16)


def test_callbacks_see_and_replace_the_sample(cascade):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe.current_stage, step, timestep.item(), tensors["sample"].shape[-1]))
        return {"sample": torch.full_like(tensors["sample"], 0.5)} if pipe.current_stage == "super_res_2" else {}

    images = tensors(cascade, [0], callback_on_step_end=callback)
    assert [(name, step) for name, step, _, _ in seen] == [(n, step) for n in STEPS for step in range(STEPS[n])]
    assert {(name, size) for name, _, _, size in seen} == {("base", 4), ("super_res_1", 8), ("super_res_2", 16)}
    assert [time for name, _, time, _ in seen if name == "base"] == [39, 29, 20, 10, 0]
    assert (images == 0.75).all()
    assert cascade.current_stage is None


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"`callback_on_step_end` returned None; it must return a dict: the one it was given, or \{\}"),
        ([1], r"`callback_on_step_end` returned \[1\]; it must return a dict"),
        ({"sample": None}, r"""returned the "sample" None; it must be a tensor of shape \(1, 1, 4, 4\)"""),
        ({"sample": torch.zeros(2, 1, 4, 4)}, r"""the "sample" \(2, 1, 4, 4\); it must be a tensor of shape \(1, 1"""),
    ],
)
def test_callbacks_that_return_something_else(cascade, returned, message):
    with pytest.raises(ValueError, match=message):
        cascade([0], callback_on_step_end=lambda *_: returned)


def test_no_tensor_inputs_are_the_default_ones(cascade):
    """Diffusers lets None through, too."""
    seen = []
    options = {"callback_on_step_end": lambda *args: seen.append(list(args[3])) or {}, "num_inference_steps": 1}
    tensors(cascade, [0], callback_on_step_end_tensor_inputs=None, **options)
    assert seen == [["sample"]] * 3


def test_diffusers_callback_objects(cascade):
    class Count(PipelineCallback):
        tensor_inputs = ["sample"]
        seen = 0

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            self.seen += list(callback_kwargs) == ["sample"]
            return callback_kwargs

    callback = Count()
    tensors(cascade, [0], callback_on_step_end=callback)
    assert callback.seen == sum(STEPS.values())


def test_interrupting(cascade, monkeypatch):
    calls = {stage.name: record_calls(monkeypatch, stage.unet) for stage in cascade.stages}

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = pipe.current_stage == "super_res_1" and step == 1
        return {}

    output = cascade([0], callback_on_step_end=callback, output_stages=True)
    assert {name: len(of_stage) for name, of_stage in calls.items()} == {"base": 5, "super_res_1": 2, "super_res_2": 0}
    assert list(output.stages) == ["base", "super_res_1"]
    assert output.images[0].size == (8, 8)
    assert cascade([0]).images[0].size == (16, 16)  # the next call runs through


def test_interrupting_leaves_out_the_restart(cascade, monkeypatch):
    calls = record_calls(monkeypatch, cascade.base_unet)

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 4
        return {}

    cascade([0], callback_on_step_end=callback, restart_timestep=20)
    assert len(calls) == 5


@pytest.mark.parametrize("scheduler", ["ancestral", "ddim"])
@pytest.mark.parametrize(
    ("part", "weight"), [("conv_in", float("nan")), ("conv_in", float("inf")), ("conv_out", float("inf"))]
)
def test_a_broken_stage_is_named_before_later_ones_run(monkeypatch, part, weight, scheduler):
    """An infinite output, which clipping x_0 makes a black picture, too."""
    pipe = make_cascade().with_schedulers({"super_res_1": scheduler})
    torch.nn.init.constant_(getattr(pipe.super_res_1_unet, part).bias, weight)
    calls = {stage.name: record_calls(monkeypatch, stage.unet) for stage in pipe.stages}
    message = r"Stage `{}` made NaN or infinite values: check its weights, its dtype .* and `guidance_scale`"
    with pytest.raises(ValueError, match=message.format("super_res_1")):
        quiet(pipe)([0])
    assert {name: len(of_stage) for name, of_stage in calls.items()} == {"base": 5, "super_res_1": 4, "super_res_2": 0}
    with pytest.raises(ValueError, match=message.format("super_res")):
        quiet(pipe.stage_pipeline("super_res_1"))(torch.rand(1, 4, 4), 0)


def test_progress_bars(cascade, capfd):
    pipe = CascadedDiffusionPipeline(**cascade.components)
    pipe([0], num_inference_steps=2)
    shown = capfd.readouterr().err
    for name in STEPS:  # the time left, and images per second
        assert re.search(rf"{name}: 100%.*\[\d+:\d+<\d+:\d+,.*, [\d.e+]+ images/s\]", shown), shown
    quiet(pipe)([0], num_inference_steps=2)
    assert capfd.readouterr().err == ""


def test_a_progress_bar_of_ones_own_needs_no_more_than_it_is_told(cascade, monkeypatch):
    bar = mock.MagicMock(spec=["__enter__", "__exit__", "set_description", "update"])
    bar.__enter__.return_value = bar
    monkeypatch.setattr(cascade, "progress_bar", lambda total: bar)
    cascade([0])
    assert bar.update.call_count == sum(STEPS.values())


def test_calls_leave_the_schedulers_alone():
    """One scheduler object may serve several stages, which run on grids of their own."""
    shared, noising = make_scheduler(), make_scheduler()
    arguments = {"augmentation_level_embedding": True}
    stages = [make_unet(4), shared, make_unet(8, 4, **arguments), shared, shared]
    own = [make_unet(4), make_scheduler(), make_unet(8, 4, **arguments), make_scheduler(), noising]
    options = {"num_inference_steps": {"base": 6, "super_res_1": 3}, "augmentation_levels": {"super_res_1": 9}}
    shared_images = tensors(quiet(CascadedDiffusionPipeline(*stages)), [0, 1], truncated=True, **options)
    assert torch.equal(
        shared_images, tensors(quiet(CascadedDiffusionPipeline(*own)), [0, 1], truncated=True, **options)
    )
    assert shared.num_inference_steps is None


# ---------------------------------------------------------------------------------------------------------------------
# from_stages


def test_from_stages_takes_folders(cascade, tmp_path):
    for number, make in enumerate((make_base, make_super_res_1, make_super_res_2)):
        make().save_pretrained(tmp_path / str(number))
    joined = CascadedDiffusionPipeline.from_stages(*(tmp_path / str(number) for number in range(3)))
    assert joined.config.default_num_inference_steps == STEPS
    assert joined.config.id2label == NAMES and joined.config.source_resolution == 16
    torch.testing.assert_close(tensors(quiet(joined), [0]), tensors(cascade, [0]), rtol=0, atol=1e-5)


def test_from_stages_extends_a_cascade(cascade):
    two_stages = CascadedDiffusionPipeline.from_stages(make_base(), make_super_res_1())
    three_stages = CascadedDiffusionPipeline.from_stages(two_stages, make_super_res_2())
    assert torch.equal(tensors(quiet(three_stages), [0]), tensors(cascade, [0]))


def misfit(change: str):
    base, super_res_1, super_res_2 = make_base(), make_super_res_1(), make_super_res_2()
    if change == "channels":
        super_res_2 = make_super_res_2(channels=3)
    elif change == "size":
        super_res_1 = make_super_res_2()
    elif change == "classes":
        super_res_2 = make_super_res_2(num_classes=5)
    elif change == "names":
        super_res_1.register_to_config(id2label={**NAMES, 1: "wolf"})
    elif change == "length":
        super_res_1.noising_scheduler = CascadedDDPMScheduler(T + 1)
    elif change == "schedule":
        super_res_1.noising_scheduler = CascadedDDPMScheduler(T, "linear", 1e-3, 0.2)
    elif change == "order":
        base = make_super_res_1()
    elif change == "kind":
        super_res_1 = make_base()
    return base, super_res_1, super_res_2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("channels", r"`super_res_2` has \{3\} channels; `base` makes 1"),
        ("size", "`super_res_1` takes images of size 8, but stage `base` makes images of size 4"),
        ("classes", "`super_res_2` has 5 classes, one before it 4"),
        ("names", r"`super_res_1` has other classes: `id2label\[1\]` is 'wolf', before it 'dog'"),
        ("length", r"`super_res_1` was trained on .* squaredcos_cap_v2 schedule of 41 .* `base` diffuses by .* of 40"),
        ("schedule", r"`super_res_1` was trained on .* linear schedule of 40 .* `base` diffuses by a squaredcos"),
        ("order", "`base` is a SuperResolutionPipeline; it must be a CascadedDiffusionPipeline"),
        ("kind", "`super_res` has a CascadedDiffusionPipeline; it must be a SuperResolutionPipeline"),
    ],
)
def test_stages_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        CascadedDiffusionPipeline.from_stages(*misfit(change))


@pytest.mark.parametrize("numbered", ["base", "super_res_1"])
def test_classes_that_are_called_by_their_numbers_take_the_names_of_the_others(numbered):
    stages = {"base": make_base(), "super_res_1": make_super_res_1()}
    stages[numbered].register_to_config(id2label={label: str(label) for label in NAMES})
    assert CascadedDiffusionPipeline.from_stages(*stages.values()).config.id2label == NAMES
    stages[numbered].register_to_config(id2label={label: str(label) for label in [*NAMES, 4]})
    with pytest.raises(ValueError, match="`super_res_1` has other classes"):
        CascadedDiffusionPipeline.from_stages(*stages.values())


def test_more_than_three_super_resolution_stages():
    same = SuperResolutionPipeline(make_unet(4, 4), make_scheduler())
    four = CascadedDiffusionPipeline.from_stages(make_base(), same, same, same)
    assert [stage.name for stage in four.stages] == ["base", "super_res_1", "super_res_2", "super_res_3"]
    with pytest.raises(ValueError, match="4 super-resolution stages; a cascade has up to three"):
        CascadedDiffusionPipeline.from_stages(make_base(), same, same, same, same)


def test_a_different_source_resolution_is_only_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
    super_res_1 = make_super_res_1()
    super_res_1.register_to_config(source_resolution=64)
    with caplog.at_level("WARNING"):
        pipe = CascadedDiffusionPipeline.from_stages(make_base(), super_res_1)
    assert "`super_res_1` was trained on images averaged down from 64 pixels" in caplog.text
    assert pipe.config.source_resolution == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"super_res_1_unet": None}, "`super_res_1` is incomplete: it needs `super_res_1_unet` and"),
        ({"super_res_2_scheduler": None}, "`super_res_2` is incomplete"),
        (
            {"super_res_1_unet": None, "super_res_1_scheduler": None, "super_res_1_noising_scheduler": None},
            "`super_res_2` was given without `super_res_1`",
        ),
        ({"super_res_1_noising_scheduler": None}, "`super_res_1` takes an augmentation level, but .* no"),
        ({"super_res_1_noising_scheduler": DDIMScheduler(T)}, "of stage `super_res_1` is a DDIMScheduler; it must"),
        ({"base_unet": make_unet(4, 4)}, "`base_unet` takes a low-resolution image"),
        ({"id2label": {4: "bird"}}, r"`id2label` has the keys \[4\]; the networks have 4 classes"),
        ({"default_num_inference_steps": {"super_res_3": 5}}, r"names the stages \['super_res_3'\]; there are"),
        ({"default_augmentation_levels": {"super_res": 5}}, r"names the stages \['super_res'\]; there are"),
        ({"default_guidance_scales": {"super_res": 2.0}}, r"names the stages \['super_res'\]; there are"),
        ({"default_num_inference_steps": 5}, "`default_num_inference_steps` is 5; it must be a dict"),
        ({"default_num_inference_steps": []}, r"`default_num_inference_steps` is \[\]; it must be a dict"),
        ({"default_num_inference_steps": {"base": 0}}, "default `num_inference_steps` of stage `base` is 0; it must"),
        ({"default_num_inference_steps": {"base": 10**9}}, r"is 1000000000; .* an integer in 1\.\.1000000"),
        ({"default_augmentation_levels": {"super_res_2": -5}}, "default `augmentation_level` .* `super_res_2` is -5"),
        ({"default_augmentation_levels": {"super_res_1": -5}}, "default `augmentation_level` .* `super_res_1` is -5"),
        (
            {"default_guidance_scales": {"base": -1e7}},
            r"stage `base` is -10000000\.0; it must be a finite",
        ),
        (
            {"default_guidance_scales": {"base": 1e300}},
            r"stage `base` is 1e\+300; it must be a finite",
        ),
        ({"id2label": ["cat"]}, r"`id2label` is \['cat'\]; it must be a dict"),
        ({"id2label": {1.5: "cat"}}, r"`id2label` is \{1\.5: 'cat'\}; it must be a dict from class indices"),
        ({"source_resolution": -1}, "`source_resolution` is -1; it must be an integer of at least 1"),
    ],
)
def test_parts_that_contradict_each_other(cascade, arguments, message):
    with pytest.raises(ValueError, match=message):
        CascadedDiffusionPipeline(**{**cascade.components, **arguments})


def test_a_base_network_is_no_super_resolution_stage():
    with pytest.raises(ValueError, match="`unet` takes no low-resolution image"):
        SuperResolutionPipeline(make_unet(4), make_scheduler())
    with pytest.raises(ValueError, match="`augmentation_level` of stage `super_res` is 3, but the stage takes none"):
        SuperResolutionPipeline(make_unet(8, 4), make_scheduler(), default_augmentation_level=3)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: refused before any network runs


BAD_CALLS = [
    ({}, "`class_labels` are missing; the stages were trained with 4 classes"),
    ({"class_labels": []}, r"`class_labels` is \[\]; it must be"),
    ({"class_labels": 4}, r"`class_labels` has 4; it must lie in 0\.\.3"),
    ({"class_labels": [-1]}, "`class_labels` has -1"),
    ({"class_labels": ["wolf"]}, r"`class_labels` has 'wolf', which is not a class; the names are \['cat', 'dog'"),
    ({"class_labels": ["cta"]}, r"`class_labels` has 'cta', which is not a class; .*; did you mean 'cat'\?"),
    ({"class_labels": ["crane"]}, r"'crane', which names the classes \[2, 3\]: give the index"),
    ({"class_labels": [1.0]}, r"`class_labels` has 1\.0 of type float"),
    ({"class_labels": [True]}, "`class_labels` has True of type bool"),
    ({"class_labels": 0.5}, r"`class_labels` is 0\.5; it must be an index"),
    ({"class_labels": torch.tensor([0.0])}, "`class_labels` is a torch.float32 tensor"),
    ({"class_labels": torch.tensor([[0]])}, r"tensor of shape \(1, 1\); it must be int64 and of shape"),
    ({"class_labels": torch.tensor([7])}, "`class_labels` has 7"),
    ({"class_labels": 0, "batch_size": 2}, "`batch_size` is 2, but `class_labels` say how many"),
    (
        {"class_labels": 0, "num_images_per_label": 0},
        "`num_images_per_label` is 0; it must be an integer of at least 1",
    ),
    ({"class_labels": 0, "num_images_per_label": 1.5}, r"`num_images_per_label` is 1\.5"),
    ({"class_labels": 0, "num_inference_steps": 0}, "`num_inference_steps` of stage `base` is 0; it must be"),
    ({"class_labels": 0, "num_inference_steps": -3}, "`num_inference_steps` of stage `base` is -3"),
    ({"class_labels": 0, "num_inference_steps": 2.0}, r"`num_inference_steps` of stage `base` is 2\.0"),
    ({"class_labels": 0, "num_inference_steps": T + 1}, "Stage `base`: .* is 41; it must be at most 40"),
    ({"class_labels": 0, "num_inference_steps": {"super_res_2": 51}}, "Stage `super_res_2`: .* is 51; .* at most 50"),
    ({"class_labels": 0, "num_inference_steps": {"super_res_2": "3"}}, "stage `super_res_2` is '3'"),
    ({"class_labels": 0, "num_inference_steps": {"sr": 5}}, r"`num_inference_steps` names the stages \['sr'\]; there"),
    ({"class_labels": 0, "num_inference_steps": [5, 4]}, r"`num_inference_steps` of stage `base` is \[5, 4\]"),
    ({"class_labels": 0, "augmentation_levels": {"super_res_1": T + 1}}, r"`super_res_1` is 41; .* in 0\.\.40"),
    ({"class_labels": 0, "augmentation_levels": {"super_res_1": -1}}, r"`super_res_1` is -1; .* in 0\.\.40"),
    ({"class_labels": 0, "augmentation_levels": {"super_res_1": 0.5}}, r"`super_res_1` is 0\.5; .* integer"),
    ({"class_labels": 0, "augmentation_levels": {"super_res_2": 5}}, "`super_res_2` is 5, but the stage takes none"),
    ({"class_labels": 0, "augmentation_levels": {"base": 5}}, "`base` is 5, but the stage takes none"),
    ({"class_labels": 0, "augmentation_levels": {"super_res_3": 5}}, "names the stages .'super_res_3'.; there are"),
    ({"class_labels": 0, "augmentation_levels": 5}, "`augmentation_levels` is 5; it must be a dict"),
    ({"class_labels": 0, "restart_timestep": 0}, r"`restart_timestep` is 0; it must be an integer in 1\.\.40"),
    ({"class_labels": 0, "restart_timestep": T + 1}, "`restart_timestep` is 41"),
    ({"class_labels": 0, "restart_timestep": 5.0}, r"`restart_timestep` is 5\.0"),
    ({"class_labels": 0, "restart_timestep": 5, "truncated": True}, "`start_at` is 5; it must be above `stop_at`"),
    ({"class_labels": 0, "restart_timestep": 5, "image": torch.rand(1, 4, 4)}, "with `image` the base does not run"),
    ({"class_labels": 0, "guidance_scale": 2.0}, "`guidance_scale` of stage `base` is 2.0, but .* label dropout"),
    ({"class_labels": 0, "guidance_scale": "2"}, "`guidance_scale` of stage `base` is '2'; it must be a finite"),
    ({"class_labels": 0, "guidance_scale": float("nan")}, "`guidance_scale` of stage `base` is nan"),
    (
        {"class_labels": 0, "guidance_scale": 1e300},
        r"stage `base` is 1e\+300; .* in -1e\+06\.\.1e\+06",
    ),
    ({"class_labels": 0, "guidance_scale": 10**400}, "`guidance_scale` of stage `base` is 1000"),
    ({"class_labels": 0, "guidance_scale": {"super_res_9": 1.0}}, "`guidance_scale` names the stages"),
    ({"class_labels": 0, "generator": [seeded(), seeded()]}, "`generator` is a list of 2 for 1 images"),
    ({"class_labels": [0, 1], "generator": [seeded()]}, "`generator` is a list of 1 for 2 images"),
    ({"class_labels": 0, "generator": 42}, "`generator` holds a int; it must be a torch.Generator"),
    ({"class_labels": 0, "output_type": "latent"}, "`output_type` is 'latent'; it must be 'pil', 'np' or 'pt'"),
    ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["latents"]}, r"is \['latents'\]; there is only"),
    ({"class_labels": 0, "callback_on_step_end_tensor_inputs": 5}, "tensor_inputs` is 5; there is only"),
    ({"class_labels": 0, "callback_on_step_end": "x"}, "`callback_on_step_end` is 'x'; it must be a function of"),
    ({"class_labels": 0, "image": torch.rand(0, 1, 4, 4)}, "`image` holds no image; it must hold at least one"),
    ({"class_labels": 0, "image": torch.rand(1, 1, 4, 4, device="meta")}, "`image` is on the meta device"),
    ({"class_labels": torch.zeros(1, dtype=torch.int64, device="meta")}, "`class_labels` is on the meta device"),
    (
        {"class_labels": 0, "image": torch.rand(1, 16, 16)},
        "`image` is 16 x 16 with 1 channels; .* 4 x 4 or 8 x 8 with 1",
    ),
    ({"class_labels": 0, "image": torch.rand(1, 4, 8)}, "`image` is 8 x 4 with 1 channels"),
    ({"class_labels": 0, "image": torch.rand(3, 4, 4)}, "`image` is 4 x 4 with 3 channels"),
    ({"class_labels": 0, "image": torch.rand(4, 4)}, r"`image` has the shapes \[\(4, 4\)\]; give images of one shape"),
    ({"class_labels": 0, "image": [torch.rand(1, 4, 4), torch.rand(1, 8, 8)]}, "give images of one shape"),
    (
        {"class_labels": 0, "image": 2 * torch.rand(1, 4, 4) - 1},
        r"`image` has values from -.*; they must lie in \[0, 1\]",
    ),
    ({"class_labels": 0, "image": 255 * torch.rand(1, 4, 4)}, "`image` has values from"),
    ({"class_labels": 0, "image": torch.full((1, 4, 4), float("nan"))}, "`image` has values from nan"),
    ({"class_labels": 0, "image": torch.zeros(1, 4, 4, dtype=torch.uint8)}, "`image` is of dtype torch.uint8"),
    ({"class_labels": 0, "image": np.zeros((4, 4, 1), np.uint8)}, "`image` is of dtype torch.uint8"),
    ({"class_labels": 0, "image": PIL.Image.new("RGB", (4, 4))}, "mode 'RGB', these stages take 'L': convert it with"),
    ({"class_labels": 0, "image": PIL.Image.new("L", (5, 5))}, "`image` is 5 x 5"),
    (
        {"class_labels": 0, "image": [PIL.Image.new("L", (4, 4)), PIL.Image.new("L", (8, 8))]},
        r"sizes \(4, 4\) and \(8, 8\); they must be of one size",
    ),
    ({"class_labels": 0, "image": "cat.png"}, r"`image` is of type \['str'\]"),
    ({"class_labels": 0, "image": []}, "`image` is of type"),
    ({"class_labels": [0, 1, 2], "image": torch.rand(2, 1, 4, 4)}, "`image` holds 2 images for 3 labels"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
def test_bad_calls(cascade, monkeypatch, arguments, message):
    calls = [record_calls(monkeypatch, stage.unet) for stage in cascade.stages]
    with pytest.raises(ValueError, match=message):
        cascade(**arguments)
    assert not any(calls)


def test_bad_calls_of_other_cascades():
    unconditional = CascadedDiffusionPipeline(make_unet(4, num_classes=None), make_scheduler())
    with pytest.raises(ValueError, match="`class_labels` are 0, but these stages are unconditional: use `batch_size`"):
        unconditional(0)
    with pytest.raises(ValueError, match="`batch_size` is 0; it must be an integer of at least 1"):
        unconditional(batch_size=0)
    with pytest.raises(ValueError, match="`image` was given, but this cascade has no super-resolution stage"):
        unconditional(image=torch.rand(1, 4, 4))
    with pytest.raises(ValueError, match="`truncated=True` needs a stage with Gaussian conditioning augmentation"):
        unconditional(truncated=True)
    with pytest.raises(ValueError, match="`output_type='pil'` cannot show 2 channels"):
        CascadedDiffusionPipeline(make_unet(4, channels=2), make_scheduler())(0)
    nameless = CascadedDiffusionPipeline(make_unet(4), make_scheduler())
    with pytest.raises(ValueError, match="'cat', which is not a class; this pipeline has no names"):
        nameless("cat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": torch.rand(1, 8, 8)}, "`image` is 8 x 8 with 1 channels; the stages take 4 x 4 with 1"),
        ({"class_labels": None}, "`class_labels` are missing"),
        ({"augmentation_level": T + 1}, "`augmentation_level` of stage `super_res` is 41"),
        ({"augmentation_level": 1.0}, r"`augmentation_level` of stage `super_res` is 1\.0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": T + 1}, "Stage `super_res`: `num_inference_steps` is 41; it must be at most 40"),
        ({"guidance_scale": 2.0}, "`guidance_scale` of stage `super_res` is 2.0, but its network was trained without"),
        ({"generator": [seeded()] * 2}, "`generator` is a list of 2 for 1 images"),
        ({"output_type": "latent"}, "`output_type` is 'latent'"),
    ],
)
def test_bad_calls_of_a_super_resolution_pipeline(monkeypatch, arguments, message):
    pipe = make_super_res_1()
    calls = record_calls(monkeypatch, pipe.unet)
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": torch.rand(1, 4, 4), "class_labels": 0, **arguments})
    assert not calls


def test_a_level_for_a_stage_without_augmentation():
    with pytest.raises(ValueError, match="`augmentation_level` of stage `super_res` is 5, but the stage takes none"):
        make_super_res_2()(torch.rand(1, 8, 8), 0, augmentation_level=5)


def test_a_learned_variance_that_the_network_does_not_have():
    pipe = CascadedDiffusionPipeline(make_unet(4), CascadedDDPMScheduler(T, variance_type="learned_range"))
    with pytest.raises(ValueError, match="`base`: the scheduler's `variance_type` is 'learned_range', but"):
        pipe(class_labels=[0], num_inference_steps=2)


def test_truncation_and_restart_need_this_package_s_scheduler():
    pipe = make_cascade()
    pipe.base_scheduler = DDIMScheduler.from_config(pipe.base_scheduler.config)
    assert len(tensors(pipe, [0])) == 1
    with pytest.raises(
        ValueError, match=r"`base`: DDIMScheduler cannot stop or restart .* use non-truncated sampling"
    ):
        pipe([0], truncated=True)
    with pytest.raises(ValueError, match="`base`: DDIMScheduler cannot stop or restart"):
        pipe([0], restart_timestep=10)
    pipe.base_scheduler = CascadedDDPMScheduler(T, "linear", 1e-3, 0.2)
    with pytest.raises(ValueError, match=r"`super_res_1` was trained on inputs noised by .* alpha-bar tables differ"):
        pipe([0], truncated=True)


# ---------------------------------------------------------------------------------------------------------------------
# Saving, loading, devices, dtypes, compiling


@pytest.fixture(scope="module")
def folder(cascade, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "cascade"
    cascade.save_pretrained(folder)
    cascade.save_pretrained(folder, variant="fp16")
    return folder


LOAD_AND_SAMPLE = """
import sys, torch
from cdm_diffusers.pipelines import CascadedDiffusionPipeline
pipe = CascadedDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
assert pipe.config.id2label == {0: "cat", 1: "dog", 2: "crane", 3: "crane"}, pipe.config.id2label
images = pipe(class_labels=["dog", 3], generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, sys.argv[2])
"""


def test_a_fresh_process_loads_and_samples(cascade, folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "CascadedDiffusionPipeline"
    assert index["base_unet"] == ["cdm_diffusers", "CascadedUNet2DModel"]
    assert index["super_res_2_scheduler"] == ["cdm_diffusers", "ContinuousDDPMScheduler"]
    assert index["super_res_3_unet"] == [None, None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::UserWarning:cdm_diffusers", "-c", LOAD_AND_SAMPLE, folder, tmp_path / "x"]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "x"), tensors(cascade, ["dog", 3]), rtol=0, atol=1e-5)


def test_loading_warns_of_nothing(folder, caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
    with caplog.at_level("WARNING"):
        CascadedDiffusionPipeline.from_pretrained(folder)
    assert caplog.text == ""


def test_saving_twice_changes_nothing(folder, tmp_path):
    loaded = CascadedDiffusionPipeline.from_pretrained(folder)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text()) == json.loads(
        (folder / "model_index.json").read_text()
    ) | {"_name_or_path": str(folder)}


def test_a_super_resolution_pipeline_is_saved_and_loaded(tmp_path):
    pipe = quiet(make_super_res_1())
    pipe.save_pretrained(tmp_path)
    loaded = quiet(SuperResolutionPipeline.from_pretrained(tmp_path))
    assert loaded.config.id2label == NAMES
    assert loaded.config.default_augmentation_level == 10
    image = torch.rand(1, 1, 4, 4)
    torch.testing.assert_close(tensors(loaded, image, 1), tensors(pipe, image, 1), rtol=0, atol=1e-5)


def test_variants_and_dtypes(cascade, folder):
    """Networks in bf16, sampling in float32."""
    loaded = quiet(CascadedDiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.bfloat16))
    assert {stage.unet.dtype for stage in loaded.stages} == {torch.bfloat16}
    samples = []

    def keep(pipe, step, timestep, tensors):
        samples.append(tensors["sample"])
        return {}

    images = tensors(loaded, [0, 1], callback_on_step_end=keep)
    assert {sample.dtype for sample in samples} == {torch.float32}
    assert images.dtype == torch.float32
    assert (images - tensors(cascade, [0, 1])).abs().mean() < 0.05
    mixed = {"base_unet": torch.bfloat16, "default": torch.float32}
    loaded = CascadedDiffusionPipeline.from_pretrained(folder, dtype=mixed)
    assert [stage.unet.dtype for stage in loaded.stages] == [torch.bfloat16, torch.float32, torch.float32]
    loaded.to(torch.float16)
    assert loaded.super_res_2_unet.dtype == torch.float16


def test_parts_can_be_left_out_or_replaced_in_loading(folder):
    scheduler = DDIMScheduler(T)
    left_out = {f"super_res_2_{part}": None for part in ("unet", "scheduler", "noising_scheduler")}
    with pytest.raises(ValueError, match=r"names the stages \['super_res_2'\]"):
        CascadedDiffusionPipeline.from_pretrained(folder, **left_out)
    loaded = CascadedDiffusionPipeline.from_pretrained(
        folder, base_scheduler=scheduler, default_num_inference_steps=None, **left_out
    )
    assert [stage.name for stage in loaded.stages] == ["base", "super_res_1"]
    assert loaded.base_scheduler is scheduler


@pytest.mark.parametrize("offload", ["model", "group", "device_map"])
def test_offloading(cascade, folder, offload):
    """With the CPU as the accelerator: hooks are set, run, and change nothing."""
    device_map = "cpu" if offload == "device_map" else None
    loaded = quiet(CascadedDiffusionPipeline.from_pretrained(folder, device_map=device_map))
    if offload == "model":
        loaded.enable_model_cpu_offload(device="cpu")
        assert len(loaded._all_hooks) == 3
    elif offload == "group":
        loaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert loaded._execution_device.type == "cpu"
    for _ in range(2):
        torch.testing.assert_close(tensors(loaded, [0, 1]), tensors(cascade, [0, 1]), rtol=0, atol=1e-5)


def test_compiled_networks_have_no_graph_break():
    """One graph for all steps: neither breaks nor compilations on the way."""
    pipe = quiet(CascadedDiffusionPipeline.from_stages(make_base(), make_super_res_1()))
    options = {"num_inference_steps": 3, "output_type": "pt"}
    expected = pipe([0], generator=seeded(), **options).images
    for name in ("base_unet", "super_res_1_unet"):
        counter = CompileCounter()
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend=counter, fullgraph=True))
        images = pipe([0], generator=seeded(), **options).images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
        assert counter.frame_count == 1


def damage(folder: Path, kind: str):
    weights = folder / "super_res_1_unet" / "diffusion_pytorch_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        (folder / "super_res_1_unet" / "config.json").unlink()
    elif kind == "no network":
        shutil.rmtree(folder / "super_res_1_unet")
    elif kind == "no scheduler":
        shutil.rmtree(folder / "super_res_1_noising_scheduler")
    elif kind == "no index":
        (folder / "model_index.json").unlink()
    elif kind == "half an index":
        (folder / "model_index.json").write_text((folder / "model_index.json").read_text()[:100])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "Unable to load weights .*super_res_1_unet/diffusion_pytorch_model.safetensors"),
        ("empty", "Unable to load weights .*super_res_1_unet/diffusion_pytorch_model.safetensors"),
        ("no weights", "no file named diffusion_pytorch_model.safetensors .*super_res_1_unet"),
        ("no config", r"no file named config.json found in directory .*super_res_1_unet"),
        ("no network", "the folder of component `super_res_1_unet` is missing"),
        ("no scheduler", "the folder of component `super_res_1_noising_scheduler` is missing"),
        ("no index", r"no file named model_index.json"),
        ("half an index", r"model_index.json' is not a valid JSON file"),
    ],
)
def test_damaged_checkpoints(folder, tmp_path, kind, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy, kind)
    with pytest.raises(OSError, match=f"{copy} is incomplete or damaged: .*{message}"):
        CascadedDiffusionPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ([], "is of type list; it must be an object"),
        (None, "is of type NoneType; it must be an object"),
        ({"_class_name": None}, "has the `_class_name` None; it must be the name of a class"),
        ({"_class_name": 3}, "has the `_class_name` 3"),
        ({"base_unet": 5}, r"has 5 as `base_unet`; it must be \[library, class\] of a CascadedUNet2DModel"),
        ({"base_unet": []}, r"has \[\] as `base_unet`"),
        ({"super_res_1_unet": "diffusers"}, "has 'diffusers' as `super_res_1_unet`"),
        ({"super_res_1_noising_scheduler": ["diffusers", None]}, r"has \['diffusers', None\] as `super_res_1_noising"),
        ({"super_res_3_unet": {}}, "has {} as `super_res_3_unet`"),
    ],
)
def test_a_malformed_index(folder, tmp_path, change, problem):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change if isinstance(change, dict) else change))
    for load in (CascadedDiffusionPipeline.from_pretrained, load_without_weights):
        with pytest.raises(ValueError, match=f"The model_index.json of '{tmp_path}/copy' {problem}.*: take a whole"):
            load(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("base_unet", 5),
        ("base_unet", ["os", "path"]),
        ("base_unet", ["stable_diffusion", "StableDiffusionPipeline"]),
        ("base_scheduler", ["deepfloyd_if", "IFPipeline"]),
        ("base_unet", ["diffusers", "UNet2DModel"]),
        ("base_unet", ["transformers", "CLIPModel"]),
        ("super_res_1_unet", ["cdm_diffusers", "CascadedDDPMScheduler"]),
        ("base_scheduler", ["json", "loads"]),
        ("base_scheduler", ["diffusers", "NoSuchThing"]),
        ("base_scheduler", ["diffusers", "StableDiffusionMixin"]),
        ("super_res_1_noising_scheduler", ["cdm_diffusers", "losses"]),
    ],
)
def test_an_index_that_names_no_component(folder, tmp_path, part, entry):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: entry}))
    wanted = "CascadedUNet2DModel" if part.endswith("unet") else "SchedulerMixin"
    problem = re.escape(f"has {entry!r} as `{part}`; it must be [library, class] of a {wanted}, or [null, null]")
    for load, name in (
        (CascadedDiffusionPipeline.from_pretrained, f" of '{tmp_path}/copy'"),
        (load_without_weights, f" of '{tmp_path}/copy'"),
        (DiffusionPipeline.from_pretrained, ""),
    ):
        with pytest.raises(ValueError, match=f"The model_index.json{name} {problem} for none: take a wh"):
            load(str(tmp_path / "copy"))


def test_schedulers_that_lack_a_library_say_which(folder, tmp_path):
    """Diffusers has objects in their place."""
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model_index.json"
    index = json.loads(file.read_text()) | {"base_scheduler": ["diffusers", "DPMSolverSDEScheduler"]}
    file.write_text(json.dumps(index))
    if not hasattr(diffusers.DPMSolverSDEScheduler, "_backends"):
        pytest.skip("torchsde is installed")
    with pytest.raises(ImportError, match="torchsde"):
        CascadedDiffusionPipeline.from_pretrained(tmp_path / "copy")


def test_defaults_of_numpy_are_saved(cascade, tmp_path):
    steps = {"base": np.int64(4)}
    CascadedDiffusionPipeline(**cascade.components, default_num_inference_steps=steps).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["default_num_inference_steps"] == {"base": 4}


def test_components_of_modules_that_are_imported(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_scheduler": ["my.schedulers", "Mine"]}))
    loads = (CascadedDiffusionPipeline.from_pretrained, DiffusionPipeline.from_pretrained, load_without_weights)
    for load in loads:
        with pytest.raises((ValueError, ModuleNotFoundError), match=r"my\.schedulers.* import |No module named 'my'"):
            load(str(tmp_path / "copy"))
    mine = type("Mine", (DDIMScheduler,), {})
    monkeypatch.setitem(sys.modules, "my.schedulers", SimpleNamespace(Mine=mine, SchedulerMixin=SchedulerMixin))
    for load in loads:
        assert type(load(str(tmp_path / "copy")).base_scheduler) is mine


def test_an_index_without_a_component(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_scheduler": [None, None]}))
    with pytest.raises(ValueError, match=r"a CascadedDiffusionPipeline without \['base_scheduler'\]"):
        load_without_weights(str(tmp_path / "copy"))
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="must be an object"):
        load_without_weights(str(tmp_path / "copy"))


def test_pickled_weights_are_not_loaded_unasked(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for weights in copy.glob("*/diffusion_pytorch_model.safetensors"):
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    message = r"holds the weights of `base_unet` as a pickle, .*\.bin; pickles are not read, .* `use_safetensors=F"
    with pytest.raises(ValueError, match=message) as error:
        CascadedDiffusionPipeline.from_pretrained(copy)
    assert "damaged" not in str(error.value)
    CascadedDiffusionPipeline.from_pretrained(copy, use_safetensors=False)


def test_the_wrong_kind_of_folder(folder):
    with pytest.raises(ValueError, match=r"holds a CascadedDiffusionPipeline without \['scheduler', 'unet'\]"):
        SuperResolutionPipeline.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Keeping to the low-resolution image


def deviations(stages) -> list[float]:
    """Of area averages of each stage's images from those of the stage before."""
    pairs = itertools.pairwise(stages.values())
    return [(F.avg_pool2d(high, 2) - low).abs().max().item() for low, high in pairs]


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_stages_keep_to_their_input(cascade, solver):
    """Also where s noises it, with every solver, and with a learned variance."""
    pipe = cascade.with_schedulers({"super_res_1": solver, "super_res_2": solver})
    options = {"num_inference_steps": 4, "augmentation_levels": {"super_res_1": 3}, "output_type": "pt"}
    free, held = (
        quiet(pipe)([0, 1], consistency=value, generator=seeded(), output_stages=True, **options).stages
        for value in (False, True)
    )
    assert max(deviations(held)) < 0.005 < 0.02 < min(deviations(free))
    assert torch.equal(held["base"], free["base"])


def test_a_stage_keeps_to_a_given_image(cascade):
    image = torch.rand(2, 1, 4, 4, generator=seeded())
    pipe = quiet(cascade.stage_pipeline("super_res_1"))
    held = tensors(pipe, image, [0, 1], consistency=True, augmentation_level=5, num_inference_steps=4)
    assert (F.avg_pool2d(held, 2) - image).abs().max() < 0.02
    assert torch.equal(tensors(pipe, image, [0, 1]), tensors(pipe, image, [0, 1], consistency=False))
    whole = tensors(cascade, [0, 1], image=image, consistency=True, num_inference_steps=4)
    assert (F.avg_pool2d(whole, 4) - image).abs().max() < 0.02


def test_what_has_no_image_to_keep_to(cascade):
    with pytest.raises(ValueError, match="`consistency` and `truncated` are both True"):
        cascade([0], consistency=True, truncated=True)
    unet = CascadedUNet2DModel.from_config(cascade.super_res_1_unet.config, sample_size=6)
    pipe = SuperResolutionPipeline(unet, cascade.super_res_1_scheduler, cascade.super_res_1_noising_scheduler)
    message = r"`consistency` is True, but the images of stage `super_res`, 6x6 .* 4x4 of 1"
    with pytest.raises(ValueError, match=message):
        pipe(torch.rand(1, 1, 4, 4), [0], consistency=True)


def test_a_network_that_adds_its_low_resolution_image_predicts_x_0():
    unet = make_unet(8, low_res_size=4, low_res_skip=True)
    pipe = SuperResolutionPipeline(unet, make_scheduler())
    with pytest.raises(ValueError, match="the scheduler's `prediction_type` is 'epsilon', but the network adds"):
        pipe(torch.zeros(1, 1, 4, 4), [0], num_inference_steps=1)
    pipe = SuperResolutionPipeline(unet, make_scheduler(prediction_type="sample"))
    assert pipe(torch.zeros(1, 1, 4, 4), [0], num_inference_steps=1).images
