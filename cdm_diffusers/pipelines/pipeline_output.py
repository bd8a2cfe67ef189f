"""What pipelines return."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class CascadedDiffusionPipelineOutput(BaseOutput):
    r"""
    Output of [`CascadedDiffusionPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            What the last stage made: a list of N images, an array `(N, H, W, C)` or a tensor `(N, C, H, W)`, the
            latter two float32 in [0, 1].
        stages (`dict[str, ...]`, *optional*):
            With `output_stages=True`, the same of every stage that ran, by its name. Under truncated sampling the
            stages before the last show z_s, noise included.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    stages: dict[str, list[PIL.Image.Image] | np.ndarray | torch.Tensor] | None = None
