"""Class names and class ids."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class UnfitRow(ValueError):
    """
    A row of the data that cannot be used, in one sentence: also if a worker of a data loader found it, whose
    tracebacks torch puts before its message.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{UnfitRow.__name__}: ")[2])


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put the file or row before the message of a ValueError about it."""
    try:
        yield
    except ValueError as error:
        raise UnfitRow(f"{where} {error}") from error


@dataclass
class LabelEncoding:
    """Class names in the order of their ids; `encode` checks one label and turns it into its id."""

    names: list[str]
    from_strings: bool

    def __post_init__(self):
        self._ids = {name: index for index, name in enumerate(self.names)}
        if len(self._ids) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"`label_names` has {twice} more than once; class names must differ.")

    @property
    def id2label(self) -> dict[int, str]:
        """Names by id."""
        return dict(enumerate(self.names))

    def encode(self, label: int | str | None) -> int:
        """The id of a label as the data has it; ValueError, for [`naming`] to complete, if it is not a class."""
        if label is None:
            raise ValueError("has no label: label it, remove it, or train without classes.")
        if self.from_strings:
            if label not in self._ids:
                raise ValueError(
                    f"has label {label!r}; it must be one of the classes {self.names}: fix it or --label_names."
                )
            return self._ids[label]
        if not 0 <= label < len(self.names):
            raise ValueError(
                f"has label {label}, outside 0..{len(self.names) - 1}: fix or remove it, or give more classes by "
                "--num_classes or --label_names."
            )
        return int(label)


def printable(name: str) -> str:
    """A class name on one line: line breaks and control characters as Python writes them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in name)


def read_label_names(label_names: str) -> list[str]:
    """Names from a file with one per line, or from a comma-separated list."""
    if os.path.isfile(label_names):
        lines = Path(label_names).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    if "," not in label_names:
        raise ValueError(f"`label_names` is {label_names!r}; it must be a file or a comma-separated list of names.")
    return [name.strip() for name in label_names.split(",")]


def check_num_classes(names: list[str], num_classes: int | None) -> list[str]:
    """`names`; ValueError if `num_classes` is given and is not their number."""
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            f"`num_classes` is {num_classes}, but the data has {len(names)} class names "
            f"({_first(dict(enumerate(names)))}): leave it out or make them agree."
        )
    return names


def check_same_classes(what: str, id2label: dict[int, str], expected: dict[int, str]) -> None:
    """
    Raises:
        ValueError: `what` has other classes than expected: another number of them, or other names. Data without
            names, whose classes are called "0", "1", ..., fit any names.
    """
    numbers = {index: str(index) for index in id2label}
    if len(id2label) != len(expected):
        raise ValueError(
            f"{what} has {len(id2label)} classes ({_first(id2label)}) and not {len(expected)} ({_first(expected)}): "
            "they must be the same; --label_names gives all names where some do not occur."
        )
    if id2label != expected and numbers not in (id2label, expected):
        index = next(index for index in expected if id2label.get(index) != expected[index])
        raise ValueError(
            f"{what} has other classes: number {index} is {id2label.get(index)!r} and not {expected[index]!r}; "
            "--label_names gives the names in their order."
        )


def _first(id2label: dict[int, str]) -> str:
    names = list(id2label.values())
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
