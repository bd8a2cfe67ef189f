"""Pipelines: a whole cascade, and one super-resolution stage on given images."""

from .pipeline_cascaded_diffusion import CascadedDiffusionPipeline
from .pipeline_output import CascadedDiffusionPipelineOutput
from .pipeline_super_resolution import SuperResolutionPipeline


__all__ = ["CascadedDiffusionPipeline", "CascadedDiffusionPipelineOutput", "SuperResolutionPipeline"]
