"""Which images, and how they are brought to one size: in Python, and as options of commands."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import AfterValidator

from ..options import NonNegativeInt, PositiveInt, option, options


REVISION = (
    "Branch, tag or commit of the Hub data set; a commit needs no Hub if the data are cached. Default: the newest."
)


def parse_color(color: str) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of a colour name or hex string; ValueError if it is neither."""
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise ValueError(
            f"`background` is {color!r}, which is not a colour: give a name (white) or hex (#ffffff)."
        ) from error


def check_place(dataset_name: str | None, train_data_dir: str | None) -> None:
    """
    Raises:
        ValueError: unless exactly one of them is given.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"`dataset_name` is {dataset_name!r} and `train_data_dir` is {train_data_dir!r}: give exactly one of them."
        )


def _check_color(color: str) -> str:
    parse_color(color)
    return color


def _check_folder(path: str) -> str:
    if not Path(path).is_dir():
        raise ValueError(f"`train_data_dir` is {path!r}, which is not a folder: give the path of one.")
    return path


@options
class DataConfig:
    """
    Which images to train on, and how they are brought to one square size.

    Args:
        source_resolution: side, in pixels, to which every image is cropped and resized (BigGAN's way).
        class_conditional: whether items carry labels.
        dataset_name: Hub id (or local repository) of a data set. Give this or `train_data_dir`.
        dataset_config_name: configuration of the Hub data set.
        dataset_revision: branch, tag or commit of the Hub data set; its newest commit if None.
        train_data_dir: local folder of IDX files, of parquet files, of WebDataset's tar files, or with one sub-folder
            of images per class. A folder whose sub-folders are all named like splits (train, test, val, ...) is
            entered at `dataset_split`; of tar files those are taken that have its name as a word in their path.
        dataset_split: split to train on.
        image_column, label_column: their names; found by type and by usual names if None.
        label_names: class names in the order of their ids: a file with one name per line, or a comma-separated list.
        streaming: read while training, nothing prepared beforehand. Pays for Hub data sets larger than the disk: a
            local folder is read from its files either way, and a stream is shuffled only within its buffer.
        shuffle_buffer_size: number of examples within which a stream is shuffled; see `streams.py`.
        padding: black pixels added on each side before cropping (Fashion-MNIST, 28 to 32 pixels: 2).
        background: colour (name or hex) behind transparent pixels.
        num_channels: 3, or 1 for grey images.
        num_classes: number of classes; needed only to stream integer labels that come without names.
        seed: of the shuffling of a stream.

    Raises:
        ValueError: for a value that is not as declared, unless exactly one of `dataset_name` and `train_data_dir` is
            given, and for the revision of a folder.
    """

    source_resolution: PositiveInt
    class_conditional: bool = True
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: Annotated[str, AfterValidator(_check_folder)] | None = None
    dataset_split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    label_names: str | None = None
    streaming: bool = False
    shuffle_buffer_size: PositiveInt = 10_000
    padding: NonNegativeInt = 0
    background: Annotated[str, AfterValidator(_check_color)] | None = None
    num_channels: Literal[1, 3] = 3
    num_classes: int | None = None
    seed: int = 0
    dataset_revision: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], **further: Any) -> "DataConfig":
        """What `given` has of its arguments; `further` take precedence."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**({name: value for name, value in given.items() if name in names} | further))

    def __post_init__(self):
        check_place(self.dataset_name, self.train_data_dir)
        if self.dataset_revision is not None and (self.dataset_name is None or Path(self.dataset_name).is_dir()):
            raise ValueError(
                f"`dataset_revision` is {self.dataset_revision!r}, but a folder has none: leave it out, or give "
                "`dataset_name` a data set of the Hub."
            )


@options
class PlaceOptions:
    """Where the images of a data set are."""

    dataset_name: str | None = option("A data set of the Hub, e.g. zalando-datasets/fashion_mnist.", None)
    train_data_dir: str | None = option(
        "Folder of images (one sub-folder per class), of parquet or tar files, or of MNIST-style IDX files.", None
    )

    def check_places(self) -> None:
        """ValueError unless the folder is there."""
        if self.train_data_dir is not None:
            _check_folder(self.train_data_dir)


@options
class ReadingOptions:
    """How the images of a data set are read."""

    dataset_config_name: str | None = option("Configuration of the Hub data set.", None)
    dataset_revision: str | None = option(REVISION, None)
    image_column: str | None = option("Column with the images. Default: found by its type.", None)
    label_column: str | None = option("Column with the class labels. Default: found by its type.", None)
    label_names: str | None = option(
        "Names of the classes 0, 1, ...: a file with one per line, or a comma-separated list.", None
    )
    background: str | None = option("Colour behind transparent images. Without it, such images are an error.", None)


@options
class DataOptions(ReadingOptions, PlaceOptions):
    """Options that name a data set of images."""

    def split_config(self, split: str, **further) -> DataConfig:
        """[`DataConfig`] of one split; `further` are its arguments that no option here gives."""
        names = [f.name for f in dataclasses.fields(DataOptions)]
        return DataConfig(dataset_split=split, **{name: getattr(self, name) for name in names}, **further)


@options
class LabelledDataOptions(DataOptions):
    """Options of commands that train on one split of labelled images and measure on another."""

    dataset_split: str = option("Split for training.", "train")
    eval_split: str = option("Split of the same data that no training sees.", "test")

    def data_config(self, source_resolution: int, num_channels: int, padding: int) -> DataConfig:
        """The training split's; the other's has `dataset_split=eval_split`."""
        return self.split_config(
            self.dataset_split, source_resolution=source_resolution, num_channels=num_channels, padding=padding
        )


@options
class DataCheckConfig(ReadingOptions):
    """
    Check images before training on them: how many there are of each class, their sizes, and whatever training would
    refuse (then with exit code 2). With --output also a picture of what the stages of a cascade will see.

    All headers are read, and at most 1,000 images decoded, first those whose header leaves transparency open.

    Example:
        cdm data my-images
        cdm data my-images --background white --sizes 16 64 --output grid.png
        cdm data zalando-datasets/fashion_mnist --num_channels 1 --padding 2 --sizes 8 16 32

    Raises:
        ValueError: for sizes that do not divide the source resolution, and an output that is not a PNG.
    """

    data: str = option(
        "Folder of images (one sub-folder per class), of parquet or tar files, or of MNIST-style IDX files; or a data "
        "set of the Hub.",
        positional=True,
    )
    sizes: list[PositiveInt] = option("Sizes of the stages' images.", [16, 64])
    output: str | None = option(
        "Picture to write (its name ends in .png): a row for each of the first 20 classes, each image at all sizes.",
        None,
    )
    images_per_class: PositiveInt = option("Images in a row of the picture.", 6)
    source_resolution: PositiveInt | None = option(
        "Resolution of the centre crop that all sizes are averaged down from. Default: the largest of them.", None
    )
    num_channels: Literal[1, 3] = option("Colour channels.", 3)
    padding: NonNegativeInt = option("Black pixels added on each side before cropping.", 0)
    unconditional: bool = option("Do without class labels.", False)
    num_classes: PositiveInt | None = option("Number of classes. Default: as many as occur.", None)
    dataset_split: str = option("Split to check.", "train")

    def __post_init__(self):
        if self.output is not None and not self.output.endswith(".png"):
            raise ValueError(f"`output` is {self.output!r}; it must be the name of a picture that ends in .png.")
        wrong = [size for size in self.sizes if self.resolution % size]
        if wrong:
            raise ValueError(
                f"`sizes` has {wrong[0]}; each must divide `source_resolution` {self.resolution}, from which they are "
                "averaged down: give others."
            )

    @property
    def resolution(self) -> int:
        """The source resolution, given or not."""
        return self.source_resolution or max(self.sizes)

    def check_places(self) -> None:
        """ValueError if `data` is neither a folder nor named as on the Hub."""
        if not Path(self.data).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.data):
            raise ValueError(
                f"`data` is {self.data!r}, neither a folder nor a data set of the Hub (owner/name): check it."
            )

    def data_config(self) -> DataConfig:
        """What a training with these options reads; ValueError if it is neither a folder nor named as on the Hub."""
        self.check_places()
        place = {"train_data_dir" if Path(self.data).is_dir() else "dataset_name": self.data}
        resolved = {"source_resolution": self.resolution, "class_conditional": not self.unconditional}
        return DataConfig.of(vars(self), **place, **resolved)
