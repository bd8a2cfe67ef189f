"""Appendix B of "Cascaded Diffusion Models" as frozen dataclasses, and small presets for Fashion-MNIST.

A [`StagePreset`] says everything about one stage of a cascade: network, diffusion process, conditioning augmentation,
training, sampling and data. Where the paper leaves a value open, `docs/presets.md` lists our choice and its source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .added import added
from .models.arguments import UNetArguments


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
    """
    Recommended sampling steps and conditioning augmentation s; None where the stage takes no s. `solver` samples, one
    of `SOLVER_NAMES` of `pipelines/solver_names.py`; None is the scheduler of the training. `timestep_spacing`
    says how one of Diffusers' spreads its steps; None leaves it as in training. `timesteps` are the steps' training
    times, where they are not spread by a rule.
    """

    num_inference_steps: int
    augmentation_level: int | None = None
    solver: str | None = added(None)
    timestep_spacing: str | None = added(None)
    timesteps: tuple[int, ...] | None = added(None)


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
    unet: UNetArguments
    scheduler: SchedulerPreset
    augmentation: GaussianAugmentationPreset | BlurAugmentationPreset | None
    training: TrainingPreset
    inference: InferencePreset
    data: DataPreset


def network(
    size: int, base_channels: int, multipliers: tuple[int, ...], blocks: int | tuple[int, ...], **others: Any
) -> UNetArguments:
    """A network in Appendix B's words: base channels, channel multipliers, residual blocks per resolution."""
    channels = tuple(base_channels * multiplier for multiplier in multipliers)
    return UNetArguments(size, block_out_channels=channels, layers_per_block=blocks, **others)


# Rows of the tables below: name and source; network; diffusion process, conditioning augmentation, training (batch
# size, learning rate, steps) and sampling (steps, s). What the rows of a table share stands above it.
# fmt: off

COSINE = SchedulerPreset(continuous=False, num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2",
                         variance_type="fixed_small")
COSINE_V = replace(COSINE, prediction_type="v_prediction")
COSINE_LEARNED = replace(COSINE, variance_type="learned_range")
COSINE_LEARNED_V = replace(COSINE_LEARNED, prediction_type="v_prediction")
COSINE_CONTINUOUS = replace(COSINE, continuous=True, variance_type="fixed_large",
                            inference_beta_schedule="squaredcos_cap_v2")
LINEAR = SchedulerPreset(continuous=True, num_train_timesteps=2000, beta_schedule="linear", beta_start=1e-6,
                         beta_end=1e-2, variance_type="fixed_small")
LINEAR_CONTINUOUS = replace(LINEAR, variance_type="fixed_large", inference_beta_schedule="linear")
COSINE_AUGMENTATION = GaussianAugmentationPreset(4000, "squaredcos_cap_v2")
# In a short training s = 0 would hardly be seen: docs/presets.md has what was measured.
SMALL_AUGMENTATION = replace(COSINE_AUGMENTATION, zero_level_probability=0.1)
BLUR = BlurAugmentationPreset()
TOLD_S = {"augmentation_level_embedding": True}
NOISE_LEVELS = {"time_conditioning": "noise_level", "time_scale": 5000.0}
BIGGAN_BLOCKS = {"downsample_type": "resnet", "upsample_type": "resnet"}

# Appendix B.1: architectures like DDPM and Improved DDPM (Section 4.3), then like SR3 (Section 4.4).
improved_ddpm = partial(network, learned_variance=True, num_attention_heads=4, dropout=0.1, num_classes=1000)
sr3 = partial(network, attention_resolutions=(16,), num_attention_heads=1, skip_rescale=True, num_classes=1000,
              low_res_size=64, low_res_interpolation="bicubic", **NOISE_LEVELS, **BIGGAN_BLOCKS)
hybrid = partial(TrainingPreset, vlb_weight=0.001, lr_warmup_steps=5000)
simple = partial(TrainingPreset, vlb_weight=None, lr_warmup_steps=5000)
imagenet = partial(StagePreset, data=DataPreset(source_resolution=256))
IMAGENET = (
    imagenet("imagenet_32", "Appendix B.1, 32x32 base model",
             improved_ddpm(32, 256, (1, 2, 3, 4), 6),
             COSINE_LEARNED, None, hybrid(2048, 1e-4, 700_000, random_flip=True), InferencePreset(4000)),
    imagenet("imagenet_32_to_64", "Appendix B.1, 32x32 to 64x64 super-resolution; s from Table 3a",
             improved_ddpm(64, 256, (1, 2, 3, 4), 5, low_res_size=32, **TOLD_S),
             COSINE_LEARNED, COSINE_AUGMENTATION,
             hybrid(2048, 1e-4, 400_000, random_flip=True), InferencePreset(4000, 751)),
    imagenet("imagenet_64_to_128", "Appendix B.1, 64x64 to 128x128 super-resolution",
             sr3(128, 128, (1, 2, 4, 8, 8), 3),
             LINEAR_CONTINUOUS, BLUR,
             simple(1024, 1e-4, 500_000, lr_warmup_steps=10_000, random_flip=True), InferencePreset(100)),
    imagenet("imagenet_64_to_256", "Appendix B.1, 64x64 to 256x256 super-resolution; blur and flips from Table 4",
             sr3(256, 128, (1, 2, 4, 4, 8, 8), 3),
             LINEAR_CONTINUOUS, BLUR,
             simple(1024, 1e-4, 500_000, lr_warmup_steps=10_000, random_flip=True), InferencePreset(100)),
)

# Sections 4.2 and 4.3: the small-scale ablation, Improved DDPM's class-conditional 64x64 model with dropout.
ablation = partial(StagePreset, data=DataPreset(source_resolution=64))
ABLATION = (
    ablation("imagenet_16", "Section 4.3, 16x16 base model of the ablation",
             improved_ddpm(16, 192, (1, 2, 3), 3),
             COSINE_LEARNED, None, hybrid(2048, 3e-4, 500_000), InferencePreset(4000)),
    ablation("imagenet_16_to_64", "Section 4.3, 16x16 to 64x64 super-resolution; s from Table 2b",
             improved_ddpm(64, 192, (1, 2, 3, 4), 3, low_res_size=16),
             COSINE_LEARNED, replace(COSINE_AUGMENTATION, level=1001),
             hybrid(2048, 3e-4, 500_000), InferencePreset(4000, 1001)),
    ablation("imagenet_64", "Section 4.2, non-cascaded 64x64 baseline",
             improved_ddpm(64, 192, (1, 2, 3, 4), 3),
             COSINE_LEARNED, None, hybrid(2048, 3e-4, 500_000), InferencePreset(4000)),
)

# Appendix B.2 and Section 4.5: unconditional; Bedroom and Church use the same hyperparameters.
adm = partial(network, attention_resolutions=(32, 16, 8), attention_head_dim=64, dropout=0.1,
              **NOISE_LEVELS, **BIGGAN_BLOCKS)
lsun = partial(StagePreset, data=DataPreset(source_resolution=128))
LSUN = (
    lsun("lsun_64", "Appendix B.2, 64x64 base model",
         adm(64, 128, (1, 2, 3, 4), 3),
         COSINE_CONTINUOUS, None, simple(2048, 3e-4, 100_000), InferencePreset(256)),
    lsun("lsun_64_to_128", "Appendix B.2, 64x64 to 128x128 super-resolution; s from Table 5 (Bedroom; Church: 1251)",
         adm(128, 64, (1, 2, 4, 6, 8), 3, low_res_size=64, **TOLD_S),
         COSINE_CONTINUOUS, COSINE_AUGMENTATION, simple(1024, 2e-4, 220_000), InferencePreset(256, 251)),
)

# A cascade of the paper's kind, small enough for two CPU cores; then, for experiments like those of Section 4.3, a
# non-cascaded model and one of the same architecture that takes an image.
small = partial(network, attention_head_dim=32, norm_num_groups=16)
grey = partial(small, in_channels=1, out_channels=1, num_classes=10)
small_training = partial(TrainingPreset, lr_scheduler="cosine", ema_decay=0.999, ema_warmup=True)
fashion_training = partial(small_training, vlb_weight=0.001, lr_warmup_steps=200, random_flip=True)
fashion = partial(StagePreset, data=DataPreset(source_resolution=32, padding=2))
FASHION_MNIST = (
    fashion("fashion_mnist_8", "ours: the small counterpart of the 32x32 base model",
            grey(8, 32, (1, 2), 2, attention_resolutions=(4,), learned_variance=True, null_class=True),
            COSINE_LEARNED, None, fashion_training(128, 5e-4, 3000, label_dropout=0.1), InferencePreset(50)),
    fashion("fashion_mnist_8_to_16", "ours: the small counterpart of 32x32 to 64x64",
            grey(16, 32, (1, 2, 2), 1, attention_resolutions=(4,), learned_variance=True, low_res_size=8, **TOLD_S),
            COSINE_LEARNED_V, SMALL_AUGMENTATION, fashion_training(64, 5e-4, 5000), InferencePreset(25, 150)),
    fashion("fashion_mnist_16_to_32", "ours: the small counterpart of 64x64 to 128x128",
            grey(32, 16, (1, 1, 2, 4), 1, attention_resolutions=(8,), skip_rescale=True, low_res_size=16,
                 low_res_interpolation="bicubic", **NOISE_LEVELS),
            replace(LINEAR, prediction_type="v_prediction"), BLUR,
            fashion_training(64, 5e-4, 3000, vlb_weight=None), InferencePreset(25)),
    fashion("fashion_mnist_32", "ours: the small counterpart of the non-cascaded 64x64 model",
            grey(32, 16, (1, 1, 2, 4), 1, attention_resolutions=(8,), learned_variance=True),
            COSINE_LEARNED_V, None, fashion_training(64, 5e-4, 4000), InferencePreset(100)),
    fashion("fashion_mnist_8_to_32", "ours: the small counterpart of 16x16 to 64x64",
            grey(32, 16, (1, 1, 2, 4), 1, attention_resolutions=(8,), learned_variance=True, low_res_size=8, **TOLD_S),
            COSINE_LEARNED_V, SMALL_AUGMENTATION, fashion_training(64, 5e-4, 4000), InferencePreset(100, 1000)),
)

# For your own images, in colour: meant for an hour or two per stage on two CPU cores. The data says how many
# classes there are. Images are not flipped, since some have a left and a right.
own = partial(small, num_classes=10)
own_training = partial(small_training, vlb_weight=None, lr_warmup_steps=200)
own_stage = partial(StagePreset, data=DataPreset(source_resolution=64))
few = partial(InferencePreset, solver="unipc")
SMALL = (
    own_stage("small_16", "ours: a 16x16 base for your own images",
              own(16, 32, (1, 2, 2), 2, attention_resolutions=(8, 4), null_class=True),
              COSINE_V, None, own_training(64, 1e-3, 3000, label_dropout=0.1), few(20)),
    own_stage("small_32", "ours: a 32x32 base for your own images",
              own(32, 32, (1, 2, 2), (1, 2, 2), attention_resolutions=(8,), null_class=True),
              COSINE_V, None, own_training(64, 1e-3, 4000, label_dropout=0.1), few(20)),
    own_stage("small_16_to_64", "ours: 16x16 to 64x64 for your own images, on patches",
              own(64, 32, (1, 2, 4), 1, attention_resolutions=(8,), low_res_size=16, patch_size=2, **TOLD_S),
              COSINE_V, SMALL_AUGMENTATION, own_training(32, 1e-3, 3000), few(10, 100)),
    own_stage("small_32_to_64", "ours: 32x32 to 64x64 for your own images, on patches",
              own(64, 32, (1, 2, 4), 1, attention_resolutions=(8,), low_res_size=32, patch_size=2, **TOLD_S),
              COSINE_V, SMALL_AUGMENTATION, own_training(32, 1e-3, 3000), few(10, 100)),
    own_stage("small_64_to_256", "ours: 64x64 to 256x256 for your own images, on patches and crops",
              own(256, 96, (1, 2), (1, 2), attention_resolutions=(), mid_block_attention=False, low_res_size=64,
                  low_res_interpolation="bicubic", patch_size=4),
              COSINE_V, BLUR, own_training(32, 1e-3, 4000, crop_size=64), few(8),
              data=DataPreset(source_resolution=256)),
)

# A cascade in colour, 16 to 64 to 256, for two CPU cores and a day, or a GPU and minutes: the avatars of
# examples/avatars/, whose styles are the classes.
colour = partial(small, num_classes=13)
avatars_training = partial(small_training, vlb_weight=None, lr_warmup_steps=500)
avatars = partial(StagePreset, data=DataPreset(source_resolution=256))
AVATARS = (
    avatars("avatars_16", "ours: the small counterpart of the 16x16 base model",
            colour(16, 64, (1, 2), 2, attention_resolutions=(8,), null_class=True),
            COSINE_V, None, avatars_training(64, 1e-3, 8000, label_dropout=0.1), InferencePreset(20)),
    avatars("avatars_16_to_64", "ours: the small counterpart of 16x16 to 64x64, on patches",
            colour(64, 64, (1, 2, 2), (1, 1, 2), attention_resolutions=(8,), low_res_size=16, patch_size=2, **TOLD_S),
            COSINE_V, SMALL_AUGMENTATION, avatars_training(32, 1e-3, 8000), InferencePreset(10, 100)),
    avatars("avatars_64_to_256", "ours: the small counterpart of 64x64 to 256x256, on patches and crops",
            colour(256, 48, (1, 2), (1, 3), attention_resolutions=(), mid_block_attention=False, attention_head_dim=48,
                   low_res_size=64, low_res_interpolation="bicubic", patch_size=4),
            replace(COSINE, prediction_type="sample"), BLUR,
            avatars_training(32, 1e-3, 8000, crop_size=128, whole_image_fraction=0.1), InferencePreset(4)),
)

# fmt: on
PRESETS: dict[str, StagePreset] = {
    preset.name: preset for preset in (*IMAGENET, *ABLATION, *LSUN, *FASHION_MNIST, *SMALL, *AVATARS)
}


def get_preset(name: str) -> StagePreset:
    """
    The preset called `name`.

    Raises:
        ValueError: if there is no such preset; the message lists all of them.
    """
    if name not in PRESETS:
        raise ValueError(f"`name` is {name!r}; it must be one of {', '.join(PRESETS)}.")
    return PRESETS[name]
