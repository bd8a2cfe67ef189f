"""The model card of a folder, by itself."""

import json
import shutil
from pathlib import Path

from ..evaluation.tables import figures_table
from ..model_cards import CARD, GRID, REPORTS, check_report, is_ours, said_before, write_card
from ..pipelines.loading import Pipeline, load_without_weights
from .config import CardConfig


def write(config: CardConfig) -> None:
    """
    Writes `README.md` into `config.folder`; nothing is changed if anything is wrong.

    Raises:
        ValueError: the existing card was written by hand, or a file of figures is not one of this pipeline.
        OSError: there is no such folder or file.
    """
    folder = Path(config.folder)
    pipeline = load_without_weights(config.folder)
    card = folder / CARD
    if card.is_file() and not config.overwrite and not is_ours(card.read_text(encoding="utf-8")):
        raise ValueError(f"{str(card)!r} was written or changed by hand; --overwrite replaces it.")
    kept = dict(kept_report(file, pipeline) for file in config.figures)
    if config.sample_grid is not None:
        shutil.copyfile(config.sample_grid, folder / GRID)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    given = {name: getattr(config, name) for name in ("title", "license", "dataset_name")}
    said = said_before(folder) | {name: value for name, value in given.items() if value is not None}
    reports = [folder / name for name in REPORTS if (folder / name).is_file()]
    tables = [figures_table(json.loads(report.read_text())) for report in reports]
    name = folder.resolve().name
    write_card(pipeline, folder, **{"title": name, "location": name, "tables": tables, **said})
    print(f"Wrote {card}; licence: {said.get('license') or 'none given, which the card says'}.")


def kept_report(file: str, pipeline: Pipeline) -> tuple[str, bytes]:
    """The name in a pipeline's folder of a report, by what measured it, and its content."""
    content = Path(file).read_bytes()
    report = json.loads(content)
    if "recognised" not in report and not {"extractor", "figures"} <= report.keys():
        raise ValueError(f"`figures` has {file!r}, which is not JSON of `cdm recognition` or `cdm evaluate`.")
    check_report(report, pipeline, file)
    return REPORTS[0 if "recognised" in report else 1], content
