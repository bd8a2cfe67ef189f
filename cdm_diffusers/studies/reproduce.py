"""
The paper's experiments as commands: what is missing is trained, sampled and measured, and written down as a table of
the paper's shape with the paper's own rows beside ours.

Everything is kept under a name that says what it came from, so that a run that was stopped goes on, experiments share
what they have in common, and a changed configuration touches nothing that was made before.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from ..conditioning_augmentation import gaussian_blur
from ..data.config import DataOptions
from ..data.sources import open_images
from ..data.transforms import to_uint8
from ..evaluation.classification_accuracy_score import ClassificationAccuracyConfig, classification_accuracy_score
from ..evaluation.evaluate import NUM_SPLITS, EvaluateConfig, evaluate
from ..evaluation.features import load_extractor
from ..evaluation.records import digest, fingerprint, provenance
from ..evaluation.sample import DTYPES, SampleConfig, open_state, sample
from ..evaluation.sample_store import LowResImages, SampleStore, store_real_images
from ..files import write_json
from ..pipelines import CascadedDiffusionPipeline, SuperResolutionPipeline
from ..pipelines.pipeline_base import CascadeStage, noise_rule
from ..pipelines.solvers import stage_options, with_schedulers
from ..presets import GaussianAugmentationPreset, StagePreset, content, get_preset
from ..training.config import TrainingConfig, check_at_least, option
from ..training.loop import train
from ..training.resolve import resolve_preset
from .experiments import Arm, Experiment, Row, TrainedStage, get_experiment
from .reports import write_figure, write_table


SPLITS = {"train": "dataset_split", "validation": "eval_split"}
DATA_FIELDS = {f.name for f in dataclasses.fields(DataOptions)}


@dataclass(kw_only=True)
class ReproduceConfig:
    """
    Everything that can be said on the command line of `evaluation/reproduce.py` besides the experiment's name.

    Raises:
        ValueError: for a value out of its range.
    """

    config: str = field(metadata={"help": "JSON file: data, stages, scale and experiments; see configs/."})
    output_dir: str = field(metadata={"help": "Folder for stages, samples and results; experiments share it."})
    dataset_name: str | None = option("Data set of the Hub. Default: the configuration's.")
    train_data_dir: str | None = option("Folder of the data. Default: the configuration's.")
    num_images: int | None = option("Samples of each row and seed. Default: the configuration's.")
    sampling_seeds: list[int] | None = option("Seeds of the samples. Default: the configuration's.")
    training_seeds: list[int] | None = option("Seeds of the trainings. Default: the configuration's.")
    max_train_steps: int | None = option("Optimizer steps of every training. Default: the configuration's.")

    def __post_init__(self):
        check_at_least(self, num_images=1, max_train_steps=1)
        for name in ("sampling_seeds", "training_seeds"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise ValueError(f"`{name}` is empty: give at least one seed.")


def read_settings(config: ReproduceConfig) -> dict[str, Any]:
    """
    The configuration file with what the command line says otherwise.

    Raises:
        ValueError: the file is no such configuration.
    """
    file = Path(config.config)
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"`config` {str(file)!r} cannot be read as JSON ({error}).") from error
    parts = ("name", "data", "training", "sampling", "evaluation", "stages", "experiments")
    missing = [name for name in parts if name not in settings]
    if missing:
        raise ValueError(f"`config` {str(file)!r} has no {missing}; it needs {list(parts)}.")
    if config.dataset_name is not None or config.train_data_dir is not None:
        settings["data"] |= {"dataset_name": config.dataset_name, "train_data_dir": config.train_data_dir}
    for part, name, value in (
        ("sampling", "num_images", config.num_images),
        ("sampling", "seeds", config.sampling_seeds),
        ("training", "seeds", config.training_seeds),
        ("training", "max_train_steps", config.max_train_steps),
    ):
        if value is not None:
            settings[part][name] = value
    if config.max_train_steps is not None:
        for stage in settings["stages"].values():
            stage.get("options", {}).pop("max_train_steps", None)
    return settings


def reproduce(name: str, config: ReproduceConfig) -> dict[str, Any]:
    """
    Makes and measures everything that experiment `name` compares, and writes `NAME.json`, `NAME.md` and `NAME.png`
    into `config.output_dir`.

    Raises:
        ValueError: the configuration does not fit the experiment, or what it names does not fit together.
    """
    settings = read_settings(config)
    if name not in settings["experiments"]:
        raise ValueError(
            f"`config` {config.config!r} has no experiment {name!r}, only {list(settings['experiments'])}."
        )
    section = settings["experiments"][name]
    settings["evaluation"] |= section.pop("evaluation", {})
    experiment = get_experiment(name, section)
    study = Study(settings, Path(config.output_dir))
    study.check(experiment)
    study.measured_with  # noqa: B018 - fails here, and not after training, where extractor or data are missing
    report = {
        "name": name,
        "title": experiment.title,
        "settings": settings,
        **provenance("torch", "diffusers", "numpy"),
        "rows": [],
    }
    report["rows"] += (study.measure(row, experiment) for row in experiment.rows)
    if study.state.is_main_process:
        write_json(Path(config.output_dir) / f"{name}.json", report)
        print(write_table(report, experiment, Path(config.output_dir)))
        write_figure(report, experiment, Path(config.output_dir))
    return report


class Study:
    """
    What experiments of one configuration share: trained stages, samples and figures, in

        stages/NAME-KEY/        a training run's output folder
        samples/KEY/            an output folder of `evaluation/sample.py`, with figures.json
        low_res/KEY/            low-resolution images that are not samples: real, or blurred

    A KEY is a hash of all that decides the content.
    """

    def __init__(self, settings: dict[str, Any], output_dir: Path):
        self.settings, self.output_dir, self.state = settings, output_dir, open_state()
        self.cascades: dict[str, CascadedDiffusionPipeline] = {}
        self.given: dict[str, tuple[CascadedDiffusionPipeline | SuperResolutionPipeline, Any]] = {}
        self.dtype = DTYPES[settings["sampling"].get("dtype", "float32")]
        self.real_images: set[Path] = set()  # folders that this run has made or checked

    def check(self, experiment: Experiment) -> None:
        """
        Raises:
            ValueError: a row names a stage that the configuration does not have, trains one that is given, or trains,
                samples or measures with an option that there is not or cannot be.
        """
        options = {f.name for f in dataclasses.fields(SampleConfig)}
        if unknown := sorted(self.evaluation_options().keys() - {f.name for f in dataclasses.fields(EvaluateConfig)}):
            raise ValueError(f"`evaluation` has {unknown}, which are no options of evaluation/evaluate.py.")
        EvaluateConfig(samples="", output="figures.json", **self.evaluation_options())
        if self.settings["sampling"]["num_images"] < 2 * NUM_SPLITS:
            raise ValueError(
                f"`num_images` is {self.settings['sampling']['num_images']}; {2 * NUM_SPLITS} are the least that can "
                "be measured."
            )
        first_seed = self.settings["training"]["seeds"][0]
        for row in experiment.rows:
            if unknown := sorted(row.arm.sampling.keys() - options):
                raise ValueError(f"{experiment.title!r} has {unknown}, which are no options of sampling.")
            for stage in row.arm.stages:
                if stage.name not in self.settings["stages"]:
                    raise ValueError(
                        f"{experiment.title!r} names the stage {stage.name!r}; the configuration has the stages "
                        f"{list(self.settings['stages'])}."
                    )
                if "preset" in self.settings["stages"][stage.name]:
                    self.training(stage, first_seed)
                elif stage.options:
                    raise ValueError(
                        f"{experiment.title!r} trains the stage {stage.name!r} with {stage.options}, but the "
                        "configuration gives a trained one (`pipeline`): give a `preset`."
                    )
            self.check_levels(row.arm)

    def check_levels(self, arm: Arm) -> None:
        """
        Raises:
            ValueError: a stage is to sample with an s that its conditioning augmentation does not have.
        """
        levels = arm.sampling.get("augmentation_levels", {})
        for place, stage in enumerate(arm.stages[1:], 1):
            level, num_timesteps = levels.get(f"super_res_{place}"), self.num_noising_timesteps(stage)
            if None not in (level, num_timesteps) and not 0 <= level <= num_timesteps:
                raise ValueError(
                    f"`augmentation_levels` has s = {level} for the stage {stage.name!r}, whose conditioning "
                    f"augmentation has {num_timesteps} steps: it must lie in 0..{num_timesteps}."
                )

    def num_noising_timesteps(self, stage: TrainedStage) -> int | None:
        """T of the stage's Gaussian conditioning augmentation; None if it has none."""
        if "pipeline" in self.settings["stages"][stage.name]:
            noising = getattr(self.given_stage(stage)[0], "noising_scheduler", None)
            return None if noising is None else noising.config.num_train_timesteps
        augmentation = self.training(stage, self.settings["training"]["seeds"][0])[1].augmentation
        is_gaussian = isinstance(augmentation, GaussianAugmentationPreset)
        return augmentation.num_train_timesteps if is_gaussian else None

    def measure(self, row: Row, experiment: Experiment) -> dict[str, Any]:
        """All runs of a row: one for each training seed and sampling seed."""
        seeds = self.settings["training"]["seeds"]
        if all("pipeline" in self.settings["stages"][stage.name] for stage in row.arm.stages):
            seeds = [None]  # trained elsewhere, once
        runs = []
        for training_seed in seeds:
            for seed in self.settings["sampling"]["seeds"]:
                samples = self.samples(row.arm, training_seed, seed)
                figures = self.figures(samples)
                run = {"training_seed": training_seed, "sampling_seed": seed, "samples": samples.name, **figures}
                if experiment.classification and row is experiment.rows[-1]:
                    run["classification"] = self.classification(samples, with_real_images=not runs)
                runs.append(run)
        return {"heading": row.heading, "label": row.label, "x": row.x, "paper": list(row.paper), "runs": runs}

    # -----------------------------------------------------------------------------------------------------------------
    # Stages

    def training_options(self, stage: TrainedStage) -> dict[str, Any]:
        """What the stage is trained with, besides preset and seed; `train_batch_size` over all processes."""
        training = {name: value for name, value in self.settings["training"].items() if name != "seeds"}
        data = {name: value for name, value in self.settings["data"].items() if value is not None}
        return {**data, **training, **self.settings["stages"][stage.name].get("options", {}), **stage.options}

    def training(self, stage: TrainedStage, seed: int) -> tuple[TrainingConfig, StagePreset]:
        """
        The stage's training, but for its folder.

        Raises:
            ValueError: options that training does not have, or a batch that does not divide over the processes.
        """
        options = {"checkpoints_total_limit": 1, "validation_steps": 0, "resume_from_checkpoint": "latest"}
        options |= self.training_options(stage)
        if options.get("train_batch_size") is not None:
            split = self.state.num_processes * options.get("gradient_accumulation_steps", 1)
            if options["train_batch_size"] % split:
                raise ValueError(
                    f"`train_batch_size` of the stage {stage.name!r} is {options['train_batch_size']}, which does not "
                    f"divide over {split} processes and accumulation steps: start another number of processes."
                )
            options["train_batch_size"] //= split
        preset = get_preset(self.settings["stages"][stage.name]["preset"])
        if unknown := sorted(options.keys() - {f.name for f in dataclasses.fields(TrainingConfig)}):
            raise ValueError(f"The stage {stage.name!r} has {unknown}, which are no options of training.")
        config = TrainingConfig(preset=preset.name, output_dir="", seed=seed, **options)
        return config, resolve_preset(config, preset.unet.low_res_size is not None, self.state.num_processes)

    def stage_key(self, stage: TrainedStage, seed: int | None) -> dict[str, Any]:
        """What decides the stage's weights."""
        if "pipeline" in self.settings["stages"][stage.name]:
            return self.given_stage(stage)[1]
        preset = content(self.training(stage, seed)[1])
        return {"preset": preset, "options": self.training_options(stage), "seed": seed}

    def stage(self, stage: TrainedStage, seed: int | None) -> CascadedDiffusionPipeline | SuperResolutionPipeline:
        """The trained stage; trains it, or goes on with that, where it is not there yet."""
        if "pipeline" in self.settings["stages"][stage.name]:
            return self.given_stage(stage)[0]
        config, preset = self.training(stage, seed)
        is_super_resolution = preset.unet.low_res_size is not None
        folder = self.output_dir / "stages" / f"{stage.name}-{digest(self.stage_key(stage, seed))}"
        finished = (folder / "model_index.json").is_file()
        self.state.wait_for_everyone()  # all processes have looked before one writes
        if not finished:
            forget_precision()
            train(dataclasses.replace(config, output_dir=str(folder)), super_resolution=is_super_resolution)
            self.state.wait_for_everyone()
        return (SuperResolutionPipeline if is_super_resolution else CascadedDiffusionPipeline).from_pretrained(
            folder, dtype=self.dtype
        )

    def given_stage(self, stage: TrainedStage) -> tuple[CascadedDiffusionPipeline | SuperResolutionPipeline, Any]:
        """A stage of a cascade that is there already, and its key."""
        if stage.name not in self.given:
            part = stage_of_cascade(**self.settings["stages"][stage.name], dtype=self.dtype)
            parts = part.stages if isinstance(part, CascadedDiffusionPipeline) else [part.stage]
            defaults = {name: value for name, value in part.config.items() if name.startswith("default_")}
            self.given[stage.name] = part, {"weights_and_schedulers": fingerprint(parts), "defaults": defaults}
        return self.given[stage.name]

    def cascade(self, stages: tuple[TrainedStage, ...], seed: int | None) -> CascadedDiffusionPipeline:
        key = digest([self.stage_key(stage, seed) for stage in stages])
        if key not in self.cascades:
            parts = [self.stage(stage, seed) for stage in stages]
            self.cascades[key] = CascadedDiffusionPipeline.from_stages(*parts).to(self.state.device)
        return self.cascades[key]

    # -----------------------------------------------------------------------------------------------------------------
    # Samples

    def samples(self, arm: Arm, training_seed: int | None, seed: int) -> Path:
        """
        The folder of an arm's samples. What precedes the last stage is sampled once and used by all arms that have it
        in common, except where truncated sampling stops it at another s.
        """
        cascade = self.cascade(arm.stages, training_seed)
        names = [stage.name for stage in cascade.stages]
        options = arm.sampling
        if len(names) > 1 and not options.get("truncated", False):
            low_res_dir = str(self.low_res(arm, names, training_seed, seed))
            options = {**restricted(options, names[-1:]), "restart_timestep": None, "low_res_dir": low_res_dir}
        key = [self.stage_key(stage, training_seed) for stage in arm.stages], arm.ground_truth, arm.blur_sigma
        return self.sample(cascade, [key, arm.sampling], options, seed)

    def sample(self, cascade: CascadedDiffusionPipeline, key: Any, options: dict[str, Any], seed: int) -> Path:
        scale = {"batch_size": 100, **self.settings["sampling"], "seed": seed}
        del scale["seeds"]
        levels = stage_options(cascade, augmentation_levels=options.get("augmentation_levels"))["augmentation_levels"]
        rule = noise_rule(cascade.stages, levels, options.get("truncated", False))
        folder = self.output_dir / "samples" / digest([key, scale] if rule is None else [key, scale, rule])
        sample(SampleConfig(pipeline=self.settings["name"], output_dir=str(folder), **scale, **options), cascade)
        return folder

    def low_res(self, arm: Arm, names: list[str], training_seed: int | None, seed: int) -> Path:
        """The folder of what an arm's last stage takes: samples of the stages before it, or real images."""
        if arm.ground_truth is not None:
            folder = self.ground_truth(arm, names[-2])
        else:
            options = restricted(arm.sampling, names[:-1])
            key = [self.stage_key(stage, training_seed) for stage in arm.stages[:-1]], options
            options = {**options, "last_stage": names[-2], "keep_stages": True}
            folder = self.sample(self.cascade(arm.stages, training_seed), key, options, seed)
        return folder if arm.blur_sigma is None else self.blurred(folder, names[-2], arm.blur_sigma)

    def ground_truth(self, arm: Arm, stage: str) -> Path:
        """Area averages of images of a split, as if `stage` had made them."""
        count = self.settings["sampling"]["num_images"]
        seed = self.settings["training"]["seeds"][0]
        size = self.cascade(arm.stages[:-1], seed).stages[-1].unet.config.sample_size
        key = {"data": self.measured_with["data"][arm.ground_truth], "count": count, "size": size}
        folder = self.output_dir / "low_res" / digest(key)
        if folder not in self.real_images:
            dataset = open_images(self.data_config(arm.ground_truth)).dataset
            if self.state.is_main_process:
                store_real_images(folder, dataset, stage, size, count, seed=0)
            self.state.wait_for_everyone()
            self.real_images.add(folder)
        return folder

    def blurred(self, source: Path, stage: str, sigma: float) -> Path:
        """What `stage` left in `source`, blurred."""
        folder = self.output_dir / "low_res" / digest({"source": source.name, "sigma": sigma})
        low_res = LowResImages(source, stage)
        own = {"stages": {stage: low_res.images.shape[-1]}, "kept_stages": [stage], "blur_sigma": sigma}
        store = SampleStore(folder, {**low_res.settings, **own})
        store.check()
        if self.state.is_main_process and not store.is_finished:
            batches = []
            for indices in store.micro_batches():
                images = gaussian_blur(low_res[indices], torch.full((len(indices),), sigma))
                batches.append({stage: images.numpy(), "images": to_uint8(2 * images - 1).numpy()})
            store.prepare(low_res.labels)
            store.write(batches, {"evaluations": {}, "seconds": 0.0, "num_images": len(low_res)})
        self.state.wait_for_everyone()
        return folder

    def data_config(self, split: str) -> Any:
        evaluation, data = self.settings["evaluation"], self.settings["data"]
        options = DataOptions(**{name: value for name, value in data.items() if name in DATA_FIELDS})
        split = evaluation.get(SPLITS[split], {"train": "train", "validation": "test"}[split])
        return options.split_config(
            split,
            source_resolution=evaluation["source_resolution"],
            num_channels=evaluation["num_channels"],
            padding=data.get("padding", 0),
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Figures

    def evaluation_options(self) -> dict[str, Any]:
        """Options that the evaluations share: the data, and what the configuration says."""
        data = {name: value for name, value in self.settings["data"].items() if name in DATA_FIELDS}
        evaluation = {name: value for name, value in self.settings["evaluation"].items() if name != "num_channels"}
        return {**data, "padding": self.settings["data"].get("padding", 0), **evaluation}

    @cached_property
    def measured_with(self) -> dict[str, Any]:
        """Hashes of what the samples are measured with and compared with."""
        with self.state.main_process_first():  # it may download
            extractor = load_extractor(self.settings["evaluation"]["extractor"], self.state.device)
            data = {split: open_images(self.data_config(split)).dataset for split in SPLITS}
        hashes = {split: dataset.fingerprint() for split, dataset in data.items()}
        return {"extractor": extractor.fingerprint(), "data": hashes}

    def figures(self, samples: Path) -> dict[str, Any]:
        """What `evaluation/evaluate.py` says of the samples; measured once."""
        options = self.evaluation_options()
        file = samples / f"figures-{digest([options, self.measured_with])}.json"
        if not file.is_file() and self.state.is_main_process:
            evaluate(EvaluateConfig(samples=str(samples), output=str(file), **options))
        self.state.wait_for_everyone()
        report = json.loads(file.read_text())
        return {name: report[name] for name in ("extractor", "distance", "figures", "warnings")}

    def classification(self, samples: Path, with_real_images: bool) -> dict[str, Any]:
        """Classification accuracy score of the samples, and that of real images, which is the same for all samples."""
        known = {f.name for f in dataclasses.fields(ClassificationAccuracyConfig)}
        options = {name: value for name, value in self.evaluation_options().items() if name in known}
        options |= self.settings.get("classification", {})
        if not with_real_images:
            options["real"] = "none"
        folder = samples / f"classification-{digest([options, self.measured_with['data']])}"
        forget_precision()
        return classification_accuracy_score(
            ClassificationAccuracyConfig(samples=str(samples), output_dir=str(folder), **options)
        )


def stage_of_cascade(
    pipeline: str, stage: str, dtype: torch.dtype = torch.float32
) -> CascadedDiffusionPipeline | SuperResolutionPipeline:
    """
    One stage of a trained cascade, as its training would have left it, with the cascade's defaults for it.

    Raises:
        ValueError: the cascade has no stage of this name.
    """
    cascade = CascadedDiffusionPipeline.from_pretrained(pipeline, dtype=dtype)
    stages: dict[str, CascadeStage] = {part.name: part for part in cascade.stages}
    if stage not in stages:
        raise ValueError(f"`stage` is {stage!r}; {pipeline!r} has {list(stages)}.")
    if stage == "base":
        return with_schedulers(cascade, last_stage="base")
    part, config = stages[stage], cascade.config
    return SuperResolutionPipeline(
        part.unet,
        part.scheduler,
        part.noising_scheduler,
        id2label=None if part.unet.config.num_classes is None else config.id2label,
        source_resolution=config.source_resolution,
        default_num_inference_steps=(config.default_num_inference_steps or {}).get(stage),
        default_augmentation_level=(config.default_augmentation_levels or {}).get(stage),
        default_guidance_scale=(config.default_guidance_scales or {}).get(stage),
    )


def forget_precision() -> None:
    """Of the networks trained before in this process, which accelerate would keep for all that follow."""
    AcceleratorState._reset_state()


def restricted(sampling: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The options that concern the stages `names`."""
    return {
        key: {name: value[name] for name in names if name in value} if isinstance(value, dict) else value
        for key, value in sampling.items()
    }
