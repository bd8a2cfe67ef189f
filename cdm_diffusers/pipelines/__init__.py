"""Pipelines: a whole cascade, and one super-resolution stage on given images."""

from typing import TYPE_CHECKING

from .._lazy import lazy


if TYPE_CHECKING:
    from .pipeline_cascaded_diffusion import CascadedDiffusionPipeline
    from .pipeline_output import CascadedDiffusionPipelineOutput
    from .pipeline_super_resolution import SuperResolutionPipeline

__all__ = ["CascadedDiffusionPipeline", "CascadedDiffusionPipelineOutput", "SuperResolutionPipeline"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "pipeline_cascaded_diffusion": ["CascadedDiffusionPipeline"],
        "pipeline_output": ["CascadedDiffusionPipelineOutput"],
        "pipeline_super_resolution": ["SuperResolutionPipeline"],
    },
)
