"""SIGTERM and Ctrl-C as requests, which a run honours when a step is complete."""

import os
import signal
import threading
import time
from typing import Any, NoReturn

import torch
from accelerate import PartialState

from ..processes import Stopped, largest


STOPPING = (signal.SIGINT, signal.SIGTERM)
ONE_WISH = 0.5  # seconds within which a process group and a launcher deliver the same signal


class Interrupted(Exception):
    """A signal came during work that may be left unfinished."""


class StopSignals:
    """
    Notes the first of [`STOPPING`] that arrives within the `with` block. The second acts at once, as it does outside:
    it ends the process. Only a main thread receives signals, and those that are ignored stay so.

    Args:
        state: of the processes that must stop after the same step.
    """

    def __init__(self, state: PartialState):
        self.received, self._time = 0, 0.0
        self._announces = state.is_main_process
        self._before: dict[int, Any] = {}
        # A group of its own on the host, since one on the device would have to be waited for.
        self.group = torch.distributed.new_group(backend="gloo") if state.num_processes > 1 else None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _hear(self, number: int, _: Any) -> None:
        if not self.received:
            self.received, self._time = number, time.monotonic()
            if self._announces:
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stops with a checkpoint after this step, or at once when repeated.\n".encode())
        elif time.monotonic() - self._time > ONE_WISH:
            self.__exit__()
            signal.raise_signal(number)

    def check(self, *_: Any) -> None:
        """
        Raises:
            Interrupted: if this process has received a signal.
        """
        if self.received:
            raise Interrupted

    def agreed(self) -> int:
        """The signal that any of the processes has received, 0 if none has. All must call it after the same step."""
        return largest(self.received, self.group)


def end_by(number: int) -> NoReturn:
    """Ends the process as the signal would have done: with exit code 130 or 143, where nobody handles that."""
    if number == signal.SIGINT:
        raise Stopped
    raise SystemExit(128 + number)


def obey_parent(_: int) -> None:
    """
    For a data loader's worker, which signals to a process group, or from a cluster to a job, reach too: only its
    parent process ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parents_signal, daemon=True).start()


def _end_with_parents_signal() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
