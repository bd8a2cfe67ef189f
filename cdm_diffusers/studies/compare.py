"""Rows of an experiment against one of them, seed by seed: better, worse, about equal, or undecided?"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from ..evaluation.intervals import student_interval
from ..tables import markdown_table
from .config import CompareConfig
from .reports import figure_of, independent_values, row_name


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """
    The ratio of each row's Frechet distance to that of the row `config.to`, with its 95% interval and a verdict;
    printed as a table.

    Raises:
        ValueError: the report cannot be read, has no such row or no such distances, or two rows have fewer than two
            seeds in common.
    """
    rows = read_rows(config.report)
    names = [row_name(row) for row in rows]
    reference = names[0] if config.to is None else config.to
    if names.count(reference) != 1:
        raise ValueError(f"`to` is {config.to!r}; it must be one of the rows of {config.report!r}, {names}.")
    results = []
    for row, name in zip(rows, names, strict=True):
        if name != reference:
            ratio, interval = paired_ratio(row, rows[names.index(reference)], config.split, config.extrapolated)
            verdict = verdict_of(interval, config.margin)
            results.append({"row": name, "ratio": ratio, "interval": interval, "verdict": verdict})
    kind = "extrapolated, " if config.extrapolated else ""
    print(ratio_table(results, f"{kind}{config.split}: ratio to {reference}"))
    return results


def read_rows(report: str) -> list[dict[str, Any]]:
    """The rows of a file that `reproduce` has written."""
    try:
        return json.loads(Path(report).read_text())["rows"]
    except OSError as error:
        raise OSError(f"`report` is {report!r}, which cannot be read ({error.strerror}): check the path.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`report` {report!r} is not a report of reproduce ({error!r}).") from error


def paired_ratio(
    row: dict[str, Any], reference: dict[str, Any], split: str, extrapolated: bool = False
) -> tuple[float, list[float]]:
    """
    The geometric mean of the ratios of two rows' distances, training seed by training seed and sampling seed by
    sampling seed, and Student's 95% interval of it: over trainings where there are several, else over samplings.
    """
    logs = []
    for row_run in row["runs"]:
        for other in reference["runs"]:
            if all(row_run[key] == other[key] for key in ("training_seed", "sampling_seed")):
                values = [figure_of(run, split, extrapolated)["value"] for run in (row_run, other)]
                logs.append({**row_run, "log": math.log(values[0] / values[1])})
    values = independent_values(logs, [run["log"] for run in logs])
    if len(values) < 2:
        raise ValueError(
            f"The number of seeds that {row_name(row)!r} and {row_name(reference)!r} share is {len(values)}; it must "
            "be at least 2: run the experiment with more `--sampling_seeds`."
        )
    return math.exp(statistics.fmean(values)), [math.exp(end) for end in student_interval(values)]


def ratio_table(results: list[dict[str, Any]], title: str) -> str:
    """What `compare` prints."""
    rows = []
    for result in results:
        low, high = result["interval"]
        rows.append([result["row"], f"{result['ratio']:.3f}", f"{low:.3f} to {high:.3f}", result["verdict"]])
    return markdown_table([title, "ratio", "95% interval", "verdict"], rows)


def verdict_of(interval: list[float], margin: float) -> str:
    """
    Where the interval of a ratio of distances lies: below 1 ("better"), above it ("worse"), within `margin` of it
    ("about equal"), or none of these ("undecided").
    """
    low, high = interval
    words = ["better"] * (high < 1) + ["worse"] * (low > 1)
    words += ["about equal"] * (1 - margin <= low and high <= 1 + margin)
    return ", ".join(words) or "undecided"
