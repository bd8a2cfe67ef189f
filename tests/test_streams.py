"""Streams of tar and parquet files: their order, its division among processes, exact resuming, bounded memory."""

import gc
import io
import json
import shutil
import tarfile
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_many_processes import STEPS, assert_close_runs, split_run
from test_sources import config_for, png_bytes, private_cache, random_pixels
from test_training_loop import BASE, EXACT, AtDiskCalls, KillAfter, KillAt, assert_same_run, run

from cdm_diffusers.data import streams
from cdm_diffusers.data.sources import RowDecoder, open_images
from cdm_diffusers.data.streams import NamedRow
from cdm_diffusers.training import loop
from cdm_diffusers.training.batches import LaneSampler, Split


__all__ = ["private_cache"]  # a fixture

SHARDS, ROWS = 33, 5  # a batch of 8 from two lanes of 16 and 17 shards
LANES = 2


def write_tar(file, first, count):
    """Grey images of 8x8 pixels; image i has seed and label i."""
    numbers = range(first, first + count)
    write_entries(file, [png_bytes(random_pixels((8, 8), i)) for i in numbers], [i % 3 for i in numbers], first)


def write_entries(file, pictures, labels, first=0):
    """PNGs and their labels in WebDataset's format, numbered from `first`."""
    with tarfile.open(file, "w") as archive:
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True), first):
            for suffix, content in (("png", picture), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write_parquet(file, first, count):
    pictures = [{"bytes": png_bytes(random_pixels((8, 8), i)), "path": None} for i in range(first, first + count)]
    labels = [i % 3 for i in range(first, first + count)]
    pq.write_table(pa.table({"image": pictures, "label": labels}), file, row_group_size=2)


def write_shards(folder, suffix):
    write = {"tar": write_tar, "parquet": write_parquet}[suffix]
    for index in range(SHARDS):
        write(folder / f"train-{index:03d}.{suffix}", index * ROWS, ROWS)
    write(folder / f"test-000.{suffix}", 1000, 2)
    return folder


@pytest.fixture(scope="module", params=["tar", "parquet"])
def shards(request, tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp(request.param), request.param)


def stream_of(folder, seed=0, buffer_size=12):
    config = config_for(
        folder,
        streaming=True,
        num_classes=3,
        num_channels=1,
        source_resolution=8,
        seed=seed,
        shuffle_buffer_size=buffer_size,
    )
    return open_images(config).stream


def names(stream, epoch, lanes=range(LANES)):
    return [row.name for number in lanes for row, _ in stream.lane(epoch, number, LANES)]


def test_an_epoch_is_every_row_of_the_split_once_in_an_order_of_its_own(shards):
    stream = stream_of(shards)
    assert stream.num_shards == SHARDS and stream.num_lanes(8) == LANES and stream.num_lanes(9) == 1
    expected = {f"{row} of shard {shard}" for shard in range(SHARDS) for row in range(ROWS)}
    first = names(stream, epoch=0)
    assert len(first) == len(expected) and set(first) == expected
    assert first == names(stream_of(shards), epoch=0)
    assert first != names(stream, epoch=1) and set(names(stream, epoch=1)) == expected
    assert first != names(stream_of(shards, seed=1), epoch=0)
    pixels = {stream[row]["image"].numpy().tobytes() for row, _ in stream.lane(0, 0, 1)}
    assert pixels == {random_pixels((8, 8), i).tobytes() for i in range(SHARDS * ROWS)}


def test_a_shuffled_block_holds_rows_of_several_shards(shards):
    for lane in range(LANES):
        rows = [int(row.name.split()[-1]) for row, _ in stream_of(shards, buffer_size=40).lane(0, lane, LANES)]
        assert all(len(set(rows[start : start + 20])) >= 4 for start in range(0, 80, 20))
        assert sum(a != b for a, b in pairwise(rows)) > len(rows) / 2


class Counting:
    """A stream's rows that counts those it is asked for."""

    def __init__(self, rows):
        self.rows, self.read = rows, Counter()

    def shard(self, num_shards, index, contiguous):
        return Shard(self, self.rows.shard(num_shards, index, contiguous), index)


class Shard:
    def __init__(self, counting, rows, index):
        self.counting, self.rows, self.index = counting, rows, index

    def skip(self, start):
        for row in self.rows.skip(start):
            self.counting.read[self.index] += 1
            yield row


def test_a_lane_is_entered_at_any_place_and_reads_only_its_block_for_it(shards):
    stream = stream_of(shards)
    whole = [(row.name, place) for row, place in stream.lane(1, 1, LANES)]
    stream.rows = counting = Counting(stream.rows)
    for index in range(0, len(whole) - 1, 7):
        counting.read.clear()
        rest = stream.lane(1, 1, LANES, whole[index][1])
        row, place = next(rest)
        assert (row.name, place) == whole[index + 1]
        assert sum(counting.read.values()) <= 2 * 6  # half of 12 rows are a lane's block; at its end, the next is read
        assert [(row.name, place) for row, place in rest] == whole[index + 2 :]


@pytest.mark.parametrize(("bounded", "most"), [("rows", 20), ("bytes", 40)])
def test_no_more_rows_are_held_than_the_buffer_takes(bounded, most, shards, monkeypatch):
    stream = stream_of(shards, buffer_size=20 if bounded == "rows" else 10**6)
    size = stream.decode.size(next(stream.lane(0, 0, 1))[0].row)
    assert size > 70
    if bounded == "bytes":
        monkeypatch.setattr(streams, "MOST_BYTES", 30 * size)
    held = []
    for index, _ in enumerate(stream.lane(0, 0, 1)):
        if index % 40 == 30:
            held.append(sum(isinstance(thing, NamedRow) for thing in gc.get_objects()))
    assert max(held) <= most + 2


def sampled(stream, num_processes, micro_batches, places=None, epoch=0):
    """Names of the rows of each batch by process and micro-batch, and the samplers."""
    samplers = [
        LaneSampler(stream, Split(8 // num_processes // micro_batches, num_processes, p, micro_batches, True), LANES)
        for p in range(num_processes)
    ]
    for sampler in samplers:
        sampler.start(epoch, places or {})
    return [[[row.name for row in part] for part in sampler] for sampler in samplers], samplers


@pytest.mark.parametrize(("num_processes", "micro_batches"), [(1, 2), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_processes_take_parts_of_the_same_batches(num_processes, micro_batches, shards):
    stream = stream_of(shards)
    ((whole,), _) = sampled(stream, 1, 1)
    of_processes, samplers = sampled(stream, num_processes, micro_batches)
    for index, batch in enumerate(whole):
        start = index * micro_batches
        parts = [name for parts in of_processes for part in parts[start : start + micro_batches] for name in part]
        assert parts == batch
    assert all(len(sampler.lanes) == max(LANES // num_processes, 1) for sampler in samplers)  # what each reads
    assert len({name for batch in whole for name in batch}) == 8 * len(whole) == 8 * (16 * ROWS // 4)


BASE_STREAM = BASE | {"streaming": True, "num_classes": 3, "source_resolution": 8, "shuffle_buffer_size": 12}
EXACT_STREAM = EXACT | {"max_train_steps": 24, "checkpointing_steps": 4}  # 20 batches of 8 are an epoch


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("archives"), "tar")


@pytest.fixture
def options(archives):
    return BASE_STREAM | EXACT_STREAM | {"train_data_dir": str(archives)}


@pytest.fixture(scope="module")
def unbroken(archives, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("unbroken")
    run(BASE_STREAM | EXACT_STREAM | {"train_data_dir": str(archives), "output_dir": str(output_dir)})
    return output_dir


@pytest.mark.parametrize(("kill", "workers"), [(AtDiskCalls(KillAt(100)), 0), (KillAfter(1.2), 2)])
def test_a_killed_stream_resumes_at_the_exact_image(kill, workers, options, unbroken, tmp_path):
    """The second time loading in other processes, which changes nothing."""
    options |= {"output_dir": str(tmp_path), "dataloader_num_workers": workers}
    try:
        run(options, kill)
        assert isinstance(kill, KillAfter)  # the timer may be too late
    except BrokenProcessPool:
        pass
    run(options | {"resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path, unbroken, step=24)
    ours, theirs = (json.loads((f / "checkpoint-24" / "progress.json").read_text()) for f in (tmp_path, unbroken))
    assert ours == theirs
    assert (ours["epoch"], ours["epoch_batches"], len(ours["lanes"])) == (1, 4, LANES)


class DecodesNoMoreThan:
    def __init__(self, count):
        self.count = count

    def __call__(self):
        pixels = RowDecoder.pixels

        def counting(decoder, row):
            self.count -= 1
            assert self.count >= 0
            return pixels(decoder, row)

        RowDecoder.pixels = counting


def test_resuming_decodes_only_what_is_trained_on(options, unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoint-20", tmp_path / "checkpoint-20")
    resumed = options | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    run(resumed, DecodesNoMoreThan(4 * 8))
    assert_same_run(tmp_path, unbroken, step=24)


def test_processes_take_the_same_steps_on_a_stream_and_go_on_in_other_numbers(archives, tmp_path):
    options = STEPS | BASE_STREAM | {"preset": "fashion_mnist_8_to_16", "sample_size": 8, "low_res_size": 4}
    options |= {"train_data_dir": str(archives)}
    split_run(1, 1, options | {"output_dir": str(tmp_path / "undivided")})
    options |= {"output_dir": str(tmp_path / "divided"), "resume_from_checkpoint": "latest"}
    split_run(2, 2, options | {"max_train_steps": 2})
    split_run(2, 1, options)
    assert_close_runs(tmp_path / "divided", tmp_path / "undivided")


def test_processes_end_an_epoch_together(archives, tmp_path):
    """One lane has rows for a batch more than the other, which another process reads."""
    options = STEPS | BASE_STREAM | {"preset": "fashion_mnist_8_to_16", "sample_size": 8, "low_res_size": 4}
    options |= {"train_data_dir": str(archives), "max_train_steps": 22, "checkpointing_steps": 22}
    for name, split in (("undivided", (1, 1)), ("divided", (2, 1))):
        split_run(*split, options | {"output_dir": str(tmp_path / name)})
    progress = [
        json.loads((tmp_path / n / "checkpoint-22/progress.json").read_text()) for n in ("undivided", "divided")
    ]
    assert progress[0]["epoch"] == progress[1]["epoch"] == 1 and progress[0]["lanes"] == progress[1]["lanes"]


class AsIn010:
    """A run as it was before streams were read in lanes."""

    def __call__(self):
        loop.was_streamed_whole = lambda saved: True


def test_a_stream_begun_before_lanes_goes_on_as_it_began(options, tmp_path):
    options |= {"max_train_steps": 3, "checkpointing_steps": 1}
    run(options | {"output_dir": str(tmp_path / "earlier")}, AsIn010())
    saved = json.loads((tmp_path / "earlier" / "checkpoint-2" / "training_config.json").read_text())
    assert "num_lanes" not in saved["data"] and saved["data"]["num_workers"] == 0
    shutil.copytree(tmp_path / "earlier" / "checkpoint-2", tmp_path / "now" / "checkpoint-2")
    run(options | {"output_dir": str(tmp_path / "now"), "resume_from_checkpoint": "latest"})
    assert_same_run(tmp_path / "now", tmp_path / "earlier", step=3)


def test_tar_files_are_read_as_a_whole_too_and_by_split(tmp_path):
    for split, count in (("train", 5), ("val", 2)):
        write_tar(tmp_path / f"pictures-{split}-0.tar", 0, count)
    (tmp_path / "pictures-train-0_stats.json").write_text("{}")
    options = {"num_channels": 1, "source_resolution": 8}
    data = open_images(config_for(tmp_path, **options))
    assert [int(item["label"]) for item in data.dataset] == [0, 1, 2, 0, 1] and len(data.id2label) == 3
    assert np.array_equal(data.dataset[4]["image"][0], random_pixels((8, 8), 4))
    assert len(open_images(config_for(tmp_path, dataset_split="validation", **options)).dataset) == 2
    with pytest.raises(ValueError, match=r"`dataset_split` is 'test', .* 2 files \*\.tar .*: give a split that is"):
        open_images(config_for(tmp_path, dataset_split="test", **options))


def test_a_damaged_image_of_a_tar_file_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for suffix, content in (("png", b"nothing"), ("cls", b"0")):
            entry = tarfile.TarInfo(f"x.{suffix}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    stream = stream_of(tmp_path)
    with pytest.raises(ValueError, match=r"'x.png' \(row 0 of shard 0\) cannot be read as an image"):
        stream[next(stream.lane(0, 0, 1))[0]]


def test_an_archive_beside_a_folder_of_images_is_no_data(tmp_path):
    from test_data_checks import save_classes

    save_classes(tmp_path)
    write_tar(tmp_path / "a" / "all.tar", 0, 3)
    assert open_images(config_for(tmp_path)).left_out == {"not images": ["a/all.tar"]}
