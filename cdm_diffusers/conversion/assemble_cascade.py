"""Separately trained stages joined into one cascade, in a folder with a model card."""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.tables import figures_table
from ..files import staged_folder, write_json
from ..model_cards import (
    CARD,
    CONFIGURATION,
    DOCUMENTS,
    GRID,
    REPORTS,
    SOURCE,
    by_stage,
    check_report,
    is_ours,
    said_before,
    write_card,
)
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.loading import PARTS, check_output, kind_of, load_without_weights, part_names
from ..publishing import find_document, prepare_if_asked, push_if_asked
from .config import AssembleConfig


DEFAULTS = ("default_num_inference_steps", "default_augmentation_levels", "default_guidance_scales")


def assemble_cascade(config: AssembleConfig) -> None:
    """
    Writes the cascade of `config.base` and `config.super_res` into the folder `config.output`, and uploads it where
    `config.push_to_hub` says so.

    Raises:
        ValueError: the stages do not fit each other, the options do not fit them, or the folder holds something of
            another pipeline. Nothing is written then.
        OSError: a stage or file is not there, or the Hub refuses.
    """
    output = Path(config.output)
    check_kinds(config)
    check_is_no_stage(output, config)
    places = inputs_of(config)
    sketch = joined(config, map(load_without_weights, places))
    names = [stage.name for stage in sketch.stages]
    configs, sources = documents(places, CONFIGURATION, names), documents(places, SOURCE, names)
    recognition = None if config.recognition is None else json.loads(Path(config.recognition).read_text())
    if recognition is not None:
        check_report(recognition, sketch, config.recognition)
    grid = None if config.sample_grid is None else Path(config.sample_grid).read_bytes()
    written = {CARD, CONFIGURATION, *part_names(sketch)}
    written |= {name for name, content in ((SOURCE, sources), (REPORTS[0], recognition), (GRID, grid)) if content}
    check_output(output, written, names=(*PARTS, *DOCUMENTS))
    prepare_if_asked(config, output)
    cascade = joined(config, places)
    with staged_folder(output) as folder:
        cascade.save_pretrained(folder)
        write_json(folder / CONFIGURATION, configs)
        if sources:
            write_json(folder / SOURCE, sources)
        if recognition is not None:
            write_json(folder / REPORTS[0], recognition)
        if grid is not None:
            (folder / GRID).write_bytes(grid)
        tables = [] if recognition is None else [figures_table(recognition)]
        license = config.license or common_license(places)
        write_card(cascade, folder, output.resolve().name, tables, license=license)
    print(
        f"Joined {len(names)} stages in {config.output}: {', '.join(names)}. Next, for example:\n"
        f"  cdm sample {shlex.quote(config.output)} --output samples.png"
    )
    push_if_asked(config, output)


def joined(config: AssembleConfig, stages: Iterable[str | CascadedDiffusionPipeline | SuperResolutionPipeline]):
    """
    The cascade of `stages`, with the schedulers and defaults that `config` has.

    Raises:
        ValueError: the stages do not fit each other, or the options do not fit them.
    """
    cascade = CascadedDiffusionPipeline.from_stages(*stages)
    if config.schedulers is not None:
        cascade = cascade.with_schedulers(config.schedulers)
    for name in DEFAULTS:
        if getattr(config, name) is not None:
            cascade.register_to_config(**{name: {**(cascade.config[name] or {}), **getattr(config, name)}})
    if times := cascade.config.get("default_timesteps"):  # of stages that are given no number of steps instead
        given = config.default_num_inference_steps or {}
        cascade.register_to_config(default_timesteps={stage: of for stage, of in times.items() if stage not in given})
    return cascade


def check_kinds(config: AssembleConfig) -> None:
    """
    Raises:
        ValueError: a base where a super-resolution stage belongs, or the other way round.
        OSError: a stage is not there.
    """
    kinds = [("base", CascadedDiffusionPipeline), *[("super_res", SuperResolutionPipeline)] * len(config.super_res)]
    for (name, kind), place in zip(kinds, inputs_of(config), strict=True):
        found = kind_of(place, name)
        if found is not kind:
            raise ValueError(
                f"`{name}` has {place!r}, which holds a {found.__name__}; it must hold a {kind.__name__}: bases are "
                "given as `base`, super-resolution stages as `super_res`."
            )


def check_is_no_stage(output: Path, config: AssembleConfig) -> None:
    """
    Raises:
        ValueError: the output folder is that of a stage.
    """
    if any(Path(place).is_dir() and output.resolve() == Path(place).resolve() for place in inputs_of(config)):
        raise ValueError(f"`output` is {config.output!r}, which is one of the stages: give another folder.")


def inputs_of(config: AssembleConfig) -> list[str]:
    """Folders or Hub ids of all stages."""
    return [config.base, *config.super_res]


def documents(places: Sequence[str], file: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """
    The JSON `file` of each stage that has one.

    Args:
        places: folders or Hub ids of the base, or of a cascade of several stages, and of what follows it.
        file: its name.
        names: all stages.
    """
    found, num_first = {}, len(names) - len(places) + 1
    for number, place in enumerate(places):
        document = find_document(place, file)
        if document is not None:
            of_place = names[:num_first] if number == 0 else names[num_first + number - 1 :]
            found |= by_stage(json.loads(document.read_text()), of_place)
    return found


def common_license(places: Sequence[str]) -> str | None:
    """The licence that the cards of all stages name, where this package wrote them as somebody asked."""
    cards = [find_document(place, CARD) for place in places]
    if not all(card is not None and is_ours(card.read_text(encoding="utf-8")) for card in cards):
        return None
    licenses = {said_before(card.parent).get("license") for card in cards}
    return licenses.pop() if len(licenses) == 1 else None
