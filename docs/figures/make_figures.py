"""
Draws the figures of docs/concepts.md from the shipped cascades, in about a minute and a half of CPU time:

    python docs/figures/make_figures.py [folder]
"""

import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from cdm_diffusers import CascadedDiffusionPipeline


ROOT = Path(__file__).parents[2]
FACES, CLOTHES = "avatars-256", "fashion-mnist-32"
LEVELS = [0, 250, 500, 1000, 2000, 3000, 4000]


def load(name: str, scheduler: str | None = None, last_stage: str | None = None) -> CascadedDiffusionPipeline:
    pipe = CascadedDiffusionPipeline.from_pretrained(str(ROOT / "checkpoints" / name))
    pipe = pipe.with_schedulers(scheduler, last_stage=last_stage)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def canvas(rows: int, columns: int, width: float = 9, **options):
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, width * rows / columns * 1.12), squeeze=False, layout="constrained", **options
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def show(axis, image: torch.Tensor) -> None:
    """One image (C, H, W) in [0, 1], pixel by pixel."""
    image = image.clamp(0, 1)
    if image.shape[0] == 1:
        axis.imshow(image[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axis.imshow(image.permute(1, 2, 0), interpolation="nearest")


def save(figure, folder: Path, name: str) -> None:
    figure.savefig(folder / name, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)


def cascade(folder: Path) -> None:
    """Each stage from noise to an image, told what the stage before it has made."""
    pipe, shown = load(CLOTHES, "ancestral"), {}
    steps = {"base": 25, "super_res_1": 25, "super_res_2": 25}

    def keep(pipe, step, timestep, tensors):
        shown.setdefault(pipe.current_stage, []).append(tensors["sample"][0] / 2 + 0.5)
        return {}

    pipe(["Ankle boot"], num_inference_steps=steps, generator=seeded(5), callback_on_step_end=keep)
    moments = [0, 9, 14, 18, 21, 24]
    figure, axes = canvas(3, len(moments))
    for row, (stage, samples) in zip(axes, shown.items(), strict=True):
        size = samples[0].shape[-1]
        row[0].set_ylabel(f"{stage}\n{size} x {size}")
        for axis, moment in zip(row, moments, strict=True):
            show(axis, samples[moment])
    for axis, moment in zip(axes[0], moments, strict=True):
        axis.set_title(f"step {moment + 1} of 25", fontsize=9)
    save(figure, folder, "cascade.png")


def augmentation(folder: Path) -> None:
    """The low-resolution image at several s, and what the next stage makes of it with all noise the same."""
    pipe = load(FACES, last_stage="super_res_1")
    labels = ["adventurer", "toon-head"]
    noising = pipe.super_res_1_noising_scheduler
    low_res = pipe(labels, generator=seeded(2), output_type="pt", output_stages=True).stages["base"]
    figure, axes = canvas(2 * len(labels), len(LEVELS))
    for column, level in enumerate(LEVELS):
        noised = noising.forward_marginal(2 * low_res - 1, level, seeded(3)) / 2 + 0.5
        images = pipe(
            labels, image=low_res, augmentation_levels={"super_res_1": level}, generator=seeded(3), output_type="pt"
        ).images
        axes[0, column].set_title(f"s = {level}", fontsize=10)
        for number in range(len(labels)):
            show(axes[2 * number, column], noised[number])
            show(axes[2 * number + 1, column], images[number])
    for number in range(len(labels)):
        axes[2 * number, 0].set_ylabel("the stage sees")
        axes[2 * number + 1, 0].set_ylabel("it makes")
    save(figure, folder, "augmentation.png")


def level_of_s(folder: Path) -> None:
    """How much of the image and how much noise is in z_s."""
    scheduler = load(FACES).super_res_1_noising_scheduler
    times = torch.arange(0, 4001, 10)
    alpha_bar = scheduler.table.alpha_bar(times)
    figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
    axis.plot(times, alpha_bar.sqrt(), label="image")
    axis.plot(times, (1 - alpha_bar).sqrt(), label="noise")
    axis.set(xlabel="s", ylabel="share in z_s", xlim=(0, 4000), ylim=(0, 1.02), xticks=LEVELS)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, folder, "s.png")


def truncation(folder: Path) -> None:
    """Truncated: the base stops at s. Non-truncated: it goes on to its image, which is then noised to s."""
    pipe, labels, levels = load(FACES, "ancestral", "super_res_1"), ["adventurer"], [500, 1500, 2500]
    noising, steps = pipe.super_res_1_noising_scheduler, {"base": 100, "super_res_1": 50}
    options = {"num_inference_steps": steps, "output_type": "pt", "output_stages": True}
    z_0 = pipe(labels, generator=seeded(1), **options).stages["base"]
    figure, axes = canvas(2, 3 * len(levels), width=10)
    for place, level in enumerate(levels):
        options["augmentation_levels"] = {"super_res_1": level}
        cells = axes[:, 3 * place : 3 * place + 3]
        cells[0, 0].axis("off")
        cells[0, 0].set_title(f"s = {level}", fontsize=10, loc="left")
        stages = pipe(labels, truncated=True, generator=seeded(1), **options).stages
        show(cells[0, 1], stages["base"][0])
        show(cells[0, 2], stages["super_res_1"][0])
        show(cells[1, 0], z_0[0])
        show(cells[1, 1], noising.forward_marginal(2 * z_0 - 1, level, seeded(3))[0] / 2 + 0.5)
        show(cells[1, 2], pipe(labels, image=z_0, generator=seeded(3), **options).images[0])
        for row in cells:
            for cell, name in zip(row, ("z_0", "z_s", "x_0"), strict=True):
                cell.set_xlabel(name, fontsize=9)
    for row, name in zip(axes, ("truncated", "non-truncated"), strict=True):
        row[0].text(-0.35, 0.5, name, rotation=90, va="center", ha="center", transform=row[0].transAxes)
    save(figure, folder, "truncation.png")


def main(folder: Path) -> None:
    for draw in (cascade, augmentation, level_of_s, truncation):
        draw(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
