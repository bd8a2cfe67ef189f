"""
Classification Accuracy Score (Ravuri and Vinyals, 2019; Section 4 and Table 1b of the paper): how well a classifier
trained on nothing but samples recognises real images, beside the same classifier trained on real images.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from diffusers.utils import logging
from PIL import Image
from torch.utils.data import Dataset

from ..data.image_sets import ImageSet, load_image_set
from ..data.labels import check_same_classes
from ..data.memory import ImageData, ImageSubset
from ..data.pictures import grid_of
from ..data.splits import open_splits
from ..data.transforms import to_float, to_unit
from ..files import write_json
from ..processes import ending_together, open_state
from .classifier import fit_classifier
from .config import ClassificationAccuracyConfig, ClassifierConfig
from .intervals import mean_and_error
from .records import digest, open_report
from .sample import how_to_go_on
from .tables import classification_accuracy_table


if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)
REPORT_NAME = "classification_accuracy_score.json"

# Options with no influence on an accuracy; data at these paths counts by its content.
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


def classification_accuracy_score(config: ClassificationAccuracyConfig) -> dict[str, Any]:
    """
    Trains on samples and on real images, with every seed, and measures on the real images of `config.eval_split`.
    What is finished is kept in the report of `config.output_dir`, and not trained again.

    Returns:
        `dict`: the report: "runs" with the accuracies of every training, and `summary` of them.

    Raises:
        ValueError: samples and data do not fit each other, or `output_dir` holds the report of other settings.
    """
    state, output_dir = open_state(), Path(config.output_dir)
    with ending_together(state, lambda: how_to_go_on(output_dir)):
        return score_together(config, output_dir, state)


def score_together(config: ClassificationAccuracyConfig, output_dir: Path, state: PartialState) -> dict[str, Any]:
    """[`classification_accuracy_score`] by processes that end together."""
    samples = load_image_set(config.samples, config.stage)
    resolution = config.source_resolution or samples.source_resolution or samples.size
    data_config = config.data_config(resolution, samples.channels, config.padding)
    real, test = open_splits(data_config, config.eval_split, samples.size)
    samples.use_labels_of(real.id2label)
    if samples.id2label is not None:
        check_same_classes(f"`samples` ({samples.source})", samples.id2label, real.id2label)
    check_labels(samples, real.id2label)
    if len(samples) != len(real.dataset):
        logger.warning(
            f"`samples` ({samples.source}) are {len(samples):,} images; the score is defined for as many as the "
            f"training split has, {len(real.dataset):,}: compare it only with scores of as many samples."
        )
    settings = training_settings(config, samples, real.dataset, test.dataset)
    report = open_report(output_dir / REPORT_NAME, settings, {"runs": {}}, "output_dir", MAY_CHANGE)
    sources = training_sets(config.real, samples, real)
    output_dir.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()  # all processes have read the report before one changes it
    for seed in range(config.num_seeds):
        for name, data in sources.items():
            runs = report["runs"].setdefault(name, {})
            if str(seed) in runs:
                continue
            training = classifier_config(config, samples, output_dir / f"{name}-{seed}", seed)
            results = fit_classifier(training, data, test.dataset)
            runs[str(seed)] = {key: value for key, value in results.items() if key != "config"}
            report |= summary(report["runs"])
            if state.is_main_process:
                write_json(output_dir / REPORT_NAME, report)
    if state.is_main_process:
        if "gain_over_real" in report:
            draw_report(report, output_dir, samples, real, config.num_shown_classes, config.num_shown_images)
        print(classification_accuracy_table(report, config.eval_split))
    return report


# ------------------------------------------------------------------------------------------------------------------
# Samples, real images, and what was measured before
# ------------------------------------------------------------------------------------------------------------------


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


def training_settings(
    config: ClassificationAccuracyConfig, samples: ImageSet, train: Dataset, test: Dataset
) -> dict[str, Any]:
    """What decides the accuracies, and what does not."""
    settings = dataclasses.asdict(config) | {"samples_fingerprint": samples.fingerprint()}
    settings["data"] = {
        split: digest([dataset.fingerprint(), dataset.labels.tolist()])
        for split, dataset in ((config.dataset_split, train), (config.eval_split, test))
    }
    return settings | {"num_samples": len(samples), "image_size": samples.size, "num_channels": samples.channels}


def classifier_config(
    config: ClassificationAccuracyConfig, samples: ImageSet, output_dir: Path, seed: int
) -> ClassifierConfig:
    """One training."""
    shared = {f.name for f in dataclasses.fields(ClassifierConfig)} & {f.name for f in dataclasses.fields(config)}
    given = {name: getattr(config, name) for name in shared - {"output_dir"}}
    size = {"image_size": samples.size, "num_channels": samples.channels}
    return ClassifierConfig(**given, **size, output_dir=str(output_dir), seed=seed)


def training_sets(compared: str, samples: ImageSet, real: ImageData) -> dict[str, ImageData]:
    """What classifiers are trained on, by name: samples, and the real images that `real` of the options names."""
    sets = {"samples": ImageData(samples, real.id2label)}
    if compared in ("same", "both"):
        indices = same_counts(real.dataset.labels, samples.labels)
        sets["real"] = ImageData(ImageSubset(real.dataset, indices), real.id2label)
    if compared in ("all", "both"):
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
    figures = {name: mean_and_error([result[name] for result in results]) for name in ("top_1", "top_5")}
    per_class = {}
    for name in results[0]["per_class"]:
        values = [result["per_class"][name] for result in results]
        per_class[name] = None if values[0] is None else sum(values) / len(values)
    shared = {key: results[0][key] for key in ("num_images", "num_train_images")}
    return {**figures, "per_class": per_class, "num_seeds": len(results), **shared}


# ------------------------------------------------------------------------------------------------------------------
# Pictures: Figures 7, 11 and 12
# ------------------------------------------------------------------------------------------------------------------


def draw_report(
    report: dict[str, Any], folder: Path, samples: ImageSet, real: ImageData, num_classes: int, num_images: int
) -> None:
    """per_class.png; and best_classes.png and worst_classes.png, `num_images` of each kind and class, in `folder`."""
    accuracies = report["accuracies"]
    per_class_figure(accuracies["samples"], accuracies[report["compared_with"]]).savefig(folder / "per_class.png")
    ranked, label_of = list(report["gain_over_real"]), {name: label for label, name in real.id2label.items()}
    count = min(num_classes, len(ranked))
    for name, shown in (("best", ranked[:count]), ("worst", ranked[: -count - 1 : -1])):
        labels = [label_of[class_name] for class_name in shown]
        class_rows(samples, real.dataset, labels, num_images).save(folder / f"{name}_classes.png")


def per_class_figure(of_samples: dict[str, Any], of_real: dict[str, Any]) -> "Figure":
    """Figure 7: each class's accuracy after training on real images and on samples, and one against the other."""
    pairs = [
        (of_real["per_class"][name], accuracy)
        for name, accuracy in of_samples["per_class"].items()
        if accuracy is not None
    ]
    pairs = torch.tensor(sorted(pairs), dtype=torch.float64)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
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
