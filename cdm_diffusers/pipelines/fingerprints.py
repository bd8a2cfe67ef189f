"""Hashes of networks and stages, by which they are recognised."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

from ..added import defaults_of_added
from ..models.arguments import UNetArguments
from .stages import CascadeStage


# Arguments of networks added in later versions, with their defaults: networks that do not use them keep their hashes.
ADDED_ARGUMENTS = defaults_of_added(UNetArguments)


def fingerprint(stages: Iterable[CascadeStage]) -> str:
    """A hash of all weights and configs that decide what the stages sample."""
    hashed = hashlib.sha256()
    for stage in stages:
        for part in (stage.unet, stage.scheduler, stage.noising_scheduler):
            config = {} if part is None else {k: v for k, v in part.config.items() if not k.startswith("_")}
            for name, default in ADDED_ARGUMENTS.items():
                if name in config and config[name] == default:
                    del config[name]
            hashed.update(json.dumps([stage.name, type(part).__name__, config], sort_keys=True).encode())
        _add_weights(hashed, stage.unet)
    return hashed.hexdigest()


def weights_fingerprint(module: torch.nn.Module) -> str:
    """A hash of all weights and their names."""
    hashed = hashlib.sha256()
    _add_weights(hashed, module)
    return hashed.hexdigest()


def _add_weights(hashed: Any, module: torch.nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        hashed.update(name.encode())
        hashed.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
