"""Small twins of the published networks, and the weights and inputs with which the original code was run on them."""

import gzip
import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Twin:
    """
    `original`: arguments of the original network. `settings`: what our conversion must be told. `low_res`: size of the
    low-resolution image, 0 for none.
    """

    seed: int
    original: dict
    settings: dict
    guided: bool = False
    low_res: int = 0
    batch_size: int = 2
    sample_size: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "sample_size", self.settings["image_size"])


def _openai(seed, image_size, base, multipliers, blocks, attention, heads, schedule, guided=False, **further) -> Twin:
    """`attention`: down-sampling rates, as the original network takes them. `heads`: (number, width or -1)."""
    low_res, batch_size = further.pop("low_res", 0), further.pop("batch_size", 2)
    name, steps, rescale = schedule
    settings = {"image_size": image_size, "noise_schedule": name, "diffusion_steps": steps}
    settings |= {"rescale_timesteps": rescale, "new_attention_order": further.pop("new_order", False)}
    settings |= {"num_heads": heads[0]} if heads[1] == -1 else {"num_head_channels": heads[1]}
    if low_res:
        settings["low_res"] = low_res
    original = {
        "in_channels": 3,
        "model_channels": base,
        "out_channels": 6,
        "num_res_blocks": blocks,
        "attention_resolutions": attention,
        "channel_mult": multipliers,
        "num_heads": heads[0],
        "use_scale_shift_norm": True,
        **further,
    }
    if guided:
        original |= {"image_size": image_size, "resblock_updown": True, "num_head_channels": heads[1]}
        original["use_new_attention_order"] = settings["new_attention_order"]
    return Twin(seed, original, settings, guided, low_res, batch_size)


RESCALED_COSINE, COSINE_4000, COSINE_1000 = ("cosine", 4000, True), ("cosine", 4000, False), ("cosine", 1000, False)
LINEAR_4000, LINEAR_1000 = ("linear", 4000, False), ("linear", 1000, False)
WIDE = (1, 1, 2, 2, 4, 4)

# One for every structure among the 19 files, with its levels, blocks, attention and heads, at an eighth of the width
# or less; and smaller ones for whole sampling loops
TWINS = {
    "imagenet64_uncond": _openai(1, 16, 32, (1, 2, 3, 4), 3, (4, 8), (4, -1), RESCALED_COSINE),
    "imagenet64_cond": _openai(2, 16, 32, (1, 2, 3, 4), 3, (4, 8), (4, -1), COSINE_4000, num_classes=10),
    "upsample_cond": _openai(3, 32, 32, WIDE, 2, (16, 32), (4, -1), LINEAR_4000, num_classes=10, low_res=8),
    "cifar10": _openai(4, 16, 32, (1, 2, 2, 2), 3, (2, 4), (4, -1), RESCALED_COSINE),
    "lsun_uncond": _openai(5, 32, 32, WIDE, 2, (16,), (1, -1), LINEAR_1000, use_scale_shift_norm=False),
    "64x64": _openai(
        6, 16, 32, (1, 2, 3, 4), 3, (2, 4, 8), (4, 16), COSINE_1000, True, num_classes=10, new_order=True
    ),
    "128x128": _openai(7, 16, 32, (1, 1, 2, 3, 4), 2, (4, 8, 16), (4, -1), LINEAR_1000, True, num_classes=10),
    "256x256": _openai(8, 32, 32, WIDE, 2, (8, 16, 32), (4, 32), LINEAR_1000, True, num_classes=10),
    "256x256_uncond": _openai(9, 32, 32, WIDE, 2, (8, 16, 32), (4, 8), LINEAR_1000, True),
    "512x512": _openai(
        10, 64, 64, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), (4, 16), LINEAR_1000, True, num_classes=10, batch_size=1
    ),
    "64_256_upsampler": _openai(
        11, 32, 32, WIDE, 2, (8, 16, 32), (4, -1), LINEAR_1000, True, num_classes=10, low_res=8
    ),
    "128_512_upsampler": _openai(12, 32, 32, WIDE, 2, (16, 32), (4, 16), LINEAR_1000, True, num_classes=10, low_res=8),
    "small rescaled cosine 4000": _openai(13, 8, 32, (1, 2), 1, (2,), (2, -1), RESCALED_COSINE),
    "small cosine 1000": _openai(
        14, 8, 32, (1, 2), 1, (1, 2), (2, 16), COSINE_1000, True, num_classes=10, new_order=True
    ),
    "small linear 1000": _openai(15, 8, 32, (1, 2), 1, (2,), (4, 8), LINEAR_1000, True),
    "small linear 4000": _openai(16, 16, 32, (1, 2), 1, (2,), (4, -1), LINEAR_4000, num_classes=10, low_res=8),
}

# Twin: seed of the noise, steps
LOOPS = {name: (100 + TWINS[name].seed, 250) for name in TWINS if name.startswith("small")}


def _sr3(seed, image_size, inner, multipliers, attention, blocks, groups, low_res, steps=100) -> Twin:
    settings = {"image_size": image_size, "norm_groups": groups, "diffusion_steps": steps}
    settings |= {"linear_start": 1e-4, "linear_end": 0.2} | ({"low_res": low_res} if low_res else {})
    original = {
        "in_channel": 6 if low_res else 3,
        "out_channel": 3,
        "inner_channel": inner,
        "norm_groups": groups,
        "channel_multiplier": multipliers,
        "attn_res": attention,
        "res_blocks": blocks,
        "dropout": 0.2,
    }
    return Twin(seed, original, settings, low_res=low_res)


SR3_TWINS = {
    "sr_sr3_16_128": _sr3(21, 32, 16, (1, 2, 4, 8, 8), [4], 2, 16, 4),
    "sr_sr3_64_512": _sr3(22, 32, 16, (1, 2, 4, 8, 16), [], 1, 8, 4),
    "sample_sr3_128": _sr3(23, 16, 16, (1, 2, 4), [4], 1, 16, 0),
    "small sr3": _sr3(24, 16, 16, (1, 2), [8], 1, 16, 4),
    "wider sr3": _sr3(25, 16, 8, (2, 3), [8], 1, 8, 4),
}
SR3_LOOPS = {"small sr3": 124}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """
    In the order of the names, from one generator: matrices and convolutions are normal with variance 1 / fan-in,
    biases have deviation 0.1, and norms' factors are 1 plus as much. Nothing is zero, as fresh networks are in places.
    """
    generator = seeded(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            weights[name] = 0.1 * noise + float(name.endswith("weight"))
    return weights


def draw_inputs(twin: Twin) -> dict[str, torch.Tensor]:
    """A batch of everything that the network takes, by the names of our `forward`."""
    generator = seeded(1000 + twin.seed)
    batch_size, steps = twin.batch_size, twin.settings["diffusion_steps"]
    inputs = {"sample": torch.randn(batch_size, 3, twin.sample_size, twin.sample_size, generator=generator)}
    if "linear_start" in twin.settings:
        inputs["timestep"] = torch.linspace(0.31, 0.93, batch_size)
    else:
        inputs["timestep"] = torch.linspace(0.23 * steps, 0.87 * steps, batch_size).long()
    if twin.original.get("num_classes"):
        inputs["class_labels"] = torch.arange(batch_size) + twin.original["num_classes"] - batch_size
    if twin.low_res:
        shape = batch_size, 3, twin.low_res, twin.low_res
        inputs["low_res"] = torch.rand(shape, generator=generator) * 2 - 1
        if "linear_start" in twin.settings:  # SR3's networks are given the enlarged image: Pillow's bicubic
            size = (twin.sample_size, twin.sample_size)
            inputs["upsampled"] = F.interpolate(inputs["low_res"], size, mode="bicubic", antialias=True)
    return inputs


@cache
def golden_shapes() -> dict:
    """`published`, `same`, `twins`, `respacings`; see `data/make_golden.py`."""
    with gzip.open(DATA / "golden_shapes.json.gz") as file:
        return json.load(file)


@cache
def golden_outputs() -> dict[str, np.ndarray]:
    with np.load(DATA / "golden_outputs.npz") as file:
        return dict(file)


def twin_weights(name: str) -> dict[str, torch.Tensor]:
    """The state dict of a twin, as the original code would have saved it."""
    shapes = golden_shapes()["twins"][name]
    if name in TWINS:
        return draw_weights(shapes, TWINS[name].seed)
    network = {key: shape for key, shape in shapes.items() if key.startswith("denoise_fn.")}
    settings = SR3_TWINS[name].settings
    schedule = np.linspace(settings["linear_start"], settings["linear_end"], settings["diffusion_steps"])
    tables = {"betas": torch.tensor(schedule, dtype=torch.float32)}
    return tables | draw_weights(network, SR3_TWINS[name].seed)
