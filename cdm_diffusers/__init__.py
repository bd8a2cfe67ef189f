"""Cascaded Diffusion Models (Ho et al., 2021) for Hugging Face Diffusers."""

from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .conditioning_augmentation import BlurConditioningAugmentation, GaussianConditioningAugmentation
from .losses import HybridLoss, SimpleLoss
from .models import CascadedUNet2DModel
from .pipelines import CascadedDiffusionPipeline, CascadedDiffusionPipelineOutput, SuperResolutionPipeline
from .presets import PRESETS, get_preset
from .schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler


# Saved pipelines name this package, not the files inside it, for their components. From the Hub, Diffusers loads
# components of the libraries in its table only, and finds the bases listed there in the library by their names.
LOADABLE_CLASSES[__name__] = {
    base.__name__: ["save_pretrained", "from_pretrained"] for base in (ModelMixin, SchedulerMixin)
}

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
