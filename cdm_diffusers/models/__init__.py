"""Networks of the cascade's stages."""

from .unet_2d_cascaded import CascadedUNet2DModel


__all__ = ["CascadedUNet2DModel"]
