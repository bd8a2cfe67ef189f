"""
Post-training search (Section 3.3): quality of one stage over s, steps, solver, guidance and more, on low-resolution
images that are sampled once.

For each setting and sampling seed a set of samples is made as `cdm sample-set` makes it, measured, and a line
appended to `results.jsonl`; a search that was stopped goes on where it was.
"""

import dataclasses
import functools
import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from ..data.averages import averaged_to
from ..data.config import DataConfig
from ..data.image_sets import load_image_set
from ..data.labels import check_same_classes
from ..data.memory import ImageData
from ..data.splits import open_split, open_splits
from ..data.transforms import area_resize, to_float, to_unit
from ..evaluation.batches import joined, run_over
from ..evaluation.classifier import Classifier, classify
from ..evaluation.config import SampleConfig
from ..evaluation.ensembles import crps, squared_spread_and_error
from ..evaluation.features import ClassifierExtractor, extract, load_extractor, real_distance, reference_statistics
from ..evaluation.metrics import FeatureStatistics, frechet_distance
from ..evaluation.records import check_same_settings, digest, provenance
from ..evaluation.sample import (
    DTYPES,
    all_labels,
    call_options,
    check_call,
    draw_images,
    how_to_go_on,
    image_generator,
    sample,
)
from ..evaluation.sample_store import RESULTS_NAME, LowResImages, drawn_images, store_real_images
from ..files import read_json, reveal, temporary_name, write_json
from ..models.arguments import low_res_channels_of
from ..pipelines import CascadedDiffusionPipeline
from ..pipelines.fingerprints import fingerprint, weights_fingerprint
from ..pipelines.solvers import solver_name
from ..pipelines.stages import NOISE_RULE, StageOptions, num_classes_of
from ..processes import ending_together, from_main, held_by_main, open_state
from .config import MEMBERS, SearchConfig, Setting
from .search_report import compared_setting, outlook_of, summarise, write_best, write_report
from .time_steps import find_timesteps, fine_grid, follow


SEARCH_NAME = "search.json"
LINES_NAME = "results.jsonl"
TIMESTEPS_NAME = "timesteps.json"

# Names of solvers that once meant something else, and what they mean now; results that do not say so mean the former.
SOLVER_RULES = {"heun": "with Karras's levels"}


def search(config: SearchConfig) -> list[dict[str, Any]]:
    """
    Samples and measures what has no result yet, and writes `results.jsonl`, `table.md` and plots.

    Returns:
        `list[dict]`: a row for each setting, with means over the seeds; see `search_report.py`.

    Raises:
        ValueError: a setting that the cascade does not take (before any sampling), data, extractor or classifier that
            do not fit, results of another search in the folder, or a search that is at work there.
    """
    state = open_state()
    output_dir = Path(config.output_dir)
    with ending_together(state, lambda: how_to_go_on(output_dir)), held_by_main(state, output_dir, "a search"):
        return search_alone(config, state)


def search_alone(config: SearchConfig, state: PartialState) -> list[dict[str, Any]]:
    """[`search`] in a folder that no other search uses."""
    run = Search(config, state)
    run.find_time_steps()
    todo = [(seed, setting) for seed in config.seeds for setting in run.settings]
    todo = from_main(lambda: [(seed, setting) for seed, setting in todo if run.find(seed, setting) is None])
    if old := len(run.lines()) - len(run.results()):
        names = ", ".join(f"`{name}` ({rule})" for name, rule in SOLVER_RULES.items())
        state.print(f"{old} lines of {run.folder / LINES_NAME} are not used; names in them changed meaning: {names}.")
    if state.is_main_process:
        run.begin()
    for number, (seed, setting) in enumerate(todo, 1):
        state.print(f"{number} of {len(todo)}: seed {seed}, {setting.as_dict()}")
        run.sample_and_measure(seed, setting)
    state.wait_for_everyone()
    select_split, limit, select = config.select_split, config.max_evaluations, config.select
    is_written = config.write_best or config.write_as is not None
    rows = summarise(run.results(), run.stage, config.seeds, select_split, limit, is_written, select)
    real_distances = run.real_distances()
    if state.is_main_process:
        outlook = outlook_of(rows, config.dataset_split)
        write_report(rows, real_distances, run.description, run.folder, select_split, limit, outlook, select)
        if is_written:
            about = {"selected_by": select_split, "select": select, "output_dir": config.output_dir}
            write_best(rows, run.pipeline, run.stage, Path(config.pipeline), about, config.write_as)
    state.wait_for_everyone()
    return rows


class Search:
    """
    A search whose parts fit each other, and its folder.

    Raises:
        ValueError: as `search`.
    """

    def __init__(self, config: SearchConfig, state: PartialState):
        self.config, self.state, self.folder = config, state, Path(config.output_dir)
        pipeline = CascadedDiffusionPipeline.from_pretrained(config.pipeline, dtype=DTYPES[config.dtype])
        self.pipeline = pipeline.to(state.device)
        self.pipeline.set_progress_bar_config(disable=True)
        names = [stage.name for stage in pipeline.stages]
        self.stage = config.stage or names[-1]
        self.measured = config.measured_stage or self.stage
        for name, value in (("stage", self.stage), ("measured_stage", self.measured)):
            if value not in names:
                raise ValueError(f"`{name}` is {value!r}; it must be one of the pipeline's stages, {names}.")
        self.position = names.index(self.stage)
        if names.index(self.measured) < self.position:
            raise ValueError(f"`measured_stage` is {self.measured!r}; it must not run before `stage` {self.stage!r}.")
        self.before = names[: self.position]
        self.settings = resolved(config.settings(), pipeline, self.stage)
        for setting in self.settings:
            self.check(setting)
        self.size = pipeline.stages[names.index(self.measured)].unet.config.sample_size
        with state.main_process_first():  # it may download
            self.extractor = load_extractor(config.extractor, state.device)
        self.classifier = self.open_classifier()
        self.check_selection()
        self.data = self.open_splits()
        self.inputs = dict(self.data)  # real images that stand in for generated ones
        if config.real_inputs and self.before:
            self.add_real_inputs()
        self.description = json.loads(json.dumps(self.describe()))
        file = self.folder / SEARCH_NAME
        if file.exists():
            holder = f"`output_dir` {config.output_dir!r} holds another search"
            earlier = read_json(file, dict[str, Any], "cdm search", "choose another folder.")
            check_same_settings(earlier, self.description, holder, "Choose another folder.")

    def describe(self) -> dict[str, Any]:
        """What all results of a folder share."""
        config, cascade = self.config, self.pipeline
        num_classes = num_classes_of(cascade.stages)
        labels = all_labels(config.labels, config.num_images, num_classes, cascade.config.id2label)
        return {
            "stage": self.stage,
            "measured_stage": self.measured,
            "num_images": config.num_images,
            "batch_size": config.batch_size,
            "labels": None if labels is None else digest(labels.tolist()),
            "noise_rule": None if all(stage.noising_scheduler is None for stage in cascade.stages) else NOISE_RULE,
            "dtype": config.dtype,
            "extractor": self.extractor.name,
            "distance": self.extractor.distance_name,
            "extractor_fingerprint": self.extractor.fingerprint(),
            "classifier": None if self.classifier is None else weights_fingerprint(self.classifier),
            "weights_and_schedulers": fingerprint(cascade.stages),
            "defaults": {k: v for k, v in cascade.config.items() if k.startswith("default_")},
            "data": {split: data.dataset.fingerprint() for split, data in self.data.items()},
            "about": {
                "config": dataclasses.asdict(config),
                **provenance("torch", "diffusers", "numpy"),
            },
        }

    # What fits

    def check(self, setting: Setting) -> None:
        """
        Raises:
            ValueError: the stage cannot be sampled so.
        """
        try:
            if not self.before and (setting.truncated or setting.consistency or setting.conditioning != "generated"):
                raise ValueError(
                    "the base has no conditioning: `truncated`, `consistency` and `conditioning` are not for it."
                )
            if setting.timesteps == "gits":  # any that the solver must take
                times = fine_grid(self.pipeline.stages[self.position].scheduler.alphas_cumprod)
                setting = dataclasses.replace(setting, timesteps=times[-setting.num_inference_steps :])
            config, first_stage = self.sample_config(0, setting), self.first_stage(setting)
            pipeline = self.pipeline.with_schedulers(config.scheduler, config.inference_schedules, config.last_stage)
            low_res = None
            if first_stage > 0:
                unet = pipeline.stages[first_stage].unet.config
                low_res = torch.zeros(1, low_res_channels_of(unet), unet.low_res_size, unet.low_res_size)
            pipeline.set_progress_bar_config(disable=True)
            options = call_options(pipeline, config, first_stage)
            check_call(pipeline, torch.tensor([0]), 0, low_res, first_stage, **options)
        except ValueError as error:
            raise ValueError(f"Setting {setting.as_dict()} of stage `{self.stage}`: {error}") from error

    def open_classifier(self) -> Classifier | None:
        """The one that recognises samples; it must know the cascade's classes."""
        classifier, id2label = None, self.pipeline.config.id2label
        if self.config.classifier is not None:
            classifier = Classifier.from_pretrained(self.config.classifier).to(self.state.device)
            taken, channels = classifier.config, self.pipeline.base_unet.config.out_channels
            if (taken.image_size, taken.num_channels) != (self.size, channels):
                raise ValueError(
                    f"`classifier` {self.config.classifier!r} takes {taken.image_size}x{taken.image_size} images of "
                    f"{taken.num_channels} channels; those measured are {self.size}x{self.size} of {channels}."
                )
        elif isinstance(self.extractor, ClassifierExtractor) and id2label is not None:
            classifier = self.extractor.network
        if classifier is not None and id2label is not None:
            check_same_classes("the classifier", classifier.config.id2label, id2label)
        return classifier

    def open_splits(self) -> dict[str, ImageData]:
        """Real images at the resolution from which stages are averaged down; with labels if they condition a stage."""
        config, id2label = self.config, self.pipeline.config.id2label
        is_labelled = id2label is not None and any(setting.conditioning != "generated" for setting in self.settings)
        data = open_splits(self.data_config(is_labelled), config.eval_split, id2label=id2label)
        return dict(zip((config.dataset_split, config.eval_split), data, strict=True))

    def check_selection(self) -> None:
        """
        Raises:
            ValueError: the figure that is to select is not measured for these settings.
        """
        select = self.config.select
        if select == "recognition" and self.classifier is None:
            raise ValueError("`select` is 'recognition', but there is no classifier: give --classifier.")
        if select == "crps" and not self.before:
            raise ValueError("`select` is 'crps', but the base has no input, of which there could be several samples.")
        if select == "crps" and any(setting.truncated for setting in self.settings):
            raise ValueError("`select` is 'crps', which starts from real images: `truncated` is not for it.")

    def data_config(self, is_labelled: bool, split: str | None = None) -> DataConfig:
        """A split, by default the training one."""
        stages = self.pipeline.stages
        return self.config.split_config(
            split or self.config.dataset_split,
            source_resolution=self.pipeline.config.source_resolution or stages[-1].unet.config.sample_size,
            num_channels=stages[0].unet.config.out_channels,
            padding=self.config.padding,
            class_conditional=is_labelled,
        )

    def add_real_inputs(self) -> None:
        """A setting by which [`outlook_of`] sees whether the generated inputs have errors to repair, where it can."""
        compared = compared_setting(self.settings)
        if compared is None or compared.from_real_images() in self.settings:
            return
        config, id2label = self.config, self.pipeline.config.id2label
        try:  # labels only here: they would change the fingerprint of the data, and so refuse earlier results
            images = self.data[config.dataset_split]
            if id2label is not None and images.dataset.labels is None:
                images = open_split(self.data_config(is_labelled=True), id2label=id2label)
            if len(images.dataset) < config.num_images:
                raise ValueError(
                    f"`num_images` is {config.num_images}, but there are only {len(images.dataset)} training images."
                )
        except ValueError as error:
            self.state.print(f"Nothing will be said about whether augmentation pays: {error}")
            return
        self.inputs[config.dataset_split] = images
        self.settings.append(compared.from_real_images())
        self.check(self.settings[-1])

    # Time steps

    def find_time_steps(self) -> None:
        """Puts the time steps that suit the stage's trajectories in the place of "gits", once for a folder."""
        file, wanted = self.folder / TIMESTEPS_NAME, [one for one in self.settings if one.timesteps == "gits"]
        found = from_main(lambda: json.loads(file.read_text()) if file.exists() else {})
        for setting in wanted:
            key = json.dumps([setting.num_inference_steps, setting.augmentation_level, setting.guidance_scale])
            if key not in found:
                self.state.print(f"Time steps: {setting.as_dict()}")
                found[key] = self.time_steps(setting)
                if self.state.is_main_process:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_json(file, found)
            self.settings[self.settings.index(setting)] = dataclasses.replace(setting, timesteps=found[key])

    def time_steps(self, setting: Setting) -> list[int]:
        """The time steps of "gits" for a number of steps, an s and a w, on the first images of the first seed."""
        seed, count, stage = self.config.seeds[0], min(16, self.config.num_images), self.pipeline.stages[self.position]
        if self.before:
            given = LowResImages(self.low_res_images(seed, "generated"), self.before[-1])
            labels, low_res = given.labels, given[torch.arange(count)].to(self.state.device) * 2 - 1
        else:
            cascade, low_res = self.pipeline, None
            num_classes = num_classes_of(cascade.stages)
            labels = all_labels(self.config.labels, count, num_classes, cascade.config.id2label)
        labels = None if labels is None else labels[:count].to(self.state.device)
        options = StageOptions(None, setting.augmentation_level, setting.guidance_scale)
        generator = image_generator(seed, 0, self.position)

        def find() -> list[int]:
            trajectories = follow(stage, options, labels, low_res, generator, count)
            return find_timesteps(trajectories, [setting.num_inference_steps])[setting.num_inference_steps]

        return from_main(find)

    # Results

    def lines(self) -> list[dict[str, Any]]:
        """All of `results.jsonl`."""
        file = self.folder / LINES_NAME
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def results(self) -> list[dict[str, Any]]:
        """
        The last line of `results.jsonl` for each setting and seed, but none of another meaning of a solver's name.
        """
        lines = [line for line in self.lines() if line.get("solver_rule") == solver_rule(line["setting"])]
        return list({json.dumps([line["setting"], line["seed"]]): line for line in lines}.values())

    def find(self, seed: int, setting: Setting) -> dict[str, Any] | None:
        """The result of a setting and seed, if there is one."""
        expected = json.loads(json.dumps(setting.as_dict()))
        found = (line for line in self.results() if (line["seed"], line["setting"]) == (seed, expected))
        needs_ensemble = self.needs_ensemble(setting)
        return next((line for line in found if not needs_ensemble or "crps" in line["figures"]), None)

    def needs_ensemble(self, setting: Setting) -> bool:
        """Whether several samples of real inputs are measured."""
        return self.config.select == "crps" and setting.conditioning == "generated"

    def begin(self) -> None:
        """Writes down what all results of the folder share."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SEARCH_NAME).exists():
            write_json(self.folder / SEARCH_NAME, self.description)

    def append(self, line: dict[str, Any]) -> None:
        """The file is replaced as a whole, so that a kill leaves no partial line."""
        temporary = temporary_name(self.folder / LINES_NAME)
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*self.lines(), line]))
        reveal(temporary, self.folder / LINES_NAME)

    # One setting

    def first_stage(self, setting: Setting) -> int:
        """Number of the first stage that runs: the searched one, or the one before where that is truncated."""
        return max(self.position - 1, 0) if setting.truncated else self.position

    def sample_config(self, seed: int, setting: Setting, **options) -> SampleConfig:
        """How a set of samples is made; `options` override the setting's."""
        shared = {name: getattr(self.config, name) for name in ("pipeline", "num_images", "batch_size", "dtype")}
        shared |= {"output_dir": self.config.output_dir, "last_stage": self.measured, "image_format": "npz"}
        return SampleConfig(seed=seed, **shared | setting.sampling_options(self.stage) | options)

    def sample_and_measure(self, seed: int, setting: Setting) -> None:
        """Adds the result of a setting and seed."""
        rule = solver_rule(setting.as_dict())
        samples = self.folder / "samples" / digest([seed, setting.as_dict(), *([rule] if rule else [])])
        first_stage = self.first_stage(setting)
        options = {"output_dir": str(samples)}
        if first_stage == 0:
            options["labels"] = self.config.labels
        else:
            low_res_dir = self.low_res_images(seed, setting.conditioning)
            options |= {"low_res_dir": str(low_res_dir), "low_res_stage": self.before[first_stage - 1]}
        sample(self.sample_config(seed, setting, **options), self.pipeline)
        figures, num_features = self.measure(samples)
        if self.needs_ensemble(setting):
            figures |= self.measure_ensemble(seed, setting)
        if self.state.is_main_process:
            record = json.loads((samples / RESULTS_NAME).read_text())
            evaluations = record["evaluations"]
            if first_stage > 0:
                before = json.loads((low_res_dir / RESULTS_NAME).read_text())["evaluations"]
                evaluations = {
                    name: before[name] for name in self.before[:first_stage] if name in before
                } | evaluations
            line = {
                "setting": setting.as_dict(),
                **({"solver_rule": rule} if rule else {}),
                "seed": seed,
                "figures": figures,
                "num_features": num_features,
                "evaluations": evaluations,
                "seconds": record["seconds"],
                "num_images": self.config.num_images,
                "extractor": self.extractor.name,
            }
            self.append(line)
            if not self.config.keep_samples:
                shutil.rmtree(samples)
        self.state.wait_for_everyone()

    def low_res_images(self, seed: int, conditioning: str) -> Path:
        """The folder of all stages before the searched one, sampled (or, of one stage, averaged down) once."""
        folder = self.folder / "low_res" / f"{conditioning}-{seed}"
        if conditioning == "generated":
            options = {"output_dir": str(folder), "last_stage": self.before[-1], "keep_stages": True}
            options["labels"] = self.config.labels
            sample(self.sample_config(seed, Setting(), **options), self.pipeline)
        elif self.state.is_main_process:
            config = self.config
            data = self.inputs[config.dataset_split if conditioning == "train" else config.eval_split]
            size = self.pipeline.stages[self.position - 1].unet.config.sample_size
            store_real_images(folder, data.dataset, self.before[-1], size, config.num_images, seed, config.batch_size)
        self.state.wait_for_everyone()
        return folder

    def measure(self, samples: Path) -> tuple[dict[str, float], int]:
        """
        Frechet distances from both splits and, if there is a classifier, the share of images it recognises; and the
        number of features.
        """
        config, device, images = self.config, self.state.device, load_image_set(samples)
        features, logits = extract(self.extractor, images, config.batch_size, device)
        of_samples = FeatureStatistics.from_features(features)
        figures = {}
        for split, dataset in self.real_images().items():
            options = {"batch_size": config.batch_size, "device": device}
            reference = reference_statistics(dataset, self.extractor, config.cache_dir, **options)
            figures[split] = from_main(partial(frechet_distance, of_samples, reference))
        if self.classifier is not None and images.labels is not None:
            if config.classifier is not None:
                logits, _ = classify(self.classifier, images, config.batch_size, device)
            figures["recognised"] = (logits.argmax(1) == images.labels).float().mean().item()
        return figures, features.shape[1]

    @functools.cached_property
    def ensemble_data(self) -> Dataset:
        """Real images of the selecting split with labels, where these condition a stage."""
        split, id2label = self.config.select_split, self.pipeline.config.id2label
        dataset = self.data[split].dataset
        if id2label is not None and dataset.labels is None:
            dataset = open_split(self.data_config(is_labelled=True, split=split), id2label=id2label).dataset
        return dataset

    def measure_ensemble(self, seed: int, setting: Setting) -> dict[str, float]:
        """CRPS, and spread over error, of [`MEMBERS`] samples of each of some real images, averaged down."""
        config, dataset = self.sample_config(seed, setting), self.ensemble_data
        order = drawn_images(dataset, seed)[: self.config.ensemble_images]
        labels = None if dataset.labels is None else dataset.labels[order].repeat_interleave(MEMBERS)
        pipeline = self.pipeline.with_schedulers(config.scheduler, config.inference_schedules, config.last_stage)
        pipeline.set_progress_bar_config(disable=True)
        options = call_options(pipeline, config, self.position)
        low_res_size = pipeline.stages[self.position].unet.config.low_res_size

        def of_batch(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            images = to_float(batch["image"])
            low_res, truth = (to_unit(area_resize(images, size)) for size in (low_res_size, self.size))
            numbers = (MEMBERS * batch["number"][:, None].cpu() + torch.arange(MEMBERS)).flatten()
            low_res = low_res.repeat_interleave(MEMBERS, dim=0)
            made = draw_images(pipeline, numbers, labels, seed, low_res, self.position, **options)[self.measured]
            members = made.unflatten(0, (-1, MEMBERS)).transpose(0, 1)
            return crps(members, truth), *squared_spread_and_error(members, truth)

        numbered = [
            {"image": dataset[place]["image"], "number": number} for number, place in enumerate(order.tolist())
        ]
        loader = DataLoader(numbered, max(1, self.config.batch_size // MEMBERS))
        scores, spread, error = joined(run_over(loader, of_batch, self.state.device, "samples of real inputs"))
        ratio = (spread.mean() / error.mean()).sqrt().item()
        return {"crps": scores.mean().item(), "spread_over_error": ratio}

    def real_images(self) -> dict[str, Dataset]:
        """Of both splits, as the measured stage is trained on them."""
        return averaged_to({split: data.dataset for split, data in self.data.items()}, self.size)

    def real_distances(self) -> dict[str, float]:
        """From each split, of as many real images of the other one as there are samples."""
        config, images = self.config, self.real_images()
        options = {"batch_size": config.batch_size, "device": self.state.device}
        return {
            split: real_distance(
                images[split], images[other], config.num_images, self.extractor, config.cache_dir, **options
            )
            for split, other in itertools.permutations(images)
        }


def solver_rule(setting: dict[str, Any]) -> str | None:
    """The one of [`SOLVER_RULES`] by which a setting is sampled."""
    return SOLVER_RULES.get(setting.get("scheduler"))


def resolved(settings: list[Setting], pipeline: CascadedDiffusionPipeline, stage: str) -> list[Setting]:
    """The settings with the pipeline's own values where they have none, each once."""
    own = pipeline.stage_options()
    defaults = {
        "num_inference_steps": own["num_inference_steps"][stage],
        "augmentation_level": own["augmentation_levels"].get(stage),
        "scheduler": solver_name(getattr(pipeline, f"{stage}_scheduler")),
        "guidance_scale": own["guidance_scale"][stage],
    }

    def whole(setting: Setting) -> Setting:
        given = setting.as_dict()
        is_own = given.get("scheduler", defaults["scheduler"]) == defaults["scheduler"]
        own_times = own.get("timesteps", {}).get(stage) if is_own and setting.num_inference_steps is None else None
        times = given.pop("timesteps", own_times)
        if isinstance(times, list):
            given |= {"timesteps": times, "num_inference_steps": len(times)}
        elif times == "gits":
            given["timesteps"] = times
        return Setting(**(defaults | given))

    settings = [whole(setting) for setting in settings]
    return list({json.dumps(setting.as_dict()): setting for setting in settings}.values())
