"""Fields that were added to saved configurations later, and what a configuration without them means."""

from dataclasses import asdict, field, fields, is_dataclass
from typing import Any


def added(default: Any, **metadata: Any) -> Any:
    """A field that came later: configurations saved without it mean `default`, and [`content`] leaves that out."""
    return field(default=default, metadata={"added": True, **metadata})


def defaults_of_added(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass that came later, with their defaults."""
    return {f.name: f.default for f in fields(kind) if "added" in f.metadata}


def content(part: Any) -> dict[str, Any]:
    """A dataclass as a dict that only grows where something new is used: for hashes that must last."""
    values, defaults = asdict(part), defaults_of_added(part)
    for f in fields(part):
        value = getattr(part, f.name)
        if f.name in defaults and value == defaults[f.name]:
            del values[f.name]
        elif is_dataclass(value):
            values[f.name] = content(value)
    return values
