"""Every script and the README's commands, for a few steps, as a user runs them."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler
from PIL import Image
from scripts import launch, run, run_script

from cdm_diffusers import CascadedDiffusionPipeline


ROOT = Path(__file__).parent.parent
SCRIPTS = [
    file for folder in ("conversion", "evaluation", "training") for file in sorted((ROOT / folder).glob("*.py"))
]
SMALL_RUN = ["--train_batch_size", "4", "--max_train_steps", "2", "--lr_warmup_steps", "1", "--num_validation_images"]
SMALL_RUN += ["2", "--validation_inference_steps", "2", "--validation_steps", "2"]


@pytest.fixture(scope="module")
def my_images(tmp_path_factory) -> Path:
    """A folder as docs/training.md describes it: a sub-folder a class, pictures of different sizes."""
    folder = tmp_path_factory.mktemp("my-images")
    generator = np.random.default_rng(0)
    for label, colour in (("cat", (200, 80, 20)), ("dog", (20, 80, 200))):
        (folder / label).mkdir()
        for number in range(6):
            pixels = np.clip(generator.normal(colour, 20, size=(70 + number, 90, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def cascade(my_images, tmp_path_factory) -> Path:
    """The README's own commands with smaller networks: two stages, trained, joined."""
    runs = tmp_path_factory.mktemp("runs")
    small = ["--source_resolution", "64", "--layers_per_block", "1", *SMALL_RUN]
    data = ["--train_data_dir", my_images]
    base = ["--preset", "imagenet_16", *data, "--output_dir", runs / "base", "--block_out_channels", "32", "32", "32"]
    launch("training/train_base.py", *base, *small)
    super_res = ["--preset", "imagenet_16_to_64", *data, "--output_dir", runs / "sr"]
    super_res += ["--block_out_channels", "32", "32", "32", "32"]
    launch("training/train_sr.py", *super_res, *small)
    joined = runs / "my-cascade"
    run("conversion/assemble_cascade.py", "--base", runs / "base", "--super-res", runs / "sr", "--output", joined)
    return joined


def test_stages_leave_pipelines_cards_grids_and_configurations(cascade):
    for stage in ("base", "sr"):
        folder = cascade.parent / stage
        assert (folder / "model_index.json").is_file()
        assert json.loads((folder / "training_config.json").read_text())["training"]["max_train_steps"] == 2
        assert (folder / "samples.png").is_file()
        assert "cat" in (folder / "README.md").read_text()


def test_the_cascade_samples_by_name(cascade):
    pipe = CascadedDiffusionPipeline.from_pretrained(cascade)
    assert pipe.config.id2label == {0: "cat", 1: "dog"}
    output = pipe(class_labels=["dog", 0], num_inference_steps=2, output_stages=True)
    assert [image.size for image in output.images] == [(64, 64)] * 2
    assert [image.size for image in output.stages["base"]] == [(16, 16)] * 2


def test_the_cascade_has_a_card_and_all_configurations(cascade):
    configs = json.loads((cascade / "training_config.json").read_text())
    assert [configs[name]["name"] for name in ("base", "super_res_1")] == ["imagenet_16", "imagenet_16_to_64"]
    card = (cascade / "README.md").read_text()
    assert "# my-cascade\n" in card and "16x16 -> 64x64" in card
    assert "0 cat, 1 dog" in card
    assert "| super_res_1 | 64x64 |" in card and "| 8 |" in card  # 2 steps of 4 images


def test_assembling_with_another_solver(cascade, tmp_path):
    stages = ["--base", cascade.parent / "base", "--super-res", cascade.parent / "sr", "--output", tmp_path / "fast"]
    options = ["--schedulers", '{"super_res_1": "unipc"}', "--default-num-inference-steps", '{"super_res_1": 3}']
    run("conversion/assemble_cascade.py", *stages, *options)
    pipe = CascadedDiffusionPipeline.from_pretrained(tmp_path / "fast")
    before = CascadedDiffusionPipeline.from_pretrained(cascade)
    assert type(pipe.super_res_1_scheduler) is UniPCMultistepScheduler
    assert type(pipe.base_scheduler) is type(before.base_scheduler)
    assert pipe.config.default_num_inference_steps["super_res_1"] == 3
    assert "| UniPCMultistepScheduler | 3 |" in (tmp_path / "fast" / "README.md").read_text()


def test_assembling_what_does_not_fit_leaves_nothing(cascade, tmp_path):
    base = cascade.parent / "base"
    arguments = ["--base", base, "--super-res", base, "--output", tmp_path / "cascade"]
    result = run_script("conversion/assemble_cascade.py", *arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("conversion/assemble_cascade.py: error: ")
    assert not (tmp_path / "cascade").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=[file.name for file in SCRIPTS])
def test_help(script, monkeypatch, capsys):
    """Help texts are percent formats: a bare % among them raises."""
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out
