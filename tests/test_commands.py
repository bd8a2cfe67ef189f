"""The command `cdm`: its help, its mistakes, and the commands that show what a pipeline is and makes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run, run_script
from small_cascade import SIZES, small_cascade

import cdm_diffusers
from cdm_diffusers import (
    CascadedDDPMScheduler,
    CascadedDiffusionPipeline,
    CascadedUNet2DModel,
    SuperResolutionPipeline,
)
from cdm_diffusers.commands.main import COMMANDS, main, resolve


@pytest.fixture(scope="module")
def cascade(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipelines") / "cascade"
    small_cascade().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A cascade\n")
    return str(folder)


@pytest.fixture(scope="module")
def stage(cascade, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipelines") / "stage"
    first = small_cascade().stages[1]
    SuperResolutionPipeline(
        first.unet, first.scheduler, first.noising_scheduler, default_num_inference_steps=3
    ).save_pretrained(folder)
    return str(folder)


def refusal(capsys, *words: str) -> str:
    """What `cdm words` says before it ends with exit code 2: one line, and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    message = capsys.readouterr().err
    lines = [line for line in message.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in message and "Loading" not in message
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# Help and mistakes


def test_help_of_all_commands_needs_nothing_heavy():
    """In one process of its own: none of them imports what takes seconds."""
    program = """
import contextlib, io, sys
from cdm_diffusers.commands.main import COMMANDS, main
for name in COMMANDS:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            main([*name.split(), "--help"])
    except SystemExit as end:
        assert end.code in (0, None), name
    assert text.getvalue().startswith(f"usage: cdm {name}"), text.getvalue()
    example = text.getvalue().partition("Example")[2]
    assert "  cdm " in example, f"{name} has no example"
    assert not any("  " in line.strip() for line in example.splitlines()), f"joined lines in the example of {name}"
heavy = {"torch", "numpy", "diffusers", "transformers", "datasets", "scipy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    run("-c", program)


@pytest.mark.parametrize(
    "words", ["data nowhere", "train base --preset small_16 --output_dir x --train_data_dir nowhere"]
)
def test_a_folder_that_is_not_there_is_said_before_anything_heavy_is_imported(words):
    program = f"""
import contextlib, io, sys
from cdm_diffusers.commands.main import main
said = io.StringIO()
try:
    with contextlib.redirect_stderr(said):
        main({words.split()})
except SystemExit as end:
    assert end.code == 2
assert "'nowhere'" in said.getvalue() and "folder" in said.getvalue(), said.getvalue()
assert not {{"torch", "numpy", "datasets"}} & set(sys.modules)
"""
    run("-c", program)


def test_all_functions_exist():
    for name, command in COMMANDS.items():
        assert callable(resolve(command.function)), name


def test_overview_and_groups_list_commands(capsys):
    main([])
    overview = capsys.readouterr().out
    assert all(f"cdm {name} " in overview for name in COMMANDS)
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    assert re.findall(r"cdm train \w+", capsys.readouterr().out) == [
        "cdm train base",
        "cdm train sr",
        "cdm train classifier",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smple"], "'smple' is not a command; did you mean `cdm sample`?"),
        (["train"], "'train' is not a command by itself; it must be train base, train sr, train classifier."),
        (["train", "bse"], "'train bse' is not a command; did you mean `cdm train base`?"),
        (["sample", "x", "--class_label", "1"], "`--class_label` is not an option; did you mean `--class_labels`?"),
        (["train", "sr", "--presets", "x"], "`--presets` is not an option; did you mean `--preset`?"),
        (["train", "base", "--preset", "smal_16", "--output_dir", "x"], "; did you mean `small_16`?"),
        (["train", "sr"], "`--output_dir`, `--preset` are missing"),
        (["sample", "x", "--seed", "-1"], "`seed` is -1; it must be at least 0"),
        (["sample", "x", "--scheduler", "unipic"], "or a mapping of names to such; did you mean `unipc`?"),
    ],
)
def test_mistakes_are_one_line(capsys, words, said):
    assert said in refusal(capsys, *words)


def test_a_folder_that_is_not_there(capsys, tmp_path):
    assert str(tmp_path / "nothing") in refusal(capsys, "info", str(tmp_path / "nothing"))


def test_what_holds_no_pipeline(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "file' is a file: give the folder" in refusal(capsys, "info", str(tmp_path / "file"))
    assert "holds no pipeline: there is no model_index.json" in refusal(capsys, "info", str(tmp_path))


def test_mistakes_in_a_configuration_come_before_packages_that_are_missing(tmp_path):
    (tmp_path / "x.json").write_text('{"sampling": {"batchsize": 2}}')
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('matplotlib', 'scipy', 'transformers')))\n"
        "from cdm_diffusers.commands.main import main\n"
        "main()"
    )
    result = run_script("-c", program, "reproduce", "table2b", "--config", tmp_path / "x.json", "--dry_run")
    assert result.returncode == 2 and "`sampling.batchsize` in" in result.stderr


def test_main_process_alone_speaks():
    words = ["-m", "cdm_diffusers", "train", "sr"]
    first, second = run_script(*words, RANK="0"), run_script(*words, RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("\n") == 1 and second.stderr == ""


def test_scripts_speak_of_themselves():
    result = run_script("training/train_sr.py", "--presets", "x")
    assert result.returncode == 2
    assert result.stderr == "training/train_sr.py: error: `--presets` is not an option; did you mean `--preset`?\n"


# ---------------------------------------------------------------------------------------------------------------------
# The package is imported lazily


def test_import_is_light():
    run("-c", "import sys, cdm_diffusers; assert not {'torch', 'numpy'} & set(sys.modules); dir(cdm_diffusers)")


def test_all_names_are_there_when_asked_for():
    run("-c", "from cdm_diffusers import *; from diffusers import ModelMixin as M; assert ModelMixin is M; get_preset")
    assert set(cdm_diffusers.__all__) <= set(dir(cdm_diffusers))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cdm_diffusers.nothing  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------------
# cdm info


def test_info(capsys, cascade):
    main(["info", cascade, "--json"])
    description = json.loads(capsys.readouterr().out)
    assert description["class"] == "CascadedDiffusionPipeline" and description["license"] == "mit"
    assert description["classes"] == {"0": "T-shirt/top", "1": "Trouser", "2": "Ankle boot"}
    stages = description["stages"]
    assert {name: stage["size"] for name, stage in stages.items()} == SIZES
    pipeline = small_cascade()
    assert [stage["parameters"] for stage in stages.values()] == [s.unet.num_parameters() for s in pipeline.stages]
    assert stages["super_res_1"]["defaults"] == {
        "num_inference_steps": 3,
        "augmentation_levels": 5,
        "guidance_scale": 1.0,
    }
    assert stages["super_res_1"]["noising_scheduler"]["num_train_timesteps"] == 20
    main(["info", cascade])
    assert "| super_res_1 | 4x4 to 8x8 |" in capsys.readouterr().out


def test_info_of_a_stage(capsys, stage):
    main(["info", stage, "--json"])
    description = json.loads(capsys.readouterr().out)
    assert list(description["stages"]) == ["super_res"] and description["license"] is None


def test_info_reads_no_weights(capsys, cascade, tmp_path):
    """Weights that nobody could read are no obstacle."""
    copy = tmp_path / "cascade"
    shutil.copytree(cascade, copy)
    for file in copy.rglob("*.safetensors"):
        file.write_bytes(b"")
    main(["info", str(copy), "--json"])
    assert json.loads(capsys.readouterr().out)["stages"]


# ---------------------------------------------------------------------------------------------------------------------
# cdm sample


def test_sample_writes_a_labelled_grid(cascade, tmp_path):
    picture = tmp_path / "new" / "grid.png"
    words = ["--class_labels", "Ankle boot", "0", "--num_images_per_label", "2", "--scale", "3"]
    main(["sample", cascade, "--output", str(picture), *words])
    with Image.open(picture) as grid:
        assert grid.size == (110 + 2 * (3 * 48 + 8), 2 * (48 + 8))  # two samples of three stages, two classes


@pytest.mark.parametrize(("size", "shown"), [(64, 128), (128, 128)])
def test_images_are_enlarged_in_a_grid_while_they_are_small(tmp_path, size, shown):
    unet = CascadedUNet2DModel(
        size,
        block_out_channels=(8,),
        layers_per_block=1,
        attention_resolutions=(),
        num_attention_heads=1,
        norm_num_groups=4,
    )
    CascadedDiffusionPipeline(unet, CascadedDDPMScheduler(10, variance_type="fixed_small")).save_pretrained(
        tmp_path / "base"
    )
    words = ["--num_images_per_label", "1", "--num_inference_steps", "1", "--output", str(tmp_path / "grid.png")]
    main(["sample", str(tmp_path / "base"), *words])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (110 + shown + 8, shown + 8)


def test_sample_writes_files(cascade, tmp_path):
    main(["sample", cascade, "--output", str(tmp_path / "out"), "--num_images_per_label", "2", "--seed", "1"])
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"{name}-{place}.png" for name in ("Ankle_boot", "T-shirt_top", "Trouser") for place in (0, 1)]
    output = small_cascade()(
        class_labels=[0, 1, 2], num_images_per_label=2, generator=torch.Generator().manual_seed(1)
    ).images
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "T-shirt_top-1.png")), np.asarray(output[1]))


def test_sample_takes_options_per_stage(cascade, tmp_path, capsys):
    words = ["--num_inference_steps", "base=2", "--augmentation_levels", "7", "--last_stage", "super_res_1"]
    words += ["--scheduler", "base=ddim", "--truncated", "false"]
    main(["sample", cascade, "--output", str(tmp_path / "a.png"), *words])
    main(["sample", cascade, "--output", str(tmp_path / "b.png"), *words, "--consistency"])
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert "base | super_res_1 side by side" in capsys.readouterr().out
    assert "super_res_9" in refusal(capsys, "sample", cascade, "--num_inference_steps", "super_res_9=2")
    for name, times in (("c.png", "[9, 4]"), ("d.PNG", "[9, 0]")):
        times = ["--timesteps", f'{{"base": {times}}}', "--last_stage", "base"]
        main(["sample", cascade, "--output", str(tmp_path / name), *times])
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "d.PNG").read_bytes()
    assert "must end in .png" in refusal(capsys, "sample", cascade, "--output", str(tmp_path / "e.jpg"))
    assert "only ContinuousDDPMScheduler takes" in refusal(
        capsys, "sample", cascade, "--inference_schedules", '{"base": [0.1, 0.2]}', "--last_stage", "base"
    )
    assert "'Hat'" in refusal(capsys, "sample", cascade, "--class_labels", "Hat")
    for device in ("cuda:99", "meta", "hpu", "nonsense"):
        said = refusal(capsys, "sample", cascade, "--device", device)
        assert f"`device` is {device!r}, where networks cannot run here" in said


def test_an_output_that_cannot_be_written_is_found_before_sampling(capsys, cascade, tmp_path, monkeypatch):
    monkeypatch.setattr(CascadedDiffusionPipeline, "__call__", None)
    (tmp_path / "file").write_text("mine")
    assert "file'" in refusal(capsys, "sample", cascade, "--output", str(tmp_path / "file" / "a.png"))
    assert "file'" in refusal(capsys, "sample", cascade, "--output", str(tmp_path / "file"))
    (tmp_path / "b.png").mkdir()
    assert "b.png', which is a folder" in refusal(capsys, "sample", cascade, "--output", str(tmp_path / "b.png"))


def test_as_it_is_before_super_resolving(capsys, stage, small_images, tmp_path, monkeypatch):
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", None)
    (tmp_path / "file").write_text("mine")
    words = ["--class_labels", "1", "--output", str(tmp_path / "file")]
    assert "file'" in refusal(capsys, "super-resolve", stage, small_images[0], *words)


def test_sample_of_an_unconditional_cascade(tmp_path):
    small_cascade(num_stages=2, num_classes=None).save_pretrained(tmp_path / "cascade")
    main(["sample", str(tmp_path / "cascade"), "--output", str(tmp_path / "out"), "--num_images_per_label", "3"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [f"image-{place}.png" for place in range(3)]


def test_sample_refuses_a_stage_that_takes_images(capsys, stage):
    assert "cdm super-resolve" in refusal(capsys, "sample", stage)


# ---------------------------------------------------------------------------------------------------------------------
# cdm super-resolve


@pytest.fixture
def small_images(tmp_path) -> list[str]:
    files = [tmp_path / f"{name}.png" for name in ("one", "two")]
    for number, file in enumerate(files):
        Image.fromarray(np.full((4, 4), 60 * (number + 1), np.uint8)).save(file)
    return list(map(str, files))


@pytest.mark.parametrize(("pipeline", "size"), [("cascade", 16), ("stage", 8)])
def test_super_resolve(request, small_images, tmp_path, pipeline, size):
    words = ["--output", str(tmp_path / "large"), "--class_labels", "1", "--augmentation_level", "2"]
    main(["super-resolve", request.getfixturevalue(pipeline), *small_images, *words])
    for name in ("one", "two"):
        with Image.open(tmp_path / "large" / f"{name}.png") as image:
            assert image.size == (size, size)


def test_super_resolve_keeps_to_the_images(stage, small_images, tmp_path):
    main(["super-resolve", stage, *small_images, "--output", str(tmp_path), "--class_labels", "1", "--consistency"])
    for number, name in enumerate(("one", "two")):
        averages = np.asarray(Image.open(tmp_path / f"{name}.png"), np.float32).reshape(4, 2, 4, 2).mean((1, 3))
        assert np.abs(averages - 60 * (number + 1)).max() < 1


def test_super_resolve_sizes(capsys, stage, tmp_path):
    file = tmp_path / "picture.png"
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(file)
    words = ["super-resolve", stage, str(file), "--output", str(tmp_path / "large"), "--class_labels", "1"]
    assert "20x30 pixels; it must be 4x4: --resize" in refusal(capsys, *words)
    main([*words, "--resize"])
    assert Image.open(tmp_path / "large" / "picture.png").size == (8, 8)


def test_super_resolve_refuses_what_it_cannot_do(capsys, tmp_path, stage, small_images):
    (tmp_path / "text.png").write_text("no picture")
    words = ["--output", str(tmp_path / "large"), "--class_labels", "1"]
    assert "cannot be read" in refusal(capsys, "super-resolve", stage, str(tmp_path / "text.png"), *words)
    assert not (tmp_path / "large").exists()
    assert "some over others" in refusal(capsys, "super-resolve", stage, small_images[0], small_images[0], *words)
    small_cascade(num_stages=1).save_pretrained(tmp_path / "base")
    assert "a base alone" in refusal(capsys, "super-resolve", str(tmp_path / "base"), *small_images, *words)


# cdm assemble


@pytest.fixture
def stages(tmp_path):
    """Words that join a base and the stage after it, each in a folder of its own."""
    cascade = small_cascade(num_stages=2)
    for name in ("base", "super_res_1"):
        cascade.stage_pipeline(name).save_pretrained(tmp_path / name)
    return ["assemble", "--base", str(tmp_path / "base"), "--super_res", str(tmp_path / "super_res_1")]


@pytest.mark.parametrize("name", ["base", "super_res_1"])
def test_no_stage_is_written_over(capsys, stages, tmp_path, name):
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}

    before = content()
    assert "is one of the stages" in refusal(capsys, *stages, "--output", str(tmp_path / name))
    assert content() == before


@pytest.mark.parametrize("left", ["recognition.json", "samples.png", "validation.json", "super_res_2_unet", "unet"])
def test_two_pipelines_do_not_mix(capsys, stages, tmp_path, left):
    """A folder that has more of another pipeline than what is written over."""
    folder = tmp_path / "cascade"
    main([*stages, "--output", str(folder)])
    main([*stages, "--output", str(folder)])  # as often as one likes
    (folder / left).mkdir()
    assert f"which already holds {left}: move" in refusal(capsys, *stages, "--output", str(folder))
    assert (folder / left).is_dir()


@pytest.mark.parametrize(
    "words",
    [
        "export {base} --output",
        "export hub {base} --output",
        "convert checkpoint {checkpoint} --output",
        "convert diffusers {exported} --output",
        "distill {base} --end_steps 1 --train_data_dir {images} --output_dir",
        "train base --preset fashion_mnist_8 --train_data_dir {images} --output_dir",
    ],
)
def test_no_stage_is_written_into_a_cascade(capsys, cascade, small_images, tmp_path, words):
    """Its other parts would stay beside the stage."""
    places = {
        "base": tmp_path / "base",
        "images": tmp_path,
        "exported": tmp_path / "exported",
        "checkpoint": Path(__file__).parent / "data" / "run-0.1.0" / "checkpoint-4",
    }
    CascadedDiffusionPipeline.from_pretrained(cascade).stage_pipeline("base").save_pretrained(places["base"])
    if "{exported}" in words:
        main(["export", str(places["base"]), "--output", str(places["exported"])])
    folder = tmp_path / "cascade"
    shutil.copytree(cascade, folder)
    index = (folder / "model_index.json").read_bytes()
    said = refusal(capsys, *words.format(**places).split(), str(folder))
    assert f"`{words.split('--')[-1]}` is {str(folder)!r}, which already holds" in said
    assert (folder / "model_index.json").read_bytes() == index


@pytest.mark.parametrize("words", [["export", "hub"], ["assemble"]])
def test_a_refused_folder_costs_nothing(capsys, stages, tmp_path, monkeypatch, words):
    """It is refused before the Hub is asked, and before weights are loaded."""

    def fail(*_, **__):
        pytest.fail("too early")

    for module in ("assemble_cascade", "export_hub"):
        monkeypatch.setattr(f"cdm_diffusers.conversion.{module}.prepare_if_asked", fail)
    for kind in (CascadedDiffusionPipeline, SuperResolutionPipeline):
        monkeypatch.setattr(kind, "from_pretrained", fail)
    folder = tmp_path / "cascade"
    (folder / "unet").mkdir(parents=True)
    given = [*words, stages[2]] if words[0] == "export" else stages
    assert "already holds unet" in refusal(capsys, *given, "--output", str(folder), "--push_to_hub")


def test_a_folder_is_exported_into_again(cascade, tmp_path):
    for _ in range(2):
        main(["export", "hub", cascade, "--output", str(tmp_path / "exported")])


def test_help_shows_json_where_it_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "--timesteps JSON\n      Time steps of stages" in capsys.readouterr().out


def test_stages_in_each_others_place_are_told_where_they_belong(capsys, stages, tmp_path):
    swapped = ["assemble", "--base", stages[4], "--super_res", stages[2], "--output", str(tmp_path / "x")]
    said = refusal(capsys, *swapped)
    assert f"`base` has {stages[4]!r}, which holds a SuperResolutionPipeline; it must hold a Cascaded" in said
    assert not (tmp_path / "x").exists()
