"""The command `cdm app`."""

import os
import signal
import sys
import tempfile

from ..commands.loading import load_on_device
from ..pipelines import CascadedDiffusionPipeline
from .config import AppConfig


SECONDS_TO_END = 8  # fewer than most programs that stop others wait before they kill


def serve(config: AppConfig) -> None:
    """
    Shows `config.pipeline` until SIGINT or SIGTERM.

    Raises:
        ValueError: the pipeline is not a cascade.
        OSError: there is none, or there is no such address or free port on this machine.
        ModuleNotFoundError: Gradio is not installed.
    """
    # oneDNN keeps a kernel for each size of batch: by default 1,024 of them, hundreds of megabytes
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with tempfile.TemporaryDirectory(prefix="cdm-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # which Gradio reads when it is imported, too
        from .generation import ending_sampling
        from .page import build_page, launch

        pipeline = load_on_device(config.pipeline, config.dtype, config.device)
        if not isinstance(pipeline, CascadedDiffusionPipeline):
            raise ValueError(f"`pipeline` is {config.pipeline!r}, a stage that takes images; it must be a cascade.")
        page = build_page(pipeline, config, os.path.basename(os.path.normpath(config.pipeline)))
        try:
            launch(page, config)
        except OSError as error:
            raise OSError(
                f"`host` is {config.host!r} and `port` is {config.port}; they must be an address of this machine and "
                f"a free port, which --port 0 finds: {error}"
            ) from error
        print(f"{page.title}: {page.local_url}", flush=True)
        with ending_sampling(SECONDS_TO_END):  # a thread still computing at exit would abort the process
            page.block_thread()
