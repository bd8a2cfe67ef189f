"""What README.md, docs/ and the examples print: their blocks, and what the commands in them mean."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from scripts import ROOT
from torch.distributed.run import get_args_parser


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "examples" / "avatars" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "checkpoints").glob("*/README.md")),
]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh")

# Commands of other programs, whose options are theirs.
OTHERS = ("curl", "npm", "node", "git", "hf")
RECORD = "record() { printf '%s\\x1f' \"$@\"; printf '\\x1e'; }\n" + "".join(
    f'{program}() {{ record {program} "$@"; }}\n'
    for program in ("accelerate", "cdm", "make", "pip", "python", "torchrun", *OTHERS)
)


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks_of(document: Path) -> list[tuple[str, str]]:
    """(language, text) of all blocks."""
    found = BLOCK.findall(document.read_text())
    return [(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def blocks(document: Path, *languages: str) -> list[str]:
    return [text for language, text in blocks_of(document) if language in languages]


def commands_of(shell: Iterable[str]) -> list[list[str]]:
    """Program and words of every command, as bash understands them: it runs functions in place of programs."""
    program = "\n".join(["set -euo pipefail", RECORD, *shell])
    bash = subprocess.run(
        ["/bin/bash", "-c", program], env={"PATH": ""}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert bash.returncode == 0, bash.stderr
    return [record.split("\x1f")[:-1] for record in bash.stdout.split("\x1e")[:-1]]


def words_of_cdm(program: str, *words: str) -> list[str] | None:
    """What `cdm` would be given for a command of cdm, python or a launcher; None if it is none of cdm's."""
    if program == "cdm":
        return list(words)
    if program != "python":
        words = without_launcher(program, words)
    if words[:2] == ("-m", "cdm_diffusers"):
        return list(words[2:])
    command = re.search(r'script\("(.+)"\)', file_of(words).read_text())
    return [*command[1].split(), *words[1:]] if command else None


def file_of(words: tuple[str, ...]) -> Path:
    """Of a script, or of a module after -m."""
    return ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0])


def without_launcher(program: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The script, or -m and the module, with its options: what follows those of `accelerate launch` or `torchrun`."""
    if program == "accelerate":
        assert words[0] == "launch"
        parser, words = launch_command_parser(), words[1:]
    else:
        parser = get_args_parser()
    launched = parser.parse_args(words)
    return *(["-m"] if launched.module else []), launched.training_script, *launched.training_script_args
