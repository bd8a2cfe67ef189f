"""Data sets and pipelines by their names on the Hub, over HTTP."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from local_hub import serve
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
