"""OpenAI's networks against golden data of the original code, and every published structure at full size."""

import math
from dataclasses import fields, replace

import pytest
import torch
from golden import LOOPS, TWINS, draw_inputs, golden_outputs, golden_shapes, twin_weights

from cdm_diffusers import CascadedDiffusionPipeline, SuperResolutionPipeline
from cdm_diffusers.conversion import unet_from_openai
from cdm_diffusers.conversion.known_files import KNOWN_FILES
from cdm_diffusers.conversion.openai import build_scheduler, resolve_settings
from cdm_diffusers.conversion.openai_structure import OpenAISettings, read_structure


NETWORK_ARGUMENTS = {field.name for field in fields(OpenAISettings)} - {"noise_schedule"}
PUBLISHED = [file.name for file in KNOWN_FILES]

# image size, attention resolutions, heads, width of a head, T, schedule, time scale, dropout, low resolution, classes:
# from the flags in the README files of improved-diffusion and guided-diffusion
TABLE = {
    "imagenet64_uncond_100M_1500K": (64, (16, 8), 4, None, 4000, "cosine", 0.25, 0.0, None, None),
    "imagenet64_uncond_vlb_100M_1500K": (64, (16, 8), 4, None, 4000, "cosine", 0.25, 0.0, None, None),
    "imagenet64_cond_270M_250K": (64, (16, 8), 4, None, 4000, "cosine", 1.0, 0.0, None, 1000),
    "upsample_cond_500K": (256, (16, 8), 4, None, 4000, "linear", 1.0, 0.0, 64, 1000),
    "cifar10_uncond_50M_500K": (32, (16, 8), 4, None, 4000, "cosine", 0.25, 0.3, None, None),
    "cifar10_uncond_vlb_50M_500K": (32, (16, 8), 4, None, 4000, "cosine", 0.25, 0.3, None, None),
    "lsun_uncond_100M_1200K_bs128": (256, (16,), 1, None, 1000, "linear", 1.0, 0.0, None, None),
    "lsun_uncond_100M_2400K_bs64": (256, (16,), 1, None, 1000, "linear", 1.0, 0.0, None, None),
    "64x64_diffusion": (64, (32, 16, 8), None, 64, 1000, "cosine", 1.0, 0.1, None, 1000),
    "128x128_diffusion": (128, (32, 16, 8), 4, None, 1000, "linear", 1.0, 0.0, None, 1000),
    "256x256_diffusion": (256, (32, 16, 8), None, 64, 1000, "linear", 1.0, 0.0, None, 1000),
    "256x256_diffusion_uncond": (256, (32, 16, 8), None, 64, 1000, "linear", 1.0, 0.0, None, None),
    "512x512_diffusion": (512, (32, 16, 8), None, 64, 1000, "linear", 1.0, 0.0, None, 1000),
    "64_256_upsampler": (256, (32, 16, 8), 4, None, 1000, "linear", 1.0, 0.0, 64, 1000),
    "128_512_upsampler": (512, (32, 16), None, 64, 1000, "linear", 1.0, 0.0, 128, 1000),
    "lsun_bedroom": (256, (32, 16, 8), None, 64, 1000, "linear", 1.0, 0.1, None, None),
    "lsun_cat": (256, (32, 16, 8), None, 64, 1000, "linear", 1.0, 0.1, None, None),
    "lsun_horse": (256, (32, 16, 8), None, 64, 1000, "linear", 1.0, 0.1, None, None),
    "lsun_horse_nodropout": (256, (32, 16, 8), None, 64, 1000, "linear", 1.0, 0.0, None, None),
}


def convert(name, **changes):
    arguments = {key: value for key, value in TWINS[name].settings.items() if key in NETWORK_ARGUMENTS}
    return unet_from_openai(twin_weights(name), **(arguments | changes))


def published_weights(name):
    """A published state dict without its numbers: names and shapes that the original code gave."""
    shapes = golden_shapes()["published"][golden_shapes()["same"].get(name, name)]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def relative_error(output, golden):
    return float((output - golden).abs().max() / golden.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers as the original code's


@pytest.mark.parametrize("name", TWINS)
def test_outputs_are_the_originals(name):
    with torch.no_grad():
        output = convert(name)(**draw_inputs(TWINS[name])).sample
    assert relative_error(output, torch.from_numpy(golden_outputs()[name])) < 1e-5


@pytest.mark.parametrize("name", TWINS)
def test_outputs_with_bfloat16_weights(name):
    """Weights kept in bf16 but for norms and embeddings, and computing in float32, by Diffusers' own switch."""
    unet = convert(name)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.conv_in.weight.dtype == unet.mid_block.resnets[0].conv1.weight.dtype == torch.bfloat16
    with torch.no_grad():
        output = unet(**draw_inputs(TWINS[name])).sample
    assert relative_error(output, torch.from_numpy(golden_outputs()[name])) < 1e-2


@pytest.mark.parametrize("name", TWINS)
def test_outputs_in_bfloat16(name):
    """Computing in bf16 too rounds every layer's output: the original code by its own half precision errs as much."""
    unet = convert(name).to(dtype=torch.bfloat16, memory_format=torch.channels_last)  # ten times as fast on CPUs
    inputs = {key: value[:1] for key, value in draw_inputs(TWINS[name]).items()}
    inputs |= {key: inputs[key].bfloat16() for key in ("sample", "low_res") if key in inputs}
    with torch.no_grad():
        output = unet(**inputs).sample.float()
    golden = torch.from_numpy(golden_outputs()[name])[:1]
    assert (output - golden).norm() < 2e-2 * golden.norm()
    assert relative_error(output, golden) < 3e-2


@pytest.mark.parametrize("name", LOOPS)
def test_sampling_loops_are_the_originals(name):
    """250 respaced steps with learned variances: a last image in [-1, 1] of the same noise."""
    twin, (seed, steps) = TWINS[name], LOOPS[name]
    weights = twin_weights(name)
    settings = OpenAISettings(**twin.settings)
    scheduler = build_scheduler(read_structure(weights), settings)
    inputs = draw_inputs(twin)
    labels = {"class_labels": inputs["class_labels"]} if "class_labels" in inputs else {}
    options = {"num_inference_steps": steps, "output_type": "pt", "generator": torch.Generator().manual_seed(seed)}
    if twin.low_res:
        pipe = SuperResolutionPipeline(convert(name), scheduler)
        options["image"] = (inputs["low_res"] + 1) / 2
    else:
        pipe = CascadedDiffusionPipeline(convert(name), scheduler)
        options |= {} if labels else {"batch_size": twin.batch_size}
    pipe.set_progress_bar_config(disable=True)
    images = torch.as_tensor(pipe(**labels, **options).images)
    golden = torch.from_numpy(golden_outputs()[f"{name} loop"])
    assert golden.abs().max() <= 1 and golden.std() > 0.1
    torch.testing.assert_close(images * 2 - 1, golden, rtol=0, atol=1e-3)


def test_respacing_is_the_originals():
    for num_train_timesteps, count, timesteps in golden_shapes()["respacings"]:
        settings = OpenAISettings(noise_schedule="cosine", diffusion_steps=num_train_timesteps)
        scheduler = build_scheduler(KNOWN_FILES[0].structure, settings)
        scheduler.set_timesteps(count)
        assert scheduler.timesteps.flip(0).tolist() == timesteps


# ---------------------------------------------------------------------------------------------------------------------
# The published files


def test_all_nineteen_files_are_known():
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 19 and set(PUBLISHED) == set(TABLE)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - set(golden_shapes()["same"])))
def test_every_full_size_weight_has_its_place(name):
    """On the meta device, without any argument: nothing is missing, left over, or of another shape."""
    weights = published_weights(name)
    unet = unet_from_openai(weights)
    assert sum(p.numel() for p in unet.parameters()) == sum(math.prod(w.shape) for w in weights.values())
    size, attention, heads, width, _, _, scale, _, low_res, classes = TABLE[name]
    config = unet.config
    assert (config.sample_size, config.low_res_size, config.num_classes) == (size, low_res, classes)
    assert (config.attention_resolutions, config.time_scale) == (attention, scale)
    assert (config.num_attention_heads, config.attention_head_dim) == (heads, width)
    assert config.learned_variance and config.in_channels == config.out_channels == 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_known_of_every_file(name):
    structure = read_structure(published_weights(name))
    settings, known, notes = resolve_settings(structure, OpenAISettings(), name, needs_scheduler=True)
    size, _, heads, width, steps, schedule, scale, dropout, low_res, _ = TABLE[name]
    assert known.name == name and notes[0] == f"structure: that of {name}"
    assert settings == OpenAISettings(
        image_size=size,
        num_heads=heads,
        num_head_channels=width,
        new_attention_order=name == "64x64_diffusion",
        rescale_timesteps=scale != 1.0,
        noise_schedule=schedule,
        diffusion_steps=steps,
        low_res=low_res,
        dropout=dropout,
    )
    assert known.url.endswith(f"{name}.pt") and known.figures


def test_a_file_of_another_name_is_taken_for_the_one_with_its_structure():
    structure = read_structure(published_weights("64x64_diffusion"))
    settings, known, notes = resolve_settings(structure, OpenAISettings(), "my-model", needs_scheduler=True)
    assert known.name == "64x64_diffusion" and settings.diffusion_steps == 1000
    assert notes[0] == "structure: that of 64x64_diffusion, which these weights are taken to be"
    assert "new_attention_order: True (as in 64x64_diffusion)" in notes


def test_files_of_one_structure_agree_on_all_but_dropout():
    structure = read_structure(published_weights("lsun_cat"))
    settings, known, notes = resolve_settings(structure, OpenAISettings(), "my-model", needs_scheduler=True)
    assert known is None and settings.dropout == 0.0
    assert "256x256_diffusion_uncond or lsun_bedroom or lsun_cat or lsun_horse" in notes[0]
    assert "dropout: 0.0 (nothing known)" in notes
    for structure in {file.structure for file in KNOWN_FILES}:
        alike = {replace(file.settings, dropout=None) for file in KNOWN_FILES if file.structure == structure}
        assert len(alike) == 1


def test_arguments_replace_what_is_known():
    """A network of a published structure, trained further on another schedule."""
    structure = read_structure(published_weights("64x64_diffusion"))
    given = OpenAISettings(noise_schedule="linear", num_heads=2)
    settings, _, notes = resolve_settings(structure, given, "my-model", needs_scheduler=True)
    assert (settings.noise_schedule, settings.num_heads, settings.num_head_channels) == ("linear", 2, None)
    assert "noise_schedule: linear (given)" in notes and "num_heads: 2 (given)" in notes
    with pytest.raises(ValueError, match="`new_attention_order` is False, which contradicts the published 64x64"):
        resolve_settings(structure, OpenAISettings(new_attention_order=False), "64x64_diffusion", True)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize("missing", ["image_size", "num_heads", "new_attention_order", "rescale_timesteps", "low_res"])
def test_unknown_structures_need_arguments(missing):
    with pytest.raises(ValueError, match=f"`{missing}` must be given"):
        convert("upsample_cond", **{missing: None})


def test_rescaled_times_and_schedulers_need_the_steps():
    with pytest.raises(ValueError, match="`diffusion_steps` must be given"):
        convert("imagenet64_uncond", diffusion_steps=None)
    convert("64x64", diffusion_steps=None)
    structure = read_structure(twin_weights("64x64"))
    settings = OpenAISettings(**TWINS["64x64"].settings)
    with pytest.raises(ValueError, match="`noise_schedule`, `diffusion_steps` must be given"):
        resolve_settings(structure, replace(settings, noise_schedule=None, diffusion_steps=None), None, True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_head_channels": 8}, "`num_heads` is 4 and `num_head_channels` is 8"),
        ({"num_heads": 3}, "`num_heads` is 3, which does not divide"),
        ({"low_res": 8}, "`low_res` is 8, but the first convolution takes 3 channels"),
        ({"image_size": 12}, "`image_size` is 12"),
        ({"image_size": "16"}, "`image_size` is '16'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        convert("imagenet64_uncond", **changes)


def test_an_upsampler_cannot_shrink():
    with pytest.raises(ValueError, match="`low_res` is 64, more than `image_size`"):
        convert("upsample_cond", low_res=64)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("middle_block.0.in_layers.2.bias"), "lacks 1 weights of .*mid_block.resnets.0.conv1.bias"),
        (lambda w: w.pop("input_blocks.1.0.emb_layers.1.weight"), "lacks 'input_blocks.1.0.emb_layers.1.weight'"),
        (lambda w: w.update(extra=torch.zeros(3)), "has 'extra', which has no place"),
        (
            lambda w: w.update({"out.0.bias": torch.zeros(3)}),
            r"'out.0.bias' for 'conv_norm_out.bias' in the shape \(3",
        ),
        (lambda w: w.update({"out.0.bias": torch.zeros(32, dtype=torch.int64)}), "'out.0.bias' of torch.int64"),
        (lambda w: w.update({"out.0.bias": torch.zeros(32).to_sparse()}), "'out.0.bias' of .* torch.sparse_coo"),
        (lambda w: w.update({"out.2.weight": torch.tensor(1.0)}), r"'out.2.weight' in the shape \(\): it is damaged"),
        (lambda w: w.update({"time_embed.0.weight": torch.zeros(9)}), r"'time_embed.0.weight' in the shape \(9,\)"),
        (lambda w: w.update({"middle_block.1.qkv.bias": torch.zeros(64)}), "'middle_block.1.qkv.bias' .* of 6 rows"),
        (
            lambda w: w.update({"middle_block.1.proj_out.weight": torch.zeros(64)}),
            r"proj_out.weight' .* \(64,\)",
        ),
        (lambda w: w.pop("output_blocks.1.2.conv.weight"), "which has no place"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("output")], "it is a classifier"),
        (
            lambda w: [w.update({f"model.{k}": w.pop(k)}) for k in list(w)],
            "does not hold one of OpenAI's diffusion networks",
        ),
    ],
)
def test_other_weights_are_refused(change, message):
    name = "small rescaled cosine 4000"
    weights = twin_weights(name)
    change(weights)
    arguments = {key: value for key, value in TWINS[name].settings.items() if key in NETWORK_ARGUMENTS}
    with pytest.raises(ValueError, match=message):
        unet_from_openai(weights, **arguments)


def test_half_precision_files_become_float32():
    name = "small cosine 1000"
    weights = {key: value.half() for key, value in twin_weights(name).items()}
    arguments = {key: value for key, value in TWINS[name].settings.items() if key in NETWORK_ARGUMENTS}
    unet = unet_from_openai(weights, **arguments)
    assert unet.dtype == torch.float32 and not unet.training
    with torch.no_grad():
        output = unet(**draw_inputs(TWINS[name])).sample
    assert relative_error(output, torch.from_numpy(golden_outputs()[name])) < 5e-3
