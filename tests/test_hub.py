"""Data sets and pipelines by their names on the Hub, over HTTP."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from local_hub import downloads, requests, serve
from PIL import Image
from scripts import launch, run, run_script
from small_cascade import small_cascade

from cdm_diffusers import CascadedDiffusionPipeline


DATA_SET_CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': Shirt
          '1': Ankle boot
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---
"""
SMALL_RUN = ["--train_batch_size", "4", "--max_train_steps", "2", "--lr_warmup_steps", "1", "--validation_steps", "0"]
SAMPLE = """
import sys, torch
from cdm_diffusers import CascadedDiffusionPipeline
pipe = CascadedDiffusionPipeline.from_pretrained("shop/clothes")
images = pipe(class_labels=["Ankle boot"], generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, sys.argv[1])
"""


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Holds the data set `shop/garments` and the pipeline `shop/clothes`."""
    root = tmp_path_factory.mktemp("hub")
    garments = root / "datasets" / "shop" / "garments"
    (garments / "data").mkdir(parents=True)
    (garments / "README.md").write_text(DATA_SET_CARD)
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(12)], "label": [i % 2 for i in range(12)]}
    pq.write_table(pa.table(rows), garments / "data" / "train-00000-of-00001.parquet")
    small_cascade().save_pretrained(root / "models" / "shop" / "clothes")
    with serve(root) as environment:
        yield environment


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["downloaded", "streaming"])
def test_training_on_a_data_set_of_the_hub(hub, tmp_path, streaming):
    data = ["--dataset_name", "shop/garments", *streaming, "--output_dir", tmp_path]
    launch("training/train_base.py", "--preset", "fashion_mnist_8", *data, *SMALL_RUN, **hub)
    assert CascadedDiffusionPipeline.from_pretrained(tmp_path).config.id2label == {0: "Shirt", 1: "Ankle boot"}
    data = json.loads((tmp_path / "training_config.json").read_text())["data"]
    assert data["dataset_name"] == "shop/garments"
    assert data["num_examples"] == (None if streaming else 12)


def test_training_uploads_its_pipeline_and_nothing_else(tmp_path):
    images = tmp_path / "images"
    for number in range(8):
        (images / f"boot-{number % 2}").mkdir(parents=True, exist_ok=True)
        (images / f"boot-{number % 2}" / f"{number}.png").write_bytes(png(number))
    run_of = ["--train_data_dir", images, "--output_dir", tmp_path / "my-base", "--license", "cc0-1.0"]
    upload = ["--push_to_hub", "--hub_model_id", "me/boots"]
    with serve(tmp_path) as environment:
        launch("training/train_base.py", "--preset", "fashion_mnist_8", *run_of, *upload, *SMALL_RUN, **environment)
    repository = tmp_path / "models" / "me" / "boots"
    assert {path.name for path in repository.iterdir()} == {
        "README.md",
        "base_scheduler",
        "base_unet",
        "model_index.json",
        "training_config.json",
        "validation.json",
    }
    card = (repository / "README.md").read_text()
    assert "# my-base" in card and "license: cc0-1.0" in card and 'from_pretrained("me/boots")' in card
    assert "hub_token" not in (repository / "training_config.json").read_text()


def test_a_data_set_that_is_not_there_is_named(hub, tmp_path):
    data = ["--dataset_name", "shop/nothing", "--output_dir", tmp_path]
    result = run_script("training/train_base.py", "--preset", "fashion_mnist_8", *data, *SMALL_RUN, **hub)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: `dataset_name` is 'shop/nothing', neither on the Hub nor a local folder" in result.stderr


def test_a_cascade_of_the_hub_samples_as_the_local_one(hub, tmp_path):
    run("-c", SAMPLE, tmp_path / "images.pt", **hub)
    generator = torch.Generator().manual_seed(0)
    expected = small_cascade()(class_labels=["Ankle boot"], generator=generator, output_type="pt").images
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=0, atol=1e-5)


def test_commands_take_a_cascade_of_the_hub(hub, tmp_path):
    arguments = ["shop/clothes", "--num_images_per_label", "1", "--output", tmp_path / "samples.png"]
    assert "base | super_res_1 | super_res_2 side by side" in run("-m", "cdm_diffusers", "sample", *arguments, **hub)
    description = json.loads(run("-m", "cdm_diffusers", "info", "shop/clothes", "--json", **hub))
    assert list(description["stages"]) == ["base", "super_res_1", "super_res_2"]


# ---------------------------------------------------------------------------------------------------------------------
# What is fetched

LOAD = """
import json, sys
from cdm_diffusers import CascadedDiffusionPipeline
name, options = sys.argv[1], json.loads(sys.argv[2])
pipe = CascadedDiffusionPipeline.from_pretrained(name, **options)
print(len(pipe.stages), float(pipe.base_unet.conv_in.weight.double().sum()))
"""
WEIGHTS = "diffusion_pytorch_model.safetensors"
HALVED = "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def shop(tmp_path):
    """Folder, environment and files to break off of a Hub with `shop/clothes`, in two precisions and revisions."""
    folder, cut = tmp_path / "models" / "shop" / "clothes", set()
    pipe = small_cascade()
    pipe.save_pretrained(folder)
    shutil.copytree(folder, folder.with_name("clothes@v1"))
    with torch.no_grad():
        pipe.base_unet.conv_in.weight.fill_(0.3)
    pipe.save_pretrained(folder)
    pipe.to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    (folder / "samples.png").write_bytes(png(0))
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "ema.safetensors").write_bytes(b"large")
    with serve(tmp_path, cut) as environment:
        yield tmp_path, environment, cut


def load(environment, **options) -> list[str]:
    return run("-c", LOAD, "shop/clothes", json.dumps(options), **environment).split()


def filled(value: float) -> float:
    return float(torch.full_like(small_cascade().base_unet.conv_in.weight, value).double().sum())


def test_only_needed_files_are_fetched(shop):
    root, environment, _ = shop
    stages, weight = load(environment)
    assert stages == "3" and float(weight) == pytest.approx(filled(0.3))
    fetched = set(downloads(root))
    assert {f"{name}_unet/{WEIGHTS}" for name in ("base", "super_res_1", "super_res_2")} <= fetched
    assert not any(name.endswith((".png", ".md", HALVED)) or "checkpoint" in name for name in fetched)
    assert all(fetched_once == 1 for fetched_once in map(downloads(root).count, fetched))


def test_a_variant_is_fetched_instead(shop):
    root, environment, _ = shop
    _, weight = load(environment, variant="fp16")
    assert float(weight) == pytest.approx(filled(torch.tensor(0.3).half().item()), rel=1e-6)
    fetched = downloads(root)
    assert f"base_unet/{HALVED}" in fetched and not any(name.endswith(WEIGHTS) for name in fetched)


def test_a_variant_that_is_not_there(shop):
    _, environment, _ = shop
    result = run_script("-c", LOAD, "shop/clothes", json.dumps({"variant": "bf16"}), **environment)
    assert result.returncode == 1 and "variant=bf16" in result.stderr.splitlines()[-1]


def test_revisions(shop):
    _, environment, _ = shop
    expected = small_cascade().base_unet.conv_in.weight.double().sum().item()
    assert float(load(environment, revision="v1")[1]) == pytest.approx(expected)
    assert float(load(environment)[1]) == pytest.approx(filled(0.3))
    result = run_script("-c", LOAD, "shop/clothes", json.dumps({"revision": "v2"}), **environment)
    assert (
        "'shop/clothes' is not a folder here, and its repository on the Hub has no such `revision`." in result.stderr
    )


def test_what_was_loaded_once_loads_offline(shop):
    root, environment, _ = shop
    online = load(environment)
    asked = len(requests(root))
    assert load(environment | {"HF_HUB_OFFLINE": "1"}) == online
    assert load(environment, local_files_only=True) == online
    assert len(requests(root)) == asked


def test_an_interrupted_download_resumes(shop):
    root, environment, cut = shop
    cut.add(f"super_res_1_unet/{WEIGHTS}")
    small_chunks = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 1000\n"  # else 10 MB
    assert run("-c", small_chunks + LOAD, "shop/clothes", "{}", **environment).startswith("3 ")
    assert not cut
    parts = [r["range"] for r in requests(root) if r["method"] == "GET" and f"super_res_1_unet/{WEIGHTS}" in r["path"]]
    size = (root / "models" / "shop" / "clothes" / "super_res_1_unet" / WEIGHTS).stat().st_size
    assert parts == [None, f"bytes={size // 2 // 1000 * 1000}-"]


def test_a_missing_stage_is_named(shop):
    root, environment, _ = shop
    shutil.rmtree(root / "models" / "shop" / "clothes" / "super_res_1_unet")
    result = run_script("-c", LOAD, "shop/clothes", "{}", **environment)
    said = "shop/clothes on the Hub is incomplete or damaged: the folder of component `super_res_1_unet` is missing"
    expected = f"OSError: {said}: take a whole copy of the pipeline."
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == expected, result.stderr


README = """
from cdm_diffusers import CascadedDiffusionPipeline

pipe = CascadedDiffusionPipeline.from_pretrained("checkpoints/fashion-mnist-32")
images = pipe(class_labels=["Ankle boot"], num_images_per_label=8).images
"""


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "the Hub has no repository of that name that you may read"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub was not reached"),
        ({"HF_HUB_OFFLINE": "1"}, "the Hub was not reached"),
    ],
    ids=["not there", "not reached", "offline"],
)
def test_the_first_lines_of_the_readme_elsewhere(shop, tmp_path, variables, reason):
    _, environment, _ = shop
    program = f"import os; os.chdir({str(tmp_path)!r})\n{README}"
    result = run_script("-c", program, **(environment | variables))
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("Traceback") and last.startswith("OSError: 'checkpoints/fashion-mnist-32' is not a folder")
    assert f"here, and {reason}" in last
    for command in ("sample", "data"):
        said = f"'checkpoints/nothing' is not a folder here, and {reason}"
        if command == "data" and not variables:
            said = "`dataset_name` is 'checkpoints/nothing', neither on the Hub nor a local folder"
        result = run_script("-m", "cdm_diffusers", command, "checkpoints/nothing", **(environment | variables))
        assert result.returncode == 2 and result.stderr.startswith(f"cdm {command}: error: {said}"), result.stderr
        assert result.stderr.count("\n") == 1


def test_local_files_only_asks_nobody(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("cdm_diffusers.hub.model_info", lambda *names, **options: asked.append(names))
    with pytest.raises(
        OSError, match="'nobody/nothing' is not a folder here, and the Hub was not reached, nor is it in"
    ):
        CascadedDiffusionPipeline.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path)
    assert asked == []
