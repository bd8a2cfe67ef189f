"""Foreign networks and checkpoints as networks and stages of this package, and back; `stages.py` has whole files."""

from typing import TYPE_CHECKING

from .._lazy import lazy


if TYPE_CHECKING:
    from .openai import unet_from_openai
    from .sr3 import unet_from_sr3
    from .state_dicts import read_state_dict
    from .unet_2d import unet_from_diffusers, unet_to_diffusers

__all__ = ["read_state_dict", "unet_from_diffusers", "unet_from_openai", "unet_from_sr3", "unet_to_diffusers"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "openai": ["unet_from_openai"],
        "sr3": ["unet_from_sr3"],
        "state_dicts": ["read_state_dict"],
        "unet_2d": ["unet_from_diffusers", "unet_to_diffusers"],
    },
)
