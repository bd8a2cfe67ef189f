"""What makes training on a CPU needlessly slow."""

import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from diffusers.utils import logging


logger = logging.get_logger(__name__)


def warn_of_slow_cpu(accelerator: Accelerator) -> None:
    """Says so, from the main process, where cores lie idle."""
    if accelerator.device.type == "cpu" and accelerator.is_main_process:
        for sentence in slow_cpu(accelerator.num_processes):
            logger.warning(sentence)


def slow_cpu(num_processes: int) -> Iterator[str]:
    cores, threads = available_cores(), torch.get_num_threads()
    each = cores // num_processes
    if each > threads:
        yield (
            f"{num_processes} x {threads} threads (processes x OMP_NUM_THREADS) leave some of {cores} CPU cores "
            f"idle: start with `accelerate launch --num_cpu_threads_per_process {each} ...`."
        )


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
