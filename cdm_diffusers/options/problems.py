"""What is wrong with options: one sentence each, instead of pydantic's report."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .kinds import alternatives_of, item_of, kinds_of, origin_of


CHECKS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
_NOUNS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a path"}


def did_you_mean(name: str, names: list[str], prefix: str = "") -> str:
    """The end of a sentence about a misspelt `name`: the nearest of `names`, where one is near."""
    plain = name.replace("_", "").lower()
    nearest = [other for other in names if plain in other.replace("_", "")] if len(plain) > 3 else []
    nearest = difflib.get_close_matches(name, nearest or names, 1, cutoff=0 if nearest else 0.6)
    return f"; did you mean `{prefix}{nearest[0]}`?" if nearest else "."


def problems_of(cls: type, values: Any, error: ValidationError, where: str = "") -> list[str]:
    """A sentence for each thing that is wrong with `values` as options of `cls`, misspelt options first."""
    problems, found = {}, error.errors(include_url=False)
    for item in sorted(found, key=lambda item: item["type"] != "unexpected_keyword_argument"):
        path, kind, value = _locate(cls, values, item["loc"])
        name = f"`{'.'.join(path)}`{where}" if path else where.removeprefix(" in ")
        match item["type"]:
            case "unexpected_keyword_argument":
                owner = "an option" if where else f"an option of {cls.__name__}"
                problem = f"{name} is not {owner}{did_you_mean(path[-1], list(kinds_of(kind)))}"
            case "missing" if item["loc"][-1] == path[-1]:  # and not an item of a tuple
                problem = f"{name} is missing."
            case "value_error":
                problem = str(item["ctx"]["error"]) + (f" ({name})" if where else "")
            case _:
                problem = f"{name} is {value!r}; {_demand(kind, value)}{_nearest_choice(kind, value)}"
        problems.setdefault(path, problem)
    outer = {path[:length] for path in problems for length in range(len(path))}
    return [problem for path, problem in problems.items() if path not in outer]


def _locate(cls: type, values: Any, location: tuple) -> tuple[tuple[str, ...], Any, Any]:
    """Path, kind and value of the option that pydantic's `location`, which may lie inside the value, belongs to."""
    path, kind, value = (), cls, values
    for part in location:
        alternatives = alternatives_of(kind)
        named = [alternative for alternative in alternatives if getattr(alternative, "__name__", None) == part]
        if len(alternatives) > 1:  # pydantic names the member of the union
            if not named or not dataclasses.is_dataclass(named[0]):
                break
            kind = named[0]
            continue
        inner = alternatives[0]
        if dataclasses.is_dataclass(inner):
            if part not in kinds_of(inner):
                return (*path, str(part)), inner, value
            kind = kinds_of(inner)[part]
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        elif origin_of(inner) in (list, dict) and any(map(dataclasses.is_dataclass, alternatives_of(item_of(inner)))):
            kind, value = item_of(inner), value[part]
        else:
            break
        path = (*path, str(part))
    return path, kind, value


def _demand(kind: Any, value: Any, subject: str = "it must be") -> str:
    """What is wrong with `value`: of the kinds that are allowed, the one that it resembles decides."""
    for alternative in alternatives_of(kind):
        origin, item = origin_of(alternative), item_of(alternative)
        if origin in (list, tuple, dict) and isinstance(value, dict if origin is dict else list | tuple):
            wrong = [part for part in (value.values() if origin is dict else value) if not _is_valid(item, part)]
            if wrong:
                return _demand(item, wrong[0], f"each {'value' if origin is dict else 'item'} must be")
        elif origin in (int, float) and type(value) in (int, origin) and _bounds(alternative):
            return f"{subject} {_bounds(alternative)}"
    nouns = list(map(_noun, alternatives_of(kind)))
    return f"{subject} {' or '.join(nouns).replace(f'names to {nouns[0]}', 'names to such')}"


def _nearest_choice(kind: Any, value: Any) -> str:
    """The end of a sentence about a `value` that is none of those that are allowed."""
    choices = [choice for one in alternatives_of(kind) if origin_of(one) is Literal for choice in get_args(one)]
    return did_you_mean(value, list(map(str, choices))) if isinstance(value, str) else "."


def _is_valid(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind, config=CHECKS).validate_python(value)
    except ValidationError:
        return False
    return True


def _bounds(kind: Any) -> str:
    marks = [mark for given in getattr(kind, "__metadata__", ()) for mark in getattr(given, "metadata", [given])]
    limits = {name: getattr(mark, name) for mark in marks for name in _BOUNDS if hasattr(mark, name)}
    if limits.keys() == {"ge", "le"}:
        return f"between {limits['ge']} and {limits['le']}"
    return " and ".join(f"{_BOUNDS[name]} {limit}" for name, limit in limits.items())


def _noun(kind: Any) -> str:
    origin = origin_of(kind)
    if origin is Literal:
        return f"one of {list(get_args(kind))}"
    if origin is tuple and Ellipsis not in get_args(kind):
        return f"{len(get_args(kind))} {_nouns(item_of(kind))}"
    if origin in (list, tuple):
        return f"a list of {_nouns(item_of(kind))}"
    if origin is dict:
        return f"a mapping of names to {_nouns(item_of(kind))}"
    if dataclasses.is_dataclass(origin):
        return f"an object ({origin.__name__})"
    noun, bounds = _NOUNS.get(origin) or f"a {getattr(origin, '__name__', origin)}", _bounds(kind)
    return f"{noun}{' of' if bounds.startswith('at') else ''} {bounds}".rstrip()


def _nouns(kind: Any) -> str:
    """The plural."""
    nouns = map(_noun, alternatives_of(kind))
    return " or ".join(re.sub(r"^an? ((?:whole )?\w+)", r"\1s", noun) for noun in nouns)
