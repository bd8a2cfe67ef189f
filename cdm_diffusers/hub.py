"""Asks the Hub once, and says in one line why it does not have, or does not accept, what is wanted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError


INDEX = "model_index.json"
UNREACHED = {"ConnectionError", "TransportError", "Timeout", "LocalEntryNotFoundError"}  # of any library for HTTP
ASKING_TIME = 10  # seconds that the Hub may take to say whether it has something


@contextmanager
def hub_errors(name: str | os.PathLike) -> Iterator[None]:
    """
    Says in one line why there is no pipeline called `name`.

    Raises:
        OSError: neither a folder nor a repository of the Hub, or the Hub was not reached.
    """
    try:
        yield
    except Exception as error:  # libraries for HTTP have their own
        reason = _reason(error)
        if reason is None and isinstance(error, OSError):
            if os.path.isdir(name) and not os.path.isfile(os.path.join(name, INDEX)):
                raise OSError(f"{name} holds no pipeline: there is no {INDEX} in it.") from error
            place = "" if os.path.isdir(name) else " on the Hub"
            raise OSError(f"{name}{place} is incomplete or damaged: {error}") from error
        if reason is None:
            raise
        raise OSError(f"{str(name)!r} is not a folder here, and {reason}") from None


def check_reached(
    name: str | os.PathLike, revision: str | None = None, token: Any = None, cache_dir: str | None = None
) -> None:
    """
    Asks the Hub once for a pipeline that is neither a folder nor in the cache, before libraries do that retry for half
    a minute and report each attempt.

    Raises:
        OSError: there is none, or the Hub was not reached.
    """
    if os.path.isdir(name):
        return
    if os.path.isfile(name):
        raise OSError(f"{str(name)!r} is a file: give the folder that a pipeline was saved in.")
    with hub_errors(name):
        cached = try_to_load_from_cache(os.fspath(name), INDEX, cache_dir=cache_dir, revision=revision)
        if not isinstance(cached, str):
            model_info(os.fspath(name), revision=revision, token=token, timeout=ASKING_TIME)


@contextmanager
def write_errors(repo_id: str) -> Iterator[None]:
    """Says in one line why nothing can be written to a repository, and what helps."""
    try:
        yield
    except Exception as error:  # libraries for HTTP have their own
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise OSError(
                f"The Hub does not let you write to {repo_id!r} ({status}): log in by `hf auth login`, or give "
                "--hub_token, or HF_TOKEN, a token that may write there."
            ) from error
        if _is_unreached(error):
            raise OSError(
                f"The Hub was not reached, to write to {repo_id!r}: check the connection, or leave out --push_to_hub."
            ) from error
        raise


def _reason(error: BaseException) -> str | None:
    causes = _causes(error)
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "the Hub has no repository of that name that you may read: check it, or log in by `hf auth login`."
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return "its repository on the Hub has no such `revision`."
    if any(isinstance(cause, HFValidationError) for cause in causes) or "nor a valid repo id" in str(error):
        return "cannot be the name of a repository of the Hub, OWNER/NAME: check the path."
    if _is_unreached(error):
        return "the Hub was not reached, nor is it in the cache: check the path and the connection."
    return None


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return causes


def _is_unreached(error: BaseException) -> bool:
    return bool(UNREACHED & {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__})
