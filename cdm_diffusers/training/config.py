"""Options of the training scripts, and what they make of a preset."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from ..presets import get_preset


def option(help: str, default: Any = None, **argparse_keywords) -> Any:
    """A dataclass field that [`transformers.HfArgumentParser`] turns into a command line option."""
    return field(default=default, metadata={"help": help.replace("%", "%%"), **argparse_keywords})


def switch(help: str) -> Any:
    """An option that is on when named, off with `false` behind it, and otherwise None: the preset's, or by a rule."""
    return option(help, nargs="?", const=True)


def device_option() -> Any:
    """Where networks run."""
    return field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu",
        metadata={"help": "Default: cuda where there is one, else cpu."},
    )


def check_is_no_folder(options: Any, *names: str) -> None:
    """
    Raises:
        ValueError: one of the named `options`, files to be written, is a folder.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and Path(value).is_dir():
            raise ValueError(f"`{name}` is {value!r}, a folder: give the name of a file.")


def check_at_least(options: Any, **lowest: int) -> None:
    """
    Raises:
        ValueError: one of the named `options` is given and below its lowest value.
    """
    for name, bound in lowest.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise ValueError(f"`{name}` is {value}; it must be at least {bound}.")


def check_mixed_precision(accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: for fp16 on a CPU, where accelerate would compute in float32 without a word.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and not accelerator.native_amp:
        raise ValueError(
            "`mixed_precision` is 'fp16', which accelerate does not compute on CPUs: give 'bf16' or 'no', or train on "
            "a GPU."
        )


@dataclass
class TrainingConfig:
    """
    Everything that can be said on the command line of `training/train_base.py` and `training/train_sr.py`.

    Options that default to None and have a counterpart in [`StagePreset`] take the preset's value.

    Raises:
        ValueError: for an unknown preset, and unless exactly one of `dataset_name` and `train_data_dir` is given.
    """

    preset: str = field(metadata={"help": "Name of a stage's preset; docs/presets.md lists them."})
    output_dir: str = field(metadata={"help": "Folder for checkpoints, samples, logs and, at the end, the pipeline."})

    # Data
    dataset_name: str | None = option("A data set of the Hub, e.g. zalando-datasets/fashion_mnist.")
    dataset_config_name: str | None = option("Configuration of the Hub data set.")
    train_data_dir: str | None = option(
        "Folder of images (one sub-folder a class), of parquet files, or of MNIST-style IDX files."
    )
    dataset_split: str = option("Split to train on.", "train")
    image_column: str | None = option("Column with the images. Default: found by its type.")
    label_column: str | None = option("Column with the class labels. Default: found by its type.")
    label_names: str | None = option(
        "Names of the classes 0, 1, ...: a file with one a line, or a comma-separated list."
    )
    streaming: bool = option("Stream the data set instead of downloading it first.", False)
    background: str | None = option("Colour behind transparent images. Without it, such images are an error.")
    num_classes: int | None = option("Number of classes, where a stream does not say.")
    num_channels: int | None = option("Colour channels: 1 or 3. Default: the preset's.")
    unconditional: bool = option("Train without class labels.", False)
    padding: int | None = option("Black pixels added on each side before cropping. Default: the preset's.")
    source_resolution: int | None = option(
        "Resolution of the centre crop that all stages of a cascade average down from. Default: the preset's."
    )
    dataloader_num_workers: int = option("Processes that load data; 0 loads in the training process.", 0)
    hold_in_memory: bool = option(
        "Decode all images once, at the stage's size, and hold them in the memory of the device that trains.", False
    )

    # Network and diffusion process
    sample_size: int | None = option("Resolution of the stage's output. Default: the preset's.")
    low_res_size: int | None = option("Resolution of a super-resolution stage's input. Default: the preset's.")
    block_out_channels: list[int] | None = option("Channels of each level. Default: the preset's.")
    layers_per_block: list[int] | None = option(
        "Residual blocks per level: one number, or one for each level. Default: the preset's."
    )
    patch_size: int | None = option("Side of the patches that the network works on. Default: the preset's.")
    attention_resolutions: list[int] | None = option("Resolutions with attention; 0 for none. Default: the preset's.")
    mid_block_attention: bool | None = switch(
        "Attention in the middle, at the lowest resolution. Default: the preset's."
    )
    num_attention_heads: int | None = option("Attention heads, by count. Default: the preset's.")
    attention_head_dim: int | None = option("Attention heads, by width. Default: the preset's.")
    norm_num_groups: int | None = option("Groups of the group norms. Default: the preset's.")
    dropout: float | None = option("Dropout in the residual blocks. Default: the preset's.")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(
        "What is predicted. Default: the preset's."
    )
    conditioning_augmentation: Literal["gaussian", "blur", "none"] | None = option(
        "Super-resolution: noise of the preceding stage's forward process, blur, or none. Default: the preset's."
    )
    augmentation_level: int | None = option(
        "Super-resolution with Gaussian augmentation: train at this s only, instead of amortised over s."
    )
    zero_level_probability: float | None = option(
        "Super-resolution with amortised Gaussian augmentation: probability of s = 0. Default: the preset's, or s "
        "uniform on 0..T."
    )
    blur_sigma_range: list[float] | None = option(
        "Super-resolution with blur augmentation: smallest and largest sigma, in pixels. Default: the preset's."
    )
    blur_probability: float | None = option(
        "Super-resolution with blur augmentation: probability that an example is blurred. Default: the preset's."
    )

    # Optimisation
    seed: int = option("Seed of weights, data order and noise.", 0)
    train_batch_size: int | None = option(
        "Images per device and micro-batch. Default: the preset's (global) batch over devices and accumulation steps."
    )
    gradient_accumulation_steps: int = option("Micro-batches per optimizer step.", 1)
    max_train_steps: int | None = option("Optimizer steps. Default: the preset's.")
    learning_rate: float | None = option("Peak learning rate. Default: the preset's.")
    lr_scheduler: (
        Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] | None
    ) = option("Learning rate schedule. Default: the preset's.")
    lr_warmup_steps: int | None = option("Steps of linear warm-up. Default: the preset's.")
    adam_beta1: float | None = option("AdamW beta1. Default: the preset's.")
    adam_beta2: float | None = option("AdamW beta2. Default: the preset's.")
    adam_weight_decay: float | None = option("AdamW weight decay. Default: the preset's.")
    adam_epsilon: float | None = option("AdamW epsilon. Default: the preset's.")
    max_grad_norm: float | None = option("Gradients are clipped to this norm. Default: the preset's.")
    ema_decay: float | None = option("Decay of the exponential moving average of the weights. Default: the preset's.")
    ema_warmup: bool | None = switch("EMA decay min(ema_decay, (1 + i) / (10 + i)) at step i. Default: the preset's.")
    random_flip: bool | None = switch("Flip half of the images left to right. Default: the preset's.")
    crop_size: int | None = option(
        "Super-resolution: train on random crops of this side, in pixels of the output; 0 for whole images. Default: "
        "the preset's."
    )
    whole_image_fraction: float | None = option(
        "With crop_size: share of max_train_steps, the last ones, that are on whole images. Default: the preset's."
    )
    label_dropout: float | None = option(
        "Probability of replacing a label by the null class, for classifier-free guidance. Default: the preset's."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        "Autocast type. Default: that of `accelerate launch` or its configuration, else the preset's."
    )
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: slower, less memory.", False)
    compile: bool = option("torch.compile the network; on the CPU this takes minutes and a C++ compiler.", False)
    channels_last: bool | None = switch(
        "Keep weights in channels_last memory format. Default: on GPUs, where it is faster; a resumed run's stays."
    )

    # Checkpoints, logging and validation
    checkpointing_steps: int = option("Save a checkpoint every so many steps.", 1000)
    checkpoints_total_limit: int | None = option("Keep only so many checkpoints. Default: all.")
    resume_from_checkpoint: str | None = option(
        'A checkpoint folder, or "latest" for the last one in output_dir (a new run if there is none).'
    )
    logging_steps: int = option("Log loss, learning rate, gradient norm and speed every so many steps.", 50)
    validation_steps: int = option("Draw samples with the EMA weights every so many steps; 0 for never.", 1000)
    num_validation_images: int = option("Images per validation (base: rounded to whole rows of classes).", 20)
    validation_inference_steps: int | None = option("Sampling steps of a validation. Default: the preset's.")
    report_to: str = option(
        'Tracker: "tensorboard", "wandb", any other of accelerate\'s, "all" or "none".', "tensorboard"
    )
    logging_dir: str = option("Folder of the tracker's files inside output_dir.", "logs")

    def __post_init__(self):
        get_preset(self.preset)
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"`dataset_name` is {self.dataset_name!r} and `train_data_dir` is {self.train_data_dir!r}: "
                "give exactly one of them."
            )
        check_at_least(
            self, gradient_accumulation_steps=1, checkpointing_steps=1, logging_steps=1, num_validation_images=1
        )
