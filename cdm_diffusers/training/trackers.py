"""Where curves and pictures of a training go besides its folder."""

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from ..options.problems import did_you_mean


def check_tracker(report_to: str) -> None:
    """
    Args:
        report_to: the name of a tracker, "all" for those that are installed, or "none".

    Raises:
        ValueError: there is no such tracker, or it is not installed.
    """
    if report_to == "none":
        return
    installed, known = [str(tracker) for tracker in get_available_trackers()], LoggerType.list()
    if report_to not in known:
        choices, hint = ", ".join(["none", *known]), did_you_mean(report_to, known, "--report_to ")
        raise ValueError(f"`report_to` is {report_to!r}; it must be one of {choices}{hint}")
    if report_to == "all" and not installed:
        raise ValueError("`report_to` is 'all', but no tracker is installed: pip install tensorboard.")
    if report_to != "all" and report_to not in installed:
        raise ValueError(f"`report_to` is {report_to!r}, which is not installed: pip install {report_to}.")


def log_sample_grid(accelerator: Accelerator, grid: Image.Image, step: int) -> None:
    """Sends the picture to the trackers for which accelerate has a common way to send pictures."""
    pixels = np.asarray(grid)[None]  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation/samples": pixels}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation/samples": pixels}, step=step)
