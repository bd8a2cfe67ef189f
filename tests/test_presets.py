import ast
import inspect
import math
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch
from helpers import small_twin

from benchmarks.preset_costs import count_kept_bytes, table
from cdm_diffusers.models.arguments import UNetArguments
from cdm_diffusers.models.costs import build_on_meta, count_multiply_adds, inputs_of
from cdm_diffusers.models.unet_2d_cascaded import CascadedUNet2DModel
from cdm_diffusers.pipelines.solver_names import SOLVER_NAMES
from cdm_diffusers.presets import PRESETS, BlurAugmentationPreset, StagePreset, get_preset
from cdm_diffusers.schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler
from cdm_diffusers.training.stage import build_scheduler


ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "presets.md").read_text()

# Transcribed from Appendix B of the paper, line by line. "heads": attention heads; "head width": their dimension.
APPENDIX_B = {
    "imagenet_32": {
        "base channels": 256,
        "multipliers": [1, 2, 3, 4],
        "residual blocks": 6,
        "attention": {8, 16},
        "heads": 4,
        "timesteps": 4000,
        "noise schedule": "cosine",
        "learned variances": True,
        "loss": "hybrid",
        "batch size": 2048,
        "learning rate": 1e-4,
        "steps": 700000,
        "dropout": 0.1,
        "EMA": 0.9999,
        "continuous": False,
        "sampling": (4000, None),
    },
    "imagenet_32_to_64": {
        "base channels": 256,
        "multipliers": [1, 2, 3, 4],
        "residual blocks": 5,
        "attention": {8, 16},
        "heads": 4,
        "timesteps": 4000,
        "noise schedule": "cosine",
        "learned variances": True,
        "loss": "hybrid",
        "batch size": 2048,
        "learning rate": 1e-4,
        "steps": 400000,
        "dropout": 0.1,
        "EMA": 0.9999,
        "continuous": False,
        "sampling": (4000, None),
    },
    "imagenet_64_to_128": {
        "base channels": 128,
        "multipliers": [1, 2, 4, 8, 8],
        "residual blocks": 3,
        "attention": {16},
        "heads": 1,
        "timesteps": 2000,
        "noise schedule": "linear",
        "learned variances": False,
        "loss": "simple",
        "batch size": 1024,
        "learning rate": 1e-4,
        "steps": 500000,
        "dropout": 0.0,
        "EMA": 0.9999,
        "continuous": True,
        "sampling": (100, "linear"),
    },
    "imagenet_64_to_256": {
        "base channels": 128,
        "multipliers": [1, 2, 4, 4, 8, 8],
        "residual blocks": 3,
        "attention": {16},
        "heads": 1,
        "timesteps": 2000,
        "noise schedule": "linear",
        "learned variances": False,
        "loss": "simple",
        "batch size": 1024,
        "learning rate": 1e-4,
        "steps": 500000,
        "dropout": 0.0,
        "EMA": 0.9999,
        "continuous": True,
        "sampling": (100, "linear"),
    },
    "lsun_64": {
        "base channels": 128,
        "multipliers": [1, 2, 3, 4],
        "residual blocks": 3,
        "attention": {8, 16, 32},
        "head width": 64,
        "noise schedule": "cosine",
        "learned variances": False,
        "loss": "simple",
        "batch size": 2048,
        "learning rate": 3e-4,
        "steps": 100000,
        "dropout": 0.1,
        "EMA": 0.9999,
        "continuous": True,
        "sampling": (256, "cosine"),
    },
    "lsun_64_to_128": {
        "base channels": 64,
        "multipliers": [1, 2, 4, 6, 8],
        "residual blocks": 3,
        "attention": {8, 16, 32},
        "head width": 64,
        "noise schedule": "cosine",
        "learned variances": False,
        "loss": "simple",
        "batch size": 1024,
        "learning rate": 2e-4,
        "steps": 220000,
        "dropout": 0.1,
        "EMA": 0.9999,
        "continuous": True,
        "sampling": (256, "cosine"),
    },
}
SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear", None: None}

# Sections 2 to 4: sizes (image, low-resolution input), classes, augmentation, best s; flips where the paper says.
SECTIONS = {
    "imagenet_32": {"sizes": (32, None), "classes": 1000, "augmentation": None, "s": None, "flips": True},
    "imagenet_32_to_64": {"sizes": (64, 32), "classes": 1000, "augmentation": "amortised", "s": 751},
    "imagenet_64_to_128": {"sizes": (128, 64), "classes": 1000, "augmentation": "blur", "s": None},
    "imagenet_64_to_256": {"sizes": (256, 64), "classes": 1000, "augmentation": "blur", "s": None, "flips": True},
    "imagenet_16": {"sizes": (16, None), "classes": 1000, "augmentation": None, "s": None},
    "imagenet_16_to_64": {"sizes": (64, 16), "classes": 1000, "augmentation": "fixed", "s": 1001},
    "imagenet_64": {"sizes": (64, None), "classes": 1000, "augmentation": None, "s": None},
    "lsun_64": {"sizes": (64, None), "classes": None, "augmentation": None, "s": None},
    "lsun_64_to_128": {"sizes": (128, 64), "classes": None, "augmentation": "amortised", "s": 251},
}


@pytest.fixture(scope="module")
def costs():
    """{preset: (parameters, multiply-adds, memory, steps)} as benchmarks/preset_costs.py prints them."""
    return cost_rows(table())


def cost_rows(text: str) -> dict[str, tuple[str, ...]]:
    memory = r"[\d.]+ GiB \+ [\d,]+ MiB per image"
    rows = re.findall(rf"^\| `(\w+)` \| ([\d,]+) \| ([\d.,]+ G) \| ({memory}) \| (\d+) \|$", text, re.MULTILINE)
    return {name: tuple(cells) for name, *cells in rows}


def as_the_paper_says(preset: StagePreset) -> dict:
    """A preset in Appendix B's words."""
    unet, scheduler, training = preset.unet, preset.scheduler, preset.training
    base = unet.block_out_channels[0]
    said = {
        "base channels": base,
        "multipliers": [channels / base for channels in unet.block_out_channels],
        "residual blocks": unet.layers_per_block,
        "attention": set(unet.attention_resolutions),
        "timesteps": scheduler.num_train_timesteps,
        "noise schedule": SCHEDULES[scheduler.beta_schedule],
        "learned variances": unet.learned_variance,
        "loss": "simple" if training.vlb_weight is None else "hybrid",
        "batch size": training.train_batch_size,
        "learning rate": training.learning_rate,
        "steps": training.max_train_steps,
        "dropout": unet.dropout,
        "EMA": training.ema_decay,
        "continuous": scheduler.continuous,
        "sampling": (preset.inference.num_inference_steps, SCHEDULES[scheduler.inference_beta_schedule]),
    }
    heads = {"heads": unet.num_attention_heads, "head width": unet.attention_head_dim}
    return said | {name: value for name, value in heads.items() if value is not None}


@pytest.mark.parametrize("name", APPENDIX_B)
def test_appendix_b_to_the_letter(name):
    said = as_the_paper_says(get_preset(name))
    if name.startswith("lsun"):  # Appendix B.2 does not give T
        del said["timesteps"]
    assert said == APPENDIX_B[name]


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_2_to_4(name):
    preset, paper = get_preset(name), SECTIONS[name]
    assert (preset.unet.sample_size, preset.unet.low_res_size) == paper["sizes"]
    assert preset.unet.num_classes == paper["classes"]
    assert preset.inference.augmentation_level == paper["s"]
    assert preset.training.random_flip == paper.get("flips", preset.training.random_flip)

    augmentation = preset.augmentation
    assert preset.unet.augmentation_level_embedding == (paper["augmentation"] == "amortised")
    if paper["augmentation"] is None:
        assert augmentation is None
    elif paper["augmentation"] == "blur":
        assert augmentation == BlurAugmentationPreset(kernel_size=3, sigma_range=(0.4, 0.6), probability=0.5)
    else:
        assert (augmentation.num_train_timesteps, augmentation.beta_schedule) == (4000, "squaredcos_cap_v2")
        assert augmentation.level == (1001 if paper["augmentation"] == "fixed" else None)


@pytest.mark.parametrize(
    ("base", "super_resolution"),
    [
        ("imagenet_32", "imagenet_32_to_64"),
        ("imagenet_16", "imagenet_16_to_64"),
        ("lsun_64", "lsun_64_to_128"),
        ("imagenet_32_to_64", "imagenet_64_to_128"),
        ("imagenet_32_to_64", "imagenet_64_to_256"),
        ("fashion_mnist_8", "fashion_mnist_8_to_16"),
        ("fashion_mnist_8_to_16", "fashion_mnist_16_to_32"),
        ("small_16", "small_16_to_64"),
        ("small_32", "small_32_to_64"),
        ("avatars_16", "avatars_16_to_64"),
        ("avatars_16_to_64", "avatars_64_to_256"),
    ],
)
def test_stages_of_a_cascade_fit(base, super_resolution):
    base, super_resolution = get_preset(base), get_preset(super_resolution)
    assert super_resolution.unet.low_res_size == base.unet.sample_size
    assert super_resolution.unet.in_channels == base.unet.out_channels
    assert super_resolution.unet.num_classes == base.unet.num_classes
    assert super_resolution.data == base.data
    assert super_resolution.data.source_resolution >= super_resolution.unet.sample_size
    noise = super_resolution.augmentation
    if not isinstance(noise, BlurAugmentationPreset):
        process = (noise.num_train_timesteps, noise.beta_schedule, noise.beta_start, noise.beta_end)
        preceding = base.scheduler
        assert process == (
            preceding.num_train_timesteps,
            preceding.beta_schedule,
            preceding.beta_start,
            preceding.beta_end,
        )


def test_sixteen_to_64_is_the_baseline_but_for_its_input():
    baseline, super_resolution = get_preset("imagenet_64").unet, get_preset("imagenet_16_to_64").unet
    differing = {
        f.name for f in fields(UNetArguments) if getattr(baseline, f.name) != getattr(super_resolution, f.name)
    }
    assert differing == {"low_res_size"}


@pytest.mark.parametrize("name", PRESETS)
def test_processes_sample_from_noise_to_image(name):
    preset = get_preset(name)
    scheduler = build_scheduler(preset.scheduler)
    assert isinstance(scheduler, ContinuousDDPMScheduler if preset.scheduler.continuous else CascadedDDPMScheduler)
    learned = preset.scheduler.variance_type == "learned_range"
    assert preset.unet.learned_variance == learned == (preset.training.vlb_weight is not None)
    assert preset.unet.time_conditioning == ("noise_level" if preset.scheduler.continuous else "timestep")

    scheduler.set_timesteps(preset.inference.num_inference_steps)
    alphas_cumprod = scheduler.inference_table.alphas_cumprod
    assert len(alphas_cumprod) == len(scheduler.timesteps) == preset.inference.num_inference_steps
    assert (alphas_cumprod.diff() < 0).all()
    assert alphas_cumprod[-1] < 1e-4
    assert alphas_cumprod[0] > 0.995


def test_costs_in_the_docs(costs):
    assert list(costs) == list(PRESETS)
    assert cost_rows(DOC) == costs


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("imagenet_64", 270),  # Improved DDPM, class-conditional ImageNet-64
        ("imagenet_64_to_256", 625),  # SR3, Table A.1
        ("imagenet_64_to_128", 550),  # SR3, Table A.1: the network of 16 to 128
    ],
)
def test_published_sizes(costs, name, millions):
    parameters, *_ = costs[name]
    assert int(parameters.replace(",", "")) == pytest.approx(millions * 1e6, rel=0.05)


def test_multiply_adds_by_hand():
    """One level, one block, attention in it and in the middle: every convolution and matrix product written out."""
    unet = build_on_meta(
        UNetArguments(
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            attention_resolutions=(8,),
            num_attention_heads=2,
        )
    )
    width, pixels, embedding = 32, 64, 128

    def convolution(in_channels, out_channels, kernel=9):
        return pixels * in_channels * out_channels * kernel

    def residual(in_channels):
        shortcut = convolution(in_channels, width, kernel=1) if in_channels != width else 0
        return convolution(in_channels, width) + convolution(width, width) + shortcut + embedding * 2 * width

    attention = 4 * pixels * width**2 + 2 * pixels**2 * width
    down, middle = residual(width) + attention, 2 * residual(width) + attention
    up = 2 * (residual(2 * width) + attention)
    ends = convolution(3, width) + convolution(width, 3)
    time = width * embedding + embedding**2
    assert count_multiply_adds(unet) == time + ends + down + middle + up


def test_memory_counted_is_memory_kept():
    """On the meta device as by a real call, to the byte (but for attention, whose kernels keep more or less)."""
    preset = get_preset("avatars_64_to_256")
    unet = CascadedUNet2DModel(**small_twin(preset.unet))
    size, kept = preset.training.crop_size, {}
    parameters = {parameter.data_ptr() for parameter in unet.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(**inputs_of(unet, size))
    counted = count_kept_bytes(CascadedUNet2DModel(**small_twin(preset.unet)).to("meta"), size)
    assert counted == sum(kept.values())


def doc_values():
    """(preset, dotted field, cell) of every value in the docs' tables."""
    names = []
    for line in DOC.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "field":
            names = [cell.strip("`") for cell in cells[1:] if cell != "where"]
        elif names and re.fullmatch(r"`\w+\.\w+`", cells[0]):
            yield from ((name, cells[0].strip("`"), cell) for name, cell in zip(names, cells[1:], strict=False))


def test_values_in_the_docs():
    seen = set()
    for name, field, cell in doc_values():
        section, field = field.split(".")
        value = getattr(getattr(get_preset(name), section), field, "absent")
        assert value == ("absent" if cell == "-" else ast.literal_eval(cell)), f"{name}: {section}.{field}"
        seen.add(name)
    assert seen == set(PRESETS)


def test_fields_are_the_arguments_of_the_network():
    """Names, order, types and defaults."""
    ours = inspect.signature(UNetArguments, eval_str=True).parameters
    theirs = inspect.signature(CascadedUNet2DModel, eval_str=True).parameters
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize("section", [None, "unet", "scheduler", "augmentation", "training", "inference", "data"])
def test_presets_are_frozen(section):
    preset = get_preset("imagenet_32_to_64")
    target = preset if section is None else getattr(preset, section)
    field = fields(target)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(target, field, getattr(target, field))
    hash(preset)  # tuples all the way down: no list to change either


def test_names():
    assert all(preset.name == name for name, preset in PRESETS.items())
    with pytest.raises(ValueError, match=r"`name` is 'imagenet_512'; it must be one of .*imagenet_32_to_64") as error:
        get_preset("imagenet_512")
    assert all(name in str(error.value) for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_small_twin_round_trip(name, tmp_path):
    arguments = small_twin(get_preset(name).unet)
    generator = torch.Generator().manual_seed(0)
    unet = CascadedUNet2DModel(**arguments).eval()
    first = arguments["sample_size"] // arguments["patch_size"]
    levels = {first // 2**level for level in range(len(arguments["block_out_channels"]))}
    assert levels >= set(arguments["attention_resolutions"])
    for parameter in unet.parameters():  # fresh networks are zero where it matters
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)

    unet.save_pretrained(tmp_path)
    loaded = CascadedUNet2DModel.from_pretrained(tmp_path).eval()
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in loaded.config.items() if key in arguments} == (
        arguments
    )

    inputs = twin_inputs(unet, generator)
    with torch.no_grad():
        before, after = unet(**inputs).sample, loaded(**inputs).sample
    assert before.shape[1] == arguments["out_channels"] * (2 if arguments["learned_variance"] else 1)
    assert before.std() > 0
    assert torch.equal(before, after)


def twin_inputs(unet: CascadedUNet2DModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    config = unet.config
    channels, size, low_res_size = config.in_channels, config.sample_size, config.low_res_size
    inputs = {
        "sample": torch.randn(2, channels, size, size, generator=generator),
        "timestep": torch.tensor([0.9, 0.1] if config.time_conditioning == "noise_level" else [7, 300]),
    }
    if config.num_classes is not None:
        inputs["class_labels"] = torch.tensor([0, config.num_classes - 1])
    if low_res_size is not None:
        inputs["low_res"] = torch.randn(2, channels, low_res_size, low_res_size, generator=generator)
    if config.augmentation_level_embedding:
        inputs["augmentation_level"] = torch.tensor([0, 400])
    return inputs


@pytest.mark.parametrize(
    "stages", [("small_16", "small_16_to_64"), ("small_32", "small_32_to_64"), ("small_64_to_256",)]
)
def test_cascades_of_own_images_sample_in_few_evaluations(stages):
    """A guided step counts twice: with guidance of the base, a whole cascade takes less than 100."""
    steps = [get_preset(name).inference.num_inference_steps for name in stages]
    assert 2 * steps[0] + sum(steps[1:]) + get_preset("small_64_to_256").inference.num_inference_steps <= 100
    assert all(get_preset(name).inference.solver in SOLVER_NAMES for name in stages)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("small")])
def test_averages_of_own_images_forget_their_start(name):
    """Less than 1% of the random weights is left in the average at half of the steps."""
    training = get_preset(name).training
    decays = [min(training.ema_decay, (1 + step) / (10 + step)) for step in range(training.max_train_steps // 2)]
    assert training.ema_warmup and math.prod(decays) < 0.01
