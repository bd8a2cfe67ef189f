"""What README.md and docs/ print: Python runs, and commands have the options that are given to them."""

import ast
import configparser
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from cdm_diffusers.commands.main import COMMANDS, resolve
from cdm_diffusers.options import parse


ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

# Documents whose Python is only compiled and its imports done, and why.
NOT_RUN = {"docs/openai.md": "networks that are not shipped"}

# Commands of other programs, whose options are theirs.
OTHERS = ("curl", "npm", "node", "git", "hf")
RECORD = "record() { printf '%s\\x1f' \"$@\"; printf '\\x1e'; }\n" + "".join(
    f'{program}() {{ record {program} "$@"; }}\n'
    for program in ("accelerate", "cdm", "make", "pip", "python", *OTHERS)
)


def blocks(document: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(document.read_text())
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, name, text in found if name in languages]


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every command: the documents' blocks, run by bash with functions in place of programs."""
    found = []
    for document in DOCUMENTS:
        program = "\n".join(["set -euo pipefail", RECORD, *blocks(document, "bash", "sh")])
        bash = subprocess.run(
            ["/bin/bash", "-c", program], env={"PATH": ""}, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert bash.returncode == 0, f"{name_of(document)}: {bash.stderr}"
        records = bash.stdout.split("\x1e")[:-1]
        found += [(name_of(document), record.split("\x1f")[:-1]) for record in records]
    return found


PRINTED = commands()


def test_commands_are_found():
    """The reader itself: arrays, variables, loops and quotes are bash's."""
    words = [words for _, words in PRINTED]
    assert ["make", "demo"] in words
    assert sum("training/train_sr.py" in command for command in words) >= 3
    assert any('{"super_res_1": "unipc"}' in command for command in words)


@pytest.mark.parametrize(
    ("document", "words"), PRINTED, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_commands_have_their_options(document, words, monkeypatch):
    program, *words = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(setup["options.extras_require"])
    elif program == "cdm":
        understands_command(words)
    elif program in ("accelerate", "python"):
        if program == "accelerate":
            words = without_launcher(words)
        if words[:2] == ["-m", "cdm_diffusers"]:
            understands_command(words[2:])
        else:
            understands_script(*words, monkeypatch=monkeypatch)


def without_launcher(words: list[str]) -> list[str]:
    """The script, or -m and the module, with its options: what follows those of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    launched = launch_command_parser().parse_args(words[1:])
    return (["-m"] if launched.module else []) + [launched.training_script, *launched.training_script_args]


def understands_command(words: list[str]) -> None:
    """Parses the words as `cdm` does; a mistake ends the test by SystemExit."""
    if words[0].startswith("-"):
        return
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    parse(resolve(COMMANDS[name].options), words[len(name.split()) :], f"cdm {name}")


def understands_script(script: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = re.search(r'script\("(.+)"\)', (ROOT / script).read_text())
    if command:
        understands_command([*command[1].split(), *words])
    else:
        monkeypatch.setattr("sys.argv", [script, *words])
        runpy.run_path(str(ROOT / script))["parse_args"]()


@pytest.mark.slow("samples with the shipped cascades, in all their steps")
@pytest.mark.parametrize("document", [file for file in DOCUMENTS if blocks(file, "python")], ids=name_of)
def test_python_runs_as_printed(document, tmp_path, monkeypatch):
    os.symlink(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    program = ast.parse("\n".join(blocks(document, "python")), filename=name_of(document))
    if name_of(document) in NOT_RUN:
        program.body = [node for node in program.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {}
    exec(compile(program, name_of(document), "exec"), names)
    assert {"images", "preset"} & names.keys() or name_of(document) in NOT_RUN
