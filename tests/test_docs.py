"""What README.md and docs/ print: Python runs, commands have the options that they are given, and are followed."""

import ast
import configparser
import os
import re
import runpy

import pytest
from documents import DOCUMENTS, OTHERS, SHELL, blocks, commands_of, file_of, name_of, words_of_cdm
from scripts import ROOT
from shortened import RUN_DRY

from cdm_diffusers.commands.main import COMMANDS, resolve
from cdm_diffusers.options import parse


# Documents whose Python is run on what their commands make, by tests/test_docs_followed.py.
ON_WHAT_COMMANDS_MAKE = {
    "docs/distillation.md",
    "docs/openai.md",
    "docs/publishing.md",
    "docs/tutorial.md",
    "examples/avatars/README.md",
}

PRINTED = [(name_of(document), words) for document in DOCUMENTS for words in commands_of(blocks(document, *SHELL))]


def test_commands_are_found():
    """The reader itself: arrays, variables, loops and quotes are bash's."""
    words = [words for _, words in PRINTED]
    assert ["make", "demo"] in words
    assert sum("training/train_sr.py" in command for command in words) >= 3
    assert any('{"super_res_1": "unipc"}' in command for command in words)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A folder like the repository's, in which a cascade was joined."""
    for path in ROOT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "my-cascade").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("document", "words"), PRINTED, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_commands_have_their_options(document, words, at_home, monkeypatch):
    program, *words = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(setup["options.extras_require"])
    elif program not in OTHERS:
        command = words_of_cdm(program, *words)
        if command is None:
            monkeypatch.setattr("sys.argv", words[1:] if words[0] == "-m" else words)
            runpy.run_path(str(file_of(tuple(words))))["parse_args"]()
        elif not command[0].startswith("-"):
            name = next(name for name in (" ".join(command[:2]), command[0]) if name in COMMANDS)
            parse(resolve(COMMANDS[name].options), command[len(name.split()) :], f"cdm {name}")


def test_what_is_run_dry_is_printed():
    for word in RUN_DRY:
        assert any(word in words for _, words in PRINTED)


@pytest.mark.slow("samples with the shipped cascades, in all their steps")
@pytest.mark.parametrize(
    "document",
    [file for file in DOCUMENTS if blocks(file, "python") and name_of(file) not in ON_WHAT_COMMANDS_MAKE],
    ids=name_of,
)
def test_python_runs_as_printed(document, tmp_path, monkeypatch):
    os.symlink(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile("\n".join(blocks(document, "python")), name_of(document), "exec"), names)
    assert {"images", "preset"} & names.keys()


def test_all_python_is_run_and_compiles():
    for document in DOCUMENTS:
        assert not blocks(document, "py", "python3", "pycon", "shell", "console"), name_of(document)
        ast.parse("\n".join(blocks(document, "python")), name_of(document))
