"""Experiments: what they train and sample, the paper's figures beside them, and a study from nothing to its table."""

import copy
import json
import math
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from test_files import holder

from cdm_diffusers import CascadedDiffusionPipeline, get_preset
from cdm_diffusers.commands.main import main
from cdm_diffusers.conditioning_augmentation import gaussian_blur
from cdm_diffusers.data.image_sets import load_image_set
from cdm_diffusers.evaluation import paired
from cdm_diffusers.evaluation.classifier import ClassifierConfig, build_classifier, fit_classifier
from cdm_diffusers.evaluation.evaluate import evaluate
from cdm_diffusers.evaluation.records import digest
from cdm_diffusers.evaluation.sample_store import LowResImages
from cdm_diffusers.studies import augmentation, verdicts
from cdm_diffusers.studies import reproduce as module
from cdm_diffusers.studies.config import ReproduceConfig, StudySettings, read_settings
from cdm_diffusers.studies.experiments import (
    EXPERIMENTS,
    FEW_STEPS,
    GOOD,
    TRAIN,
    VALIDATION,
    WEAK,
    Experiment,
    StageRecipe,
    check_heading,
    control_heading,
    figure7,
    table1,
    table3a,
    table4a,
)
from cdm_diffusers.studies.figures import explained_cells
from cdm_diffusers.studies.reports import classification_lines, comparison_lines, over_runs, write_table
from cdm_diffusers.studies.reproduce import Study, reproduce
from cdm_diffusers.training.export import pipeline_of
from cdm_diffusers.training.stage import build_stage


CONFIGS = {
    "fashion_mnist": set(EXPERIMENTS) - {"augmentation"},
    "imagenet": set(EXPERIMENTS) - {"augmentation", "table5"},
    "lsun_bedroom": {"table5"},
    "lsun_church": {"table5"},
}
TINY = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4, "train_batch_size": 4}
GREY = {"num_channels": 1}
TINY |= {"source_resolution": 16, "padding": 0, "attention_resolutions": [0]}
STEPS = {"base": 2, "super_res_1": 2}


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    """A data set of two classes, a classifier to measure with, and a configuration for both."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for low, name in ((0, "dark"), (128, "bright")):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(14):
                pixels = rng.integers(low, low + 128, (16, 16), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{index}.png")
    options = ClassifierConfig(
        output_dir="", train_data_dir="", image_size=16, num_channels=1, padding=0, num_train_epochs=1
    )
    torch.manual_seed(0)
    build_classifier(options, {0: "bright", 1: "dark"}).model.save_pretrained(folder / "classifier")
    write_config(folder)
    return folder


def write_config(folder, **changes):
    cascade = {"base": "base", "super_res": "up", "num_inference_steps": STEPS}
    last = {"before": ["base", "half"], "super_res": "last", "num_inference_steps": {**STEPS, "super_res_2": 2}}
    last |= {"augmentation_levels": {"super_res_1": 5}}
    content = {
        "name": "tiny",
        "data": {"train_data_dir": str(folder / "data")},
        "training": {"seeds": [0], "max_train_steps": 2, "learning_rate": 0.05, "lr_warmup_steps": 0, **GREY},
        "sampling": {"num_images": 20, "seeds": [0, 1], "batch_size": 10},
        "evaluation": {
            "extractor": str(folder / "classifier"),
            "source_resolution": 16,
            "num_channels": 1,
            "cache_dir": str(folder / "cache"),
        },
        "classification": {"num_seeds": 1, "num_train_epochs": 1, "train_batch_size": 10},
        "stages": {
            "base": {"preset": "fashion_mnist_8", "options": {**TINY, "sample_size": 4, "label_dropout": 0.0}},
            "plain": {"preset": "fashion_mnist_32", "options": {**TINY, "sample_size": 16}},
            "up": {"preset": "fashion_mnist_8_to_32", "options": {**TINY, "sample_size": 16, "low_res_size": 4}},
            "half": {"preset": "fashion_mnist_8_to_16", "options": {**TINY, "sample_size": 8, "low_res_size": 4}},
            "last": {"preset": "fashion_mnist_16_to_32", "options": {**TINY, "sample_size": 16, "low_res_size": 8}},
        },
        "experiments": {
            "table2a": {"base": "plain", "num_inference_steps": {"base": 2}},
            "table2b": {"no_cascading": "plain", **cascade, "levels": [0, 101]},
            "table3a": {**cascade, "levels": [251, 4000]},
            "table3b": {**cascade, "levels": [0, 4000]},
            "table4a": last,
            "table4b": {**last, "batch_sizes": [4, 8]},
            "figure9": {"no_cascading": "plain", **cascade, "levels": [0, 101]},
            "figure10": {**last, "steps": [1, 4], "end_points": {"1": [0.001, 0.999]}},
            "augmentation": {
                **{"good": ["base"], "weak": ["base"], "super_res": ["up"], "num_inference_steps": STEPS},
                **{"weak_num_inference_steps": {"base": 1}, "scheduler": {"super_res_1": "unipc"}},
                **{"levels": [0, 500, 4000], "control_levels": [0, 500, 4000], "validation_levels": [500]},
                **{"gate": 0.0, "check_steps": 4, "few_steps": 1, "control_noises": [0.2, 0.7]},
            },
        },
    }
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def run(folder, name, **options):
    arguments = {"config": str(folder / "config.json"), "output_dir": str(folder / "study"), **options}
    return reproduce(ReproduceConfig(name=name, **arguments))


def settings_of(folder, name="table2a", **options) -> StudySettings:
    return read_settings(ReproduceConfig(name=name, config=str(folder / "config.json"), output_dir="x", **options))


def test_a_second_experiment_in_the_same_folder_is_refused(study_folder, tmp_path, monkeypatch):
    """Others of the same folder share stages and samples with it, one after another."""
    monkeypatch.setattr(Study, "check", lambda study, name, experiment: pytest.fail("began"))
    with (
        holder(tmp_path) as (process, _),
        pytest.raises(ValueError, match=f"is in use .* by process {process.pid} on"),
    ):
        run(study_folder, "table2a", output_dir=str(tmp_path))


# What is compared


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_have_every_experiment(name):
    """With stages that exist, of the right kinds, and every figure of the paper at its place."""
    file = f"configs/{name}.json"
    assert set(json.loads(Path(file).read_text())["experiments"]) == CONFIGS[name]
    for experiment_name in CONFIGS[name]:
        settings = read_settings(ReproduceConfig(name=experiment_name, config=file, output_dir="x"))
        experiment = settings.experiment(experiment_name)
        for row in experiment.rows:
            assert len(row.paper) in (0, len(experiment.paper_columns))
            for place, recipe in enumerate(row.arm.stages):
                source = settings.stages[recipe.name]
                if source.is_given:
                    assert (source.stage == "base") == (place == 0)
                else:
                    preset = get_preset(source.preset)
                    assert (preset.unet.low_res_size is None) == (place == 0)
                    assert preset.data.source_resolution == settings.evaluation.source_resolution


def test_table_3a_asks_for_what_the_paper_compared():
    rows = table3a("a", "b").rows
    assert len(rows) == 13
    assert rows[0].paper == ("1.71", "2.46", "61.34 ± 1.58") and rows[0].x == 0
    truncated = [row for row in rows if row.arm.sampling["truncated"]]
    assert [row.x for row in truncated] == [251, 501, 751, 1001, 1251, 1501]
    assert truncated[1].paper == ("1.48", "2.48", "67.95 ± 1.97")
    assert all(row.arm.sampling["augmentation_levels"] == {"super_res_1": row.x} for row in rows)


def test_few_steps_have_end_points_or_are_refused_before_anything_is_trained(tmp_path):
    """Each schedule of configs/imagenet.json begins and ends at the noise of the scaled one of 100 steps."""
    content = json.loads(Path("configs/imagenet.json").read_text())
    section = content["experiments"]["figure10"]

    def check():
        (tmp_path / "config.json").write_text(json.dumps(content))
        settings = settings_of(tmp_path, "figure10")
        study, experiment = Study(settings, tmp_path), settings.experiment("figure10")
        study.check("figure10", experiment)
        return study.stages, experiment.rows

    stages, rows = check()
    for row in [row for row in rows if row.x <= 100]:
        cascade = stages.without_weights(row.arm.stages)
        scheduler = cascade.with_schedulers(None, row.arm.sampling.get("inference_schedules")).super_res_2_scheduler
        scheduler.set_timesteps(int(row.x))
        alphas_cumprod = scheduler.inference_table.alphas_cumprod
        assert 1 - alphas_cumprod[0].item() == pytest.approx(1e-3)
        assert alphas_cumprod[-1].item() == pytest.approx(2.04e-5, rel=0.1)
    assert stages.evaluations(rows[0].arm) == {"base": 4000, "super_res_1": 4000, "super_res_2": 4}
    del section["end_points"]["8"]
    with pytest.raises(
        ValueError,
        match=r"`experiments.figure10`, row '8 steps' \(see `steps` and `end_points`\): Stage `super_res_2`",
    ):
        check()
    section["end_points"] |= {"8": [0.5, 0.2]}
    with pytest.raises(ValueError, match=r"row '8 steps'.*is \[0.5, 0.2\]; .*0 < beta_start < beta_end < 1"):
        check()
    section["end_points"] |= {"8": [0.1, 0.2], "9": [0.1, 0.2]}
    with pytest.raises(ValueError, match=r"`end_points` has \['9'\]; they must be among `steps`"):
        check()


def test_the_baseline_of_table_2b_is_that_of_the_papers_figure():
    """2.35 is Table 2a's with more sampling steps: in Table 2b and Figure 9 the same samples as there, once."""
    file, samples = "configs/imagenet.json", []
    for name, place in (("table2a", 1), ("table2b", 0), ("figure9", 0)):
        settings = read_settings(ReproduceConfig(name=name, config=file, output_dir="x"))
        row = settings.experiment(name).rows[place]
        assert row.paper == ("2.35", "2.91", "52.72 ± 1.15")
        assert row.arm.sampling == {"num_inference_steps": {"base": 4000}, "restart_timestep": 2000}
        samples.append(row.arm)
        cascades = settings.experiment(name).rows[1:]
        assert name == "table2a" or all("restart_timestep" not in row.arm.sampling for row in cascades)
    assert samples[0] == samples[1] == samples[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_are_trained_and_sampled_in_float32(name):
    """As docs/presets.md says of all presets: the paper names no other precision."""
    content = json.loads(Path(f"configs/{name}.json").read_text())
    assert "| Precision | all | float32 |" in Path("docs/presets.md").read_text()
    for experiment in content["experiments"]:
        settings = read_settings(ReproduceConfig(name=experiment, config=f"configs/{name}.json", output_dir="x"))
        stages = Study(settings, Path("x")).stages
        trained = [stage for stage, source in settings.stages.items() if not source.is_given]
        precisions = {stages.training(StageRecipe(stage), 0)[1].training.mixed_precision for stage in trained}
        assert precisions == {"no"} and settings.sampling.dtype == "float32"


def test_table_1_has_128_pixels_too():
    """As a cascade of its own with the same two stages before it; with its classification accuracy score."""
    settings = read_settings(ReproduceConfig(name="table1", config="configs/imagenet.json", output_dir="x"))
    rows = settings.experiment("table1").rows
    assert [row.paper[0] for row in rows] == ["1.11", "1.48", "3.52", "4.88"]
    assert [row.arm.stages[-1].name for row in rows[2:]] == ["imagenet_64_to_128", "imagenet_64_to_256"]
    assert rows[2].arm.stages[:-1] == rows[3].arm.stages[:-1] and len(rows[2].arm.stages) == 3
    assert [row.paper_accuracies and row.paper_accuracies["samples"][0] for row in rows] == [
        *(None, None, "59.84%", "63.02%")
    ]


def test_64_pixels_of_table_1_are_those_of_the_papers_row():
    """1.48, 2.48 and 67.95 are Table 3a's truncated s = 501: the same samples as there. Later rows' are not."""
    main_results, sweep = (
        read_settings(ReproduceConfig(name=name, config="configs/imagenet.json", output_dir="x")).experiment(name)
        for name in ("table1", "table3a")
    )
    row = main_results.rows[1]
    assert [(row.paper, row.arm)] == [(one.paper, one.arm) for one in sweep.rows if one.paper == row.paper][:1]
    assert row.arm.sampling["truncated"] and row.arm.sampling["augmentation_levels"] == {"super_res_1": 501}
    levels = [one.arm.sampling["augmentation_levels"] for one in main_results.rows]
    assert levels[0] == {} and levels[2] == levels[3] == {"super_res_1": 751}
    assert not any("truncated" in one.arm.sampling for one in main_results.rows if one is not row)
    with pytest.raises(ValueError, match=r"`truncated_levels` has \['base'\]; they must be among \['super_res_1'\]"):
        table1(["a", "b"], truncated_levels={"base": 9})
    for table in (table1, figure7):
        with pytest.raises(
            ValueError, match=r"`num_inference_steps` has \['super_res1'\]; they must be among \['base'"
        ):
            table(["a", "b"], num_inference_steps={"base": 4, "super_res1": 50})


def test_table_1_claims_only_what_the_paper_has():
    """No accuracy of another size, and no 128x128 where the last stage is not that of 256x256."""
    rows = table1(["a", "b"], instead_of_last="c").rows
    assert [(row.label, row.paper_accuracies) for row in rows] == [
        ("base (paper: 32x32)", None),
        ("super_res_1", {}),
        ("super_res_1 (paper: 64x64)", {}),
    ]


def test_table_4a_trains_as_the_papers_row_was():
    """6.18 is Table 4b's baseline too: no classes, small batches, no flips. Elsewhere as the stage says."""
    plain = read_settings(ReproduceConfig(name="table4b", config="configs/imagenet.json", output_dir="x"))
    baseline = plain.experiment("table4b").rows[0]
    settings = read_settings(ReproduceConfig(name="table4a", config="configs/imagenet.json", output_dir="x"))
    rows, stages = settings.experiment("table4a").rows, Study(settings, Path("x")).stages
    assert rows[1].paper == baseline.paper
    of_row, of_baseline = (stages.training(row.arm.stages[-1], 0)[1] for row in (rows[1], baseline))
    assert of_row == of_baseline and of_row.unet.num_classes is None and of_row.training.train_batch_size == 256
    assert all(baseline.arm.stages[-1].options.items() <= row.arm.stages[-1].options.items() for row in rows)
    assert table4a(["a"], "b").rows[0].arm.stages[-1].options == {"conditioning_augmentation": "none"}


def test_a_mean_and_its_interval():
    figures = [{"value": value, "interval": [0, 9]} for value in (1.0, 2.0, 4.5)]
    runs = [{"training_seed": 0}] * 3
    assert over_runs(runs[:1], figures[:1]) == {"mean": 1.0, "interval": [0, 9], "runs": 1}
    result = over_runs(runs, figures)
    deviation = math.sqrt(((1 - 2.5) ** 2 + (2 - 2.5) ** 2 + (4.5 - 2.5) ** 2) / 2)
    half = 4.302653 * deviation / math.sqrt(3)
    assert result["mean"] == 2.5
    assert result["interval"] == pytest.approx([2.5 - half, 2.5 + half], rel=1e-5)


def test_the_interval_of_equal_values_is_a_point():
    figures = [{"value": 2.0, "interval": [0, 9]}] * 3
    assert over_runs([{"training_seed": 0}] * 3, figures)["interval"] == [2.0, 2.0]


def test_samplings_of_one_training_are_not_further_trainings():
    figures = [{"value": value, "interval": [0, 9]} for value in (1.0, 2.0, 5.0, 6.0)]
    result = over_runs([{"training_seed": seed} for seed in (0, 0, 1, 1)], figures)
    half = 12.706205 * 2  # of the two trainings' means, 1.5 and 5.5: deviation 4 / sqrt(2), over sqrt(2)
    assert result["interval"] == pytest.approx([3.5 - half, 3.5 + half], rel=1e-5) and result["runs"] == 4


def test_real_images_stand_below_rows_of_their_size(tmp_path):
    """Stages differ in their images' size: what real images reach at 8x8 says nothing about samples at 32x32."""

    def row(label, value, real):
        figure = {"value": value, "interval": [value - 1, value + 1], "real": {"value": real}}
        splits = {split: {"frechet_distance": figure} for split in ("train", "test")}
        one = {"training_seed": 0, "distance": "Frechet distance", "extractor": "x", "figures": splits}
        return {"heading": "", "label": label, "x": None, "paper": ("1",), "runs": [one]}

    rows = [row("8x8", 4.0, 2.0), row("8x8 again", 5.0, 2.0), row("32x32", 70.0, 20.0)]
    report = {"name": "sizes", "settings": {"sampling": {"seeds": [0], "num_images": 9}}, "rows": rows}
    write_table(report, Experiment("Sizes", ()), tmp_path)
    table = (tmp_path / "sizes.md").read_text().splitlines()[4:9]
    assert [[cell.strip() for cell in line.split("|")[1:3]] for line in table] == [
        ["8x8", "4 (3 to 5)"],
        ["8x8 again", "5 (4 to 6)"],
        ["real images", "2"],
        ["32x32", "70 (69 to 71)"],
        ["real images", "20"],
    ]


def test_accuracies_of_several_samplings_are_averaged():
    def report(samples, real=None):
        figure = {"num_train_images": 9, "top_5": {"mean": 1.0, "standard_error": 0.0}}
        accuracies = {"samples": {**figure, "top_1": {"mean": samples, "standard_error": 0.01}}}
        if real is None:
            return {"accuracies": accuracies}
        accuracies["real"] = {**figure, "top_1": {"mean": real, "standard_error": 0.02}}
        return {
            "accuracies": accuracies,
            "compared_with": "real",
            "classes_where_samples_beat_real": 1,
            "num_classes": 3,
        }

    lines = classification_lines([report(0.2, 0.5), report(0.3)], {"real": ("73.09%", "91.47%")}).splitlines()
    assert lines[2:] == [
        "| samples | 9 | 25.00% ± 5.00% | 100.00% ± 0.00% |  |  |",
        "| real | 9 | 50.00% ± 2.00% | 100.00% ± 0.00% | 73.09% | 91.47% |",
        "",
        "50.0% of the top-1 accuracy of 'real'; better than it on 1 of 3 classes.",
    ]
    assert "| 20.00% ± 1.00% |" in classification_lines([report(0.2)], {})


# What would be made


def stand_ins(folder, content):
    """A configuration whose stages in runs/ are not trained yet, with untrained ones in their places."""
    presets = {"good_base": "fashion_mnist_8", "weak_base": "fashion_mnist_8"}
    names = [name for name, source in content["stages"].items() if source.get("pipeline", "").startswith("runs/")]
    for name in names:
        stage = build_stage(get_preset(presets.get(name, "fashion_mnist_8_to_32")))
        part = pipeline_of(stage.unet, stage, get_preset(presets.get(name, "fashion_mnist_8_to_32")), None)
        part.save_pretrained(folder / name)
    return content | {"stages": content["stages"] | {name: {"pipeline": str(folder / name)} for name in names}}


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.json")), ids=lambda file: file.stem)
def test_every_configuration_can_be_run_dry(file, tmp_path, monkeypatch, capsys):
    """Every row of every experiment, without data, extractor or training."""
    for name in ("open_split", "load_extractor", "train"):
        monkeypatch.setattr(
            module, name, lambda *arguments, **options: pytest.fail("needs more than the configuration")
        )
    content = json.loads(file.read_text())
    if any(stage.get("pipeline", "").startswith("runs/") for stage in content["stages"].values()):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(stand_ins(tmp_path, content)))
    main(["reproduce", "all", "--config", str(file), "--dry-run"])
    text = capsys.readouterr().out
    assert (
        all(f"| {name} | trainings |" in text for name in content["experiments"])
        and "30% of 495 TFLOPS (float32)" in text
    )
    assert [path.name for path in tmp_path.iterdir() if path.name not in content["stages"]] in ([], ["config.json"])


def test_a_plan_counts_what_is_shared_once(capsys):
    """Trainings and samples of Table 1 are those of Figure 7 too; hours are those of multiply-adds."""

    def plan(name, *options):
        main(["reproduce", name, "--config", "configs/imagenet.json", "--dry-run", "--json", *options])
        return json.loads(capsys.readouterr().out)

    alone, shared = plan("figure7"), plan("table1")
    assert alone["trainings"].keys() < shared["trainings"].keys() and len(shared["trainings"]) == 4  # 128x128
    assert alone["samples"].keys() < shared["samples"].keys()
    base = next(one for one in alone["trainings"].values() if one["stage"] == "imagenet_32")
    assert base["parameters"] == 792_251_910 and base["images"] == 700_000 * 2048
    hours = 3 * 2 * 70.886e9 * base["images"] / (495e12 * 0.3) / 3600  # multiply-adds of docs/presets.md
    assert base["gpu_hours"] == pytest.approx(hours, rel=1e-4)
    assert base["bytes"] == 20 * base["parameters"]
    (row,) = alone["experiments"]["figure7"]["rows"]
    last, learned = (alone["samples"][row["samples"][place]] for place in (1, 3))
    assert last["evaluations"] == {"super_res_2": 100} and last["bytes"] == 50_000 * 3 * 256**2
    assert last["gpu_hours"] == pytest.approx(2 * 100 * 879.579e9 * 50_000 / (495e12 * 0.3) / 3600, rel=1e-4)
    assert learned["images"] == row["classifier_images"] == 1_281_167
    total = sum(one["gpu_hours"] for one in alone["trainings"].values())
    assert alone["total"]["trainings"]["gpu_hours"] == pytest.approx(total)
    half = plan("figure7", "--gpu_tflops", "312", "--utilisation", "0.15")
    assert half["total"]["samples"]["gpu_hours"] == pytest.approx(
        alone["total"]["samples"]["gpu_hours"] * 2 * 495 / 312
    )


def test_options_that_change_nothing_train_nothing_anew(tmp_path):
    """The last row of Table 4b is the preset; its first is the second of Table 4a."""
    rows = {}
    for name in ("table1", "table4a", "table4b"):
        settings = read_settings(ReproduceConfig(name=name, config="configs/imagenet.json", output_dir="x"))
        stages = Study(settings, tmp_path).stages
        rows[name] = [row.arm.stages[-1] for row in settings.experiment(name).rows]
    preset, (baseline, *_, flipped) = StageRecipe("imagenet_64_to_256"), rows["table4b"]
    assert preset in rows["table1"] and flipped.options and stages.plainest(flipped) == preset
    assert stages.key(rows["table4a"][1], 0) == stages.key(baseline, 0) != stages.key(rows["table4a"][2], 0)
    keys = {json.dumps(stages.key(recipe, 0), sort_keys=True) for recipe in (*rows["table4a"], *rows["table4b"])}
    assert len(keys) == 6 + 3  # one of the eight rows of Table 4a blurs the samples of another

    plain = stages.folder_of(flipped, 0)
    key = {**stages.key(flipped, 0), "options": stages.training_options(flipped)}
    earlier = tmp_path / "stages" / f"imagenet_64_to_256-{digest(key)}"
    earlier.mkdir(parents=True)
    assert plain != earlier == stages.folder_of(flipped, 0)


def test_the_stages_before_figure_10s_last_one_sample_as_in_other_tables(capsys):
    """All its rows share one set of 64x64 samples, which is that of Table 4b."""
    main(["reproduce", "figure10", "--config", "configs/imagenet.json", "--dry_run", "--json"])
    samples = json.loads(capsys.readouterr().out)["samples"].values()
    assert len(samples) == 9 and sum(one["images"] for one in samples) == 450_000
    keys = set()
    for name in ("figure10", "table4b"):
        settings = read_settings(ReproduceConfig(name=name, config="configs/imagenet.json", output_dir="x"))
        keys |= {json.dumps(row.arm.low_res_key([]), sort_keys=True) for row in settings.experiment(name).rows}
    assert len(keys) == 1


def test_all_experiments_one_after_another(study_folder, monkeypatch):
    monkeypatch.setattr(module, "reproduce_one", lambda config: config.output_dir + config.name)
    names = json.loads((study_folder / "config.json").read_text())["experiments"]
    options = {"output_dir": "x-", "sampling_seeds": [0]}
    assert run(study_folder, "all", **options) == {name: f"x-{name}" for name in names}
    with pytest.raises(ValueError, match="`output_dir` is missing; it may be left out only with `dry_run`"):
        run(study_folder, "all", output_dir=None)
    with configured(study_folder) as content:
        content["experiments"]["figure10"]["before"] = ["base", "none"]
        (study_folder / "config.json").write_text(json.dumps(content))
        monkeypatch.setattr(module, "reproduce_one", lambda config: pytest.fail("began before all were checked"))
        with pytest.raises(ValueError, match=r"`experiments.figure10` has the stage 'none'; it must be one of"):
            run(study_folder, "all", **options)


@pytest.mark.parametrize(("name", "value"), [("json", True), ("gpu_tflops", 312.0), ("utilisation", 0.3)])
def test_options_of_a_dry_run_are_refused_without_it(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}, but it only applies to a `dry_run`: leave it out"):
        ReproduceConfig(name="all", config="x", output_dir="x", **{name: value})


# From nothing to a table


def test_table_3a_from_nothing_and_again(study_folder, monkeypatch):
    report = run(study_folder, "table3a")
    folder = study_folder / "study"
    assert [row["label"] for row in report["rows"]] == ["s = 0", "s = 251", "s = 4000", "s = 251", "s = 4000"]
    assert [run["sampling_seed"] for run in report["rows"][0]["runs"]] == [0, 1]
    assert len(list((folder / "stages").iterdir())) == 2
    # z_0 of two seeds, three non-truncated rows and two truncated ones of two seeds each
    assert len(list((folder / "samples").iterdir())) == 2 + 2 * 5
    text = (folder / "table3a.md").read_text()
    assert "| *truncated conditioning augmentation* |" in text and "1.71" in text and "2 sampling seeds" in text
    assert len(text.splitlines()[2].split("|")) == len(text.splitlines()[-3].split("|")) == 9
    assert Image.open(folder / "table3a.png").size[0] > 500

    plan = run(study_folder, "table3a", dry_run=True)
    assert len(plan["trainings"]) == 2 and len(plan["samples"]) == 2 + 2 * 5
    for planned, row in zip(plan["experiments"]["table3a"]["rows"], report["rows"], strict=True):
        (of_own_set,) = {
            json.dumps(json.loads((folder / "samples" / one["samples"] / "results.json").read_text())["evaluations"])
            for one in row["runs"]
        }
        assert json.loads(of_own_set) == plan["samples"][planned["samples"][-1]]["evaluations"]
        assert (planned["sets"], planned["images"]) == (2, 20)
    for training in plan["trainings"].values():
        (stage,) = (folder / "stages").glob(f"{training['stage']}-*")
        files = [path for path in stage.rglob("*") if path.suffix in (".safetensors", ".bin")]
        assert training["bytes"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.5)
        weights = load_file(next(path for path in files if path.name == "ema.safetensors"))
        parameters = sum(tensor.numel() for tensor in weights.values())
        assert training["parameters"] == pytest.approx(parameters, rel=0.1)  # the preset has ten classes, not two
        assert (training["steps"], training["batch_size"], training["images"]) == (2, 4, 8)

    values = [[run["figures"]["train"]["frechet_distance"]["value"] for run in row["runs"]] for row in report["rows"]]
    assert len({value for row in values for value in row}) == 10  # no two settings or seeds give the same samples

    def fail(*arguments, **options):
        raise AssertionError("made again what is there")

    monkeypatch.setattr(module, "train", fail)
    monkeypatch.setattr(module, "evaluate", fail)
    again = run(study_folder, "table3a")
    assert again["rows"] == json.loads(json.dumps(report["rows"]))
    with pytest.raises(AssertionError, match="made again"):
        run(study_folder, "table3a", max_train_steps=3)


def test_ground_truth_and_blur(study_folder, tmp_path):
    """The last stage takes area averages of the split's images with their labels, or the same blurred."""
    settings = settings_of(study_folder, "table3b")
    samples = Study(settings, tmp_path).samples
    arm = settings.experiment("table3b").rows[0].arm
    folder = samples.low_res(arm, ["base", "super_res_1"], 0, 0)
    low_res = LowResImages(folder, "base")
    images, labels = low_res[torch.arange(20)], low_res.labels
    assert ((images.mean((1, 2, 3)) > 0.5) == (labels == 0)).all() and 0 < labels.sum() < 20
    averages = []
    for file in (study_folder / "data" / "train").rglob("*.png"):
        pixels = np.asarray(Image.open(file), dtype=np.float64) / 255
        averages.append(torch.from_numpy(pixels.reshape(4, 4, 4, 4).mean((1, 3))))
    distances = torch.cdist(images.flatten(1).double(), torch.stack(averages).flatten(1))
    assert distances.min(1).values.max() < 1e-5 and len(distances.argmin(1).unique()) == 20

    blurred = LowResImages(samples.blurred(folder, "base", 0.5), "base")
    assert torch.equal(blurred[torch.arange(20)], gaussian_blur(images, torch.full((20,), 0.5)))
    assert torch.equal(blurred.labels, labels)


def test_training_options_make_other_stages(study_folder):
    """Table 2b's networks for one s each, and what they share with other experiments."""
    report = run(study_folder, "table2b", sampling_seeds=[0])
    assert [row["label"] for row in report["rows"]] == ["no cascading", "s = 0", "s = 101"]
    configs = [
        json.loads(file.read_text()) for file in (study_folder / "study" / "stages").glob("up-*/training_config.json")
    ]
    assert {0, 101} <= {config["augmentation"]["level"] for config in configs}
    picture = run(study_folder, "figure9", sampling_seeds=[0])
    assert [row["runs"][0]["samples"] for row in picture["rows"]] == [
        row["runs"][0]["samples"] for row in report["rows"]
    ]
    assert Image.open(study_folder / "study" / "figure9.png").size == (16 * 64, 3 * 64)


def test_augmentation_from_nothing_and_again(study_folder, monkeypatch):
    """Two trainings, six inputs, a check of the solver; and what is there is not made again."""
    monkeypatch.setattr(verdicts, "NUM_REPLICATES", 20)
    monkeypatch.setattr(augmentation, "IMAGES_PER_FEATURE", 0)
    monkeypatch.setattr(paired, "NUM_ORDERS", 1)
    options = {"sampling_seeds": [0], "training_seeds": [0, 1], "num_images": 24}
    report = run(study_folder, "augmentation", **options)
    folder = study_folder / "study"
    rows = {}
    for row in report["rows"]:
        rows.setdefault(row["heading"], []).append(row["label"])
        assert len(row["runs"]) == 2
    swept = ["s = 0", "s = 500", "s = 4000"]
    control = report["control"]["noise"]
    assert rows == {
        **dict.fromkeys((GOOD, WEAK, FEW_STEPS, TRAIN), swept),
        VALIDATION: ["s = 500"],
        **{control_heading(noise): swept if noise == control else swept[:1] for noise in (0.2, 0.7)},
        **{check_heading(of): [f"s = {s}, 4 ancestral steps" for s in (0, 500)] for of in (WEAK, TRAIN)},
    }
    assert [one["input"] for one in report["comparisons"]] == [WEAK, FEW_STEPS, GOOD, control_heading(control)]
    assert all(np.shape(one["baselines"][0]["chosen"]) == (2, 2) for one in report["comparisons"])
    assert report["solver_check"]["num_images"] == 24
    weak, truth = (
        np.mean([run["figures"]["train"]["frechet_distance"]["value"] for run in report["rows"][place]["runs"]])
        for place in (3, 9)
    )
    assert (report["gate"]["weak"], report["gate"]["ground_truth"]) == pytest.approx((weak, truth))
    # All rows share what they start from, but for the input: one set of low-resolution samples for each base.
    samples = [json.loads((folder / "samples" / one["samples"] / "settings.json").read_text())
               for row in report["rows"] for one in row["runs"]]  # fmt: skip
    assert len({json.dumps(one["low_res"]) for one in samples}) == 2 * 2 + 4
    assert {one["seed"] for one in samples} == {0}
    text = (folder / "augmentation.md").read_text()
    assert "| *weak base* |" in text and "change beyond ground truth's" in text and "gate: 0" in text
    assert "24 images, by the sweep's solver and by the check's: change" in text and "swept: 0." in text
    unchecked = {name: value for name, value in report.items() if name != "solver_check"}
    assert "by the check's" not in comparison_lines(unchecked)
    assert Image.open(folder / "augmentation.png").size[0] > 500
    assert_explained(np.asarray(Image.open(folder / "augmentation_samples.png").convert("RGB")), report, folder)

    def fail(*arguments, **options):
        raise AssertionError("made again what is there")

    monkeypatch.setattr(module, "train", fail)
    monkeypatch.setattr("cdm_diffusers.evaluation.features.extract", fail)
    again = run(study_folder, "augmentation", **options)
    assert again["rows"] == json.loads(json.dumps(report["rows"])) and again["comparisons"] == report["comparisons"]


def assert_explained(picture, report, folder):
    """The picture's cells are what the stage gets, and what it makes of it."""
    samples = report["rows"][3]["runs"][0]["samples"]
    given, made = explained_cells(folder, report["inputs"][WEAK], [samples])
    images, low_res = load_image_set(folder / "samples" / samples), LowResImages(folder / report["inputs"][WEAK])
    settings = json.loads((folder / "samples" / samples / "settings.json").read_text())
    assert settings["low_res"]["of"] == low_res.settings
    factor = given.shape[-1] // low_res.images.shape[-1]
    assert factor > 1 and torch.equal(given[:, :, ::factor, ::factor], low_res[torch.arange(10)])
    assert all(torch.equal((255 * made[place]).round().byte(), images[place]["image"]) for place in range(10))
    assert picture.shape[1] > 1000


def test_augmentation_of_a_base_without_an_error_is_not_swept(study_folder, monkeypatch):
    """The gate's rows are sampled, and no other; and what the settings forbid is refused before that."""
    monkeypatch.setattr(augmentation, "IMAGES_PER_FEATURE", 0)
    with configured(study_folder) as content:
        content["experiments"]["augmentation"] |= {"gate": 1000.0, "control_noises": [0.3]}
        (study_folder / "config.json").write_text(json.dumps(content))
        before = {path.name for path in (study_folder / "study" / "low_res").glob("*")}
        with pytest.raises(ValueError, match=r"times that on real training images.* must be at least 1000 times"):
            run(study_folder, "augmentation", sampling_seeds=[0], num_images=25)
        made = [
            json.loads((path / "settings.json").read_text()) for path in (study_folder / "study" / "samples").iterdir()
        ]
        swept = [one for one in made if one["num_images"] == 25 and "super_res_1" in one["stages"]]
        assert [one["options"]["augmentation_levels"] for one in swept] == [{"super_res_1": 0}] * 2
        assert len({path.name for path in (study_folder / "study" / "low_res").glob("*")} - before) == 1
        with pytest.raises(ValueError, match=r"`sampling.seeds` is \[0, 1\]; it must be one seed here"):
            run(study_folder, "augmentation", sampling_seeds=[0, 1])
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"`num_images` is 25; it must be at least \d+, so that either half"):
            run(study_folder, "augmentation", sampling_seeds=[0], num_images=25)
        content["stages"]["again"] = content["stages"]["up"]
        content["experiments"]["augmentation"]["super_res"] = ["up", "again"]
        (study_folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"The trainings 'up, seed 0' and 'again, seed 0' .* are the same"):
            run(study_folder, "augmentation", sampling_seeds=[0])
        content["evaluation"] |= {"num_reference_images": 20, "seed": 1}
        (study_folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=r"`evaluation` has \['num_reference_images', 'seed'\]; they must be left"
        ):
            run(study_folder, "augmentation", sampling_seeds=[0])


def test_noise_of_the_positive_control(study_folder, tmp_path):
    settings = settings_of(study_folder, "augmentation")
    samples, experiment = Study(settings, tmp_path).samples, settings.experiment("augmentation")
    arm = next(row.arm for row in experiment.rows if row.heading == control_heading(0.2))
    noised = LowResImages(samples.low_res(arm, ["base", "super_res_1"], 0, 0), "base")
    clean = LowResImages(samples.ground_truth(arm, "base"), "base")
    every = torch.arange(20)
    difference = 2 * (noised[every] - clean[every])
    inside = (noised[every] > 0) & (noised[every] < 1)
    assert difference[inside].std().item() == pytest.approx(0.2, rel=0.15) and inside.float().mean() > 0.8
    assert torch.equal(noised.labels, clean.labels) and torch.equal(clean.labels, every % 2)


def test_a_given_stage_is_a_trainings_folder(study_folder):
    """As `cdm train` leaves it, base or super-resolution: no name of its stage is needed."""
    run(study_folder, "table2b", sampling_seeds=[0])
    up = next((study_folder / "study" / "stages").glob("up-*"))
    base = next((study_folder / "study" / "stages").glob("base-*"))
    with configured(study_folder, stages={"b": {"pipeline": str(base)}, "u": {"pipeline": str(up)}}):
        stages = Study(settings_of(study_folder), study_folder / "study").stages
        cascade = stages.cascade((StageRecipe("b"), StageRecipe("u")), None)
        assert [stage.name for stage in cascade.stages] == ["base", "super_res_1"]
        cascade.save_pretrained(study_folder / "two")
    with configured(study_folder, stages={"b": {"pipeline": str(study_folder / "two")}}):
        stages = Study(settings_of(study_folder), study_folder / "study").stages
        with pytest.raises(ValueError, match=r"is None; it must be one of \['base', 'super_res_1'\]"):
            stages.given_stage(StageRecipe("b"))
    with configured(study_folder, stages={"u": {"pipeline": str(up), "stage": "super_res_1"}}):
        stages = Study(settings_of(study_folder), study_folder / "study").stages
        with pytest.raises(ValueError, match=r"is 'super_res_1'; it must be one of \['super_res'\]"):
            stages.given_stage(StageRecipe("u"))


@pytest.mark.parametrize("name", ["table2a", "table3b"])
def test_other_experiments(study_folder, name):
    report = run(study_folder, name, sampling_seeds=[0])
    for row in report["rows"]:
        assert row["runs"][0]["figures"]["test"]["frechet_distance"]["value"] > 0
    assert (study_folder / "study" / f"{name}.png").exists() == (name != "table2a")


def test_figure_10_shares_what_its_last_stage_takes(study_folder, tmp_path):
    """Also where rows differ in the last stage's schedule; and as many sets are made as were planned."""
    options = {"sampling_seeds": [0], "output_dir": str(tmp_path)}
    plan = run(study_folder, "figure10", dry_run=True, **options)
    report = run(study_folder, "figure10", **options)
    assert len(plan["samples"]) == len(list((tmp_path / "samples").iterdir())) == 1 + 2
    assert all(row["runs"][0]["figures"]["test"]["frechet_distance"]["value"] > 0 for row in report["rows"])
    assert (tmp_path / "figure10.png").exists()


def test_variants_of_the_last_stage(study_folder):
    """Tables 4a and 4b train the last stage in many ways, on the same z."""
    stages = study_folder / "study" / "stages"
    before = set(stages.glob("last-*"))
    report = run(study_folder, "table4a", sampling_seeds=[0])
    labels = [row["label"] for row in report["rows"]]
    assert labels[:2] == ["sigma = 0 (no blur)", "sigma ~ U(0.4, 0.6)"] and len(labels) == 8
    of_table_4b = run(study_folder, "table4b", sampling_seeds=[0])
    assert [row["paper"][0] for row in of_table_4b["rows"]] == ["6.18", "5.75", "5.00", "4.88"]
    folders = set(stages.glob("last-*")) - before
    configs = [json.loads((folder / "training_config.json").read_text()) for folder in folders]
    kinds = [(config["augmentation"] or {"kind": "none"})["kind"] for config in configs]
    assert sorted(kinds) == ["blur"] * 8 + ["gaussian", "none"]
    assert sum(config["unet"]["num_classes"] is None for config in configs) == 1


@contextmanager
def configured(folder, **changes):
    """The configuration with changes, for as long as the context lasts."""
    original = (folder / "config.json").read_text()
    try:
        write_config(folder, **changes)
        yield json.loads((folder / "config.json").read_text())
    finally:
        (folder / "config.json").write_text(original)


@pytest.fixture(scope="module")
def given(study_folder, tmp_path_factory):
    """A configuration's `stages` and `experiments` with a base that is there already."""
    run(study_folder, "table2a", sampling_seeds=[0])
    plain = next((study_folder / "study" / "stages").glob("plain-*"))
    folder = tmp_path_factory.mktemp("given") / "cascade"
    CascadedDiffusionPipeline.from_pretrained(plain).save_pretrained(folder)
    table = {"stages": ["given"], "num_inference_steps": {"base": 2}, "evaluation": {"num_neighbour_images": 20}}
    stages = {"given": {"pipeline": str(folder), "stage": "base"}}
    return {"stages": stages, "experiments": {"table1": table, "figure7": table}}


def test_data_without_labels(study_folder, tmp_path):
    """Table 5 on images in a folder for each split, as configs/lsun_*.json has it."""
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for file in (study_folder / "data" / split.replace("val", "test")).rglob("*.png"):
            shutil.copy(file, tmp_path / "data" / split / f"{file.parent.name}-{file.name}")
    content = json.loads((study_folder / "config.json").read_text())
    content["data"], content["experiments"] = (
        {"train_data_dir": str(tmp_path / "data")},
        {"table5": {"base": "base", "super_res": "up", "levels": [0], "num_inference_steps": STEPS}},
    )
    content["training"]["unconditional"] = True
    content["evaluation"] |= {"eval_split": "val", "inception_score": False}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (row,) = run(tmp_path, "table5", sampling_seeds=[0])["rows"]
    assert row["paper"] == ["2.30", "40.68", "3.29", "42.21"]
    assert {"train", "val"} <= set(row["runs"][0]["figures"])


def test_classification_of_a_given_cascade(study_folder, given, monkeypatch):
    """Of the last stage's samples of each seed, and of real images once; at its own precision."""
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16")  # as after a training
    trained = []

    def fit(config, train, test):
        trained.append(Path(config.output_dir).name)
        return fit_classifier(config, train, test)

    monkeypatch.setattr("cdm_diffusers.evaluation.classification_accuracy_score.fit_classifier", fit)
    with configured(study_folder, **given) as content:
        report = run(study_folder, "figure7", num_images=24)
        runs = [run["classification"]["accuracies"] for run in report["rows"][0]["runs"]]
        assert [set(accuracies) for accuracies in runs] == [{"samples", "real"}, {"samples"}]
        assert trained == ["samples-0", "real-0", "samples-0"]
        text = (study_folder / "study" / "figure7.md").read_text()
        assert "| samples | 28 |" in text and "63.02%" not in text and " classes." in text
        # As many as there are training images, with their labels, in an order of their own; or as the settings say.
        learned = Path(report["rows"][0]["runs"][0]["classification"]["settings"]["samples"])
        labels = load_image_set(learned).labels
        assert labels.bincount().tolist() == [14, 14] and labels.tolist() not in (sorted(labels), [0, 1] * 14)
        content["classification"]["num_images"] = 24
        (study_folder / "config.json").write_text(json.dumps(content))
        (first, _) = run(study_folder, "figure7", num_images=24)["rows"][0]["runs"]
        assert Path(first["classification"]["settings"]["samples"]).name == first["samples"]
        assert first["classification"]["accuracies"]["samples"]["num_train_images"] == 24
    for name in ("per_class", "best_classes", "worst_classes"):
        Image.open(study_folder / "study" / f"figure7_{name}.png").verify()


def test_what_has_other_content_under_the_same_name_is_made_anew(study_folder, given, tmp_path, monkeypatch):
    """Another extractor in its folder, other weights in the given cascade's."""
    for source in (study_folder / "classifier", Path(given["stages"]["given"]["pipeline"])):
        shutil.copytree(source, tmp_path / source.name)
    stages = {"given": {"pipeline": str(tmp_path / "cascade"), "stage": "base"}}
    measured = []

    def measure(config):
        measured.append(Path(config.samples).name)
        return evaluate(config)

    monkeypatch.setattr(module, "evaluate", measure)

    def figures():
        with configured(study_folder, **{**given, "stages": stages}) as content:
            content["experiments"]["table2a"] = {"base": "given", "num_inference_steps": {"base": 2}}
            content["evaluation"]["extractor"] = str(tmp_path / "classifier")
            (study_folder / "config.json").write_text(json.dumps(content))
            return run(study_folder, "table2a", sampling_seeds=[0])["rows"][0]["runs"][0]

    first = figures()
    assert figures() == first and len(measured) == 2  # one pass, and restarted
    change_weights(tmp_path / "classifier" / "model.safetensors")
    second = figures()
    assert second["samples"] == first["samples"] and second["figures"] != first["figures"]
    change_weights(tmp_path / "cascade" / "base_unet" / "diffusion_pytorch_model.safetensors")
    assert figures()["samples"] != first["samples"] and len(measured) == 6


def change_weights(file):
    weights = {name: t * 1.5 if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def test_a_stopped_run_leaves_the_earlier_report(study_folder, monkeypatch):
    run(study_folder, "table2a", sampling_seeds=[0])
    before = (study_folder / "study" / "table2a.json").read_bytes()
    measure, measured = Study.measure, []

    def stop_at_second(study, row):
        if measured:
            raise KeyboardInterrupt
        measured.append(row)
        return measure(study, row)

    monkeypatch.setattr(Study, "measure", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(study_folder, "table2a", sampling_seeds=[0], num_images=21)
    assert (study_folder / "study" / "table2a.json").read_bytes() == before


def test_steps_of_the_command_line_are_those_of_every_training(study_folder):
    with configured(study_folder) as content:
        content["stages"]["base"]["options"]["max_train_steps"] = 7
        (study_folder / "config.json").write_text(json.dumps(content))
        settings = settings_of(study_folder, max_train_steps=3)
    stages = Study(settings, study_folder / "study").stages
    assert [stages.training(StageRecipe(name), 0)[0].max_train_steps for name in ("base", "up")] == [3, 3]


def test_every_training_seed_is_another_training(study_folder):
    report = run(study_folder, "table2a", sampling_seeds=[0], training_seeds=[0, 1])
    for row in report["rows"]:
        assert [run["training_seed"] for run in row["runs"]] == [0, 1]
        first, second = (run["figures"]["train"]["frechet_distance"]["value"] for run in row["runs"])
        assert first != second
    folders = (study_folder / "study" / "stages").glob("plain-*/training_config.json")
    assert {json.loads(file.read_text())["training"]["seed"] for file in folders} == {0, 1}


def test_networks_sample_in_the_type_of_the_configuration(study_folder, tmp_path):
    with configured(study_folder) as content:
        content["sampling"]["dtype"] = "bf16"
        (study_folder / "config.json").write_text(json.dumps(content))
        settings = settings_of(study_folder)
    stages = Study(settings, study_folder / "study").stages
    cascade = stages.cascade((StageRecipe("base"), StageRecipe("up")), 0)
    assert {stage.unet.dtype for stage in cascade.stages} == {torch.bfloat16}


def test_batches_are_those_of_all_processes(study_folder):
    stages = Study(settings_of(study_folder), study_folder / "study").stages
    recipe = StageRecipe("base", {"gradient_accumulation_steps": 2})
    alone = stages.training(recipe, 0), stages.key(recipe, 0)
    stages.state = SimpleNamespace(num_processes=2)
    shared = stages.training(recipe, 0), stages.key(recipe, 0)
    assert [config.train_batch_size for (config, _), _ in (alone, shared)] == [2, 1]
    assert alone[0][1].training.train_batch_size == shared[0][1].training.train_batch_size == 4
    assert alone[1] == shared[1]
    stages.state.num_processes = 3
    with pytest.raises(ValueError, match="`train_batch_size` of the stage 'base' is 4, which does not divide over 6"):
        stages.training(recipe, 0)


# Bad input


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.learning_rat", 0.1, "is not an option; did you mean `learning_rate`?"),
        ("training.seeds", [], "`seeds` is []; it must have at least one item."),
        ("sampling.batchsize", 4, "is not an option; did you mean `batch_size`?"),
        ("sampling.num_images", 19, "is 19; it must be at least 20."),
        ("sampling.dtype", "bf61", "it must be one of ['float32', 'bf16', 'fp16']"),
        ("data.train_data_dirs", "x", "is not an option; did you mean `train_data_dir`?"),
        ("evaluation.extracto", "x", "is not an option; did you mean `extractor`?"),
        ("classification.num_seeds", 0, "is 0; it must be at least 1."),
        ("stages.base.option", {}, "is not an option; did you mean `options`?"),
        ("stages.base.options.train_batch_siz", 3, "is not an option; did you mean `train_batch_size`?"),
        ("stages.base.pipeline", "x", "it must have a preset, or a pipeline and the name of its stage"),
        ("stages.base.preset", "fashion_mnist_9", "'fashion_mnist_9'"),
        ("experiments.table2c", {}, "is not an option; did you mean `table2b`?"),
        ("experiments.table3a.level", [0], "is not an option; did you mean `levels`?"),
        ("experiments.table3a.levels", [-1], "is [-1]; each item must be at least 0."),
        ("experiments.table3a.num_inference_steps", {"base": 0}, "each value must be at least 1"),
        ("experiments.table3a.evaluation", {"batchsize": 1}, "is not an option; did you mean `batch_size`?"),
        ("experiments.table4b.batch_sizes", [4], "is [4]; it must be 2 whole numbers of at least 1."),
    ],
)
def test_a_misspelt_or_bad_value_is_named_before_anything_runs(study_folder, tmp_path, path, value, message):
    """Wherever it is in the configuration, with its path, whatever experiment is to be reproduced."""
    content = json.loads((study_folder / "config.json").read_text())
    *sections, name = path.split(".")
    section = content
    for key in sections:
        section = section[key]
    section[name] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        settings_of(tmp_path)
    assert message in str(error.value) and f"`{'.'.join(sections)}" in str(error.value)


def test_missing_parts_are_named(study_folder, tmp_path):
    content = json.loads((study_folder / "config.json").read_text())
    del content["data"], content["experiments"]["table3a"]["base"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`data` in .* is missing.*`experiments.table3a.base` in .* is missing"):
        settings_of(tmp_path)


def test_values_are_kept_as_they_were_given(study_folder, tmp_path):
    """Folders are named by hashes of them: 1 stays 1 where a float is declared, and defaults are not filled in."""
    content = json.loads((study_folder / "config.json").read_text())
    content["experiments"]["table2a"]["guidance_scale"] = {"base": 2}
    content["stages"]["base"]["options"] |= {"blur_sigma_range": [0, 1], "learning_rate": 1, "max_train_steps": None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    settings = settings_of(tmp_path)
    assert json.dumps(settings.given) == json.dumps(content)
    options = Study(settings, tmp_path).stages.training_options(StageRecipe("base"))
    assert repr(options["learning_rate"]) == "1" and repr(options["blur_sigma_range"]) == "[0, 1]"


def test_what_does_not_fit_is_said_before_anything_runs(study_folder, tmp_path):
    good = json.loads((study_folder / "config.json").read_text())

    def refuses(message, name="table3a", **changes):
        (tmp_path / "config.json").write_text(json.dumps({**copy.deepcopy(good), **changes}))
        with pytest.raises(ValueError, match=message):
            run(tmp_path, name)

    refuses(r"`name` is 'table5'; it must be one of the experiments of .* \['table2a'", name="table5")
    refuses(r"`experiments.table3a` has the stage 'base'; it must be one of `stages`, \[\]", stages={})
    given = {**good["stages"], "up": {"pipeline": "x", "stage": "super_res_1"}}
    refuses("trains the stage 'up' with .*augmentation_level", name="table2b", stages=given)
    too_high = {**good["experiments"]["table3a"], "levels": [251, 4001]}
    refuses(r"row '.*s = 4001' \(see `levels`\): .*super_res_1.*4001.*4000", experiments={"table3a": too_high})
    misspelt = {**good["experiments"]["table3a"], "num_inference_steps": {"base": 2, "super_res1": 2}}
    refuses(r"`experiments.table3a`, row .*`num_inference_steps` .*'super_res1'", experiments={"table3a": misspelt})
    no_steps = {**good["experiments"]["table2b"], "num_inference_steps": {"base": 2}}
    refuses("`num_inference_steps` is .*'super_res_1'", name="table2b", experiments={"table2b": no_steps})
    absent = {**good["stages"], "up": {"pipeline": str(tmp_path / "none")}}
    refuses("`pipeline` of the stage 'up': .*none' is not a folder here", stages=absent)
    unfit = {**good["stages"], "base": {"preset": "fashion_mnist_8", "options": {**TINY, "sample_size": 8}}}
    refuses("`super_res_1` takes images of size 4, but stage `base` makes images of size 8", stages=unfit)
    refuses("extractor|classifier", evaluation={**good["evaluation"], "extractor": str(tmp_path / "none")})
    assert not (tmp_path / "study").exists()
    with pytest.raises(OSError):
        settings_of(tmp_path / "missing")
    with pytest.raises(ValueError, match="`sampling_seeds` is \\[\\]"):
        ReproduceConfig(name="table2a", config="x", output_dir="x", sampling_seeds=[])
