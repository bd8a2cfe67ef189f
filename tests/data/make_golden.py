r"""
Makes the golden data of tests/test_conversion*.py by running the original code, which is not part of this repository:

    python tests/data/make_golden.py IMPROVED GUIDED SR3

with the folders of checkouts of openai/improved-diffusion, openai/guided-diffusion and
Janspiry/Image-Super-Resolution-via-Iterative-Refinement. Writes beside itself

- `golden_shapes.json.gz`: names and shapes of the weights of all published networks, and of small twins;
- `golden_outputs.npz`: what the twins return, and what whole sampling loops end in.

Weights and inputs are not stored: `golden.py` draws them from seeds.
"""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from golden import LOOPS, SR3_LOOPS, SR3_TWINS, TWINS, draw_inputs, draw_weights  # noqa: E402


RESPACINGS = [(1000, 250), (4000, 250), (1000, 100), (4000, 100), (1000, 27), (4000, 1000), (1000, 1000), (4000, 333)]

# Flags of the README files: base width, blocks, attention, ... as `create_model` takes them
IMPROVED_FILES = {
    "imagenet64_uncond_100M_1500K": {"image_size": 64, "num_channels": 128, "num_res_blocks": 3},
    "imagenet64_cond_270M_250K": {
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "class_cond": True,
    },
    "upsample_cond_500K": {"large_size": 256, "num_channels": 192, "num_res_blocks": 2, "class_cond": True},
    "cifar10_uncond_50M_500K": {"image_size": 32, "num_channels": 128, "num_res_blocks": 3},
    "lsun_uncond_100M_1200K_bs128": {
        "image_size": 256,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 1,
        "use_scale_shift_norm": False,
        "attention_resolutions": "16",
    },
}
SAME_NETWORK = {
    "imagenet64_uncond_vlb_100M_1500K": "imagenet64_uncond_100M_1500K",
    "cifar10_uncond_vlb_50M_500K": "cifar10_uncond_50M_500K",
    "lsun_uncond_100M_2400K_bs64": "lsun_uncond_100M_1200K_bs128",
    "lsun_bedroom": "256x256_diffusion_uncond",
    "lsun_cat": "256x256_diffusion_uncond",
    "lsun_horse": "256x256_diffusion_uncond",
    "lsun_horse_nodropout": "256x256_diffusion_uncond",
}
_GUIDED = {"num_channels": 256, "num_res_blocks": 2, "class_cond": True, "num_head_channels": 64}
GUIDED_FILES = {
    "64x64_diffusion": _GUIDED
    | {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "use_new_attention_order": True},
    "128x128_diffusion": _GUIDED | {"image_size": 128, "num_head_channels": -1, "num_heads": 4},
    "256x256_diffusion": _GUIDED | {"image_size": 256},
    "256x256_diffusion_uncond": _GUIDED | {"image_size": 256, "class_cond": False},
    "512x512_diffusion": _GUIDED | {"image_size": 512},
    "64_256_upsampler": _GUIDED | {"large_size": 256, "num_channels": 192, "num_head_channels": -1, "num_heads": 4},
    "128_512_upsampler": _GUIDED | {"large_size": 512, "num_channels": 192, "attention_resolutions": "32,16"},
}
SR3_CONFIGS = ("sr_sr3_16_128", "sr_sr3_64_512", "sample_sr3_128")


def shapes_of(model) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def by_flags(module, flags: dict, guided: bool):
    """A published network on the meta device, by its flags and the package's own defaults."""
    flags = {"learn_sigma": True} | flags
    if guided:
        flags = {"attention_resolutions": "32,16,8", "resblock_updown": True, "use_scale_shift_norm": True} | flags
    is_upsampler = "large_size" in flags
    defaults = module.sr_model_and_diffusion_defaults() if is_upsampler else module.model_and_diffusion_defaults()
    create = module.sr_create_model if is_upsampler else module.create_model
    names = create.__code__.co_varnames[: create.__code__.co_argcount]
    with torch.device("meta"):
        return create(**{name: value for name, value in (defaults | flags).items() if name in names})


def sr3_config(folder: Path, name: str) -> dict:
    lines = (folder / "config" / f"{name}.json").read_text().splitlines()
    return json.loads("\n".join(line.split("//")[0] for line in lines))["model"]


def sr3_network(module, config: dict, image_size: int):
    """As `networks.define_G` of that repository builds it."""
    return module.UNet(
        in_channel=config["in_channel"],
        out_channel=config["out_channel"],
        inner_channel=config["inner_channel"],
        norm_groups=config.get("norm_groups", 32),
        channel_mults=config["channel_multiplier"],
        attn_res=config["attn_res"],
        res_blocks=config["res_blocks"],
        dropout=config["dropout"],
        image_size=image_size,
    )


@torch.no_grad()
def run_twin(module, twin) -> tuple[dict, np.ndarray, torch.nn.Module]:
    kind = module.SuperResModel if twin.low_res else module.UNetModel
    model = kind(**twin.original).eval()
    shapes = shapes_of(model)
    model.load_state_dict(draw_weights(shapes, twin.seed))
    inputs = draw_inputs(twin)
    times = inputs["timestep"]
    if twin.settings["rescale_timesteps"]:
        times = times.float() * (1000.0 / twin.settings["diffusion_steps"])
    conditions = {"y": inputs.get("class_labels"), "low_res": inputs.get("low_res")}
    output = model(inputs["sample"], times, **{name: value for name, value in conditions.items() if value is not None})
    return shapes, output.numpy(), model


@torch.no_grad()
def run_loop(script_util, model, twin, seed: int, steps: int) -> np.ndarray:
    diffusion = script_util.create_gaussian_diffusion(
        steps=twin.settings["diffusion_steps"],
        learn_sigma=True,
        noise_schedule=twin.settings["noise_schedule"],
        rescale_timesteps=twin.settings["rescale_timesteps"],
        timestep_respacing=str(steps),
    )
    inputs = draw_inputs(twin)
    conditions = {"y": inputs.get("class_labels"), "low_res": inputs.get("low_res")}
    conditions = {name: value for name, value in conditions.items() if value is not None}
    torch.manual_seed(seed)
    shape = tuple(inputs["sample"].shape)
    return diffusion.p_sample_loop(model, shape, clip_denoised=True, model_kwargs=conditions, device="cpu").numpy()


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(improved: Path, guided: Path, sr3: Path):
    sys.path[:0] = [str(improved), str(guided)]
    from guided_diffusion import script_util as guided_util
    from guided_diffusion import unet as guided_unet
    from improved_diffusion import script_util as improved_util
    from improved_diffusion import unet as improved_unet
    from improved_diffusion.respace import space_timesteps

    sr3_unet, sr3_diffusion = (load(n, sr3 / "model" / "sr3_modules" / f"{n}.py") for n in ("unet", "diffusion"))

    published = {name: shapes_of(by_flags(improved_util, flags, False)) for name, flags in IMPROVED_FILES.items()}
    published |= {name: shapes_of(by_flags(guided_util, flags, True)) for name, flags in GUIDED_FILES.items()}
    for name in SR3_CONFIGS:
        config = sr3_config(sr3, name)
        with torch.device("meta"):
            network = sr3_network(sr3_unet, config["unet"], config["diffusion"]["image_size"])
            model = sr3_diffusion.GaussianDiffusion(network, config["diffusion"]["image_size"])
        published[name] = shapes_of(model)

    twin_shapes, outputs = {}, {}
    for name, twin in TWINS.items():
        module, util = (guided_unet, guided_util) if twin.guided else (improved_unet, improved_util)
        twin_shapes[name], outputs[name], model = run_twin(module, twin)
        if name in LOOPS:
            outputs[f"{name} loop"] = run_loop(util, model, twin, *LOOPS[name])
    for name, twin in SR3_TWINS.items():
        network = sr3_network(sr3_unet, twin.original, twin.settings["image_size"])
        model = sr3_diffusion.GaussianDiffusion(network, twin.settings["image_size"], conditional=twin.low_res)
        schedule = {"schedule": "linear", "linear_start": twin.settings["linear_start"]}
        schedule |= {"n_timestep": twin.settings["diffusion_steps"], "linear_end": twin.settings["linear_end"]}
        network.load_state_dict(draw_weights(shapes_of(network), twin.seed))
        model.set_new_noise_schedule(schedule, "cpu")
        twin_shapes[name] = shapes_of(model.eval())
        inputs = draw_inputs(twin)
        image = [inputs["upsampled"], inputs["sample"]] if twin.low_res else [inputs["sample"]]
        with torch.no_grad():
            outputs[name] = network(torch.cat(image, dim=1), inputs["timestep"][:, None]).numpy()
        if name in SR3_LOOPS:
            torch.manual_seed(SR3_LOOPS[name])
            outputs[f"{name} loop"] = model.super_resolution(inputs["upsampled"], continous=True)[-2:].numpy()

    respacings = [[steps, count, sorted(space_timesteps(steps, str(count)))] for steps, count in RESPACINGS]
    content = {"published": published, "same": SAME_NETWORK, "twins": twin_shapes, "respacings": respacings}
    with gzip.GzipFile(HERE / "golden_shapes.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(content, separators=(",", ":")).encode())
    np.savez_compressed(HERE / "golden_outputs.npz", **outputs)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
