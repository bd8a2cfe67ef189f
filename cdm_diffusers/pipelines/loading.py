"""Saved pipelines of either kind, what they consist of without their weights, and folders to save them in."""

from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..hub import check_reached, hub_errors
from ..models import CascadedUNet2DModel
from . import CascadedDiffusionPipeline, SuperResolutionPipeline
from .model_index import component_class, load_index
from .pipeline_cascaded_diffusion import STAGE_NAMES, STAGE_PARTS


Pipeline = CascadedDiffusionPipeline | SuperResolutionPipeline
# All that a pipeline of either kind consists of.
PARTS = (*STAGE_PARTS, *(f"{name}_{part}" for name in STAGE_NAMES for part in STAGE_PARTS))
KINDS = {kind.__name__: kind for kind in (CascadedDiffusionPipeline, SuperResolutionPipeline)}


def kind_of(name: str, argument: str = "pipeline") -> type[Pipeline]:
    """
    The class of the pipeline in a folder or on the Hub; `argument` is what errors call it.

    Raises:
        ValueError: it is of another kind.
        OSError: there is none.
    """
    check_reached(name)
    with hub_errors(name):
        found = load_index(DiffusionPipeline, name)["_class_name"]
    if isinstance(found, list):
        raise ValueError(
            f"`{argument}` is {name!r}, which carries its own code; give the folder it was exported from."
        )
    if found not in KINDS:
        raise ValueError(f"`{argument}` is {name!r}, which holds a {found}; it must hold {' or '.join(KINDS)}.")
    return KINDS[found]


def load_pipeline(name: str, **options) -> Pipeline:
    """
    The pipeline in a folder or on the Hub, of either kind; `options` are those of `from_pretrained`.

    Raises:
        ValueError, OSError: as [`kind_of`].
    """
    return kind_of(name).from_pretrained(name, **options)


def load_without_weights(name: str) -> Pipeline:
    """The pipeline with networks on the meta device: all of its configuration, and nothing to compute with."""
    kind = kind_of(name)
    index = load_index(kind, name)
    components, arguments = kind._get_signature_keys(kind)
    parts = {}
    for part in components:
        value = index.get(part) or [None, None]
        if value[0] is None:
            continue
        found = component_class(value)
        if found is None:
            raise ValueError(f"`pipeline` is {name!r}, whose `{part}` carries its own code; it must not: {value}.")
        if issubclass(found, CascadedUNet2DModel):
            with torch.device("meta"):
                parts[part] = found.from_config(found.load_config(name, subfolder=part))
        else:
            parts[part] = found.from_pretrained(name, subfolder=part)
    if absent := [part for part in components if part not in (*parts, *kind._optional_components)]:
        raise ValueError(f"`pipeline` is {name!r}, a {kind.__name__} without {absent}: take a whole copy of it.")
    return kind(**parts, **{key: index[key] for key in arguments if key in index})


def check_output(
    output: str | Path, written: Collection[str], argument: str = "output", names: Collection[str] = PARTS
) -> None:
    """
    Refuses a folder in which something of another pipeline would stay beside what is to be saved.

    Args:
        output: the folder.
        written: names of what is new there, or written over.
        argument: what errors call the folder.
        names: what is looked for.

    Raises:
        ValueError: one of `names` is there, and not in `written`.
    """
    if left := [name for name in names if name not in written and Path(output, name).exists()]:
        raise ValueError(
            f"`{argument}` is {str(output)!r}, which already holds {', '.join(left)}: move what is there away, or "
            "give another folder, so that no files of two pipelines mix."
        )


def part_names(pipeline: DiffusionPipeline) -> set[str]:
    """The names of the folders that a saved pipeline consists of."""
    return {name for name, part in pipeline.components.items() if part is not None}
