"""Separately trained stages joined into one cascade, in a folder with a model card."""

import json
from pathlib import Path
from typing import Any

from ..evaluation.tables import recognition_tables
from ..files import staged_folder, write_json
from ..model_cards import write_cascade_card
from ..pipelines import CascadedDiffusionPipeline
from .cards import add_sources
from .config import AssembleConfig


DEFAULTS = ("default_num_inference_steps", "default_augmentation_levels", "default_guidance_scales")


def assemble_cascade(config: AssembleConfig) -> None:
    """
    Writes the cascade of `config.base` and `config.super_res` into the folder `config.output`.

    Raises:
        ValueError: the stages do not fit each other, or the options do not fit them. Nothing is written then.
        OSError: a stage or file is not there.
    """
    cascade = CascadedDiffusionPipeline.from_stages(config.base, *config.super_res)
    if config.schedulers is not None:
        cascade = cascade.with_schedulers(config.schedulers)
    for name in DEFAULTS:
        if getattr(config, name) is not None:
            cascade.register_to_config(**{name: {**(cascade.config[name] or {}), **getattr(config, name)}})
    names = [stage.name for stage in cascade.stages]
    folders = dict(zip(names, map(Path, [config.base, *config.super_res]), strict=False))
    configs, sources = read_all(folders, "training_config.json"), read_all(folders, "source.json")
    recognition = None if config.recognition is None else json.loads(Path(config.recognition).read_text())
    with staged_folder(Path(config.output)) as folder:
        cascade.save_pretrained(folder)
        write_json(folder / "training_config.json", configs)
        if recognition is not None:
            write_json(folder / "recognition.json", recognition)
        if config.sample_grid is not None:
            (folder / "samples.png").write_bytes(Path(config.sample_grid).read_bytes())
        figures = None if recognition is None else recognition_tables(recognition)
        write_cascade_card(Path(config.output).name, cascade, configs, figures, folder)
        if sources:
            add_sources(folder / "README.md", sources, num_stages=len(names))
    print(f"Joined {len(names)} stages in {config.output}: {', '.join(names)}.")


def read_all(folders: dict[str, Path], file: str) -> dict[str, dict[str, Any]]:
    """The JSON `file` of each stage that has one."""
    return {
        name: json.loads((folder / file).read_text()) for name, folder in folders.items() if (folder / file).is_file()
    }
