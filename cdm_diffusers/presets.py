"""Appendix B of "Cascaded Diffusion Models" as frozen dataclasses, and small presets for Fashion-MNIST.

A [`StagePreset`] says everything about one stage of a cascade: network, diffusion process, conditioning augmentation,
training, sampling and data. Where the paper leaves a value open, `docs/presets.md` lists our choice and its source.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any


def added(default: Any) -> Any:
    """A field that came later: configurations saved without it mean `default`, and [`content`] leaves that out."""
    return field(default=default, metadata={"added": True})


@dataclass(frozen=True)
class UNetPreset:
    """
    The arguments of [`CascadedUNet2DModel`]: same names, same defaults; `dataclasses.asdict` gives its keywords.

    `attention_resolutions` are real resolutions in pixels, as in Appendix B; with patches, those of the feature maps.
    Exactly one of `num_attention_heads` and `attention_head_dim` is given. `in_channels` and `out_channels` count
    channels of images: the low-resolution input and the learned variance are added by the network.
    """

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    learned_variance: bool = False
    block_out_channels: tuple[int, ...] = (128, 256, 384, 512)
    conv_in_channels: int | None = None
    layers_per_block: int | tuple[int, ...] = 2
    attention_resolutions: tuple[int, ...] = (16, 8)
    mid_block_attention: bool = True
    num_attention_heads: int | tuple[int, ...] | None = None
    attention_head_dim: int | tuple[int, ...] | None = None
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "scale_shift"
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    skip_rescale: bool = False
    time_conditioning: str = "timestep"
    time_scale: float = 1.0
    time_proj_dim: int | None = None
    time_embedding_dim: int | None = None
    time_embedding_hidden_dim: int | None = None
    skip_time_act: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    num_classes: int | None = None
    null_class: bool = False
    low_res_size: int | None = None
    low_res_channels: int | None = None
    low_res_interpolation: str = "bilinear"
    low_res_first: bool = False
    augmentation_level_embedding: bool = False
    patch_size: int = added(1)


@dataclass(frozen=True)
class SchedulerPreset:
    """
    The diffusion process. `continuous` chooses [`ContinuousDDPMScheduler`] over [`CascadedDDPMScheduler`]; the rest
    are their arguments. `inference_beta_*` belong to the continuous one only; without `inference_beta_schedule` the
    training schedule is respaced. End points of a linear schedule left at None follow the scaled rule: 1e-4 and 0.02
    at 1000 steps, inversely proportional to the number of steps.
    """

    continuous: bool
    num_train_timesteps: int
    beta_schedule: str
    variance_type: str
    beta_start: float | None = None
    beta_end: float | None = None
    prediction_type: str = "epsilon"
    inference_beta_schedule: str | None = None
    inference_beta_start: float | None = None
    inference_beta_end: float | None = None


@dataclass(frozen=True)
class GaussianAugmentationPreset:
    """
    Gaussian conditioning augmentation (Section 3.2) by the forward process of the preceding stage. `level` is the
    paper's s in 0..`num_train_timesteps`; None trains amortised over s, uniformly, or with `zero_level_probability`
    for s = 0 and uniformly over the others.
    """

    num_train_timesteps: int
    beta_schedule: str
    beta_start: float | None = None
    beta_end: float | None = None
    level: int | None = None
    zero_level_probability: float | None = added(None)


@dataclass(frozen=True)
class BlurAugmentationPreset:
    """Blur conditioning augmentation (Section 3.1): sigma in low-resolution pixels is uniform on `sigma_range`."""

    kernel_size: int = 3
    sigma_range: tuple[float, float] = (0.4, 0.6)
    probability: float = 0.5


@dataclass(frozen=True)
class TrainingPreset:
    """
    Optimisation. `train_batch_size` is global, as in the paper: over all processes and accumulation steps.
    `vlb_weight` is the hybrid loss's lambda (Section 2.1); None is the simple loss. With `ema_warmup` the decay of
    step i is min(`ema_decay`, (1 + i) / (10 + i)). Super-resolution stages with a `crop_size` train on random crops of
    that side, in pixels of the stage's output, except in the last `whole_image_fraction` of the steps.
    """

    train_batch_size: int
    learning_rate: float
    max_train_steps: int
    vlb_weight: float | None
    lr_warmup_steps: int
    lr_scheduler: str = "constant_with_warmup"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    random_flip: bool = False
    label_dropout: float = 0.0
    mixed_precision: str = "no"
    crop_size: int | None = added(None)
    whole_image_fraction: float = added(0.0)


@dataclass(frozen=True)
class InferencePreset:
    """Recommended sampling steps and conditioning augmentation s; None where the stage takes no s."""

    num_inference_steps: int
    augmentation_level: int | None = None


@dataclass(frozen=True)
class DataPreset:
    """
    Images get `padding` black pixels on each side, then the centre crop and resize to `source_resolution`, from which
    every stage of a cascade takes its area averages.
    """

    source_resolution: int
    padding: int = 0


@dataclass(frozen=True)
class StagePreset:
    """One stage of a cascade. `source` says where in the paper it stands."""

    name: str
    source: str
    unet: UNetPreset
    scheduler: SchedulerPreset
    augmentation: GaussianAugmentationPreset | BlurAugmentationPreset | None
    training: TrainingPreset
    inference: InferencePreset
    data: DataPreset


# The diffusion processes that several stages share.
COSINE_LEARNED = SchedulerPreset(
    continuous=False, num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2", variance_type="learned_range"
)
COSINE_CONTINUOUS = SchedulerPreset(
    continuous=True,
    num_train_timesteps=4000,
    beta_schedule="squaredcos_cap_v2",
    variance_type="fixed_large",
    inference_beta_schedule="squaredcos_cap_v2",
)
LINEAR_CONTINUOUS = SchedulerPreset(
    continuous=True,
    num_train_timesteps=2000,
    beta_schedule="linear",
    beta_start=1e-6,
    beta_end=1e-2,
    variance_type="fixed_large",
    inference_beta_schedule="linear",
)
COSINE_AUGMENTATION = GaussianAugmentationPreset(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2")
# In a short training s = 0 would hardly be seen: docs/presets.md has what was measured.
SMALL_AUGMENTATION = replace(COSINE_AUGMENTATION, zero_level_probability=0.1)


# Appendix B.1 and Section 4.3: architectures like DDPM and Improved DDPM.
IMAGENET_32 = StagePreset(
    name="imagenet_32",
    source="Appendix B.1, 32x32 base model",
    unet=UNetPreset(
        sample_size=32,
        learned_variance=True,
        block_out_channels=(256, 512, 768, 1024),
        layers_per_block=6,
        attention_resolutions=(16, 8),
        num_attention_heads=4,
        dropout=0.1,
        num_classes=1000,
    ),
    scheduler=COSINE_LEARNED,
    augmentation=None,
    training=TrainingPreset(
        train_batch_size=2048,
        learning_rate=1e-4,
        max_train_steps=700_000,
        vlb_weight=0.001,
        lr_warmup_steps=5000,
        random_flip=True,
    ),
    inference=InferencePreset(num_inference_steps=4000),
    data=DataPreset(source_resolution=256),
)

IMAGENET_32_TO_64 = StagePreset(
    name="imagenet_32_to_64",
    source="Appendix B.1, 32x32 to 64x64 super-resolution; s from Table 3a",
    unet=UNetPreset(
        sample_size=64,
        learned_variance=True,
        block_out_channels=(256, 512, 768, 1024),
        layers_per_block=5,
        attention_resolutions=(16, 8),
        num_attention_heads=4,
        dropout=0.1,
        num_classes=1000,
        low_res_size=32,
        augmentation_level_embedding=True,
    ),
    scheduler=COSINE_LEARNED,
    augmentation=COSINE_AUGMENTATION,
    training=TrainingPreset(
        train_batch_size=2048,
        learning_rate=1e-4,
        max_train_steps=400_000,
        vlb_weight=0.001,
        lr_warmup_steps=5000,
        random_flip=True,
    ),
    inference=InferencePreset(num_inference_steps=4000, augmentation_level=751),
    data=DataPreset(source_resolution=256),
)

# Appendix B.1 and Section 4.4: architectures like SR3.
IMAGENET_64_TO_128 = StagePreset(
    name="imagenet_64_to_128",
    source="Appendix B.1, 64x64 to 128x128 super-resolution",
    unet=UNetPreset(
        sample_size=128,
        block_out_channels=(128, 256, 512, 1024, 1024),
        layers_per_block=3,
        attention_resolutions=(16,),
        num_attention_heads=1,
        downsample_type="resnet",
        upsample_type="resnet",
        skip_rescale=True,
        time_conditioning="noise_level",
        time_scale=5000.0,
        num_classes=1000,
        low_res_size=64,
        low_res_interpolation="bicubic",
    ),
    scheduler=LINEAR_CONTINUOUS,
    augmentation=BlurAugmentationPreset(),
    training=TrainingPreset(
        train_batch_size=1024,
        learning_rate=1e-4,
        max_train_steps=500_000,
        vlb_weight=None,
        lr_warmup_steps=10_000,
        random_flip=True,
    ),
    inference=InferencePreset(num_inference_steps=100),
    data=DataPreset(source_resolution=256),
)

IMAGENET_64_TO_256 = StagePreset(
    name="imagenet_64_to_256",
    source="Appendix B.1, 64x64 to 256x256 super-resolution; blur and flips from Table 4",
    unet=UNetPreset(
        sample_size=256,
        block_out_channels=(128, 256, 512, 512, 1024, 1024),
        layers_per_block=3,
        attention_resolutions=(16,),
        num_attention_heads=1,
        downsample_type="resnet",
        upsample_type="resnet",
        skip_rescale=True,
        time_conditioning="noise_level",
        time_scale=5000.0,
        num_classes=1000,
        low_res_size=64,
        low_res_interpolation="bicubic",
    ),
    scheduler=LINEAR_CONTINUOUS,
    augmentation=BlurAugmentationPreset(),
    training=TrainingPreset(
        train_batch_size=1024,
        learning_rate=1e-4,
        max_train_steps=500_000,
        vlb_weight=None,
        lr_warmup_steps=10_000,
        random_flip=True,
    ),
    inference=InferencePreset(num_inference_steps=100),
    data=DataPreset(source_resolution=256),
)

# Sections 4.2 and 4.3: the small-scale ablation, Improved DDPM's class-conditional 64x64 model with dropout.
IMAGENET_16 = StagePreset(
    name="imagenet_16",
    source="Section 4.3, 16x16 base model of the ablation",
    unet=UNetPreset(
        sample_size=16,
        learned_variance=True,
        block_out_channels=(192, 384, 576),
        layers_per_block=3,
        attention_resolutions=(16, 8),
        num_attention_heads=4,
        dropout=0.1,
        num_classes=1000,
    ),
    scheduler=COSINE_LEARNED,
    augmentation=None,
    training=TrainingPreset(
        train_batch_size=2048, learning_rate=3e-4, max_train_steps=500_000, vlb_weight=0.001, lr_warmup_steps=5000
    ),
    inference=InferencePreset(num_inference_steps=4000),
    data=DataPreset(source_resolution=64),
)

IMAGENET_16_TO_64 = StagePreset(
    name="imagenet_16_to_64",
    source="Section 4.3, 16x16 to 64x64 super-resolution; s from Table 2b",
    unet=UNetPreset(
        sample_size=64,
        learned_variance=True,
        block_out_channels=(192, 384, 576, 768),
        layers_per_block=3,
        attention_resolutions=(16, 8),
        num_attention_heads=4,
        dropout=0.1,
        num_classes=1000,
        low_res_size=16,
    ),
    scheduler=COSINE_LEARNED,
    augmentation=GaussianAugmentationPreset(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2", level=1001),
    training=TrainingPreset(
        train_batch_size=2048, learning_rate=3e-4, max_train_steps=500_000, vlb_weight=0.001, lr_warmup_steps=5000
    ),
    inference=InferencePreset(num_inference_steps=4000, augmentation_level=1001),
    data=DataPreset(source_resolution=64),
)

IMAGENET_64 = StagePreset(
    name="imagenet_64",
    source="Section 4.2, non-cascaded 64x64 baseline",
    unet=UNetPreset(
        sample_size=64,
        learned_variance=True,
        block_out_channels=(192, 384, 576, 768),
        layers_per_block=3,
        attention_resolutions=(16, 8),
        num_attention_heads=4,
        dropout=0.1,
        num_classes=1000,
    ),
    scheduler=COSINE_LEARNED,
    augmentation=None,
    training=TrainingPreset(
        train_batch_size=2048, learning_rate=3e-4, max_train_steps=500_000, vlb_weight=0.001, lr_warmup_steps=5000
    ),
    inference=InferencePreset(num_inference_steps=4000),
    data=DataPreset(source_resolution=64),
)

# Appendix B.2 and Section 4.5: unconditional; Bedroom and Church use the same hyperparameters.
LSUN_64 = StagePreset(
    name="lsun_64",
    source="Appendix B.2, 64x64 base model",
    unet=UNetPreset(
        sample_size=64,
        block_out_channels=(128, 256, 384, 512),
        layers_per_block=3,
        attention_resolutions=(32, 16, 8),
        attention_head_dim=64,
        dropout=0.1,
        downsample_type="resnet",
        upsample_type="resnet",
        time_conditioning="noise_level",
        time_scale=5000.0,
    ),
    scheduler=COSINE_CONTINUOUS,
    augmentation=None,
    training=TrainingPreset(
        train_batch_size=2048, learning_rate=3e-4, max_train_steps=100_000, vlb_weight=None, lr_warmup_steps=5000
    ),
    inference=InferencePreset(num_inference_steps=256),
    data=DataPreset(source_resolution=128),
)

LSUN_64_TO_128 = StagePreset(
    name="lsun_64_to_128",
    source="Appendix B.2, 64x64 to 128x128 super-resolution; s from Table 5 (Bedroom; Church: 1251)",
    unet=UNetPreset(
        sample_size=128,
        block_out_channels=(64, 128, 256, 384, 512),
        layers_per_block=3,
        attention_resolutions=(32, 16, 8),
        attention_head_dim=64,
        dropout=0.1,
        downsample_type="resnet",
        upsample_type="resnet",
        time_conditioning="noise_level",
        time_scale=5000.0,
        low_res_size=64,
        augmentation_level_embedding=True,
    ),
    scheduler=COSINE_CONTINUOUS,
    augmentation=COSINE_AUGMENTATION,
    training=TrainingPreset(
        train_batch_size=1024, learning_rate=2e-4, max_train_steps=220_000, vlb_weight=None, lr_warmup_steps=5000
    ),
    inference=InferencePreset(num_inference_steps=256, augmentation_level=251),
    data=DataPreset(source_resolution=128),
)

# A cascade of the paper's kind, small enough for two CPU cores.
FASHION_MNIST_TRAINING = TrainingPreset(
    train_batch_size=64,
    learning_rate=5e-4,
    max_train_steps=4000,
    vlb_weight=0.001,
    lr_scheduler="cosine",
    lr_warmup_steps=200,
    ema_decay=0.999,
    ema_warmup=True,
    random_flip=True,
)

FASHION_MNIST_8 = StagePreset(
    name="fashion_mnist_8",
    source="ours: the small counterpart of the 32x32 base model",
    unet=UNetPreset(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        learned_variance=True,
        block_out_channels=(32, 64),
        layers_per_block=2,
        attention_resolutions=(4,),
        attention_head_dim=32,
        norm_num_groups=16,
        num_classes=10,
        null_class=True,
    ),
    scheduler=COSINE_LEARNED,
    augmentation=None,
    training=replace(FASHION_MNIST_TRAINING, train_batch_size=128, max_train_steps=3000, label_dropout=0.1),
    inference=InferencePreset(num_inference_steps=50),
    data=DataPreset(source_resolution=32, padding=2),
)

FASHION_MNIST_8_TO_16 = StagePreset(
    name="fashion_mnist_8_to_16",
    source="ours: the small counterpart of 32x32 to 64x64",
    unet=UNetPreset(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        learned_variance=True,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        attention_resolutions=(4,),
        attention_head_dim=32,
        norm_num_groups=16,
        num_classes=10,
        low_res_size=8,
        augmentation_level_embedding=True,
    ),
    scheduler=SchedulerPreset(
        continuous=False,
        num_train_timesteps=4000,
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        prediction_type="v_prediction",
    ),
    augmentation=SMALL_AUGMENTATION,
    training=replace(FASHION_MNIST_TRAINING, max_train_steps=5000),
    inference=InferencePreset(num_inference_steps=25, augmentation_level=150),
    data=DataPreset(source_resolution=32, padding=2),
)

FASHION_MNIST_16_TO_32 = StagePreset(
    name="fashion_mnist_16_to_32",
    source="ours: the small counterpart of 64x64 to 128x128",
    unet=UNetPreset(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        attention_resolutions=(8,),
        attention_head_dim=32,
        norm_num_groups=16,
        skip_rescale=True,
        time_conditioning="noise_level",
        time_scale=5000.0,
        num_classes=10,
        low_res_size=16,
        low_res_interpolation="bicubic",
    ),
    scheduler=SchedulerPreset(
        continuous=True,
        num_train_timesteps=2000,
        beta_schedule="linear",
        beta_start=1e-6,
        beta_end=1e-2,
        variance_type="fixed_small",
        prediction_type="v_prediction",
    ),
    augmentation=BlurAugmentationPreset(),
    training=replace(FASHION_MNIST_TRAINING, max_train_steps=3000, vlb_weight=None),
    inference=InferencePreset(num_inference_steps=25),
    data=DataPreset(source_resolution=32, padding=2),
)

# Section 4.3's small-scale experiment: a non-cascaded model, and one of the same architecture that takes an image.
FASHION_MNIST_32 = StagePreset(
    name="fashion_mnist_32",
    source="ours: the small counterpart of the non-cascaded 64x64 model",
    unet=UNetPreset(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        learned_variance=True,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        attention_resolutions=(8,),
        attention_head_dim=32,
        norm_num_groups=16,
        num_classes=10,
    ),
    scheduler=FASHION_MNIST_8_TO_16.scheduler,
    augmentation=None,
    training=FASHION_MNIST_TRAINING,
    inference=InferencePreset(num_inference_steps=100),
    data=DataPreset(source_resolution=32, padding=2),
)

FASHION_MNIST_8_TO_32 = replace(
    FASHION_MNIST_32,
    name="fashion_mnist_8_to_32",
    source="ours: the small counterpart of 16x16 to 64x64",
    unet=replace(FASHION_MNIST_32.unet, low_res_size=8, augmentation_level_embedding=True),
    augmentation=SMALL_AUGMENTATION,
    inference=InferencePreset(num_inference_steps=100, augmentation_level=1000),
)

# A cascade in colour, 16 to 64 to 256, for two CPU cores and a day, or a GPU and minutes: the avatars of
# examples/avatars/, whose styles are the classes.
AVATARS_COSINE = SchedulerPreset(
    continuous=False,
    num_train_timesteps=4000,
    beta_schedule="squaredcos_cap_v2",
    variance_type="fixed_small",
    prediction_type="v_prediction",
)
AVATARS_TRAINING = TrainingPreset(
    train_batch_size=64,
    learning_rate=1e-3,
    max_train_steps=8000,
    vlb_weight=None,
    lr_scheduler="cosine",
    lr_warmup_steps=500,
    ema_decay=0.999,
    ema_warmup=True,
)

AVATARS_16 = StagePreset(
    name="avatars_16",
    source="ours: the small counterpart of the 16x16 base model",
    unet=UNetPreset(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=2,
        attention_resolutions=(8,),
        attention_head_dim=32,
        norm_num_groups=16,
        num_classes=13,
        null_class=True,
    ),
    scheduler=AVATARS_COSINE,
    augmentation=None,
    training=replace(AVATARS_TRAINING, label_dropout=0.1),
    inference=InferencePreset(num_inference_steps=20),
    data=DataPreset(source_resolution=256),
)

AVATARS_16_TO_64 = StagePreset(
    name="avatars_16_to_64",
    source="ours: the small counterpart of 16x16 to 64x64, on patches",
    unet=UNetPreset(
        sample_size=64,
        block_out_channels=(64, 128, 128),
        layers_per_block=(1, 1, 2),
        attention_resolutions=(8,),
        attention_head_dim=32,
        norm_num_groups=16,
        num_classes=13,
        low_res_size=16,
        augmentation_level_embedding=True,
        patch_size=2,
    ),
    scheduler=AVATARS_COSINE,
    augmentation=SMALL_AUGMENTATION,
    training=replace(AVATARS_TRAINING, train_batch_size=32),
    inference=InferencePreset(num_inference_steps=10, augmentation_level=100),
    data=DataPreset(source_resolution=256),
)

AVATARS_64_TO_256 = StagePreset(
    name="avatars_64_to_256",
    source="ours: the small counterpart of 64x64 to 256x256, on patches and crops",
    unet=UNetPreset(
        sample_size=256,
        block_out_channels=(48, 96),
        layers_per_block=(1, 3),
        attention_resolutions=(),
        mid_block_attention=False,
        attention_head_dim=48,
        norm_num_groups=16,
        num_classes=13,
        low_res_size=64,
        low_res_interpolation="bicubic",
        patch_size=4,
    ),
    scheduler=replace(AVATARS_COSINE, prediction_type="sample"),
    augmentation=BlurAugmentationPreset(),
    training=replace(AVATARS_TRAINING, train_batch_size=32, crop_size=128, whole_image_fraction=0.1),
    inference=InferencePreset(num_inference_steps=4),
    data=DataPreset(source_resolution=256),
)

PRESETS: dict[str, StagePreset] = {
    preset.name: preset
    for preset in (
        IMAGENET_32,
        IMAGENET_32_TO_64,
        IMAGENET_64_TO_128,
        IMAGENET_64_TO_256,
        IMAGENET_16,
        IMAGENET_16_TO_64,
        IMAGENET_64,
        LSUN_64,
        LSUN_64_TO_128,
        FASHION_MNIST_8,
        FASHION_MNIST_8_TO_16,
        FASHION_MNIST_16_TO_32,
        FASHION_MNIST_32,
        FASHION_MNIST_8_TO_32,
        AVATARS_16,
        AVATARS_16_TO_64,
        AVATARS_64_TO_256,
    )
}


def content(part: Any) -> dict[str, Any]:
    """A preset, or a part of one, as a dict that only grows where something new is used: for hashes that must last."""
    values = asdict(part)
    for f in fields(part):
        value = getattr(part, f.name)
        if f.metadata.get("added") and value == f.default:
            del values[f.name]
        elif is_dataclass(value):
            values[f.name] = content(value)
    return values


def get_preset(name: str) -> StagePreset:
    """
    The preset called `name`.

    Raises:
        ValueError: if there is none of that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"`name` must be one of {', '.join(PRESETS)}, but is {name!r}.")
    return PRESETS[name]
