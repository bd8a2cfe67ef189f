"""CascadedUNet2DModel against Diffusers' UNet2DModel wherever that can express it, and its own promises."""

import dataclasses
import itertools
import json
import math
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from cdm_diffusers import CascadedUNet2DModel
from cdm_diffusers.models.arguments import UNetArguments
from cdm_diffusers.models.unet_2d_cascaded import constant_conditions


BASE = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
SUPER_RES = BASE | {
    "low_res_size": 8,
    "augmentation_level_embedding": True,
    "num_classes": 5,
    "null_class": True,
    "learned_variance": True,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomize(model):
    """Weights that hide nothing: fresh networks are zero in many places."""
    generator = seeded()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def build(config=BASE, **changes):
    return randomize(CascadedUNet2DModel(**(config | changes)))


def inputs_of(model, batch_size=2):
    """A batch of everything that the network takes."""
    config = model.config
    size = config.sample_size
    inputs = {"sample": torch.randn(batch_size, config.in_channels, size, size, generator=seeded())}
    if config.time_conditioning == "timestep":
        inputs["timestep"] = torch.arange(batch_size) * 700 + 50
    else:
        inputs["timestep"] = torch.linspace(0.2, 0.9, batch_size)
    if config.num_classes is not None:
        inputs["class_labels"] = torch.arange(batch_size) + config.num_classes + config.null_class - batch_size
    if config.low_res_size is not None:
        shape = batch_size, config.low_res_channels or config.in_channels, config.low_res_size, config.low_res_size
        inputs["low_res"] = torch.randn(shape, generator=seeded(1))
    if config.augmentation_level_embedding:
        inputs["augmentation_level"] = torch.arange(batch_size) * 300
    return inputs


@torch.no_grad()
def output_of(model, **changes):
    return model(**(inputs_of(model) | changes)).sample


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers' UNet2DModel


def diffusers_twin(model):
    """UNet2DModel of the same architecture with the same weights; the low-resolution image is for the caller."""
    config = model.config
    sizes = [config.sample_size // 2**level for level in range(len(config.block_out_channels))]
    plain = {"conv": "{}Block2D", "resnet": "Resnet{}sampleBlock2D"}
    down, up = (plain[kind] for kind in (config.downsample_type, config.upsample_type))
    attends = [size in config.attention_resolutions for size in sizes]
    twin = UNet2DModel(
        sample_size=config.sample_size,
        in_channels=model.conv_in.in_channels,
        out_channels=model.conv_out.out_channels,
        time_embedding_dim=config.time_embedding_dim,
        freq_shift=config.freq_shift,
        flip_sin_to_cos=config.flip_sin_to_cos,
        down_block_types=["AttnDownBlock2D" if attend else down.format("Down") for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else up.format("Up") for attend in reversed(attends)],
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        downsample_type=config.downsample_type,
        upsample_type=config.upsample_type,
        dropout=config.dropout,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        attn_norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        add_attention=config.mid_block_attention,
        num_class_embeds=None if config.num_classes is None else config.num_classes + config.null_class,
    ).eval()
    twin.load_state_dict(model.state_dict())  # strict: the same keys and shapes
    return twin


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"downsample_type": "resnet", "upsample_type": "resnet", "attention_resolutions": (16, 8)},
        {"downsample_type": "resnet", "upsample_type": "conv", "attention_resolutions": ()},
        {"resnet_time_scale_shift": "default", "attention_resolutions": (16,), "attention_head_dim": 8},
        {"mid_block_attention": False, "attention_resolutions": ()},
        {"block_out_channels": (8, 16, 24), "layers_per_block": 2, "attention_resolutions": (4, 16)},
        {"time_embedding_dim": 24, "freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-3},
        {"num_classes": 5, "null_class": True, "in_channels": 1, "out_channels": 2, "learned_variance": True},
        {"num_classes": 5, "norm_num_groups": 8},
        {"block_out_channels": (16,), "attention_resolutions": ()},
    ],
)
def test_state_and_output_are_those_of_unet_2d_model(changes):
    model = build(**changes)
    twin, inputs = diffusers_twin(model), inputs_of(model)
    expected = twin(inputs["sample"], inputs["timestep"], inputs.get("class_labels")).sample
    assert expected.std() > 0.01
    torch.testing.assert_close(output_of(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_super_resolution_is_unet_2d_model_on_the_concatenation(interpolation, is_first):
    model = build(low_res_size=8, low_res_interpolation=interpolation, low_res_first=is_first, low_res_channels=1)
    inputs = inputs_of(model)
    upsampled = F.interpolate(inputs["low_res"], (16, 16), mode=interpolation, align_corners=False)
    pair = [upsampled, inputs["sample"]] if is_first else [inputs["sample"], upsampled]
    expected = diffusers_twin(model)(torch.cat(pair, dim=1), inputs["timestep"]).sample
    torch.testing.assert_close(output_of(model), expected, atol=1e-5, rtol=1e-5)


def test_heads_by_number_are_heads_by_width():
    by_number = build(attention_head_dim=None, num_attention_heads=2, attention_resolutions=(16, 8))
    heads = {name: module.heads for name, module in by_number.named_modules() if isinstance(module, Attention)}
    assert set(heads.values()) == {2} and len(heads) == 2 * 3 + 1
    by_width = build(attention_head_dim=(4, 8), attention_resolutions=(16, 8))
    by_width.load_state_dict(by_number.state_dict())
    torch.testing.assert_close(output_of(by_width), output_of(by_number))
    of_width_4 = build(attention_head_dim=4, attention_resolutions=(16, 8))
    heads = {
        module.to_q.out_features: module.heads for module in of_width_4.modules() if isinstance(module, Attention)
    }
    assert heads == {8: 2, 16: 4}
    of_width_4.load_state_dict(by_number.state_dict())
    assert (output_of(of_width_4) - output_of(by_number)).abs().max() > 1e-4
    per_level = build(attention_head_dim=None, num_attention_heads=(1, 4), attention_resolutions=(16, 8))
    heads = {module.to_q.out_features: module.heads for module in per_level.modules() if isinstance(module, Attention)}
    assert heads == {8: 1, 16: 4}


# ---------------------------------------------------------------------------------------------------------------------
# Architecture


def inputs_seen(model, modules, run=output_of):
    """The first input of each of `modules` in a call."""
    seen = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("mid_block_attention", [False, True])
@pytest.mark.parametrize("resolutions", [(), (32,), (16,), (16, 8), (32, 16, 8)])
def test_attention_is_exactly_at_the_configured_resolutions(resolutions, mid_block_attention):
    model = build(
        sample_size=32,
        block_out_channels=(8, 8, 16),
        attention_resolutions=resolutions,
        mid_block_attention=mid_block_attention,
    )
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    sizes = [hidden.shape[-1] for hidden in inputs_seen(model, attentions)]
    going_down = sorted(resolutions, reverse=True)
    expected = going_down + [8] * mid_block_attention + [size for size in reversed(going_down) for _ in range(2)]
    assert sizes == expected


@pytest.mark.parametrize("layers", [1, 3])
def test_residual_blocks_per_level(layers):
    model = build(layers_per_block=layers)
    assert [len(block.resnets) for block in model.down_blocks] == [layers] * 2
    assert [len(block.resnets) for block in model.up_blocks] == [layers + 1] * 2


def test_residual_blocks_of_each_level():
    model = build(block_out_channels=(8, 8, 16), layers_per_block=(1, 2, 4))
    assert [len(block.resnets) for block in model.down_blocks] == [1, 2, 4]
    assert [len(block.resnets) for block in model.up_blocks] == [5, 3, 2]
    uniform = build(block_out_channels=(8, 8, 16), layers_per_block=(2, 2, 2))
    assert torch.equal(output_of(uniform), output_of(build(block_out_channels=(8, 8, 16), layers_per_block=2)))
    for layers in ((1, 2), (1, 0, 2), 0):
        with pytest.raises(ValueError, match=r"`layers_per_block` is .* one for each (level|of the 3 levels)"):
            CascadedUNet2DModel(**BASE | {"block_out_channels": (8, 8, 16), "layers_per_block": layers})


def test_skip_rescale_divides_residual_sums_by_sqrt_2():
    """A fresh network's residual branches are 0, so each of the middle's three sums is its input over sqrt 2."""
    for skip_rescale, factor in ((True, 2**-1.5), (False, 1.0)):
        model = CascadedUNet2DModel(**BASE, skip_rescale=skip_rescale)
        outputs = []
        model.mid_block.register_forward_hook(lambda _, args, result, to=outputs: to.extend([args[0], result]))
        output_of(model)
        torch.testing.assert_close(outputs[1], outputs[0] * factor)
        resampled = CascadedUNet2DModel(
            **BASE, skip_rescale=skip_rescale, downsample_type="resnet", upsample_type="resnet"
        )
        scales = {module.output_scale_factor for module in resampled.modules() if isinstance(module, ResnetBlock2D)}
        scales |= {module.rescale_output_factor for module in resampled.modules() if isinstance(module, Attention)}
        assert scales == {math.sqrt(2) if skip_rescale else 1.0}


def test_skip_time_act_leaves_out_the_silu():
    model = build(skip_time_act=True, downsample_type="resnet", upsample_type="resnet")
    twin = diffusers_twin(model)
    inputs = inputs_of(model)
    with_silu = twin(inputs["sample"], inputs["timestep"]).sample
    for module in twin.modules():
        if isinstance(module, ResnetBlock2D):
            module.skip_time_act = True
    torch.testing.assert_close(output_of(model), twin(inputs["sample"], inputs["timestep"]).sample)
    assert (output_of(model) - with_silu).abs().max() > 1e-3


def test_widths_of_the_time_embedding():
    model = build(SUPER_RES, time_proj_dim=10, time_embedding_hidden_dim=14, time_embedding_dim=18)
    for embedding in (model.time_embedding, model.augmentation_embedding):
        assert (embedding.linear_1.in_features, embedding.linear_1.out_features) == (10, 14)
        assert (embedding.linear_2.in_features, embedding.linear_2.out_features) == (14, 18)
    assert model.class_embedding.weight.shape == (6, 18)
    assert output_of(model).shape == (2, 6, 16, 16)
    defaults = build(SUPER_RES)
    assert defaults.time_embedding.linear_1.in_features == 8 and defaults.time_embedding.linear_2.out_features == 32


def test_dropout_is_in_every_residual_block():
    model = build(dropout=0.3, downsample_type="resnet", upsample_type="resnet")
    assert {module.dropout.p for module in model.modules() if isinstance(module, ResnetBlock2D)} == {0.3}
    torch.testing.assert_close(output_of(model), output_of(model))
    model.train()
    assert (output_of(model) - output_of(model)).abs().max() > 1e-3


def test_learned_variance_doubles_the_channels():
    assert output_of(build(out_channels=2)).shape == (2, 2, 16, 16)
    assert output_of(build(out_channels=2, learned_variance=True)).shape == (2, 4, 16, 16)


def test_fresh_networks_predict_zero_and_learn():
    """Residual branches and the output start at zero, as in DDPM; the output's weights still get a gradient."""
    model = CascadedUNet2DModel(**SUPER_RES)
    output = model(**inputs_of(model)).sample
    assert (output == 0).all()
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            assert (module.conv2.weight == 0).all() and (module.conv2.bias == 0).all()
        if isinstance(module, Attention):
            assert (module.to_out[0].weight == 0).all() and (module.to_out[0].bias == 0).all()
    (output - 1).square().mean().backward()
    assert model.conv_out.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Low-resolution input


def upsampled_by_hand(image, kernel):
    """Separable interpolation of (h, w) to twice the size, pixel centres aligned, the border repeated."""
    height, width = image.shape

    def taps(position, length):
        centre = (position + 0.5) / 2 - 0.5
        start = math.floor(centre) - 1
        return [(min(max(i, 0), length - 1), kernel(abs(centre - i))) for i in range(start, start + 4)]

    result = np.zeros((2 * height, 2 * width))
    for row, column in itertools.product(range(2 * height), range(2 * width)):
        result[row, column] = sum(
            weight * other * image[i, j] for i, weight in taps(row, height) for j, other in taps(column, width)
        )
    return result


def triangle(x):
    return max(0.0, 1 - x)


def cubic(x, a=-0.75):
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("interpolation, kernel", [("bilinear", triangle), ("bicubic", cubic)])
def test_low_resolution_image_is_upsampled_and_concatenated(interpolation, kernel, is_first):
    model = build(low_res_size=8, low_res_interpolation=interpolation, low_res_first=is_first)
    inputs = inputs_of(model)
    (seen,) = inputs_seen(model, [model.conv_in])
    first, second = seen.split(3, dim=1)
    upsampled, sample = (first, second) if is_first else (second, first)
    assert torch.equal(sample, inputs["sample"])
    for came, image in zip(upsampled.flatten(0, 1), inputs["low_res"].flatten(0, 1), strict=True):
        np.testing.assert_allclose(came, upsampled_by_hand(image.double().numpy(), kernel), atol=1e-5)


def test_low_resolution_image_matters():
    model = build(SUPER_RES)
    changed = inputs_of(model)["low_res"]
    changed[1] += 0.1
    difference = (output_of(model, low_res=changed) - output_of(model)).abs().amax(dim=(1, 2, 3))
    assert difference[0] == 0 and difference[1] > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Patches and other sizes


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("low_res_size, low_res_channels", [(None, 3), (4, 3), (8, 3), (16, 12)])
def test_a_network_on_patches_is_one_on_their_pixels_as_channels(low_res_size, low_res_channels, learned_variance):
    """
    Space to depth by hand, a network without patches on that, and depth to space: the low-resolution image is
    upsampled to the patches, taken as it is where it has their resolution, and cut into patches above it.
    """
    options = {"low_res_size": low_res_size, "learned_variance": learned_variance, "attention_resolutions": (4,)}
    model = build(**options, patch_size=2)
    options |= {"low_res_size": low_res_size and min(8, low_res_size), "low_res_channels": low_res_channels}
    twin = build(**options, sample_size=8, in_channels=12, out_channels=12)
    twin.load_state_dict(model.state_dict())

    def patches(images):  # (B, C, 2h, 2w) to (B, 4C, h, w): all patches' first pixels, then their second, ...
        quarters = [images[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return torch.stack(quarters, dim=2).flatten(1, 2)

    inputs = inputs_of(model)
    expected = inputs | {"sample": patches(inputs["sample"])}
    if low_res_size == 16:
        expected["low_res"] = patches(inputs["low_res"])
    with torch.no_grad():
        torch.testing.assert_close(patches(output_of(model)), twin(**expected).sample)


def test_patches_must_fit():
    with pytest.raises(ValueError, match=r"`sample_size` is 16; with `patch_size` 3 .* must be a multiple of 6"):
        CascadedUNet2DModel(**BASE, patch_size=3)
    with pytest.raises(ValueError, match="`low_res_size` is 12, above the resolution of 8 that `patch_size` 2 leaves"):
        CascadedUNet2DModel(**BASE, patch_size=2, low_res_size=12)


WITHOUT_ATTENTION = BASE | {"attention_resolutions": (), "mid_block_attention": False, "low_res_size": 4}


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("height, width", [(8, 8), (24, 16), (16, 40)])
def test_a_network_without_attention_takes_images_of_other_sizes(height, width, patch_size):
    """As if it had been made for them: nothing in it depends on `sample_size`."""
    model = build(WITHOUT_ATTENTION, patch_size=patch_size)
    inputs = inputs_of(model)
    inputs["sample"] = torch.randn(2, 3, height, width, generator=seeded())
    inputs["low_res"] = torch.randn(2, 3, height // 4, width // 4, generator=seeded(1))
    output = output_of(model, **inputs)
    assert output.shape == inputs["sample"].shape
    if height == width:
        made_for_it = build(WITHOUT_ATTENTION, patch_size=patch_size, sample_size=height, low_res_size=height // 4)
        assert torch.equal(output, output_of(made_for_it, **inputs))
    with pytest.raises(ValueError, match=r"`low_res` is .* expected floats of shape"):
        output_of(model, sample=inputs["sample"], low_res=inputs["low_res"].repeat(1, 1, 2, 2))
    with pytest.raises(ValueError, match=f"`sample` is of size {height}x{width + 1}; .* multiples of 4"):
        output_of(model, sample=torch.zeros(2, 3, height, width + 1), low_res=inputs["low_res"])


def test_a_network_with_attention_takes_its_own_size_only():
    for attention in ({"attention_resolutions": (8,)}, {"mid_block_attention": True}):
        model = build(WITHOUT_ATTENTION | attention)
        with pytest.raises(ValueError, match=r"expected floats of shape \(2, 3, 16, 16\)"):
            output_of(model, sample=torch.zeros(2, 3, 8, 8), low_res=torch.zeros(2, 3, 2, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The low-resolution image added to the output


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_with_low_res_skip_the_layers_make_what_the_upsampled_image_lacks(mode, learned_variance):
    options = {"low_res_size": 4, "low_res_interpolation": mode, "learned_variance": learned_variance, "patch_size": 2}
    plain, model = build(**options), build(**options, low_res_skip=True)
    model.load_state_dict(plain.state_dict())
    inputs = inputs_of(model)
    added = F.interpolate(inputs["low_res"], (16, 16), mode=mode, align_corners=False)
    expected = output_of(plain)
    expected[:, :3] += added
    torch.testing.assert_close(output_of(model), expected)
    with constant_conditions():
        torch.testing.assert_close(output_of(model), expected)
    thresholded = build(**options, low_res_skip=True, low_res_skip_threshold=0.1)
    thresholded.load_state_dict(plain.state_dict())
    details = output_of(plain)[:, :3]
    expected[:, :3] = added + details.sign() * (details.abs() - 0.1).clamp(min=0)
    assert (details.abs() < 0.1).any() and (details.abs() > 0.1).any()
    torch.testing.assert_close(output_of(thresholded), expected)


def test_low_res_skip_needs_an_image_like_the_output():
    for options in ({}, {"low_res_size": 4, "low_res_channels": 1}):
        with pytest.raises(ValueError, match="`low_res_skip` is True; it needs a `low_res_size`, and as many"):
            CascadedUNet2DModel(**BASE | options, low_res_skip=True)
    with pytest.raises(ValueError, match=r"`low_res_skip_threshold` is 0\.1; it needs `low_res_skip`"):
        CascadedUNet2DModel(**BASE, low_res_size=4, low_res_skip_threshold=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Time, s and class


@pytest.mark.parametrize("name", ["timestep", "augmentation_level", "class_labels"])
def test_each_condition_matters_to_its_own_image(name):
    model = build(SUPER_RES)
    values = inputs_of(model)[name]
    values[1] -= 1
    difference = (output_of(model, **{name: values}) - output_of(model)).abs().amax(dim=(1, 2, 3))
    assert difference[0] == 0 and difference[1] > 1e-5


def test_t_and_s_have_embeddings_of_their_own():
    model = build(SUPER_RES)
    one = output_of(model, timestep=torch.tensor([10, 10]), augmentation_level=torch.tensor([200, 200]))
    other = output_of(model, timestep=torch.tensor([200, 200]), augmentation_level=torch.tensor([10, 10]))
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["timestep", "augmentation_level"])
def test_one_time_for_the_whole_batch(name):
    model = build(SUPER_RES)
    for dtype in (torch.int64, torch.int32):
        scalar = output_of(model, **{name: torch.tensor(123, dtype=dtype)})
        assert torch.equal(scalar, output_of(model, **{name: torch.tensor([123, 123])}))


def test_times_as_unet_2d_model_takes_them():
    """A number, or one time in a list, for the whole batch."""
    for changes, values in (({}, [7, torch.tensor([7])]), ({"time_conditioning": "noise_level"}, [1, torch.ones(1)])):
        model = build(**changes)
        expected = output_of(model, timestep=values[1].repeat(2))
        for value in values:
            assert torch.equal(output_of(model, timestep=value), expected)
            if not changes:
                torch.testing.assert_close(diffusers_twin(model)(inputs_of(model)["sample"], value).sample, expected)
    assert torch.equal(output_of(model, timestep=0.25), output_of(model, timestep=torch.tensor(0.25)))


def sinusoids_by_hand(values, dim):
    """cos and sin of the value times 10000^(-i/half), in float64."""
    angles = np.asarray(values, np.float64)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def features_seen(model, embedding, **inputs):
    (features,) = inputs_seen(model, [embedding], lambda model: model(**inputs))
    return features


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_4000_times_stay_apart_in_half_precision(dtype):
    """bf16 itself knows 763 of them: sinusoids must be made in float32, and rounded afterwards."""
    config = SUPER_RES | {"sample_size": 1, "low_res_size": 1, "block_out_channels": (8,), "attention_resolutions": ()}
    config |= {"num_classes": None, "null_class": False, "mid_block_attention": False, "time_proj_dim": 64}
    model = build(config).to(dtype)
    times = torch.arange(4000)
    inputs = {name: torch.zeros(4000, 3, 1, 1, dtype=dtype) for name in ("sample", "low_res")}
    expected = torch.from_numpy(sinusoids_by_hand(times, 64))
    for name, other, embedding in (
        ("timestep", "augmentation_level", model.time_embedding),
        ("augmentation_level", "timestep", model.augmentation_embedding),
    ):
        with torch.no_grad():
            features = features_seen(model, embedding, **inputs, **{name: times, other: torch.tensor(5)})
        assert features.dtype == dtype and len(features.unique(dim=0)) == 4000
        # float32 angles up to 4000 are off by 2.4e-4
        torch.testing.assert_close(features.double(), expected, atol=torch.finfo(dtype).eps + 5e-4, rtol=0)


def test_time_scale_multiplies_the_time_but_not_s():
    model = build(SUPER_RES, time_conditioning="noise_level", time_scale=5000.0)
    levels = torch.tensor([0.123, 0.999])
    inputs = inputs_of(model) | {"timestep": levels}
    with torch.no_grad():
        of_time = features_seen(model, model.time_embedding, **inputs)
        of_s = features_seen(model, model.augmentation_embedding, **inputs)
    np.testing.assert_allclose(of_time, sinusoids_by_hand(levels.double() * 5000, 8), atol=1e-3)
    np.testing.assert_allclose(of_s, sinusoids_by_hand([0, 300], 8), atol=1e-4)


def test_conditioning_on_the_noise_level():
    model = build(time_conditioning="noise_level")
    one, other = (output_of(model, timestep=torch.tensor(level)) for level in (0.3, 0.7))
    assert (one - other).abs().max() > 1e-4
    torch.testing.assert_close(output_of(model, timestep=torch.tensor(0.3).double()), one)


# ---------------------------------------------------------------------------------------------------------------------
# What Diffusers' models can do


def gradients_of(model):
    model.zero_grad()
    model(**inputs_of(model)).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("resample_type", ["conv", "resnet"])
def test_gradient_checkpointing_changes_no_gradient(resample_type):
    model = build(SUPER_RES, downsample_type=resample_type, upsample_type=resample_type).train()
    calls = []
    for block in [resnet for level in model.down_blocks + model.up_blocks for resnet in level.resnets]:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, without = gradients_of(model), len(calls)
    model.enable_gradient_checkpointing()
    calls.clear()
    came = gradients_of(model)
    assert len(calls) == 2 * without, "residual blocks are to be run again in the backward pass"
    for name in expected:
        torch.testing.assert_close(came[name], expected[name], msg=name)
        assert expected[name].abs().sum() > 0, name
    model.disable_gradient_checkpointing()
    calls.clear()
    gradients_of(model)
    assert len(calls) == without


@pytest.mark.parametrize("config", [BASE, SUPER_RES | {"time_conditioning": "noise_level"}])
def test_compiles_without_a_graph_break(config):
    model = build(config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(output_of(compiled), output_of(model))


@pytest.mark.parametrize("changes", [{}, {"downsample_type": "resnet", "upsample_type": "resnet"}])
def test_repeated_blocks_are_compiled_level_by_level(changes):
    """Fifteen residual blocks of different channels, beyond Dynamo's limit of 8 graphs for one forward."""
    model = build(block_out_channels=(8, 16, 24), layers_per_block=2, attention_resolutions=(8,), **changes)
    expected, counter = output_of(model), CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(output_of(model), expected)
    assert counter.frame_count == 3 + 1 + 3


def test_attention_backends_that_would_change_nothing_are_refused():
    model = build()
    model.set_attention_backend("native")
    for backend in ("flash", "xformers", "_native_math", 5):
        with pytest.raises(ValueError, match=r"`backend` is .*; it must be 'native', since AttnProcessor2_0 calls"):
            model.set_attention_backend(backend)


def test_attention_processors_can_be_set():
    model = build(attention_resolutions=(16, 8))
    assert len(model.attn_processors) == 2 * 3 + 1
    assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor2_0}
    expected = output_of(model)
    model.set_attn_processor(AttnProcessor())
    assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(output_of(model), expected, atol=1e-5, rtol=1e-5)


def test_lora_adapters_attach(tmp_path):
    model = build(SUPER_RES)
    expected = output_of(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert (output_of(model) - expected).abs().max() > 1e-5
    model.disable_adapters()
    torch.testing.assert_close(output_of(model), expected)
    model.enable_adapters()
    with_adapter = output_of(model)
    model.save_lora_adapter(tmp_path)
    fresh = build(SUPER_RES)
    fresh.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(output_of(fresh), with_adapter)


def test_channels_last():
    model = build(SUPER_RES)
    expected = output_of(model)
    model.to(memory_format=torch.channels_last)
    inputs = {name: inputs_of(model)[name].to(memory_format=torch.channels_last) for name in ("sample", "low_res")}
    torch.testing.assert_close(output_of(model, **inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time_conditioning", ["timestep", "noise_level"])
def test_half_precision(dtype, time_conditioning):
    model = build(SUPER_RES, time_conditioning=time_conditioning)
    expected = output_of(model)
    model.to(dtype)
    halves = {name: inputs_of(model)[name].to(dtype) for name in ("sample", "low_res")}
    came = output_of(model, **halves)
    assert came.dtype == dtype
    torch.testing.assert_close(came.float(), expected, atol=30 * torch.finfo(dtype).eps * expected.std(), rtol=0)


def test_layerwise_casting_keeps_embeddings_and_norms_whole():
    model = build(SUPER_RES)
    expected = output_of(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = ("norm", "time_embedding", "class_embedding", "augmentation_embedding")
    for name, parameter in model.named_parameters():
        is_kept = any(part in name for part in kept) and "proj" not in name
        assert (parameter.dtype == torch.float32) == is_kept or "time_emb_proj" in name, name
    assert torch.nn.functional.cosine_similarity(output_of(model).flatten(), expected.flatten(), dim=0) > 0.97


def test_save_and_load(tmp_path):
    model = build(SUPER_RES, skip_rescale=True, low_res_interpolation="bicubic")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = CascadedUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(output_of(loaded), output_of(model))
    for name, value in model.config.items():
        if not name.startswith("_"):
            saved = loaded.config[name]
            assert (tuple(saved) if isinstance(saved, list) else saved) == value, name
    again = CascadedUNet2DModel.from_config(loaded.config)
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_numbers_of_numpy_are_taken_and_saved_as_pythons(tmp_path):
    integers = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_resolutions": (8,)}
    as_numpy = {k: tuple(map(np.int64, v)) if isinstance(v, tuple) else np.int32(v) for k, v in integers.items()}
    model = build(**as_numpy, norm_eps=np.float64(1e-5), null_class=np.bool_(False))
    assert model.config == build(**integers, norm_eps=1e-5, null_class=False).config
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["block_out_channels"] == [8, 16]
    for wrong in ({"sample_size": np.bool_(True)}, {"block_out_channels": (8, np.bool_(True))}):
        with pytest.raises(ValueError, match=r"must be .*an integer in"):
            build(**wrong)


def test_checkpoints_that_lack_weights_are_refused(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    del weights["mid_block.resnets.1.conv2.bias"]
    safetensors.torch.save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=r"lacks 1 of the network's weights, 'mid_block\.resnets\.1\.conv2\.bias'"):
        CascadedUNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"in_channels": 10**6}, OSError, r"have another architecture than .* conv_in\.weight expected shape"),
        ({"layers_per_block": 2}, OSError, r"config: .* expected shape torch\.Size.*, but got torch\.Size\(.*\)\.$"),
        ({"attention_resolutions": [16, 8]}, OSError, r"lacks 30 of the network's weights, 'down_blocks\.0\.att"),
        ({"mid_block_attention": False}, OSError, r"has 10 weights besides the network's weights, 'mid_block\.att"),
        ({"in_channels": 10**9}, ValueError, "`in_channels` is 1000000000; it must be an integer in"),
        ({"layers_per_block": 10**6}, ValueError, "`layers_per_block` is 1000000; it must be an integer in"),
        ({"norm_eps": float("nan")}, ValueError, "`norm_eps` is nan; it must be a number above 0"),
        ({"block_out_channels": [2**19, 2**20]}, ValueError, r"would have .* weights or more; .* at most 1e\+10"),
    ],
)
def test_configs_of_other_networks_are_refused_at_once(changes, error, message, tmp_path):
    """Nothing is allocated for a network that the weights do not fit, or that is out of all proportion."""
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    start = time.process_time()
    with pytest.raises(error, match=message):
        CascadedUNet2DModel.from_pretrained(tmp_path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("layers", [64, (64,) * 15 + (1,)])
def test_too_many_blocks_in_all_levels_are_refused_at_once(layers):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"`layers_per_block` is .*blocks in 16 levels; it must make at most 128\."):
        build(sample_size=2**15, block_out_channels=(8,) * 16, layers_per_block=layers, attention_resolutions=())
    assert time.process_time() - start < 0.5


def test_loading_allocates_no_weights_before_it_reads_them(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    build_layers, devices = CascadedUNet2DModel._build_layers, set()

    def recording(self):
        build_layers(self)
        devices.add(torch.nn.Conv2d(1, 1, 1).weight.device.type)
        devices.add(torch.empty(1).device.type)

    monkeypatch.setattr(CascadedUNet2DModel, "_build_layers", recording)
    loaded = CascadedUNet2DModel.from_pretrained(tmp_path)
    assert devices == {"meta"} and {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_builds_and_runs_on_the_meta_device():
    """No value is read back on the way, so that nothing waits for a GPU."""
    with torch.device("meta"):
        model = CascadedUNet2DModel(**SUPER_RES)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.num_parameters() == CascadedUNet2DModel(**SUPER_RES).num_parameters()
    inputs = {name: values.to("meta") for name, values in inputs_of(model).items()}
    assert model(**inputs).sample.shape == (2, 6, 16, 16)


def test_output_as_a_tuple():
    model = build()
    (output,) = model(**inputs_of(model), return_dict=False)
    assert torch.equal(output, output_of(model))


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input

images = torch.zeros
wrong_inputs = [
    ("sample", None, "is None; it must be a tensor of shape (B, 3, H, W)"),
    ("sample", torch.tensor(1.0), "is of shape (); it must be a tensor of shape (B, 3, H, W)"),
    ("sample", [1.0], "is [1.0]; it must be a tensor"),
    ("low_res", [1.0], "is [1.0]; expected floats of shape (2, 3, 8, 8)"),
    ("sample", images(2, 3, 8, 8), "shape (2, 3, 8, 8); expected floats of shape (2, 3, 16, 16)"),
    ("sample", images(2, 1, 16, 16), "expected floats of shape (2, 3, 16, 16)"),
    ("sample", images(2, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
    ("timestep", 5.0, "type float; expected a torch.int64 tensor"),
    ("timestep", True, "type bool; expected a torch.int64 tensor"),
    ("timestep", None, "type NoneType; expected a torch.int64 tensor"),
    ("timestep", torch.tensor([0.5, 0.5]), "type torch.float32; expected a torch.int64 tensor"),
    ("timestep", torch.tensor([True, False]), "type torch.bool"),
    ("timestep", torch.tensor([1, 2, 3]), "shape (3,); expected (2,) or ()"),
    ("timestep", torch.tensor([[1], [2]]), "shape (2, 1); expected (2,) or ()"),
    ("class_labels", None, "`class_labels` is missing"),
    ("class_labels", torch.tensor([1.0, 2.0]), "type torch.float32; expected a torch.int64 tensor"),
    ("class_labels", [1, 2], "type list"),
    ("class_labels", torch.tensor([1, 2, 3]), "shape (3,); expected (2,) or ()"),
    ("low_res", None, "`low_res` is missing; this network takes images of size 8"),
    ("low_res", images(2, 3, 16, 16), "shape (2, 3, 16, 16); expected floats of shape (2, 3, 8, 8)"),
    ("low_res", images(1, 3, 8, 8), "expected floats of shape (2, 3, 8, 8)"),
    ("low_res", images(2, 1, 8, 8), "expected floats of shape (2, 3, 8, 8)"),
    ("low_res", images(2, 3, 8, 8, dtype=torch.int64), "torch.int64"),
    ("augmentation_level", None, "`augmentation_level` is missing"),
    ("augmentation_level", torch.tensor([0.1, 0.2]), "type torch.float32; expected a torch.int64 tensor"),
    ("augmentation_level", 100, "type int"),
    ("augmentation_level", torch.tensor([1]), "shape (1,); expected (2,) or ()"),
]


@pytest.mark.parametrize("name, value, message", wrong_inputs)
def test_wrong_inputs_are_named(name, value, message):
    model = build(SUPER_RES)
    with pytest.raises(ValueError) as error:
        output_of(model, **{name: value})
    assert f"`{name}`" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("name", ["class_labels", "low_res", "augmentation_level"])
def test_surplus_conditions_are_named(name):
    surplus = inputs_of(build(SUPER_RES))[name]
    with pytest.raises(ValueError, match=f"`{name}` was given to a network"):
        output_of(build(), **{name: surplus})


@pytest.mark.parametrize("level", [torch.tensor([3, 4]), torch.tensor([0.5, 0.5]).half(), torch.zeros(3), "0.5"])
def test_wrong_noise_levels_are_named(level):
    with pytest.raises(ValueError, match=r"`timestep` .*expected (a torch\.float32 tensor|\(2,\) or \(\))"):
        output_of(build(time_conditioning="noise_level"), timestep=level)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resnet_time_scale_shift": "ada_group"}, "`resnet_time_scale_shift` is 'ada_group'"),
        ({"downsample_type": "pool"}, "`downsample_type` is 'pool'"),
        ({"upsample_type": "nearest"}, "`upsample_type` is 'nearest'"),
        ({"time_conditioning": "sigma"}, "`time_conditioning` is 'sigma'"),
        ({"low_res_interpolation": "nearest"}, "`low_res_interpolation` is 'nearest'"),
        ({"sample_size": 17}, "`sample_size` is 17.*multiple of 2"),
        ({"block_out_channels": (8, 18)}, "must be multiples of `norm_num_groups`, which is 4"),
        ({"conv_in_channels": 6}, r"\(after `conv_in_channels`, 6\) must be multiples of `norm_num_groups`"),
        ({"attention_resolutions": (16, 4)}, r"`attention_resolutions` has \[4\]; .* \[16, 8\]"),
        ({"null_class": True}, "`null_class` needs `num_classes`"),
        ({"augmentation_level_embedding": True}, "`augmentation_level_embedding` needs `low_res_size`"),
        ({"low_res_size": 17}, r"`low_res_size` is 17; it must lie in 1\.\.`sample_size`, 16"),
        ({"low_res_size": 0}, "`low_res_size` is 0"),
        ({"attention_head_dim": None}, "exactly one of `num_attention_heads` and `attention_head_dim`"),
        ({"num_attention_heads": 2}, "exactly one of `num_attention_heads` and `attention_head_dim`"),
        ({"attention_head_dim": (4, 4, 4)}, "`attention_head_dim` has 3 entries for 2 levels"),
        ({"attention_head_dim": 5}, "`attention_head_dim` is 5 where there are 16 channels"),
        ({"attention_head_dim": None, "num_attention_heads": 3}, "`num_attention_heads` is 3 where there are 16"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CascadedUNet2DModel(**(BASE | changes))


def test_no_attention_needs_no_heads():
    without = BASE | {"attention_resolutions": (), "mid_block_attention": False}
    unets = [CascadedUNet2DModel(**without | {"attention_head_dim": width}) for width in (None, 4)]
    shapes = [{name: weights.shape for name, weights in unet.state_dict().items()} for unet in unets]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(UNetArguments)])
def test_arguments_of_no_sense_are_refused(name):
    for value in (float("nan"), float("inf"), -1, 1e9, 10**9, "x", {}, b"", [-1], [1.5], ["8"], [1] * 17, object()):
        start = time.process_time()
        with pytest.raises(ValueError, match=f"^`{name}` is .*; it must be "):
            CascadedUNet2DModel(**SUPER_RES | {name: value})
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_eps": 0.0}, "`norm_eps` is 0.0; it must be a number above 0 and at most 1"),
        ({"attention_head_dim": 0}, "`attention_head_dim` is 0"),
        ({"attention_head_dim": -4}, "`attention_head_dim` is -4"),
        ({"norm_num_groups": -4}, "`norm_num_groups` is -4"),
        ({"block_out_channels": ()}, r"`block_out_channels` is \(\); it must be a list of 1 to 16 values"),
        ({"sample_size": True}, "`sample_size` is True"),
        ({"learned_variance": 1}, "`learned_variance` is 1; it must be True or False"),
        ({"dropout": 1.0}, r"`dropout` is 1.0; it must be a number in \[0, 1\)"),
        ({"freq_shift": 4}, "`freq_shift` is 4; it must be below half of the 8 sinusoidal features"),
        ({"in_channels": 2**20, "block_out_channels": (2**11, 2**11)}, r"1e\+10: .*`in_channels` is 1048576"),
        ({"block_out_channels": (4000, 4000), "conv_in_channels": 2**20, "time_proj_dim": 32}, r"at most 1e\+10"),
        (
            {"sample_size": 2**20, "patch_size": 2**20, "in_channels": 2**10, "block_out_channels": (2**20,)}
            | {"attention_resolutions": ()},
            r"at most 1e\+10",
        ),
    ],
)
def test_wrong_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CascadedUNet2DModel(**(BASE | changes))


def test_heads_need_to_divide_only_levels_that_attend():
    build(attention_head_dim=16, attention_resolutions=(8,))
    with pytest.raises(ValueError, match="`attention_head_dim` is 16 where there are 8 channels"):
        build(attention_head_dim=16, attention_resolutions=(16, 8))
