"""Whether a run goes on with the images that it began with."""

import json
from pathlib import Path
from typing import Any

from diffusers.utils import logging

from ..data.fingerprints import differences
from ..files import read_json
from .checkpoints import loading


logger = logging.get_logger(__name__)

DATA_NAME = "data.json"


def check_same_data(checkpoint: Path, identity: dict[str, Any]) -> None:
    """
    Args:
        identity: of the images to go on with; see `data/fingerprints.py`. Earlier versions did not save it.

    Raises:
        ValueError: if `checkpoint` was trained on others; says what differs. Or as [`loading`].
    """
    file = checkpoint / DATA_NAME
    if not file.exists():
        logger.warning(f"{checkpoint} does not say what it was trained on: make sure that this is the same data.")
        return
    with loading(checkpoint):
        saved = read_json(file, dict[str, Any], "training")
        found = differences(saved, json.loads(json.dumps(identity)))
    if found:
        revision = f" (`--dataset_revision {saved['revision']}`)" if "revision" in saved else ""
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, but this is other data than it was trained on: "
            f"{'; '.join(found)}. Give the data of the first run{revision}, or another `output_dir` and no "
            "`resume_from_checkpoint`."
        )
