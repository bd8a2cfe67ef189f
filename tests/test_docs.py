"""What README.md and docs/ print: Python runs, commands have the options that they are given, and are followed."""

import ast
import configparser
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from cdm_diffusers.commands.main import COMMANDS, resolve
from cdm_diffusers.options import parse


ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

# Documents whose Python is only compiled and its imports done, and why; so is what is marked `py`.
NOT_RUN = {"docs/openai.md": "networks that are not shipped"}

# Documents whose blocks, commands and Python, are run in their order, shortened by tests/shortened.py.
FOLLOWED = ["README.md", "docs/tutorial.md", "docs/search.md"]
WITH_PYTHON = ["docs/tutorial.md"]  # on what the commands make
# Those whose commands are only parsed, and why.
NOT_FOLLOWED = {
    "docs/app.md": "servers that run until they are stopped; tests/test_app_browser.py visits one",
    "docs/evaluation.md": "samples and real images by the thousand; each command has its own tests",
    "docs/openai.md": "files that are not shipped; tests/test_conversion_stages.py converts small ones",
    "docs/publishing.md": "the Hub; tests/test_publishing.py uploads to a server of its own",
    "docs/results.md": "hours of training and sampling; tests/test_reproduce.py runs small ones",
    "docs/training.md": "thousands of pictures and several GPUs; tests/test_training_loop.py trains on few",
}

# Commands of other programs, whose options are theirs.
OTHERS = ("curl", "npm", "node", "git", "hf")
RECORD = "record() { printf '%s\\x1f' \"$@\"; printf '\\x1e'; }\n" + "".join(
    f'{program}() {{ record {program} "$@"; }}\n'
    for program in ("accelerate", "cdm", "make", "pip", "python", *OTHERS)
)


def blocks_of(document: Path) -> list[tuple[str, str]]:
    """(language, text) of all blocks."""
    found = BLOCK.findall(document.read_text())
    return [(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def blocks(document: Path, *languages: str) -> list[str]:
    return [text for language, text in blocks_of(document) if language in languages]


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
@pytest.mark.parametrize(
    "document",
    [file for file in DOCUMENTS if blocks(file, "python") and name_of(file) not in WITH_PYTHON],
    ids=name_of,
)
def test_python_runs_as_printed(document, tmp_path, monkeypatch):
    os.symlink(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    program = ast.parse("\n".join(blocks(document, "python")), filename=name_of(document))
    names = {}
    if name_of(document) in NOT_RUN:
        program = imports_of(program)
    exec(compile(program, name_of(document), "exec"), names)
    assert {"images", "preset"} & names.keys() or name_of(document) in NOT_RUN


def imports_of(program: ast.Module) -> ast.Module:
    program.body = [node for node in program.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return program


@pytest.mark.parametrize("text", [text for document in DOCUMENTS for text in blocks(document, "py")])
def test_python_that_is_not_run_compiles(text):
    exec(compile(imports_of(ast.parse(text)), "block", "exec"), {})


def test_every_document_with_commands_is_followed_or_says_why_not():
    with_commands = {name_of(document) for document in DOCUMENTS if blocks(document, "bash", "sh")}
    assert with_commands == {*FOLLOWED, *NOT_FOLLOWED}


@pytest.mark.slow("every command imports torch, and trains for two steps or samples")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", FOLLOWED)
def test_blocks_run_in_their_order(document, tmp_path):
    """By bash, in a folder with what the document takes for granted."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("checkpoints", "configs"):
        (folder / name).symlink_to(ROOT / name)
    if document != "docs/tutorial.md":
        draw_pictures(folder / "my-images")
    python = f"{sys.executable} {ROOT / 'tests' / 'shortened.py'}"
    program = ["set -euo pipefail", f'cdm() {{ {python} "$@"; }}', "make() { :; }", "pip() { :; }"]
    if document == "docs/search.md":
        program += [block for block in blocks(ROOT / "README.md", "bash") if "cdm train base" in block]
    for language, text in blocks_of(ROOT / document):
        if language in ("bash", "sh"):
            program.append(text)
        elif language == "python" and document in WITH_PYTHON:
            program.append(f"{sys.executable} - <<'PYTHON'\n{text}\nPYTHON")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["HF_HOME"] = environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    result = subprocess.run(
        ["/bin/bash", "-c", "\n".join(program)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    made = {"README.md": "faces", "docs/tutorial.md": "samples.png", "docs/search.md": "search-steps/table.md"}
    assert (folder / made[document]).exists()


def draw_pictures(folder: Path) -> None:
    """Two classes, in two splits."""
    for number, place in enumerate(["train/cat", "train/dog", "test/cat", "test/dog"]):
        (folder / place).mkdir(parents=True)
        for shade in range(24):
            picture = PIL.Image.new("RGB", (64, 64), (10 * shade, 60 * number, 255 - 10 * shade))
            picture.save(folder / place / f"{shade}.png")
