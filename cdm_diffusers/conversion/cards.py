"""Model cards of converted stages, and what a cascade's card says of them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..model_cards import table, usage


@dataclass(frozen=True)
class Source:
    r"""
    Where a converted stage comes from.

    Args:
        file (`str`): the converted file or repository.
        repository (`str`): where the original code is.
        url (`str`, *optional*): where the file is published.
        license (`str`): of the weights, by the Hub's identifiers.
        data (`str`), figures (`str`): what it was trained on, and what its publishers measured.
        assumptions (`tuple[str, ...]`): what the conversion assumed.
    """

    file: str
    repository: str
    url: str | None
    license: str
    data: str
    figures: str
    assumptions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def write_converted_card(name: str, pipeline: Any, source: Source, folder: Path):
    """Writes `README.md` into the folder of a converted stage."""
    is_upsampler = type(pipeline).__name__ == "SuperResolutionPipeline"
    config = (pipeline.unet if is_upsampler else pipeline.base_unet).config
    kind = f"{config.low_res_size} to {config.sample_size} pixels" if is_upsampler else f"{config.sample_size} pixels"
    card_data = ModelCardData(
        license=source.license,
        library_name="diffusers",
        pipeline_tag="image-to-image" if is_upsampler else "unconditional-image-generation",
        tags=["cdm_diffusers", "cascaded-diffusion", type(pipeline).__name__],
    )
    origin = {
        "converted from": source.file,
        "published at": source.url or "unknown",
        "original code": source.repository,
        "licence of the weights": source.license,
        "trained on": source.data,
        "figures of its publishers": source.figures,
    }
    sections = [
        f"---\n{card_data.to_yaml()}\n---",
        f"# {name}: a stage of a cascade, {kind}",
        "Weights of others, converted for `cdm_diffusers`, which neither trained nor measured them. What they can do, "
        "and what they should not be used for, is said by their publishers.",
        f"## How to use\n\n```python\n{usage(pipeline, {'id2label': pipeline.config.id2label})}\n```",
        f"## Where it comes from\n\n{table(origin)}",
        "## What the conversion assumed\n\n"
        "The weights' shapes tell the rest. A network that was trained further on another noise schedule has the same "
        "shapes, and would need other settings.\n\n" + "\n".join(f"- {line}" for line in source.assumptions),
    ]
    ModelCard("\n\n".join(sections) + "\n").save(folder / "README.md")


def add_sources(card_path: Path, sources: dict[str, dict[str, Any]], num_stages: int):
    r"""
    Says in the card of a cascade which of its stages were converted from where, and under which licence.

    Args:
        card_path (`Path`): the cascade's `README.md`.
        sources (`dict`): for each converted stage's name its `source.json`.
        num_stages (`int`): how many stages there are; those without source are under the licence of the card.
    """
    card = ModelCard.load(card_path)
    licenses = {source["license"] for source in sources.values()}
    if len(sources) < num_stages:
        licenses.add(card.data.license)
    rows = [
        f"| {name} | {s['file']} | {s['repository']} | {s['license']} | {s['data']} |" for name, s in sources.items()
    ]
    head = "| stage | converted from | original code | licence | trained on |\n|---|---|---|---|---|"
    text = "Their weights are as published; `cdm_diffusers` neither trained nor measured them."
    card.text = "\n".join([card.text.rstrip(), "", "## Converted stages", "", head, *rows, "", text, ""])
    card.data.license = licenses.pop() if len(licenses) == 1 else "other"
    card.save(card_path)


def say_which_weights(card_path: Path, weights: str, step: int):
    """Corrects the card of a stage made from a checkpoint: whether its weights are averages, and of which step."""
    card = ModelCard.load(card_path)
    kind = "the EMA weights" if weights == "ema" else "the last weights, not their average,"
    card.text = card.text.replace("These are the EMA weights.", f"These are {kind} of the checkpoint at step {step}.")
    card.save(card_path)
