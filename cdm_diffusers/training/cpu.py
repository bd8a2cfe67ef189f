"""What makes training on a CPU needlessly slow."""

import os
import platform
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from diffusers.utils import logging


logger = logging.get_logger(__name__)


def warn_of_slow_cpu(accelerator: Accelerator) -> None:
    """Warns, from the main process, if cores lie idle or the CPU has no instructions for bfloat16."""
    if accelerator.device.type == "cpu" and accelerator.is_main_process:
        for sentence in slow_cpu(accelerator.num_processes, accelerator.mixed_precision):
            logger.warning(sentence)


def slow_cpu(num_processes: int, mixed_precision: str) -> Iterator[str]:
    """A sentence for each thing that makes training on this CPU needlessly slow."""
    cores, threads = available_cores(), torch.get_num_threads()
    each = cores // num_processes
    if each > threads:
        yield (
            f"{num_processes} x {threads} threads (processes x OMP_NUM_THREADS) leave some of {cores} CPU cores "
            f"idle: start with `accelerate launch --num_cpu_threads_per_process {each} ...`, or without "
            "OMP_NUM_THREADS."
        )
    if mixed_precision == "bf16" and not has_bfloat16():
        yield (
            "`mixed_precision` is 'bf16', for which this CPU has no instructions (avx512_bf16, amx_bf16): give 'no'; "
            "float32 is several times faster."
        )


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether bf16 is computed natively, not emulated; only known for x86 processors, assumed for others."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_mixed_precision(accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: for fp16 on a CPU, where accelerate would silently compute in float32.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and not accelerator.native_amp:
        raise ValueError(
            "`mixed_precision` is 'fp16', which accelerate does not compute on CPUs: give 'bf16' or 'no', or train on "
            "a GPU."
        )
