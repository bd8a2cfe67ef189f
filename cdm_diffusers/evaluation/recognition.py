"""
What a classifier of real images says about a cascade's samples, and what their pixels do.

Four questions: are samples recognised as their labels; do each stage's mean and deviation agree with the data's; do
samples of a class differ from each other as real images do; and are they nearer to a training image than unseen real
images are, that is, copied?
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scipy import stats
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.config import DataConfig, LabelledDataOptions
from ..data.labels import check_same_classes
from ..data.memory import ImageData
from ..data.pictures import grid_of
from ..data.sources import open_images
from ..data.transforms import area_resize, to_float, to_uint8, to_unit
from ..files import write_json
from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.solvers import stage_options
from ..training.config import check_at_least, check_is_no_folder, device_option, option
from ..training.validation import MAX_GRID_CLASSES
from .classifier import Classifier, accuracies
from .records import provenance
from .seeded_sampling import draw


GRID_PAIRS = 6


@dataclass(kw_only=True)
class RecognitionConfig(LabelledDataOptions):
    """
    Everything that can be said on the command line of `evaluation/recognition.py`.

    Raises:
        ValueError: for a value out of its range.
    """

    pipeline: str = field(metadata={"help": "Folder or Hub id of a class-conditional cascade."})
    classifier: str = field(metadata={"help": "Folder of a classifier of training/train_classifier.py."})
    output: str = field(metadata={"help": "JSON file to write the figures to."})
    grid: str | None = option("Picture to write: a row per class, samples beside their nearest training images.")
    padding: int | None = option("Black pixels added on each side before cropping. Default: the classifier's.")
    num_images: int = option("Samples, balanced over the classes: image i has label i modulo their number.", 2000)
    seed: int = option("Image i is drawn from the generator of (seed, i).", 0)
    batch_size: int = option("Images per call of the pipeline and of the classifier.", 100)
    num_inference_steps: int | None = option("Steps of every stage. Default: the pipeline's own.")
    augmentation_level: int | None = option("s of every stage that takes one. Default: the pipeline's own.")
    num_diversity_images: int = option("Images of each class whose distances from each other are taken.", 100)
    num_nearest_images: int = option("Samples, and test images, whose nearest training image is looked for.", 500)
    device: str = device_option()

    def __post_init__(self):
        check_is_no_folder(self, "output", "grid")
        check_at_least(
            self,
            padding=0,
            num_images=1,
            seed=0,
            batch_size=1,
            num_inference_steps=1,
            augmentation_level=0,
            num_diversity_images=2,
            num_nearest_images=1,
        )


def measure_recognition(config: RecognitionConfig) -> dict[str, Any]:
    """
    Samples the cascade, measures the samples, writes `config.output` (and `config.grid`) and prints tables.

    Returns:
        `dict`: what is in `config.output`; see `measure`.

    Raises:
        ValueError: pipeline, classifier and data do not fit each other.
    """
    classifier = Classifier.from_pretrained(config.classifier).to(config.device)
    pipeline = CascadedDiffusionPipeline.from_pretrained(config.pipeline).to(config.device)
    check_fit(pipeline, classifier)
    data_config = config.data_config(
        source_resolution=pipeline.config.source_resolution or classifier.config.image_size,
        num_channels=classifier.config.num_channels,
        padding=classifier.config.padding if config.padding is None else config.padding,
    )
    train = open_split(data_config, pipeline)
    test = open_split(dataclasses.replace(data_config, dataset_split=config.eval_split), pipeline)
    for file in filter(None, (config.output, config.grid)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)

    options = sampling_options(pipeline, config)
    samples = draw_samples(pipeline, config, options)
    figures, nearest = measure(samples, classifier, train.dataset, test.dataset, config)
    report = {
        **figures,
        "settings": {**dataclasses.asdict(config), **options},
        **provenance("torch", "diffusers", "transformers", "accelerate", "numpy"),
    }
    write_json(Path(config.output), report)
    if config.grid is not None:
        draw_pairs(samples, nearest, len(classifier.config.id2label)).save(config.grid)
    print(tables(report))
    return report


# ------------------------------------------------------------------------------------------------------------------
# What is measured: pipeline, classifier and data that fit each other
# ------------------------------------------------------------------------------------------------------------------


def check_fit(pipeline: CascadedDiffusionPipeline, classifier: Classifier) -> None:
    """
    Raises:
        ValueError: the cascade is not class-conditional, or the classifier is one of other classes, sizes or channels.
    """
    if pipeline.config.id2label is None:
        raise ValueError("the pipeline has no classes (`id2label`): there are no labels to recognise.")
    check_same_classes("the classifier", classifier.config.id2label, pipeline.config.id2label)
    made, taken = pipeline.stages[-1].unet.config, classifier.config
    if (made.sample_size, made.out_channels) != (taken.image_size, taken.num_channels):
        raise ValueError(
            f"the classifier takes {taken.image_size}x{taken.image_size} images of {taken.num_channels} channels, but "
            f"the pipeline makes {made.sample_size}x{made.sample_size} images of {made.out_channels}: train one with "
            f"--image_size {made.sample_size} --num_channels {made.out_channels}."
        )


def open_split(data_config: DataConfig, pipeline) -> ImageData:
    data = open_images(data_config)
    check_same_classes(f"the split {data_config.dataset_split!r}", data.id2label, pipeline.config.id2label)
    return data


def sampling_options(pipeline: CascadedDiffusionPipeline, config: RecognitionConfig) -> dict[str, dict[str, float]]:
    """Steps, s and guidance scales of the stages: the pipeline's own where `config` has none."""
    levels = None
    if config.augmentation_level is not None:
        noised = [stage.name for stage in pipeline.stages if stage.noising_scheduler is not None]
        if not noised:
            raise ValueError(
                f"`augmentation_level` is {config.augmentation_level}, but no stage of the pipeline takes one: leave "
                "it out."
            )
        levels = dict.fromkeys(noised, config.augmentation_level)
    return stage_options(pipeline, config.num_inference_steps, levels)


@dataclass
class Samples:
    """
    Args:
        stages: each stage's images by its name, uint8 (N, C, h, h); the last stage's are the samples proper.
        labels: int64 (N,).
    """

    stages: dict[str, torch.Tensor]
    labels: torch.Tensor

    @property
    def images(self) -> torch.Tensor:
        return list(self.stages.values())[-1]


def draw_samples(pipeline: CascadedDiffusionPipeline, config: RecognitionConfig, options: dict[str, Any]) -> Samples:
    """
    Image i has label i modulo the number of classes and a generator of its own, seeded by (seed, i): it depends on the
    number of images not at all, and on the batch size up to floating point.
    """
    num_classes = len(pipeline.config.id2label)
    if config.num_images < 2 * num_classes:
        raise ValueError(
            f"`num_images` is {config.num_images}; {num_classes} classes need at least {2 * num_classes}, two each."
        )
    labels = torch.arange(config.num_images) % num_classes
    pipeline.set_progress_bar_config(leave=False, position=1)
    batches = []
    with tqdm(total=config.num_images, desc="sampling", unit="image") as bar:
        for indices in torch.arange(config.num_images).split(config.batch_size):
            stages = draw(pipeline, indices, labels, config.seed, **options)
            batches.append({name: to_uint8(2 * images - 1).cpu() for name, images in stages.items()})
            bar.update(len(indices))
    return Samples({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, labels)


# ------------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------------


def measure(
    samples: Samples, classifier: Classifier, train: Dataset, test: Dataset, config: RecognitionConfig
) -> tuple[dict[str, Any], torch.Tensor]:
    """
    All figures, with pixels in [-1, 1].

    Args:
        samples: what the cascade made.
        classifier: takes images of the samples' size, float in [-1, 1], and returns logits and features; its
            `config.id2label` names the classes.
        train, test: items {"image": uint8 (C, R, R), "label"}; real images are area averages of them, which at the
            sample's size and at those of the stages are what the cascade was trained on.
        config: `num_diversity_images`, `num_nearest_images`, `batch_size`, `device`; and `seed`, which shuffles the
            data.

    Returns:
        `dict` of figures, and the nearest training images of the first samples, (Q, C, h, h) in [-1, 1].
    """
    id2label = classifier.config.id2label
    images = to_float(samples.images)
    logits, features = classify(classifier, images, config)
    size = images.shape[-1]
    test_logits, test_labels, test_images = classify_dataset(classifier, test, size, config)

    count = min(config.num_nearest_images, len(images), len(test_images))
    neighbours = NearestNeighbours(torch.cat([images[:count], test_images[:count]]), config.device)
    references = {name: Moments(len(id2label), stage.shape[-1]) for name, stage in samples.stages.items()}
    kept = ClassSubset(len(id2label), config.num_diversity_images)
    for batch in tqdm(shuffled(train, config), desc="training images"):
        real = to_float(batch["image"])
        for reference in references.values():
            reference.update(real, batch["label"])
        real = area_resize(real, size)
        neighbours.update(real)
        kept.update(real, batch["label"])
    real, real_labels = kept.collect(id2label)
    _, real_features = classify(classifier, real, config)

    distances = neighbours.distances()
    figures = {
        "recognised": {
            "samples": recognised(logits, samples.labels, id2label),
            "test": recognised(test_logits, test_labels, id2label),
        },
        "stages": stage_moments(samples, references),
        "diversity": {
            "pixels": diversity(images, samples.labels, real, real_labels, id2label, config.num_diversity_images),
            "features": diversity(
                features, samples.labels, real_features, real_labels, id2label, config.num_diversity_images
            ),
        },
        "nearest_training_image": nearest_figures(distances[:count], distances[count:]),
    }
    return figures, neighbours.nearest[:count].cpu()


def shuffled(dataset: Dataset, config: RecognitionConfig) -> DataLoader:
    """Folders are sorted by class, and their first images need not be typical."""
    return DataLoader(dataset, config.batch_size, shuffle=True, generator=torch.Generator().manual_seed(config.seed))


@torch.no_grad()
def classify(
    classifier: Classifier, images: torch.Tensor, config: RecognitionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, classes) and features (N, D) on the CPU, of images in [-1, 1]."""
    outputs = [classifier(batch.to(config.device)) for batch in images.split(config.batch_size)]
    logits, features = zip(*outputs, strict=True)
    return torch.cat(logits).cpu(), torch.cat(features).cpu()


def classify_dataset(
    classifier: Classifier, dataset: Dataset, size: int, config: RecognitionConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and labels of all images, and the first `num_nearest_images` of them, in random order."""
    logits, labels, images, count = [], [], [], 0
    for batch in tqdm(shuffled(dataset, config), desc="test images"):
        real = area_resize(to_float(batch["image"]), size)
        logits.append(classify(classifier, real, config)[0])
        labels.append(batch["label"])
        if count < config.num_nearest_images:
            images.append(real[: config.num_nearest_images - count])
            count += len(images[-1])
    return torch.cat(logits), torch.cat(labels), torch.cat(images)


def recognised(logits: torch.Tensor, labels: torch.Tensor, id2label: dict[int, str]) -> dict[str, Any]:
    """`accuracies`, with Wilson's 95% interval of the top-1 share."""
    result = accuracies(logits, labels, id2label)
    return {**result, "top_1_interval": wilson_interval(result["top_1"], result["num_images"])}


def wilson_interval(share: float, count: int) -> list[float]:
    """Wilson (1927): where a share of `count` independent draws puts the probability, with confidence 95%."""
    interval = stats.binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
    return [float(end) for end in interval]


class Moments:
    """
    Mean and standard deviation over all pixels of images brought to one size.

    Classes count equally, however many images there are of each: so do they in balanced samples.
    """

    def __init__(self, num_classes: int, size: int):
        self.size = size
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.sums = torch.zeros(2, num_classes, dtype=torch.float64)

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Images (B, C, R, R) in [-1, 1], R a multiple of the size; labels (B,)."""
        pixels = area_resize(images, self.size).flatten(1).double()  # (B, D)
        self.count.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        self.sums.index_add_(1, labels, torch.stack([pixels.mean(1), pixels.square().mean(1)]))

    def figures(self) -> dict[str, float]:
        mean, square = (self.sums / self.count).mean(1)
        return {"mean": mean.item(), "std": (square - mean**2).sqrt().item()}


def stage_moments(samples: Samples, references: dict[str, Moments]) -> dict[str, Any]:
    """Mean and standard deviation of each stage's samples, of the training images at its size, and what differs."""
    figures = {}
    for name, images in samples.stages.items():
        moments = Moments(len(references[name].count), images.shape[-1])
        moments.update(to_float(images), samples.labels)
        of_samples, of_data = moments.figures(), references[name].figures()
        difference = {key: of_samples[key] - of_data[key] for key in of_data}
        figures[name] = {"size": moments.size, "samples": of_samples, "data": of_data, "difference": difference}
    return figures


class ClassSubset:
    """The first `count` images of each class that come along."""

    def __init__(self, num_classes: int, count: int):
        self.count = count
        self.images = [[] for _ in range(num_classes)]

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        for image, label in zip(images, labels.tolist(), strict=True):
            if len(self.images[label]) < self.count:
                self.images[label].append(image.clone())

    def collect(self, id2label: dict[int, str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (M, C, H, W) and labels (M,)."""
        for label, images in enumerate(self.images):
            if len(images) < 2:
                raise ValueError(
                    f"the training split has {len(images)} images of class {id2label[label]!r}; how much they differ "
                    "takes 2: give another --dataset_split."
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
    return {**overall, "per_class": per_class, "images_per_class": min(count, len(samples) // len(id2label))}


class NearestNeighbours:
    """
    For each of the `queries` (Q, C, H, W) the nearest, in pixels, of all images that come along and their mirror
    images, which training saw as well where it flipped.
    """

    def __init__(self, queries: torch.Tensor, device: str):
        self.queries = queries.to(device)
        self.nearest = torch.zeros_like(self.queries)
        self.smallest = torch.full((len(queries),), math.inf, device=device)

    def update(self, images: torch.Tensor) -> None:
        images = torch.cat([images, images.flip(-1)]).to(self.queries.device)
        smallest, index = torch.cdist(self.queries.flatten(1), images.flatten(1)).min(1)
        nearer = smallest < self.smallest
        self.smallest[nearer] = smallest[nearer]
        self.nearest[nearer] = images[index[nearer]]

    def distances(self) -> torch.Tensor:
        """(Q,); computed anew, since `cdist` is inexact for images that are nearly the same."""
        return (self.queries - self.nearest).flatten(1).norm(dim=1).cpu()


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


def draw_pairs(samples: Samples, nearest: torch.Tensor, num_classes: int) -> Image.Image:
    """A row for each of the first classes: its first samples, each with its nearest training image on the right."""
    pairs = torch.stack([to_float(samples.images[: len(nearest)]), nearest], dim=1)  # (Q, 2, C, H, W)
    columns = max(1, min(GRID_PAIRS, len(pairs) // num_classes))
    rows = [pairs[label::num_classes][:columns] for label in range(min(num_classes, MAX_GRID_CLASSES, len(pairs)))]
    return grid_of(to_unit(torch.cat(rows).flatten(0, 1)), 2 * columns)


def tables(report: dict[str, Any]) -> str:
    """The report in markdown."""
    shares, near = report["recognised"], report["nearest_training_image"]
    pixels, features = report["diversity"]["pixels"], report["diversity"]["features"]
    low, high = zip(*(shares[name]["top_1_interval"] for name in ("samples", "test")), strict=True)
    counts = [shares[name]["num_images"] for name in ("samples", "test")]
    lines = [
        f"| | recognised: {counts[0]:,} samples | {counts[1]:,} test images | within-class distance, samples / data:"
        " pixels | features |",
        "|---|---|---|---|---|",
        f"| all classes | {shares['samples']['top_1']:.2%} ({low[0]:.1%} to {high[0]:.1%}) "
        f"| {shares['test']['top_1']:.2%} ({low[1]:.1%} to {high[1]:.1%}) "
        f"| {pixels['ratio']:.3f} | {features['ratio']:.3f} |",
    ]
    for name, share in shares["samples"]["per_class"].items():
        of_test = shares["test"]["per_class"][name]
        lines.append(
            f"| {name} | {share:.2%} | {'no images' if of_test is None else f'{of_test:.2%}'} "
            f"| {pixels['per_class'][name]['ratio']:.3f} | {features['per_class'][name]['ratio']:.3f} |"
        )
    lines += ["", "| stage | size | mean: samples | data | difference | std: samples | data | difference |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, stage in report["stages"].items():
        cells = [f"{stage[key][m]:+.4f}" for m in ("mean", "std") for key in ("samples", "data", "difference")]
        lines.append(f"| {name} | {stage['size']} | {' | '.join(cells)} |")
    lines += ["", f"| distance to the nearest training image | {near['num_images']} samples | as many test images |"]
    lines.append("|---|---|---|")
    lines += [f"| {m} | {near['samples'][m]:.3f} | {near['test'][m]:.3f} |" for m in ("mean", "median", "smallest")]
    return "\n".join(lines)
