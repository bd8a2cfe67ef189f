"""
What a classifier of real images says about a cascade's samples, and what their pixels do.

Four questions: are samples recognised as their labels; do each stage's mean and deviation agree with the data's; do
samples of a class differ from each other as real images do; and are they nearer to a training image than unseen real
images are, that is, copied?
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..data.image_sets import ImageSet, load_image_set, read_settings
from ..data.labels import check_same_classes
from ..data.memory import ImageSubset, InMemoryImages
from ..data.pictures import grid_of
from ..data.splits import open_splits
from ..data.transforms import area_resize, to_float, to_unit
from ..files import write_json
from ..processes import ending_together, from_main, open_state
from ..training.validation import MAX_GRID_CLASSES
from .batches import joined, run_over
from .classifier import Classifier, accuracies, classify
from .config import RecognitionConfig
from .intervals import wilson_interval
from .records import provenance
from .tables import recognition_tables


GRID_PAIRS = 6


def measure_recognition(config: RecognitionConfig) -> dict[str, Any]:
    """
    Measures the samples, with any number of processes, writes `config.output` (and `config.grid`) and prints tables.

    Returns:
        `dict`: what is in `config.output`; see `measure`.

    Raises:
        ValueError: samples, classifier and data do not fit each other.
    """
    state = open_state()
    with ending_together(state):
        return measure_together(config, state)


def measure_together(config: RecognitionConfig, state: PartialState) -> dict[str, Any]:
    """[`measure_recognition`] by processes that end together."""
    classifier = Classifier.from_pretrained(config.classifier).to(config.device)
    settings = read_settings(Path(config.samples))
    stages = load_stages(config.samples, settings)
    samples = last_of(stages)
    check_fit(samples, classifier)
    data_config = config.data_config(
        source_resolution=samples.source_resolution or samples.size,
        num_channels=classifier.config.num_channels,
        padding=classifier.config.padding if config.padding is None else config.padding,
    )
    train, test = open_splits(data_config, config.eval_split, id2label=samples.id2label)
    for file in filter(None, (config.output, config.grid)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)

    figures, nearest = measure(
        stages,
        classifier,
        train.dataset,
        test.dataset,
        num_diversity_images=config.num_diversity_images,
        num_nearest_images=config.num_nearest_images,
        seed=config.seed,
        batch_size=config.batch_size,
        device=config.device,
    )
    sampled = {"pipeline": settings.get("about", {}).get("pipeline"), "num_images": len(samples)}
    sampled |= {"sampling_seed": settings.get("seed"), **settings.get("options", {})}
    report = {
        **figures,
        "settings": {**dataclasses.asdict(config), **sampled},
        **provenance("torch", "diffusers", "transformers", "accelerate", "numpy"),
    }
    if state.is_main_process:
        write_json(Path(config.output), report)
        if config.grid is not None:
            draw_pairs(samples, nearest).save(config.grid)
        print(recognition_tables(report))
    return report


# ------------------------------------------------------------------------------------------------------------------
# What is measured: samples, classifier and data that fit each other
# ------------------------------------------------------------------------------------------------------------------


def load_stages(folder: str, settings: dict[str, Any]) -> dict[str, ImageSet]:
    """
    Each stage's images, by its name, of a folder of `cdm sample-set` that has these `settings`.

    Raises:
        ValueError: a stage was not kept, or there are no classes, or fewer than two images of one.
    """
    names = list(settings["stages"])
    if settings.get("id2label") is None:
        raise ValueError(f"`samples` {folder!r} have no classes (`id2label`): there are no labels to recognise.")
    if missing := [name for name in names[:-1] if name not in settings.get("kept_stages", [])]:
        raise ValueError(
            f"`samples` {folder!r} lacks the stages {missing}, and every stage is measured: sample with --keep_stages."
        )
    stages = {name: load_image_set(folder, name) for name in names}
    fewest = stages[names[-1]].labels.bincount(minlength=len(settings["id2label"])).min().item()
    if fewest < 2:
        raise ValueError(f"`samples` {folder!r} has {fewest} images of some class; each class needs at least 2.")
    return stages


def last_of(stages: dict[str, Any]) -> Any:
    """The samples proper."""
    return list(stages.values())[-1]


def check_fit(samples: ImageSet, classifier: Classifier) -> None:
    """
    Raises:
        ValueError: the classifier has other classes, sizes or channels.
    """
    taken = classifier.config
    check_same_classes("the classifier", taken.id2label, samples.id2label)
    if (samples.size, samples.channels) != (taken.image_size, taken.num_channels):
        raise ValueError(
            f"the classifier takes {taken.image_size}x{taken.image_size} images of {taken.num_channels} channels, but "
            f"the samples are {samples.size}x{samples.size} of {samples.channels}: train one with --image_size "
            f"{samples.size} --num_channels {samples.channels}."
        )


# ------------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------------


def measure(
    stages: dict[str, Dataset],
    classifier: Classifier,
    train: Dataset,
    test: Dataset,
    *,
    num_diversity_images: int = 100,
    num_nearest_images: int = 500,
    seed: int = 0,
    batch_size: int = 100,
    device: str = "cpu",
) -> tuple[dict[str, Any], torch.Tensor]:
    """
    All figures, with pixels in [-1, 1].

    Args:
        stages: what each stage made, by its name: items {"image": uint8 (C, h, h)}, with `labels` of all.
        classifier: takes images of the samples' size, float in [-1, 1], and returns logits and features; its
            `config.id2label` names the classes.
        train, test: items {"image": uint8 (C, R, R), "label"}; real images are area averages of them, which at the
            sample's size and at those of the stages are what the cascade was trained on.
        num_diversity_images, num_nearest_images, batch_size, device: see [`RecognitionConfig`].
        seed: of the order of the data.

    Returns:
        `dict` of figures, and the nearest training images of the first samples, (Q, C, h, h) in [-1, 1].
    """
    id2label = classifier.config.id2label
    samples = last_of(stages)
    size = size_of(samples)
    logits, features = classify(classifier, samples, batch_size, device)
    test_logits, test_labels = classify_real(classifier, shuffled(test, batch_size, seed), size, device)
    count = min(num_nearest_images, len(samples), len(test))
    queries = torch.cat([stacked(samples, count), first_images(shuffled(test, batch_size, seed), size, count)])
    references = {name: Moments(len(id2label), size_of(stage)) for name, stage in stages.items()}
    neighbours, kept = NearestNeighbours(queries, device), ClassSubset(len(id2label), num_diversity_images)

    def of_batch(batch: dict[str, torch.Tensor]) -> tuple[Any, ...]:
        whole, labels = to_float(batch["image"]), batch["label"]
        real = area_resize(whole, size)
        moments = [reference.of_images(whole) for reference in references.values()]
        return moments, labels, neighbours.nearer(real), kept.wanted(real, labels)

    parts = run_over(shuffled(train, batch_size, seed), of_batch, "cpu", "training images")
    for moments, labels, nearer, wanted in parts:
        for reference, of_images in zip(references.values(), moments, strict=True):
            reference.update(of_images, labels)
        neighbours.update(*nearer)
        kept.update(*wanted)
    real, real_labels = kept.collect(id2label)
    _, real_features = classify(classifier, InMemoryImages(real, None), batch_size, device)

    distances = neighbours.distances()

    def figures() -> dict[str, Any]:
        made = {name: stacked(stage) for name, stage in stages.items()}
        spaces = {"pixels": (last_of(made), real), "features": (features, real_features)}
        return {
            "recognised": {
                "samples": recognised(logits, samples.labels, id2label),
                "test": recognised(test_logits, test_labels, id2label),
            },
            "stages": stage_moments(made, samples.labels, references),
            "diversity": {
                name: diversity(of_samples, samples.labels, of_real, real_labels, id2label, num_diversity_images)
                for name, (of_samples, of_real) in spaces.items()
            },
            "nearest_training_image": nearest_figures(distances[:count], distances[count:]),
        }

    return from_main(figures), neighbours.nearest[:count]


def size_of(images: Dataset) -> int:
    """Side of a set's images."""
    return images[0]["image"].shape[-1]


def stacked(images: Dataset, count: int | None = None) -> torch.Tensor:
    """All of a set, or its first `count`, float (N, C, H, W) in [-1, 1]."""
    return to_float(torch.stack([images[index]["image"] for index in range(count or len(images))]))


def shuffled(dataset: Dataset, batch_size: int, seed: int) -> DataLoader:
    """Folders are sorted by class, and their first images need not be typical."""
    return DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def classify_real(
    classifier: Classifier, loader: DataLoader, size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of all images of `loader`, averaged down to `size`."""

    def of_batch(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return classifier(area_resize(to_float(batch["image"]), size))[0], batch["label"]

    return joined(run_over(loader, of_batch, device, "test images"))


def first_images(loader: DataLoader, size: int, count: int) -> torch.Tensor:
    """The first (count, C, h, h) of `loader`, averaged down to `size`."""
    batches = itertools.islice(loader, math.ceil(count / loader.batch_size))
    return torch.cat([area_resize(to_float(batch["image"]), size) for batch in batches])[:count]


def recognised(logits: torch.Tensor, labels: torch.Tensor, id2label: dict[int, str]) -> dict[str, Any]:
    """`accuracies`, with Wilson's 95% interval of the top-1 share."""
    result = accuracies(logits, labels, id2label)
    return {**result, "top_1_interval": wilson_interval(result["top_1"], result["num_images"])}


class Moments:
    """
    Mean and standard deviation over all pixels of images brought to one size.

    Classes count equally, however many images there are of each: so do they in balanced samples.
    """

    def __init__(self, num_classes: int, size: int):
        self.size = size
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.sums = torch.zeros(2, num_classes, dtype=torch.float64)

    def of_images(self, images: torch.Tensor) -> torch.Tensor:
        """Means of pixels and of their squares (2, B) of images (B, C, R, R) in [-1, 1], R a multiple of the size."""
        pixels = area_resize(images, self.size).flatten(1).double()  # (B, D)
        return torch.stack([pixels.mean(1), pixels.square().mean(1)])

    def update(self, of_images: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds what `of_images` returned for images with the labels (B,)."""
        self.count.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        self.sums.index_add_(1, labels, of_images)

    def figures(self) -> dict[str, float]:
        """Mean and standard deviation of all that was added."""
        mean, square = (self.sums / self.count).mean(1)
        return {"mean": mean.item(), "std": (square - mean**2).sqrt().item()}


def stage_moments(
    stages: dict[str, torch.Tensor], labels: torch.Tensor, references: dict[str, Moments]
) -> dict[str, Any]:
    """Mean and standard deviation of each stage's samples, of the training images at its size, and what differs."""
    figures = {}
    for name, images in stages.items():
        moments = Moments(len(references[name].count), images.shape[-1])
        moments.update(moments.of_images(images), labels)
        of_samples, of_data = moments.figures(), references[name].figures()
        difference = {key: of_samples[key] - of_data[key] for key in of_data}
        figures[name] = {"size": moments.size, "samples": of_samples, "data": of_data, "difference": difference}
    return figures


class ClassSubset:
    """The first `count` images of each class among those that it is given."""

    def __init__(self, num_classes: int, count: int):
        self.count = count
        self.images = [[] for _ in range(num_classes)]

    def wanted(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of images (B, C, H, W) and labels (B,) those of classes that are not complete."""
        is_wanted = torch.tensor([len(of_class) < self.count for of_class in self.images])[labels]
        return images[is_wanted], labels[is_wanted]

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds images that are `wanted`."""
        for image, label in zip(images, labels.tolist(), strict=True):
            if len(self.images[label]) < self.count:
                self.images[label].append(image.clone())

    def collect(self, id2label: dict[int, str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (M, C, H, W) and labels (M,)."""
        for label, images in enumerate(self.images):
            if len(images) < 2:
                raise ValueError(
                    f"the training split has {len(images)} images of class {id2label[label]!r}; how much they differ "
                    "needs 2: give another --dataset_split."
                )
        labels = [label for label, images in enumerate(self.images) for _ in images]
        return torch.stack(list(itertools.chain.from_iterable(self.images))), torch.tensor(labels)


def diversity(
    samples: torch.Tensor,
    sample_labels: torch.Tensor,
    real: torch.Tensor,
    real_labels: torch.Tensor,
    id2label: dict[int, str],
    count: int,
) -> dict[str, Any]:
    """
    Mean Euclidean distance between two images of a class, over the first `count` samples of each class, beside that of
    real images. A ratio below 1: samples of a class resemble each other more than real images do.

    Args:
        samples, real: (N, ...) pixels or features.
        sample_labels, real_labels: int64 (N,).
    """
    per_class = {}
    for label, name in id2label.items():
        of_samples = torch.pdist(samples[sample_labels == label][:count].flatten(1)).mean().item()
        of_data = torch.pdist(real[real_labels == label][:count].flatten(1)).mean().item()
        per_class[name] = {"samples": of_samples, "data": of_data, "ratio": of_samples / of_data}
    of_samples, of_data = (
        sum(figures[key] for figures in per_class.values()) / len(per_class) for key in ("samples", "data")
    )
    overall = {"samples": of_samples, "data": of_data, "ratio": of_samples / of_data}
    fewest = sample_labels.bincount(minlength=len(id2label)).min().item()
    return {**overall, "per_class": per_class, "images_per_class": min(count, fewest)}


class NearestNeighbours:
    """
    For each of the `queries` (Q, C, H, W) the nearest, in pixels, of all images that it is given and their mirror
    images, which training with flips saw as well.
    """

    def __init__(self, queries: torch.Tensor, device: str):
        self.queries = queries.to(device)
        self.nearest = torch.zeros_like(queries)
        self.smallest = torch.full((len(queries),), math.inf)

    def nearer(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        The queries for which one of images (B, C, H, W) is nearer than any before: their numbers (n,), the distances
        (n,), the place of the nearest in the last result (n,), and that: the images that are nearest to any query.
        """
        images = torch.cat([images, images.flip(-1)])
        distances = torch.cdist(self.queries.flatten(1), images.to(self.queries.device).flatten(1))
        smallest, index = (of_queries.cpu() for of_queries in distances.min(1))
        which = torch.nonzero(smallest < self.smallest)[:, 0]
        used, place = index[which].unique(return_inverse=True)
        return which, smallest[which], place, images[used]

    def update(self, which: torch.Tensor, smallest: torch.Tensor, place: torch.Tensor, images: torch.Tensor) -> None:
        """Adds what is `nearer` among further images."""
        is_nearer = smallest < self.smallest[which]
        which = which[is_nearer]
        self.smallest[which] = smallest[is_nearer]
        self.nearest[which] = images[place[is_nearer]]

    def distances(self) -> torch.Tensor:
        """(Q,); computed anew, since `cdist` is inexact for images that are nearly the same."""
        return (self.queries.cpu() - self.nearest).flatten(1).norm(dim=1)


def nearest_figures(of_samples: torch.Tensor, of_test: torch.Tensor) -> dict[str, Any]:
    """
    Distances (Q,) of samples and of test images to their nearest training images. A ratio far below 1, or samples that
    are nearer than any test image, would be copies of training images.
    """
    figures = {
        name: {"mean": d.mean().item(), "median": d.median().item(), "smallest": d.min().item()}
        for name, d in (("samples", of_samples), ("test", of_test))
    }
    ratio = figures["samples"]["mean"] / figures["test"]["mean"]
    return {**figures, "ratio_of_means": ratio, "num_images": len(of_samples)}


# ------------------------------------------------------------------------------------------------------------------
# What is shown
# ------------------------------------------------------------------------------------------------------------------


def draw_pairs(samples: Dataset, nearest: torch.Tensor) -> Image.Image:
    """A row for each of the first classes: its first samples, each with its nearest training image on the right."""
    labels = samples.labels[: len(nearest)]
    first = stacked(ImageSubset(samples, range(len(nearest))))
    pairs = torch.stack([first, nearest], dim=1)  # (Q, 2, C, H, W)
    shown, counts = labels.unique(return_counts=True)
    columns = min(GRID_PAIRS, counts[:MAX_GRID_CLASSES].min().item())
    rows = [pairs[labels == label][:columns] for label in shown[:MAX_GRID_CLASSES]]
    return grid_of(to_unit(torch.cat(rows).flatten(0, 1)), 2 * columns)
