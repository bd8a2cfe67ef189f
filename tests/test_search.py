"""Post-training search: from settings to figures, tables, plots and the pipeline's folder; and bad input."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from small_cascade import small_cascade

from cdm_diffusers import CascadedDiffusionPipeline, files
from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.image_sets import load_image_set
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.data.transforms import area_resize, to_float
from cdm_diffusers.evaluation.classifier import ClassifierConfig, build_classifier
from cdm_diffusers.evaluation.ensembles import crps, squared_spread_and_error
from cdm_diffusers.evaluation.features import load_extractor
from cdm_diffusers.evaluation.sample import image_generator
from cdm_diffusers.evaluation.sample_store import store_real_images
from cdm_diffusers.studies import search as search_module
from cdm_diffusers.studies.config import SearchConfig, Setting
from cdm_diffusers.studies.search import resolved, search
from cdm_diffusers.studies.search_report import (
    compared_setting,
    outlook_line,
    outlook_of,
    settings_table,
    summarise,
    write_best,
)


NAMES = "T-shirt/top,Trouser,Ankle boot"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A cascade, an untrained classifier of 8x8 images as extractor, and IDX files of 16x16 images."""
    folder = tmp_path_factory.mktemp("search")
    small_cascade().save_pretrained(folder / "cascade")
    torch.manual_seed(1)
    options = ClassifierConfig(output_dir="", image_size=8, num_channels=1)
    names = dict(enumerate(NAMES.split(",")))
    build_classifier(options, names).model.save_pretrained(folder / "classifier")
    (folder / "data").mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 12), ("t10k", 9)):
        images = generator.integers(0, 256, (count, 16, 16), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 3)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / "data" / f"{prefix}-{kind}-ubyte").write_bytes(header + values.tobytes())
    return folder


def config_for(folders, output, **options):
    defaults = {
        "pipeline": str(folders / "cascade"),
        "extractor": str(folders / "classifier"),
        "output_dir": str(output),
        "train_data_dir": str(folders / "data"),
        "label_names": NAMES,
        "stage": "super_res_1",
        "num_images": 4,
        "batch_size": 4,
        "cache_dir": str(folders / "cache"),
        "real_inputs": False,
    }
    return SearchConfig(**{**defaults, **options})


def lines_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def frechet(a, b):
    """Heusel et al. (2017), Eq. 6; the trace of a square root is the sum of the eigenvalues' roots."""
    (m_a, c_a), (m_b, c_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    roots = np.sqrt(np.linalg.eigvals(c_a @ c_b).real.clip(min=0))
    return ((m_a - m_b) ** 2).sum() + np.trace(c_a + c_b) - 2 * roots.sum()


def real_images(folders, split, size):
    options = DataConfig(
        source_resolution=16, train_data_dir=str(folders / "data"), num_channels=1, dataset_split=split
    )
    images = to_float(open_images(options).dataset.images)
    return area_resize(images, size)


@pytest.fixture(scope="module")
def searched(folders, tmp_path_factory):
    """Two attempts in one folder: the second goes on with more settings."""
    output = tmp_path_factory.mktemp("results") / "out"
    first = {"augmentation_level": [0, 8], "truncated": [False, True]}
    search(config_for(folders, output, grid=json.dumps(first)))
    before, stamp = lines_of(output), (output / "low_res" / "generated-0" / "results.json").stat().st_mtime_ns
    grids = [first, {"augmentation_level": [8], "conditioning": ["train", "eval"]}]
    rows = search(config_for(folders, output, grid=json.dumps(grids), seeds=[0, 1], keep_samples=True))
    assert (output / "low_res" / "generated-0" / "results.json").stat().st_mtime_ns == stamp
    return output, before, rows


def test_processes_of_a_search_end_together(tmp_path, monkeypatch):
    """From the start, and not while they sample only."""
    advices = []

    @contextmanager
    def watched(state, advice):
        advices.append(advice())
        yield

    monkeypatch.setattr(search_module, "ending_together", watched)
    monkeypatch.setattr(search_module, "search_alone", lambda config, state: advices[0])
    config = config_for(tmp_path, tmp_path, num_inference_steps=[3])
    assert f"kept in '{tmp_path}': start the command again" in search(config)


def test_a_stopped_search_goes_on(searched):
    output, before, rows = searched
    lines = lines_of(output)
    assert lines[:4] == before and len(before) == 4
    assert len(lines) == 2 * 6 and len({json.dumps([line["setting"], line["seed"]]) for line in lines}) == 12
    assert [len(row["seeds"]) for row in rows] == [2] * 6


def test_figures_are_those_of_the_samples(searched, folders):
    """Samples drawn anew by the pipeline, features by the extractor, the distance by NumPy."""
    lines = {json.dumps([line["setting"], line["seed"]], sort_keys=True): line for line in lines_of(searched[0])}
    extractor = load_extractor(str(folders / "classifier"))
    pipe = CascadedDiffusionPipeline.from_pretrained(folders / "cascade")
    labels, seed, real = [0, 1, 2, 0], 1, {}
    for split in ("train", "test"):
        images = ((real_images(folders, split, 8) + 1) * 127.5).round().to(torch.uint8)
        real[split] = extractor(images)[0].double().numpy()

    def generators(first_stage):
        return [image_generator(seed, index, first_stage) for index in range(4)]

    z = pipe(labels, generator=generators(0), output_type="pt", output_stages=True).stages["base"]
    shared = {"num_inference_steps": 3, "augmentation_level": 8, "scheduler": "ancestral", "guidance_scale": 1.0}
    arguments = {"augmentation_levels": {"super_res_1": 8}, "output_type": "pt", "output_stages": True}
    for truncated in (False, True):
        if truncated:
            stages = pipe(labels, generator=generators(0), truncated=True, **arguments).stages
        else:
            stages = pipe(labels, image=z, generator=generators(1), **arguments).stages
        features, logits = extractor((stages["super_res_1"] * 255).round().to(torch.uint8))
        line = lines[
            json.dumps([{**shared, "truncated": truncated, "conditioning": "generated"}, seed], sort_keys=True)
        ]
        for split in ("train", "test"):
            expected = frechet(features.double().numpy(), real[split])
            assert line["figures"][split] == pytest.approx(expected, rel=0.02, abs=1e-4)
        assert line["figures"]["recognised"] == (logits.argmax(1) == torch.tensor(labels)).float().mean().item()
        # of three steps at t = 1, 11 and 20, the base takes those above s = 8
        assert line["evaluations"] == {"base": 2 if truncated else 3, "super_res_1": 3}
        assert line["num_images"] == 4 and line["extractor"] == extractor.name


def test_real_images_as_conditioning(searched, folders):
    output = searched[0]
    for split, name in (("train", "train"), ("test", "eval")):
        kept = np.load(output / "low_res" / f"{name}-0" / "low_res" / "base.npy")
        labels = np.load(output / "low_res" / f"{name}-0" / "labels.npy")
        averaged = ((real_images(folders, split, 4) + 1) / 2).numpy()
        places = [int(np.abs(averaged - image).max((1, 2, 3)).argmin()) for image in kept]
        assert np.abs(averaged[places] - kept).max() < 1e-6 and len(set(places)) == 4
        assert labels.tolist() == [place % 3 for place in places]
    other = np.load(output / "low_res" / "train-1" / "low_res" / "base.npy")
    assert not np.array_equal(other, np.load(output / "low_res" / "train-0" / "low_res" / "base.npy"))


def test_table_plots_and_samples(searched):
    output, _, rows = searched
    text = (output / "table.md").read_text()
    assert text.count("\n| ") == 1 + 6 and text.count("**best**") == 2
    allowed = [row for row in rows if row["setting"]["conditioning"] == "generated"]
    best = min(allowed, key=lambda row: row["figures"]["train"]["mean"])
    assert best["is_best"] and sum(row["is_best"] for row in rows) == 1
    for name in ("quality-over-s.png", "quality-over-evaluations.png"):
        assert min(Image.open(output / name).size) > 300
    samples = [load_image_set(folder) for folder in (output / "samples").iterdir()]
    assert len(samples) == 8 and {(len(images), images.size) for images in samples} == {(4, 8)}


def test_stages_after_the_searched_one(folders, tmp_path):
    with pytest.raises(ValueError, match="takes 8x8 images of 1 channels, and these are 16x16"):
        search(config_for(folders, tmp_path, measured_stage="super_res_2", num_inference_steps=[2], num_images=2))
    samples = load_image_set(next((tmp_path / "samples").iterdir()))
    assert samples.size == 16  # super_res_2 ran as well


# Settings


# Whether augmentation can be expected to pay


def test_the_smallest_s_is_searched_on_real_images_too(folders, tmp_path, capsys):
    """Once for each seed, with the noise of the row on generated images; the ratio is printed and stored."""
    options = {"augmentation_levels": [0, 8], "real_inputs": True, "seeds": [0, 1], "keep_samples": True}
    rows = search(config_for(folders, tmp_path, **options))
    settings = [(row["setting"]["augmentation_level"], row["setting"]["conditioning"]) for row in rows]
    assert settings == [(0, "generated"), (8, "generated"), (0, "train")]
    stored = json.loads((tmp_path / "augmentation.json").read_text())
    generated, real = (rows[place]["figures"]["train"] for place in (0, 2))
    assert stored["ratio"] == pytest.approx(generated["mean"] / real["mean"])
    assert list(stored["ratios"].values()) == pytest.approx(
        [one / other for one, other in zip(generated["values"], real["values"], strict=True)]
    )
    text = capsys.readouterr().out
    assert f"Generated/ground-truth ratio at s = 0: {stored['ratio']:.3g} (" in text and "too near 1" in text
    assert text.rstrip().endswith((tmp_path / "table.md").read_text().splitlines()[-1])
    samples = [json.loads(file.read_text()) for file in (tmp_path / "samples").glob("*/settings.json")]
    zero = [one for one in samples if one["options"]["augmentation_levels"] == {"super_res_1": 0}]
    assert len(zero) == 4 and {one["seed"] for one in zero} == {0, 1}  # image i has the noise of (seed, i) in both
    assert len({json.dumps({**one, "low_res": None, "labels": None, "about": None}) for one in zero}) == 2


def test_an_outlook_needs_real_images_with_labels_and_enough_of_them(folders, tmp_path, capsys):
    """And a stage with low-resolution inputs. A search without any goes on as before."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "test").mkdir()
    for split in ("train", "test"):
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{number}.png")
    shared = {"num_inference_steps": [2], "num_images": 2, "real_inputs": True}
    unlabelled = {"train_data_dir": str(tmp_path / "data"), "label_names": None}
    for name, options, said in (
        ("labels", unlabelled, "Nothing will be said about whether augmentation pays: "),
        ("count", {"num_images": 13}, "`num_images` is 13, but there are only 12 training images."),
    ):
        rows = search(config_for(folders, tmp_path / name, **shared | options))
        assert len(rows) == 1 and said in capsys.readouterr().out
        assert not (tmp_path / name / "augmentation.json").exists()
    base = config_for(folders, tmp_path / "base", **shared, stage="base", extractor="efficientnet-lite0")
    assert len(search_module.Search(base, search_module.open_state()).settings) == 1


def row_of(distance, level, conditioning, **further):
    setting = {"augmentation_level": level, "truncated": False, "conditioning": conditioning, **further}
    figures = {name: {"mean": value, "values": [value, value]} for name, value in (("train", distance), ("test", 9.0))}
    return {"setting": setting, "seeds": [0, 1], "figures": figures, "num_images": 500, "num_features": 128}


@pytest.mark.parametrize(
    ("on_generated", "words"),
    [(2.6, "can be expected to pay"), (2.5, "may pay a little"), (2.1, "next to nothing for augmentation to repair")],
)
def test_the_rule_for_augmentation(on_generated, words):
    least = 2.0 if on_generated == 2.1 else 2.7
    rows = [(3.0, 8, "generated"), (on_generated, 0, "generated"), (1.0, 8, "train"), (2.0, 0, "train")]
    rows.append((least, 9, "generated"))
    rows = [row_of(*row) for row in rows]
    outlook = outlook_of(rows, "train")
    assert (outlook["ratio"], outlook["augmentation_level"]) == (on_generated / 2, 0)
    line = outlook_line(outlook, rows[0])
    said = f"{words}. s = 9 has a smaller distance all the same" if on_generated == 2.1 else f"{words}."
    assert ("all the same" in line) == (on_generated == 2.1)
    assert said in line and line.startswith(f"Generated/ground-truth ratio at s = 0: {on_generated / 2}")
    assert outlook_of([*rows[:2], rows[4]], "train") is None
    assert outlook_of([rows[1], row_of(0.0, 0, "train")], "train") is None


@pytest.mark.parametrize(("num_images", "has_verdict"), [(255, False), (256, True)])
def test_too_few_images_have_no_verdict(num_images, has_verdict):
    """Their ratio is too near 1 to tell; twice as many as the features are enough."""
    rows = [row_of(one, 0, conditioning) for one, conditioning in ((2.6, "generated"), (2.0, "train"))]
    for row in rows:
        row["num_images"] = num_images
    outlook = outlook_of(rows, "train")
    line = outlook_line(outlook, rows[0])
    assert (outlook["augmentation"] is not None) == has_verdict == ("can be expected to pay" in line)
    assert line.startswith("Generated/ground-truth ratio at s = 0: 1.3 (") and ("left open" in line) != has_verdict


def test_what_is_compared_has_no_restart():
    """Of the same s, in whatever order results came: the setting whose real counterpart the search adds."""
    rows = [row_of(5.0, 0, "generated", restart_timestep=3), row_of(3.0, 0, "generated"), row_of(2.0, 0, "train")]
    assert outlook_of(rows, "train")["generated"] == outlook_of(rows[::-1], "train")["generated"] == 3.0
    truncated = row_of(1.0, 0, "generated") | {"setting": {"augmentation_level": 0, "truncated": True}}
    assert outlook_of([truncated, *rows], "train")["generated"] == 3.0
    settings = [Setting(**row["setting"]) for row in rows]
    assert compared_setting(settings) == settings[1]


def test_grids(tmp_path):
    pipeline = small_cascade(default_guidance_scales={"super_res_1": 1.5})
    first = {"augmentation_level": [1, 2], "num_inference_steps": [4, 3]}
    (tmp_path / "grid.json").write_text(json.dumps([first, {"augmentation_level": [2, 7]}]))
    config = SearchConfig(
        pipeline="x", extractor="x", output_dir="x", train_data_dir="x", grid=str(tmp_path / "grid.json")
    )
    settings = resolved(config.settings(), pipeline, "super_res_1")
    found = [(setting.augmentation_level, setting.num_inference_steps) for setting in settings]
    assert found == [(1, 4), (1, 3), (2, 4), (2, 3), (7, 3)]  # (2, 3) once
    assert {(setting.scheduler, setting.guidance_scale) for setting in settings} == {("ancestral", 1.5)}
    assert Setting(inference_schedule=[0.1, 0.2], guidance_scale=2).sampling_options("super_res_2") == {
        "inference_schedules": {"super_res_2": (0.1, 0.2)},
        "guidance_scale": {"super_res_2": 2},
        "truncated": False,
        "restart_timestep": None,
    }
    assert Setting(consistency=True).sampling_options("super_res_1")["consistency"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augmentation_levels": [5, 21]},
            r"'augmentation_level': 21.* of stage `super_res_1`: .*must be .* in 0..20",
        ),
        ({"schedulers": ["eular"]}, "'eular'.*must be one of"),
        ({"num_inference_steps": [21]}, "num_inference_steps.*21"),
        ({"truncated": ["maybe"]}, "`truncated` is .'maybe'.; each item must be true or false"),
        ({"truncated": [True], "conditionings": ["train"]}, "`truncated` with `conditioning` 'train'"),
        ({"conditionings": ["test"]}, "`conditionings` is .'test'.; each item must be one of"),
        ({"restart_timesteps": [10]}, "`restart_timestep` is 10, but with `image` the base does not run"),
        ({"stage": "base", "truncated": [True]}, "the base has no conditioning"),
        ({"stage": "base", "consistency": [True]}, "the base has no conditioning"),
        ({"stage": "super_res_2", "augmentation_levels": [5]}, "stage `super_res_2` is 5, but the stage takes none"),
        ({"grid": '{"inference_schedule": [[0.1, 0.2]]}'}, "samples with CascadedDDPMScheduler"),
        ({"grid": '{"steps": [3]}'}, r"`grid` has the axes \['steps'\]"),
        ({"grid": '{"truncated": true}'}, "must be an object of lists"),
        ({"grid": "[]"}, "`grid` is empty"),
        ({"grid": "no/such/file"}, "`grid` is 'no/such/file'; it must be JSON or a file of it"),
        ({"grid": "{}", "num_inference_steps": [2]}, "and so is num_inference_steps: leave one of them out"),
        ({}, "and no axis is given: give it, or num_"),
        ({"num_inference_steps": [2], "stage": "super_res_3"}, "`stage` is 'super_res_3'"),
        ({"num_inference_steps": [2], "measured_stage": "base"}, "must not run before `stage`"),
        ({"num_inference_steps": [2], "num_images": 1}, "`num_images` is 1"),
        ({"num_inference_steps": [2], "seeds": []}, "`seeds` is \\[\\]; it must have at least one"),
        ({"num_inference_steps": [2], "eval_split": "train"}, "they must differ"),
        ({"num_inference_steps": [2], "select_split": "dev"}, "`select_split` is 'dev'"),
        (
            {"num_inference_steps": [2], "pipeline": "a/hub-id", "write_best": True},
            "`write_best` it must be a folder",
        ),
        ({"conditionings": ["train"], "label_names": "a,b,c"}, "the split 'train' has other classes"),
    ],
)
def test_bad_options_before_any_sampling(folders, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        search(config_for(folders, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_truncated_process_needs_a_scheduler_of_ours(folders, tmp_path):
    pipeline = CascadedDiffusionPipeline.from_pretrained(folders / "cascade")
    pipeline.base_scheduler = DPMSolverMultistepScheduler.from_config(pipeline.base_scheduler.config)
    pipeline.save_pretrained(tmp_path / "cascade")
    config = config_for(folders, tmp_path / "out", pipeline=str(tmp_path / "cascade"), truncated=[True])
    with pytest.raises(ValueError, match="Stage `base`: DPMSolverMultistepScheduler cannot stop"):
        search(config)
    assert not (tmp_path / "out").exists()


def test_another_search_in_the_folder(searched, folders):
    for options, message in (({"num_images": 5}, r"num_images \(4 there, 5 now\)"), ({"stage": "base"}, "stage")):
        with pytest.raises(ValueError, match=f"holds another search: .*{message}"):
            search(config_for(folders, searched[0], num_inference_steps=[3], **options))


def test_a_damaged_search_in_the_folder(folders, tmp_path):
    (tmp_path / "search.json").write_text('{"stage":')
    with pytest.raises(ValueError, match=r"search.json' was not written by .*: choose another folder"):
        search(config_for(folders, tmp_path, num_inference_steps=[3]))


def test_results_of_another_meaning_of_a_solver_are_kept_and_not_used(folders, tmp_path, capsys):
    """Folders begun when `heun` had evenly spread levels; all their other results stay valid."""
    options = {"schedulers": ["heun", "unipc"], "num_inference_steps": [3]}
    search(config_for(folders, tmp_path, **options))
    heun, unipc = lines_of(tmp_path)
    assert heun.pop("solver_rule") == "with Karras's levels" and "solver_rule" not in unipc
    heun["figures"] = dict.fromkeys(heun["figures"], 0.25)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (heun, unipc)))
    capsys.readouterr()
    rows = search(config_for(folders, tmp_path, **options))
    old = f"1 lines of {tmp_path}/results.jsonl are not used; names in them changed meaning: `heun` (with Karras's"
    assert old in capsys.readouterr().out
    lines = lines_of(tmp_path)
    assert lines[:2] == [heun, unipc] and len(lines) == 3 and lines[2]["setting"] == heun["setting"]
    values = [figure["values"] for row in rows for figure in row["figures"].values()]
    assert len(rows) == 2 and all(len(each) == 1 and 0.25 not in each for each in values)


def test_more_real_images_than_there_are(folders, tmp_path):
    dataset = open_images(
        DataConfig(source_resolution=16, train_data_dir=str(folders / "data"), num_channels=1)
    ).dataset
    with pytest.raises(ValueError, match="`num_images` is 13, but there are only 12 real images"):
        store_real_images(tmp_path, dataset, "base", 4, 13, seed=0)


# Selection


def line(distances, evaluations, seed=0, conditioning="generated", **setting):
    return {
        "setting": {"truncated": False, "conditioning": conditioning, **setting},
        "seed": seed,
        "figures": dict(zip(("train", "test"), distances, strict=True)),
        "evaluations": {"base": 9, "super_res_1": evaluations},
        "seconds": 2.0,
        "num_images": 4,
        "num_features": 4,
    }


LINES = [
    line((5.0, 3.0), 4, augmentation_level=0),
    line((4.0, 6.0), 8, augmentation_level=1),
    line((4.5, 2.0), 8, augmentation_level=2),
    line((2.0, 6.0), 16, augmentation_level=3),
    line((7.0, 5.0), 4, seed=1, augmentation_level=0),
    line((1.0, 1.0), 4, conditioning="train", augmentation_level=0),
    line((1.5, 1.0), 16, augmentation_level=3) | {"setting": {"truncated": True, "conditioning": "generated"}},
]


def test_means_errors_and_the_best():
    def summary(seeds=(0,), select_split="train", **options):
        return summarise(LINES, "super_res_1", seeds, select_split, **options)

    rows = summary()
    assert [row["seeds"] for row in rows] == [[0, 1], [0], [0], [0], [0], [0]]
    assert rows[0]["figures"]["train"] == {"mean": 6.0, "standard_error": pytest.approx(1.0), "values": [5.0, 7.0]}
    assert rows[1]["figures"]["test"]["standard_error"] is None
    assert [row["is_optimal"] for row in rows] == [True, True, False, False, True, True]

    def best(**options):
        return [row["is_best"] for row in summary(**options)].index(True)

    assert best() == 5 and best(only_storable=True) == 3 and best(max_evaluations=8) == 1
    assert best(select_split="test", max_evaluations=8) == 2
    assert best(seeds=[0, 1]) == 0  # the one setting that both have
    description = {"stage": "super_res_1", "measured_stage": "super_res_1", "extractor": "E", "distance": "D"}
    text = settings_table(rows, {"train": 0.25, "test": 0.5}, description, "train", max_evaluations=8)
    assert "| - | yes | generated |" in text or "| yes | generated | - |" in text
    assert "no more images than the 4 features" in text and "0.25 from 'train', 0.5 from 'test'" in text
    assert "6 ± 1" in text and "within 8 network evaluations" in text and "distance from 'test'" in text


def out_of_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_best_is_written_into_the_pipeline(tmp_path, monkeypatch):
    small_cascade(default_guidance_scales={"base": 1.2}).save_pretrained(tmp_path)
    weights = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    pipeline = CascadedDiffusionPipeline.from_pretrained(tmp_path)
    found = {"num_inference_steps": 7, "augmentation_level": 4, "scheduler": "dpmsolver++", "guidance_scale": 1.3}
    lines = [line((3.0, 4.0), 7, **found), line((5.0, 1.0), 3, **{**found, "num_inference_steps": 3})]
    about = {"selected_by": "train"}
    write_best(summarise(lines, "super_res_1", [0], "train"), pipeline, "super_res_1", tmp_path, about)
    changed = CascadedDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(changed.super_res_1_scheduler, DPMSolverMultistepScheduler)
    assert changed.config.default_num_inference_steps == {"base": 3, "super_res_1": 7, "super_res_2": 3}
    assert changed.config.default_augmentation_levels == {"super_res_1": 4}
    assert changed.config.default_guidance_scales == {"base": 1.2, "super_res_1": 1.3}
    assert {file: file.stat().st_mtime_ns for file in weights} == weights
    written = json.loads((tmp_path / "search-super_res_1.json").read_text())
    assert written["setting"]["num_inference_steps"] == 7 and written["selected_by"] == "train"
    assert written["figures"]["test"]["mean"] == 4.0
    assert not list(tmp_path.glob(".tmp-*"))

    schedule = {"num_inference_steps": 5, "inference_schedule": [0.01, 0.5]}
    lines = [line((3.0, 4.0), 5, **schedule) | {"evaluations": {"super_res_2": 5}}]
    write_best(summarise(lines, "super_res_2", [0], "train"), changed, "super_res_2", tmp_path, about)
    scheduler = CascadedDiffusionPipeline.from_pretrained(tmp_path).super_res_2_scheduler
    scheduler.set_timesteps(2)
    assert scheduler.inference_table.betas.tolist() == pytest.approx([0.01, 0.5])

    with monkeypatch.context() as full, pytest.raises(OSError, match="The scheduler could not be saved"):
        full.setattr(files.os, "fsync", out_of_space)
        write_best(summarise(lines, "super_res_2", [0], "train"), changed, "super_res_2", tmp_path, about)
    assert not list(tmp_path.glob(".*"))
    CascadedDiffusionPipeline.from_pretrained(tmp_path)

    too_many = summarise(lines, "super_res_2", [0], "train", max_evaluations=1)
    with pytest.raises(ValueError, match="no setting within `max_evaluations`"):
        write_best(too_many, changed, "super_res_2", tmp_path, about)


# What selects


def test_selected_by_recognition_or_crps():
    lines = [line((1.0, 1.0), 4, num_inference_steps=2), line((2.0, 1.0), 4, num_inference_steps=4)]
    lines[0]["figures"] |= {"recognised": 0.5, "crps": 0.4, "spread_over_error": 0.3}
    lines[1]["figures"] |= {"recognised": 0.9, "crps": 0.2, "spread_over_error": 0.9}
    real = line((0.5, 0.5), 4, conditioning="train", num_inference_steps=2)
    description = {"stage": "super_res_1", "measured_stage": "super_res_1", "extractor": "E", "distance": "D"}
    for select, best in (("distance", 0), ("recognition", 1), ("crps", 1)):
        rows = summarise([*lines, real], "super_res_1", [0], "train", select=select)
        assert [row["is_best"] for row in rows] == [best == 0, best == 1, False]
        assert [row["is_optimal"] for row in rows] == [best == 0, best == 1, True]
        text = settings_table(rows, {"train": 0.25, "test": 0.5}, description, "train", select=select)
        assert "| recognised | CRPS | spread over error |" in text
        assert "| 0.2000 | 0.90 |" in text and "| - | - | - |" in text
        assert text.count("**best**, front") == 1 and text.count("front |") == 1
        assert "Rows on real inputs" in text


def test_a_search_by_crps_measures_samples_of_real_inputs(folders, tmp_path):
    """Also of what was measured without; figures are those of the pipeline's own samples."""
    grid = {"num_inference_steps": [2, 3]}
    search(config_for(folders, tmp_path, grid=json.dumps(grid)))
    rows = search(config_for(folders, tmp_path, grid=json.dumps(grid), select="crps", ensemble_images=5))
    assert len(rows) == 2 and len(lines_of(tmp_path)) == 4
    best = min(rows, key=lambda row: row["figures"]["crps"]["mean"])
    assert best["is_best"] and "CRPS on real inputs of 'train'" in (tmp_path / "table.md").read_text()

    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:5]
    truth, low_res = ((real_images(folders, "train", size)[order] + 1) / 2 for size in (8, 4))
    pipe = CascadedDiffusionPipeline.from_pretrained(folders / "cascade").with_schedulers(last_stage="super_res_1")
    pipe.set_progress_bar_config(disable=True)
    generators = [image_generator(0, number, 1) for number in range(5 * 8)]
    made = pipe(
        (order % 3).repeat_interleave(8),
        image=low_res.repeat_interleave(8, dim=0),
        generator=generators,
        num_inference_steps=2,
        output_type="pt",
    ).images.numpy()
    made = made.reshape(5, 8, 1, 8, 8)
    error = np.abs(made - truth.numpy()[:, None]).mean()
    spread = np.mean([np.abs(made[:, i] - made[:, j]).mean() for i in range(8) for j in range(8) if i != j])
    figures = next(row for row in rows if row["setting"]["num_inference_steps"] == 2)["figures"]
    assert figures["crps"]["mean"] == pytest.approx(error - spread / 2, rel=1e-3)
    ratio = made.var(1, ddof=1).mean() * 9 / 8 / np.square(made.mean(1) - truth.numpy()).mean()
    assert figures["spread_over_error"]["mean"] == pytest.approx(ratio**0.5, rel=1e-3)


def test_a_calibrated_ensemble_spreads_as_much_as_it_errs():
    generator = torch.Generator().manual_seed(0)
    members, truth = torch.randn(8, 400, 1, 4, 4, generator=generator), torch.randn(400, 1, 4, 4, generator=generator)
    spread, error = squared_spread_and_error(members, truth)
    assert (spread.mean() / error.mean()).item() == pytest.approx(1, abs=0.05)
    # of a standard normal: E|x - y| / 2 = 1 / sqrt(pi)
    assert crps(members, truth).mean().item() == pytest.approx(1 / np.sqrt(np.pi), rel=0.03)


def test_what_cannot_select(folders, tmp_path):
    with pytest.raises(ValueError, match="`select` is 'crps', but the base has no input"):
        search(
            config_for(
                folders, tmp_path, num_inference_steps=[2], select="crps", stage="base", measured_stage="super_res_1"
            )
        )
    with pytest.raises(ValueError, match="`select` is 'crps', which starts from real images"):
        search(config_for(folders, tmp_path, truncated=[True], select="crps"))
    none = mock.patch.object(search_module.Search, "open_classifier", lambda run: None)
    with none, pytest.raises(ValueError, match="`select` is 'recognition', but there is no classifier"):
        search(config_for(folders, tmp_path, num_inference_steps=[2], select="recognition"))


def test_the_best_is_written_by_name(tmp_path):
    small_cascade(settings={"fast": {"num_inference_steps": {"base": 2}}}).save_pretrained(tmp_path)
    pipeline = CascadedDiffusionPipeline.from_pretrained(tmp_path)
    found = {"num_inference_steps": 2, "timesteps": [18, 4], "augmentation_level": 4, "scheduler": "ancestral"}
    rows = summarise([line((3.0, 4.0), 2, **found)], "super_res_1", [0], "train")
    write_best(rows, pipeline, "super_res_1", tmp_path, {"select": "distance"}, "fast")
    changed = CascadedDiffusionPipeline.from_pretrained(tmp_path)
    assert changed.stage_options() == pipeline.stage_options()
    assert changed.config.settings["fast"] == {
        "num_inference_steps": {"base": 2, "super_res_1": 2},
        "augmentation_levels": {"super_res_1": 4},
        "timesteps": {"super_res_1": [18, 4]},
    }
    assert json.loads((tmp_path / "search-super_res_1-fast.json").read_text())["select"] == "distance"
    other = summarise([line((3.0, 4.0), 2, **{**found, "scheduler": "unipc"})], "super_res_1", [0], "train")
    with pytest.raises(ValueError, match=r"`write_as` is 'fast', but the best setting has another solver .*'unipc'"):
        write_best(other, pipeline, "super_res_1", tmp_path, {}, "fast")


# Time steps


def test_time_steps_are_searched_stored_and_used(folders, tmp_path):
    shutil.copytree(folders / "cascade", tmp_path / "cascade")
    options = {"pipeline": str(tmp_path / "cascade"), "schedulers": ["ddim"], "num_inference_steps": [3]}
    options |= {"timesteps": ["even", "gits"], "real_inputs": True}
    rows = search(config_for(folders, tmp_path / "out", **options))
    found = [row["setting"].get("timesteps") for row in rows]
    assert [times is None for times in found] == [True, False, True] and len(found[1]) == 3
    stored = json.loads((tmp_path / "out" / "timesteps.json").read_text())
    assert list(stored.values()) == [found[1]]
    with mock.patch.object(search_module, "follow") as follow:  # nothing is left to do
        assert search(config_for(folders, tmp_path / "out", **options)) == rows
    assert not follow.called

    best = [row | {"is_best": row is rows[1]} for row in rows]
    pipeline = CascadedDiffusionPipeline.from_pretrained(tmp_path / "cascade")
    write_best(best, pipeline, "super_res_1", tmp_path / "cascade", {})
    changed = CascadedDiffusionPipeline.from_pretrained(tmp_path / "cascade")
    assert changed.stage_options()["timesteps"] == {"super_res_1": found[1]}
    assert changed.stage_options()["num_inference_steps"]["super_res_1"] == 3
    own = resolved([Setting(augmentation_level=1), Setting(num_inference_steps=5)], changed, "super_res_1")
    assert [one.timesteps for one in own] == [found[1], None]


def test_time_steps_of_a_base(folders, tmp_path):
    options = {"stage": "base", "measured_stage": "super_res_1", "grid": json.dumps({"timesteps": ["gits", [15, 2]]})}
    rows = search(config_for(folders, tmp_path, **options))
    assert [len(row["setting"]["timesteps"]) for row in rows] == [3, 2]
    assert [row["evaluations"]["base"] for row in rows] == [3, 2]
