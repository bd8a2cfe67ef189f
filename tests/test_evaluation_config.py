"""Options of the instruments: the command line's syntax, what is refused, and how little they need."""

import subprocess
import sys
from pathlib import Path

import pytest

from cdm_diffusers.evaluation import config as module
from cdm_diffusers.evaluation.config import (
    ClassificationAccuracyConfig,
    ClassifierConfig,
    EvaluateConfig,
    LikelihoodConfig,
    SampleConfig,
    SelectionConfig,
)
from cdm_diffusers.options import parse


SAMPLE = ("--pipeline", "cascade", "--output_dir", "samples", "--num_images", "8")


def sampled(*words):
    return parse(SampleConfig, [*SAMPLE, *words])


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--num_inference_steps", "50"], "num_inference_steps", 50),
        (
            ["--num_inference_steps", '{"base": 50, "super_res_1": 10}'],
            "num_inference_steps",
            {"base": 50, "super_res_1": 10},
        ),
        (
            ["--num_inference_steps", "base=50", "super_res_1=10"],
            "num_inference_steps",
            {"base": 50, "super_res_1": 10},
        ),
        (["--augmentation_levels", '{"super_res_1": 600}'], "augmentation_levels", {"super_res_1": 600}),
        (["--guidance_scale", "1.5"], "guidance_scale", 1.5),
        (["--guidance_scale=base=2"], "guidance_scale", {"base": 2.0}),
        (["--scheduler", "ddim"], "scheduler", "ddim"),
        (["--scheduler", '{"base": "dpmsolver++"}'], "scheduler", {"base": "dpmsolver++"}),
        (
            ["--inference_schedules", '{"super_res_1": [0.0001, 0.3], "super_res_2": "squaredcos_cap_v2"}'],
            "inference_schedules",
            {"super_res_1": [0.0001, 0.3], "super_res_2": "squaredcos_cap_v2"},
        ),
        (["--truncated"], "truncated", True),
        (["--keep_stages", "false"], "keep_stages", False),
        (["--labels", "Ankle boot,3"], "labels", "Ankle boot,3"),
    ],
)
def test_options_of_sampling(words, name, expected):
    value = getattr(sampled(*words), name)
    assert value == expected and type(value) is type(expected)


def test_options_of_the_others():
    bound = parse(LikelihoodConfig, ["--pipeline", "p", "--output", "o.json", "--stages", "base", "super_res_1"])
    assert bound.stages == ["base", "super_res_1"] and bound.device in ("cpu", "cuda")
    quality = ["--samples", "s", "--extractor", "dinov2", "--output", "o.json"]
    assert parse(EvaluateConfig, [*quality, "--inception_score"]).inception_score is True
    assert parse(EvaluateConfig, quality).inception_score is None
    trained = parse(
        ClassifierConfig, ["--output_dir", "o", "--architecture", "resnet-50", "--random_resized_crop", "no"]
    )
    assert (trained.random_resized_crop, trained.learning_rate, trained.random_flip) == (False, 0.1, True)
    scored = parse(ClassificationAccuracyConfig, ["--samples", "s", "--output_dir", "o", "--real", "both"])
    assert (scored.real, scored.train_batch_size, scored.eval_split) == ("both", 128, "test")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_inference_steps", "0"], "`num_inference_steps` is 0; it must be at least 1"),
        (["--num_inference_steps", '{"base": 0}'], "each value must be at least 1"),
        (["--augmentation_levels", "100"], "`augmentation_levels` is "),
        (["--num_inference_step", "3"], "did you mean `--num_inference_steps`"),
        (["--dtype", "int8"], "`dtype` is 'int8'; it must be one of"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        sampled(*words)
    written = capsys.readouterr().err
    assert error.value.code == 2 and message in written and written.count("\n") == 1


def test_an_output_is_not_a_folder(tmp_path):
    with pytest.raises(ValueError, match=rf"`output` is '{tmp_path}', a folder: give the name of a file"):
        SelectionConfig(run="run", extractor="dinov2", output=str(tmp_path))


@pytest.mark.parametrize("name", [name for name in dir(module) if name.endswith("Config") and name != "DataConfig"])
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as error:
        parse(getattr(module, name), ["--help"])
    assert error.value.code == 0 and "Example:" in capsys.readouterr().out


# What is needed

# The package without what its own `__init__` imports.
PACKAGE = "import types; package = types.ModuleType('cdm_diffusers'); package.__path__ = ['cdm_diffusers']\n"
PACKAGE += "sys.modules['cdm_diffusers'] = package\n"


def test_options_need_no_torch():
    run_without(("torch", "numpy", "diffusers", "transformers"), PACKAGE + "import cdm_diffusers.evaluation.config")


def test_sampling_needs_no_library_of_evaluation():
    """Nor of training: whoever samples at scale installs neither."""
    run_without(
        ("scipy", "matplotlib", "transformers", "peft", "datasets"),  # peft, where there is one, imports transformers
        "import sys; sys.path.insert(0, 'tests')\n"
        "import tempfile\n"
        "from small_cascade import small_cascade\n"
        "from cdm_diffusers.evaluation.config import SampleConfig\n"
        "from cdm_diffusers.evaluation.sample import sample\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    options = {'num_images': 3, 'num_inference_steps': 1, 'keep_stages': True}\n"
        "    sample(SampleConfig(pipeline='small', output_dir=folder, **options), small_cascade())\n",
    )


def test_tables_need_no_library_of_evaluation():
    run_without(("torch", "scipy", "matplotlib"), PACKAGE + "import cdm_diffusers.evaluation.tables")


def run_without(libraries, program):
    missing = "".join(f"sys.modules[{name!r}] = None\n" for name in libraries)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", f"import sys\n{missing}{program}"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
