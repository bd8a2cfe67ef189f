"""Options of the training commands."""

from typing import Literal

from ..data.config import DataOptions, check_place
from ..options import (
    Fraction,
    HubOptions,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    option,
    options,
)
from ..options.problems import did_you_mean
from ..presets import PRESETS


BASE_PRESETS = [name for name, preset in PRESETS.items() if preset.unet.low_res_size is None]
SUPER_RESOLUTION_PRESETS = [name for name in PRESETS if name not in BASE_PRESETS]


@options
class RunConfig(DataOptions, HubOptions):
    """
    Options shared by all trainings of a stage: data, optimisation, checkpoints.

    Raises:
        ValueError: unless exactly one of `dataset_name` and `train_data_dir` is given.
    """

    output_dir: str = option("Folder for checkpoints, samples, logs and, at the end, the pipeline.")

    # Data
    dataset_split: str = option("Split to train on.", "train")
    streaming: bool = option("Stream the data set instead of downloading it first.", False)
    shuffle_buffer_size: PositiveInt = option(
        "Size of the shuffle buffer of a stream, in images; it holds at most half a GiB of them.", 10_000
    )
    num_classes: PositiveInt | None = option("Number of classes, if a stream does not say.", None)
    padding: NonNegativeInt | None = option(
        "Black pixels added on each side before cropping. Default: the preset's.", None
    )
    source_resolution: PositiveInt | None = option(
        "Resolution of the centre crop that all stages of a cascade average down from. Default: the preset's.", None
    )
    dataloader_num_workers: NonNegativeInt = option("Processes that load data; 0 loads in the training process.", 0)
    hold_in_memory: bool = option(
        "Decode all images once, at the stage's size, and keep them in the memory of the training device.", False
    )

    # Optimisation
    seed: NonNegativeInt = option("Seed of weights, data order and noise.", 0)
    train_batch_size: PositiveInt | None = option(
        "Images per device and micro-batch. Default: the preset's (global) batch over devices and accumulation steps.",
        None,
    )
    gradient_accumulation_steps: PositiveInt = option("Micro-batches per optimizer step.", 1)
    learning_rate: PositiveFloat | None = option("Peak learning rate. Default: the preset's.", None)
    lr_scheduler: (
        Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] | None
    ) = option("Learning rate schedule. Default: the preset's.", None)
    lr_warmup_steps: NonNegativeInt | None = option("Steps of linear warm-up. Default: the preset's.", None)
    adam_beta1: Fraction | None = option("AdamW beta1. Default: the preset's.", None)
    adam_beta2: Fraction | None = option("AdamW beta2. Default: the preset's.", None)
    adam_weight_decay: NonNegativeFloat | None = option("AdamW weight decay. Default: the preset's.", None)
    adam_epsilon: PositiveFloat | None = option("AdamW epsilon. Default: the preset's.", None)
    max_grad_norm: PositiveFloat | None = option("Gradients are clipped to this norm. Default: the preset's.", None)
    ema_decay: Fraction | None = option(
        "Decay of the exponential moving average of the weights. Default: the preset's.", None
    )
    ema_warmup: bool | None = option(
        "EMA decay min(ema_decay, (1 + i) / (10 + i)) at step i. Default: the preset's.", None
    )
    random_flip: bool | None = option("Flip half of the images left to right. Default: the preset's.", None)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        "Autocast type. Default: that of `accelerate launch` or its configuration, else the preset's.", None
    )
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: slower, less memory.", False)
    compile: bool = option("torch.compile the network; on the CPU this takes minutes and needs a C++ compiler.", False)
    channels_last: bool | None = option(
        "Keep weights in channels_last memory format. Default: no; a resumed run keeps its own.",
        None,
    )

    # Checkpoints, logging and validation
    checkpointing_steps: PositiveInt = option("Steps between checkpoints.", 1000)
    checkpoints_total_limit: PositiveInt | None = option("Keep only this many checkpoints. Default: all.", None)
    resume_from_checkpoint: str | None = option(
        'A checkpoint folder, or "latest" for the last one in output_dir (a new run if there is none).', None
    )
    logging_steps: PositiveInt = option("Steps between logs of loss, learning rate, gradient norm and speed.", 50)
    validation_steps: NonNegativeInt = option(
        "Steps between validations, which draw samples with the EMA weights; 0 for none.", 1000
    )
    num_validation_images: PositiveInt = option("Images per validation (base: rounded to whole rows of classes).", 20)
    validation_inference_steps: PositiveInt | None = option(
        "Sampling steps of a validation. Default: the preset's.", None
    )
    report_to: str = option(
        'Tracker: "tensorboard", "wandb", any other of accelerate\'s, "all" or "none".', "tensorboard"
    )
    logging_dir: str = option("Folder of the tracker's files inside output_dir.", "logs")

    def __post_init__(self):
        check_place(self.dataset_name, self.train_data_dir)


def check_preset(name: str) -> None:
    """
    Raises:
        ValueError: it is not the name of one.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, list(PRESETS))
        raise ValueError(f"`preset` is {name!r}; it must be one of {', '.join(PRESETS)}{hint}")


@options
class TrainingConfig(RunConfig):
    """
    Train one stage of a cascade: a network for its lowest resolution, or one that upsamples. Options that are
    not given are the preset's.

    Example:
        cdm train base --preset imagenet_16 --train_data_dir my-images --output_dir runs/base
        cdm train sr --preset imagenet_16_to_64 --train_data_dir my-images --output_dir runs/sr
        accelerate launch -m cdm_diffusers train sr --preset imagenet_64_to_256 --dataset_name ILSVRC/imagenet-1k \\
            --output_dir runs/sr-256

    Raises:
        ValueError: for an unknown preset, and unless exactly one of `dataset_name` and `train_data_dir` is given.
    """

    preset: str = option(
        f"Preset of the stage. Base stages: {', '.join(BASE_PRESETS)}. Super-resolution stages: "
        f"{', '.join(SUPER_RESOLUTION_PRESETS)}."
    )

    # Data
    num_channels: Literal[1, 3] | None = option("Colour channels: 1 or 3. Default: the preset's.", None)
    unconditional: bool = option("Train without class labels.", False)

    # Network and diffusion process
    pretrained_model_name_or_path: str | None = option(
        "Folder or Hub id of a cascade or stage: training starts from the weights of its stage of the same sizes. "
        "The prediction type may differ, and so may the classes. Default: random weights.",
        None,
    )
    sample_size: PositiveInt | None = option("Resolution of the stage's output. Default: the preset's.", None)
    low_res_size: PositiveInt | None = option(
        "Resolution of a super-resolution stage's input. Default: the preset's.", None
    )
    block_out_channels: list[PositiveInt] | None = option("Channels of each level. Default: the preset's.", None)
    layers_per_block: PositiveInt | list[PositiveInt] | None = option(
        "Residual blocks per level: one number, or one for each level. Default: the preset's.", None
    )
    patch_size: PositiveInt | None = option(
        "Side of the patches that the network works on. Default: the preset's.", None
    )
    low_res_skip: bool | None = option(
        "Super-resolution that predicts x_0 (prediction_type sample): add the upsampled low-resolution image to the "
        "output. Default: the preset's.",
        None,
    )
    low_res_skip_threshold: Fraction | None = option(
        "With low_res_skip: soft threshold of what the network adds, in units of [-1, 1]: it moves towards 0 by this, "
        "and is 0 below it. Default: the preset's.",
        None,
    )
    attention_resolutions: list[NonNegativeInt] | None = option(
        "Resolutions with attention; 0 for none. Default: the preset's.", None
    )
    mid_block_attention: bool | None = option(
        "Attention in the middle, at the lowest resolution. Default: the preset's.", None
    )
    num_attention_heads: PositiveInt | None = option("Number of attention heads. Default: the preset's.", None)
    attention_head_dim: PositiveInt | None = option("Width of the attention heads. Default: the preset's.", None)
    norm_num_groups: PositiveInt | None = option("Groups of the group norms. Default: the preset's.", None)
    dropout: Fraction | None = option("Dropout in the residual blocks. Default: the preset's.", None)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(
        "What is predicted. Default: the preset's.", None
    )
    conditioning_augmentation: Literal["gaussian", "blur", "none"] | None = option(
        "Super-resolution: noise of the preceding stage's forward process, blur, or none. Default: the preset's.", None
    )
    augmentation_level: NonNegativeInt | None = option(
        "Super-resolution with Gaussian augmentation: train at this s only, instead of amortised over s.", None
    )
    zero_level_probability: Fraction | None = option(
        "Super-resolution with amortised Gaussian augmentation: probability of s = 0. Default: the preset's, or s "
        "uniform on 0..T.",
        None,
    )
    blur_sigma_range: list[NonNegativeFloat] | None = option(
        "Super-resolution with blur augmentation: smallest and largest sigma, in pixels. Default: the preset's.", None
    )
    blur_probability: Fraction | None = option(
        "Super-resolution with blur augmentation: probability that an example is blurred. Default: the preset's.", None
    )

    # Optimisation
    max_train_steps: PositiveInt | None = option("Optimizer steps. Default: the preset's.", None)
    crop_size: NonNegativeInt | None = option(
        "Super-resolution: train on random crops of this side, in pixels of the output; 0 for whole images. Default: "
        "the preset's.",
        None,
    )
    whole_image_fraction: Fraction | None = option(
        "With crop_size: share of max_train_steps, at the end, that are on whole images. Default: the preset's.",
        None,
    )
    label_dropout: Fraction | None = option(
        "Probability of replacing a label by the null class, for classifier-free guidance. Default: the preset's.",
        None,
    )

    def __post_init__(self):
        check_preset(self.preset)
        super().__post_init__()


@options
class DistillationConfig(RunConfig):
    """
    Distil a stage of a cascade: a student makes in few steps, without guidance, what its teacher makes in many.
    Options that are not given are as in the teacher's training, which stands for the preset that options mention; but
    the learning rate falls linearly to 0 in each phase.

    Example:
        cdm distill my-cascade --stage base --train_data_dir my-images --output_dir runs/base-4
        cdm distill my-cascade --stage super_res_1 --end_steps 1 --train_data_dir my-images --output_dir runs/sr-1
        accelerate launch -m cdm_diffusers distill my-cascade --stage super_res_1 --method consistency --end_steps 1 \\
            --train_data_dir my-images --output_dir runs/sr-1

    Raises:
        ValueError: unless exactly one of `dataset_name` and `train_data_dir` is given.
    """

    pipeline: str = option("Folder or Hub id of the cascade or stage to distil from.", positional=True)
    stage: str | None = option("The stage: base, super_res_1, ... Default: the only one.", None)

    # What is learnt
    method: Literal["progressive", "consistency"] = option(
        "How steps are reduced: halved again and again (Salimans and Ho, 2022), or all at once (Song et al., 2023).",
        "progressive",
    )
    start_steps: PositiveInt | None = option("DDIM steps of the teacher. Default: 64, or those of `timesteps`.", None)
    end_steps: PositiveInt = option("Steps of the student.", 4)
    timesteps: list[NonNegativeInt] | None = option(
        "Training times of the teacher's steps, from high to low noise. Students take every second of them, every "
        "fourth, and so on. Default: the trailing times of DDIM.",
        None,
    )
    guidance_scale: float | None = option(
        "w of the teacher's guidance, which the student does without. Default: the teacher's.", None
    )
    augmentation_level: NonNegativeInt | None = option(
        "Super-resolution with Gaussian augmentation: learn at this s only. Default: as in the teacher's training, at "
        "all s where it was amortised.",
        None,
    )
    phase_steps: list[PositiveInt] = option(
        "Optimizer steps of each phase: one number, doubled for phases that end at 2 or 1 steps; or one for each. The "
        "first phase learns v, if the teacher predicts epsilon.",
        [2000],
    )
    loss_weighting: Literal["truncated_snr", "snr_plus_one"] = option(
        "Weight of the loss of x_0: max(SNR, 1), or SNR + 1.", "truncated_snr"
    )
