"""Options from the words of a command line."""

import argparse
import dataclasses
import inspect
import itertools
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args

from .errors import fail
from .kinds import alternatives_of, item_of, kinds_of, origin_of
from .problems import did_you_mean


T = TypeVar("T")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_METAVARS = {int: "N", float: "X", bool: "[true|false]"}


def parse(kind: type[T], arguments: list[str] | None = None, prog: str | None = None) -> T:
    """
    The options that the words of a command line give. A user's mistake is one line on stderr and exit code 2.

    Lists are several words; a flag may be followed by true or false; mappings are JSON or words `name=value`; hyphens
    in names mean underscores.

    Args:
        kind: an [`options`] class. The first paragraph of its docstring and its example are shown by `--help`.
        arguments: the words. Default: those that this process was started with.
        prog: the name of the command in messages. Default: that of the script.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = _Parser(kind, prog, words)
    given, rest = parser.parse_known_args(parser.normalised(words))
    if rest:
        parser.error(f"unexpected argument {rest[0]!r}; see --help.")
    given = vars(given)
    missing = [f"`{parser.label(name)}`" for name in parser.fields if name not in given and parser.is_required(name)]
    if missing:
        parser.error(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; see --help.")
    try:
        return kind(**{name: _from_words(name, words, parser.kinds[name]) for name, words in given.items()})
    except ValueError as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    """Sorts words by option, as lists of strings; what they mean is left to `_from_words`."""

    def __init__(self, cls: type, prog: str | None, words: Sequence[str]):
        super().__init__(prog=prog, argument_default=argparse.SUPPRESS, allow_abbrev=False)
        self.cls, self.kinds = cls, kinds_of(cls)
        before = itertools.takewhile(lambda word: word != "--", words)
        self.named = {_split(word)[0] for word in before if word.startswith("--")}
        self.fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, kind in self.kinds.items():
            several = {list, tuple, dict} & set(map(origin_of, alternatives_of(kind)))
            action = self.add_argument(self.label(name), nargs="+" if several else 1)
            action.required = False  # a misspelt option comes first

    def label(self, name: str) -> str:
        extra = self.fields[name].metadata.get("json_schema_extra", {})
        return name if extra.get("positional") and name not in self.named else f"--{name}"

    def is_required(self, name: str) -> bool:
        field = self.fields[name]
        return field.default is field.default_factory is dataclasses.MISSING

    def normalised(self, words: Sequence[str]) -> list[str]:
        """
        `words` with underscores in options' names, and a value behind each flag.

        A misspelt option ends the process.
        """
        flags = {name for name, kind in self.kinds.items() if bool in map(origin_of, alternatives_of(kind))}
        names = [name for name in self.fields if self.label(name) != name]
        words, result = list(words), []
        while words:
            word = words.pop(0)
            if word == "--":
                return [*result, word, *words]
            name, equals, value = _split(word)
            if not word.startswith("--") or name == "help":
                result.append(word)
            elif name in flags and not equals:
                value = words.pop(0) if words and words[0].lower() in _TRUTH else "true"
                result.append(f"--{name}={value}")
            elif name in names:
                result.append(f"--{name}{equals}{value}")
            elif name.removeprefix("no_") in flags and not equals:
                result.append(f"--{name.removeprefix('no_')}=false")
            else:
                self.error(f"`{word.partition('=')[0]}` is not an option{did_you_mean(name, names, '--')}")
        return result

    def error(self, message: str) -> NoReturn:
        fail(self.prog, re.sub(r"^argument (\S+): expected .*", r"`\1` takes a value.", message))

    def format_help(self) -> str:
        width = min(shutil.get_terminal_size().columns, 100)
        required = [name for name in self.fields if self.is_required(name)]
        others = [name for name in self.fields if name not in required]
        invocations = zip(required, map(self._invocation, required), strict=True)
        briefly = [given if len(given) <= width // 2 else name.upper() for name, given in invocations]
        usage = " ".join(["usage:", self.prog, *briefly, "[options]" if others else ""])
        description, example = _description_and_example(self.cls)
        parts = [
            textwrap.fill(usage, width, subsequent_indent="    ", break_on_hyphens=False),
            textwrap.fill(description, width),
        ]
        for title, names in (("required:", required), ("options:", others)):
            lines = [title]
            for name in names:
                lines.append(f"  {self._invocation(name)}")
                indent = " " * 6
                lines.append(textwrap.fill(self._help(name), width, initial_indent=indent, subsequent_indent=indent))
            parts += ["\n".join(lines)] * bool(names)
        return "\n\n".join(filter(None, [*parts, example])) + "\n"

    def _invocation(self, name: str) -> str:
        label, value = self.label(name), "|".join(map(_metavar, alternatives_of(self.kinds[name])))
        return value.replace("TEXT", name.upper()) if label == name else f"{label} {value}"

    def _help(self, name: str) -> str:
        field = self.fields[name]
        text, default = field.metadata.get("description", ""), field.default
        if "default" in text.lower():
            return text
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default == [] or any(default is silent for silent in (None, False, dataclasses.MISSING)):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        return f"{text} Default: {str(shown).lower() if isinstance(shown, bool) else shown}."


def _split(word: str) -> tuple[str, str, str]:
    """Name, "=" and value of a word such as --name=value."""
    head, equals, value = word.partition("=")
    return head[2:].replace("-", "_"), equals, value


def _metavar(kind: Any) -> str:
    origin = origin_of(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if origin is dict:
        items = alternatives_of(item_of(kind))
        if any(origin_of(item) in (list, tuple) for item in items):
            return "JSON"
        return "NAME=" + "|".join(map(_metavar, items)) + " ..."
    if origin in (list, tuple):
        return "|".join(map(_metavar, alternatives_of(item_of(kind)))) + " ..."
    return _METAVARS.get(origin, "TEXT")


def _description_and_example(cls: type) -> tuple[str, str]:
    """The first paragraph of a docstring, and what is indented below its "Example:"."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    example = re.search(r"^Examples?:\n(?:(?:[ ].*)?(?:\n|$))+", doc, re.MULTILINE)
    return doc.split("\n\n")[0], example.group().rstrip() if example else ""


def _from_words(name: str, words: list[str], kind: Any) -> Any:
    """What `words` say as a value of `kind`; as they are, for the check to refuse, where they say none."""
    try:
        return _read(words, kind)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is {words[0]!r}, which is not valid JSON ({error}).") from error
    except ValueError:
        return words[0] if len(words) == 1 else words


def _read(words: list[str], kind: Any) -> Any:
    """
    Raises:
        ValueError: `words` have the form of no alternative of `kind`.
    """
    for alternative in sorted(alternatives_of(kind), key=lambda alternative: origin_of(alternative) is str):
        try:
            return _read_as(words, alternative)
        except json.JSONDecodeError:
            raise
        except ValueError:
            continue
    raise ValueError


def _read_as(words: list[str], kind: Any) -> Any:
    origin = origin_of(kind)
    if origin in (list, tuple, dict) and words[0].startswith("{" if origin is dict else "["):
        return json.loads(" ".join(words))
    if origin in (list, tuple):
        return origin(_read([word], item_of(kind)) for word in words)
    if origin is dict:
        pairs = [word.split("=", 1) for word in words]
        return {key: _read([value], item_of(kind)) for key, value in pairs}
    (word,) = words
    if origin is Literal:
        return get_args(kind)[list(map(str, get_args(kind))).index(word)]
    if origin is bool:
        if word.lower() not in _TRUTH:
            raise ValueError
        return _TRUTH[word.lower()]
    return origin(word) if origin in (int, float, Path) else word
