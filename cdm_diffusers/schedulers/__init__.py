"""Noise schedulers of the cascade's stages."""

from .scheduling_ddpm_cascaded import CascadedDDPMScheduler
from .scheduling_ddpm_continuous import ContinuousDDPMScheduler


__all__ = ["CascadedDDPMScheduler", "ContinuousDDPMScheduler"]
