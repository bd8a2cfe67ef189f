"""The 19 diffusion checkpoints that OpenAI published: what is in them, and how they were trained and measured."""

from dataclasses import dataclass, replace

from .openai_structure import OpenAISettings, OpenAIStructure


IMPROVED = "https://github.com/openai/improved-diffusion"
GUIDED = "https://github.com/openai/guided-diffusion"
STORAGE = "https://openaipublic.blob.core.windows.net/diffusion"
IDDPM_PAPER = "Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672"
ADM_PAPER = "Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233"
IMAGENET = "ImageNet (ILSVRC 2012)"


@dataclass(frozen=True)
class KnownFile:
    r"""
    A published file.

    Args:
        name (`str`): the file's, without `.pt`.
        structure ([`OpenAIStructure`]), settings ([`OpenAISettings`]): everything about network and diffusion process.
        data (`str`): what it was trained on.
        figures (`str`): what its publishers measured.
        num_inference_steps (`int`, defaults to 250): how many steps its publishers sample with.
    """

    name: str
    structure: OpenAIStructure
    settings: OpenAISettings
    data: str
    figures: str
    num_inference_steps: int = 250

    @property
    def url(self) -> str:
        """Where the file is published."""
        return f"{STORAGE}/{'jul' if self.structure.resblock_updown else 'march'}-2021/{self.name}.pt"


def repository_of(structure: OpenAIStructure) -> str:
    """The code that makes such networks; the published ones differ in how they resample."""
    return GUIDED if structure.resblock_updown else IMPROVED


def _improved(base: int, multipliers: tuple[int, ...], blocks: int, **further) -> OpenAIStructure:
    """improved-diffusion: resampling by convolution, attention at 16x16 and 8x8 where not said otherwise."""
    structure = OpenAIStructure(
        model_channels=base,
        block_out_channels=tuple(base * multiplier for multiplier in multipliers),
        layers_per_block=blocks,
        attention_levels=(2, 3),
        scale_shift=True,
        resblock_updown=False,
        num_classes=None,
        low_res_input=False,
    )
    return replace(structure, **further)


def _guided(base: int, multipliers: tuple[float, ...], attention_levels: tuple[int, ...], **further):
    """guided-diffusion: resampling by residual blocks, two blocks per level where not said otherwise."""
    structure = OpenAIStructure(
        model_channels=base,
        block_out_channels=tuple(int(base * multiplier) for multiplier in multipliers),
        layers_per_block=2,
        attention_levels=attention_levels,
        scale_shift=True,
        resblock_updown=True,
        num_classes=1000,
        low_res_input=False,
    )
    return replace(structure, **further)


_WIDE_256 = (1, 1, 2, 2, 4, 4)
_IMPROVED_64 = _improved(128, (1, 2, 3, 4), 3)
_IMPROVED_32 = _improved(128, (1, 2, 2, 2), 3, attention_levels=(1, 2))
_IMPROVED_LSUN = _improved(128, _WIDE_256, 2, attention_levels=(4,), scale_shift=False)
_GUIDED_256 = _guided(256, _WIDE_256, (3, 4, 5))
_GUIDED_256_UNCOND = replace(_GUIDED_256, num_classes=None)

# Rescaled times are improved-diffusion's default, which its commands for these two sizes leave on
_RESCALED = OpenAISettings(
    num_heads=4, new_attention_order=False, rescale_timesteps=True, noise_schedule="cosine", diffusion_steps=4000
)
_SETTINGS_64 = replace(_RESCALED, image_size=64, dropout=0.0)
_SETTINGS_32 = replace(_RESCALED, image_size=32, dropout=0.3)
_SETTINGS_LINEAR = OpenAISettings(
    image_size=256,
    new_attention_order=False,
    rescale_timesteps=False,
    noise_schedule="linear",
    diffusion_steps=1000,
    dropout=0.0,
)
_SETTINGS_IMPROVED_LSUN = replace(_SETTINGS_LINEAR, num_heads=1)
_SETTINGS_256 = replace(_SETTINGS_LINEAR, num_head_channels=64)
_SETTINGS_LSUN = replace(_SETTINGS_256, dropout=0.1)

KNOWN_FILES = (
    KnownFile(
        "imagenet64_uncond_100M_1500K",
        _IMPROVED_64,
        _SETTINGS_64,
        "ImageNet 64x64 (the downsampled set), without labels, L_hybrid, 1.5M iterations",
        f"FID 19.2, 3.57 bits/dim ({IDDPM_PAPER})",
    ),
    KnownFile(
        "imagenet64_uncond_vlb_100M_1500K",
        _IMPROVED_64,
        _SETTINGS_64,
        "ImageNet 64x64 (the downsampled set), without labels, L_vlb, 1.5M iterations",
        f"FID 40.1, 3.53 bits/dim ({IDDPM_PAPER})",
    ),
    KnownFile(
        "imagenet64_cond_270M_250K",
        _improved(192, (1, 2, 3, 4), 3, num_classes=1000),
        replace(_SETTINGS_64, rescale_timesteps=False),
        f"{IMAGENET} at 64x64, with labels, 250K iterations",
        f"FID 2.92 with 250 steps ({IDDPM_PAPER})",
    ),
    KnownFile(
        "upsample_cond_500K",
        _improved(192, _WIDE_256, 2, attention_levels=(4, 5), num_classes=1000, low_res_input=True),
        OpenAISettings(
            image_size=256,
            num_heads=4,
            new_attention_order=False,
            rescale_timesteps=False,
            noise_schedule="linear",
            diffusion_steps=4000,
            low_res=64,
            dropout=0.0,
        ),
        f"{IMAGENET}, 64x64 to 256x256, with labels, 500K iterations",
        f"FID 12.26, precision 0.70, recall 0.62 at 256x256 in a cascade of two networks ({ADM_PAPER}, Table 5)",
    ),
    KnownFile(
        "cifar10_uncond_50M_500K",
        _IMPROVED_32,
        _SETTINGS_32,
        "CIFAR-10, without labels, L_hybrid, 500K iterations",
        f"FID 3.19, 3.17 bits/dim ({IDDPM_PAPER})",
    ),
    KnownFile(
        "cifar10_uncond_vlb_50M_500K",
        _IMPROVED_32,
        _SETTINGS_32,
        "CIFAR-10, without labels, L_vlb, 500K iterations",
        f"FID 11.47, 2.94 bits/dim ({IDDPM_PAPER})",
    ),
    KnownFile(
        "lsun_uncond_100M_1200K_bs128",
        _IMPROVED_LSUN,
        _SETTINGS_IMPROVED_LSUN,
        "LSUN bedroom at 256x256, learning rate 1e-4, 1.2M iterations of batch 128",
        "none for this file",
    ),
    KnownFile(
        "lsun_uncond_100M_2400K_bs64",
        _IMPROVED_LSUN,
        _SETTINGS_IMPROVED_LSUN,
        "LSUN bedroom at 256x256, learning rate 2e-5, 2.4M iterations of batch 64",
        "none for this file",
    ),
    KnownFile(
        "64x64_diffusion",
        _guided(192, (1, 2, 3, 4), (1, 2, 3), layers_per_block=3),
        OpenAISettings(
            image_size=64,
            num_head_channels=64,
            new_attention_order=True,
            rescale_timesteps=False,
            noise_schedule="cosine",
            diffusion_steps=1000,
            dropout=0.1,
        ),
        f"{IMAGENET} at 64x64, with labels",
        f"FID 2.07, precision 0.74, recall 0.63 ({ADM_PAPER})",
    ),
    KnownFile(
        "128x128_diffusion",
        _guided(256, (1, 1, 2, 3, 4), (2, 3, 4)),
        replace(_SETTINGS_LINEAR, image_size=128, num_heads=4),
        f"{IMAGENET} at 128x128, with labels",
        f"FID 5.91; 2.97 with classifier guidance, which this package does not do ({ADM_PAPER})",
    ),
    KnownFile(
        "256x256_diffusion",
        _GUIDED_256,
        _SETTINGS_256,
        f"{IMAGENET} at 256x256, with labels",
        f"FID 10.94; 4.59 with classifier guidance, which this package does not do ({ADM_PAPER})",
    ),
    KnownFile(
        "256x256_diffusion_uncond",
        _GUIDED_256_UNCOND,
        _SETTINGS_256,
        f"{IMAGENET} at 256x256, without labels",
        f"FID 26.21, precision 0.61, recall 0.63; 12.00 with classifier guidance, which this package does not do "
        f"({ADM_PAPER}, Table 4)",
    ),
    KnownFile(
        "512x512_diffusion",
        _guided(256, (0.5, 1, 1, 2, 2, 4, 4), (4, 5, 6)),
        replace(_SETTINGS_256, image_size=512),
        f"{IMAGENET} at 512x512, with labels",
        f"FID 23.24; 7.72 with classifier guidance, which this package does not do ({ADM_PAPER})",
    ),
    KnownFile(
        "64_256_upsampler",
        _guided(192, _WIDE_256, (3, 4, 5), low_res_input=True),
        replace(_SETTINGS_LINEAR, num_heads=4, low_res=64),
        f"{IMAGENET}, 64x64 to 256x256, with labels",
        f"FID 7.49 at 256x256 behind 64x64_diffusion; 3.94 with classifier guidance, which this package does not do "
        f"({ADM_PAPER})",
    ),
    KnownFile(
        "128_512_upsampler",
        _guided(192, _WIDE_256, (4, 5), low_res_input=True),
        replace(_SETTINGS_256, image_size=512, low_res=128),
        f"{IMAGENET}, 128x128 to 512x512, with labels",
        f"FID 9.96 at 512x512 behind 128x128_diffusion; 3.85 with classifier guidance, which this package does not do "
        f"({ADM_PAPER})",
    ),
    KnownFile(
        "lsun_bedroom",
        _GUIDED_256_UNCOND,
        _SETTINGS_LSUN,
        "LSUN bedroom at 256x256",
        f"FID 1.90, precision 0.66, recall 0.51 with 1000 steps ({ADM_PAPER})",
        num_inference_steps=1000,
    ),
    KnownFile(
        "lsun_cat",
        _GUIDED_256_UNCOND,
        _SETTINGS_LSUN,
        "LSUN cat at 256x256",
        f"FID 5.57, precision 0.63, recall 0.52 with 1000 steps ({ADM_PAPER})",
        num_inference_steps=1000,
    ),
    KnownFile(
        "lsun_horse",
        _GUIDED_256_UNCOND,
        _SETTINGS_LSUN,
        "LSUN horse at 256x256",
        f"FID 2.57, precision 0.71, recall 0.55 with 1000 steps ({ADM_PAPER})",
        num_inference_steps=1000,
    ),
    KnownFile(
        "lsun_horse_nodropout",
        _GUIDED_256_UNCOND,
        _SETTINGS_256,
        "LSUN horse at 256x256, without dropout",
        f"FID 2.95, precision 0.69, recall 0.55 with 1000 steps ({ADM_PAPER})",
        num_inference_steps=1000,
    ),
)
