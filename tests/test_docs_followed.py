"""The documents as their readers follow them: every block in its order, shortened by tests/shortened.py."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from documents import DOCUMENTS, SHELL, blocks, blocks_of, commands_of, name_of
from golden import TWINS, twin_weights
from local_hub import serve
from scripts import ROOT
from shortened import NETWORKS
from small_cascade import small_cascade
from test_docs import ON_WHAT_COMMANDS_MAKE
from test_hub import DATA_SET_CARD
from test_publishing import RECOGNITION
from test_sources import write_idx
from test_streams import write_entries

from cdm_diffusers import CascadedDiffusionPipeline


@dataclass(frozen=True)
class Way:
    """
    Args:
        made: a file that is there at the end.
        prepare: makes what the document takes for granted, in a folder.
        before: commands of bash before the document's.
        needs: a package besides those of the extra `test`.
    """

    made: str
    prepare: Callable[[Path], None] = field(default=lambda folder: None)
    before: str = ""
    needs: str | None = None


def draw_pictures(folder: Path, size: int = 64, classes: Sequence[str] = ("cat", "dog")) -> None:
    """24 pictures of each class, in two splits."""
    places = [f"{split}/{name}" for split in ("train", "test") for name in classes]
    for number, place in enumerate(places):
        (folder / place).mkdir(parents=True)
        for shade in range(24):
            picture = PIL.Image.new("RGB", (size, size), (10 * shade, 240 * number // len(places), 255 - 10 * shade))
            picture.save(folder / place / f"{shade}.png")


def of_all_styles(folder: Path) -> None:
    index = json.loads((ROOT / "checkpoints" / "avatars-256" / "model_index.json").read_text())
    draw_pictures(folder / "avatars", 256, list(index["id2label"].values()))


def my_images(folder: Path) -> None:
    draw_pictures(folder / "my-images")


def avatars(folder: Path) -> None:
    """As examples/avatars renders them: of all styles, with what is known of each."""
    of_all_styles(folder)
    (folder / "avatars" / "test").rename(folder / "avatars" / "validation")
    for split in ("train", "validation"):
        rows = [
            {
                "file_name": f"{file.parent.name}/{file.name}",
                "label": file.parent.name,
                "background": f"#{int(file.stem) % 2:06x}",
                "attributes": json.dumps({"hair": f"hair {int(file.stem) % 3}"}),
            }
            for file in sorted((folder / "avatars" / split).glob("*/*.png"))
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / "avatars" / split / "metadata.jsonl").write_text(lines)


def imagenet(folder: Path) -> None:
    """The same pictures as a data set of its name on the Hub, and as tar files."""
    draw_pictures(folder / "pictures", 256)
    pictures = [file.read_bytes() for file in sorted((folder / "pictures" / "train").glob("*/*.png"))]
    labels = [number % 2 for number in range(len(pictures))]
    repository = folder.parent / "hub" / "datasets" / "ILSVRC" / "imagenet-1k"
    (repository / "data").mkdir(parents=True)
    (repository / "README.md").write_text(DATA_SET_CARD)
    rows = {"image": [{"bytes": picture, "path": None} for picture in pictures], "label": labels}
    pq.write_table(pa.table(rows), repository / "data" / "train-00000-of-00001.parquet")
    (folder / "imagenet-tars").mkdir()
    write_entries(folder / "imagenet-tars" / "0.tar", pictures, labels)


def for_training(folder: Path) -> None:
    my_images(folder)
    avatars(folder)
    imagenet(folder)
    (folder / "avatars-52000").symlink_to("avatars")


def for_evaluation(folder: Path) -> None:
    (folder / "P").symlink_to("checkpoints/fashion-mnist-32")


def for_app(folder: Path) -> None:
    (folder / "my-cascade").symlink_to("checkpoints/fashion-mnist-32")
    shutil.copytree(ROOT / "cdm_diffusers", folder / "cdm_diffusers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "space", folder / "examples" / "space")
    repository = folder.parent / "hub" / "models" / "me" / "my-cascade"
    shutil.copytree(ROOT / "checkpoints" / "fashion-mnist-32", repository)


def for_publishing(folder: Path) -> None:
    """A base and a stage of 4x4 and 8x8 pixels, and reports of what they made."""
    cascade = small_cascade(num_stages=2)
    CascadedDiffusionPipeline.from_stages(cascade.stage_pipeline("base")).save_pretrained(folder / "runs" / "base")
    cascade.stage_pipeline("super_res_1").save_pretrained(folder / "runs" / "sr")
    (folder / "recognition.json").write_text(json.dumps(RECOGNITION))
    quality = (ROOT / "docs" / "results" / "quality-shipped.json").read_text()
    (folder / "quality.json").write_text(quality.replace('"size": 32', '"size": 8'))
    PIL.Image.new("RGB", (8, 8), "red").save(folder / "samples.png")


def for_converting(folder: Path) -> None:
    """Under the names of OpenAI's files, networks that differ from theirs in size alone."""
    for file, twin in NETWORKS.items():
        weights = twin_weights(next(name for name in TWINS if TWINS[name] is twin))
        width = weights["label_emb.weight"].shape[1]
        torch.save(weights | {"label_emb.weight": torch.randn(1000, width)}, folder / file)


WITH_IMAGES_OF_HIS_OWN = "\n".join(block for block in blocks(ROOT / "README.md", *SHELL) if "cdm train base" in block)
A_RUN = "cdm train base --preset fashion_mnist_8 --train_data_dir FASHION_MNIST --output_dir runs/fashion_mnist_8"
WAYS = {
    "README.md": Way("faces", my_images),
    "docs/app.md": Way("checkpoints", for_app, needs="gradio"),
    "docs/benchmarks.md": Way("gpu.json"),
    "docs/distillation.md": Way("runs/avatars-sr-1-2-times/model_index.json", of_all_styles),
    "docs/evaluation.md": Way("runs/reproduce/table3a.png", for_evaluation, A_RUN),
    "docs/many_gpus.md": Way("runs/imagenet_64_to_256/model_index.json", imagenet),
    "docs/openai.md": Way("golden-retriever.png", for_converting),
    "docs/presets.md": Way("runs/patches-2-whole/model_index.json", avatars),
    "docs/publishing.md": Way("my-cascade-alone", for_publishing),
    "docs/results.md": Way("runs/reproduce/figure7.json"),
    "docs/search.md": Way("search-steps/table.md", my_images, WITH_IMAGES_OF_HIS_OWN),
    "docs/training.md": Way("runs/recognition.png", for_training),
    "docs/tutorial.md": Way("samples.png"),
    "examples/avatars/README.md": Way("runs/avatars_16/model_index.json", avatars),
}


def test_every_document_with_commands_is_followed():
    assert set(WAYS) == {name_of(document) for document in DOCUMENTS if blocks(document, *SHELL)}


def steps_of(document: str) -> list[list[str]]:
    """What the blocks say to do, in their order: words of commands, and Python."""
    found, shell = blocks_of(ROOT / document), [WAYS[document].before]
    for language, text in found:
        if language in SHELL:
            shell.append(text)
        elif language == "python" and document in ON_WHAT_COMMANDS_MAKE:
            shell.append(f"record Python {shlex.quote(text)}")
    return commands_of(shell)


def real_pictures(folder: Path) -> None:
    """Four pictures of each class in both splits, as IDX files."""
    folder.mkdir()
    labels = np.arange(40, dtype=np.uint8) % 10
    for seed, split in enumerate(("train", "t10k")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 28, 28), dtype=np.uint8)
        write_idx(folder, pixels, labels, split)


@pytest.mark.slow("commands train for two steps, sample or measure")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", WAYS)
def test_blocks_run_in_their_order(document, tmp_path):
    """In a folder with what the document takes for granted, and with a Hub of this machine."""
    way, folder, hub = WAYS[document], tmp_path / "home", tmp_path / "hub"
    if way.needs:
        pytest.importorskip(way.needs)
    folder.mkdir()
    shutil.copytree(ROOT / "checkpoints", folder / "checkpoints")  # which some documents make
    (folder / "configs").symlink_to(ROOT / "configs")
    real_pictures(folder / "FASHION_MNIST")
    hub.mkdir()
    way.prepare(folder)
    with serve(hub) as environment:
        environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, ROOT / "tests" / "shortened.py"],
            cwd=folder,
            env=os.environ | environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
            input=json.dumps(steps_of(document)),
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert (folder / way.made).exists()
