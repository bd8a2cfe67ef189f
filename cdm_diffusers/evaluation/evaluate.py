"""
Quality of a set of samples against real images: Frechet distance to the training and to the validation images,
Inception Score, precision and recall, kernel distance; each with an interval, and with what real images reach.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch.utils.data import Dataset

from ..data.averages import AreaAverages
from ..data.config import LabelledDataOptions
from ..data.image_sets import ImageSet, load_image_set
from ..data.memory import ImageSubset
from ..data.sources import open_images
from ..files import write_json
from ..training.config import check_at_least, check_is_no_folder, device_option, option, switch
from .features import ClassifierExtractor, FeatureExtractor, extract, load_extractor
from .metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    precision_recall,
)
from .recognition import wilson_interval
from .records import provenance
from .references import read_statistics, reference_features, reference_statistics


NUM_SPLITS = 10
# For intervals of 95%: half their width, in standard errors.
T_QUANTILE = float(stats.t.ppf(0.975, NUM_SPLITS - 1))
NORMAL_QUANTILE = float(stats.norm.ppf(0.975))


@dataclass(kw_only=True)
class EvaluateConfig(LabelledDataOptions):
    """
    Everything that can be said on the command line of `evaluation/evaluate.py`.

    Raises:
        ValueError: for a value out of its range.
    """

    samples: str = field(
        metadata={"help": "The samples: an npz file of the OpenAI evaluator, or a folder of PNGs or of sample.py."}
    )
    extractor: str = field(
        metadata={
            "help": "Network of the features: inception (the official FID network; or the path of its file, .pt), "
            "efficientnet-lite0, dinov2, dinov2:ID_OR_FOLDER, or the folder of a classifier."
        }
    )
    output: str = field(metadata={"help": "JSON file to write the figures to."})
    stage: str | None = option("A stage kept by sample.py, instead of its last one.")
    padding: int = option("Black pixels added on each side of real images (Fashion-MNIST, 28 to 32 pixels: 2).", 0)
    source_resolution: int | None = option(
        "Crop real images to this size and average them down to the samples'. Default: what a folder of sample.py "
        "says; crop to the samples' size where it says nothing."
    )
    num_images: int | None = option("Use so many samples, balanced over their labels. Default: all.")
    num_reference_images: int | None = option("Use so many real images of each split, drawn at random. Default: all.")
    num_neighbour_images: int = option("Precision and recall compare at most so many images of each kind.", 10_000)
    inception_score: bool | None = switch("Inception Score. Default: where the extractor has logits.")
    train_statistics: str | None = option(
        "Statistics of the training images from another cache, instead of computing."
    )
    eval_statistics: str | None = option("Statistics of the validation images, from another cache.")
    cache_dir: str = option("Folder for statistics and features of real images.", "~/.cache/cdm_diffusers")
    seed: int = option("Seed of what is drawn, and of splits.", 0)
    batch_size: int = option("Images per call of the extractor.", 100)
    device: str = device_option()

    def __post_init__(self):
        check_at_least(
            self,
            padding=0,
            source_resolution=1,
            num_images=2 * NUM_SPLITS,
            num_reference_images=2 * NUM_SPLITS,
            num_neighbour_images=2 * NUM_SPLITS,
            seed=0,
            batch_size=1,
        )
        check_is_no_folder(self, "output")
        if self.dataset_split == self.eval_split:
            raise ValueError(
                f"`dataset_split` and `eval_split` are both {self.eval_split!r}; they must differ. Parts of one split "
                "of a Hub data set are named like train[:90%] and train[90%:]."
            )


@dataclass
class Reference:
    """
    Args:
        split: its name.
        fingerprint: of its images.
        statistics: of the features of all its images.
        features, logits: of images drawn from it, (M, D) and (M, K) or None.
    """

    split: str
    fingerprint: str
    statistics: FeatureStatistics
    features: torch.Tensor
    logits: torch.Tensor | None


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """
    Measures the samples, writes `config.output` and prints a table.

    Returns:
        `dict`: what is in `config.output`.

    Raises:
        ValueError: too few images for a statistic, or samples, data and extractor that do not fit each other.
    """
    extractor = load_extractor(config.extractor, config.device)
    samples = load_image_set(config.samples, config.stage)
    config = dataclasses.replace(config, source_resolution=config.source_resolution or samples.source_resolution)
    drawn = draw_samples(samples, config)
    check_labels(samples, extractor)
    features, logits = extract(extractor, drawn, config.batch_size, config.device)
    if config.inception_score and logits is None:
        raise ValueError(f"`inception_score` needs logits, and {extractor.name} has none: take another extractor.")

    datasets = {split: open_split(config, split, samples) for split in (config.dataset_split, config.eval_split)}
    references = [
        open_reference(config, split, dataset, statistics, len(drawn), extractor)
        for (split, dataset), statistics in zip(
            datasets.items(), (config.train_statistics, config.eval_statistics), strict=True
        )
    ]
    figures = {}
    for reference, other in zip(references, reversed(references), strict=True):
        figures[reference.split] = compare(features, other.features, reference, config)
    if logits is not None and config.inception_score is not False:
        figures["inception_score"] = {**score(logits, config), "real": score(references[1].logits, config)}
    report = {
        "extractor": extractor.name,
        "distance": extractor.distance_name,
        "num_features": features.shape[1],
        "samples": describe_samples(samples, drawn),
        "references": {
            reference.split: {"fingerprint": reference.fingerprint, "num_images": reference.statistics.count}
            for reference in references
        },
        "figures": figures,
        "warnings": list_warnings(samples, drawn, references),
        "settings": dataclasses.asdict(config),
        **provenance("torch", "diffusers", "transformers", "datasets", "numpy"),
    }
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(config.output), report)
    print(table(report))
    return report


# ------------------------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------------------------


def draw_samples(samples: ImageSet, config: EvaluateConfig) -> ImageSubset:
    """
    `num_images` of the samples in random order, as many of each label as can be.

    Raises:
        ValueError: there are too few.
    """
    count = len(samples) if config.num_images is None else config.num_images
    if not 2 * NUM_SPLITS <= count <= len(samples):
        raise ValueError(
            f"`samples` {samples.source!r} holds {len(samples)} images, and "
            + (f"`num_images` asks for {count}." if count > len(samples) else f"{2 * NUM_SPLITS} are the least.")
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(config.seed))
    if samples.labels is not None:
        # The first of every label come first, then the second of every label, ...
        rank = torch.zeros_like(order)
        for label in samples.labels.unique():
            of_label = samples.labels[order] == label
            rank[of_label] = torch.arange(of_label.sum())
        order = order[rank.argsort(stable=True)]
    return ImageSubset(samples, order[:count].tolist())


def check_labels(samples: ImageSet, extractor: FeatureExtractor) -> None:
    """
    Raises:
        ValueError: the samples have labels that the extractor, a classifier, does not know.
    """
    if samples.labels is not None and isinstance(extractor, ClassifierExtractor):
        num_labels = extractor.network.config.num_labels
        unknown = samples.labels[(samples.labels < 0) | (samples.labels >= num_labels)].unique().tolist()
        if unknown:
            raise ValueError(
                f"`samples` {samples.source!r} has the labels {unknown[:10]}, and {extractor.label} "
                f"knows 0..{num_labels - 1}: they are of other classes."
            )


def open_split(config: EvaluateConfig, split: str, samples: ImageSet) -> Dataset:
    """Real images of the samples' size."""
    resolution = config.source_resolution or samples.size
    data_config = config.split_config(
        split,
        source_resolution=resolution,
        num_channels=samples.channels,
        padding=config.padding,
        class_conditional=False,
    )
    dataset = open_images(data_config).dataset
    if config.num_reference_images is not None and config.num_reference_images > len(dataset):
        raise ValueError(
            f"`num_reference_images` is {config.num_reference_images}, and the split {split!r} has only "
            f"{len(dataset)} images."
        )
    return dataset if resolution == samples.size else AreaAverages(dataset, samples.size)


def open_reference(
    config: EvaluateConfig,
    split: str,
    dataset: Dataset,
    statistics_file: str | None,
    count: int,
    extractor: FeatureExtractor,
) -> Reference:
    """The statistics of a split, and the features of `count` images (or all, if fewer) drawn from it."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed)).tolist()
    if config.num_reference_images is not None:
        dataset = ImageSubset(dataset, order[: config.num_reference_images])
        order = range(len(dataset))
    options = {"batch_size": config.batch_size, "device": config.device}
    drawn = ImageSubset(dataset, list(order[:count]))
    features, logits = reference_features(drawn, extractor, config.cache_dir, **options)
    if statistics_file is not None:
        statistics = read_statistics(statistics_file, dataset, extractor)
    elif len(drawn) == len(dataset):
        statistics = FeatureStatistics.from_features(features)
    else:
        statistics = reference_statistics(dataset, extractor, config.cache_dir, **options)
    return Reference(split, dataset.fingerprint(), statistics, features, logits)


def describe_samples(samples: ImageSet, drawn: ImageSubset) -> dict[str, Any]:
    description = {
        "source": samples.source,
        "fingerprint": samples.fingerprint(),
        "size": samples.size,
        "channels": samples.channels,
        "num_images": len(drawn),
        "drawn_from": len(samples),
    }
    if samples.labels is not None:
        counts = samples.labels[drawn.indices].unique(return_counts=True)[1]
        description |= {"num_labels": len(counts), "images_per_label": [counts.min().item(), counts.max().item()]}
    return description


# ------------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------------


def compare(
    features: torch.Tensor, other: torch.Tensor, reference: Reference, config: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    """
    Distances of the samples from a reference, each with the same figure of real images: those of the other split.

    Args:
        features: of the samples, (N, D).
        other: of real images of the other split, (M, D), M at most N.
    """
    of_samples, floor = (distances(candidates, reference, config) for candidates in (features, other))
    return {name: {**figure, "real": floor[name]} for name, figure in of_samples.items()}


def distances(features: torch.Tensor, reference: Reference, config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Frechet distance, precision, recall and kernel distance of `features` (N, D) from the reference, with counts."""
    counts = {"num_images": len(features), "num_reference_images": reference.statistics.count}
    value = frechet_distance(FeatureStatistics.from_features(features), reference.statistics)
    error = frechet_standard_error(reference.statistics, features)
    figures = {"frechet_distance": {"value": value, "interval": around(value, NORMAL_QUANTILE * error), **counts}}

    count = min(len(features), len(reference.features), config.num_neighbour_images)
    generated, real = (f[:count].to(config.device) for f in (features, reference.features))
    counts = {"num_images": count, "num_reference_images": count}
    for name, share in zip(("precision", "recall"), precision_recall(real, generated), strict=True):
        figures[name] = {"value": share, "interval": wilson_interval(share, count), **counts}

    mean, deviation = kernel_distance(real, generated, NUM_SPLITS, generator=splits_generator(config))
    figures["kernel_distance"] = over_splits(mean, deviation) | counts
    return figures


def score(logits: torch.Tensor, config: EvaluateConfig) -> dict[str, Any]:
    mean, deviation = inception_score(logits, NUM_SPLITS, generator=splits_generator(config))
    return {**over_splits(mean, deviation), "num_images": len(logits)}


def splits_generator(config: EvaluateConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)


def over_splits(mean: float, deviation: float) -> dict[str, Any]:
    interval = around(mean, T_QUANTILE * deviation / NUM_SPLITS**0.5)
    return {"value": mean, "deviation": deviation, "interval": interval}


def around(value: float, half_width: float) -> list[float]:
    return [value - half_width, value + half_width]


# ------------------------------------------------------------------------------------------------------------------
# What is shown
# ------------------------------------------------------------------------------------------------------------------


def list_warnings(samples: ImageSet, drawn: ImageSubset, references: list[Reference]) -> list[str]:
    """What a reader of the figures must know."""
    warnings = []
    num_features = references[0].features.shape[1]
    if len(drawn) <= num_features:
        warnings.append(
            f"{len(drawn):,} samples are no more than the {num_features:,} features: their covariance is singular and "
            "the Frechet distance far too large. It compares only with distances of as many images."
        )
    if len(drawn) < len(samples):
        warnings.append(
            f"{len(drawn):,} of {len(samples):,} samples were drawn"
            + ("." if samples.labels is None else ", balanced over their labels.")
        )
    for reference in references:
        if reference.statistics.count <= num_features:
            warnings.append(
                f"{reference.statistics.count:,} images of split {reference.split!r} are no more than the "
                f"{num_features:,} features: their covariance is singular."
            )
        if len(reference.features) < len(drawn):
            warnings.append(
                f"Split {reference.split!r} has only {len(reference.features):,} images for {len(drawn):,} samples: "
                "what real images reach was measured on so many."
            )
    return warnings


def table(report: dict[str, Any]) -> str:
    """The report in markdown."""
    samples, figures = report["samples"], report["figures"]
    names = {
        "frechet_distance": report["distance"],
        "precision": "precision",
        "recall": "recall",
        "kernel_distance": "kernel distance",
    }
    lines = [
        f"Extractor: {report['extractor']}. {samples['num_images']:,} samples of {samples['source']}, "
        f"{samples['size']}x{samples['size']}.",
        "",
        "| figure | samples | 95% interval | real images | images: samples / real / reference |",
        "|---|---|---|---|---|",
    ]
    for split, of_split in figures.items():
        if split != "inception_score":
            lines += [row(f"{names[name]}, {split!r}", figure) for name, figure in of_split.items()]
    if "inception_score" in figures:
        lines.append(row("Inception Score", figures["inception_score"]))
    lines += [""] + [f"- {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def row(name: str, figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    counts = [figure["num_images"], figure["real"]["num_images"]]
    if "num_reference_images" in figure:
        counts.append(figure["num_reference_images"])
    return (
        f"| {name} | {figure['value']:.4g} | {low:.4g} to {high:.4g} | {figure['real']['value']:.4g} "
        f"| {' / '.join(f'{count:,}' for count in counts)} |"
    )
