"""
Quality of a set of samples against real images: Frechet distance to the training and to the validation images,
Inception Score, precision and recall, kernel distance; each with an interval, and with what real images reach.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data.image_sets import ImageSet, load_image_set
from ..data.memory import ImageSubset
from ..data.splits import open_splits
from ..files import write_json
from ..processes import ending_together, from_main, open_state
from .config import MEASURABLE, NUM_SPLITS, EvaluateConfig
from .features import (
    ClassifierExtractor,
    FeatureExtractor,
    extract,
    load_extractor,
    read_statistics,
    reference_features,
    reference_statistics,
)
from .intervals import interval_of_mean, normal_interval, wilson_interval
from .metrics import (
    FeatureStatistics,
    extrapolated_frechet_distance,
    frechet_distance,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    polynomial_kernel,
    precision_recall,
    rbf_kernel,
)
from .records import provenance
from .tables import quality_table


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
    Measures the samples, with any number of processes, writes `config.output` and prints a table.

    Returns:
        `dict`: what is in `config.output`.

    Raises:
        ValueError: too few images for a statistic, or samples, data and extractor that do not fit each other.
    """
    state = open_state()
    with ending_together(state):
        with state.main_process_first():  # it may download
            extractor = load_extractor(config.extractor, config.device)
        samples = load_image_set(config.samples, config.stage)
        config = dataclasses.replace(config, source_resolution=config.source_resolution or samples.source_resolution)
        drawn = draw_samples(samples, config.num_images, config.seed)
        check_labels(samples, extractor)
        features, logits = extract(extractor, drawn, config.batch_size, config.device)
        if config.inception_score and logits is None:
            raise ValueError(f"`inception_score` needs logits, and {extractor.name} has none: use another extractor.")
        references = open_references(config, samples, len(drawn), extractor)
        return from_main(lambda: write_report(config, extractor, drawn, features, logits, references))


def write_report(
    config: EvaluateConfig,
    extractor: FeatureExtractor,
    drawn: ImageSubset,
    features: torch.Tensor,
    logits: torch.Tensor | None,
    references: list[Reference],
) -> dict[str, Any]:
    """[`evaluate`] once the features (N, D) and logits (N, K) of the samples `drawn` are known."""
    samples = drawn.dataset
    options = {"max_neighbours": config.num_neighbour_images, "seed": config.seed, "device": config.device}
    figures = {}
    for reference, other in zip(references, reversed(references), strict=True):
        of_samples, of_real = (distances(f, reference, **options) for f in (features, other.features))
        figures[reference.split] = {name: {**of_samples[name], "real": of_real[name]} for name in of_samples}
    if logits is not None and config.inception_score is not False:
        in_order = logits[torch.tensor(drawn.indices).argsort()]
        of_samples, of_real = (score(values) for values in (in_order, references[1].logits))
        figures["inception_score"] = {**of_samples, "real": of_real}
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
    print(quality_table(report))
    return report


# ------------------------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------------------------


def draw_samples(samples: ImageSet, num_images: int | None, seed: int) -> ImageSubset:
    """
    `num_images` of the samples (all if None) in random order, as balanced over labels as possible.

    Raises:
        ValueError: there are too few.
    """
    count = len(samples) if num_images is None else num_images
    if not MEASURABLE <= count <= len(samples):
        raise ValueError(
            f"`samples` {samples.source!r} holds {len(samples)} images, and "
            + (f"`num_images` asks for {count}." if count > len(samples) else f"at least {MEASURABLE} are needed.")
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
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


def open_references(
    config: EvaluateConfig, samples: ImageSet, count: int, extractor: FeatureExtractor
) -> list[Reference]:
    """The training split and the other, as images of the samples' size, with the features of `count` of each."""
    data_config = config.split_config(
        config.dataset_split,
        source_resolution=config.source_resolution or samples.size,
        num_channels=samples.channels,
        padding=config.padding,
        class_conditional=False,
    )
    splits, files = (config.dataset_split, config.eval_split), (config.train_statistics, config.eval_statistics)
    datasets = [data.dataset for data in open_splits(data_config, config.eval_split, samples.size)]
    for split, dataset in zip(splits, datasets, strict=True):
        if config.num_reference_images is not None and config.num_reference_images > len(dataset):
            raise ValueError(
                f"`num_reference_images` is {config.num_reference_images}, and the split {split!r} has only "
                f"{len(dataset)} images."
            )
    return [
        open_reference(config, split, dataset, file, count, extractor)
        for split, dataset, file in zip(splits, datasets, files, strict=True)
    ]


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
    """Source, fingerprint, size and counts, as the report has them."""
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


def distances(
    features: torch.Tensor, reference: Reference, max_neighbours: int, seed: int, device: str
) -> dict[str, dict[str, Any]]:
    """Frechet and kernel distances, precision and recall of `features` (N, D) from the reference, with counts."""
    counts = {"num_images": len(features), "num_reference_images": reference.statistics.count}
    value = frechet_distance(FeatureStatistics.from_features(features), reference.statistics)
    limit = extrapolated_frechet_distance(
        features, reference.statistics, generator=torch.Generator().manual_seed(seed)
    )
    error = frechet_standard_error(reference.statistics, features)
    figures = {
        "frechet_distance": {"value": value, "interval": normal_interval(value, error), **counts},
        "frechet_distance_extrapolated": {"value": limit, "interval": normal_interval(limit, error), **counts},
    }

    count = min(len(features), len(reference.features), max_neighbours)
    generated, real = (f[:count].to(device) for f in (features, reference.features))
    counts = {"num_images": count, "num_reference_images": count}
    for name, share in zip(("precision", "recall"), precision_recall(real, generated), strict=True):
        figures[name] = {"value": share, "interval": wilson_interval(share, count), **counts}

    kernels = {"kernel_distance": polynomial_kernel, "kernel_distance_rbf": rbf_kernel(reference.statistics)}
    for name, kernel in kernels.items():
        value, error = kernel_distance(real, generated, kernel)
        figures[name] = {"value": value, "interval": normal_interval(value, error), "standard_error": error, **counts}
    return figures


def score(logits: torch.Tensor) -> dict[str, Any]:
    """Inception Score of logits (N, K): mean and deviation over splits, with Student's 95% interval."""
    mean, deviation = inception_score(logits, NUM_SPLITS)
    interval = interval_of_mean(mean, deviation * (NUM_SPLITS / (NUM_SPLITS - 1)) ** 0.5, NUM_SPLITS)
    return {"value": mean, "deviation": deviation, "interval": interval, "num_images": len(logits)}


# ------------------------------------------------------------------------------------------------------------------
# What a reader must know
# ------------------------------------------------------------------------------------------------------------------


def list_warnings(samples: ImageSet, drawn: ImageSubset, references: list[Reference]) -> list[str]:
    """What a reader of the figures must know."""
    warnings = []
    num_features = references[0].features.shape[1]
    if len(drawn) <= num_features:
        warnings.append(
            f"{len(drawn):,} samples are no more than the {num_features:,} features: their covariance is singular and "
            "the Frechet distance far too large. Compare it only with distances of as many images."
        )
    if len(drawn) <= 2 * num_features:
        warnings.append(
            f"{len(drawn):,} samples are not twice the {num_features:,} features: the extrapolated distance is too "
            "small."
        )
    labels = samples.labels if samples.labels is None else samples.labels[sorted(drawn.indices)]
    if labels is not None and len(labels.unique()) > 1 and (labels.diff() >= 0).all():
        warnings.append("The samples are sorted by label: the Inception Score, of splits in order, is far too low.")
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
