"""Options of the commands that convert, join and export."""

import dataclasses
from typing import Any, Literal

from ..options import Fraction, HubOptions, NonNegativeInt, PositiveFloat, PositiveInt, option, options
from ..pipelines.solver_names import SolverName


@options
class AssembleConfig(HubOptions):
    """
    Join separately trained stages into one cascade, checking that they fit, with a model card.

    Example:
        cdm assemble --base runs/base --super_res runs/sr-1 runs/sr-2 --output my-cascade
        cdm assemble --base runs/base --super_res runs/sr --output my-cascade --schedulers unipc \\
            --default_num_inference_steps base=25 super_res_1=10
        cdm assemble --base runs/base --super_res runs/sr --output my-cascade --license cc-by-4.0 \\
            --push_to_hub --hub_model_id me/my-cascade
    """

    base: str = option("Folder or Hub id of the base stage, or of a cascade to extend.")
    super_res: list[str] = option("Folders or Hub ids of up to three super-resolution stages, from low to high.", [])
    output: str = option("Folder for the cascade.")
    default_num_inference_steps: dict[str, PositiveInt] | None = option(
        "Steps of each stage. Default: the stages' own.", None
    )
    default_augmentation_levels: dict[str, NonNegativeInt] | None = option(
        "s of each stage. Default: the stages' own.", None
    )
    default_guidance_scales: dict[str, float] | None = option("w of each stage. Default: the stages' own.", None)
    schedulers: SolverName | dict[str, SolverName] | None = option(
        "Solver of all stages, or of each. Default: the stages' own.", None
    )
    recognition: str | None = option("JSON of `cdm recognition`, for the model card.", None)
    sample_grid: str | None = option("PNG of samples, for the model card.", None)


@options
class OpenAIConfig:
    """
    Convert a checkpoint of improved-diffusion or guided-diffusion into a stage of a cascade. The 19 published files
    need no further option; other networks of these repositories need what their weights' shapes do not tell.

    Example:
        cdm convert openai 64x64_diffusion.pt --output imagenet-64
    """

    checkpoint: str = option("The file (.pt, or safetensors with the same names).", positional=True)
    output: str = option("Folder for the stage.")
    image_size: PositiveInt | None = option("Height and width of the images (upsampler: `large_size`).", None)
    low_res: PositiveInt | None = option("Height and width of an upsampler's input (`small_size`).", None)
    num_heads: PositiveInt | None = option("Number of attention heads.", None)
    num_head_channels: PositiveInt | None = option("Width of the attention heads.", None)
    new_attention_order: bool | None = option("As `use_new_attention_order`.", None)
    rescale_timesteps: bool | None = option("Whether times are rescaled to 0..1000.", None)
    noise_schedule: Literal["cosine", "linear"] | None = option("Noise schedule of the training.", None)
    diffusion_steps: PositiveInt | None = option("Steps of the training, T.", None)
    dropout: Fraction | None = option("Dropout, which only matters to further training.", None)


@options
class SR3Config:
    """
    Convert an SR3 checkpoint (Janspiry's implementation, `_gen.pth`) into a stage of a cascade. Networks of the
    published configurations need no further option; others need what their weights' shapes do not tell.

    Example:
        cdm convert sr3 I640000_E37_gen.pth --output faces-16-to-128
    """

    checkpoint: str = option("The file that ends in _gen.pth.", positional=True)
    output: str = option("Folder for the stage.")
    image_size: PositiveInt | None = option("Height and width of the images (`r_resolution`).", None)
    low_res: PositiveInt | None = option("Height and width of the input (`l_resolution`).", None)
    norm_groups: PositiveInt | None = option("Groups of the group norms.", None)
    diffusion_steps: PositiveInt | None = option("Steps of the training, T; most files carry them.", None)
    linear_start: PositiveFloat | None = option("First beta of the training; most files carry it.", None)
    linear_end: PositiveFloat | None = option("Last beta of the training; most files carry it.", None)
    low_res_interpolation: Literal["pillow_bicubic", "bicubic", "bilinear"] | None = option(
        "How low-resolution images are enlarged. Default: as SR3's data preparation does.", None
    )
    dropout: Fraction | None = option("Dropout, which only matters to further training.", None)


@options
class DiffusersConfig:
    """
    Convert a pipeline of Diffusers around a UNet2DModel (the DDPM family) into a base stage of a cascade.

    Example:
        cdm convert diffusers google/ddpm-cifar10-32 --output cifar10-32
    """

    source: str = option("Folder or Hub id of the pipeline.", positional=True)
    output: str = option("Folder for the stage.")


@options
class TrainingCheckpointConfig:
    """
    Convert a checkpoint of `cdm train` into a stage, with its averaged or its last weights.

    Example:
        cdm convert checkpoint runs/base/checkpoint-1000 --output base-1000
    """

    checkpoint: str = option("The checkpoint's folder.", positional=True)
    output: str = option("Folder for the stage.")
    weights: Literal["ema", "raw"] = option("Averaged or last weights.", "ema")


@options
class ExportConfig:
    """
    Export the base of a stage or cascade as a plain DDPMPipeline around Diffusers' UNet2DModel, where that can express
    it.

    Example:
        cdm export imagenet-64 --output imagenet-64-diffusers
    """

    stage: str = option("Folder or Hub id of the stage or cascade.", positional=True)
    output: str = option("Folder for the pipeline.")


@options
class HubExportConfig(HubOptions):
    """
    Write the folder that a repository of the Hub should hold: the pipeline with its card and pictures, without the
    checkpoints and logs of its training; on request with the code that samples it, for those who have Diffusers alone.

    Example:
        cdm export hub my-cascade --output my-cascade-hub --variant fp16
        cdm export hub my-cascade --output my-cascade-alone --self_contained --push_to_hub --hub_model_id me/my-cascade
    """

    pipeline: str = option("Folder or Hub id of a stage or cascade.", positional=True)
    output: str = option("Another folder, for the result.")
    self_contained: bool = option(
        "Add the code, so that DiffusionPipeline.from_pretrained(..., trust_remote_code=True) needs no cdm_diffusers.",
        False,
    )
    variant: Literal["fp16", "bf16"] | None = option('Half-precision weights, too, for `variant="fp16"`.', None)


def settings_in(config: Any, kind: type) -> Any:
    """A `kind` from the options of `config` that are called like its fields."""
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})
