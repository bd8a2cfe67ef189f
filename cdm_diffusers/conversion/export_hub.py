"""The folder that a repository of the Hub should hold, on request with the code that samples it."""

import json
from pathlib import Path

import torch

from ..evaluation.tables import figures_table
from ..files import staged_folder, write_json
from ..hub import INDEX, hub_errors
from ..model_cards import CARD, REPORTS, is_ours, said_before, with_example, write_card
from ..pipelines.loading import check_output, load_without_weights, part_names
from ..pipelines.pipeline_base import PixelDiffusionPipeline
from ..publishing import prepare_if_asked, push_if_asked
from .config import HubExportConfig
from .self_contained import COMPONENTS, PACKAGE, sampling_code


PIPELINE_MODULE, COMPONENT_MODULE = "pipeline", "component"  # names of the files beside model_index.json
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def export_hub(config: HubExportConfig) -> None:
    """
    Writes the pipeline `config.pipeline` into `config.output`.

    Raises:
        ValueError: it is not a pipeline of this package, or `output` is its own folder or holds parts of another.
        OSError: there is no such pipeline.
    """
    output = Path(config.output)
    if output.resolve() == Path(config.pipeline).resolve():
        raise ValueError(f"`output` is {config.output!r}, the folder of the pipeline itself; it must be another one.")
    sketch = load_without_weights(config.pipeline)
    check_output(output, part_names(sketch))
    prepare_if_asked(config, output)
    with hub_errors(config.pipeline):
        pipeline = type(sketch).from_pretrained(config.pipeline)
    with staged_folder(output) as folder:
        pipeline.save_pretrained(folder)
        if config.variant is not None:
            cast = type(pipeline).from_pretrained(folder, dtype=VARIANTS[config.variant])
            cast.save_pretrained(folder, variant=config.variant)
        if config.self_contained:
            add_code(folder)
        location = config.hub_model_id or output.resolve().name
        refresh_card(pipeline, folder, location, config.self_contained, config.license)
    print(f"Wrote {output}.")
    push_if_asked(config, output)


def refresh_card(
    pipeline: PixelDiffusionPipeline, folder: Path, location: str, code: bool, license: str | None
) -> None:
    """Makes the card's example load from `location`; of a card that somebody wrote, all else stays."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8")
    if not is_ours(text):
        card.write_text(with_example(text, pipeline, location, code), encoding="utf-8")
        return
    reports = [folder / name for name in REPORTS if (folder / name).is_file()]
    tables = [figures_table(json.loads(report.read_text())) for report in reports]
    said = said_before(folder) | ({"license": license} if license else {})
    write_card(pipeline, folder, tables=tables, location=location, code=code, **said)


def add_code(folder: Path) -> None:
    """
    Makes a pipeline folder carry its code, and name it in `model_index.json`.

    Diffusers runs the files named there anew at every loading, from a folder for the code of all models, and copies
    with them what the first of them imports. So they only import the module with the code, whose name is its own.
    """
    name, code = sampling_code()
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    kind = index["_class_name"]
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    (folder / f"{PIPELINE_MODULE}.py").write_text(f"from .{name} import {kind}\n", encoding="utf-8")
    index["_class_name"] = [PIPELINE_MODULE, kind]
    for part, value in index.items():
        if isinstance(value, list) and value[0] == PACKAGE:
            component = f"from diffusers_modules.local.{name} import {', '.join(COMPONENTS)}\n"
            (folder / part / f"{COMPONENT_MODULE}.py").write_text(component, encoding="utf-8")
            index[part] = [COMPONENT_MODULE, value[1]]
    write_json(folder / INDEX, index)
