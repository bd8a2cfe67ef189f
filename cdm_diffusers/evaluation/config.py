"""Options of the instruments of evaluation."""

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import AfterValidator, ValidationInfo

from ..data.config import DataOptions, LabelledDataOptions
from ..options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, option, options
from ..pipelines.solver_names import SolverName


NUM_SPLITS = 10  # of images, for the Inception Score
MEASURABLE = 2 * NUM_SPLITS


def _check_file(path: str, info: ValidationInfo) -> str:
    if Path(path).is_dir():
        raise ValueError(f"`{info.field_name}` is {path!r}, a folder: give the name of a file.")
    return path


def _check_device(device: str, info: ValidationInfo) -> str:
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # no device, a build without CUDA, an absent backend
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"`{info.field_name}` is {device!r}, where networks cannot run here ({reason}); it must be cpu, or a GPU "
            "of this machine such as cuda."
        ) from error
    return device


File = Annotated[str, AfterValidator(_check_file)]
Device = Annotated[str, AfterValidator(_check_device)]
TwoOrMore = Annotated[int, Ge(2)]
Measurable = Annotated[int, Ge(MEASURABLE)]


def default_device() -> str:
    """cuda if available, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_option() -> str:
    """The field of a class of options that says where networks run."""
    return option("Where networks run. Default: cuda if available, else cpu.", default_factory=default_device)


TIMESTEPS = (
    "Time steps of stages instead of a number of steps, {stage: [t, ...]}, indices t - 1 from high to low. "
    "Default: the pipeline's."
)
INFERENCE_SCHEDULES = (
    "Noise levels of stages with a ContinuousDDPMScheduler, {stage: [beta_start, beta_end]} (linear) or "
    '{stage: "squaredcos_cap_v2"}. Default: the pipeline\'s.'
)
PADDING = "Black pixels added on each side of real images (Fashion-MNIST, 28 to 32 pixels: 2)."
CACHE_DIR = "~/.cache/cdm_diffusers"


# Sampling


@options
class SampleConfig:
    """
    Sample a cascade at scale, with any number of processes; a run that was stopped resumes.

    Example:
        cdm sample-set --pipeline checkpoints/fashion-mnist-32 --output_dir samples \\
            --num_images 10000 --num_inference_steps base=50 super_res_1=25 super_res_2=25
    """

    pipeline: str = option("Folder or Hub id of a cascade.")
    output_dir: str = option("Folder for the samples. A run that was stopped there resumes.")
    num_images: PositiveInt = option("Number of images to sample.")
    labels: str | None = option(
        '"balanced" (image i has label i modulo the number of classes; the default), labels separated by commas '
        "(indices or names, taken in turn), or a text file with one label per line, one per image.",
        None,
    )
    seed: NonNegativeInt = option("Image i is drawn from the generator of (seed, i).", 0)
    batch_size: PositiveInt = option("Images per call of the pipeline.", 100)
    num_inference_steps: PositiveInt | dict[str, PositiveInt] | None = option(
        "Steps of all stages, or of each. Default: the pipeline's.", None
    )
    settings: str | None = option("Name of the pipeline's settings to use; see info. Default: its defaults.", None)
    timesteps: dict[str, list[NonNegativeInt]] | None = option(TIMESTEPS, None)
    augmentation_levels: dict[str, NonNegativeInt] | None = option("s of each stage. Default: the pipeline's.", None)
    truncated: bool = option("Truncated conditioning augmentation (Section 3.2) instead of non-truncated.", False)
    guidance_scale: float | dict[str, float] | None = option(
        "w of all stages, or of each. Default: the pipeline's.", None
    )
    restart_timestep: int | None = option(
        "Noise the base's samples to this t and denoise them again (Section 4.2).", None
    )
    consistency: bool = option("Super-resolution keeps to the area averages of its input.", False)
    scheduler: SolverName | dict[str, SolverName] | None = option(
        "Solver of all stages, or of each. Default: the pipeline's.", None
    )
    inference_schedules: dict[str, str | list[float]] | None = option(INFERENCE_SCHEDULES, None)
    last_stage: str | None = option("Stop after this stage. Default: the last.", None)
    keep_stages: bool = option(
        "Keep the images of the stages before the last, for --low_res_dir and cdm recognition.", False
    )
    low_res_dir: str | None = option(
        "Folder of an earlier run with --keep_stages, whose low-resolution images and labels are reused.", None
    )
    low_res_stage: str | None = option("Which of its stages to continue from. Default: the highest.", None)
    image_format: Literal["png", "npz"] = option(
        "Folders of PNGs, one per label, or the OpenAI evaluator's npz file.", "png"
    )
    dtype: Literal["float32", "bf16", "fp16"] = option("Type of the networks' weights.", "float32")

    def __post_init__(self):
        if self.low_res_dir is None and self.low_res_stage is not None:
            raise ValueError(f"`low_res_stage` is {self.low_res_stage!r}, but there is no `low_res_dir`.")
        if self.low_res_dir is not None and self.labels is not None:
            raise ValueError(f"`labels` is {self.labels!r}, but with `low_res_dir` its labels are used: leave it out.")
        if self.truncated and self.keep_stages:
            raise ValueError(
                "`keep_stages` with `truncated`: low-resolution stages end at z_s then, and there is no z_0 to keep."
            )


# Quality


@options
class EvaluateConfig(LabelledDataOptions):
    """
    Compare samples with real images: Frechet distance, Inception Score, precision and recall, kernel distance.

    Example:
        cdm evaluate --samples samples --extractor efficientnet-lite0 \\
            --dataset_name zalando-datasets/fashion_mnist --padding 2 --output quality.json
    """

    samples: str = option(
        "The samples: an npz file of the OpenAI evaluator, or a folder of PNGs or of `cdm sample-set`."
    )
    extractor: str = option(
        "Network of the features: inception (the official FID network; or the path of its file, .pt), "
        "efficientnet-lite0, dinov2, dinov2:ID_OR_FOLDER, or the folder of a classifier."
    )
    output: File = option("JSON file to write the figures to.")
    stage: str | None = option("A stage kept by `cdm sample-set`, instead of its last one.", None)
    padding: NonNegativeInt = option(PADDING, 0)
    source_resolution: PositiveInt | None = option(
        "Crop real images to this size and average them down to the samples'. Default: what a folder of `cdm "
        "sample-set` says; crop to the samples' size where it says nothing.",
        None,
    )
    num_images: Measurable | None = option("Number of samples to use, balanced over their labels. Default: all.", None)
    num_reference_images: Measurable | None = option(
        "Number of real images of each split to use, drawn at random. Default: all.", None
    )
    num_neighbour_images: Measurable = option(
        "Most images of each kind to use for precision, recall and kernel distances.", 10_000
    )
    inception_score: bool | None = option("Inception Score. Default: where the extractor has logits.", None)
    train_statistics: str | None = option(
        "Statistics of the training images from another cache, instead of computing them.", None
    )
    eval_statistics: str | None = option("Statistics of the validation images, from another cache.", None)
    cache_dir: str = option("Folder for statistics and features of real images.", CACHE_DIR)
    seed: NonNegativeInt = option("Seed of what is drawn, and of splits.", 0)
    batch_size: PositiveInt = option("Images per call of the extractor.", 100)
    device: Device = device_option()

    def __post_init__(self):
        if self.dataset_split == self.eval_split:
            raise ValueError(
                f"`dataset_split` and `eval_split` are both {self.eval_split!r}; they must differ. Parts of one split "
                "of a Hub data set are named like train[:90%] and train[90%:]."
            )


@options
class RecognitionConfig(LabelledDataOptions):
    """
    Measure whether samples are recognised as their labels, as varied as real images, and not copies of them.

    Example:
        cdm recognition --samples samples --classifier checkpoints/fashion-mnist-classifier \\
            --dataset_name zalando-datasets/fashion_mnist --output recognition.json --grid pairs.png
    """

    samples: str = option("Folder of cdm sample-set --keep_stages, with class labels.")
    classifier: str = option("Folder of a classifier of cdm train classifier.")
    output: File = option("JSON file to write the figures to.")
    grid: File | None = option(
        "Picture to write: a row per class, samples beside their nearest training images.", None
    )
    padding: NonNegativeInt | None = option(
        "Black pixels added on each side of real images. Default: the classifier's.", None
    )
    seed: NonNegativeInt = option("Seed of the order in which real images are taken.", 0)
    batch_size: PositiveInt = option("Images per call of the classifier.", 100)
    num_diversity_images: TwoOrMore = option("Images of each class whose distances from each other are measured.", 100)
    num_nearest_images: PositiveInt = option(
        "Samples, and test images, whose nearest training images are looked for.", 500
    )
    device: Device = device_option()


@options
class LikelihoodConfig(DataOptions):
    """
    Bound the likelihood of real images: bits per dimension of each stage, and of a cascade.

    Example:
        cdm likelihood --pipeline checkpoints/fashion-mnist-32 --num_images 1000 --num_terms 100 \\
            --dataset_name zalando-datasets/fashion_mnist --padding 2 --output likelihood.json
    """

    pipeline: str = option("Folder or Hub id of a cascade, or of one super-resolution stage.")
    output: File = option("JSON file to write the figures to.")
    split: str = option("Split of the data whose likelihood is bounded.", "test")
    padding: NonNegativeInt = option(PADDING, 0)
    num_images: TwoOrMore | None = option(
        "Number of images, drawn from the split without replacement. Default: all of it.", None
    )
    num_terms: PositiveInt | None = option(
        "Terms of the sum over t that are evaluated for each image: a stratified, unbiased estimate. Default: all T.",
        None,
    )
    stages: list[str] | None = option(
        "Stages to measure by themselves; none with `--stages none`. Default: all.", None
    )
    cascade: str | None = option(
        "Bound the likelihood of this stage's images under all stages up to it (Eq. 3). Default: no such bound.", None
    )
    augmentation_level: NonNegativeInt | None = option(
        "s of every stage that takes one. Default: the pipeline's own.", None
    )
    seed: NonNegativeInt = option("Decides which images are drawn, and all noise: image i by (seed, i).", 0)
    batch_size: PositiveInt = option("Images per call of a network.", 100)
    device: Device = device_option()


@options
class SelectionConfig:
    """
    Select a checkpoint of a training by the Frechet distance of few samples, and measure it with many.

    Example:
        cdm select-checkpoint --run runs/base --extractor efficientnet-lite0 --export runs/selected
    """

    run: str = option("--output_dir of cdm train base or cdm train sr, with its checkpoints.")
    extractor: str = option(
        "Network of the features: inception, efficientnet-lite0, dinov2, or a classifier's folder."
    )
    output: File | None = option(
        "JSON file for the figures. Default: checkpoint_selection.json in the run's folder.", None
    )
    export: str | None = option("Folder to write the selected stage to, as a pipeline. Default: none.", None)
    train_data_dir: str | None = option("Where the data is, if no longer where it was in training.", None)
    selecting_split: str | None = option("Split whose distance selects. Default: the training split.", None)
    reporting_split: str = option("Split that the selected checkpoint is compared with in the end.", "test")
    low_res: str | None = option(
        "Super-resolution: samples of the preceding stage to start from (npz, PNGs, or a folder of `cdm sample-set`). "
        "Default: real images of the split that the samples are compared with.",
        None,
    )
    low_res_stage: str | None = option("Of a folder of `cdm sample-set`: the stage to start from.", None)
    num_images: TwoOrMore | None = option(
        "Samples of each checkpoint, to select by. Default: 10,000, or all images to start from, if fewer.",
        None,
    )
    num_final_images: TwoOrMore | None = option(
        "Samples of the selected one, drawn anew, for the final figure. Default: 50,000, likewise.", None
    )
    num_inference_steps: PositiveInt | None = option("Sampling steps. Default: the stage's own.", None)
    augmentation_level: NonNegativeInt | None = option("s of a stage that takes one. Default: the stage's own.", None)
    seed: NonNegativeInt = option("Image i is drawn from the generator of (seed, i); the final ones from seed + 1.", 0)
    batch_size: PositiveInt = option("Images per call of the pipeline and of the extractor.", 100)
    cache_dir: str = option("Folder for statistics of real images.", CACHE_DIR)
    device: Device = device_option()


# Classifiers

# How an architecture is trained unless stated otherwise. That of resnet-50 is Goyal et al.'s (2017) for batches of
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


@options
class ClassifierRecipe:
    """Network and optimisation: options that default to None take `RECIPES` of the architecture."""

    architecture: Literal["small", "resnet-50"] = option("small (for 32x32 images) or resnet-50.", "small")
    num_train_epochs: PositiveInt | None = option(
        "Number of passes over the training images. Default: 6; resnet-50 90.", None
    )
    train_batch_size: TwoOrMore | None = option(  # batch norm takes two images
        "Images per device and step. Default: 128; resnet-50 256.", None
    )
    eval_batch_size: PositiveInt = option("Images per device and step of the evaluation.", 500)
    optimizer: Literal["adamw", "sgd"] | None = option(
        "adamw, or sgd with Nesterov momentum 0.9. Default: adamw; resnet-50 sgd.", None
    )
    lr_scheduler: Literal["one_cycle", "step", "cosine"] | None = option(
        "one_cycle; or a linear warm-up over 5/90 of the training, then steps (a tenth at 30/90, 60/90 and 80/90) or "
        "a half cosine. Default: one_cycle; resnet-50 step.",
        None,
    )
    learning_rate: PositiveFloat | None = option("Peak learning rate. Default: 2e-3; resnet-50 0.1.", None)
    weight_decay: NonNegativeFloat | None = option("Weight decay. Default: 1e-2; resnet-50 1e-4.", None)
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = option("Share of the target spread over all classes.", 0.0)
    random_flip: bool = option("Flip half of the training images left to right.", True)
    random_shift: NonNegativeInt | None = option(
        "Shift training images by up to this many pixels each way, filling in black. Default: 2; resnet-50 0.", None
    )
    random_resized_crop: bool | None = option(
        "Train on crops of 8% to 100% of the area, brought to full size. Default: no; resnet-50 yes.", None
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option("Autocast type.", "no")
    dataloader_num_workers: NonNegativeInt = option("Processes that load data; 0 loads in the training process.", 0)

    def __post_init__(self):
        for name, value in RECIPES[self.architecture].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


@options
class ClassifierConfig(LabelledDataOptions, ClassifierRecipe):
    """
    Train a classifier of real images, which recognises samples and gives features of them.

    Example:
        cdm train classifier --dataset_name zalando-datasets/fashion_mnist --padding 2 \\
            --num_channels 1 --output_dir runs/classifier
    """

    output_dir: str = option("Folder for the classifier and its results.json.")
    padding: NonNegativeInt = option(
        "Black pixels added on each side before cropping (Fashion-MNIST, 28 to 32 pixels: 2).", 0
    )
    image_size: PositiveInt = option("Side of the images, in pixels: they are cropped and resized to it.", 32)
    num_channels: Literal[1, 3] = option("Colour channels: 1 or 3.", 3)
    seed: int = option("Seed of weights, data order and augmentation.", 0)


@options
class ClassificationAccuracyConfig(LabelledDataOptions, ClassifierRecipe):
    """
    Train classifiers on samples and on real images, and measure all of them on real images.

    Example:
        cdm cas --samples samples --output_dir cas \\
            --dataset_name zalando-datasets/fashion_mnist --padding 2
    """

    samples: str = option("npz file, folder of PNGs, or --output_dir of cdm sample-set.")
    output_dir: str = option("Folder for classification_accuracy_score.json, the classifiers and the pictures.")
    stage: str | None = option("A stage kept by `cdm sample-set`, instead of its last one.", None)
    padding: NonNegativeInt = option(PADDING, 0)
    source_resolution: PositiveInt | None = option(
        "Resolution of the centre crop that real images are averaged down from. Default: what a folder of "
        "`cdm sample-set` says; that of the samples where it says nothing.",
        None,
    )
    num_seeds: PositiveInt = option(
        "Trainings of each kind, with the seeds 0, 1, ...; means have a standard error from 2.", 3
    )
    real: Literal["same", "all", "both", "none"] = option(
        "Real images to train on for comparison: as many of each class as there are samples, all, both, or none.",
        "same",
    )
    num_shown_classes: PositiveInt = option("Classes in the picture of the best, and in that of the worst.", 6)
    num_shown_images: PositiveInt = option("Samples, and real images, of each class in these pictures.", 8)
