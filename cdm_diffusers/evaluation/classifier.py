"""
Image classifiers, trained on the data sources of the diffusion stages: one recognises samples as their labels, and
one trained on samples gives the classification accuracy score (Section 4).
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from ..data.config import LabelledDataOptions
from ..data.labels import check_same_classes
from ..data.memory import ImageData
from ..data.sources import open_images
from ..data.transforms import random_flip, to_float
from ..files import write_json
from ..training.config import check_at_least, check_mixed_precision, option, switch
from ..training.cpu import warn_of_slow_cpu


# `upsampling` is ours: a ResNet reduces its input by 4 before its first block, too much for images of 32x32.
ARCHITECTURES = {
    "small": {
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 128],
        "depths": [1, 1, 1],
        "layer_type": "basic",
        "upsampling": 2,
    },
    "resnet-50": {"upsampling": 1},
}

# How an architecture is trained where nothing else is said. That of resnet-50 is Goyal et al.'s (2017) for batches of
# 256: in larger ones (over all processes) the learning rate grows with them.
RECIPES = {
    "small": {
        "num_train_epochs": 6,
        "train_batch_size": 128,
        "optimizer": "adamw",
        "lr_scheduler": "one_cycle",
        "learning_rate": 2e-3,
        "weight_decay": 1e-2,
        "random_shift": 2,
        "random_resized_crop": False,
    },
    "resnet-50": {
        "num_train_epochs": 90,
        "train_batch_size": 256,
        "optimizer": "sgd",
        "lr_scheduler": "step",
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "random_shift": 0,
        "random_resized_crop": True,
    },
}
WARMUP_SHARE = 5 / 90
DECAY_SHARES = (30 / 90, 60 / 90, 80 / 90)


@dataclass(kw_only=True)
class ClassifierRecipe:
    """
    Network and optimisation: options that default to None take `RECIPES` of the architecture.

    Raises:
        ValueError: for a value out of its range.
    """

    architecture: Literal["small", "resnet-50"] = option("small (for 32x32 images) or resnet-50.", "small")
    num_train_epochs: int | None = option("How often the network sees the training images. Default: 6; resnet-50 90.")
    train_batch_size: int | None = option("Images per device and step. Default: 128; resnet-50 256.")
    eval_batch_size: int = option("Images per device and step of the evaluation.", 500)
    optimizer: Literal["adamw", "sgd"] | None = option(
        "adamw, or sgd with Nesterov momentum 0.9. Default: adamw; resnet-50 sgd."
    )
    lr_scheduler: Literal["one_cycle", "step", "cosine"] | None = option(
        "one_cycle; or a linear warm-up over 5/90 of the training, then steps (a tenth at 30/90, 60/90 and 80/90) or "
        "a half cosine. Default: one_cycle; resnet-50 step."
    )
    learning_rate: float | None = option("Peak learning rate. Default: 2e-3; resnet-50 0.1.")
    weight_decay: float | None = option("Weight decay. Default: 1e-2; resnet-50 1e-4.")
    label_smoothing: float = option("Share of the target spread over all classes.", 0.0)
    random_flip: bool = option("Flip half of the training images left to right.", True)
    random_shift: int | None = option(
        "Shift training images by up to so many pixels each way, black moving in. Default: 2; resnet-50 0."
    )
    random_resized_crop: bool | None = switch(
        "Train on crops of 8% to 100% of the area, brought to full size. Default: no; resnet-50 yes."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option("Autocast type.", "no")
    dataloader_num_workers: int = option("Processes that load data; 0 loads in the training process.", 0)

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"`architecture` is {self.architecture!r}; it must be one of {list(ARCHITECTURES)}.")
        for name, value in RECIPES[self.architecture].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        # Batch norm takes two images.
        check_at_least(self, num_train_epochs=1, train_batch_size=2, eval_batch_size=1, random_shift=0)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` is {self.label_smoothing}; it must lie in [0, 1).")


@dataclass(kw_only=True)
class ClassifierConfig(LabelledDataOptions, ClassifierRecipe):
    """Everything that can be said on the command line of `training/train_classifier.py`."""

    output_dir: str = field(metadata={"help": "Folder for the classifier and its results.json."})
    padding: int = option("Black pixels added on each side before cropping (Fashion-MNIST, 28 to 32 pixels: 2).", 0)
    image_size: int = option("Side of the images, in pixels: they are cropped and resized to it.", 32)
    num_channels: int = option("Colour channels: 1 or 3.", 3)
    seed: int = option("Seed of weights, data order and augmentation.", 0)


class Classifier(nn.Module):
    """
    One of transformers' ResNets on the images of a cascade: float tensors (B, C, R, R) in [-1, 1].

    What it was trained on is in the config of `model`: `num_channels`, `image_size` R, the `padding` that brought
    pictures to this size, `image_mean` and `image_std` (0.5 each: [0, 1] to [-1, 1]), the `upsampling` before the
    network, and `id2label`.
    """

    def __init__(self, model: ResNetForImageClassification):
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "Classifier":
        """
        Loads what `training/train_classifier.py` saved, in evaluation mode.

        Raises:
            ValueError: `folder` holds no such classifier.
        """
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"{str(folder)!r} holds no classifier: give the --output_dir of training/train_classifier.py."
            )
        model = ResNetForImageClassification.from_pretrained(folder)
        absent = [name for name in ("image_size", "padding", "upsampling") if not hasattr(model.config, name)]
        if absent:
            raise ValueError(
                f"the config of the classifier in {str(folder)!r} has no {absent}: train one with "
                "training/train_classifier.py, which saves how its images are prepared."
            )
        return cls(model).eval()

    @property
    def config(self) -> ResNetConfig:
        return self.model.config

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, classes), and the penultimate features (B, D) of which they are a linear function."""
        if self.config.upsampling > 1:
            images = F.interpolate(images, scale_factor=self.config.upsampling, mode="bilinear", align_corners=False)
        features = self.model.resnet(images).pooler_output.flatten(1)  # (B, D)
        return self.model.classifier(features), features


def build_classifier(config: ClassifierConfig, id2label: dict[int, str]) -> Classifier:
    """A classifier with fresh weights."""
    model_config = ResNetConfig(
        num_channels=config.num_channels,
        id2label=id2label,
        label2id={name: index for index, name in id2label.items()},
        image_size=config.image_size,
        padding=config.padding,
        image_mean=0.5,
        image_std=0.5,
        **ARCHITECTURES[config.architecture],
    )
    return Classifier(ResNetForImageClassification(model_config))


# ------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------


def train_classifier(config: ClassifierConfig) -> dict[str, Any]:
    """
    Trains a classifier on one split, measures it on another, and leaves both classifier and `results.json` in
    `config.output_dir`.

    Returns:
        `dict`: what is in `results.json`.

    Raises:
        ValueError: for data that do not fit, or splits with different classes.
        RuntimeError: when the loss is not finite.
    """
    data_config = config.data_config(config.image_size, config.num_channels, config.padding)
    train = open_images(data_config)
    test = open_images(dataclasses.replace(data_config, dataset_split=config.eval_split))
    check_same_classes(f"the split {config.eval_split!r}", test.id2label, train.id2label)
    return fit_classifier(config, train, test.dataset)


def fit_classifier(config: ClassifierConfig, train: ImageData, test: Dataset) -> dict[str, Any]:
    """`train_classifier` on data that are already open."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
    )
    check_mixed_precision(accelerator)
    warn_of_slow_cpu(accelerator)
    if len(train.dataset) < config.train_batch_size * accelerator.num_processes:
        raise ValueError(
            f"`train_batch_size` is {config.train_batch_size} on each of {accelerator.num_processes} processes, but "
            f"the data has only {len(train.dataset)} images: give a smaller one."
        )
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    classifier = build_classifier(config, train.id2label).to(memory_format=torch.channels_last)
    classifier = accelerator.prepare(classifier)
    run_epochs(config, classifier, train.dataset, accelerator)
    results = evaluate(config, classifier, test, train.id2label, accelerator)
    results |= {"num_train_images": len(train.dataset), "config": dataclasses.asdict(config)}
    if accelerator.is_main_process:
        accelerator.unwrap_model(classifier).model.save_pretrained(config.output_dir)
        write_json(Path(config.output_dir) / "results.json", results)
        print(results_table(results, config.eval_split))
    accelerator.wait_for_everyone()
    return results


def run_epochs(config: ClassifierConfig, classifier: nn.Module, dataset: Dataset, accelerator: Accelerator) -> None:
    """All of the training, on augmented images."""
    optimizer = build_optimizer(config, classifier)
    loader = DataLoader(
        dataset, config.train_batch_size, shuffle=True, drop_last=True, num_workers=config.dataloader_num_workers
    )
    optimizer, loader = accelerator.prepare(optimizer, loader)
    total = config.num_train_epochs * len(loader)
    # Not prepared: accelerate would step it once per process.
    scheduler = build_lr_scheduler(config, optimizer.optimizer, total)
    generator = torch.Generator(accelerator.device).manual_seed(config.seed + accelerator.process_index)
    classifier.train()
    bar = tqdm(total=total, unit="step", mininterval=1.0, disable=not accelerator.is_main_process)
    with bar:
        for epoch in range(config.num_train_epochs):
            loader.set_epoch(epoch)
            loss_sum = torch.zeros((), device=accelerator.device)
            for batch in loader:
                images = random_shift(batch["image"], config.random_shift, generator)
                if config.random_flip:
                    images = random_flip(images, generator)
                images = to_float(images)
                if config.random_resized_crop:
                    images = random_resized_crop(images, generator)
                logits, _ = classifier(images)
                loss = F.cross_entropy(logits, batch["label"], label_smoothing=config.label_smoothing)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                loss_sum += loss.detach()
                bar.update()
            mean_loss = loss_sum.item() / len(loader)
            bar.set_postfix(epoch=epoch + 1, loss=f"{mean_loss:.4f}")
            if not math.isfinite(mean_loss):
                raise RuntimeError(
                    f"The loss of epoch {epoch + 1} is {mean_loss}; nothing was saved. Try a lower --learning_rate "
                    f"than {config.learning_rate}."
                )


def build_optimizer(config: ClassifierRecipe, classifier: nn.Module) -> torch.optim.Optimizer:
    arguments = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(classifier.parameters(), momentum=0.9, nesterov=True, **arguments)
    return torch.optim.AdamW(classifier.parameters(), **arguments)


def build_lr_scheduler(
    config: ClassifierRecipe, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The one-cycle schedule (Smith and Topin, 2018), or a warm-up followed by steps or a half cosine."""
    if config.lr_scheduler == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total_steps)

    def factor(step: int) -> float:
        share = step / total_steps
        if share < WARMUP_SHARE:
            return share / WARMUP_SHARE
        if config.lr_scheduler == "cosine":
            return 0.5 + 0.5 * math.cos(math.pi * (share - WARMUP_SHARE) / (1 - WARMUP_SHARE))
        return 0.1 ** sum(share >= decay for decay in DECAY_SHARES)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def random_resized_crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Of each float image (B, C, H, W) a rectangle with 8% to 100% of its area and an aspect ratio of 3/4 to 4/3, cut to
    fit, brought back to full size bilinearly (Szegedy et al., 2015). Drawn from `generator`, on its device.
    """
    draws = torch.rand((4, len(images)), generator=generator, device=generator.device).to(images.device)
    area, ratio = 0.08 + 0.92 * draws[0], (math.log(4 / 3) * (2 * draws[1] - 1)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)  # shares of the sides
    left_to_right, top_to_bottom = (2 * draws[2] - 1) * (1 - width), (2 * draws[3] - 1) * (1 - height)
    zero = torch.zeros_like(width)
    rows = [torch.stack(row, dim=1) for row in ((width, zero, left_to_right), (zero, height, top_to_bottom))]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def random_shift(images: torch.Tensor, max_shift: int, generator: torch.Generator) -> torch.Tensor:
    """
    Shift each uint8 image (B, C, H, W) by -max_shift..max_shift pixels along both axes, black moving in.

    The shifts are drawn uniformly from `generator`, which lives on its own device.
    """
    count, channels, height, width = images.shape
    shifts = torch.randint(2 * max_shift + 1, (2, count, 1), generator=generator, device=generator.device)
    rows, columns = shifts.to(images.device)  # (B, 1) each: where the crop of the padded image begins
    rows = rows + torch.arange(height, device=images.device)  # (B, H)
    columns = columns + torch.arange(width, device=images.device)  # (B, W)
    padded = F.pad(images, [max_shift] * 4)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]  # (B, C, H, W)


# ------------------------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    config: ClassifierConfig, classifier: nn.Module, dataset: Dataset, id2label: dict[int, str], accelerator
) -> dict[str, Any]:
    """`accuracies` of `classifier` on all images of `dataset`, over all processes."""
    loader = accelerator.prepare(
        DataLoader(dataset, config.eval_batch_size, num_workers=config.dataloader_num_workers)
    )
    classifier.eval()
    logits, labels = [], []
    for batch in tqdm(loader, desc="evaluation", disable=not accelerator.is_main_process):
        gathered = accelerator.gather_for_metrics((classifier(to_float(batch["image"]))[0], batch["label"]))
        logits.append(gathered[0].cpu())
        labels.append(gathered[1].cpu())
    return accuracies(torch.cat(logits), torch.cat(labels), id2label)


def accuracies(logits: torch.Tensor, labels: torch.Tensor, id2label: dict[int, str]) -> dict[str, Any]:
    """
    Top-1 and top-5 accuracy (with fewer than five classes, the latter is 1) and top-1 per class, all in [0, 1].

    Args:
        logits: (N, classes).
        labels: int64 (N,).
        id2label: names of the classes. One without images has the accuracy None.
    """
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, 5), best first
    top_1 = hits[:, 0].double()
    per_class = {name: top_1[labels == index] for index, name in id2label.items()}
    return {
        "top_1": top_1.mean().item(),
        "top_5": hits.any(1).double().mean().item(),
        "per_class": {name: hit.mean().item() if len(hit) else None for name, hit in per_class.items()},
        "num_images": len(labels),
    }


def results_table(results: dict[str, Any], eval_split: str) -> str:
    """The accuracies as a markdown table."""
    rows = {"all classes, top-1": results["top_1"], "all classes, top-5": results["top_5"], **results["per_class"]}
    lines = [f"| {results['num_images']:,} images of {eval_split!r} | accuracy |", "|---|---|"]
    lines += [f"| {name} | {'no images' if value is None else f'{value:.2%}'} |" for name, value in rows.items()]
    return "\n".join(lines)
