"""
What training on crops means for whole images: how a super-resolution network without attention does on both.

    python benchmarks/crops.py --stage runs/avatars_64_to_256 --train_data_dir avatars --num_images 52

Prints one JSON line. Squared errors of the prediction are of the same pixels with the same noise at fixed times, once
as whole images and once as crops that tile them; at the crops' borders (within `--border` pixels, where zeros are
padded in the middle of a picture) and inside. `norm_shift` and `norm_ratio` say how far the statistics of what group
normalisations are given move, as means over them, their groups and the images: the difference of the means over the
whole image's deviation, and the ratio of the deviations.
"""

import argparse
import json

import torch
from diffusers.utils.torch_utils import randn_tensor

from cdm_diffusers import SuperResolutionPipeline
from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.data.transforms import area_resize, to_float
from cdm_diffusers.diffusion import diffuse


def tiles(images: torch.Tensor, parts: int) -> torch.Tensor:
    """(B, C, H, W) to (parts * parts * B, C, H / parts, W / parts), all images' first tiles first."""
    rows = images.unflatten(2, (parts, -1)).unflatten(4, (parts, -1))  # (B, C, p, h, p, w)
    return rows.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


class GroupStatistics:
    """Mean and deviation of every group of what each group normalisation is given, call by call."""

    def __init__(self, unet):
        self.seen = []
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(lambda norm, args: self.add(norm, args[0]))

    def add(self, norm: torch.nn.GroupNorm, hidden: torch.Tensor):
        groups = hidden.unflatten(1, (norm.num_groups, -1)).flatten(2)  # (B, groups, values)
        self.seen.append((groups.mean(-1), groups.std(-1)))

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        seen, self.seen = self.seen, []
        return seen


@torch.no_grad()
def compare(pipe: SuperResolutionPipeline, images: torch.Tensor, labels: torch.Tensor, options) -> dict[str, float]:
    unet, scheduler = pipe.unet, pipe.scheduler
    parts, size = unet.config.sample_size // options.crop_size, options.crop_size
    low_res = area_resize(images, unet.config.low_res_size)
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[options.border : -options.border, options.border : -options.border] = True
    statistics, losses, shifts, ratios = GroupStatistics(unet), [], [], []
    for t in options.times:
        noise = randn_tensor(images.shape, generator=torch.Generator().manual_seed(t))
        alpha, sigma = scheduler.table.signal_and_noise(torch.full((len(images),), t))
        x_t, target = diffuse(images, noise, alpha, sigma), scheduler.prediction.target(images, noise, alpha, sigma)

        def squared_errors(cut, x_t=x_t, target=target, t=t):
            x, conditions = cut(x_t), {"low_res": cut(low_res)}
            if unet.config.num_classes is not None:
                conditions["class_labels"] = labels.repeat(len(x) // len(labels))
            output = unet(x, torch.full((len(x),), t - 1), **conditions).sample
            return (output[:, : images.shape[1]] - cut(target)) ** 2

        whole = tiles(squared_errors(lambda image: image), parts)
        of_whole = statistics.take()
        crops = squared_errors(lambda image: tiles(image, parts))
        losses.append(
            [whole.mean(), crops.mean(), *((e[..., m]).mean() for e in (whole, crops) for m in (inside, ~inside))]
        )
        for (mean, deviation), (crop_mean, crop_deviation) in zip(of_whole, statistics.take(), strict=True):
            repeats = len(crop_mean) // len(mean)
            mean, deviation = mean.repeat(repeats, 1), deviation.repeat(repeats, 1) + 1e-6
            shifts.append(((crop_mean - mean).abs() / deviation).mean())
            ratios.append((crop_deviation / deviation).mean())
    names = ("whole", "crops", "whole_inside", "whole_at_borders", "crops_inside", "crops_at_borders")
    figures = dict(zip(names, torch.tensor(losses).mean(0).tolist(), strict=True))
    return figures | {"norm_shift": torch.stack(shifts).mean().item(), "norm_ratio": torch.stack(ratios).mean().item()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, help="Folder of a super-resolution stage.")
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--dataset_split", default="validation")
    parser.add_argument("--num_images", type=int, default=52)
    parser.add_argument("--crop_size", type=int, default=128)
    parser.add_argument("--border", type=int, default=8)
    parser.add_argument("--times", type=int, nargs="+", default=[200, 1000, 2000, 3000, 3800], help="The paper's t.")
    options = parser.parse_args()
    if not 0 < options.border < options.crop_size // 2:
        parser.error(f"`border` is {options.border}; it must lie in 1..{options.crop_size // 2 - 1}.")
    pipe = SuperResolutionPipeline.from_pretrained(options.stage)
    data = open_images(
        DataConfig(
            train_data_dir=options.train_data_dir,
            dataset_split=options.dataset_split,
            source_resolution=pipe.config.source_resolution,
            num_channels=pipe.unet.config.in_channels,
        )
    )
    items = [data.dataset[i * len(data.dataset) // options.num_images] for i in range(options.num_images)]
    images = area_resize(to_float(torch.stack([item["image"] for item in items])), pipe.unet.config.sample_size)
    print(json.dumps(compare(pipe, images, torch.stack([item["label"] for item in items]), options)))
