"""Packages whose names are imported when they are first used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy(package: str, names: dict[str, list[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    The `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        names: public names by the module that has them: of the package where it has no dot, else of another one.
    """
    origin = {name: module if "." in module else f"{package}.{module}" for module in names for name in names[module]}

    def __getattr__(name: str) -> Any:
        if name not in origin:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(origin[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origin})

    return __getattr__, __dir__
