"""
What `consistency=True` does to the super-resolution stages of a cascade on real inputs: how far area averages of their
samples are from the input, the continuous ranked probability score (CRPS) of the samples of each image, and their
power over the images', by octaves. `--settings` takes steps, times and s from the cascade's settings of that name.

    python benchmarks/consistency.py --train_data_dir /usr/share/datasets/fashion-mnist --padding 2
"""

import argparse

import torch
import torch.nn.functional as F

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.data.transforms import area_resize, to_float, to_uint8, to_unit
from cdm_diffusers.evaluation.ensembles import crps
from cdm_diffusers.evaluation.spectra import spectrum_ratios


def measure(pipe, low_res: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor, num_samples: int, **options):
    """
    CRPS (N,); root mean squares of averages minus inputs and of the samples' mean minus the truth; and the samples'
    power over the truth's, by octaves.
    """
    members = []
    for number in range(num_samples):
        generators = [torch.Generator().manual_seed(1000 * number + index) for index in range(len(truth))]
        members.append(pipe(labels, image=low_res, generator=generators, output_type="pt", **options).images)
    members = torch.stack(members)
    factor = truth.shape[-1] // low_res.shape[-1]
    averages = F.avg_pool2d(members.flatten(0, 1), factor).unflatten(0, members.shape[:2])
    errors = (averages - low_res, members.mean(0) - truth)
    power = spectrum_ratios(to_uint8(2 * members.flatten(0, 1) - 1), to_uint8(2 * truth - 1))
    return crps(members, truth), *(error.square().mean().sqrt().item() for error in errors), power


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="checkpoints/fashion-mnist-32")
    parser.add_argument("--settings")
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--padding", type=int, default=0)
    parser.add_argument("--num_images", type=int, default=150)
    parser.add_argument("--num_samples", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    cascade = CascadedDiffusionPipeline.from_pretrained(options.pipeline)
    config = DataConfig(
        source_resolution=cascade.config.source_resolution or cascade.stages[-1].unet.config.sample_size,
        num_channels=cascade.base_unet.config.out_channels,
        train_data_dir=options.train_data_dir,
        dataset_split=options.dataset_split,
        padding=options.padding,
        label_names=",".join(cascade.config.id2label.values()),
    )
    data = open_images(config).dataset
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: options.num_images].tolist()
    images = to_float(torch.stack([data[index]["image"] for index in order]))
    labels = torch.tensor([int(data[index]["label"]) for index in order])
    for stage in cascade.stages[1:]:
        unet, pipe = stage.unet.config, cascade.with_schedulers(last_stage=stage.name)
        pipe.set_progress_bar_config(disable=True)
        low_res, truth = (to_unit(area_resize(images, size)) for size in (unet.low_res_size, unet.sample_size))
        scores = []
        for consistency in (False, True):
            score, deviation, error, power = measure(
                pipe, low_res, labels, truth, options.num_samples, consistency=consistency, settings=options.settings
            )
            scores.append(score)
            print(
                f"{stage.name}, consistency={consistency}: CRPS {score.mean():.4f}, averages {deviation:.4f} from the "
                f"input, mean {error:.4f} from the truth, power {power}"
            )
        difference = scores[1] - scores[0]
        print(f"  paired difference {difference.mean():+.4f} ({difference.std() / len(difference) ** 0.5:.4f})")
        upsampled = F.interpolate(low_res, truth.shape[-2:], mode="bicubic").clamp(0, 1)
        print(f"  bicubic upsampling: {(upsampled - truth).abs().mean():.4f}")


if __name__ == "__main__":
    main()
