"""
Classification Accuracy Score (Ravuri and Vinyals, 2019; Section 4 and Table 1b of the paper): how well a classifier
recognises real images that was trained on nothing but samples, beside the same classifier trained on real images.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib.figure
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..data.averages import AreaAverages
from ..data.config import LabelledDataOptions
from ..data.image_sets import ImageSet, load_image_set
from ..data.labels import check_same_classes
from ..data.memory import ImageData, ImageSubset
from ..data.pictures import grid_of
from ..data.sources import open_images
from ..data.transforms import to_float, to_unit
from ..files import write_json
from ..training.config import check_at_least, option
from .classifier import ClassifierConfig, ClassifierRecipe, fit_classifier
from .records import check_same_settings, digest
from .sample import open_state


REPORT_NAME = "classification_accuracy_score.json"

# Options with no influence on an accuracy; what is at these places counts by its content.
MAY_CHANGE = (
    "samples",
    "output_dir",
    "train_data_dir",
    "num_seeds",
    "real",
    "num_shown_classes",
    "num_shown_images",
    "eval_batch_size",
    "dataloader_num_workers",
)


@dataclass(kw_only=True)
class ClassificationAccuracyConfig(LabelledDataOptions, ClassifierRecipe):
    """
    Everything that can be said on the command line of `evaluation/classification_accuracy_score.py`.

    Raises:
        ValueError: for a value out of its range.
    """

    samples: str = field(metadata={"help": "npz file, folder of PNGs, or --output_dir of evaluation/sample.py."})
    output_dir: str = field(metadata={"help": f"Folder for {REPORT_NAME}, the classifiers and the pictures."})
    stage: str | None = option("Of an output_dir of sample.py: a stage that was kept. Default: the last one.")
    padding: int = option("Black pixels added on each side before cropping (Fashion-MNIST, 28 to 32 pixels: 2).", 0)
    source_resolution: int | None = option(
        "Resolution of the centre crop that real images are averaged down from. Default: what a folder of sample.py "
        "says; that of the samples where it says nothing."
    )
    num_seeds: int = option("Trainings of each kind, with the seeds 0, 1, ...; means have a standard error from 2.", 3)
    real: Literal["same", "all", "both", "none"] = option(
        "Real images to train on for comparison: as many of each class as there are samples, all, both, or none.",
        "same",
    )
    num_shown_classes: int = option("Classes in each of the pictures of the best and of the worst.", 6)
    num_shown_images: int = option("Samples, and real images, of each class in these pictures.", 8)

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, num_seeds=1, num_shown_classes=1, num_shown_images=1)

    def classifier_config(self, samples: ImageSet, output_dir: Path, seed: int) -> ClassifierConfig:
        """One training."""
        shared = {f.name for f in dataclasses.fields(ClassifierConfig)} & {f.name for f in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in shared - {"output_dir"}}
        size = {"image_size": samples.size, "num_channels": samples.channels}
        return ClassifierConfig(**given, **size, output_dir=str(output_dir), seed=seed)


def classification_accuracy_score(config: ClassificationAccuracyConfig) -> dict[str, Any]:
    """
    Trains on samples and on real images, with every seed, and measures on the real images of `config.eval_split`.
    What is finished is kept in the report of `config.output_dir`, and not trained again.

    Returns:
        `dict`: the report: "runs" with the accuracies of every training, and `summary` of them.

    Raises:
        ValueError: samples and data do not fit each other, or `output_dir` holds the report of other settings.
    """
    state = open_state()
    samples = load_image_set(config.samples, config.stage)
    real, test = open_real(config, samples)
    samples.use_labels_of(real.id2label)
    if samples.id2label is not None:
        check_same_classes(f"`samples` ({samples.source})", samples.id2label, real.id2label)
    check_labels(samples, real.id2label)
    output_dir = Path(config.output_dir)
    report = open_report(output_dir / REPORT_NAME, settings_of(config, samples, real.dataset, test))
    sources = training_sets(config, samples, real)
    output_dir.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()  # all processes have read the report before one changes it
    for seed in range(config.num_seeds):
        for name, data in sources.items():
            runs = report["runs"].setdefault(name, {})
            if str(seed) in runs:
                continue
            training = config.classifier_config(samples, output_dir / f"{name}-{seed}", seed)
            results = fit_classifier(training, data, test)
            runs[str(seed)] = {key: value for key, value in results.items() if key != "config"}
            report |= summary(report["runs"])
            if state.is_main_process:
                write_json(output_dir / REPORT_NAME, report)
    if state.is_main_process:
        if "gain_over_real" in report:
            draw_report(report, config, samples, real)
        print(report_table(report, config.eval_split))
    return report


# ------------------------------------------------------------------------------------------------------------------
# Samples, real images, and what was measured before
# ------------------------------------------------------------------------------------------------------------------


def open_real(config: ClassificationAccuracyConfig, samples: ImageSet) -> tuple[ImageData, Dataset]:
    """Training split and test images, at the size of the samples."""
    resolution = config.source_resolution or samples.source_resolution or samples.size
    if resolution % samples.size:
        raise ValueError(
            f"`source_resolution` is {resolution}, but the samples ({samples.source}) are {samples.size}x"
            f"{samples.size}, which does not divide it: give a multiple, or leave it out."
        )
    data_config = config.data_config(resolution, samples.channels, config.padding)
    train = open_images(data_config)
    test = open_images(dataclasses.replace(data_config, dataset_split=config.eval_split))
    check_same_classes(f"the split {config.eval_split!r}", test.id2label, train.id2label)
    if resolution == samples.size:
        return train, test.dataset
    averaged = AreaAverages(train.dataset, samples.size)
    return ImageData(averaged, train.id2label), AreaAverages(test.dataset, samples.size)


def check_labels(samples: ImageSet, id2label: dict[int, str]) -> None:
    """
    Raises:
        ValueError: samples have no labels, labels that the data does not have, or none of some class.
    """
    if samples.labels is None:
        raise ValueError(f"`samples` ({samples.source}) have no labels: a classifier cannot be trained on them.")
    found = set(samples.labels.unique().tolist())
    unknown = sorted(found - id2label.keys())
    if unknown:
        raise ValueError(
            f"`samples` ({samples.source}) have the labels {unknown[:10]}, but the data has {len(id2label)} classes, "
            f"0..{len(id2label) - 1}: --label_names gives all names where some do not occur."
        )
    missing = [name for label, name in id2label.items() if label not in found]
    if missing:
        raise ValueError(
            f"`samples` ({samples.source}) have no image of {len(missing)} of {len(id2label)} classes "
            f"({', '.join(missing[:10])}), which a classifier then cannot know: sample all classes."
        )


def settings_of(
    config: ClassificationAccuracyConfig, samples: ImageSet, train: Dataset, test: Dataset
) -> dict[str, Any]:
    """What decides the accuracies, and what does not, as JSON has it."""
    settings = dataclasses.asdict(config) | {"samples_fingerprint": samples.fingerprint()}
    settings["data"] = {
        split: digest([dataset.fingerprint(), dataset.labels.tolist()])
        for split, dataset in ((config.dataset_split, train), (config.eval_split, test))
    }
    settings |= {"num_samples": len(samples), "image_size": samples.size, "num_channels": samples.channels}
    return json.loads(json.dumps(settings))


def open_report(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """
    A new report, or what an earlier call with the same settings has written.

    Raises:
        ValueError: the settings differ in what decides the accuracies.
    """
    if not file.is_file():
        return {"settings": settings, "runs": {}}
    report = json.loads(file.read_text())
    holder = "`output_dir` holds the report of other settings"
    check_same_settings(report["settings"], settings, holder, "Give another `output_dir`.", MAY_CHANGE)
    return {**report, "settings": settings}


def training_sets(config: ClassificationAccuracyConfig, samples: ImageSet, real: ImageData) -> dict[str, ImageData]:
    """What classifiers are trained on, by name."""
    sets = {"samples": ImageData(samples, real.id2label)}
    if config.real in ("same", "both"):
        indices = same_counts(real.dataset.labels, samples.labels)
        sets["real"] = ImageData(ImageSubset(real.dataset, indices), real.id2label)
    if config.real in ("all", "both"):
        sets["all_real"] = real
    return sets


def same_counts(labels: torch.Tensor, wanted: torch.Tensor) -> list[int]:
    """Indices into `labels` (N,), drawn without replacement, with as many of each class as `wanted` (M,) has."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    indices = []
    for label, count in zip(*wanted.unique(return_counts=True), strict=True):
        of_class = order[labels[order] == label]
        if len(of_class) < count:
            raise ValueError(
                f"there are {count} samples of class {label}, but only {len(of_class)} real training images: use "
                "`real=all`, or fewer samples."
            )
        indices += of_class[:count].tolist()
    return sorted(indices)


# ------------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------------


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """
    Means over seeds, with standard errors, and classes by how much better samples train them than real images
    (the first of "real" and "all_real" that there is).
    """
    result = {"accuracies": {name: over_seeds(list(of_seeds.values())) for name, of_seeds in runs.items() if of_seeds}}
    compared = next((name for name in ("real", "all_real") if name in result["accuracies"]), None)
    if compared is None:
        return result
    of_samples, of_real = (result["accuracies"][name] for name in ("samples", compared))
    gain = {
        name: accuracy - of_real["per_class"][name]
        for name, accuracy in of_samples["per_class"].items()
        if accuracy is not None
    }
    ranked = sorted(gain, key=gain.get, reverse=True)
    return result | {
        "compared_with": compared,
        "share_of_real_top_1": of_samples["top_1"]["mean"] / of_real["top_1"]["mean"],
        "classes_where_samples_beat_real": sum(difference > 0 for difference in gain.values()),
        "num_classes": len(gain),
        "gain_over_real": {name: gain[name] for name in ranked},
    }


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error (None of a single one) of several trainings."""
    figures = {}
    for name in ("top_1", "top_5"):
        values = torch.tensor([result[name] for result in results], dtype=torch.float64)
        error = None if len(values) < 2 else (values.std() / math.sqrt(len(values))).item()
        figures[name] = {"mean": values.mean().item(), "standard_error": error}
    per_class = {}
    for name in results[0]["per_class"]:
        values = [result["per_class"][name] for result in results]
        per_class[name] = None if values[0] is None else sum(values) / len(values)
    shared = {key: results[0][key] for key in ("num_images", "num_train_images")}
    return {**figures, "per_class": per_class, "num_seeds": len(results), **shared}


def report_table(report: dict[str, Any], eval_split: str) -> str:
    """Table 1b in markdown."""

    def cell(figure: dict[str, Any]) -> str:
        error = figure["standard_error"]
        return f"{figure['mean']:.2%}" + ("" if error is None else f" ± {error:.2%}")

    rows = report["accuracies"]
    lines = [
        f"| trained on | images | seeds | top-1 on {rows['samples']['num_images']:,} of {eval_split!r} | top-5 |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        counts = f"{row['num_train_images']:,} | {row['num_seeds']}"
        lines.append(f"| {name} | {counts} | {cell(row['top_1'])} | {cell(row['top_5'])} |")
    if "compared_with" in report:
        lines += [
            "",
            f"{report['share_of_real_top_1']:.1%} of the top-1 accuracy of {report['compared_with']!r}; better than "
            f"it on {report['classes_where_samples_beat_real']} of {report['num_classes']} classes.",
        ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------
# Pictures: Figures 7, 11 and 12
# ------------------------------------------------------------------------------------------------------------------


def draw_report(
    report: dict[str, Any], config: ClassificationAccuracyConfig, samples: ImageSet, real: ImageData
) -> None:
    """per_class.png, best_classes.png and worst_classes.png in `config.output_dir`."""
    folder = Path(config.output_dir)
    accuracies = report["accuracies"]
    per_class_figure(accuracies["samples"], accuracies[report["compared_with"]]).savefig(folder / "per_class.png")
    ranked, label_of = list(report["gain_over_real"]), {name: label for label, name in real.id2label.items()}
    count = min(config.num_shown_classes, len(ranked))
    for name, shown in (("best", ranked[:count]), ("worst", ranked[: -count - 1 : -1])):
        labels = [label_of[class_name] for class_name in shown]
        picture = class_rows(samples, real.dataset, labels, config.num_shown_images)
        picture.save(folder / f"{name}_classes.png")


def per_class_figure(of_samples: dict[str, Any], of_real: dict[str, Any]) -> matplotlib.figure.Figure:
    """Figure 7: each class's accuracy after training on real images and on samples, and one against the other."""
    pairs = [
        (of_real["per_class"][name], accuracy)
        for name, accuracy in of_samples["per_class"].items()
        if accuracy is not None
    ]
    pairs = torch.tensor(sorted(pairs), dtype=torch.float64)
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    ranked, scatter = figure.subplots(1, 2)
    ranked.plot(pairs[:, 0], ".-", color="tab:blue", label="real")
    ranked.plot(pairs[:, 1], ".", color="tab:red", label="samples")
    ranked.set(xlabel="classes, by their accuracy on real data", ylabel="top-1 accuracy", ylim=(0, 1.02))
    ranked.legend()
    scatter.plot([0, 1], [0, 1], color="grey", linewidth=1)
    scatter.plot(pairs[:, 0], pairs[:, 1], ".", color="tab:red")
    better = int((pairs[:, 1] > pairs[:, 0]).sum())
    scatter.set(
        xlabel="trained on real images",
        ylabel="trained on samples",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
        aspect="equal",
        title=f"samples are better on {better} of {len(pairs)} classes",
    )
    return figure


def class_rows(samples: ImageSet, real: Dataset, labels: list[int], count: int) -> Image.Image:
    """A row for each of `labels`: `count` samples, a black column, and as many real images."""
    cells = []
    for label in labels:
        for dataset in (samples, real):
            indices = (dataset.labels == label).nonzero().flatten()[:count].tolist()
            images = [dataset[index]["image"] for index in indices]
            cells += images + [torch.zeros_like(images[0])] * (count - len(images))
            if dataset is samples:
                cells.append(torch.zeros_like(images[0]))
    return grid_of(to_unit(to_float(torch.stack(cells))), 2 * count + 1)
