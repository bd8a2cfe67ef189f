"""
Prints what it takes until something happens: imports, commands, loading a pipeline; one JSON line each.

    OMP_NUM_THREADS=1 python -m benchmarks.startup

Each is a process of its own that is started anew in every round, in turns with the others; milliseconds are CPU time
of the process, user's and system's. Ratios are by what is named first: `import diffusers` with one of its pipelines,
or `import torch`.
"""

import argparse
import resource
import subprocess
import sys
from typing import Any

import torch

from benchmarks.measuring import CPU, compare, emit


LOAD = "from cdm_diffusers import CascadedDiffusionPipeline as Pipeline; p = Pipeline.from_pretrained({!r})"
SAMPLE = LOAD + "; p.set_progress_bar_config(disable=True); p([0])"


def programs(pipeline: str) -> dict[str, dict[str, list[str]]]:
    """Arguments of Python by what is measured; those of a group are compared."""
    return {
        "imports": {
            "import diffusers.DDPMPipeline": ["-c", "from diffusers import DDPMPipeline"],
            "import torch": ["-c", "import torch"],
            "import cdm_diffusers": ["-c", "import cdm_diffusers"],
            "import CascadedDiffusionPipeline": ["-c", "from cdm_diffusers import CascadedDiffusionPipeline"],
        },
        "commands": {
            "import torch": ["-c", "import torch"],
            "cdm --help": ["-m", "cdm_diffusers", "--help"],
            "cdm train base --help": ["-m", "cdm_diffusers", "train", "base", "--help"],
            "cdm info": ["-m", "cdm_diffusers", "info", pipeline],
        },
        "pipeline": {
            "import CascadedDiffusionPipeline": ["-c", "from cdm_diffusers import CascadedDiffusionPipeline"],
            "from_pretrained": ["-c", LOAD.format(pipeline)],
            "a first sample": ["-c", SAMPLE.format(pipeline)],
        },
    }


def children_seconds(work: Any, _: torch.device) -> float:
    """CPU time of the processes that `work` starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="checkpoints/fashion-mnist-32")
    parser.add_argument("--measure", nargs="+", choices=list(programs("")), default=list(programs("")))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for measured in options.measure:
        works = {
            name: lambda arguments=arguments: subprocess.run(
                [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL
            )
            for name, arguments in programs(options.pipeline)[measured].items()
        }
        emit("startup", {"measure": measured, **compare(works, options.rounds, clock=children_seconds)}, CPU)


if __name__ == "__main__":
    main()
