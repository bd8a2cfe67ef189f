"""Foreign networks and checkpoints as networks and stages of this package, and back; `stages.py` has whole files."""

from .openai import unet_from_openai
from .sr3 import unet_from_sr3
from .state_dicts import read_state_dict
from .unet_2d import unet_from_diffusers, unet_to_diffusers


__all__ = ["read_state_dict", "unet_from_diffusers", "unet_from_openai", "unet_from_sr3", "unet_to_diffusers"]
