"""Saved pipelines of either kind, on the device where a command calls them."""

from ..evaluation.sample import DTYPES
from ..pipelines.loading import Pipeline, load_pipeline


def load_on_device(name: str, dtype: str, device: str) -> Pipeline:
    """
    Args:
        name: folder or Hub id.
        dtype: of `DTYPES`.
        device: where its networks run.
    """
    return load_pipeline(name, dtype=DTYPES[dtype]).to(device)
