"""Options of the commands that show what a saved pipeline is and makes."""

from pathlib import Path
from typing import Literal

from ..evaluation.config import INFERENCE_SCHEDULES, TIMESTEPS, Device, device_option
from ..options import License, NonNegativeInt, PositiveInt, option, options
from ..pipelines.solver_names import SolverName


OTHER_PICTURES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")


@options
class InfoConfig:
    """
    Show what a saved pipeline consists of: stages, parameters, schedules, defaults of a call, licence. No weights are
    loaded.

    Example:
        cdm info checkpoints/fashion-mnist-32
        cdm info checkpoints/fashion-mnist-32 --json
    """

    pipeline: str = option("Folder or Hub id of a cascade or of a super-resolution stage.", positional=True)
    json: bool = option("Print JSON.", False)


@options
class CardConfig:
    """
    Write the model card of a folder, or refresh one that this command wrote: title, licence, data set, measured
    figures with what measured them, samples, an example that runs, intended use and limits.

    Example:
        cdm card my-cascade --title "Emoji" --license cc-by-4.0 --dataset_name me/emoji
        cdm card my-cascade --figures recognition.json quality.json --sample_grid samples.png
    """

    folder: str = option("Folder of a cascade or of a stage.", positional=True)
    title: str | None = option("Default: the title of the existing card, else the folder's name.", None)
    license: License | None = option(
        "Licence of the data and so of the weights, by the Hub's identifiers (cc-by-4.0, ...). Default: that of the "
        "existing card, else none.",
        None,
    )
    dataset_name: str | None = option(
        "Data set of the Hub that it was trained on. Default: that of the existing card, else of the training.",
        None,
    )
    figures: list[str] = option("JSON of `cdm recognition` and of `cdm evaluate`, kept in the folder.", [])
    sample_grid: str | None = option("PNG of samples, kept in the folder.", None)
    overwrite: bool = option("Replace a card even if somebody wrote or edited it by hand.", False)


@options
class CallConfig:
    """Options shared by the commands that call a pipeline and save its pictures."""

    pipeline: str = option("Folder or Hub id of a pipeline.", positional=True)
    class_labels: list[str] | None = option("Names or numbers of classes.", None)
    num_inference_steps: PositiveInt | dict[str, PositiveInt] | None = option(
        "Steps of all stages, or of each. Default: the pipeline's.", None
    )
    guidance_scale: float | dict[str, float] | None = option(
        "w of classifier-free guidance of all stages, or of each. Default: the pipeline's.", None
    )
    scheduler: SolverName | dict[str, SolverName] | None = option(
        "Solver of all stages, or of each. Default: the pipeline's.", None
    )
    consistency: bool = option("Super-resolution keeps to the area averages of its input.", False)
    seed: NonNegativeInt = option("Seed of all noise.", 0)
    dtype: Literal["float32", "bf16", "fp16"] = option("Type of the networks' weights.", "float32")
    device: Device = device_option()


@options
class PicturesConfig(CallConfig):
    """
    Sample pictures from a cascade: one labelled grid with a row per class and the outputs of all stages side by side,
    or one file per picture.

    Example:
        cdm sample checkpoints/fashion-mnist-32 --class_labels "Ankle boot" Bag --output samples.png
        cdm sample checkpoints/fashion-mnist-32 --num_images_per_label 2 --output pictures/
        cdm sample checkpoints/fashion-mnist-32 --num_inference_steps base=10 super_res_2=4 --scheduler base=unipc
    """

    pipeline: str = option("Folder or Hub id of a cascade.", positional=True)
    output: str = option("Picture to write (its name ends in .png), or folder for a PNG per image.", "samples.png")
    class_labels: list[str] | None = option(
        "Names or numbers of classes, a row each. Default: the first ten; none for an unconditional cascade.", None
    )
    num_images_per_label: PositiveInt = option("Images of each class; all images of an unconditional cascade.", 8)
    settings: str | None = option("Name of the pipeline's settings to use; see info. Default: its defaults.", None)
    augmentation_levels: NonNegativeInt | dict[str, NonNegativeInt] | None = option(
        "s of all stages that take one, or of each. Default: the pipeline's.", None
    )
    truncated: bool = option("Truncated conditioning augmentation (Section 3.2) instead of non-truncated.", False)
    timesteps: dict[str, list[NonNegativeInt]] | None = option(TIMESTEPS, None)
    inference_schedules: dict[str, str | list[float]] | None = option(INFERENCE_SCHEDULES, None)
    restart_timestep: PositiveInt | None = option(
        "Noise the base's samples to this t and denoise them again (Section 4.2).", None
    )
    last_stage: str | None = option("Stop after this stage. Default: the last.", None)
    scale: PositiveInt | None = option(
        "Screen pixels per pixel of the last stage, in a grid. Default: 2; above 64x64 pixels 1.", None
    )
    show: bool = option(
        "Show the grid, too, in terminals that can: kitty, Ghostty, iTerm2, WezTerm, and those that support sixels. "
        "--no_show leaves it out.",
        True,
    )

    def __post_init__(self):
        if Path(self.output).suffix.lower() in OTHER_PICTURES:
            raise ValueError(f"`output` is {self.output!r}; it must end in .png, or be a folder for a PNG per image.")


@options
class SuperResolveConfig(CallConfig):
    """
    Sample high-resolution versions of low-resolution images, with a super-resolution stage or with the stages of a
    cascade from the images' size on.

    Example:
        cdm super-resolve checkpoints/fashion-mnist-32 small/*.png --class_labels Bag --output large/
    """

    pipeline: str = option("Folder or Hub id of a super-resolution stage or of a cascade.", positional=True)
    images: list[str] = option("Image files of the size that a stage takes.", positional=True)
    output: str = option("Folder for the pictures, which keep their names.")
    class_labels: list[str] | None = option("Names or numbers of classes: one for all images, or one per image.", None)
    augmentation_level: NonNegativeInt | None = option(
        "Augmentation level s to which the images are noised. Default: the pipeline's.", None
    )
    resize: bool = option("Crop and shrink larger images to the smallest size that a stage takes.", False)
