"""Diffusers' UNet2DModel to our networks and back: the same outputs, or an error that says why not."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from cdm_diffusers import CascadedDDPMScheduler, CascadedDiffusionPipeline, CascadedUNet2DModel
from cdm_diffusers.conversion import unet_from_diffusers, unet_to_diffusers
from cdm_diffusers.conversion.stages import convert_diffusers_pipeline, export_to_diffusers
from cdm_diffusers.conversion.unet_2d import scheduler_from_diffusers


# As google/ddpm-cifar10-32 and its family are configured, but smaller
DDPM = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,
    "attention_head_dim": 4,
}
VARIANTS = {
    "ddpm": {},
    "symmetric padding": {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5},
    "residual blocks": RESNETS,
    "classes and learned variance": {"num_class_embeds": 5, "out_channels": 6, "attention_head_dim": 8},
    "no attention in the middle": {"add_attention": False, "time_embedding_dim": 24},
}
OURS = {"sample_size": 16, "block_out_channels": (8, 16), "attention_resolutions": (8,), "norm_num_groups": 4}


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + 0.3 * (parameter.ndim == 1))
    return model.eval()


def outputs(model, num_classes=None):
    generator = torch.Generator().manual_seed(1)
    sample, times = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([3, 700])
    labels = None if num_classes is None else torch.tensor([0, num_classes - 1])
    with torch.no_grad():
        return model(sample, times, class_labels=labels).sample


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant):
    original = randomized(UNet2DModel(**(DDPM | VARIANTS[variant])))
    expected = outputs(original, original.config.num_class_embeds)
    ours = unet_from_diffusers(original)
    assert isinstance(ours, CascadedUNet2DModel)
    torch.testing.assert_close(outputs(ours, ours.config.num_classes), expected, rtol=1e-5, atol=1e-5)
    back = unet_to_diffusers(ours)
    assert type(back) is UNet2DModel
    torch.testing.assert_close(outputs(back, back.config.num_class_embeds), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"time_embedding_type": "fourier"}, "`time_embedding_type` of the UNet2DModel is 'fourier'"),
        ({"center_input_sample": True}, "`center_input_sample`"),
        ({"class_embed_type": "timestep"}, "`class_embed_type`"),
        ({"downsample_type": "resnet"}, "resample in different ways"),
        ({"resnet_time_scale_shift": "scale_shift"}, "`attn_norm_num_groups` is None"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D")}, "only mirrored blocks"),
    ],
)
def test_what_we_cannot_express(changes, message):
    with pytest.raises(ValueError, match=message):
        unet_from_diffusers(UNet2DModel(**(DDPM | changes)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 1, "low_res_size": 8}, "`low_res_size` 8"),
        ({"num_attention_heads": 1, "time_scale": 0.25}, "`time_scale` 0.25"),
        ({"num_attention_heads": 1, "time_conditioning": "noise_level"}, "`time_conditioning` 'noise_level'"),
        ({"num_attention_heads": 1, "skip_time_act": True, "skip_rescale": True}, "`skip_time_act`.*`skip_rescale`"),
        ({"num_attention_heads": 2, "attention_resolutions": (16, 8)}, r"heads of the widths \[4, 8\]"),
        ({"num_attention_heads": 1, "downsample_type": "resnet"}, "`downsample_type` and `upsample_type`"),
    ],
)
def test_what_diffusers_cannot_express(changes, message):
    with pytest.raises(ValueError, match=f"UNet2DModel cannot express .*{message}"):
        unet_to_diffusers(CascadedUNet2DModel(**(OURS | changes)))


def test_null_class_becomes_the_last_class():
    ours = randomized(CascadedUNet2DModel(**OURS, attention_head_dim=4, num_classes=3, null_class=True))
    theirs = unet_to_diffusers(ours)
    assert theirs.config.num_class_embeds == 4
    torch.testing.assert_close(outputs(theirs, 4), outputs(ours, 4))


def test_a_pipeline_as_a_stage_and_back(tmp_path):
    original = DDPMPipeline(randomized(UNet2DModel(**DDPM)), DDPMScheduler(variance_type="fixed_large"))
    original.save_pretrained(tmp_path / "theirs")
    notes = convert_diffusers_pipeline(str(tmp_path / "theirs"), tmp_path / "ours")
    assert "1000 steps, linear, fixed_large variance" in notes[0]
    pipe = CascadedDiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert pipe(num_inference_steps=2).images[0].size == (16, 16)
    table = pipe.base_scheduler.table.alphas_cumprod
    torch.testing.assert_close(table.float(), original.scheduler.alphas_cumprod, rtol=1e-3, atol=0)
    export_to_diffusers(tmp_path / "ours", tmp_path / "back")
    back = DDPMPipeline.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(outputs(back.unet), outputs(original.unet), rtol=1e-5, atol=1e-5)
    assert back.scheduler.config.variance_type == "fixed_large"
    assert back(num_inference_steps=2).images[0].size == (16, 16)


def test_schedulers_that_cannot_be_converted():
    unet = CascadedUNet2DModel(**OURS, num_attention_heads=1)
    for arguments in (
        {"trained_betas": [0.1, 0.2]},
        {"beta_schedule": "scaled_linear"},
        {"prediction_type": "flow"},
    ):
        with pytest.raises(ValueError):
            scheduler_from_diffusers(DDPMScheduler(**arguments), unet)
    scheduler = scheduler_from_diffusers(DDPMScheduler(100, beta_schedule="squaredcos_cap_v2"), unet)
    assert isinstance(scheduler, CascadedDDPMScheduler) and len(scheduler) == 100
