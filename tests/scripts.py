"""Scripts, run from the repository's root as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent


def run_script(*command: object, **variables: str) -> subprocess.CompletedProcess:
    """A process of Python with further environment `variables`, whatever comes of it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment | variables, capture_output=True, text=True
    )


def run(*command: object, **variables: str) -> str:
    """What a script prints, or the test's failure with its errors."""
    result = run_script(*command, **variables)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def launch(*command: object, **variables: str) -> str:
    return run("-m", "accelerate.commands.launch", "--num_processes", "1", *command, **variables)
