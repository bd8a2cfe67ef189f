"""Pipelines on their way to the Hub: what is kept and uploaded, cards, and folders with their own code."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from local_hub import serve
from PIL import Image
from scripts import ROOT, run, run_script
from small_cascade import small_cascade

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.commands.config import CardConfig
from cdm_diffusers.commands.main import main
from cdm_diffusers.conversion.self_contained import sampling_code
from cdm_diffusers.model_cards import is_ours, write_card


NASTY = ['"quoted"', "it's", "a\nnew line", "`ticks` ```", "a | b", "<script>alert(1)</script>", "_x_ *y* [z](u) \\"]
CLASSES = ("T-shirt/top", "Trouser", "Ankle boot")
RECOGNITION = {
    "recognised": {
        split: {"top_1": 0.5, "top_1_interval": [0.4, 0.6], "num_images": 30, "per_class": dict.fromkeys(CLASSES, 0.5)}
        for split in ("samples", "test")
    },
    "stages": {},
    "diversity": {
        space: {"ratio": 1.0, "per_class": {name: {"ratio": 1.0} for name in CLASSES}}
        for space in ("pixels", "features")
    },
    "nearest_training_image": {
        "num_images": 3,
        **{split: {"mean": 1.0, "median": 1.0, "smallest": 0.5} for split in ("samples", "test")},
    },
    "settings": {"classifier": "runs/my-classifier"},
}
PUSH = """
import sys
from diffusers import DiffusionPipeline
import cdm_diffusers
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.push_to_hub(sys.argv[2], private=True)
pipe.save_pretrained(sys.argv[3], push_to_hub=True, repo_id="me/saved")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folder and environment of a Hub where nothing is."""
    root = tmp_path_factory.mktemp("hub")
    with serve(root) as environment:
        yield root, environment


@pytest.fixture
def folder(tmp_path):
    """A cascade with a card that somebody wrote, and documents."""
    folder = tmp_path / "clothes"
    small_cascade().save_pretrained(folder)
    example = 'pipe = CascadedDiffusionPipeline.from_pretrained("path/to/this/folder")'
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n# By hand\n\n```python\n{example}\n```\n")
    Image.new("RGB", (8, 8), "red").save(folder / "samples.png")
    (folder / "training_config.json").write_text("{}")
    (folder / "recognition.json").write_text(json.dumps(RECOGNITION))
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.bin").write_text("large")
    return folder


def example_of(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    return code


# ---------------------------------------------------------------------------------------------------------------------
# Saving and uploading


def test_push_to_hub_keeps_what_belongs_to_the_pipeline(hub, folder, tmp_path):
    root, environment = hub
    run("-c", PUSH, folder, "me/clothes", tmp_path / "copy", **environment)
    documents = {"README.md", "samples.png", "training_config.json", "recognition.json", "model_index.json"}
    for name in ("clothes", "saved"):
        repository = root / "models" / "me" / name
        assert documents <= {path.name for path in repository.iterdir()}
        assert not (repository / "checkpoint-1").exists()
        card = (repository / "README.md").read_text()
        assert "# By hand" in card and "license: mit" in card and f'from_pretrained("me/{name}")' in card
        assert (repository / "samples.png").read_bytes() == (folder / "samples.png").read_bytes()
    published = (
        "from cdm_diffusers import CascadedDiffusionPipeline as P; P.from_pretrained('me/clothes').save_pretrained"
    )
    run("-c", f"{published}({str(tmp_path / 'back')!r})", **environment)
    assert "# By hand" in (tmp_path / "back" / "README.md").read_text()
    assert (tmp_path / "back" / "recognition.json").is_file()


def test_where_there_is_no_card_ours_is_written(hub, tmp_path):
    root, environment = hub
    first = small_cascade().stage_pipeline("super_res_1")
    first.save_pretrained(tmp_path / "upsampler")
    (tmp_path / "upsampler" / "README.md").unlink()
    run("-c", PUSH, tmp_path / "upsampler", "upsampler", tmp_path / "copy", **environment)
    card = (root / "models" / "me" / "upsampler" / "README.md").read_text()
    assert "Model Card for Model ID" not in card and "More Information Needed" not in card
    assert is_ours(card) and "# upsampler" in card and 'from_pretrained("me/upsampler")' in card
    assert ModelCard(card).data.license is None and "None is given" in card


def test_a_card_written_on_the_hub_is_not_replaced_by_ours(hub, tmp_path):
    root, environment = hub
    card = root / "models" / "me" / "careful" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("# With care\n")
    small_cascade().save_pretrained(tmp_path / "cascade")
    run("-c", PUSH, tmp_path / "cascade", "me/careful", tmp_path / "copy", **environment)
    assert card.read_text() == "# With care\n" and (card.parent / "model_index.json").is_file()


def test_saving_in_place_and_elsewhere(folder, tmp_path):
    pipe = CascadedDiffusionPipeline.from_pretrained(folder)
    before = (folder / "README.md").read_text()
    pipe.save_pretrained(folder)
    assert (folder / "README.md").read_text() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("# Theirs\n")
    pipe.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "README.md").read_text() == "# Theirs\n"
    assert (tmp_path / "other" / "samples.png").is_file()


def test_assembling_uploads(hub, tmp_path):
    root, environment = hub
    cascade = small_cascade()
    names = ["base", "super_res_1", "super_res_2"]
    for name in names:
        pipe = cascade.stage_pipeline(name)
        pipe.save_pretrained(tmp_path / name)
        write_card(pipe, tmp_path / name, license="cc-by-4.0")
    stages = ["--base", tmp_path / "base", "--super_res", tmp_path / names[1], tmp_path / names[2]]
    upload = ["--push_to_hub", "--hub_model_id", "me/joined", "--hub_private_repo"]
    said = run("-m", "cdm_diffusers", "assemble", *stages, "--output", tmp_path / "joined", *upload, **environment)
    assert f"Uploaded to {environment['HF_ENDPOINT']}/me/joined/commit/" in said
    assert f"\n  cdm sample {tmp_path / 'joined'} --output samples.png\n" in said
    card = (root / "models" / "me" / "joined" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and 'from_pretrained("me/joined")' in card

    for variables, said in (
        ({"HF_TOKEN": "wrong"}, "does not let you write to 'me/joined' (401): log in by `hf auth login`, or give"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "was not reached, to write to 'me/joined': check the connection"),
    ):
        command = ["assemble", *stages, "--output", tmp_path / "no", *upload]
        result = run_script("-m", "cdm_diffusers", *command, **(environment | variables))
        assert result.returncode == 2 and result.stderr.startswith(f"cdm assemble: error: The Hub {said}")
        assert result.stderr.count("\n") == 1 and not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Cards


@pytest.mark.parametrize("stage", ["base", "super_res_1", None])
def test_the_example_of_a_card_runs_as_pasted(tmp_path, monkeypatch, stage):
    cascade = small_cascade(id2label=dict(enumerate(['say "hi"', "b", "c"])))
    pipe = cascade if stage is None else cascade.stage_pipeline(stage)
    pipe.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    exec(compile(example_of((tmp_path / "my-model" / "README.md").read_text()), "card", "exec"), {})
    size = pipe.stages[-1].unet.config.sample_size
    assert Image.open("sample.png").size == (size, size)


def test_names_of_classes_stay_text(tmp_path):
    cascade = small_cascade(num_classes=len(NASTY), id2label=dict(enumerate(NASTY)))
    cascade.save_pretrained(tmp_path / "cascade")
    card = (tmp_path / "cascade" / "README.md").read_text()
    names = {}
    exec(example_of(card).splitlines()[-2].replace("pipe(", "dict(").replace(".images", ""), {"dict": dict}, names)
    assert names["images"]["class_labels"] == [NASTY[0]]
    text = card[card.index("## Classes") : card.index("## Stages")]
    assert len(text.strip().splitlines()) == 3
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert r"\`ticks\` \`\`\`" in text and r"a \| b" in text and r"\_x\_ \*y\* \[z\](u) \\" in text and "it's" in text


def test_metadata_of_a_card(tmp_path):
    (tmp_path / "recognition.json").write_text(json.dumps(RECOGNITION))
    write_card(small_cascade(), tmp_path, "My clothes", license="cc-by-4.0", dataset_name="me/clothes")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.datasets, data.library_name) == ("cc-by-4.0", ["me/clothes"], "diffusers")
    assert data.pipeline_tag == "unconditional-image-generation" and "cascaded-diffusion" in data.tags
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.5, "me/clothes")
    assert "the classifier my-classifier, 30 samples" in result.metric_name
    assert "## Intended use and limits" in (tmp_path / "README.md").read_text()


def test_the_command_writes_and_refreshes(tmp_path, capsys):
    folder = tmp_path / "emoji"
    small_cascade().save_pretrained(folder)
    (tmp_path / "measured.json").write_text(json.dumps(RECOGNITION))
    quality = tmp_path / "quality.json"
    shipped = (ROOT / "docs" / "results" / "quality-shipped.json").read_text()
    quality.write_text(shipped.replace('"size": 32', '"size": 16'))
    grid = tmp_path / "grid.png"
    Image.new("RGB", (8, 8), "red").save(grid)
    figures = ["--figures", str(tmp_path / "measured.json"), str(quality)]
    main(["card", str(folder), "--title", "Emoji <3", "--license", "cc0-1.0", *figures, "--sample_grid", str(grid)])
    card = (folder / "README.md").read_text()
    assert "# Emoji &lt;3" in card and "![samples](samples.png)" in card and 'from_pretrained("emoji")' in card
    assert "| T-shirt/top | 50.00% |" in card and "Extractor: classifier fashion-mnist-classifier" in card
    assert {"accuracy", "frechet_distance", "precision"} <= {r.metric_type for r in ModelCard(card).data.eval_results}
    assert (folder / "quality.json").is_file()

    main(["card", str(folder), "--dataset_name", "me/emoji"])
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.datasets, data.model_name) == ("cc0-1.0", ["me/emoji"], "Emoji <3")

    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(SystemExit) as end:
        main(["card", str(folder)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--overwrite replaces it" in said and said.count("\n") == 1
    assert (folder / "README.md").read_text() == "# Mine\n"
    main(["card", str(folder), "--overwrite"])
    assert "# Mine" in (folder / "README.md").read_text() and is_ours((folder / "README.md").read_text())


def refusal(capsys, *words) -> str:
    """The line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said
    return said.splitlines()[-1]


def test_figures_of_others_are_refused(tmp_path, capsys):
    folder, report = tmp_path / "animals", tmp_path / "report.json"
    small_cascade(id2label={0: "cat", 1: "dog", 2: "cow"}).save_pretrained(folder)
    before = (folder / "README.md").read_text()
    report.write_text(json.dumps(RECOGNITION))
    said = (
        "measured samples of other classes (T-shirt/top, Trouser, Ankle boot) than this pipeline makes (cat, dog, cow)"
    )
    assert said in refusal(capsys, "card", folder, "--figures", report)
    joining = ["assemble", "--base", folder, "--output", tmp_path / "new", "--recognition", report]
    assert said in refusal(capsys, *joining)
    small = {"base": {"size": 4}, "super_res_1": {"size": 8}}
    report.write_text(json.dumps(RECOGNITION | {"stages": small}).replace("Trouser", "dog"))
    small_cascade(id2label={0: "T-shirt/top", 1: "dog", 2: "Ankle boot"}).save_pretrained(folder)
    assert "samples of size [4, 8], and this pipeline makes [4, 8, 16]" in refusal(capsys, *joining)
    quality = ROOT / "docs" / "results" / "quality-shipped.json"
    assert "samples of size 32, and" in refusal(capsys, "card", folder, "--figures", quality)
    assert (folder / "README.md").read_text() == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["card x", "assemble --base x --output y", "export hub x --output y"])
def test_a_licence_is_an_identifier_of_the_hub(capsys, command):
    for wrong in ("not a licence!", "MIT", "cc-by-", ""):
        said = refusal(capsys, *command.split(), f"--license={wrong}")
        assert f"error: `license` is {wrong!r}; it must be an identifier of the Hub" in said
    for right in ("cc-by-4.0", "mit", "other", "llama3.1"):
        assert CardConfig(folder="x", license=right).license == right


# ---------------------------------------------------------------------------------------------------------------------
# With its own code

ALONE = """
import sys
sys.modules["cdm_diffusers"] = None  # cannot be imported
import torch
from diffusers import DiffusionPipeline
where, output, revision = sys.argv[1:]
pipes = [DiffusionPipeline.from_pretrained(where, trust_remote_code=True, revision=revision) for _ in range(2)]
def sample(pipe):
    return pipe(class_labels=["Ankle boot"], generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.testing.assert_close(sample(pipes[0]), sample(pipes[1]))
torch.save(sample(pipes[0]), output + "/images.pt")
pipes[0].save_pretrained(output + "/saved")
"""


def test_a_folder_with_its_code_needs_diffusers_alone(hub, tmp_path):
    import torch

    root, environment = hub
    small_cascade().save_pretrained(tmp_path / "cascade")
    main(["export", "hub", str(tmp_path / "cascade"), "--output", str(tmp_path / "alone"), "--self-contained"])
    shutil.copytree(tmp_path / "alone", root / "models" / "me" / "alone")
    expected = small_cascade()("Ankle boot", generator=torch.Generator().manual_seed(0), output_type="pt").images
    for number, where in enumerate((str(tmp_path / "alone"), "me/alone")):
        output = tmp_path / str(number)
        output.mkdir()
        variables = (
            os.environ | environment | {"HF_HOME": str(output / "cache"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        )
        command = [sys.executable, "-c", ALONE, where, str(output), "main"]
        result = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "pip install" not in result.stderr
        torch.testing.assert_close(torch.load(output / "images.pt"), expected, rtol=0, atol=1e-5)
        again = CascadedDiffusionPipeline.from_pretrained(output / "saved")  # an ordinary folder, without code
        assert not list((output / "saved").rglob("*.py")) and len(again.stages) == 3
    assert (
        'DiffusionPipeline.from_pretrained("alone", trust_remote_code=True)'
        in (tmp_path / "alone" / "README.md").read_text()
    )
    assert not list((tmp_path / "cascade").rglob("*.py"))


def test_a_stage_with_its_code_and_a_card_by_hand(tmp_path):
    stage = small_cascade().stage_pipeline("super_res_1")
    stage.save_pretrained(tmp_path / "stage")
    card = (
        "---\nlicense: mit\n---\n# Mine\n\n```python\nx = P.from_pretrained('stage')\n```\n\n## Thanks\n\nTo Ashley.\n"
    )
    (tmp_path / "stage" / "README.md").write_text(card)
    main(["export", "hub", str(tmp_path / "stage"), "--output", str(tmp_path / "alone"), "--self-contained"])
    text = (tmp_path / "alone" / "README.md").read_text()
    assert "# Mine" in text and "To Ashley." in text and "trust_remote_code=True" in text and "x = P" not in text
    assert (tmp_path / "alone" / "pipeline.py").read_text().endswith("import SuperResolutionPipeline\n")


def test_the_code_is_readable_and_needs_nothing_of_ours():
    name, code = sampling_code()
    compile(code, name, "exec")
    assert not re.findall(r"^\s*(?:from|import) (?:\.|cdm_diffusers|pydantic)", code, re.MULTILINE)
    assert "class SuperResolutionPipeline" in code and sampling_code() == (name, code)


def test_half_precision_beside_full(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    small_cascade().save_pretrained(tmp_path / "cascade")
    main(["export", "hub", str(tmp_path / "cascade"), "--output", str(tmp_path / "both"), "--variant", "fp16"])
    assert "float32" not in caplog.text
    pipe = CascadedDiffusionPipeline.from_pretrained(tmp_path / "both", variant="fp16")
    halved = pipe.base_unet.conv_in.weight
    full = small_cascade().base_unet.conv_in.weight
    assert (halved == full.half().float()).all() and not (halved == full).all()


def test_export_refuses_its_own_folder(tmp_path, capsys):
    small_cascade().save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["export", "hub", str(tmp_path), "--output", str(tmp_path)])
    assert end.value.code == 2 and "it must be another one" in capsys.readouterr().err
    assert (tmp_path / "model_index.json").is_file()
