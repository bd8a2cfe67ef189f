"""Options and settings, declared once as a dataclass and checked whole."""

import dataclasses
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from .kinds import as_declared, kinds_of
from .problems import CHECKS, problems_of


T = TypeVar("T")


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Callable[[], Any] | None = None,
    positional: bool = False,
) -> Any:
    """
    A field of an [`options`] class.

    Args:
        help: one or more sentences. "Default: ..." is added to them unless they mention a default themselves.
        default: a value; without one, and without `default_factory`, the option is required.
        default_factory: computes the default, when it is needed.
        positional: whether the command line takes the value without the option's name.
    """
    metadata = {"description": help, "json_schema_extra": {"positional": positional}}  # pydantic's names
    if isinstance(default, list | dict):
        default, default_factory = dataclasses.MISSING, default.copy
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """
    Makes `cls` a keyword-only dataclass whose values are checked against their annotations when one is constructed.

    Values are not converted (1.5, "3" and True are not ints), but tuples serve as lists, lists as tuples, ints as
    floats and paths as strings. Checks of several fields belong in `__post_init__`, which runs last and raises
    ValueErrors.

    Raises:
        ValueError: (constructor) one sentence for each value that is missing, unknown or not as declared.
    """
    doc = cls.__doc__
    checked = dataclass(kw_only=True, config=CHECKS)(cls)
    checked.__doc__ = doc  # not the signature that dataclasses put there
    construct = checked.__init__

    def __init__(self, **values: Any) -> None:
        kinds = kinds_of(type(self))
        values = {name: as_declared(value, kinds.get(name)) for name, value in values.items()}
        try:
            construct(self, **values)
        except ValidationError as error:
            raise ValueError(" ".join(problems_of(type(self), values, error))) from None

    __init__.__signature__ = inspect.signature(checked)
    checked.__init__ = __init__
    return checked


def from_json(kind: type[T], file: str | os.PathLike) -> T:
    """
    The `kind`, an [`options`] class that may hold others, that a JSON file describes.

    Raises:
        ValueError: the file is not valid JSON, or one sentence for each key that is missing, misspelt or not as
            declared, with its path.
        OSError: the file cannot be read.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{str(file)!r} cannot be read ({reason}): give a JSON file.") from error
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not valid JSON ({error}).") from error
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ValueError(" ".join(problems_of(kind, values, error, f" in {str(file)!r}"))) from None
