"""Cascaded Diffusion Models (Ho et al., 2021) for Hugging Face Diffusers."""

from typing import TYPE_CHECKING

from ._lazy import lazy
from .registration import register


if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from .conditioning_augmentation import BlurConditioningAugmentation, GaussianConditioningAugmentation
    from .losses import DistillationLoss, HybridLoss, SimpleLoss
    from .models import CascadedUNet2DModel
    from .pipelines import CascadedDiffusionPipeline, CascadedDiffusionPipelineOutput, SuperResolutionPipeline
    from .presets import PRESETS, get_preset
    from .schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler

register()

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BlurConditioningAugmentation",
    "CascadedDDPMScheduler",
    "CascadedDiffusionPipeline",
    "CascadedDiffusionPipelineOutput",
    "CascadedUNet2DModel",
    "ContinuousDDPMScheduler",
    "DistillationLoss",
    "GaussianConditioningAugmentation",
    "HybridLoss",
    "ModelMixin",
    "SchedulerMixin",
    "SimpleLoss",
    "SuperResolutionPipeline",
    "get_preset",
]

# Nothing heavy is imported before it is used: `cdm --help` and misspelt options answer at once.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "conditioning_augmentation": ["BlurConditioningAugmentation", "GaussianConditioningAugmentation"],
        "losses": ["DistillationLoss", "HybridLoss", "SimpleLoss"],
        "models": ["CascadedUNet2DModel"],
        "pipelines": ["CascadedDiffusionPipeline", "CascadedDiffusionPipelineOutput", "SuperResolutionPipeline"],
        "presets": ["PRESETS", "get_preset"],
        "schedulers": ["CascadedDDPMScheduler", "ContinuousDDPMScheduler"],
        # Diffusers finds the bases of our components under these names in the library that saved them.
        "diffusers.models.modeling_utils": ["ModelMixin"],
        "diffusers.schedulers.scheduling_utils": ["SchedulerMixin"],
    },
)
