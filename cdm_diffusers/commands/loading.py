"""Saved pipelines of either kind, where a command calls them."""

import torch

from ..evaluation.sample import DTYPES
from ..pipelines.loading import Pipeline, kind_of


def load_pipeline(name: str, dtype: str = "float32", device: str | None = None) -> Pipeline:
    """
    Args:
        name: folder or Hub id.
        dtype: of `DTYPES`.
        device: by default cuda where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return kind_of(name).from_pretrained(name, dtype=DTYPES[dtype]).to(device)
