"""Saved pipelines of either kind."""

import importlib

import torch
from diffusers import DiffusionPipeline

from ..evaluation.sample import DTYPES
from ..models import CascadedUNet2DModel
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..publishing import hub_errors


Pipeline = CascadedDiffusionPipeline | SuperResolutionPipeline
KINDS = {kind.__name__: kind for kind in (CascadedDiffusionPipeline, SuperResolutionPipeline)}


def kind_of(name: str) -> type[Pipeline]:
    """
    The class of the pipeline in a folder or on the Hub.

    Raises:
        ValueError: it is of another kind.
        OSError: there is none.
    """
    with hub_errors(name):
        found = DiffusionPipeline.load_config(name)["_class_name"]
    if isinstance(found, list):
        raise ValueError(f"`pipeline` is {name!r}, which carries its own code; give the folder it was exported from.")
    if found not in KINDS:
        raise ValueError(f"`pipeline` is {name!r}, which holds a {found}; it must hold {' or '.join(KINDS)}.")
    return KINDS[found]


def load_pipeline(name: str, dtype: str = "float32", device: str | None = None) -> Pipeline:
    """
    Args:
        name: folder or Hub id.
        dtype: of `DTYPES`.
        device: by default cuda where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return kind_of(name).from_pretrained(name, dtype=DTYPES[dtype]).to(device)


def load_without_weights(name: str) -> Pipeline:
    """The pipeline with networks on the meta device: all of its configuration, and nothing to compute with."""
    kind = kind_of(name)
    index = kind.load_config(name)
    parts = {}
    for part, value in index.items():
        if not isinstance(value, list) or value[0] is None:
            continue
        if value[1] == CascadedUNet2DModel.__name__:
            with torch.device("meta"):
                parts[part] = CascadedUNet2DModel.from_config(CascadedUNet2DModel.load_config(name, subfolder=part))
        else:
            parts[part] = scheduler_class(value).from_pretrained(name, subfolder=part)
    settings = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    return kind(**parts, **settings)


def scheduler_class(entry: list[str]) -> type:
    """What an entry [library, class] of `model_index.json` names: a scheduler of Diffusers or of this package."""
    library, name = entry
    if library not in ("diffusers", "cdm_diffusers"):
        raise ValueError(f"`model_index.json` names {library}.{name}; schedulers are Diffusers' or this package's.")
    return getattr(importlib.import_module(library), name)
