"""What results come from: commands, versions and hashes; and whether a folder's results come from the same."""

import hashlib
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from ..files import read_json


class Report(TypedDict):
    """What every report says."""

    __pydantic_config__ = ConfigDict(extra="allow")

    settings: dict[str, Any]


def provenance(*libraries: str) -> dict[str, Any]:
    """The command line, and the versions of `libraries`."""
    return {
        "command": shlex.join([*_program(Path(sys.argv[0])), *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def _program(file: Path) -> list[str]:
    """How `file` was started, without the folder where the package, or its command, is installed."""
    if file.name in ("__main__.py", "cdm"):
        return ["python", "-m", file.parent.name if file.suffix else "cdm_diffusers"]
    return ["python", str(file)]


def digest(content: Any) -> str:
    """A short hash of JSON content, for names of files and folders."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def open_report(
    file: Path,
    settings: dict[str, Any],
    new: dict[str, Any],
    option: str,
    ignored: Collection[str] = ("about",),
) -> dict[str, Any]:
    """
    The report that an earlier call with the same settings has written to `file`, or the `new` one, with "settings".

    Args:
        settings, ignored: as [`check_same_settings`] has them.
        option: the option by which another file can be given.

    Raises:
        ValueError: the settings of the report differ in what decides its figures.
    """
    settings = json.loads(json.dumps(settings))
    if not file.is_file():
        return {"settings": settings, **new}
    report = read_json(file, Report, "this command", f"give another `{option}`.")
    holder, remedy = f"{str(file)!r} is the report of other settings", f"Give another `{option}`."
    check_same_settings(report["settings"], settings, holder, remedy, ignored)
    return {**report, "settings": settings}


def check_same_settings(
    earlier: dict[str, Any], settings: dict[str, Any], holder: str, remedy: str, ignored: Collection[str] = ("about",)
) -> None:
    """
    Args:
        earlier, settings: those of the existing results, and of the results to be added, as JSON has them.
        holder: what holds the earlier ones, to be followed by the differences.
        remedy: a sentence.
        ignored: names of settings that have no influence on results.

    Raises:
        ValueError: they differ.
    """
    differences = [
        f"{name} ({earlier.get(name)!r} there, {settings.get(name)!r} now)"
        for name in sorted({*earlier, *settings} - {*ignored})
        if earlier.get(name) != settings.get(name)
    ]
    if differences:
        raise ValueError(f"{holder}: {'; '.join(differences)}. {remedy}")
