"""A cascade of three tiny stages of the paper's kinds: cosine base, Gaussian augmentation, continuous noise levels."""

import torch

from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    CascadedUNet2DModel,
    ContinuousDDPMScheduler,
)


SIZES = {"base": 4, "super_res_1": 8, "super_res_2": 16}


def small_cascade(num_stages=3, num_classes=3, **config):
    """4x4 -> 8x8 -> 16x16, one channel, T = 20 (40 in the last stage); all classes have a null class beside them."""
    torch.manual_seed(0)
    shared = {
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "attention_resolutions": (),
        "mid_block_attention": False,
        "num_attention_heads": 1,
        "num_classes": num_classes,
        "null_class": num_classes is not None,
    }
    scheduler = CascadedDDPMScheduler(num_train_timesteps=20, variance_type="fixed_small")
    parts = {
        "base_unet": CascadedUNet2DModel(sample_size=4, **shared),
        "base_scheduler": scheduler,
        "super_res_1_unet": CascadedUNet2DModel(
            sample_size=8, low_res_size=4, augmentation_level_embedding=True, **shared
        ),
        "super_res_1_scheduler": scheduler,
        "super_res_1_noising_scheduler": scheduler,
        "super_res_2_unet": CascadedUNet2DModel(
            sample_size=16, low_res_size=8, time_conditioning="noise_level", **shared
        ),
        "super_res_2_scheduler": ContinuousDDPMScheduler(num_train_timesteps=40),
    }
    names = list(SIZES)[:num_stages]
    parts = {name: part for name, part in parts.items() if name.startswith(tuple(names))}
    config.setdefault("default_num_inference_steps", dict.fromkeys(names, 3))
    if num_stages > 1:
        config.setdefault("default_augmentation_levels", {"super_res_1": 5})
    if num_classes is not None:
        config.setdefault("id2label", {0: "T-shirt/top", 1: "Trouser", 2: "Ankle boot"})
    pipeline = CascadedDiffusionPipeline(**parts, source_resolution=16, **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
