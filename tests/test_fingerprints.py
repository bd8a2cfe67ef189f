"""What tells data sets from each other, and what is said of those that differ."""

import gzip
import json
import os
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from huggingface_hub.errors import RevisionNotFoundError
from PIL import Image
from test_sources import config_for, image_folder, private_cache, random_pixels, write_rows  # noqa: F401

from cdm_diffusers.data import fingerprints, sources
from cdm_diffusers.data.fingerprints import commit_of, differences, identity_of
from cdm_diffusers.data.memory import hash_of
from cdm_diffusers.data.sources import open_images


def saved_identity(config):
    """As it is read again from a checkpoint."""
    return json.loads(json.dumps(identity_of(open_images(config), config)))


def compared(before, config):
    return "; ".join(differences(before, saved_identity(config)))


def invert(path):
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_may_move_but_nothing_in_it_may_change(image_folder, tmp_path, streaming):  # noqa: F811
    before = saved_identity(config_for(image_folder, streaming=streaming, label_names="boot,shirt,test_tube"))
    copy = tmp_path.with_name("elsewhere")
    shutil.copytree(image_folder, copy)
    config = config_for(copy, streaming=streaming, label_names="boot,shirt,test_tube")
    os.utime(copy / "boot" / "1.png", (0, 0))
    (copy / "boot" / "other-notes.txt").write_text("not an image either")
    assert compared(before, config) == ""
    for name in ("1", "3"):
        invert(copy / "boot" / f"{name}.png")
    assert compared(before, config) == "content of 2 of 12 files compared, such as 'boot/1.png'"
    shutil.rmtree(copy)
    shutil.copytree(image_folder, copy)
    (copy / "shirt" / "2.png").rename(copy / "shirt" / "other.png")
    assert compared(before, config) == "names ('shirt/2.png' is not there now)"
    (copy / "shirt" / "other.png").unlink()
    assert compared(before, config).startswith("number (12 in the checkpoint, 11 now); names ('shirt/2.png' is not")
    shutil.rmtree(copy)


def test_of_many_files_some_are_read_and_all_are_measured(image_folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fingerprints, "MOST_CONTENTS", 4)
    config = config_for(image_folder)
    before = saved_identity(config)
    assert list(before["contents"]) == ["boot/0.png", "boot/3.png", "shirt/2.png", "test_tube/1.png"]
    with open(image_folder / "boot" / "1.png", "ab") as file:
        file.write(b"\0")
    assert compared(before, config) == "sizes of files"
    invert(image_folder / "boot" / "3.png")
    assert compared(before, config) == "content of 1 of 4 files compared, such as 'boot/3.png'"


def test_of_large_files_blocks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "BLOCK", 10)
    content = bytearray(1000)
    hashes = set()
    for place in (None, 0, 999, 500):  # first and last block, and what lies between blocks
        content[:] = bytes(1000)
        if place is not None:
            content[place] = 1
        (tmp_path / "x").write_bytes(content)
        hashes.add(fingerprints._hash_of_file(tmp_path / "x", 20))
    assert len(hashes) == 3
    assert fingerprints._hash_of_file(tmp_path / "x", 1000) not in hashes


def write_idx(folder, pixels, labels):
    header = bytes([0, 0, 8, 3]) + np.array(pixels.shape, ">u4").tobytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes(), mtime=0))
    header = bytes([0, 0, 8, 1]) + np.array(labels.shape, ">u4").tobytes()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes(), mtime=0))


def test_idx_files(tmp_path):
    pixels, labels = random_pixels((5, 4, 4)), np.arange(5, dtype=np.uint8)
    write_idx(tmp_path, pixels, labels)
    config = config_for(tmp_path, num_channels=1)
    before = saved_identity(config)
    write_idx(tmp_path, pixels[::-1], labels)
    assert compared(before, config) == "content of 1 of 2 files compared, such as 'train-images-idx3-ubyte.gz'"
    write_idx(tmp_path, pixels, labels[::-1])
    assert compared(before, config).endswith("such as 'train-labels-idx1-ubyte.gz'; labels")


def rows_in(folder, seed, labels):
    """A data set as the Hub has them."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "train-0.parquet", labels, seed)
    return config_for(None, train_data_dir=None, dataset_name=str(folder))


def test_rows_of_a_data_set(tmp_path):
    before = saved_identity(rows_in(tmp_path / "a", 0, [0, 1, 1, 0]))
    assert (before["kind"], before["number"]) == ("rows", 4)
    assert compared(before, rows_in(tmp_path / "b", 0, [0, 1, 1, 0])) == ""
    assert compared(before, rows_in(tmp_path / "c", 0, [0, 1, 0, 0])) == "labels"
    assert compared(before, rows_in(tmp_path / "d", 1, [0, 1, 1, 0])) == (
        "content of 4 of 4 rows compared, such as 'row 0'"
    )


def test_revisions_are_resolved_to_commits(monkeypatch):
    def dataset_info(name, revision):
        if revision != "main":
            raise RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return SimpleNamespace(sha="c" * 40)

    monkeypatch.setattr(fingerprints, "HfApi", lambda: SimpleNamespace(dataset_info=dataset_info))
    assert commit_of("someone/something", "main") == "c" * 40
    assert commit_of("someone/something", "d" * 40) == "d" * 40
    with pytest.raises(ValueError, match="`dataset_revision` is 'v2'; it must be a branch, tag or commit of some"):
        commit_of("someone/something", "v2")


def test_the_revision_reaches_the_hub_and_leaves_fingerprints_as_they_were(tmp_path, monkeypatch):
    write_rows(tmp_path / "train.parquet", [0, 1])
    rows, asked = datasets.load_dataset(str(tmp_path), split="train"), []
    monkeypatch.setattr(sources, "dataset_info", lambda name, timeout: None)
    monkeypatch.setattr(sources, "load_dataset", lambda *names, **options: asked.append(options) or rows)
    of_hub = {"dataset_name": "someone/something", "train_data_dir": None}
    plain, pinned = (
        open_images(config_for(tmp_path, **of_hub, dataset_revision=revision)).dataset for revision in (None, "v1")
    )
    assert [options["revision"] for options in asked] == [None, "v1"]
    before = {name: value for name, value in asdict(plain.decode.config).items() if name != "dataset_revision"}
    assert plain.fingerprint() == pinned.fingerprint() == hash_of([plain.rows._fingerprint, before])


def test_folders_have_no_revision(tmp_path):
    for where in ({}, {"train_data_dir": None, "dataset_name": str(tmp_path)}):
        with pytest.raises(ValueError, match="`dataset_revision` is 'v1', but a folder has none: leave it out"):
            config_for(tmp_path, **where, dataset_revision="v1")


def test_streams_of_the_hub_have_a_revision(tmp_path, monkeypatch):
    class Hub:
        revision = "a" * 40

        def dataset_info(self, name, revision):
            assert (name, revision) == ("someone/something", None)
            return type("Info", (), {"sha": self.revision})

    monkeypatch.setattr(fingerprints, "HfApi", Hub)
    before = fingerprints._of_stream("someone/something")
    Hub.revision = "b" * 40
    now = fingerprints._of_stream("someone/something")
    assert differences(before, before) == []
    assert differences(before, now) == [f"revision ('{'a' * 40}' in the checkpoint, '{'b' * 40}' now)"]
    assert differences(before, {"kind": "files"}) == ["kind of source (stream in the checkpoint, files now)"]
