"""
What experiments would train and sample, and what that costs, known without data, training or a GPU. Trainings and sets
of samples that rows or experiments have in common count once.
"""

import itertools
from typing import TYPE_CHECKING, Any

from ..evaluation.records import digest
from ..models import CascadedUNet2DModel
from ..models.costs import count_multiply_adds
from ..presets import StagePreset
from ..tables import markdown_table
from .experiments import Arm, Experiment, Row, StageRecipe
from .reports import row_name


if TYPE_CHECKING:
    from .reproduce import Study

CHECKPOINT_BYTES = 16  # a parameter's weight, AdamW's two moments and the average, in float32
PIPELINE_BYTES = 4  # the average
CALLS_OF_A_STEP = 3  # a backward pass costs as much as two forward ones
UTILISATION = 0.3
H100_TFLOPS = {"float32": 495.0, "bf16": 989.0, "fp16": 989.0}  # dense; float32 as TF32
COSTS = ("flops", "gpu_hours", "bytes")


class Plan:
    """
    Args:
        gpu_tflops: peak of a GPU; by default [`H100_TFLOPS`].
        utilisation: the share of it that networks reach; by default [`UTILISATION`].
    """

    def __init__(self, gpu_tflops: float | None, utilisation: float | None):
        self.gpu_tflops = dict.fromkeys(H100_TFLOPS, gpu_tflops) if gpu_tflops is not None else H100_TFLOPS
        self.utilisation = UTILISATION if utilisation is None else utilisation
        self.experiments: dict[str, dict[str, Any]] = {}
        self.trainings: dict[str, dict[str, Any]] = {}  # by what decides them
        self.sets: dict[str, dict[str, Any]] = {}

    def add(self, name: str, experiment: Experiment, study: "Study") -> None:
        """The experiment called `name`, which has been checked."""
        rows = [self.row(row, study) for row in experiment.rows]
        self.experiments[name] = {"title": experiment.title, "rows": rows}

    def row(self, row: Row, study: "Study") -> dict[str, Any]:
        """What a row samples: images of each set, how many sets, and how often networks are called for an image."""
        arm, seeds = row.arm, study.settings.sampling.seeds
        training_seeds = study.training_seeds(arm)
        trainings = list(
            dict.fromkeys(
                self.training(recipe, seed, study)
                for seed, recipe in itertools.product(training_seeds, arm.stages)
                if not study.settings.stages[recipe.name].is_given
            )
        )
        pairs, count = list(itertools.product(training_seeds, seeds)), study.settings.sampling.num_images
        sets = [self.sample_sets(arm, *pair, study, count) for pair in pairs]
        further, of_sets = {}, itertools.chain(*sets)
        if row.paper_accuracies is not None:
            section = study.settings.classification
            further["classifier_images"] = section and section.num_images
            if further["classifier_images"] is not None:
                learned = [self.sample_sets(arm, *pair, study, section.num_images) for pair in pairs]
                of_sets = itertools.chain(of_sets, *learned)
        evaluations = study.stages.evaluations(arm)
        if arm.ground_truth is not None:
            evaluations = {arm.names[-1]: evaluations[arm.names[-1]]}
        return {
            "row": row_name({"heading": row.heading, "label": row.label}),
            "images": self.sets[sets[0][-1]]["images"],
            "sets": len(sets),
            "evaluations": evaluations,
            "trainings": trainings,
            "samples": list(dict.fromkeys(of_sets)),
            **further,
        }

    def training(self, recipe: StageRecipe, seed: int, study: "Study") -> str:
        """The key of a training, which is added."""
        key = digest(study.stages.key(recipe, seed))
        if key not in self.trainings:
            preset = study.stages.training(recipe, seed)[1]
            unet = study.stages.part_without_weights(recipe).stages[-1].unet
            self.trainings[key] = {
                "stage": recipe.name,
                "preset": preset.name,
                "options": recipe.options,
                "seed": seed,
                **self.training_costs(unet, preset),
            }
        return key

    def training_costs(self, unet: CascadedUNet2DModel, preset: StagePreset) -> dict[str, Any]:
        """The costs of all steps of a training."""
        steps, batch_size = preset.training.max_train_steps, preset.training.train_batch_size
        whole_share = 1.0 if preset.training.crop_size is None else preset.training.whole_image_fraction
        multiply_adds = whole_share * count_multiply_adds(unet)
        if whole_share < 1:
            multiply_adds += (1 - whole_share) * count_multiply_adds(unet, preset.training.crop_size)
        parameters = unet.num_parameters()
        return {
            "parameters": parameters,
            "steps": steps,
            "batch_size": batch_size,
            "images": steps * batch_size,
            **self.time(CALLS_OF_A_STEP * multiply_adds * steps * batch_size, preset.training.mixed_precision),
            "bytes": (CHECKPOINT_BYTES + PIPELINE_BYTES) * parameters,
        }

    def sample_sets(self, arm: Arm, training_seed: int | None, seed: int, study: "Study", count: int) -> list[str]:
        """The keys of the sets of samples that an arm needs for `count` of its own, those last; they are added."""
        sources = study.settings.stages
        stages = [
            sources[recipe.name].given if sources[recipe.name].is_given else study.stages.key(recipe, training_seed)
            for recipe in arm.stages
        ]
        own_stages, keys = arm.names, []
        if arm.shares_low_res:
            own_stages = arm.names[-1:]
            if arm.ground_truth is None:
                key = [arm.low_res_key(stages), seed, count]
                keys.append(self.sample_set(key, arm, arm.names[:-1], count, study, keeps_all=True))
        count = min(count, arm.num_images or count)
        return [*keys, self.sample_set([arm.key(stages), seed, count], arm, own_stages, count, study)]

    def sample_set(
        self, key: Any, arm: Arm, names: list[str], count: int, study: "Study", keeps_all: bool = False
    ) -> str:
        """The key of the images that the stages `names` of an arm make, of which all are kept or the last one's."""
        key = digest(key)
        if key not in self.sets:
            calls = study.stages.evaluations(arm)
            unets = {stage.name: stage.unet for stage in study.stages.without_weights(arm.stages).stages}
            sizes = [unets[name].config.out_channels * unets[name].config.sample_size ** 2 for name in names]
            multiply_adds = sum(calls[name] * count_multiply_adds(unets[name]) for name in names)
            self.sets[key] = {
                "images": count,
                "evaluations": {name: calls[name] for name in names},
                **self.time(count * multiply_adds, study.settings.sampling.dtype),
                "bytes": count * (sizes[-1] + 4 * keeps_all * sum(sizes)),  # uint8, and float32 of stages
            }
        return key

    def time(self, multiply_adds: float, precision: str) -> dict[str, Any]:
        """The time of this many multiply-adds, in a type of weights or of `--mixed_precision`."""
        precision = "float32" if precision == "no" else precision
        rate = self.gpu_tflops[precision] * self.utilisation * 1e12
        return {"precision": precision, "flops": 2 * multiply_adds, "gpu_hours": 2 * multiply_adds / rate / 3600}

    def as_dict(self) -> dict[str, Any]:
        """JSON: "assumptions", "experiments" by name, "trainings" and "samples" by key, "total"."""
        parts = {"trainings": self.trainings, "samples": self.sets}
        total = {
            part: {cost: sum(one[cost] for one in ones.values()) for cost in COSTS} for part, ones in parts.items()
        }
        assumptions = {"gpu_tflops": self.gpu_tflops, "utilisation": self.utilisation}
        return {"assumptions": assumptions, "experiments": self.experiments, **parts, "total": total}


# ------------------------------------------------------------------------------------------------------------------
# What is shown
# ------------------------------------------------------------------------------------------------------------------


def as_text(plan: dict[str, Any]) -> str:
    """A plan as a person reads it."""
    parts = []
    for name, experiment in plan["experiments"].items():
        header = [name, "trainings", "sets", "images of each", "network evaluations for an image"]
        rows = [
            [
                row["row"],
                len(row["trainings"]),
                row["sets"],
                f"{row['images']:,}",
                ", ".join(f"{stage} {count:,}" for stage, count in row["evaluations"].items()),
            ]
            for row in experiment["rows"]
        ]
        parts += [f"**{experiment['title']}**", markdown_table(header, rows)]
        for row in experiment["rows"]:
            if "classifier_images" in row:
                count = row["classifier_images"]
                shown = "as many as there are training images; not counted below" if count is None else f"{count:,}"
                parts.append(f"Samples that classifiers learn from, {row['row']}: {shown}.")
    if plan["trainings"]:
        parts += ["**Trainings**, each once", trainings_table(plan["trainings"])]
    return "\n\n".join([*parts, totals(plan)])


def trainings_table(trainings: dict[str, dict[str, Any]]) -> str:
    """In the order in which rows name them."""
    header = ["stage", "preset", "changed", "seed", "parameters", "steps", "batch", "images", "GPU-hours", "disk"]
    rows = [
        [
            one["stage"],
            one["preset"],
            ", ".join(f"{name} {value}" for name, value in one["options"].items()),
            one["seed"],
            f"{one['parameters'] / 1e6:,.1f} M",
            f"{one['steps']:,}",
            f"{one['batch_size']:,}",
            f"{one['images']:,}",
            _hours(one),
            _disk(one),
        ]
        for one in trainings.values()
    ]
    return markdown_table(header, rows)


def totals(plan: dict[str, Any]) -> str:
    """The sum of all, and what it rests on."""
    assumed, total, rows = plan["assumptions"], plan["total"], []
    for part in ("trainings", "samples"):
        images = sum(one["images"] for one in plan[part].values())
        rows.append([part, len(plan[part]), f"{images:,}", _hours(total[part]), _disk(total[part])])
    both = {cost: sum(one[cost] for one in total.values()) for cost in ("gpu_hours", "bytes")}
    rows.append(["all", None, None, _hours(both), _disk(both)])
    table = markdown_table(["total", "number", "images", "GPU-hours", "disk"], rows)
    used = sorted({one["precision"] for part in ("trainings", "samples") for one in plan[part].values()})
    peaks = " and ".join(f"{assumed['gpu_tflops'][precision]:g} TFLOPS ({precision})" for precision in used)
    return (
        f"{table}\n\nGPU-hours are those of multiply-adds (a training step: three calls of the network) at "
        f"{assumed['utilisation']:.0%} of {peaks}; the share is an assumption. Not counted: "
        "features, classifiers, decoding, and real images that stand in for samples. Disk: the last checkpoint "
        "(weights, moments and average in float32) and the pipeline of each training, raw pixels of samples, and "
        "low-resolution stages in float32; a checkpoint that is being replaced comes on top."
    )


def _hours(one: dict[str, Any]) -> str:
    hours = one["gpu_hours"]
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _disk(one: dict[str, Any]) -> str:
    return f"{one['bytes'] / 1e9:,.2f} GB"
