"""An experiment's results as a table of the paper's shape, and as a figure."""

import shutil
import statistics
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from PIL import Image
from scipy import stats

from ..data.image_sets import load_image_set
from ..data.pictures import grid_of
from ..data.transforms import to_float, to_unit
from .experiments import Experiment


NUM_SHOWN_IMAGES = 16


def figure_of(run: dict[str, Any], column: str, splits: list[str]) -> dict[str, Any] | None:
    """One figure of one run: the distance to a split, or the Inception Score."""
    if column == "IS":
        return run["figures"].get("inception_score")
    return run["figures"][splits[0 if column == "train" else 1]]["frechet_distance"]


def split_names(run: dict[str, Any]) -> list[str]:
    """What the run's data calls its training and its validation split."""
    return [name for name in run["figures"] if name != "inception_score"]


def row_name(row: dict[str, Any]) -> str:
    return f"{row['heading']}: {row['label']}" if row["heading"] else row["label"]


def independent_values(runs: list[dict[str, Any]], values: list[float]) -> list[float]:
    """Means over the samplings of each training where there are several trainings, else the values as they are."""
    of_training: dict[Any, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        of_training.setdefault(run["training_seed"], []).append(value)
    return [statistics.fmean(group) for group in of_training.values()] if len(of_training) > 1 else values


def student_interval(values: list[float]) -> list[float]:
    if len(set(values)) == 1:
        return [values[0], values[0]]  # where SciPy has nan
    low, high = stats.t.interval(0.95, len(values) - 1, statistics.fmean(values), stats.sem(values))
    return [float(low), float(high)]


def over_runs(runs: list[dict[str, Any]], figures: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Mean and 95% interval of the runs' figures: Student's over trainings, or over samplings of the one training; with
    one run its own, which says nothing about other samplings or trainings than that one.
    """
    values = independent_values(runs, [figure["value"] for figure in figures])
    interval = figures[0]["interval"] if len(values) == 1 else student_interval(values)
    return {"mean": statistics.fmean(values), "interval": interval, "runs": len(runs)}


def summarise(report: dict[str, Any]) -> list[dict[str, Any]]:
    """For each row its columns ("train", "validation", "IS") over all of its runs."""
    splits = split_names(report["rows"][0]["runs"][0])
    rows = []
    for row in report["rows"]:
        figures = {}
        for column in ("train", "validation", "IS"):
            of_runs = [figure_of(run, column, splits) for run in row["runs"]]
            figures[column] = None if of_runs[0] is None else over_runs(row["runs"], of_runs)
        rows.append({**row, "columns": figures})
    return rows


def write_table(report: dict[str, Any], experiment: Experiment, output_dir: Path) -> str:
    """Writes `NAME.md` and returns what is in it. Rows of one image size end with real images of that size."""
    rows, first = summarise(report), report["rows"][0]["runs"][0]
    real_rows = [real_images_cells(row["runs"][0]) for row in rows]
    distance = first["distance"]
    header = ["", f"{distance} vs train", f"{distance} vs validation", "IS"]
    header += [f"paper: {name}" for name in experiment.paper_columns]
    lines = [f"**{experiment.title}**", "", table_row(header, len(header)), "|" + "---|" * len(header)]
    heading = ""
    for row, real, next_real in zip(rows, real_rows, [*real_rows[1:], None], strict=True):
        if row["heading"] != heading:
            heading = row["heading"]
            lines.append(table_row([f"*{heading}*"], len(header)))
        lines.append(table_row([row["label"], *map(cell, row["columns"].values()), *row["paper"]], len(header)))
        if real != next_real:
            lines.append(table_row(["real images", *real], len(header)))
    lines += ["", caption(report, first)]
    if "classification" in report["rows"][-1]["runs"][0]:
        reports = [run["classification"] for run in report["rows"][-1]["runs"]]
        lines += ["", classification_lines(reports, experiment.paper_accuracies)]
    text = "\n".join(lines) + "\n"
    (output_dir / f"{report['name']}.md").write_text(text)
    return text


def table_row(cells: list[str], width: int) -> str:
    return f"| {' | '.join([*cells, *[''] * (width - len(cells))])} |"


def real_images_cells(run: dict[str, Any]) -> list[str]:
    """What real images of the size of the run's samples reach."""
    figures = [figure_of(run, column, split_names(run)) for column in ("train", "validation", "IS")]
    return ["" if figure is None else f"{figure['real']['value']:.4g}" for figure in figures]


def cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    low, high = figure["interval"]
    return f"{figure['mean']:.4g} ({low:.4g} to {high:.4g})"


def caption(report: dict[str, Any], run: dict[str, Any]) -> str:
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
    lines = ["| trained on | images | top-1 | top-5 | paper: top-1 | paper: top-5 |", "|---|---|---|---|---|---|"]
    means = {}
    for name, row in reports[0]["accuracies"].items():
        rows = [report["accuracies"][name] for report in reports if name in report["accuracies"]]
        top_1, top_5 = ([one[key] for one in rows] for key in ("top_1", "top_5"))
        means[name] = statistics.fmean(figure["mean"] for figure in top_1)
        cells = [name, f"{row['num_train_images']:,}", accuracy_cell(top_1), accuracy_cell(top_5)]
        lines.append(table_row([*cells, *paper.get(name, ())], 6))
    first = reports[0]
    if "compared_with" in first:
        compared = first["compared_with"]
        lines += [
            "",
            f"{means['samples'] / means[compared]:.1%} of the top-1 accuracy of {compared!r}; better than it on "
            f"{first['classes_where_samples_beat_real']} of {first['num_classes']} classes.",
        ]
    return "\n".join(lines)


def accuracy_cell(figures: list[dict[str, float | None]]) -> str:
    values = [figure["mean"] for figure in figures]
    error = stats.sem(values) if len(values) > 1 else figures[0]["standard_error"]
    return f"{statistics.fmean(values):.2%}" + ("" if error is None else f" ± {error:.2%}")


def write_figure(report: dict[str, Any], experiment: Experiment, output_dir: Path) -> None:
    """
    Writes `NAME.png`: curves over x, or a picture of samples; `NAME_per_class.png`, `NAME_best_classes.png` and
    `NAME_worst_classes.png` of classification accuracy scores; or nothing for an experiment that is only a table.
    """
    file = output_dir / f"{report['name']}.png"
    if experiment.images:
        samples_picture(report, output_dir).save(file)
    elif experiment.classification:
        classification = report["rows"][-1]["runs"][0]["classification"]
        folder = Path(classification["settings"]["output_dir"])
        for name in ("per_class", "best_classes", "worst_classes") if "compared_with" in classification else ():
            shutil.copy(folder / f"{name}.png", file.with_name(f"{report['name']}_{name}.png"))
    elif experiment.x_label is not None:
        curves(summarise(report), experiment, report["rows"][0]["runs"][0]["distance"]).savefig(file)


def curves(rows: list[dict[str, Any]], experiment: Experiment, distance: str) -> matplotlib.figure.Figure:
    """Distance to each split over x, a line for each group of rows, intervals as bars."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("train", "validation"), strict=True):
        for heading in dict.fromkeys(row["heading"] for row in rows):
            group = [row for row in rows if row["heading"] == heading and row["x"] is not None]
            x = [row["x"] for row in group]
            mean = [row["columns"][column]["mean"] for row in group]
            low, high = zip(*(row["columns"][column]["interval"] for row in group), strict=True) if group else ((), ())
            errors = [
                [value - end for value, end in zip(mean, low, strict=True)],
                [end - value for value, end in zip(mean, high, strict=True)],
            ]
            axes.errorbar(x, mean, yerr=errors, marker="o", capsize=3, label=heading or None)
        axes.set(xlabel=experiment.x_label, ylabel=f"{distance} vs {column}")
        if experiment.log_x:
            axes.set_xscale("log")
        if any(row["heading"] for row in rows):
            axes.legend(fontsize="small")
    figure.suptitle(experiment.title)
    return figure


def samples_picture(report: dict[str, Any], output_dir: Path) -> Image.Image:
    """A row of samples for each row of the table, the same images of the set in each."""
    cells = []
    for row in report["rows"]:
        samples = load_image_set(output_dir / "samples" / row["runs"][0]["samples"])
        cells += [samples[index]["image"] for index in range(min(NUM_SHOWN_IMAGES, len(samples)))]
    return grid_of(to_unit(to_float(torch.stack(cells))), len(cells) // len(report["rows"]))
