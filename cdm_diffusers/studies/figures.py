"""An experiment's results as a figure."""

import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..data.image_sets import load_image_set
from ..data.pictures import grid_of
from ..data.transforms import to_float, to_unit
from ..evaluation.sample_store import LowResImages
from .experiments import GOOD, TRAIN, WEAK, AugmentationExperiment, Experiment
from .reports import figure_of, summarise


if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_SHOWN_IMAGES = 16
NUM_EXPLAINED_IMAGES = 10  # of each base, in the picture of an augmentation experiment


def write_figure(report: dict[str, Any], experiment: Experiment, output_dir: Path) -> None:
    """
    Writes `NAME.png`: curves over x, or a picture of samples; `NAME_per_class.png`, `NAME_best_classes.png` and
    `NAME_worst_classes.png` of classification accuracy scores; `NAME_samples.png` beside the curves of an augmentation
    experiment; or nothing for an experiment that is only a table.
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
        save_curves(report, experiment, file)
        if isinstance(experiment, AugmentationExperiment):
            save_explanation(report, experiment, output_dir, file.with_name(f"{report['name']}_samples.png"))


def save_curves(report: dict[str, Any], experiment: Experiment, file: Path) -> None:
    """Distance to each split over x, a line for each group of rows, intervals as bars."""
    from matplotlib.figure import Figure

    rows = [row for row in summarise(report) if row["x"] is not None]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("train", "validation"), strict=True):
        for heading in dict.fromkeys(row["heading"] for row in rows):
            group = [row for row in rows if row["heading"] == heading]
            figures = [row["columns"][column] for row in group]
            mean = [figure["mean"] for figure in figures]
            below = [figure["mean"] - figure["interval"][0] for figure in figures]
            above = [figure["interval"][1] - figure["mean"] for figure in figures]
            x = [row["x"] for row in group]
            axes.errorbar(x, mean, yerr=[below, above], marker="o", capsize=3, label=heading or None)
        axes.set(xlabel=experiment.x_label, ylabel=distance_label(rows, column))
        if experiment.log_x:
            axes.set_xscale("log")
        if any(row["heading"] for row in report["rows"]):
            axes.legend(fontsize="small")
    figure.suptitle(experiment.title)
    figure.savefig(file)


def distance_label(rows: list[dict[str, Any]], column: str) -> str:
    """The label of an axis."""
    return f"{rows[0]['runs'][0]['distance']} vs {column}"


def save_explanation(report: dict[str, Any], experiment: AugmentationExperiment, output_dir: Path, file: Path) -> None:
    """
    The first samples of a good and of a weak base with the smallest s, the one that was chosen most often with the
    weak base, and the largest, each once; beside the curves of both and of real images.
    """
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["heading"] in (GOOD, WEAK, TRAIN)]
    chosen = Counter(s for half in report["comparisons"][0]["baselines"][0]["chosen"] for s in half)
    levels = dict.fromkeys((experiment.levels[0], chosen.most_common(1)[0][0], experiment.levels[-1]))
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    pictures, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    names, cells = [], []
    for heading in (GOOD, WEAK):
        samples = {row["x"]: row["runs"][0]["samples"] for row in rows if row["heading"] == heading}
        names += [f"{heading}:\nwhat the stage gets", *(f"what it makes,\ns = {level}" for level in levels)]
        cells += explained_cells(output_dir, report["inputs"][heading], [samples[level] for level in levels])
    picture = grid_of(torch.cat(cells), len(cells[0]))
    pictures.imshow(picture)
    height = picture.height / len(cells)
    pictures.set(xticks=[], yticks=[height * (place + 0.5) for place in range(len(cells))], yticklabels=names)
    draw_trainings(curves, rows)
    curves.set(xlabel=experiment.x_label, ylabel=distance_label(rows, "train"))
    curves.legend()
    figure.savefig(file)


def draw_trainings(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    """Distances from the training images over x: for each group of rows a thin line per training, and their mean."""
    for number, heading in enumerate(dict.fromkeys(row["heading"] for row in rows)):
        group = [row for row in rows if row["heading"] == heading]
        x = [row["x"] for row in group]
        values = [[figure_of(run, "train")["value"] for run in row["runs"]] for row in group]
        axes.plot(x, values, color=f"C{number}", linewidth=0.7, alpha=0.5)
        axes.plot(x, list(map(statistics.fmean, values)), color=f"C{number}", marker="o", label=heading)


def explained_cells(output_dir: Path, low_res: str, samples: list[str]) -> list[torch.Tensor]:
    """The first low-resolution images (B, C, H, W) in [0, 1], enlarged, and what was made of them."""
    sets = [load_image_set(output_dir / "samples" / name) for name in samples]
    indices = torch.arange(min(NUM_EXPLAINED_IMAGES, len(sets[0])))
    made = [to_unit(to_float(torch.stack([images[index]["image"] for index in indices]))) for images in sets]
    given = LowResImages(output_dir / low_res)[indices]
    return [torch.nn.functional.interpolate(given, made[0].shape[-2:], mode="nearest"), *made]


def samples_picture(report: dict[str, Any], output_dir: Path) -> Image.Image:
    """A row of samples for each row of the table, the same images of the set in each."""
    cells = []
    for row in report["rows"]:
        samples = load_image_set(output_dir / "samples" / row["runs"][0]["samples"])
        cells += [samples[index]["image"] for index in range(min(NUM_SHOWN_IMAGES, len(samples)))]
    return grid_of(to_unit(to_float(torch.stack(cells))), len(cells) // len(report["rows"]))
