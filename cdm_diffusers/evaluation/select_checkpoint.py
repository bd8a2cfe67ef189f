"""
Which checkpoint of a run to keep (Section 4: "we selected models and performed early stopping based on FID score
calculated over 10k samples", and reported it over 50k): Frechet distances of few samples to one split select, and many
new samples are compared with another split, which had no say.

Works on finished and on running trainings: distances are kept, and a later call measures only what is new.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..data.averages import AreaAverages
from ..data.config import DataConfig
from ..data.image_sets import load_image_set
from ..data.memory import ImageData, InMemoryImages
from ..data.sources import open_images
from ..data.transforms import area_resize, to_float, to_uint8, to_unit
from ..files import write_json
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.pipeline_base import NOISE_RULE
from ..training.checkpoints import EMA_NAME, checkpoints_in, step_of
from ..training.config import check_at_least, check_is_no_folder, device_option, option
from ..training.export import save_pipeline, stage_pipeline
from ..training.resolve import preset_of
from ..training.stage import build_stage
from .features import FeatureExtractor, extract, load_extractor
from .metrics import FeatureStatistics, frechet_distance, frechet_standard_error
from .records import check_same_settings
from .references import real_distance, reference_statistics
from .seeded_sampling import draw, image_generator


Pipeline = CascadedDiffusionPipeline | SuperResolutionPipeline
REPORT_NAME = "checkpoint_selection.json"


@dataclass(kw_only=True)
class SelectionConfig:
    """
    Everything that can be said on the command line of `evaluation/select_checkpoint.py`.

    Raises:
        ValueError: for a value out of its range.
    """

    run: str = field(metadata={"help": "--output_dir of training/train_base.py or train_sr.py, with its checkpoints."})
    extractor: str = field(
        metadata={"help": "Network of the features: inception, efficientnet-lite0, dinov2, or a classifier's folder."}
    )
    output: str | None = option("JSON file for the figures. Default: checkpoint_selection.json in the run's folder.")
    export: str | None = option("Folder to write the selected stage to, as a pipeline. Default: none.")
    train_data_dir: str | None = option("Where the data is, if no longer where it was in training.")
    selecting_split: str | None = option("Split whose distance selects. Default: the training split.")
    reporting_split: str = option("Split that the selected checkpoint is compared with in the end.", "test")
    low_res: str | None = option(
        "Super-resolution: samples of the preceding stage to start from (npz, PNGs, or a folder of sample.py). "
        "Default: real images of the split that the samples are compared with."
    )
    low_res_stage: str | None = option("Of a folder of sample.py: the stage to start from.")
    num_images: int = option("Samples of each checkpoint, to select by.", 1000)
    num_final_images: int = option("Samples of the selected one, drawn anew, for the final figure.", 10_000)
    num_inference_steps: int | None = option("Sampling steps. Default: the stage's own.")
    augmentation_level: int | None = option("s of a stage that takes one. Default: the stage's own.")
    seed: int = option("Image i is drawn from the generator of (seed, i); the final ones from seed + 1.", 0)
    batch_size: int = option("Images per call of the pipeline and of the extractor.", 100)
    cache_dir: str = option("Folder for statistics of real images.", "~/.cache/cdm_diffusers")
    device: str = device_option()

    def __post_init__(self):
        check_is_no_folder(self, "output")
        check_at_least(
            self,
            num_images=2,
            num_final_images=2,
            num_inference_steps=1,
            augmentation_level=0,
            seed=0,
            batch_size=1,
        )


def select_checkpoint(config: SelectionConfig) -> dict[str, Any]:
    """
    Measures the EMA weights of all checkpoints of `config.run`, then the best of them once more.

    Returns:
        `dict`: what is in `config.output`: "checkpoints" with their distances, "selected" and "final".

    Raises:
        ValueError: there is no run, no checkpoint, too few images, or `config.output` holds figures of other settings.
    """
    run = Path(config.run)
    checkpoints = checkpoints_in(run)
    if not checkpoints or not (run / "training_config.json").is_file():
        raise ValueError(f"`run` is {config.run!r}, which holds no checkpoints of a training: give its --output_dir.")
    resolved = json.loads((run / "training_config.json").read_text())
    extractor = load_extractor(config.extractor, config.device)
    selecting = Comparison(config, resolved, config.selecting_split or resolved["data"]["dataset_split"], extractor)
    reporting = Comparison(config, resolved, config.reporting_split, extractor)
    if selecting.split == reporting.split:
        raise ValueError(
            f"`selecting_split` and `reporting_split` are both {selecting.split!r}: the split that selects must not "
            "be the one that reports."
        )
    selecting.check(config.num_images)
    reporting.check(config.num_final_images)
    check_export(config.export)
    output = Path(config.output) if config.output else run / REPORT_NAME
    report = open_report(output, settings_of(config, selecting, reporting))
    output.parent.mkdir(parents=True, exist_ok=True)

    for checkpoint in checkpoints:
        weights = weights_hash(checkpoint)
        if report["checkpoints"].get(checkpoint.name, {}).get("weights") != weights:
            pipeline = checkpoint_pipeline(checkpoint, resolved).to(config.device)
            figures = selecting.distance(pipeline, config.num_images, config.seed)
            figures = {"step": step_of(checkpoint), "weights": weights, **figures}
            report["checkpoints"][checkpoint.name] = figures
            write_json(output, report)
    measured = {checkpoint: report["checkpoints"][checkpoint.name]["distance"] for checkpoint in checkpoints}
    best = min(measured, key=measured.get)
    weights = report["checkpoints"][best.name]["weights"]
    if report["selected"] != best.name or report["final"]["weights"] != weights:
        pipeline = checkpoint_pipeline(best, resolved).to(config.device)
        final = reporting.distance(pipeline, config.num_final_images, config.seed + 1)
        report |= {"selected": best.name, "final": {"split": reporting.split, "weights": weights, **final}}
        report["real_images"] = {
            selecting.split: selecting.distance_of_real_images(reporting, config.num_images),
            reporting.split: reporting.distance_of_real_images(selecting, config.num_final_images),
        }
        write_json(output, report)
    if config.export is not None:
        figures = {
            f"distance to {selecting.split}, which selected step {step_of(best)}": measured[best],
            f"distance to {reporting.split}": report["final"]["distance"],
        }
        save_pipeline(checkpoint_pipeline(best, resolved), resolved, figures, None, Path(config.export))
        write_json(Path(config.export) / REPORT_NAME, report)
    print(selection_table(report))
    return report


# ------------------------------------------------------------------------------------------------------------------
# From a checkpoint to a pipeline
# ------------------------------------------------------------------------------------------------------------------


def weights_hash(checkpoint: Path) -> str:
    """Of the EMA weights: a run begun anew has checkpoints of the same names."""
    try:
        return hashlib.sha256(np.memmap(checkpoint / EMA_NAME, mode="r")).hexdigest()
    except (OSError, ValueError) as error:
        raise _incomplete(checkpoint, error) from error


def checkpoint_pipeline(checkpoint: Path, resolved: dict[str, Any]) -> Pipeline:
    """The stage with the EMA weights of `checkpoint`."""
    preset = preset_of(resolved)
    stage = build_stage(preset)
    try:
        stage.unet.load_state_dict(load_file(checkpoint / EMA_NAME))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _incomplete(checkpoint, error) from error
    id2label = resolved["data"]["id2label"]
    return stage_pipeline(stage.unet.eval(), stage, preset, id2label)


def _incomplete(checkpoint: Path, error: Exception) -> ValueError:
    return ValueError(f"{str(checkpoint)!r} is incomplete, damaged or has been rotated away ({error}).")


# ------------------------------------------------------------------------------------------------------------------
# Distances
# ------------------------------------------------------------------------------------------------------------------


class Comparison:
    """
    Distances of samples of the run's stage to the images of `split`, at the stage's size.

    A super-resolution stage starts from `config.low_res`, or else from images of the same split (Table 3b).
    """

    def __init__(self, config: SelectionConfig, resolved: dict[str, Any], split: str, extractor: FeatureExtractor):
        self.config, self.split, self.extractor = config, split, extractor
        self.unet = resolved["unet"]
        self.data = open_split(config, resolved, split)
        self.source = self.data.dataset if config.low_res is None else open_low_res(config, self.unet)
        self.real_images = AreaAverages(self.data.dataset, self.unet["sample_size"])
        self.options = {"batch_size": config.batch_size, "device": config.device}
        self.statistics: FeatureStatistics | None = None

    def check(self, count: int) -> None:
        """
        Raises:
            ValueError: there are not so many low-resolution images.
        """
        if self.unet["low_res_size"] is not None and count > len(self.source):
            raise ValueError(f"{count} samples were asked for, but there are {len(self.source)} images to start from.")

    def distance(self, pipeline: Pipeline, count: int, seed: int) -> dict[str, float | int]:
        """Of `count` samples, with its standard error over the draw of them."""
        if self.statistics is None:
            cache_dir = self.config.cache_dir
            self.statistics = reference_statistics(self.real_images, self.extractor, cache_dir, **self.options)
        pipeline.set_progress_bar_config(disable=True)
        is_base = self.unet["low_res_size"] is None
        images = self.base_samples(pipeline, count, seed) if is_base else self.super_resolved(pipeline, count, seed)
        features, _ = extract(self.extractor, InMemoryImages(images, None), self.config.batch_size, self.config.device)
        return {
            "distance": frechet_distance(self.statistics, FeatureStatistics.from_features(features)),
            "standard_error": frechet_standard_error(self.statistics, features),
            "num_samples": count,
            "num_real_images": self.statistics.count,
        }

    def distance_of_real_images(self, other: "Comparison", count: int) -> float:
        """Of `count` real images of the other split."""
        cache_dir = self.config.cache_dir
        return real_distance(self.real_images, other.real_images, count, self.extractor, cache_dir, **self.options)

    def base_samples(self, pipeline: CascadedDiffusionPipeline, count: int, seed: int) -> torch.Tensor:
        """uint8 (N, C, H, W), balanced over the classes."""
        num_classes = self.unet["num_classes"]
        labels = None if num_classes is None else torch.arange(count) % num_classes
        batches = []
        for indices in self.batches(torch.arange(count)):
            options = {"num_inference_steps": self.config.num_inference_steps}
            images = draw(pipeline, indices, labels, seed, **options)["base"]
            batches.append(to_uint8(2 * images - 1).cpu())
        return torch.cat(batches)

    def super_resolved(self, pipeline: SuperResolutionPipeline, count: int, seed: int) -> torch.Tensor:
        """uint8 (N, C, H, W), from low-resolution images drawn without replacement."""
        chosen = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(seed))[:count]
        loader = iter(DataLoader(Subset(self.source, chosen.tolist()), self.config.batch_size))
        batches = []
        for indices in self.batches(torch.arange(count)):
            batch = next(loader)
            output = pipeline(
                to_unit(area_resize(to_float(batch["image"]), self.unet["low_res_size"])),
                class_labels=None if self.unet["num_classes"] is None else batch["label"],
                augmentation_level=self.config.augmentation_level,
                num_inference_steps=self.config.num_inference_steps,
                generator=[image_generator(seed, index, 1) for index in indices.tolist()],
                output_type="pt",
            )
            batches.append(to_uint8(2 * output.images - 1).cpu())
        return torch.cat(batches)

    def batches(self, indices: torch.Tensor):
        return tqdm(indices.split(self.config.batch_size), desc="sampling", unit="batch", leave=False)


def open_split(config: SelectionConfig, resolved: dict[str, Any], split: str) -> ImageData:
    """A split of the data that the run was trained on, prepared in the same way."""
    names = {f.name for f in dataclasses.fields(DataConfig)} & resolved["data"].keys()
    arguments = {name: resolved["data"][name] for name in names}
    arguments |= {"dataset_split": split, "streaming": False}
    if config.train_data_dir is not None:
        arguments |= {"train_data_dir": config.train_data_dir, "dataset_name": None}
    return open_images(DataConfig(**arguments))


def open_low_res(config: SelectionConfig, unet: dict[str, Any]) -> Dataset:
    images = load_image_set(config.low_res, config.low_res_stage)
    if unet["low_res_size"] is None:
        raise ValueError(f"`low_res` is {config.low_res!r}, but the run's stage is a base: leave it out.")
    if (images.size, images.channels) != (unet["low_res_size"], unet["in_channels"]):
        raise ValueError(
            f"`low_res` ({images.source}) has {images.size}x{images.size} images of {images.channels} channels; the "
            f"stage takes {unet['low_res_size']}x{unet['low_res_size']} of {unet['in_channels']}."
        )
    if unet["num_classes"] is not None and images.labels is None:
        raise ValueError(f"`low_res` ({images.source}) has no labels, which the stage needs.")
    return images


# ------------------------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------------------------


def settings_of(config: SelectionConfig, selecting: Comparison, reporting: Comparison) -> dict[str, Any]:
    """What distances depend on; what is at a place counts by its content."""
    dropped = ("run", "output", "export", "train_data_dir", "low_res", "cache_dir", "device")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in dropped}
    extractor = selecting.extractor
    return settings | {
        "selecting_split": selecting.split,
        "noise_rule": None if config.augmentation_level else NOISE_RULE,
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint(),
        "data": {part.split: part.data.dataset.fingerprint() for part in (selecting, reporting)},
        "low_res": None if config.low_res is None else selecting.source.fingerprint(),
    }


def check_export(folder: str | None) -> None:
    """
    Raises:
        ValueError: there is something else than an earlier export.
    """
    if folder is None or not Path(folder).exists() or (Path(folder) / REPORT_NAME).is_file():
        return
    if not Path(folder).is_dir() or any(Path(folder).iterdir()):
        raise ValueError(f"`export` is {folder!r}, which holds something else: give a new folder.")


def open_report(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """
    A new report, or what an earlier call with the same settings has written.

    Raises:
        ValueError: the settings differ.
    """
    if not output.is_file():
        return {"settings": settings, "checkpoints": {}, "selected": None, "final": None}
    report = json.loads(output.read_text())
    holder = f"{str(output)!r} holds figures of other settings"
    check_same_settings(report["settings"], settings, holder, "Give another `output`.")
    return report


def selection_table(report: dict[str, Any]) -> str:
    """The report in markdown."""
    settings, final, real = report["settings"], report["final"], report["real_images"]
    lines = [
        f"Extractor: {settings['extractor']}.",
        "",
        f"| step | Frechet distance to {settings['selecting_split']!r}, {settings['num_images']:,} samples | |",
        "|---|---|---|",
    ]
    for name, figures in report["checkpoints"].items():
        mark = "selected" if name == report["selected"] else ""
        lines.append(f"| {figures['step']} | {figures['distance']:.3f} ± {figures['standard_error']:.3f} | {mark} |")
    lines += [
        "",
        f"{report['selected']}: {final['distance']:.3f} ± {final['standard_error']:.3f} to {final['split']!r}, "
        f"{final['num_samples']:,} new samples.",
        "As many real images of the other split: "
        f"{real[settings['selecting_split']]:.3f} and {real[final['split']]:.3f}.",
    ]
    return "\n".join(lines)
