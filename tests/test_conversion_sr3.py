"""SR3's networks against golden data of the original code, and its published configurations at full size."""

import math

import numpy as np
import pytest
import torch
from golden import SR3_LOOPS, SR3_TWINS, draw_inputs, golden_outputs, golden_shapes, twin_weights
from PIL import Image

from cdm_diffusers import CascadedUNet2DModel, SuperResolutionPipeline
from cdm_diffusers.conversion import unet_from_sr3
from cdm_diffusers.conversion.sr3 import SR3Settings, build_scheduler, read_structure, resolve_settings


def convert(name, **changes):
    arguments = {key: SR3_TWINS[name].settings.get(key) for key in ("image_size", "low_res", "norm_groups")}
    return unet_from_sr3(twin_weights(name), **(arguments | changes))


def conditions_of(name):
    inputs = draw_inputs(SR3_TWINS[name])
    inputs.pop("upsampled", None)
    return inputs


@pytest.mark.parametrize("name", SR3_TWINS)
def test_outputs_are_the_originals(name):
    with torch.no_grad():
        output = convert(name)(**conditions_of(name)).sample
    golden = torch.from_numpy(golden_outputs()[name])
    assert (output - golden).abs().max() < 1e-5 * golden.abs().max()


@pytest.mark.parametrize("name", SR3_TWINS)
def test_outputs_with_bfloat16_weights(name):
    """Weights kept in bf16 but for norms and embeddings, and computing in float32, by Diffusers' own switch."""
    unet = convert(name)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.conv_in.weight.dtype == torch.bfloat16
    with torch.no_grad():
        output = unet(**conditions_of(name)).sample
    golden = torch.from_numpy(golden_outputs()[name])
    assert 1e-4 * golden.abs().max() < (output - golden).abs().max() < 1e-2 * golden.abs().max()


@pytest.mark.parametrize("name", SR3_LOOPS)
def test_sampling_loops_are_the_originals(name):
    weights = twin_weights(name)
    given = SR3Settings(**{key: SR3_TWINS[name].settings[key] for key in ("image_size", "low_res", "norm_groups")})
    settings, notes = resolve_settings(weights, read_structure(weights), given, needs_scheduler=True)
    assert settings.diffusion_steps == 100 and "diffusion_steps: 100 (in the file)" in notes
    pipe = SuperResolutionPipeline(convert(name), build_scheduler(settings))
    pipe.set_progress_bar_config(disable=True)
    image = (conditions_of(name)["low_res"] + 1) / 2
    generator = torch.Generator().manual_seed(SR3_LOOPS[name])
    images = torch.as_tensor(pipe(image, num_inference_steps=100, generator=generator, output_type="pt").images)
    golden = torch.from_numpy(golden_outputs()[f"{name} loop"])
    assert golden.std() > 0.1
    torch.testing.assert_close(images * 2 - 1, golden.clamp(-1, 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name, size, low_res, attention, groups, dropout",
    [
        ("sr_sr3_16_128", 128, 16, (16,), 32, 0.2),
        ("sr_sr3_64_512", 512, 64, (), 16, 0.0),
        ("sample_sr3_128", 128, None, (16,), 32, 0.2),
    ],
)
def test_every_full_size_weight_has_its_place(name, size, low_res, attention, groups, dropout):
    shapes = golden_shapes()["published"][name]
    unet = unet_from_sr3({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    attentions = sum(key.endswith("attn.qkv.weight") for key in shapes)
    added = sum(3 * shape[1] for key, shape in shapes.items() if key.endswith("attn.qkv.weight"))  # biases of 0
    assert attentions == (6 if attention else 1)
    assert sum(p.numel() for p in unet.parameters()) == sum(math.prod(s) for s in shapes.values()) + added
    config = unet.config
    assert (config.sample_size, config.low_res_size, config.attention_resolutions) == (size, low_res, attention)
    assert (config.norm_num_groups, config.dropout, config.num_attention_heads) == (groups, dropout, 1)


def test_published_schedule_without_tables():
    shapes = golden_shapes()["published"]["sr_sr3_16_128"]
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    settings, _ = resolve_settings(weights, read_structure(weights), SR3Settings(), needs_scheduler=True)
    scheduler = build_scheduler(settings)
    assert scheduler.config.variance_type == "fixed_small" and len(scheduler) == 2000
    torch.testing.assert_close(scheduler.table.betas, torch.linspace(1e-6, 1e-2, 2000, dtype=torch.float64))


def test_low_resolution_images_are_enlarged_as_pillow_does():
    unet = CascadedUNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        attention_resolutions=(),
        mid_block_attention=False,
        num_attention_heads=1,
        norm_num_groups=4,
        low_res_size=8,
        low_res_interpolation="pillow_bicubic",
    )
    low_res = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    enlarged = np.asarray(Image.fromarray(low_res).resize((32, 32), Image.Resampling.BICUBIC))
    seen = []
    unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        image = torch.from_numpy(low_res).expand(1, 3, 8, 8).to(dtype)
        unet.to(dtype)(torch.zeros(1, 3, 32, 32, dtype=dtype), torch.tensor(5), low_res=image)
        assert seen[-1].dtype == dtype
        assert np.abs(seen[-1][0, 3].float().numpy() - enlarged).max() < tolerance


@pytest.mark.parametrize("missing", ["image_size", "low_res", "norm_groups"])
def test_unknown_structures_need_arguments(missing):
    with pytest.raises(ValueError, match=f"`{missing}` must be given"):
        convert("small sr3", **{missing: None})


def test_the_schedule_must_be_known():
    weights = {key: value for key, value in twin_weights("small sr3").items() if key != "betas"}
    given = SR3Settings(image_size=16, low_res=4, norm_groups=16)
    with pytest.raises(ValueError, match="`diffusion_steps`, `linear_start`, `linear_end` must be given"):
        resolve_settings(weights, read_structure(weights), given, needs_scheduler=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("denoise_fn.mid.0.attn.out.bias"), "lacks 1 weights .*attentions.0.to_out.0.bias"),
        (lambda w: w.update({"denoise_fn.extra.weight": torch.zeros(3)}), "'denoise_fn.extra.weight', which has no"),
        (lambda w: w.pop("denoise_fn.noise_level_mlp.1.weight"), "is not an SR3 network"),
        (lambda w: w.update({"denoise_fn.downs.0.weight": torch.zeros(8, 6, 3, 3)}), "does not divide 8 channels"),
        (lambda w: w.update({"denoise_fn.downs.0.weight": torch.zeros(9)}), r"downs.0.weight' in the shape \(9,\)"),
        (lambda w: w.update({"denoise_fn.mid.0.attn.qkv.weight": torch.zeros(9, 4)}), "attn.qkv.weight' in the shape"),
        (lambda w: w.pop("denoise_fn.downs.1.res_block.block1.block.3.weight"), "incomplete"),
    ],
)
def test_other_weights_are_refused(change, message):
    weights = twin_weights("small sr3")
    change(weights)
    with pytest.raises(ValueError, match=message):
        unet_from_sr3(weights, image_size=16, low_res=4, norm_groups=16)


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="`low_res` is 4, but this network has no low-resolution input"):
        convert("sample_sr3_128", low_res=4)
    with pytest.raises(ValueError, match="`norm_groups` is 12, which does not divide 16"):
        convert("small sr3", norm_groups=12)
