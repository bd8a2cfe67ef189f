"""What users hand to the pipelines, checked once and turned into tensors; and images turned into what users get."""

import difflib
from collections.abc import Mapping

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor


PIL_MODES = {1: "L", 3: "RGB"}
MOST_NAMES = 20  # that an error lists
MOST_GUIDANCE = 1e6  # products with it stay finite in float32


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def check_count(what: str, value, lowest: int = 1, highest: int | None = None) -> int:
    """`value` if it is an int in lowest..highest; otherwise a ValueError that says `what` it is."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < lowest or (highest is not None and value > highest):
        limits = f"of at least {lowest}" if highest is None else f"in {lowest}..{highest}"
        raise ValueError(f"{what} is {value!r}; it must be an integer {limits}.")
    return int(value)


def check_guidance_scale(name: str, value, unet) -> float:
    """`value` if it is a number that the network can be guided with."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MOST_GUIDANCE:
        raise ValueError(
            f"`guidance_scale` of stage `{name}` is {value!r}; it must be a finite number in "
            f"-{MOST_GUIDANCE:.0e}..{MOST_GUIDANCE:.0e}."
        )
    if value != 1 and not unet.config.null_class:
        raise ValueError(
            f"`guidance_scale` of stage `{name}` is {value}, but its network was trained without label dropout "
            "(`null_class`): leave it at 1.0. A dict sets one for each stage."
        )
    return value.item() if isinstance(value, np.number) else value


def check_augmentation_level(name: str, level, noising_scheduler) -> int | None:
    """s of a stage: an int in 0..T of its `noising_scheduler`, None for a stage without one."""
    if noising_scheduler is None:
        if level is not None:
            raise ValueError(
                f"`augmentation_level` of stage `{name}` is {level!r}, but the stage takes none: it was trained "
                "without Gaussian conditioning augmentation. Leave it out."
            )
        return None
    num_levels = noising_scheduler.config.num_train_timesteps
    return check_count(f"`augmentation_level` of stage `{name}`", level, lowest=0, highest=num_levels)


def per_stage(argument: str, value, names: list[str]) -> dict:
    """A value for each stage: from a dict (stages may be left out), or the same for all."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    check_stage_names(argument, value, names)
    return dict(value)


def check_stage_names(argument: str, value: Mapping, names: list[str]):
    """Refuses an argument that is not a dict, or whose keys are not all among `names`, those of the stages."""
    if not isinstance(value, Mapping):
        raise ValueError(f"`{argument}` is {value!r}; it must be a dict with a value for each stage, {names}.")
    unknown = [name for name in value if name not in names]
    if unknown:
        raise ValueError(f"`{argument}` names the stages {unknown}; there are {names}.")


def check_source_resolution(value) -> int | None:
    """`value` if it is a positive int or None."""
    return None if value is None else check_count("`source_resolution`", value)


def check_generator(generator, batch_size: int):
    """None, one `torch.Generator`, or a list with one for each image."""
    if isinstance(generator, list):
        if len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)} for {batch_size} images; give one generator for each "
                "image, or a single one."
            )
        generators = generator
    else:
        generators = [] if generator is None else [generator]
    for item in generators:
        if not isinstance(item, torch.Generator):
            raise ValueError(f"`generator` holds a {type(item).__name__}; it must be a torch.Generator or a list.")


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def resolve_class_labels(class_labels, num_classes: int | None, id2label: dict[int, str] | None) -> list[int] | None:
    r"""
    Labels as class indices.

    Args:
        class_labels (`int`, `str`, a list or array of them, or an int64 `torch.Tensor`, *optional*):
            Indices or names.
        num_classes (`int`, *optional*): classes of the stages that run; None if they are unconditional.
        id2label (`dict[int, str]`, *optional*): names of the classes.
    """
    if class_labels is None or num_classes is None:
        if (class_labels is None) != (num_classes is None):
            raise ValueError(
                f"`class_labels` are missing; the stages were trained with {num_classes} classes."
                if class_labels is None
                else f"`class_labels` are {class_labels!r}, but these stages are unconditional: use `batch_size`."
            )
        return None
    if torch.is_tensor(class_labels):
        check_holds_values("class_labels", class_labels)
        if class_labels.dtype != torch.int64 or class_labels.ndim > 1:
            raise ValueError(
                f"`class_labels` is a {class_labels.dtype} tensor of shape {tuple(class_labels.shape)}; it must be "
                "int64 and of shape (B,)."
            )
        class_labels = class_labels.reshape(-1).tolist()
    if isinstance(class_labels, np.ndarray):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, (int, str, np.integer)):
        class_labels = [class_labels]
    if not isinstance(class_labels, (list, tuple)) or not class_labels:
        raise ValueError(
            f"`class_labels` is {class_labels!r}; it must be an index, a name, a list or array of them that is not "
            "empty, or an int64 tensor."
        )
    return [_class_index(label, num_classes, id2label) for label in class_labels]


def _known_names(label: str, id2label: dict[int, str]) -> str:
    """The end of a sentence about a `label` that is none of these."""
    if not id2label:
        return "this pipeline has no names (`id2label`)."
    names = list(id2label.values())
    nearest = difflib.get_close_matches(label, names, 1)
    shown = f"{names}" if len(names) <= MOST_NAMES else f"{names[:MOST_NAMES]} and {len(names) - MOST_NAMES} others"
    return f"the names are {shown}{f'; did you mean {nearest[0]!r}?' if nearest else '.'}"


def _class_index(label, num_classes: int, id2label: dict[int, str] | None) -> int:
    if isinstance(label, str):
        names = id2label or {}
        matches = [index for index, name in names.items() if name == label]
        matches = matches or [index for index, name in names.items() if name.casefold() == label.casefold()]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(f"`class_labels` has {label!r}, which names the classes {matches}: give the index.")
        raise ValueError(f"`class_labels` has {label!r}, which is not a class; {_known_names(label, names)}")
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        raise ValueError(f"`class_labels` has {label!r} of type {type(label).__name__}; give indices or names.")
    if not 0 <= label < num_classes:
        raise ValueError(f"`class_labels` has {label}; it must lie in 0..{num_classes - 1}.")
    return int(label)


def batch_inputs(
    labels: list[int] | None,
    low_res: torch.Tensor | None,
    batch_size: int | None,
    num_images_per_label: int,
    device: torch.device,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    r"""
    Pairs labels with given images one to one (a single label goes with all images, a single image with all labels),
    and repeats each pair `num_images_per_label` times in a row.

    Returns:
        `tuple`: int64 labels `(B,)` or None, images `(B, C, h, w)` or None, and B.
    """
    check_count("`num_images_per_label`", num_images_per_label)
    num_given = 1 if low_res is None else len(low_res)
    if labels is not None:
        if batch_size is not None:
            raise ValueError(f"`batch_size` is {batch_size}, but `class_labels` say how many images there are.")
        count = num_given if len(labels) == 1 else len(labels)
        labels = torch.tensor(labels * (count if len(labels) == 1 else 1), device=device)
        labels = labels.repeat_interleave(num_images_per_label)
    else:
        count = num_given if batch_size is None else check_count("`batch_size`", batch_size)
    if low_res is not None:
        if num_given not in (1, count):
            raise ValueError(f"`image` holds {num_given} images for {count} labels; give one each, or one for all.")
        low_res = low_res.to(device).expand(count, -1, -1, -1).repeat_interleave(num_images_per_label, dim=0)
    return labels, low_res, count * num_images_per_label


# ---------------------------------------------------------------------------------------------------------------------
# Images


def image_to_tensor(image, channels: int, sizes: list[int]) -> torch.Tensor:
    r"""
    A low-resolution image, or several, as a float32 tensor `(N, channels, h, h)` in [-1, 1].

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
            PIL images in mode "L" (grey) or "RGB"; float arrays `(N, h, h, C)` or `(h, h, C)` in [0, 1]; float tensors
            `(N, C, h, h)` or `(C, h, h)` in [0, 1].
        channels (`int`): C.
        sizes (`list[int]`): the input sizes of the stages.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if images and all(isinstance(item, PIL.Image.Image) for item in images):
        tensor = _pil_to_tensor(images, channels)
    elif images and all(isinstance(item, np.ndarray) for item in images):
        tensor = VaeImageProcessor.numpy_to_pt(_stack(images, np.stack, np.concatenate))
    elif images and all(isinstance(item, torch.Tensor) for item in images):
        tensor = _stack(images, torch.stack, torch.cat)
    else:
        kinds = sorted({type(item).__name__ for item in images})
        raise ValueError(f"`image` is of type {kinds}; it must be PIL images, numpy arrays or tensors, all alike.")
    if tensor.shape[1] != channels or tensor.shape[2] != tensor.shape[3] or tensor.shape[2] not in sizes:
        raise ValueError(
            f"`image` is {tensor.shape[3]} x {tensor.shape[2]} with {tensor.shape[1]} channels; the stages take "
            f"{' or '.join(f'{size} x {size}' for size in sizes)} with {channels} channels."
        )
    if not tensor.is_floating_point():
        raise ValueError(f"`image` is of dtype {tensor.dtype}; it must be floats in [0, 1], or PIL images.")
    if len(tensor) == 0:
        raise ValueError("`image` holds no image; it must hold at least one.")
    check_holds_values("image", tensor)
    low, high = tensor.min().item(), tensor.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`image` has values from {low:g} to {high:g}; they must lie in [0, 1].")
    return VaeImageProcessor.normalize(tensor.float())


def check_holds_values(name: str, tensor: torch.Tensor):
    """Refuses a tensor on the meta device."""
    if tensor.is_meta:
        raise ValueError(f"`{name}` is on the meta device, which holds no values; it must be on another.")


def _stack(images: list, stack, concatenate):
    """One batch of single images or of batches, given as arrays or as tensors."""
    shapes = sorted({tuple(item.shape) for item in images})
    dimensions = {len(shape) for shape in shapes}
    if dimensions not in ({3}, {4}) or len({shape[-3:] for shape in shapes}) > 1:
        raise ValueError(
            f"`image` has the shapes {shapes}; give images of one shape, with three axes or batched in four."
        )
    return stack(images) if dimensions == {3} else concatenate(images)


def _pil_to_tensor(images: list[PIL.Image.Image], channels: int) -> torch.Tensor:
    mode, size = PIL_MODES.get(channels), images[0].size
    for item in images:
        if item.mode != mode:
            raise ValueError(
                f"`image` has a PIL image of mode {item.mode!r}, these stages take {mode!r}: convert it with "
                f"`image.convert({mode!r})`."
            )
        if item.size != size:
            raise ValueError(f"`image` has PIL images of the sizes {size} and {item.size}; they must be of one size.")
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(images))


def check_output_type(output_type: str, channels: int):
    """Refuses an unknown `output_type`, or one that cannot show so many channels."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"`output_type` is {output_type!r}; it must be 'pil', 'np' or 'pt'.")
    if output_type == "pil" and channels not in PIL_MODES:
        raise ValueError(f"`output_type='pil'` cannot show {channels} channels; use 'np' or 'pt'.")


def tensor_to_images(sample: torch.Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
    """Images `(B, C, H, W)` in [-1, 1] as PIL images, or as float32 in [0, 1]: `(B, H, W, C)` arrays or tensors."""
    images = VaeImageProcessor.denormalize(sample)
    if output_type == "pt":
        return images
    images = VaeImageProcessor.pt_to_numpy(images)
    return images if output_type == "np" else VaeImageProcessor.numpy_to_pil(images)
