"""
What training on crops means for whole images: how a super-resolution network without attention does on both.

    python benchmarks/crops.py --stage runs/avatars_64_to_256 --train_data_dir avatars --picture edges.png

Prints one JSON line. Squared errors of the prediction are of the same pixels with the same noise at fixed times, once
as whole images and once as crops that tile them; at the crops' borders (within `--border` pixels, where zeros are
padded in the middle of a picture) and inside. `norm_shift` and `norm_ratio` say how far the statistics of what group
normalisations are given move, as means over them, their groups and the images: the difference of the means over the
whole image's deviation, and the ratio of the deviations. The stage's samples of the images' averages, by its default
settings, are compared too: `crps` of `--num_samples` of each; `samples_inside` and `samples_at_borders`, mean
absolute differences of images in [0, 1], here at the borders of whole images; `power`, the samples' over the images',
by octaves. `--picture` shows the middle of some images, enlarged, above those of samples.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from cdm_diffusers import SuperResolutionPipeline
from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.pictures import grid_of
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.data.transforms import area_resize, to_float, to_uint8, to_unit
from cdm_diffusers.diffusion import diffuse
from cdm_diffusers.evaluation.ensembles import crps
from cdm_diffusers.evaluation.spectra import spectrum_ratios


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


@torch.no_grad()
def sample(pipe: SuperResolutionPipeline, images: torch.Tensor, labels: torch.Tensor, options) -> torch.Tensor:
    """Samples (K, N, C, H, W) in [0, 1] of each image's average."""
    low_res, labels = to_unit(area_resize(images, pipe.unet.config.low_res_size)), labels.tolist()
    pipe.set_progress_bar_config(disable=True)
    rounds = []
    for number in range(options.num_samples):
        generators = [torch.Generator().manual_seed(1000 * number + index) for index in range(len(images))]
        rounds.append(pipe(low_res, labels, generator=generators, output_type="pt").images)
    return torch.stack(rounds)


def compare_samples(samples: torch.Tensor, images: torch.Tensor, border: int) -> dict:
    truth = to_unit(images)
    is_border = torch.ones(truth.shape[-2:], dtype=torch.bool)
    is_border[border:-border, border:-border] = False
    difference = (samples - truth).abs()
    return {
        "crps": crps(samples, truth).mean().item(),
        "samples_inside": difference[..., ~is_border].mean().item(),
        "samples_at_borders": difference[..., is_border].mean().item(),
        "power": spectrum_ratios(to_uint8(2 * samples[0] - 1), to_uint8(images)),
    }


def picture(samples: torch.Tensor, images: torch.Tensor, count: int = 6, side: int = 64) -> Image.Image:
    """Squares from the middle of some images, four times as large, and below them those of their first samples."""
    start = max(images.shape[-1] - side, 0) // 2
    middle = slice(start, start + side)
    count = min(count, len(images))
    squares = torch.cat([to_unit(images[:count]), samples[0, :count]])[..., middle, middle]
    return grid_of(F.interpolate(squares, scale_factor=4), columns=count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, help="Folder of a super-resolution stage.")
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--dataset_split", default="validation")
    parser.add_argument("--num_images", type=int, default=52)
    parser.add_argument("--crop_size", type=int, default=128)
    parser.add_argument("--border", type=int, default=8)
    parser.add_argument("--num_samples", type=int, default=2, help="Samples of each image, at least 2.")
    parser.add_argument("--picture", help="PNG of the middle of images and of their samples.")
    parser.add_argument("--times", type=int, nargs="+", default=[200, 1000, 2000, 3000, 3800], help="The paper's t.")
    options = parser.parse_args()
    if not 0 < options.border < options.crop_size // 2:
        parser.error(f"`border` is {options.border}; it must lie in 1..{options.crop_size // 2 - 1}.")
    if options.num_samples < 2:
        parser.error(f"`num_samples` is {options.num_samples}; it must be at least 2.")
    pipe = SuperResolutionPipeline.from_pretrained(options.stage)
    data = open_images(
        DataConfig(
            train_data_dir=options.train_data_dir,
            dataset_split=options.dataset_split,
            source_resolution=pipe.config.source_resolution or pipe.unet.config.sample_size,
            num_channels=pipe.unet.config.in_channels,
        )
    )
    items = [data.dataset[i * len(data.dataset) // options.num_images] for i in range(options.num_images)]
    images = area_resize(to_float(torch.stack([item["image"] for item in items])), pipe.unet.config.sample_size)
    labels = torch.stack([item["label"] for item in items])
    samples = sample(pipe, images, labels, options)
    if options.picture:
        picture(samples, images).save(options.picture)
    figures = compare(pipe, images, labels, options)
    print(json.dumps(figures | compare_samples(samples, images, options.border)))
