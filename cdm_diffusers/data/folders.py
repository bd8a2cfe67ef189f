"""What a folder of images holds, found without reading an image: its classes, links, and what is left out."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .config import DataConfig


VALIDATION = ("val", "valid", "validation")
SPLIT_FOLDERS = ("train", "test", *VALIDATION)
HIDDEN, NOT_IMAGES, DEAD_LINKS = "hidden", "not images", "links to nothing"  # why files are left out


@dataclass
class ImageFolderContents:
    """
    Args:
        root: the folder whose sub-folders are the classes.
        images: their paths, from `root`.
        patterns: glob patterns of all files; links to folders, which globbing does not follow, have their own.
        metadata: paths of files that say which images there are, and what they show.
        left_out: paths from `root` of what is not read, by reason.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    patterns: dict[str, None] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, path: Path, reason: str) -> None:
        """Counts a file that is not an image to train on."""
        self.left_out.setdefault(reason, []).append(str(path))


def read_image_folder(folder: Path, config: DataConfig) -> ImageFolderContents:
    """
    What `folder` holds for the split that `config` names. Links are followed.

    Raises:
        ValueError: no images or no such split, a link that leads back to where it stands, or images for which it is
            not clear which class they belong to.
    """
    root = _root_of(folder, config.dataset_split)
    contents = ImageFolderContents(root)
    _read(contents, Path(), root, [os.path.realpath(root)])
    if not contents.images:
        raise ValueError(
            f"{str(root)!r} holds no images, parquet, tar or IDX files{_but(contents)}: give --train_data_dir a "
            "folder with one sub-folder of images per class."
        )
    if config.class_conditional and not contents.metadata:
        _check_classes(contents)
    return contents


def holds_images(folder: Path) -> bool:
    """Whether any file in it has an image's name."""
    return any(path.suffix.lower() in ImageFolder.EXTENSIONS for path in folder.rglob("*"))


def files_of_split(folder: Path, pattern: str, split: str) -> list[Path]:
    """
    Files below `folder` that match, as paths from it: those that have `split` as a word in their path, or all, if no
    path has the name of any split in it.

    Raises:
        ValueError: they have words of other splits only.
    """
    files = sorted(path.relative_to(folder) for path in folder.rglob(pattern))
    words = {path: set(re.split(r"[^a-z]+", path.as_posix().lower())) for path in files}
    if not any(words[path].intersection(SPLIT_FOLDERS) for path in files):
        return files
    synonyms = VALIDATION if split in VALIDATION else (split,)
    found = [path for path in files if words[path].intersection(synonyms)]
    if not found:
        raise ValueError(
            f"`dataset_split` is {split!r}, which is not in the name of any of the {len(files):,} files {pattern} in "
            f"{str(folder)!r}, such as {files[0].as_posix()!r}: give a split that is."
        )
    return found


def imagefolder_options(contents: ImageFolderContents, config: DataConfig) -> dict[str, Any]:
    """What `load_dataset("imagefolder", ...)` is told, so that it takes these images and their classes."""
    options = {"data_files": {config.dataset_split: list(contents.patterns)}}
    classes = {path.parent.name for path in contents.images}
    if config.class_conditional and not contents.metadata and len(classes) == 1:
        options["drop_labels"] = False  # left to itself, `datasets` sees no classes where there is one
    return options


def _root_of(folder: Path, split: str) -> Path:
    """The folder whose sub-folders are the classes: `folder`, or its sub-folder for the split."""
    names = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if names and all(name in SPLIT_FOLDERS for name in names):
        root = folder / split
    elif split == "train":
        root = folder
    else:
        root = None
    if root is None or not root.is_dir():
        raise ValueError(
            f"`dataset_split` is {split!r}, which is not in {str(folder)!r}, whose sub-folders are "
            f"{names}: give the name of one, or leave it out for a folder with one sub-folder per class."
        )
    return root


def _read(contents: ImageFolderContents, place: Path, globbed: Path, above: list[str]) -> None:
    """
    Adds what is in the folder `place`.

    Args:
        globbed: the nearest folder above that is a link, or the root: its pattern finds these files.
        above: real paths of the folders in which `place` lies, itself included.
    """
    for entry in _entries(contents.root / place):
        path = place / entry.name
        if entry.name.startswith(".") or (entry.name.startswith("__") and os.path.isdir(entry.path)):
            contents.leave_out(path, HIDDEN)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            contents.leave_out(path, DEAD_LINKS)
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            if entry.is_symlink() and any(Path(folder).is_relative_to(real) for folder in above):
                raise ValueError(
                    f"{entry.path!r} is a link to {real!r}, in which it lies itself, so that reading would never "
                    "end: remove it."
                )
            if entry.is_symlink() and glob.has_magic(entry.path):
                raise ValueError(f"{entry.path!r} is a link and has one of *, ? and [ in its path: rename it.")
            _read(contents, path, Path(entry.path) if entry.is_symlink() else globbed, [*above, real])
        elif path.suffix.lower() in ImageFolder.EXTENSIONS:
            if "::" in entry.path:
                raise ValueError(f"{entry.path!r} has '::' in its path, which `datasets` cannot read: rename it.")
            contents.images.append(path)
            contents.patterns[f"{glob.escape(str(globbed))}/**"] = None
        elif entry.name in ImageFolder.METADATA_FILENAMES:
            contents.metadata.append(path)
        else:
            contents.leave_out(path, NOT_IMAGES)


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)


def _check_classes(contents: ImageFolderContents) -> None:
    """Each image must lie in a class folder, and all of them at one depth."""
    by_depth = Counter(len(path.parts) for path in contents.images)
    root, loose = repr(str(contents.root)), by_depth[1]
    if loose == len(contents.images):
        raise ValueError(
            f"{root} holds {loose} images and no sub-folder with any: put them into one sub-folder per class, or "
            "give --unconditional to do without classes."
        )
    if loose:
        first = next(path for path in contents.images if len(path.parts) == 1)
        raise ValueError(
            f"{root} holds {loose} images beside its sub-folders, such as {str(first)!r}, and "
            f"{len(contents.images) - loose} in them: move each into the sub-folder of its class, or give "
            "--unconditional to do without classes."
        )
    if len(by_depth) > 1:
        examples = {len(path.parts): str(path) for path in reversed(contents.images)}
        counts = " and ".join(f"{by_depth[depth]} like {examples[depth]!r}" for depth in sorted(by_depth))
        raise ValueError(
            f"{root} holds images at different depths, {counts}: put all of a class into one sub-folder, or give "
            "--unconditional to do without classes."
        )
    if odd := [path for path in contents.images if "\\" in str(path)]:
        raise ValueError(
            f"{str(contents.root / odd[0])!r} has a backslash in its path, which `datasets` takes for the end of a "
            "folder's name: rename it."
        )


def _but(contents: ImageFolderContents) -> str:
    counts = ", ".join(f"{len(paths)} {reason}" for reason, paths in contents.left_out.items())
    return f" (left out: {counts})" if counts else ""
