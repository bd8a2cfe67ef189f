"""Saved pipelines of either kind, on the device where a command calls them."""

import torch

from ..evaluation.sample import DTYPES
from ..pipelines.loading import Pipeline, load_pipeline


def load_on_device(name: str, dtype: str = "float32", device: str | None = None) -> Pipeline:
    """
    Args:
        name: folder or Hub id.
        dtype: of `DTYPES`.
        device: by default cuda if available.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_pipeline(name, dtype=DTYPES[dtype]).to(device)
