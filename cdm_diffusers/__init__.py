"""Cascaded Diffusion Models (Ho et al., 2021) for Hugging Face Diffusers."""

# Saved pipelines name this module for their components, and Diffusers then looks for these two bases in it.
from diffusers import ModelMixin, SchedulerMixin

from .conditioning_augmentation import BlurConditioningAugmentation, GaussianConditioningAugmentation
from .losses import HybridLoss, SimpleLoss
from .models import CascadedUNet2DModel
from .pipelines import (
    CascadedDiffusionPipeline,
    CascadedDiffusionPipelineOutput,
    SuperResolutionPipeline,
)
from .presets import PRESETS, get_preset
from .schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler


# Checkpoints name the public package, so that files inside it can move.
for component in (CascadedUNet2DModel, CascadedDDPMScheduler, ContinuousDDPMScheduler):
    component.__module__ = __name__
del component

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BlurConditioningAugmentation",
    "CascadedDDPMScheduler",
    "CascadedDiffusionPipeline",
    "CascadedDiffusionPipelineOutput",
    "CascadedUNet2DModel",
    "ContinuousDDPMScheduler",
    "GaussianConditioningAugmentation",
    "HybridLoss",
    "ModelMixin",
    "SchedulerMixin",
    "SimpleLoss",
    "SuperResolutionPipeline",
    "get_preset",
]
