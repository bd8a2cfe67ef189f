"""Rows compared seed by seed: the interval of the ratio in closed form, verdicts, and what cannot be compared."""

import json
import math

import pytest

from cdm_diffusers.studies.compare import compare
from cdm_diffusers.studies.config import CompareConfig


def row(label, distances, heading="", seeds=(0, 1, 2), training_seed=0):
    runs = []
    for seed, value in zip(seeds, distances, strict=True):
        figures = {"train": {"frechet_distance": {"value": 2 * value}}, "test": {"frechet_distance": {"value": value}}}
        figures["inception_score"] = {"value": 5.0}
        runs.append({"training_seed": training_seed, "sampling_seed": seed, "figures": figures})
    return {"heading": heading, "label": label, "x": None, "paper": [], "runs": runs}


def written(tmp_path, *rows):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"rows": rows}))
    return str(file)


def test_the_ratio_and_its_interval(tmp_path):
    """Student's interval of the mean log ratio: seeds that are hard for both rows do not widen it."""
    first, second = row("s = 0", (1.0, 10.0, 100.0)), row("s = 5", (2.0, 20.0, 240.0), heading="truncated")
    (result,) = compare(CompareConfig(report=written(tmp_path, first, second)))
    mean = (2 * math.log(2) + math.log(2.4)) / 3
    half = 4.302653 * (math.log(2.4) - math.log(2)) / 3  # deviation |a - b| / sqrt(3), over sqrt(3)
    assert result["row"] == "truncated: s = 5" and result["ratio"] == pytest.approx(math.exp(mean))
    assert result["interval"] == pytest.approx([math.exp(mean - half), math.exp(mean + half)], rel=1e-5)
    assert result["verdict"] == "worse"


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ((0.5, 0.52, 0.51), "better"),
        ((1.5, 1.52, 1.51), "worse"),
        ((1.0, 1.01, 0.99), "about equal"),
        ((0.95, 0.951, 0.949), "better, about equal"),
        ((1.05, 1.051, 1.049), "worse, about equal"),
        ((0.5, 1.0, 1.5), "undecided"),
        ((1.12, 1.121, 1.119), "worse"),
    ],
)
def test_verdicts(tmp_path, factors, verdict, capsys):
    first, second = row("a", (1.0, 2.0, 3.0)), row("b", (factors[0], 2 * factors[1], 3 * factors[2]))
    (result,) = compare(CompareConfig(report=written(tmp_path, first, second)))
    assert result["verdict"] == verdict
    assert f"| {verdict} |" in capsys.readouterr().out


def test_another_row_split_and_margin(tmp_path):
    report = written(tmp_path, row("a", (1.0, 2.0, 3.0)), row("b", (2.0, 4.0, 6.3)))
    (result,) = compare(CompareConfig(report=report, to="b", split="train", margin=0.6))
    assert result["row"] == "a" and result["ratio"] == pytest.approx((1 / (2 * 2 * 2.1)) ** (1 / 3))
    assert result["verdict"] == "better, about equal"


def test_extrapolated_distances(tmp_path, capsys):
    first, second = row("a", (1.0, 2.0, 3.0)), row("b", (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="`extrapolated` is True, and the report has only \\['frechet_distance'\\]"):
        compare(CompareConfig(report=written(tmp_path, first, second), extrapolated=True))
    for one, factor in ((first, 1.0), (second, 3.0)):
        for run in one["runs"]:
            value = factor * run["figures"]["test"]["frechet_distance"]["value"]
            run["figures"]["test"]["frechet_distance_extrapolated"] = {"value": value}
    (result,) = compare(CompareConfig(report=written(tmp_path, first, second), extrapolated=True))
    assert result["ratio"] == pytest.approx(3.0) and "extrapolated, validation: ratio to a" in capsys.readouterr().out


def test_trainings_are_the_unit_where_there_are_several(tmp_path):
    """Three samplings of each of two trainings are two independent ratios, not six."""
    first = row("a", (1.0, 1.0, 1.0)) | {
        "runs": [*row("", (1, 1, 1))["runs"], *row("", (1, 1, 1), training_seed=1)["runs"]]
    }
    second = row("b", (1.0, 1.0, 1.0)) | {
        "runs": [*row("", (2, 2, 2))["runs"], *row("", (4, 4, 4), training_seed=1)["runs"]]
    }
    (result,) = compare(CompareConfig(report=written(tmp_path, first, second)))
    half = 12.706205 * math.log(2) / 2
    assert result["ratio"] == pytest.approx(math.sqrt(8))
    assert result["interval"] == pytest.approx(
        [math.sqrt(8) * math.exp(-half), math.sqrt(8) * math.exp(half)], rel=1e-5
    )


def test_what_cannot_be_compared(tmp_path):
    report = written(tmp_path, row("a", (1.0, 2.0)[:1], seeds=(0,)), row("b", (1.0,), seeds=(1,)))
    with pytest.raises(ValueError, match=r"that 'b' and 'a' share is 0; .*--sampling_seeds"):
        compare(CompareConfig(report=report))
    with pytest.raises(ValueError, match=r"`to` is 'c'; it must be one of the rows of .*, \['a', 'b'\]"):
        compare(CompareConfig(report=report, to="c"))
    with pytest.raises(OSError, match=r"`report` is .*missing.json.*cannot be read"):
        compare(CompareConfig(report=str(tmp_path / "missing.json")))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"`report` .* is not a report"):
        compare(CompareConfig(report=str(tmp_path / "list.json")))
    with pytest.raises(ValueError, match=r"`margin` is 1\.5"):
        CompareConfig(report=report, margin=1.5)
