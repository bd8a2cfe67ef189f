"""Which command calls what. What it calls is imported only once its options have been understood."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..options import errors_as_lines, parse


@dataclass(frozen=True)
class Command:
    """
    Args:
        summary: what it does, in a line.
        options: "module:class" of its options, in this package.
        function: "module:function" that is called with them.
    """

    summary: str
    options: str
    function: str


COMMANDS = {
    "info": Command("Stages, parameters, schedules and defaults.", "commands.config:InfoConfig", "commands.info:info"),
    "sample": Command(
        "Pictures of a cascade, as a grid or as files.",
        "commands.config:PicturesConfig",
        "commands.pictures:sample_pictures",
    ),
    "super-resolve": Command(
        "High-resolution versions of your own images.",
        "commands.config:SuperResolveConfig",
        "commands.pictures:super_resolve",
    ),
    "data": Command(
        "Check images before training, and see what the stages will see.",
        "data.config:DataCheckConfig",
        "commands.data:check_data",
    ),
    "train base": Command("Train a base stage.", "training.config:TrainingConfig", "training.loop:train_base"),
    "train sr": Command(
        "Train a super-resolution stage.", "training.config:TrainingConfig", "training.loop:train_super_resolution"
    ),
    "distill": Command(
        "A stage that samples in few steps, from one that takes many.",
        "training.config:DistillationConfig",
        "training.distillation:distill",
    ),
    "train classifier": Command(
        "Train a classifier, to measure samples with.",
        "evaluation.config:ClassifierConfig",
        "evaluation.classifier:train_classifier",
    ),
    "assemble": Command(
        "Join trained stages into a cascade.",
        "conversion.config:AssembleConfig",
        "conversion.assemble_cascade:assemble_cascade",
    ),
    "sample-set": Command(
        "Sample any number of images, with any number of processes.",
        "evaluation.config:SampleConfig",
        "evaluation.sample:sample",
    ),
    "evaluate": Command(
        "Distances of samples from real images.", "evaluation.config:EvaluateConfig", "evaluation.evaluate:evaluate"
    ),
    "recognition": Command(
        "Are samples recognised, varied, and not copies?",
        "evaluation.config:RecognitionConfig",
        "evaluation.recognition:measure_recognition",
    ),
    "cas": Command(
        "Classification accuracy score.",
        "evaluation.config:ClassificationAccuracyConfig",
        "evaluation.classification_accuracy_score:classification_accuracy_score",
    ),
    "likelihood": Command(
        "Bits per dimension.", "evaluation.config:LikelihoodConfig", "evaluation.likelihood:measure_likelihood"
    ),
    "select-checkpoint": Command(
        "Which checkpoint of a run is best.",
        "evaluation.config:SelectionConfig",
        "evaluation.select_checkpoint:select_checkpoint",
    ),
    "search": Command(
        "Which steps, s, solver and guidance are best.", "studies.config:SearchConfig", "studies.search:search"
    ),
    "reproduce": Command(
        "The paper's tables and figures on your data.",
        "studies.config:ReproduceConfig",
        "studies.reproduce:reproduce",
    ),
    "compare": Command(
        "Rows of an experiment against each other.", "studies.config:CompareConfig", "studies.compare:compare"
    ),
    "convert openai": Command(
        "A checkpoint of improved-diffusion or guided-diffusion as a stage.",
        "conversion.config:OpenAIConfig",
        "conversion.stages:convert_openai",
    ),
    "convert sr3": Command(
        "A checkpoint of SR3 as a stage.", "conversion.config:SR3Config", "conversion.stages:convert_sr3"
    ),
    "convert diffusers": Command(
        "A pipeline of Diffusers around a UNet2DModel as a base stage.",
        "conversion.config:DiffusersConfig",
        "conversion.stages:convert_diffusers",
    ),
    "convert checkpoint": Command(
        "A checkpoint of a training run as a stage.",
        "conversion.config:TrainingCheckpointConfig",
        "conversion.training_checkpoints:convert_checkpoint",
    ),
    "export": Command(
        "The base network as a pipeline of Diffusers.",
        "conversion.config:ExportConfig",
        "conversion.stages:export",
    ),
    "export hub": Command(
        "A folder for the Hub, on request with the code it needs.",
        "conversion.config:HubExportConfig",
        "conversion.export_hub:export_hub",
    ),
    "app": Command("A cascade in a web page, to try things out.", "app.config:AppConfig", "app.serve:serve"),
    "card": Command(
        "Write or refresh the model card of a folder.", "commands.config:CardConfig", "commands.card:write"
    ),
}


def main(words: Sequence[str] | None = None) -> None:
    """The command that `words` name, by default those that this process was started with."""
    words = list(sys.argv[1:] if words is None else words)
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return run(name, words[length:], f"cdm {name}")
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
    elif words[0] in ("-V", "--version"):
        print(importlib.import_module("cdm_diffusers").__version__)
    else:
        refuse(words)


def script(name: str) -> None:
    """The command `name` for the script that this process runs, with the words that the script was given."""
    run(name, sys.argv[1:], os.path.relpath(sys.argv[0]))


def run(name: str, words: list[str], prog: str) -> None:
    """Parses `words` as the options of the command `name`, and calls its function; mistakes end the process."""
    command = COMMANDS[name]
    with errors_as_lines(prog):
        options = parse(resolve(command.options), words, prog)
        if hasattr(options, "check_places"):  # what a user has misspelt is said before the imports, which take seconds
            options.check_places()
        function = resolve(command.function)
        if logging := sys.modules.get("diffusers.utils.logging"):
            logging.disable_progress_bar()  # of the components of a pipeline, which would stand above an error's line
        function(options)


def resolve(path: str) -> Any:
    """What "module:name" in this package stands for."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"cdm_diffusers.{module}"), name)


def overview() -> str:
    """All commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  cdm {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Cascaded diffusion models: sample, train, measure and convert them.",
            "",
            *lines,
            "",
            "`cdm COMMAND --help` has the options of a command and an example.",
        ]
    )


def refuse(words: list[str]) -> NoReturn:
    """Ends the process: there is no such command. Groups such as "train" list theirs."""
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group and words[1:] == []:
        print(f"cdm: error: {words[0]!r} is not a command by itself; it must be {', '.join(group)}.", file=sys.stderr)
        raise SystemExit(2)
    if group and words[1] in ("-h", "--help"):
        print("\n".join(f"  cdm {name}  {COMMANDS[name].summary}" for name in group))
        raise SystemExit(0)
    given = " ".join(words[:2] if group else words[:1])
    nearest = difflib.get_close_matches(given, group or COMMANDS, 1)
    hint = f"did you mean `cdm {nearest[0]}`?" if nearest else "`cdm --help` lists all."
    print(f"cdm: error: {given!r} is not a command; {hint}", file=sys.stderr)
    raise SystemExit(2)
