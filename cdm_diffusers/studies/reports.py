"""An experiment's results as a table of the paper's shape."""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from ..evaluation.intervals import mean_and_error, student_interval
from ..tables import markdown_table, plus_minus
from .experiments import Experiment


COLUMNS = ("train", "validation", "IS")  # distances from the two splits, and the Inception Score


def figure_of(run: dict[str, Any], column: str, extrapolated: bool = False) -> dict[str, Any] | None:
    """
    One of the `COLUMNS` of one run; None for the Inception Score of an extractor that has none.

    Raises:
        ValueError: it has no extrapolated distances.
    """
    if column == "IS":
        return run["figures"].get("inception_score")
    train, validation = (figures for name, figures in run["figures"].items() if name != "inception_score")
    figures, name = train if column == "train" else validation, "frechet_distance" + "_extrapolated" * extrapolated
    if name not in figures:
        raise ValueError(
            f"`extrapolated` is {extrapolated}, and the report has only {sorted(figures)}: measure with `reproduce` "
            "again."
        )
    return figures[name]


def row_name(row: dict[str, Any]) -> str:
    """What identifies a row within its experiment."""
    return f"{row['heading']}: {row['label']}" if row["heading"] else row["label"]


def independent_values(runs: list[dict[str, Any]], values: list[float]) -> list[float]:
    """Means over the samplings of each training where there are several trainings, else the values as they are."""
    of_training: dict[Any, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        of_training.setdefault(run["training_seed"], []).append(value)
    return [statistics.fmean(group) for group in of_training.values()] if len(of_training) > 1 else values


def over_runs(runs: list[dict[str, Any]], figures: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Mean and 95% interval of the runs' figures: Student's over trainings, or over samplings of the one training; with
    one run its own, which says nothing about other samplings or trainings than that one.
    """
    values = independent_values(runs, [figure["value"] for figure in figures])
    interval = figures[0]["interval"] if len(values) == 1 else student_interval(values)
    return {"mean": statistics.fmean(values), "interval": interval, "runs": len(runs)}


def summarise(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, each with its `COLUMNS` over all of its runs as "columns"."""
    rows = []
    for row in report["rows"]:
        figures = {}
        for column in COLUMNS:
            of_runs = [figure_of(run, column) for run in row["runs"]]
            figures[column] = None if of_runs[0] is None else over_runs(row["runs"], of_runs)
        rows.append({**row, "columns": figures})
    return rows


def write_table(report: dict[str, Any], experiment: Experiment, output_dir: Path) -> str:
    """Writes `NAME.md` and returns what is in it. Rows of one image size end with real images of that size."""
    rows, first = summarise(report), report["rows"][0]["runs"][0]
    header = ["", *(f"{first['distance']} vs {column}" for column in ("train", "validation")), "IS"]
    header += [f"paper: {name}" for name in experiment.paper_columns]
    real_rows = [real_images_cells(row["runs"][0]) for row in rows]
    lines, heading = [], ""
    for row, real, next_real in zip(rows, real_rows, [*real_rows[1:], None], strict=True):
        if row["heading"] != heading:
            heading = row["heading"]
            lines.append([f"*{heading}*"])
        lines.append([row["label"], *map(cell, row["columns"].values()), *row["paper"]])
        if real != next_real:
            lines.append(["real images", *real])
    parts = [f"**{experiment.title}**", markdown_table(header, lines), caption(report, first)]
    if "comparisons" in report:
        parts.append(comparison_lines(report))
    for row, recipe in zip(report["rows"], experiment.rows, strict=False):
        if "classification" in row["runs"][0]:
            reports = [run["classification"] for run in row["runs"]]
            parts += [f"*{row_name(row)}*", classification_lines(reports, recipe.paper_accuracies)]
    text = "\n\n".join(parts) + "\n"
    (output_dir / f"{report['name']}.md").write_text(text)
    return text


def real_images_cells(run: dict[str, Any]) -> list[str]:
    """The figures of real images of the same size as the run's samples."""
    figures = [figure_of(run, column) for column in COLUMNS]
    return ["" if figure is None else f"{figure['real']['value']:.4g}" for figure in figures]


def cell(figure: dict[str, Any] | None) -> str:
    """A figure with its interval; empty where there is none."""
    if figure is None:
        return ""
    low, high = figure["interval"]
    return f"{figure['mean']:.4g} ({low:.4g} to {high:.4g})"


def caption(report: dict[str, Any], run: dict[str, Any]) -> str:
    """What a reader of the table must know: how many samples, whose features, what the intervals are of."""
    settings = report["settings"]
    trainings = len({run["training_seed"] for run in report["rows"][0]["runs"]})
    samplings = len(settings["sampling"]["seeds"])
    if trainings * samplings == 1:
        interval = "95% intervals are of the draw of these samples alone, not of other trainings."
    else:
        seeds = f"{trainings} trainings" if trainings > 1 else f"{samplings} sampling seeds of one training"
        interval = f"95% intervals are Student's over {seeds}."
    return (
        f"{settings['sampling']['num_images']:,} samples of each row and seed; extractor: {run['extractor']}; rows "
        f"above a row of real images compare with it: images of the other split, as many where there are. {interval}"
    )


def classification_lines(reports: list[dict[str, Any]], paper: dict[str, tuple[str, str]]) -> str:
    """
    Table 1b: means over classification accuracy scores with standard errors, over samplings where there are several,
    else over the trainings of the classifier.

    Args:
        reports: of `classification_accuracy_score`; real images are in the first.
        paper: top-1 and top-5 by what was trained on.
    """
    rows, means = [], {}
    for name, row in reports[0]["accuracies"].items():
        of_reports = [report["accuracies"][name] for report in reports if name in report["accuracies"]]
        top_1, top_5 = (over_reports([one[key] for one in of_reports]) for key in ("top_1", "top_5"))
        means[name] = top_1["mean"]
        cells = [plus_minus(figure, ".2%") for figure in (top_1, top_5)]
        rows.append([name, f"{row['num_train_images']:,}", *cells, *paper.get(name, ())])
    text = markdown_table(["trained on", "images", "top-1", "top-5", "paper: top-1", "paper: top-5"], rows)
    first = reports[0]
    if "compared_with" in first:
        compared = first["compared_with"]
        text += (
            f"\n\n{means['samples'] / means[compared]:.1%} of the top-1 accuracy of {compared!r}; better than it on "
            f"{first['classes_where_samples_beat_real']} of {first['num_classes']} classes."
        )
    return text


def comparison_lines(report: dict[str, Any]) -> str:
    """What an augmentation experiment concludes (docs/results.md, "Design")."""
    gate, rows = report["gate"], []
    for one in report["comparisons"]:
        for from_one in one["baselines"]:
            figures = [_signed(from_one[name]) for name in ("beyond_ground_truth", "change", "ground_truth")]
            ratio = from_one["ratio_of_ratios"]
            cells = [f"{from_one['distance']:.4g}", *figures, _ratio(ratio), from_one["verdict"]]
            rows.append([one["input"], from_one["baseline"], _levels(from_one["chosen"]), *cells])
    header = ["", "from s", "to s*", "D(from)", "change beyond ground truth's", "change", "ground truth's change"]
    words = ["prediction", "verdict", "verdict_of_these_trainings"]
    verdicts = [[one["input"], *(one[word] for word in words)] for one in report["comparisons"]]
    parts = [
        _gate_line(gate),
        _control_line(report["control"]),
        markdown_table([*header, "ratio of ratios", "word"], rows),
        markdown_table(["", "predicted", "verdict", "of these trainings"], verdicts),
        _secondary_line(report),
    ]
    if "solver_check" in report:
        parts.append(_solver_line(report["solver_check"]))
    return "\n\n".join(parts)


def _gate_line(gate: dict[str, Any]) -> str:
    ratios = ", ".join(f"{name} {ratio:.3g}" for name, ratio in gate["ratios"].items())
    return (
        f"At s = {gate['level']} the weak base's distance is {gate['weak']:.4g} and that on real training images "
        f"{gate['ground_truth']:.4g}, a ratio of {gate['ratio']:.3g} (gate: {gate['needed']:g}). Ratios: {ratios}."
    )


def _control_line(control: dict[str, Any]) -> str:
    noises = (
        f"{one['noise']:g} (stored: deviation {one['deviation']:.3g}, shift {one['shift']:+.3g}; ratio "
        f"{one['ratio']:.3g})"
        for one in control["noises"]
    )
    return f"Noise of the positive control: {', '.join(noises)}; swept: {control['noise']:g}."


def _secondary_line(report: dict[str, Any]) -> str:
    first, second = report["first_step"]["levels"]
    return (
        f"Change with the weak base beyond that with the good one: {_signed(report['interaction'])}. Distance on real "
        f"training images at s = {second} over that at s = {first}: {_ratio(report['first_step']['ratio'])}."
    )


def _solver_line(check: dict[str, Any]) -> str:
    figures = (
        f"{name} {_signed(check[key][0])} and {_signed(check[key][1])}"
        for name, key in (("change", "change"), ("beyond ground truth's", "beyond_ground_truth"))
    )
    word = "void (solver)" if not check["agree"] else "agree"
    return (
        f"Weak base from s = {check['levels'][0]} to {check['levels'][1]}, {check['num_images']} images, by the "
        f"sweep's solver and by the check's: {'; '.join(figures)}; difference {_signed(check['difference'])}, margin "
        f"{check['margin']:.3g}: {word}."
    )


def _signed(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:+.4g} ({low:.4g} to {high:.4g})"


def _ratio(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else "{:.3g} ({:.3g} to {:.3g})".format(figure["value"], *figure["interval"])


def _levels(chosen: list[list[int]]) -> str:
    """Each s with how often it was chosen, where they do not agree."""
    counts = Counter(level for half in chosen for level in half)
    return ", ".join(f"{s} ({n})" if len(counts) > 1 else f"{s}" for s, n in sorted(counts.items()))


def over_reports(figures: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean and standard error over several samplings; the figure itself of a single one."""
    return figures[0] if len(figures) == 1 else mean_and_error([figure["mean"] for figure in figures])
