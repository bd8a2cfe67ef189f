"""Declaring options, checking them whole, and reading them from Python, JSON and the command line."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import huggingface_hub
import pytest

from cdm_diffusers.commands.config import SuperResolveConfig
from cdm_diffusers.options import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    errors_as_lines,
    from_json,
    option,
    options,
    parse,
)
from cdm_diffusers.options.problems import did_you_mean
from cdm_diffusers.presets import get_preset


@options
class Seeded:
    seed: NonNegativeInt = option("Image i is drawn from the generator of (seed, i).", 0)


@options
class Sampling(Seeded):
    """
    Samples a
    cascade.

    What it reads is not shown.

    Example:
        cdm sample --pipeline checkpoints/fashion-mnist-32 \\
            --num_images 10

        cdm sample --help

    Raises:
        ValueError: an ugly combination.
    """

    pipeline: str = option("Folder or Hub id of a cascade.")
    num_images: PositiveInt = option("Number of images to sample, 100% of them.")
    batch_size: PositiveInt = option("Images per call of the pipeline.", 100)
    num_inference_steps: PositiveInt | dict[str, PositiveInt] | None = option("Steps. Default: the pipeline's.", None)
    scheduler: str | dict[str, str] | None = option("Solver.", None)
    inference_schedules: dict[str, list[float] | str] | None = option("Noise levels.", None)
    block_out_channels: list[PositiveInt] | None = option("Channels of each level.", None)
    blur_sigma_range: tuple[PositiveFloat, PositiveFloat] = option("Smallest and largest sigma.", (0.4, 0.6))
    label_dropout: Fraction = option("Probability.", 0.1)
    image_format: Literal["png", "npz"] = option("Format.", "png")
    streaming: bool = option("Stream the data set.", False)
    random_flip: bool | None = option("Flip half of the images.", None)
    shift: bool = option("Shift images.", True)
    stages: list[str] = option("Stages.", ["base"])
    device: str = option("Default: cuda where there is one.", default_factory=lambda: "cpu")

    def __post_init__(self):
        if self.streaming and self.random_flip:
            raise ValueError("`random_flip` with `streaming`: leave one out.")


@options
class Info:
    folder: str = option("A cascade.", positional=True)
    json: bool = option("Print JSON.", False)
    more: list[str] | None = option("More.", None)


@options
class Stage:
    preset: str = option("Preset.")
    learning_rate: PositiveFloat = option("Peak learning rate.", 1e-4)

    def __post_init__(self):
        if self.preset == "none":
            raise ValueError("`preset` is 'none'; it must be a preset.")


@options
class Experiment:
    sampling: Sampling = option("Samples.")
    stages: dict[str, Stage] = option("Stages.")
    rows: list[Stage] | None = option("Rows.", None)
    default_stage: Stage | str = option("A stage, or its name.", "base")


GIVEN = {"pipeline": "p", "num_images": 4}
WORDS = ["--pipeline", "p", "--num_images", "4"]


def message(**values) -> str:
    with pytest.raises(ValueError) as caught:
        Sampling(**{**GIVEN, **values})
    assert type(caught.value) is ValueError
    return str(caught.value)


# From Python


def test_is_an_ordinary_dataclass():
    config = Sampling(**GIVEN, seed=3)
    assert (config.seed, config.stages, config.device) == (3, ["base"], "cpu")
    assert dataclasses.asdict(config)["num_images"] == 4
    assert [field.name for field in dataclasses.fields(config)][:3] == ["seed", "pipeline", "num_images"]
    assert dataclasses.replace(config, seed=5) == Sampling(**GIVEN, seed=5)
    with pytest.raises(ValueError, match="`seed` is -1; it must be at least 0"):
        dataclasses.replace(config, seed=-1)
    config.num_images = 0  # assignments are not checked
    config.stages.append("super_res_1")
    assert Sampling(**GIVEN).stages == ["base"]
    with pytest.raises(TypeError):
        Sampling("p", 4)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"label_dropout": 1}, 1.0),
        ({"block_out_channels": (1, 2)}, [1, 2]),
        ({"blur_sigma_range": [1, 2.0]}, (1.0, 2.0)),
        ({"inference_schedules": {"base": (0.5, 1), "a": "cosine"}}, {"base": [0.5, 1.0], "a": "cosine"}),
        ({"num_inference_steps": {"base": 3}}, {"base": 3}),
        ({"pipeline": Path("a") / "b"}, os.path.join("a", "b")),
    ],
)
def test_takes_what_serves(given, taken):
    (name,) = given
    value = getattr(Sampling(**{**GIVEN, **given}), name)
    assert value == taken
    assert type(value) is type(taken)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_images": 0}, "`num_images` is 0; it must be at least 1."),
        ({"num_images": 1.5}, "`num_images` is 1.5; it must be a whole number of at least 1."),
        ({"num_images": "3"}, "`num_images` is '3'; it must be a whole number of at least 1."),
        ({"num_images": True}, "`num_images` is True; it must be a whole number of at least 1."),
        ({"num_images": None}, "`num_images` is None; it must be a whole number of at least 1."),
        ({"label_dropout": 2}, "`label_dropout` is 2; it must be between 0 and 1."),
        ({"label_dropout": "x"}, "`label_dropout` is 'x'; it must be a number between 0 and 1."),
        ({"streaming": 1}, "`streaming` is 1; it must be true or false."),
        ({"image_format": "gif"}, "`image_format` is 'gif'; it must be one of ['png', 'npz']."),
        ({"pipeline": 3}, "`pipeline` is 3; it must be a string."),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0; it must be at least 1."),
        (
            {"num_inference_steps": {"a": 1, "b": 0}},
            "`num_inference_steps` is {'a': 1, 'b': 0}; each value must be at least 1.",
        ),
        (
            {"num_inference_steps": {"b": "x"}},
            "`num_inference_steps` is {'b': 'x'}; each value must be a whole number of at least 1.",
        ),
        (
            {"num_inference_steps": "x"},
            "`num_inference_steps` is 'x'; it must be a whole number of at least 1 or a mapping of names to whole "
            "numbers of at least 1.",
        ),
        ({"scheduler": 5}, "`scheduler` is 5; it must be a string or a mapping of names to strings."),
        (
            {"inference_schedules": {"base": 3}},
            "`inference_schedules` is {'base': 3}; each value must be a list of numbers or a string.",
        ),
        ({"block_out_channels": [64, 0]}, "`block_out_channels` is [64, 0]; each item must be at least 1."),
        ({"block_out_channels": 64}, "`block_out_channels` is 64; it must be a list of whole numbers of at least 1."),
        ({"blur_sigma_range": (1.0,)}, "`blur_sigma_range` is (1.0,); it must be 2 numbers greater than 0."),
        ({"blur_sigma_range": (0, 1)}, "`blur_sigma_range` is (0, 1); each item must be greater than 0."),
        ({"label_dropout": float("nan")}, "`label_dropout` is nan; it must be between 0 and 1."),
        ({"batchsize": 3}, "`batchsize` is not an option of Sampling; did you mean `batch_size`?"),
        ({"zzz": 3}, "`zzz` is not an option of Sampling."),
        ({"streaming": True, "random_flip": True}, "`random_flip` with `streaming`: leave one out."),
    ],
)
def test_one_sentence_for_each_wrong_value(values, expected):
    assert message(**values) == expected


def test_nearest_names_are_found_in_longer_ones():
    names = ["patch_size", "train_batch_size", "seed"]
    assert did_you_mean("batchsize", names) == "; did you mean `train_batch_size`?"
    assert did_you_mean("patchsize", names) == "; did you mean `patch_size`?"
    assert did_you_mean("zzz", names) == "."


def test_missing_extras_are_those_of_the_room(capsys):
    for package, extra in (("cdm_diffusers.data.sources", "train"), ("cdm_diffusers.evaluation.evaluate", "eval")):
        statement = "raise ModuleNotFoundError('no', name='datasets')"
        assert f"cdm-diffusers[{extra}]" in line(capsys, fail_with, statement, package)


def test_all_problems_in_one_message():
    assert message(seed=-1, num_images=0) == (
        "`seed` is -1; it must be at least 0. `num_images` is 0; it must be at least 1."
    )
    with pytest.raises(ValueError, match=r"^`pipeline` is missing\. `num_images` is missing\.$"):
        Sampling()
    with pytest.raises(
        ValueError, match=r"^`sed` is not an option.*`pipeline` is missing\. `num_images` is missing\.$"
    ):
        Sampling(sed=1)


# From JSON


def experiment(folder: Path, **changes) -> Path:
    file = folder / "x.json"
    values = {"sampling": dict(GIVEN), "stages": {"base": {"preset": "a"}}}
    file.write_text(json.dumps({**values, **changes}))
    return file


def test_nested_configuration(tmp_path):
    file = experiment(tmp_path, rows=[{"preset": "b"}], default_stage={"preset": "c", "learning_rate": 1})
    assert from_json(Experiment, file) == Experiment(
        sampling=Sampling(**GIVEN),
        stages={"base": Stage(preset="a")},
        rows=[Stage(preset="b")],
        default_stage=Stage(preset="c", learning_rate=1.0),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"sampling": {**GIVEN, "batchsize": 1}},
            "`sampling.batchsize` in {file} is not an option; did you mean `batch_size`?",
        ),
        ({"sampling": {"pipeline": "p"}}, "`sampling.num_images` in {file} is missing."),
        (
            {"sampling": {**GIVEN, "num_inference_steps": {"base": 0}}},
            "`sampling.num_inference_steps` in {file} is {{'base': 0}}; each value must be at least 1.",
        ),
        (
            {"stages": {"base": {"preset": "a", "learning_rate": 0}}},
            "`stages.base.learning_rate` in {file} is 0; it must be greater than 0.",
        ),
        (
            {"rows": [{"preset": "a"}, {"presett": "a"}]},
            "`rows.1.presett` in {file} is not an option; did you mean `preset`? "
            "`rows.1.preset` in {file} is missing.",
        ),
        ({"stages": 3}, "`stages` in {file} is 3; it must be a mapping of names to objects (Stage)."),
        ({"sampling": "x"}, "`sampling` in {file} is 'x'; it must be an object (Sampling)."),
        (
            {"default_stage": {"preset": "a", "learning_rat": 1}},
            "`default_stage.learning_rat` in {file} is not an option; did you mean `learning_rate`?",
        ),
        (
            {"stages": {"base": {"preset": "none"}}},
            "`preset` is 'none'; it must be a preset. (`stages.base` in {file})",
        ),
        ({"stage": {}}, "`stage` in {file} is not an option; did you mean `stages`?"),
    ],
)
def test_names_the_path_of_what_is_wrong(tmp_path, changes, expected):
    file = experiment(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        from_json(Experiment, file)
    assert str(caught.value) == expected.format(file=repr(str(file)))


def test_what_is_not_a_configuration(tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(OSError, match=r"x.json' cannot be read \(No such file or directory\): give a JSON file"):
        from_json(Experiment, file)
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"^'.*x.json' is \[1\]; it must be an object \(Experiment\)\.$"):
        from_json(Experiment, file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"^'.*x.json' is not valid JSON \(.*\)\.$"):
        from_json(Experiment, file)


# From the command line


def refused(capsys, kind, words) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(kind, words, prog="cdm sample")
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cdm sample: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("cdm sample: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("", {}),
        ("--block_out_channels 64 128 192 --seed 3", {"block_out_channels": [64, 128, 192], "seed": 3}),
        ("--blur-sigma-range 0.1 2", {"blur_sigma_range": (0.1, 2.0)}),
        ("--streaming", {"streaming": True}),
        ("--streaming false --random_flip true", {"streaming": False, "random_flip": True}),
        ("--random-flip False --streaming=true", {"streaming": True, "random_flip": False}),
        ("--no_shift", {"shift": False}),
        ("--shift false", {"shift": False}),
        ("--num_inference_steps 25", {"num_inference_steps": 25}),
        ('--num_inference_steps {"base":25}', {"num_inference_steps": {"base": 25}}),
        ("--num-inference-steps base=25 sr=10", {"num_inference_steps": {"base": 25, "sr": 10}}),
        ("--scheduler unipc", {"scheduler": "unipc"}),
        ("--scheduler super_res_1=unipc", {"scheduler": {"super_res_1": "unipc"}}),
        ("--inference_schedules a=[0.1,1] b=cos", {"inference_schedules": {"a": [0.1, 1.0], "b": "cos"}}),
        ('--inference_schedules {"a":[0.1,1]}', {"inference_schedules": {"a": [0.1, 1.0]}}),
        ("--image_format npz --label_dropout 1e-2", {"image_format": "npz", "label_dropout": 0.01}),
        ("--image-format=npz", {"image_format": "npz"}),
        ("--stages none", {"stages": ["none"]}),
    ],
)
def test_words(words, values):
    assert parse(Sampling, [*WORDS, *words.split()]) == Sampling(**GIVEN, **values)


def test_reads_the_words_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *WORDS])
    assert parse(Sampling) == Sampling(**GIVEN)


@pytest.mark.parametrize("words", [["--folder", "x"], ["--folder=x"], ["--more", "a", "--folder", "x"]])
def test_positional_arguments_by_name(words):
    assert parse(Info, words).folder == "x"


@pytest.mark.parametrize("words", ["p --images a.png b.png", "--images a.png b.png --pipeline p", "-- p a.png b.png"])
def test_one_of_several_positional_arguments_by_name(words):
    parsed = parse(SuperResolveConfig, ["--output", "d", *words.split()])
    assert (parsed.pipeline, parsed.images) == ("p", ["a.png", "b.png"])


def test_positional_arguments(capsys):
    for words in ("folder --json", "--json folder", "--json true folder", "--more a b --json folder"):
        parsed = parse(Info, words.split())
        assert (parsed.folder, parsed.json) == ("folder", True)
    assert refused(capsys, Info, []) == "`folder` is missing; see --help."
    assert refused(capsys, Info, ["a", "b"]) == "unexpected argument 'b'; see --help."
    assert refused(capsys, Info, ["--jsn"]) == "`--jsn` is not an option; did you mean `--json`?"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--batchsize 3", "`--batchsize` is not an option; did you mean `--batch_size`?"),
        ("--batch-sizes=3", "`--batch-sizes` is not an option; did you mean `--batch_size`?"),
        ("--num_image 3", "`--num_image` is not an option; did you mean `--num_images`?"),
        ("--zzz", "`--zzz` is not an option."),
        ("", "`--pipeline`, `--num_images` are missing; see --help."),
        ("--pipeline", "`--pipeline` takes a value."),
        ("--pipeline p", "`--num_images` is missing; see --help."),
        ("--pipeline p --num_images 0", "`num_images` is 0; it must be at least 1."),
        ("--pipeline p --num_images 1.5", "`num_images` is '1.5'; it must be a whole number of at least 1."),
        ("--pipeline p --num_images 1 2", "unexpected argument '2'; see --help."),
        ("--pipeline p --num_images -3", "`num_images` is -3; it must be at least 1."),
        (
            "--pipeline p --num_images 1 --streaming=maybe",
            "`streaming` is 'maybe'; it must be true or false.",
        ),
        (
            "--pipeline p --num_images 1 --num_inference_steps base=0",
            "`num_inference_steps` is {'base': 0}; each value must be at least 1.",
        ),
        (
            "--pipeline p --num_images 1 --streaming --random_flip",
            "`random_flip` with `streaming`: leave one out.",
        ),
    ],
)
def test_mistakes_on_the_command_line(capsys, words, expected):
    assert refused(capsys, Sampling, words.split()) == expected


def test_broken_json_on_the_command_line(capsys):
    problem = refused(capsys, Sampling, [*WORDS, "--scheduler", "{base: unipc}"])
    assert problem.startswith("`scheduler` is '{base: unipc}', which is not valid JSON (")


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        parse(Sampling, ["--help"], prog="cdm sample")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "usage: cdm sample --pipeline TEXT --num_images N [options]\n\nSamples a cascade.\n\nrequired:\n"
    )
    assert "not shown" not in text and "ugly" not in text
    assert text.index("--num_images N\n      Number of images to sample, 100% of them.") < text.index("options:")
    assert "--batch_size N\n      Images per call of the pipeline. Default: 100." in text
    assert "--num_inference_steps N|NAME=N ...\n      Steps. Default: the pipeline's.\n" in text
    assert "--image_format {png,npz}\n      Format. Default: png." in text
    assert "--streaming [true|false]\n      Stream the data set.\n" in text
    assert "Stages. Default: base." in text
    assert text.endswith(
        "Example:\n    cdm sample --pipeline checkpoints/fashion-mnist-32 \\\n        --num_images 10\n\n"
        "    cdm sample --help\n"
    )
    assert max(map(len, text.splitlines())) <= 80


def test_help_of_positional_arguments_without_a_docstring(capsys):
    with pytest.raises(SystemExit):
        parse(Info, ["-h"], prog="cdm info")
    assert capsys.readouterr().out.startswith(
        "usage: cdm info FOLDER [options]\n\nrequired:\n  FOLDER\n      A cascade.\n"
    )


# Errors as people read them


def fail_with(statement: str, package: str):
    """Executes a statement as if it stood in a module of `package`."""
    exec(statement, {"__name__": f"{package}.x", "__package__": package})


def line(capsys, function, *arguments) -> str:
    with pytest.raises(SystemExit) as caught, errors_as_lines("cdm x"):
        function(*arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_users_mistakes_are_one_line(capsys, tmp_path):
    assert line(capsys, get_preset, "nope").startswith("cdm x: error: ")
    statement = r"raise ValueError('`a` is 1;\n it must be 2.')"
    assert line(capsys, fail_with, statement, "cdm_diffusers") == "cdm x: error: `a` is 1; it must be 2.\n"
    assert line(capsys, fail_with, "raise OSError(28, 'no space')", "cdm_diffusers.files").endswith("no space\n")
    file = str(tmp_path / "x")
    assert line(capsys, Path(file).read_text) == f"cdm x: error: {file!r}: No such file or directory.\n"
    assert "local_files_only" in line(capsys, fail_with, "raise OSError('local_files_only')", "diffusers.utils")
    download = partial(huggingface_hub.hf_hub_download, filename="x", cache_dir=tmp_path, local_files_only=True)
    for repository in ("a//b", "nobody/nothing"):
        assert line(capsys, download, repository).count("\n") == 1


@pytest.mark.parametrize(
    ("statement", "package"),
    [
        ("raise RuntimeError", "cdm_diffusers"),
        ("raise KeyError('a')", "cdm_diffusers"),
        ("int('x')", "cdm_diffusers"),
        ("a, b = [1]", "cdm_diffusers"),
        ("import json; json.loads('x')", "cdm_diffusers"),
        ("raise ValueError", "torch.nn"),
        ("raise OSError", "torch.nn"),
        ("raise ValueError", "diffusers"),
        ("import no_such_module", "cdm_diffusers"),
    ],
)
def test_bugs_keep_their_traceback(statement, package):
    with pytest.raises(Exception) as caught, errors_as_lines("cdm x"):
        fail_with(statement, package)
    assert not isinstance(caught.value, SystemExit)


@pytest.mark.parametrize(
    ("module", "extra"), [("matplotlib.pyplot", "eval"), ("scipy", "eval"), ("datasets", "train")]
)
def test_missing_extras(capsys, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    problem = line(capsys, fail_with, f"import {module}", "cdm_diffusers")
    assert problem == f'cdm x: error: {module} is not installed: pip install "cdm-diffusers[{extra}]".\n'


def test_other_processes_say_nothing(capsys, monkeypatch):
    for rank in ("RANK", "LOCAL_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(rank, "1")
            assert line(capsys, get_preset, "nope") == ""
            patch.setenv(rank, "0")
            assert line(capsys, get_preset, "nope") != ""


def test_debugging_and_interrupts(monkeypatch):
    with pytest.raises(SystemExit) as caught, errors_as_lines("cdm x"):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    monkeypatch.setenv("CDM_DEBUG", "1")
    with pytest.raises(ValueError), errors_as_lines("cdm x"):
        get_preset("nope")


def test_imports_nothing_heavy():
    file = Path(__file__).parent.parent / "cdm_diffusers" / "options" / "__init__.py"
    code = (
        "import importlib.util, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('options', {str(file)!r})\n"
        "module = sys.modules['options'] = importlib.util.module_from_spec(spec)\n"
        "start = time.process_time()\n"
        "spec.loader.exec_module(module)\n"
        "print(time.process_time() - start, *sys.modules)\n"
    )
    seconds, *modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "diffusers", "transformers", "accelerate", "PIL"} & set(modules)
    assert float(seconds) < 1
