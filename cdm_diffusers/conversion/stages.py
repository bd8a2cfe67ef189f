"""Whole checkpoint files in, pipeline folders with a model card out."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel

from ..files import staged_folder, write_json
from ..model_cards import CONFIGURATION, SOURCE, write_card
from ..models import CascadedUNet2DModel
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.loading import PARTS, check_output, part_names
from . import openai, sr3
from .config import DiffusersConfig, ExportConfig, OpenAIConfig, SR3Config, settings_in
from .known_files import repository_of
from .openai_structure import OpenAISettings
from .openai_structure import read_structure as read_openai_structure
from .source import Source
from .state_dicts import read_state_dict
from .unet_2d import scheduler_from_diffusers, unet_from_diffusers, unet_to_diffusers


# Weights are written in files of at most this size: more than one of them is never held besides the network.
SHARD_SIZE = "500MB"
IMAGENET_CLASSES = 1000


def convert_openai_checkpoint(
    checkpoint: str | Path, output_dir: str | Path, given: OpenAISettings | None = None
) -> list[str]:
    r"""
    A checkpoint of improved-diffusion or guided-diffusion as a stage's pipeline folder: a base is a
    [`CascadedDiffusionPipeline`], an upsampler a [`SuperResolutionPipeline`].

    Args:
        checkpoint (`str` or `Path`): the file; under its published name it needs no settings.
        output_dir (`str` or `Path`): the folder.
        given ([`OpenAISettings`], *optional*): what shapes do not tell, for other networks.

    Returns:
        `list[str]`: what was assumed, and why.

    Raises:
        `ValueError`, `FileNotFoundError`: see [`read_state_dict`], [`unet_from_openai`] and [`check_output`].
    """
    path = Path(checkpoint)
    state_dict = read_state_dict(path)
    structure = read_openai_structure(state_dict)
    settings, known, notes = openai.resolve_settings(
        structure, given or OpenAISettings(), path.stem, needs_scheduler=True
    )
    unet = openai.build_unet(state_dict, structure, settings)
    scheduler = openai.build_scheduler(structure, settings)
    id2label = None
    if structure.num_classes == IMAGENET_CLASSES:
        id2label = imagenet_id2label()
        notes.append("class names: ImageNet's, since there are 1000 classes")
    steps = min(250 if known is None else known.num_inference_steps, settings.diffusion_steps)
    source = Source(
        file=path.name,
        repository=repository_of(structure),
        url=None if known is None else known.url,
        license="mit",
        data="unknown" if known is None else known.data,
        figures="unknown" if known is None else known.figures,
        assumptions=tuple(notes),
    )
    save_converted(converted_stage(unet, scheduler, steps, id2label), source, Path(output_dir))
    return notes


def convert_sr3_checkpoint(
    checkpoint: str | Path, output_dir: str | Path, given: sr3.SR3Settings | None = None
) -> list[str]:
    r"""
    An SR3 checkpoint (`_gen.pth`) as a stage's pipeline folder; arguments, result and errors are as in
    [`convert_openai_checkpoint`].
    """
    path = Path(checkpoint)
    state_dict = read_state_dict(path)
    structure = sr3.read_structure(state_dict)
    settings, notes = sr3.resolve_settings(state_dict, structure, given or sr3.SR3Settings(), needs_scheduler=True)
    unet = sr3.build_unet(state_dict, structure, settings)
    source = Source(
        file=path.name,
        repository=sr3.REPOSITORY,
        url=None,
        license="apache-2.0",
        data="faces (FFHQ, tested on CelebA-HQ), if this is a published checkpoint",
        figures="PSNR 23.26, SSIM 0.675 from 16x16 to 128x128; PSNR 19.87, SSIM 0.445 from 64x64 to 512x512 (README)",
        assumptions=tuple(notes),
    )
    stage = converted_stage(unet, sr3.build_scheduler(settings), settings.diffusion_steps, None)
    save_converted(stage, source, Path(output_dir))
    return notes


def convert_diffusers_pipeline(source: str, output_dir: str | Path) -> list[str]:
    r"""
    A pipeline of Diffusers around a `UNet2DModel` (`DDPMPipeline`, `DDIMPipeline`; a folder or Hub id) as a base
    stage; result and errors are as in [`convert_openai_checkpoint`].
    """
    pipeline = DiffusionPipeline.from_pretrained(source)
    if not isinstance(getattr(pipeline, "unet", None), UNet2DModel):
        raise ValueError(f"{source!r} holds a {type(pipeline).__name__}, not a pipeline around a UNet2DModel.")
    unet = unet_from_diffusers(pipeline.unet)
    scheduler = scheduler_from_diffusers(pipeline.scheduler, unet)
    notes = [
        f"diffusion process: {scheduler.config.num_train_timesteps} steps, {scheduler.config.beta_schedule}, "
        f"{scheduler.config.variance_type} variance (as in its {type(pipeline.scheduler).__name__})",
        "steps: all of them; fewer are spread by `linspace`, which is not Diffusers' default",
    ]
    card = Source(
        file=str(source).rstrip("/").rsplit("/", 1)[-1],
        repository="a pipeline of Diffusers",
        url=None,
        license="other",
        data="see the original's model card",
        figures="see the original's model card",
        assumptions=tuple(notes),
    )
    save_converted(converted_stage(unet, scheduler, None, None), card, Path(output_dir))
    return notes


def export_to_diffusers(stage: str, output_dir: str | Path):
    r"""
    The base network of a stage or cascade (folder or Hub id) as a `DDPMPipeline` around a plain `UNet2DModel`.

    That pipeline passes on no class labels: conditional networks are used through its `unet` and `scheduler`.

    Raises:
        `ValueError`: UNet2DModel cannot express the network, or the folder holds parts of another pipeline.
    """
    pipeline = CascadedDiffusionPipeline.from_pretrained(stage)
    unet = unet_to_diffusers(pipeline.base_unet)
    exported = DDPMPipeline(unet, DDPMScheduler.from_config(pipeline.base_scheduler.config))
    check_output(output_dir, part_names(exported))
    with staged_folder(Path(output_dir)) as folder:
        exported.save_pretrained(folder, max_shard_size=SHARD_SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def convert_openai(config: OpenAIConfig) -> None:
    """[`convert_openai_checkpoint`] with the options of the command line; prints what was assumed."""
    given = settings_in(config, OpenAISettings)
    print("\n".join(convert_openai_checkpoint(config.checkpoint, config.output, given)))


def convert_sr3(config: SR3Config) -> None:
    """[`convert_sr3_checkpoint`] with the options of the command line; prints what was assumed."""
    given = settings_in(config, sr3.SR3Settings)
    print("\n".join(convert_sr3_checkpoint(config.checkpoint, config.output, given)))


def convert_diffusers(config: DiffusersConfig) -> None:
    """[`convert_diffusers_pipeline`] with the options of the command line; prints what was assumed."""
    print("\n".join(convert_diffusers_pipeline(config.source, config.output)))


def export(config: ExportConfig) -> None:
    """[`export_to_diffusers`] with the options of the command line."""
    export_to_diffusers(config.stage, config.output)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def converted_stage(
    unet: CascadedUNet2DModel, scheduler: SchedulerMixin, num_inference_steps: int | None, id2label: dict | None
) -> CascadedDiffusionPipeline | SuperResolutionPipeline:
    """The pipeline of one stage. Foreign upsamplers are not trained with Gaussian augmentation, so none takes s."""
    if unet.config.low_res_size is not None:
        return SuperResolutionPipeline(
            unet, scheduler, id2label=id2label, default_num_inference_steps=num_inference_steps
        )
    steps = None if num_inference_steps is None else {"base": num_inference_steps}
    return CascadedDiffusionPipeline(unet, scheduler, id2label=id2label, default_num_inference_steps=steps)


def save_converted(pipeline: CascadedDiffusionPipeline | SuperResolutionPipeline, source: Source, output_dir: Path):
    """Writes the pipeline, its card and `source.json`; either all of it appears in `output_dir`, or nothing loads."""
    check_output(output_dir, part_names(pipeline), names=(*PARTS, CONFIGURATION))
    with staged_folder(output_dir) as folder:
        pipeline.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        write_json(folder / SOURCE, dataclasses.asdict(source))
        write_card(pipeline, folder, output_dir.resolve().name)


def imagenet_id2label() -> dict[int, str]:
    """ImageNet's class names in the order of the WordNet ids, as in the Hub's ILSVRC/imagenet-1k."""
    names = json.loads(files("cdm_diffusers.conversion").joinpath("imagenet_classes.json").read_text("utf-8"))
    return dict(enumerate(names))
