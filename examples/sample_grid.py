"""Sample a cascade into one labelled picture: a row per class, every stage's output beside the next.

python examples/sample_grid.py --pipeline checkpoints/fashion-mnist-32 --output samples.png
"""

import argparse

import torch
from PIL import Image, ImageDraw

from cdm_diffusers import CascadedDiffusionPipeline


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="Folder or Hub id of a cascade.")
    parser.add_argument("--output", default="samples.png", help="The picture to write.")
    parser.add_argument("--class_labels", type=int, nargs="+", help="Classes, a row each. Default: the first ten.")
    parser.add_argument("--num_images_per_label", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, help="Of every stage. Default: the pipeline's own.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=2, help="Screen pixels per pixel of the largest stage.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def draw_grid(rows: list[tuple[str, list[list[Image.Image]]]], size: int) -> Image.Image:
    """A picture with a row per class; each row holds groups of images, a group being one sample's stages."""
    gap, label_width = 8, 110
    group_width = size * len(rows[0][1][0]) + gap
    grid = Image.new("RGB", (label_width + group_width * len(rows[0][1]), (size + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (label, groups) in enumerate(rows):
        top = row * (size + gap)
        draw.text((4, top + size // 2 - 5), label, fill="black")
        for column, stages in enumerate(groups):
            for stage, image in enumerate(stages):
                enlarged = image.convert("RGB").resize((size, size), Image.Resampling.NEAREST)
                grid.paste(enlarged, (label_width + column * group_width + stage * size, top))
    return grid


def main():
    args = parse_args()
    pipe = CascadedDiffusionPipeline.from_pretrained(args.pipeline).to(args.device)
    names = pipe.config.id2label or {}
    labels = args.class_labels or sorted(names)[:10]
    count = args.num_images_per_label
    output = pipe(
        class_labels=labels,
        num_images_per_label=count,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator(args.device).manual_seed(args.seed),
        output_stages=True,
    )
    samples = list(zip(*output.stages.values(), strict=True))
    rows = [(names.get(label, str(label)), samples[i * count : (i + 1) * count]) for i, label in enumerate(labels)]
    draw_grid(rows, args.scale * output.images[0].width).save(args.output)
    print(f"Wrote {args.output}: {' | '.join(output.stages)} side by side, {count} samples of {len(labels)} classes.")


if __name__ == "__main__":
    main()
