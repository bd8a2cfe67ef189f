"""What a saved pipeline says it consists of, checked before any of it is loaded."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils.hub_utils import _add_variant

from ..models import CascadedUNet2DModel


def load_index(kind: type[DiffusionPipeline], name: str | os.PathLike) -> dict[str, Any]:
    """
    `model_index.json` of a folder or of a Hub id.

    Raises:
        OSError: there is none, or it is not valid JSON.
        ValueError: it is not that of a pipeline, or a component that it names is not a network or scheduler.
    """
    try:
        index = kind.load_config(name)
    except RecursionError:
        index = []
    file = f"The model_index.json of {os.fspath(name)!r}"
    if not isinstance(index, dict):
        problem = f"is of type {type(index).__name__}; it must be an object"
    elif not isinstance(index.get("_class_name"), str | list):
        problem = f"has the `_class_name` {index.get('_class_name')!r}; it must be the name of a class"
    else:
        check_components(kind, index, file, name)
        return index
    raise ValueError(f"{file} {problem}: take a whole copy of the pipeline.")


def check_components(
    kind: type[DiffusionPipeline],
    index: Mapping[str, Any],
    file: str = "The model_index.json",
    folder: str | os.PathLike | None = None,
) -> None:
    """
    Args:
        file: what errors call it.
        folder: where components may carry their own code. Without it, checking such code is left to Diffusers.

    Raises:
        ValueError: an entry of `index` is not the library and class of a network or scheduler, as its name requires.
    """
    components, _ = kind._get_signature_keys(kind)
    for part in components:
        wanted = SchedulerMixin if part.endswith("scheduler") else CascadedUNet2DModel
        if part in index and not _is_component(part, index[part], wanted.__name__, folder):
            raise ValueError(
                f"{file} has {index[part]!r} as `{part}`; it must be [library, class] of a {wanted.__name__}, or "
                "[null, null] for none: take a whole copy of the pipeline, or import the library first if it is yours."
            )


def _is_component(part: str, entry: Any, wanted: str, folder: str | os.PathLike | None) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        return False
    library, name = entry
    if library is name is None:
        return True
    if not isinstance(library, str) or not isinstance(name, str) or hasattr(diffusers.pipelines, library):
        return False  # Diffusers' pipelines have folders of their own, which hold none of ours
    found = component_class(entry)
    if found is None and library not in LOADABLE_CLASSES:
        return folder is None or Path(folder, part, f"{library}.py").is_file()
    if hasattr(found, "_backends"):  # Diffusers itself says which dependency is missing
        return True
    # by name, since the code that a folder carries has classes of its own
    return wanted in [base.__name__ for base in getattr(found, "__mro__", ())]


def component_class(entry: Sequence[str]) -> Any:
    """The class that an entry [library, class] names, if that library is imported: a saved file imports none."""
    library, name = entry
    return getattr(sys.modules.get(library), name, None)


def check_complete(
    kind: type[DiffusionPipeline], name: str | os.PathLike, folder: str | os.PathLike, kwargs: dict[str, Any]
) -> None:
    """
    Args:
        name: of the folder or repository, for errors.
        folder: where its files are.
        kwargs: those of `from_pretrained`.

    Raises:
        OSError: a component's folder is missing.
        ValueError: `model_index.json` is that of another kind of pipeline, or weights are pickled.
    """
    index = load_index(kind, folder)
    components, _ = kind._get_signature_keys(kind)
    absent = [part for part in components if part not in (*index, *kwargs, *kind._optional_components)]
    if absent:
        raise ValueError(f"{name} holds a {index['_class_name']} without {absent}, which is not a {kind.__name__}.")
    for part in components:
        if part not in index or index[part][0] is None or part in kwargs:
            continue
        if not os.path.isdir(os.path.join(folder, part)):
            raise OSError(f"the folder of component `{part}` is missing: take a whole copy of the pipeline.")
        pickle, safetensors = (_weights_file(Path(folder, part), suffix, kwargs) for suffix in ("bin", "safetensors"))
        if kwargs["use_safetensors"] and pickle is not None and safetensors is None:
            raise ValueError(
                f"{name} holds the weights of `{part}` as a pickle, {pickle.name}; pickles are not read, "
                "since they can run code: if you trust it, load it once with `use_safetensors=False`, and save "
                "the pipeline with `save_pretrained`."
            )


def _weights_file(folder: Path, suffix: str, kwargs: dict[str, Any]) -> Path | None:
    """The file of weights, or the index of its shards, that loading with `kwargs` looks for."""
    names = (f"diffusion_pytorch_model.{suffix}", f"diffusion_pytorch_model.{suffix}.index.json")
    files = (folder / _add_variant(name, kwargs.get("variant")) for name in names)
    return next(filter(Path.is_file, files), None)
