"""
Image classifiers, trained on the data sources of the diffusion stages: one recognises samples as their labels, and
one trained on samples gives the classification accuracy score (Section 4).
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, broadcast, set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from ..data.memory import ImageData
from ..data.splits import open_splits
from ..data.transforms import random_flip, to_float
from ..files import write_json
from ..processes import ending_together, held_by_main, open_state
from ..training.cpu import check_mixed_precision, warn_of_slow_cpu
from .batches import joined, run_over
from .config import ClassifierConfig
from .tables import accuracy_table


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

WARMUP_SHARE = 5 / 90
DECAY_SHARES = (30 / 90, 60 / 90, 80 / 90)


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
        Loads what `cdm train classifier` saved, in evaluation mode.

        Raises:
            ValueError: `folder` holds no such classifier.
        """
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{str(folder)!r} holds no classifier: give the --output_dir of cdm train classifier.")
        model = ResNetForImageClassification.from_pretrained(folder)
        absent = [name for name in ("image_size", "padding", "upsampling") if not hasattr(model.config, name)]
        if absent:
            raise ValueError(
                f"the config of the classifier in {str(folder)!r} has no {absent}: train one with "
                "cdm train classifier, which saves how its images are prepared."
            )
        return cls(model).eval()

    @property
    def config(self) -> ResNetConfig:
        """That of `model`."""
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
    state, output_dir = open_state(), Path(config.output_dir)
    with ending_together(state), held_by_main(state, output_dir, "a training of a classifier"):
        data_config = config.data_config(config.image_size, config.num_channels, config.padding)
        train, test = open_splits(data_config, config.eval_split)
        return fit_classifier(config, train, test.dataset)


def fit_classifier(config: ClassifierConfig, train: ImageData, test: Dataset) -> dict[str, Any]:
    """`train_classifier` on data that are already open."""
    accelerator = Accelerator(
        cpu=PartialState().device.type == "cpu",
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
    loader = DataLoader(test, config.eval_batch_size, num_workers=config.dataloader_num_workers)
    results = accuracies_on(loader, classifier, train.id2label, accelerator)
    results |= {"num_train_images": len(train.dataset), "config": dataclasses.asdict(config)}
    if accelerator.is_main_process:
        accelerator.unwrap_model(classifier).model.save_pretrained(config.output_dir)
        write_json(Path(config.output_dir) / "results.json", results)
        print(accuracy_table(results, config.eval_split))
    accelerator.wait_for_everyone()
    return results


def run_epochs(config: ClassifierConfig, classifier: nn.Module, dataset: Dataset, accelerator: Accelerator) -> None:
    """All of the training, on augmented images."""
    optimizer = build_optimizer(classifier, config.optimizer, config.learning_rate, config.weight_decay)
    loader = DataLoader(
        dataset, config.train_batch_size, shuffle=True, drop_last=True, num_workers=config.dataloader_num_workers
    )
    optimizer, loader = accelerator.prepare(optimizer, loader)
    total = config.num_train_epochs * len(loader)
    # Not prepared: accelerate would step it once per process.
    scheduler = build_lr_scheduler(optimizer.optimizer, config.lr_scheduler, config.learning_rate, total)
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


def build_optimizer(
    classifier: nn.Module, optimizer: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum."""
    arguments = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    if optimizer == "sgd":
        return torch.optim.SGD(classifier.parameters(), momentum=0.9, nesterov=True, **arguments)
    return torch.optim.AdamW(classifier.parameters(), **arguments)


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, name: str, learning_rate: float, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The one-cycle schedule (Smith and Topin, 2018), or a warm-up followed by steps or a half cosine."""
    if name == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total_steps)

    def factor(step: int) -> float:
        share = step / total_steps
        if share < WARMUP_SHARE:
            return share / WARMUP_SHARE
        if name == "cosine":
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
    Shift each uint8 image (B, C, H, W) by -max_shift..max_shift pixels along both axes, filling in black.

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


def accuracies_on(
    loader: DataLoader, classifier: nn.Module, id2label: dict[int, str], accelerator: Accelerator
) -> dict[str, Any]:
    """`accuracies` on all images of `loader`, over all processes."""
    network = accelerator.unwrap_model(classifier).eval()  # processes may have different numbers of batches
    for buffer in network.buffers():  # each process has the statistics of its own last batch
        broadcast(buffer, from_process=0)

    def of_batch(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return network(to_float(batch["image"]))[0], batch["label"]

    return accuracies(*joined(run_over(loader, of_batch, accelerator.device, "evaluation")), id2label)


def classify(
    classifier: Classifier, dataset: Dataset, batch_size: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits (N, classes) and features (N, D), on the CPU, of all images in their order.

    Args:
        classifier: on `device`.
        dataset: items {"image": (C, R, R)}, uint8 or float in [-1, 1].
    """
    loader = DataLoader(dataset, batch_size)
    return joined(run_over(loader, lambda batch: classifier(to_float(batch["image"])), device, "classification"))


def accuracies(logits: torch.Tensor, labels: torch.Tensor, id2label: dict[int, str]) -> dict[str, Any]:
    """
    Top-1 and top-5 accuracy (with fewer than five classes, the latter is 1) and top-1 per class, all in [0, 1].

    Args:
        logits: (N, classes).
        labels: int64 (N,).
        id2label: names of the classes. The accuracy of a class without images is None.
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
