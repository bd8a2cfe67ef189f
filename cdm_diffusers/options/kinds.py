"""Kinds of values, as annotations of options say them, and how annotations are taken apart."""

import dataclasses
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le


NonNegativeInt = Annotated[int, Ge(0)]
PositiveInt = Annotated[int, Ge(1)]
NonNegativeFloat = Annotated[float, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]  # a probability or a share


def kinds_of(cls: type) -> dict[str, Any]:
    """The annotation of each option of a class."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def alternatives_of(kind: Any) -> list[Any]:
    """The members of a union except None; else the kind alone."""
    if get_origin(kind) in (Union, UnionType):
        return [part for member in get_args(kind) for part in alternatives_of(member)]
    return [] if kind is NoneType else [kind]


def origin_of(kind: Any) -> Any:
    """`list` of `list[int]`, `int` of `PositiveInt`, `Literal` of `Literal["png"]`."""
    return origin_of(kind.__origin__) if get_origin(kind) is Annotated else get_origin(kind) or kind


def item_of(kind: Any) -> Any:
    """The kind of a list's or tuple's items, or of a mapping's values."""
    kind = kind.__origin__ if get_origin(kind) is Annotated else kind
    arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
    return (arguments[-1] if origin_of(kind) is dict else arguments[0]) if arguments else Any


def as_declared(value: Any, kind: Any) -> Any:
    """A tuple as the list, a list as the tuple and a path as the string that are declared."""
    declared = {origin_of(alternative): alternative for alternative in alternatives_of(kind)}
    if isinstance(value, dict) and dict in declared:
        return {key: as_declared(item, item_of(declared[dict])) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return next((origin(value) for origin in declared if origin in (list, tuple)), value)
    if isinstance(value, os.PathLike) and str in declared and Path not in declared:
        return os.fspath(value)
    return value
