"""
Which checkpoint of a run to keep (Section 4: "we selected models and performed early stopping based on FID score
calculated over 10k samples", and reported it over 50k): Frechet distances of few samples to one split select, and many
new samples are compared with another split, which had no say.

Works on finished and on running trainings: distances are kept, and a later call measures only what is new.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import default_collate

from ..data.averages import AreaAverages
from ..data.config import DataConfig
from ..data.image_sets import ImageSet, load_image_set
from ..data.splits import open_split
from ..data.transforms import area_resize, to_float, to_uint8, to_unit
from ..files import write_json
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.loading import check_output
from ..pipelines.stages import NOISE_RULE
from ..processes import ending_together, from_main, open_state
from ..training.checkpoints import EMA_NAME, checkpoints_in, read_checkpoint, step_of
from ..training.export import pipeline_of, save_pipeline, saved_part_names
from ..training.resolve import preset_of
from ..training.stage import build_stage
from .batches import in_order
from .config import SelectionConfig
from .features import FeatureExtractor, load_extractor, real_distance, reference_statistics
from .metrics import FeatureStatistics, frechet_distance, frechet_standard_error
from .records import open_report
from .sample import draw_images, image_generator, sample_batches
from .tables import selection_table


Pipeline = CascadedDiffusionPipeline | SuperResolutionPipeline
REPORT_NAME = "checkpoint_selection.json"
PAPERS_COUNT, PAPERS_FINAL_COUNT = 10_000, 50_000  # Section 4


def select_checkpoint(config: SelectionConfig) -> dict[str, Any]:
    """
    Measures the EMA weights of all checkpoints of `config.run`, then the best of them once more; with any number of
    processes.

    Returns:
        `dict`: what is in `config.output`: "checkpoints" with their distances, "selected" and "final".

    Raises:
        ValueError: there is no run, no checkpoint, too few images, or `config.output` holds figures of other settings.
    """
    state = open_state()
    with ending_together(state):
        return select_together(config, state)


def select_together(config: SelectionConfig, state: PartialState) -> dict[str, Any]:
    """[`select_checkpoint`] by processes that end together."""
    run = Path(config.run)
    checkpoints = from_main(lambda: checkpoints_in(run))  # a training may be adding and removing some
    if not checkpoints or not (run / "training_config.json").is_file():
        raise ValueError(f"`run` is {config.run!r}, which holds no checkpoints of a training: give its --output_dir.")
    resolved = json.loads((run / "training_config.json").read_text())
    with state.main_process_first():  # it may download
        extractor = load_extractor(config.extractor, config.device)
    selecting = Comparison(config, resolved, config.selecting_split or resolved["data"]["dataset_split"], extractor)
    reporting = Comparison(config, resolved, config.reporting_split, extractor)
    if selecting.split == reporting.split:
        raise ValueError(
            f"`selecting_split` and `reporting_split` are both {selecting.split!r}: the split that selects must not "
            "be the one that reports."
        )
    counts = {
        "num_images": selecting.count(config.num_images, PAPERS_COUNT),
        "num_final_images": reporting.count(config.num_final_images, PAPERS_FINAL_COUNT),
    }
    config = dataclasses.replace(config, **counts)
    check_export(config.export)
    if config.export is not None:
        check_output(config.export, saved_part_names(preset_of(resolved)), "export")
    output = Path(config.output) if config.output else run / REPORT_NAME
    new = {"checkpoints": {}, "selected": None, "final": None}
    report = from_main(lambda: open_report(output, selection_settings(config, selecting, reporting), new, "output"))
    output.parent.mkdir(parents=True, exist_ok=True)

    for checkpoint in checkpoints:
        weights = from_main(partial(weights_hash, checkpoint))
        if report["checkpoints"].get(checkpoint.name, {}).get("weights") != weights:
            pipeline = checkpoint_pipeline(checkpoint, resolved).to(config.device)
            figures = selecting.distance(pipeline, config.num_images, config.seed)
            figures = {"step": step_of(checkpoint), "weights": weights, **figures}
            report["checkpoints"][checkpoint.name] = figures
            if state.is_main_process:
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
        if state.is_main_process:
            write_json(output, report)
    if config.export is not None and state.is_main_process:
        figures = {
            f"distance to {selecting.split}, which selected step {step_of(best)}": measured[best],
            f"distance to {reporting.split}": report["final"]["distance"],
        }
        save_pipeline(checkpoint_pipeline(best, resolved), resolved, figures, None, Path(config.export))
        write_json(Path(config.export) / REPORT_NAME, report)
    if state.is_main_process:
        print(selection_table(report))
    return report


# ------------------------------------------------------------------------------------------------------------------
# From a checkpoint to a pipeline
# ------------------------------------------------------------------------------------------------------------------


def weights_hash(checkpoint: Path) -> str:
    """A hash of the EMA weights: a run that was started over has checkpoints of the same names."""
    try:
        return hashlib.sha256(np.memmap(checkpoint / EMA_NAME, mode="r")).hexdigest()
    except (OSError, ValueError) as error:
        raise _incomplete(checkpoint, error) from error


def checkpoint_pipeline(checkpoint: Path, resolved: dict[str, Any]) -> Pipeline:
    """The stage with the EMA weights of `checkpoint`."""
    if "distillation" in resolved:  # students of one run differ in their number of steps
        resolved, _ = read_checkpoint(checkpoint)
    preset = preset_of(resolved)
    stage = build_stage(preset)
    try:
        stage.unet.load_state_dict(load_file(checkpoint / EMA_NAME))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _incomplete(checkpoint, error) from error
    id2label = resolved["data"]["id2label"]
    return pipeline_of(stage.unet.eval(), stage, preset, id2label)


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
        self.data = open_split(data_config(resolved, split, config.train_data_dir)).dataset
        self.source = self.data
        if config.low_res is not None:
            self.source = open_low_res(config.low_res, config.low_res_stage, self.unet)
        self.real_images = AreaAverages(self.data, self.unet["sample_size"])
        self.options = {"batch_size": config.batch_size, "device": config.device}
        self.statistics: FeatureStatistics | None = None

    def count(self, given: int | None, default: int) -> int:
        """
        Number of samples: the one `given`, else the `default`, but no more than there are images to start from.

        Raises:
            ValueError: there are not that many low-resolution images.
        """
        if self.unet["low_res_size"] is None:
            return default if given is None else given
        if given is None:
            return min(default, len(self.source))
        if given > len(self.source):
            raise ValueError(
                f"{given} samples were asked for, but there are {len(self.source)} images to start from: give a "
                "smaller `num_images` or `num_final_images`, or more images as `low_res`."
            )
        return given

    def distance(self, pipeline: Pipeline, count: int, seed: int) -> dict[str, float | int]:
        """Of `count` samples, with its standard error over the draw of them."""
        if self.statistics is None:
            cache_dir = self.config.cache_dir
            self.statistics = reference_statistics(self.real_images, self.extractor, cache_dir, **self.options)
        pipeline.set_progress_bar_config(disable=True)
        is_base = self.unet["low_res_size"] is None
        features = self.of_base(pipeline, count, seed) if is_base else self.of_super_resolved(pipeline, count, seed)
        return from_main(
            lambda: {
                "distance": frechet_distance(self.statistics, FeatureStatistics.from_features(features)),
                "standard_error": frechet_standard_error(self.statistics, features),
                "num_samples": count,
                "num_real_images": self.statistics.count,
            }
        )

    def distance_of_real_images(self, other: "Comparison", count: int) -> float:
        """Of `count` real images of the other split."""
        cache_dir = self.config.cache_dir
        return real_distance(self.real_images, other.real_images, count, self.extractor, cache_dir, **self.options)

    def of_base(self, pipeline: CascadedDiffusionPipeline, count: int, seed: int) -> torch.Tensor:
        """Features (N, D) of samples that are balanced over the classes."""
        num_classes = self.unet["num_classes"]
        labels = None if num_classes is None else torch.arange(count) % num_classes
        options = {"num_inference_steps": self.config.num_inference_steps}

        def make(indices: torch.Tensor) -> torch.Tensor:
            return draw_images(pipeline, indices, labels, seed, **options)["base"]

        return self.features(make, count)

    def of_super_resolved(self, pipeline: SuperResolutionPipeline, count: int, seed: int) -> torch.Tensor:
        """Features (N, D) of samples from low-resolution images drawn without replacement."""
        chosen = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(seed))[:count]

        def make(indices: torch.Tensor) -> torch.Tensor:
            batch = default_collate([self.source[index] for index in chosen[indices].tolist()])
            return pipeline(
                to_unit(area_resize(to_float(batch["image"]), self.unet["low_res_size"])),
                class_labels=None if self.unet["num_classes"] is None else batch["label"],
                augmentation_level=self.config.augmentation_level,
                num_inference_steps=self.config.num_inference_steps,
                generator=[image_generator(seed, index, 1) for index in indices.tolist()],
                output_type="pt",
            ).images

        return self.features(make, count)

    @torch.no_grad()
    def features(self, make: Callable[[torch.Tensor], torch.Tensor], count: int) -> torch.Tensor:
        """(N, D), on the CPU, of all that `make` returns, float (B, C, H, W) in [0, 1] for numbers (B,)."""
        state = PartialState()
        share = torch.arange(count).split(self.config.batch_size)[state.process_index :: state.num_processes]
        made = sample_batches(make, share, sum(map(len, share)), disable=not state.is_main_process)
        return torch.cat(list(in_order(self.extractor(to_uint8(2 * images - 1))[0].cpu() for images in made)))


def data_config(resolved: dict[str, Any], split: str, train_data_dir: str | None) -> DataConfig:
    """A split of the data that the run was trained on, now in `train_data_dir` if given, prepared in the same way."""
    place: dict[str, Any] = {}
    if train_data_dir is not None:
        place = {"train_data_dir": train_data_dir, "dataset_name": None, "dataset_revision": None}
    return DataConfig.of(resolved["data"], **place, dataset_split=split, streaming=False)


def open_low_res(path: str, stage: str | None, unet: dict[str, Any]) -> ImageSet:
    """Samples that a super-resolution stage with the network `unet` can start from."""
    images = load_image_set(path, stage)
    if unet["low_res_size"] is None:
        raise ValueError(f"`low_res` is {path!r}, but the run's stage is a base: leave it out.")
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


def selection_settings(config: SelectionConfig, selecting: Comparison, reporting: Comparison) -> dict[str, Any]:
    """What distances depend on; data at a path counts by its content."""
    dropped = ("run", "output", "export", "train_data_dir", "low_res", "cache_dir", "device")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in dropped}
    extractor = selecting.extractor
    return settings | {
        "selecting_split": selecting.split,
        "noise_rule": None if config.augmentation_level else NOISE_RULE,
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint(),
        "data": {part.split: part.data.fingerprint() for part in (selecting, reporting)},
        "low_res": None if config.low_res is None else selecting.source.fingerprint(),
    }


def check_export(folder: str | None) -> None:
    """
    Raises:
        ValueError: there is something other than an earlier export.
    """
    if folder is None or not Path(folder).exists() or (Path(folder) / REPORT_NAME).is_file():
        return
    if not Path(folder).is_dir() or any(Path(folder).iterdir()):
        raise ValueError(f"`export` is {folder!r}, which holds something else: give a new folder.")
