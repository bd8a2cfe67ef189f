"""Rows of an experiment against one of them, seed by seed: is it better, about equal, or not to be told?"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..training.config import option
from .reports import figure_of, independent_values, row_name, split_names, student_interval


@dataclass(kw_only=True)
class CompareConfig:
    """
    Everything that can be said on the command line of `evaluation/compare.py`.

    Raises:
        ValueError: for a value out of its range.
    """

    report: str = field(metadata={"help": "NAME.json of evaluation/reproduce.py."})
    to: str | None = option("The row that the others are compared with, as the table names it. Default: the first.")
    split: Literal["train", "validation"] = option("Distance from which split.", "validation")
    margin: float = option('"About equal" is a ratio within 1 - margin to 1 + margin.', 0.1)

    def __post_init__(self):
        if not 0 < self.margin < 1:
            raise ValueError(f"`margin` is {self.margin}; it must lie between 0 and 1.")


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """
    The ratio of each row's Frechet distance to that of the row `config.to`, with its 95% interval and a verdict;
    printed as a table.

    Raises:
        ValueError: the report cannot be read, has no such row, or two rows have fewer than two seeds in common.
    """
    rows = read_rows(config.report)
    names = [row_name(row) for row in rows]
    reference = names[0] if config.to is None else config.to
    if names.count(reference) != 1:
        raise ValueError(f"`to` is {config.to!r}; the rows of {config.report!r} are {names}.")
    results = []
    for row, name in zip(rows, names, strict=True):
        if name != reference:
            ratio, interval = paired_ratio(row, rows[names.index(reference)], config.split)
            verdict = verdict_of(interval, config.margin)
            results.append({"row": name, "ratio": ratio, "interval": interval, "verdict": verdict})
    print(f"| {config.split}: ratio to {reference} | ratio | 95% interval | verdict |\n|---|---|---|---|")
    for result in results:
        low, high = result["interval"]
        print(f"| {result['row']} | {result['ratio']:.3f} | {low:.3f} to {high:.3f} | {result['verdict']} |")
    return results


def read_rows(report: str) -> list[dict[str, Any]]:
    try:
        return json.loads(Path(report).read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`report` {report!r} is no report of evaluation/reproduce.py ({error!r}).") from error


def paired_ratio(row: dict[str, Any], reference: dict[str, Any], split: str) -> tuple[float, list[float]]:
    """
    The geometric mean of the ratios of two rows' distances, training seed by training seed and sampling seed by
    sampling seed, and Student's 95% interval of it: over trainings where there are several, else over samplings.
    """
    logs = []
    for row_run in row["runs"]:
        for other in reference["runs"]:
            if all(row_run[key] == other[key] for key in ("training_seed", "sampling_seed")):
                values = [figure_of(run, split, split_names(run))["value"] for run in (row_run, other)]
                logs.append({**row_run, "log": math.log(values[0] / values[1])})
    values = independent_values(logs, [run["log"] for run in logs])
    if len(values) < 2:
        raise ValueError(
            f"{row_name(row)!r} and {row_name(reference)!r} have {len(values)} seed in common; an interval needs two: "
            "run the experiment with more `--sampling_seeds`."
        )
    return math.exp(statistics.fmean(values)), [math.exp(end) for end in student_interval(values)]


def verdict_of(interval: list[float], margin: float) -> str:
    low, high = interval
    words = ["better"] * (high < 1) + ["worse"] * (low > 1)
    words += ["about equal"] * (1 - margin <= low and high <= 1 + margin)
    return ", ".join(words) or "undecided"
