"""Noise schedulers of the cascade's stages."""

from typing import TYPE_CHECKING

from .._lazy import lazy


if TYPE_CHECKING:
    from .scheduling_ddpm_cascaded import CascadedDDPMScheduler
    from .scheduling_ddpm_continuous import ContinuousDDPMScheduler

__all__ = ["CascadedDDPMScheduler", "ContinuousDDPMScheduler"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "scheduling_ddpm_cascaded": ["CascadedDDPMScheduler"],
        "scheduling_ddpm_continuous": ["ContinuousDDPMScheduler"],
    },
)
