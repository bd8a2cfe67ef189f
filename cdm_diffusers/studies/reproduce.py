"""
The paper's experiments as commands: what is missing is trained, sampled and measured, and written down as a table of
the paper's shape with the paper's own rows beside ours.

Everything is kept under a name that says what it came from, so that a run that was stopped goes on, experiments share
what they have in common, and a changed configuration touches nothing that was made before.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import Dataset

from ..added import content
from ..conditioning_augmentation import gaussian_blur
from ..data.config import DataOptions
from ..data.splits import open_split
from ..data.transforms import to_uint8
from ..evaluation.classification_accuracy_score import classification_accuracy_score
from ..evaluation.config import ClassificationAccuracyConfig, EvaluateConfig, SampleConfig
from ..evaluation.evaluate import evaluate
from ..evaluation.features import load_extractor
from ..evaluation.records import digest, provenance
from ..evaluation.sample import DTYPES, how_to_go_on, sample
from ..evaluation.sample_store import LowResImages, SampleStore, store_real_images
from ..files import write_json
from ..options.problems import did_you_mean
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.fingerprints import fingerprint
from ..pipelines.loading import Pipeline, load_pipeline, load_without_weights
from ..pipelines.stages import noise_rule, num_classes_of
from ..presets import StagePreset, get_preset
from ..processes import ending_together, from_main, held_by_main, open_state
from ..training.config import TrainingConfig
from ..training.export import stage_without_weights
from ..training.loop import train
from ..training.resolve import resolve_preset
from .augmentation import check_settings, measure_augmentation
from .config import DATA_OPTIONS, ReproduceConfig, StageSource, StudySettings, experiment_names, read_settings
from .experiments import Arm, AugmentationExperiment, Experiment, Row, StageRecipe
from .figures import write_figure
from .plan import Plan, as_text
from .reports import row_name, write_table


# How figures are computed; it changes whenever the same samples begin to have other figures, so that a table has none
# of the old rule beside those of the new one.
FIGURES_RULE = "kernel distances of all pairs, Inception Scores of splits in order"
SPLITS = {"train": "dataset_split", "validation": "eval_split"}


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """
    Makes and measures everything that an experiment compares, and writes `NAME.json`, `NAME.md` and `NAME.png` into
    `config.output_dir`; of "all" one experiment after another. With `dry_run` it says what would be made instead.

    Returns:
        `dict`: what is in `NAME.json`; of "all" that by name; with `dry_run` a plan, see `plan.py`.

    Raises:
        ValueError: the configuration does not fit the experiment, what it names does not fit together, or another
            experiment is at work in the folder.
    """
    if config.dry_run:
        plan = plan_of(config)
        print(json.dumps(plan, indent=2) if config.json else as_text(plan))
        return plan
    if config.name == "all":
        configs = {
            name: dataclasses.replace(config, name=name) for name in experiment_names(config.name, config.config)
        }
        for one in configs.values():
            checked(one)
        return {name: reproduce_one(one) for name, one in configs.items()}
    return reproduce_one(config)


def plan_of(config: ReproduceConfig) -> dict[str, Any]:
    """
    What would be trained and sampled. Needs neither data nor a GPU.

    Raises:
        ValueError: as `reproduce`, as far as can be known without them.
    """
    plan = Plan(config.gpu_tflops, config.utilisation)
    for name in experiment_names(config.name, config.config):
        plan.add(name, *checked(dataclasses.replace(config, name=name)))
    return plan.as_dict()


def checked(config: ReproduceConfig) -> tuple[Experiment, "Study"]:
    """
    The experiment of that name, and what it is part of.

    Raises:
        ValueError: as [`Study.check`].
    """
    experiment, study = opened(config)
    study.check(config.name, experiment)
    return experiment, study


def opened(config: ReproduceConfig) -> tuple[Experiment, "Study"]:
    """[`checked`], before the check."""
    settings = read_settings(config)
    experiment = settings.experiment(config.name)
    return experiment, Study(settings, Path(config.output_dir or ""))


def reproduce_one(config: ReproduceConfig) -> dict[str, Any]:
    """[`reproduce`] of one experiment."""
    experiment, study = opened(config)
    state, output_dir, task = study.state, Path(config.output_dir), f"the experiment {config.name}"
    with ending_together(state, lambda: how_to_go_on(output_dir)), held_by_main(state, output_dir, task):
        study.check(config.name, experiment)
        study.figures.measured_with  # noqa: B018 - fails here, and not after training, where something is missing
        report = {
            "name": config.name,
            "title": experiment.title,
            "settings": study.settings.given,
            **provenance("torch", "diffusers", "numpy"),
        }
        if isinstance(experiment, AugmentationExperiment):
            report |= measure_augmentation(study, experiment)
        else:
            report["rows"] = [study.measure(row) for row in experiment.rows]
        if state.is_main_process:
            write_json(output_dir / f"{config.name}.json", report)
            print(write_table(report, experiment, output_dir))
            write_figure(report, experiment, output_dir)
    return report


class Study:
    """
    What experiments of one configuration share, in

        stages/NAME-KEY/        a training run's output folder
        samples/KEY/            an output folder of `cdm sample-set`, with figures.json
        features/               of samples, where an experiment compares them image by image
        low_res/KEY/            low-resolution images that are not samples: real, or blurred

    A KEY is a hash of all that decides the content.
    """

    def __init__(self, settings: StudySettings, output_dir: Path):
        self.settings, self.state = settings, open_state()
        self.stages = Stages(settings, output_dir / "stages", self.state)
        self.figures = Figures(settings, self.state)
        self.samples = Samples(settings, output_dir, self.stages, self.figures, self.state)

    def check(self, name: str, experiment: Experiment) -> None:
        """
        Whatever can be known of the experiment called `name` without data, extractor and training.

        Raises:
            ValueError: a row names a stage that the configuration does not have, or trains one that is given; its
                stages do not fit each other, or cannot sample so; or options of a training or of the evaluation do not
                fit together.
        """
        EvaluateConfig(samples="", output="figures.json", **self.figures.options)
        if isinstance(experiment, AugmentationExperiment):
            check_settings(self)
        known = list(self.settings.stages)
        for recipe in (recipe for row in experiment.rows for recipe in row.arm.stages):
            if recipe.name not in known:
                raise ValueError(
                    f"`experiments.{name}` has the stage {recipe.name!r}; it must be one of `stages`, "
                    f"{known}{did_you_mean(recipe.name, known)}"
                )
        for row in experiment.rows:
            try:
                self.stages.evaluations(row.arm)
                if (
                    row.paper_accuracies is not None
                    and num_classes_of(self.stages.without_weights(row.arm.stages).stages) is None
                ):
                    raise ValueError("no stage has classes, from which classifiers could learn.")
            except ValueError as error:
                place = f"`experiments.{name}`, row {row_name(dataclasses.asdict(row))!r}"
                entries = " and ".join(f"`{entry}`" for entry in experiment.entries)
                raise ValueError(f"{place}{entries and f' (see {entries})'}: {error}") from error

    def real_images(self) -> dict[str, Dataset]:
        """Of both splits."""
        return {split: open_real_images(self.settings, split) for split in SPLITS}

    @cached_property
    def learned_from(self) -> tuple[int, torch.Tensor | None]:
        """
        How many samples classifiers are trained on, and their labels: those of the training images where there are as
        many (Ravuri and Vinyals, 2019), else None, for balanced ones.
        """
        labels = open_real_images(self.settings, "train").labels
        count = (self.settings.classification and self.settings.classification.num_images) or len(labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return count, labels[order] if count == len(labels) else None

    def training_seeds(self, arm: Arm) -> list[int | None]:
        """Of an arm's trainings; [None] where all stages were trained elsewhere, once."""
        are_given = all(self.settings.stages[recipe.name].is_given for recipe in arm.stages)
        return [None] if are_given else self.settings.training.seeds

    def measure(self, row: Row) -> dict[str, Any]:
        """All runs of a row: one for each training seed and sampling seed."""
        runs = []
        for training_seed, seed in itertools.product(self.training_seeds(row.arm), self.settings.sampling.seeds):
            samples = self.samples.of(row.arm, training_seed, seed)
            figures = self.figures.of(samples)
            run = {"training_seed": training_seed, "sampling_seed": seed, "samples": samples.name, **figures}
            if row.paper_accuracies is not None:
                learned_from = self.samples.of(row.arm, training_seed, seed, *self.learned_from)
                run["classification"] = self.figures.classification(learned_from, with_real_images=not runs)
            runs.append(run)
        return {"heading": row.heading, "label": row.label, "x": row.x, "paper": list(row.paper), "runs": runs}


class Stages:
    """Stages by their recipes: trained in `folder` unless they are there, or parts of cascades that are given."""

    def __init__(self, settings: StudySettings, folder: Path, state: PartialState):
        self.settings, self.folder, self.state = settings, folder, state
        self.dtype = DTYPES[settings.sampling.dtype]
        self.cascades: dict[str, CascadedDiffusionPipeline] = {}
        self.sketches: dict[str, Pipeline] = {}  # given cascades without weights
        self.skeletons: dict[str, CascadedDiffusionPipeline] = {}  # those of arms
        self.counts: dict[str, dict[str, int]] = {}  # of evaluations
        self.given: dict[str, tuple[Pipeline, dict[str, Any]]] = {}

    def evaluations(self, arm: Arm) -> dict[str, int]:
        """
        How often each stage's network is called for an image of the arm.

        Raises:
            ValueError: as `without_weights`, or the stages cannot sample so.
        """
        key = digest([[dataclasses.asdict(recipe) for recipe in arm.stages], arm.sampling])
        if key not in self.counts:
            call = {"scheduler": None, "inference_schedules": None, **arm.sampling}
            schedulers = call.pop("scheduler"), call.pop("inference_schedules")
            self.counts[key] = self.without_weights(arm.stages).with_schedulers(*schedulers).evaluations(**call)
        return self.counts[key]

    def without_weights(self, recipes: tuple[StageRecipe, ...]) -> CascadedDiffusionPipeline:
        """
        The stages joined, whether trained by now or not, with networks on the meta device.

        Raises:
            ValueError: a stage's training does not have the options or does not fit together, or the stages do not
                fit each other.
        """
        key = digest([dataclasses.asdict(recipe) for recipe in recipes])
        if key not in self.skeletons:
            parts = [self.part_without_weights(recipe) for recipe in recipes]
            self.skeletons[key] = CascadedDiffusionPipeline.from_stages(*parts)
        return self.skeletons[key]

    def part_without_weights(self, recipe: StageRecipe) -> Pipeline:
        """One stage of [`without_weights`]."""
        source = self.settings.stages[recipe.name]
        if not source.is_given:
            return stage_without_weights(self.training(recipe, self.settings.training.seeds[0])[1])
        if recipe.options:
            raise ValueError(
                f"it trains the stage {recipe.name!r} with {recipe.options}, but the configuration gives a trained "
                "one (`pipeline`): give a `preset`."
            )
        if source.pipeline not in self.sketches:
            try:
                self.sketches[source.pipeline] = load_without_weights(source.pipeline)
            except OSError as error:
                raise ValueError(f"`pipeline` of the stage {recipe.name!r}: {error}") from error
        return named_part(self.sketches[source.pipeline], source)

    def training_options(self, recipe: StageRecipe) -> dict[str, Any]:
        """What the stage is trained with, besides preset and seed; `train_batch_size` over all processes."""
        training = {name: value for name, value in self.settings.training.given.items() if name != "seeds"}
        data = {name: value for name, value in self.settings.data.given.items() if value is not None}
        stage = self.settings.stages[recipe.name].given.get("options") or {}
        return {**data, **training, **stage, **recipe.options}

    def training(self, recipe: StageRecipe, seed: int) -> tuple[TrainingConfig, StagePreset]:
        """
        The stage's training, but for its folder.

        Raises:
            ValueError: options that do not fit together, or a batch that does not divide over the processes.
        """
        options = {"checkpoints_total_limit": 1, "validation_steps": 0, "resume_from_checkpoint": "latest"}
        options |= self.training_options(recipe)
        if options.get("train_batch_size") is not None:
            split = self.state.num_processes * options.get("gradient_accumulation_steps", 1)
            if options["train_batch_size"] % split:
                raise ValueError(
                    f"`train_batch_size` of the stage {recipe.name!r} is {options['train_batch_size']}, which does "
                    f"not divide over {split} processes and accumulation steps: start a different number of processes."
                )
            options["train_batch_size"] //= split
        preset = get_preset(self.settings.stages[recipe.name].preset)
        config = TrainingConfig(preset=preset.name, output_dir="", seed=seed, **options)
        return config, resolve_preset(config, preset.unet.low_res_size is not None, self.state.num_processes)

    def key(self, recipe: StageRecipe, seed: int | None) -> dict[str, Any]:
        """What decides the stage's weights."""
        if self.settings.stages[recipe.name].is_given:
            return self.given_stage(recipe)[1]
        preset = content(self.training(recipe, seed)[1])
        return {"preset": preset, "options": self.training_options(self.plainest(recipe)), "seed": seed}

    def plainest(self, recipe: StageRecipe) -> StageRecipe:
        """The recipe without the options that change nothing, so that rows which spell out more share its stages."""
        for name in recipe.options:
            options = {other: value for other, value in recipe.options.items() if other != name}
            plainer = dataclasses.replace(recipe, options=options)
            with contextlib.suppress(ValueError):  # what is left does not fit together
                if self.decided(plainer) == self.decided(recipe):
                    recipe = plainer
        return recipe

    def decided(self, recipe: StageRecipe) -> tuple[dict[str, Any], dict[str, Any]]:
        """The recipe's preset, and the options that are not its: those whose default is another value than None."""
        config, preset = self.training(recipe, seed=0)
        own = {field.name for field in dataclasses.fields(config) if field.default is not None}
        return content(preset), {name: getattr(config, name) for name in own}

    def pipeline(self, recipe: StageRecipe, seed: int | None) -> Pipeline:
        """The trained stage; trains it, or goes on with that, where it is not there yet."""
        if self.settings.stages[recipe.name].is_given:
            return self.given_stage(recipe)[0]
        config, preset = self.training(recipe, seed)
        is_super_resolution = preset.unet.low_res_size is not None
        folder = self.folder_of(recipe, seed)
        finished = from_main((folder / "model_index.json").is_file)
        if not finished:
            forget_precision()
            train(dataclasses.replace(config, output_dir=str(folder)), super_resolution=is_super_resolution)
            self.state.wait_for_everyone()
        kind = SuperResolutionPipeline if is_super_resolution else CascadedDiffusionPipeline
        return kind.from_pretrained(folder, dtype=self.dtype)

    def folder_of(self, recipe: StageRecipe, seed: int) -> Path:
        """Of the stage's training; where 0.1.0 has begun it, the folder that was named by all options."""
        key = self.key(recipe, seed)
        keys = key, {**key, "options": self.training_options(recipe)}
        new, old = (self.folder / f"{recipe.name}-{digest(one)}" for one in keys)
        return old if old.exists() and not new.exists() else new

    def given_stage(self, recipe: StageRecipe) -> tuple[Pipeline, dict[str, Any]]:
        """A stage of a cascade that is there already, and its key."""
        if recipe.name not in self.given:
            source = self.settings.stages[recipe.name]
            part = named_part(load_pipeline(source.pipeline, dtype=self.dtype), source)
            defaults = {name: value for name, value in part.config.items() if name.startswith("default_")}
            self.given[recipe.name] = part, {"weights_and_schedulers": fingerprint(part.stages), "defaults": defaults}
        return self.given[recipe.name]

    def cascade(self, recipes: tuple[StageRecipe, ...], seed: int | None) -> CascadedDiffusionPipeline:
        """The stages joined, on the device; those of one training seed."""
        key = digest([self.key(recipe, seed) for recipe in recipes])
        if key not in self.cascades:
            parts = [self.pipeline(recipe, seed) for recipe in recipes]
            self.cascades[key] = CascadedDiffusionPipeline.from_stages(*parts).to(self.state.device)
        return self.cascades[key]


def named_part(pipeline: Pipeline, source: StageSource) -> Pipeline:
    """
    The stage of a pipeline that a configuration names.

    Raises:
        ValueError: it has none of that name.
    """
    names = [stage.name for stage in pipeline.stages]
    if len(names) > 1 and source.stage in names:
        return pipeline.stage_pipeline(source.stage)
    if source.stage not in ([None, *names] if len(names) == 1 else names):
        raise ValueError(
            f"`stage` of the pipeline {source.pipeline!r} is {source.stage!r}; it must be one of {names}."
        )
    return pipeline


class Samples:
    """Samples of arms, in folders that are filled where they are not complete yet."""

    def __init__(
        self, settings: StudySettings, output_dir: Path, stages: Stages, figures: "Figures", state: PartialState
    ):
        self.settings, self.output_dir, self.state = settings, output_dir, state
        self.stages, self.figures = stages, figures
        self.real_images: set[Path] = set()  # folders that this run has made or checked

    def of(
        self,
        arm: Arm,
        training_seed: int | None,
        seed: int,
        count: int | None = None,
        labels: torch.Tensor | None = None,
    ) -> Path:
        """
        The folder of an arm's samples. What precedes the last stage is sampled once and used by all arms that have it
        in common, except where truncated sampling stops it at another s.

        Args:
            count: of images; by default that of the configuration, or the arm's.
            labels: of the images; balanced ones by default.
        """
        cascade = self.stages.cascade(arm.stages, training_seed)
        options, own_labels = arm.sampling, labels
        if arm.shares_low_res:
            low_res_dir = str(self.low_res(arm, training_seed, seed, count, labels))
            options = {**arm.last_options, "restart_timestep": None, "low_res_dir": low_res_dir}
            own_labels = None
        keys = [self.stages.key(recipe, training_seed) for recipe in arm.stages]
        count = count or self.settings.sampling.num_images
        count = min(count, arm.num_images or count)
        return self.sample(cascade, arm.key(keys), options, seed, count, own_labels)

    def sample(
        self,
        cascade: CascadedDiffusionPipeline,
        key: Any,
        options: dict[str, Any],
        seed: int,
        count: int,
        labels: torch.Tensor | None = None,
    ) -> Path:
        """The folder of a set of samples, made or finished; `key` is what decides them besides the scale."""
        scale = {"batch_size": 100, **self.settings.sampling.given, "num_images": count, "seed": seed}
        del scale["seeds"]
        levels = cascade.stage_options(augmentation_levels=options.get("augmentation_levels"))["augmentation_levels"]
        rule = noise_rule(cascade.stages, levels, options.get("truncated", False))
        key = [key, scale] if rule is None else [key, scale, rule]
        if labels is not None:
            key, options = [*key, labels.tolist()], {**options, "labels": str(self.labels_file(labels))}
        folder = self.output_dir / "samples" / digest(key)
        sample(SampleConfig(pipeline=self.settings.name, output_dir=str(folder), **scale, **options), cascade)
        return folder

    def labels_file(self, labels: torch.Tensor) -> Path:
        """A file with one label per line."""
        file = self.output_dir / f"labels-{digest(labels.tolist())}.txt"
        if self.state.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{label}\n" for label in labels.tolist()))
        self.state.wait_for_everyone()
        return file

    def low_res(
        self,
        arm: Arm,
        training_seed: int | None,
        seed: int,
        count: int | None = None,
        labels: torch.Tensor | None = None,
    ) -> Path:
        """The folder of what an arm's last stage takes: samples of the stages before it, or real images."""
        stage = arm.names[-2]
        if arm.ground_truth is not None:
            folder = self.ground_truth(arm, stage)
        else:
            key = arm.low_res_key([self.stages.key(recipe, training_seed) for recipe in arm.stages])
            options = {**arm.low_res_options, "last_stage": stage, "keep_stages": True}
            cascade, count = self.stages.cascade(arm.stages, training_seed), count or self.settings.sampling.num_images
            folder = self.sample(cascade, key, options, seed, count, labels)
        if arm.blur_sigma is not None:
            folder = self.blurred(folder, stage, arm.blur_sigma)
        return folder if arm.noise is None else self.noised(folder, stage, arm.noise)

    def ground_truth(self, arm: Arm, stage: str) -> Path:
        """Area averages of images of a split, as if `stage` had made them."""
        count = self.settings.sampling.num_images
        size = self.stages.cascade(arm.stages[:-1], self.settings.training.seeds[0]).stages[-1].unet.config.sample_size
        key = {"data": self.figures.measured_with["data"][arm.ground_truth], "count": count, "size": size}
        key |= {"balanced": True} if arm.balanced else {}
        folder = self.output_dir / "low_res" / digest(key)
        if folder not in self.real_images:
            dataset = open_real_images(self.settings, arm.ground_truth)
            if self.state.is_main_process:
                store_real_images(folder, dataset, stage, size, count, seed=0, balanced=arm.balanced)
            self.state.wait_for_everyone()
            self.real_images.add(folder)
        return folder

    def blurred(self, source: Path, stage: str, sigma: float) -> Path:
        """What `stage` left in `source`, blurred."""

        def blur(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
            return gaussian_blur(images, torch.full((len(images),), sigma))

        return self.changed(source, stage, {"sigma": sigma}, {"blur_sigma": sigma}, blur)

    def noised(self, source: Path, stage: str, deviation: float) -> Path:
        """What `stage` left in `source` with noise of a deviation, of images in [-1, 1], cut off at their range."""
        shape = LowResImages(source, stage).images.shape
        noise = deviation / 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))

        def add_noise(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
            return (images + noise[indices]).clamp(0, 1)

        return self.changed(source, stage, {"noise": deviation}, {"noise": deviation}, add_noise)

    def changed(
        self,
        source: Path,
        stage: str,
        key: dict[str, Any],
        settings: dict[str, Any],
        change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Path:
        """The folder of a source's images after `change`, which takes them, in [0, 1], and their numbers."""
        folder = self.output_dir / "low_res" / digest({"source": source.name, **key})
        low_res = LowResImages(source, stage)
        own = {"stages": {stage: low_res.images.shape[-1]}, "kept_stages": [stage], **settings}
        store = SampleStore(folder, {**low_res.settings, **own})
        store.check()
        if self.state.is_main_process and store.damage() is not None:
            batches = []
            for indices in store.micro_batches():
                images = change(low_res[indices], indices)
                batches.append({stage: images.numpy(), "images": to_uint8(2 * images - 1).numpy()})
            store.fill(batches, low_res.labels, "storing changed images")
        self.state.wait_for_everyone()
        return folder


class Figures:
    """What is measured of samples; kept beside them."""

    def __init__(self, settings: StudySettings, state: PartialState):
        self.settings, self.state = settings, state
        data = {name: value for name, value in settings.data.given.items() if name in DATA_OPTIONS}
        evaluation = {name: value for name, value in settings.evaluation.given.items() if name != "num_channels"}
        self.options = {
            **data,
            "padding": settings.data.padding or 0,
            **evaluation,
        }  # those that all evaluations share

    @cached_property
    def measured_with(self) -> dict[str, Any]:
        """Hashes of what the samples are measured with and compared with."""
        with self.state.main_process_first():  # it may download
            extractor = load_extractor(self.settings.evaluation.extractor, self.state.device)
            hashes = {split: open_real_images(self.settings, split).fingerprint() for split in SPLITS}
        return {"extractor": extractor.fingerprint(), "data": hashes}

    def of(self, samples: Path) -> dict[str, Any]:
        """What `cdm evaluate` says of the samples; measured once."""
        file = samples / f"figures-{digest([self.options, self.measured_with, FIGURES_RULE])}.json"
        if not from_main(file.is_file):
            evaluate(EvaluateConfig(samples=str(samples), output=str(file), **self.options))
        report = from_main(lambda: json.loads(file.read_text()))
        return {name: report[name] for name in ("extractor", "distance", "figures", "warnings")}

    def classification(self, samples: Path, with_real_images: bool) -> dict[str, Any]:
        """Classification accuracy score of the samples, and that of real images, which is the same for all samples."""
        known = {field.name for field in dataclasses.fields(ClassificationAccuracyConfig)}
        options = {name: value for name, value in self.options.items() if name in known}
        given = self.settings.given.get("classification") or {}
        options |= {name: value for name, value in given.items() if name in known}
        if not with_real_images:
            options["real"] = "none"
        folder = samples / f"classification-{digest([options, self.measured_with['data']])}"
        forget_precision()
        return classification_accuracy_score(
            ClassificationAccuracyConfig(samples=str(samples), output_dir=str(folder), **options)
        )


def open_real_images(settings: StudySettings, split: str) -> Dataset:
    """Real images of the "train" or "validation" split, of the size that all stages are averaged down from."""
    data, evaluation = settings.data, settings.evaluation
    names = DataOptions(**{name: value for name, value in data.given.items() if name in DATA_OPTIONS})
    config = names.split_config(
        getattr(evaluation, SPLITS[split]),
        source_resolution=evaluation.source_resolution,
        num_channels=evaluation.num_channels,
        padding=data.padding or 0,
        class_conditional=not settings.training.unconditional,
    )
    return open_split(config).dataset


def forget_precision() -> None:
    """Forgets that of networks trained earlier in this process, which accelerate would keep for all that follow."""
    AcceleratorState._reset_state()
