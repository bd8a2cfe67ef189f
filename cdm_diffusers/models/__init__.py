"""Networks of the cascade's stages."""

from typing import TYPE_CHECKING

from .._lazy import lazy


if TYPE_CHECKING:
    from .unet_2d_cascaded import CascadedUNet2DModel, constant_conditions

__all__ = ["CascadedUNet2DModel", "constant_conditions"]

__getattr__, __dir__ = lazy(__name__, {"unet_2d_cascaded": ["CascadedUNet2DModel", "constant_conditions"]})
