"""
What samples of avatars show, beside renders: style, hair, skin and background as a network reads them from the pixels,
how often a combination of them was never rendered, and the power spectrum.

    python examples/avatars/measure.py train --avatars avatars --size 64 --output avatar-reader-64
    python examples/avatars/measure.py samples --avatars avatars --reader avatar-reader-64 --samples samples \
        --output attributes.json
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetModel

from cdm_diffusers.data.image_sets import load_image_set
from cdm_diffusers.data.pictures import grid_of
from cdm_diffusers.data.transforms import area_resize, image_to_tensor, to_float, to_uint8, to_unit
from cdm_diffusers.evaluation.intervals import wilson_interval
from cdm_diffusers.evaluation.recognition import NearestNeighbours, nearest_figures
from cdm_diffusers.evaluation.spectra import spectrum_ratios
from cdm_diffusers.files import write_json
from cdm_diffusers.tables import markdown_table


# Attributes by the names that most styles give them, and those that two of them give. A style may have none of them.
ATTRIBUTES = {"hair": "hair", "hairColor": "hair colour", "skinColor": "skin"}
OTHER_NAMES = {
    "micah": {"baseColor": "skin"},
    "open-peeps": {"head": "hair", "headContrastColor": "hair colour"},
}
OF_STYLE = list(ATTRIBUTES.values())  # whose values are of one style each
SMALLEST = 128
NUM_PAIRS, PAIR_SIZE = 24, 64
BATCH_SIZE = 128


# ------------------------------------------------------------------------------------------------------------------
# Renders
# ------------------------------------------------------------------------------------------------------------------


def read_rows(avatars: Path, split: str) -> list[dict[str, str]]:
    """Of each render its file, style and background, and as far as the style has them hair, its colour, and skin."""
    rows = []
    for line in (avatars / split / "metadata.jsonl").read_text().splitlines():
        render = json.loads(line)
        names = ATTRIBUTES | OTHER_NAMES.get(render["label"], {})
        options = json.loads(render["attributes"])
        rows.append(
            {
                "file": str(avatars / split / render["file_name"]),
                "style": render["label"],
                "background": render["background"],
                **{names[option]: value for option, value in options.items() if option in names},
            }
        )
    return rows


def images_of(rows: list[dict[str, str]], size: int) -> torch.Tensor:
    """uint8 (N, 3, size, size), area averages."""
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for index, row in enumerate(tqdm(rows, "decoding", leave=False)):
        with Image.open(row["file"]) as image:
            whole = to_float(image_to_tensor(image, image.height, 3))[None]
        images[index] = to_uint8(area_resize(whole, size))[0]
    return images


# ------------------------------------------------------------------------------------------------------------------
# The network that reads
# ------------------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """
    A ResNet with a softmax for each attribute, over "style: value" of all styles where its values depend on the style.

    Args:
        values: of each attribute, all that are known.
    """

    def __init__(self, size: int, values: dict[str, list[str]]):
        super().__init__()
        self.size, self.values = size, values
        config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="basic"
        )
        self.trunk = ResNetModel(config)
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(known)) for name, known in values.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of images (B, 3, R, R) in [-1, 1] the logits of each attribute."""
        if self.size < SMALLEST:  # the trunk reduces its input by 4 before its first block
            images = F.interpolate(images, SMALLEST, mode="bilinear")
        features = self.trunk(images).pooler_output.flatten(1)
        return {name: head(features) for name, head in self.heads.items()}

    def targets(self, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """Places in `values`, int64 (N,); -100, which cross entropy leaves out, where a style has no such thing."""
        place = {name: {value: index for index, value in enumerate(known)} for name, known in self.values.items()}
        return {
            name: torch.tensor([place[name].get(value_of(row, name), -100) for row in rows]) for name in self.values
        }

    @torch.no_grad()
    def read(self, images: torch.Tensor, styles: list[str]) -> list[dict[str, str]]:
        """The attributes of uint8 images (N, 3, R, R): the style by itself, all else among what `styles` have."""
        rows = []
        for start in tqdm(range(0, len(images), BATCH_SIZE), "reading", leave=False):
            logits = self(area_resize(to_float(images[start : start + BATCH_SIZE]), self.size))
            for index, style in enumerate(styles[start : start + BATCH_SIZE]):
                row = {name: self.best(name, of_all[index], style) for name, of_all in logits.items()}
                rows.append({name: value for name, value in row.items() if value is not None})
        return rows

    def best(self, name: str, logits: torch.Tensor, style: str) -> str | None:
        """The value with the largest of `logits` that a style can have; None where it has none."""
        known = self.values[name]
        if name in OF_STYLE:
            possible = [index for index, value in enumerate(known) if value.startswith(f"{style}: ")]
        else:
            possible = list(range(len(known)))
        return known[possible[logits[possible].argmax()]].removeprefix(f"{style}: ") if possible else None

    def save(self, folder: Path) -> None:
        """Weights and values."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        write_json(folder / "config.json", {"size": self.size, "values": self.values})

    @classmethod
    def load(cls, folder: Path) -> "Reader":
        """What `save` has written."""
        reader = cls(**json.loads((folder / "config.json").read_text()))
        reader.load_state_dict(load_file(folder / "model.safetensors"))
        return reader.eval()


def value_of(row: dict[str, str], name: str) -> str | None:
    """As `Reader.values` has it."""
    value = row.get(name)
    return f"{row['style']}: {value}" if name in OF_STYLE and value is not None else value


def train(options: argparse.Namespace) -> None:
    """Trains a reader on the training renders, and says how much of the held-out ones it reads right."""
    rows, held_out = (read_rows(options.avatars, split) for split in ("train", "validation"))
    names = ["style", "background", *OF_STYLE]
    values = {name: sorted({value for row in rows if (value := value_of(row, name)) is not None}) for name in names}
    values = {name: known for name, known in values.items() if known}
    torch.manual_seed(0)
    reader = Reader(options.size, values)
    images, targets = images_of(rows, options.size), reader.targets(rows)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = options.num_train_epochs * (len(rows) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = tqdm(total=steps, unit="step")
    for _ in range(options.num_train_epochs):
        for batch in torch.randperm(len(rows)).split(BATCH_SIZE)[: len(rows) // BATCH_SIZE]:
            logits = reader(to_float(images[batch]))
            loss = sum(F.cross_entropy(of_one, targets[name][batch]) for name, of_one in logits.items())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    reader.eval().save(options.output)
    read = reader.read(images_of(held_out, options.size), [row["style"] for row in held_out])
    accuracy = {name: read_right(read, held_out, name) for name in values}
    write_json(options.output / "results.json", {"read_right": accuracy, "num_images": len(held_out)})
    print(markdown_table(["attribute", "read right"], [[name, f"{share:.1%}"] for name, share in accuracy.items()]))


def read_right(read: list[dict[str, str]], rows: list[dict[str, str]], name: str) -> float:
    """The share of those rows that have the attribute."""
    pairs = [(one[name], row[name]) for one, row in zip(read, rows, strict=True) if name in row]
    return sum(a == b for a, b in pairs) / len(pairs)


# ------------------------------------------------------------------------------------------------------------------
# Samples
# ------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    """Compares samples with the training renders, and as many of these with all of them: what chance leaves."""
    reader, rows = Reader.load(options.reader), read_rows(options.avatars, "train")
    samples = load_image_set(options.samples, options.stage)
    styles = [samples.id2label[label] for label in samples.labels.tolist()]
    images = torch.stack([samples[index]["image"] for index in range(len(samples))])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: len(samples)].tolist()
    drawn = [rows[index] for index in order]
    renders = images_of(drawn, samples.size)
    read = {
        "samples": reader.read(images, styles),
        "renders": reader.read(renders, [row["style"] for row in drawn]),
    }
    right = sum(one["style"] == style for one, style in zip(read["samples"], styles, strict=True)) / len(styles)
    of_style = {"samples": styles, "renders": [row["style"] for row in drawn]}
    report = {
        "recognised": {"share": right, "interval": wilson_interval(right, len(styles))},
        "differences": {
            name: {of: frequency_difference(read[of], of_style[of], rows, name) for of in read}
            for name in reader.values
            if name != "style"
        },
        "never_rendered": {of: never_rendered(read[of], of_style[of], rows) for of in read},
        "spectrum": spectrum_ratios(images, renders),
        "size": samples.size,
        "num_images": len(samples),
        "reader": json.loads((options.reader / "results.json").read_text()),
    }
    if options.pairs is not None:
        report["nearest_render"] = compare_with_nearest(
            images, rows, read_rows(options.avatars, "validation"), options.pairs
        )
    write_json(options.output, report)
    print(f"style recognised: {right:.1%} of {len(styles):,}")
    shown = [[name, *(f"{of:.3f}" for of in both.values())] for name, both in report["differences"].items()]
    print(markdown_table(["difference of frequencies", "samples", "as many renders"], shown))
    print({of: f"{share:.1%} combinations never rendered" for of, share in report["never_rendered"].items()})
    print(markdown_table(["cycles per image", "power over the renders'"], list(report["spectrum"].items())))


def compare_with_nearest(
    images: torch.Tensor, rows: list[dict[str, str]], held_out: list[dict[str, str]], pairs_file: Path
) -> dict[str, Any]:
    """
    Distances of the first samples and of as many validation renders to the nearest training render, in pixels of
    [-1, 1], averaged down; the samples stand in the picture `pairs_file`, each with its nearest on the right.
    """
    size = min(images.shape[-1], PAIR_SIZE)
    drawn = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:NUM_PAIRS].tolist()
    samples = area_resize(to_float(images[:NUM_PAIRS]), size)
    neighbours = NearestNeighbours(
        torch.cat([samples, to_float(images_of([held_out[index] for index in drawn], size))]), "cpu"
    )
    for batch in images_of(rows, size).split(BATCH_SIZE):
        neighbours.update(*neighbours.nearer(to_float(batch)))
    pairs = torch.stack([samples, neighbours.nearest[: len(samples)]], dim=1)
    grid_of(to_unit(pairs.flatten(0, 1)), 8).save(pairs_file)
    return nearest_figures(*neighbours.distances().split([len(samples), len(drawn)]))


def frequency_difference(
    read: list[dict[str, str]], styles: list[str], rows: list[dict[str, str]], name: str
) -> float:
    """
    Total variation distance between how often the values of an attribute are read in a style, and how often they were
    rendered; the mean over styles that have it.
    """
    distances = []
    for style in sorted(set(styles)):
        seen = Counter(row[name] for row, of in zip(read, styles, strict=True) if of == style and name in row)
        rendered = Counter(row[name] for row in rows if row["style"] == style and name in row)
        if rendered:
            values = seen.keys() | rendered.keys()
            shares = [seen[value] / seen.total() - rendered[value] / rendered.total() for value in values]
            distances.append(sum(map(abs, shares)) / 2)
    return sum(distances) / len(distances)


def never_rendered(read: list[dict[str, str]], styles: list[str], rows: list[dict[str, str]]) -> float:
    """The share of combinations, of style and all attributes that it has, which no training image shows."""

    def combination(row: dict[str, str], style: str) -> tuple[Any, ...]:
        return (style, row["background"], *(row.get(name) for name in OF_STYLE))

    rendered = {combination(row, row["style"]) for row in rows}
    return sum(combination(one, of) not in rendered for one, of in zip(read, styles, strict=True)) / len(read)


def parse_args() -> argparse.Namespace:
    """What the command line says; `function` is what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_training = commands.add_parser("train", help=train.__doc__)
    of_training.add_argument("--size", type=int, default=64, help="of the images, in pixels; larger ones are averaged")
    of_training.add_argument("--num_train_epochs", type=int, default=4)
    of_samples = commands.add_parser("samples", help=measure.__doc__)
    of_samples.add_argument("--reader", type=Path, required=True, help="output of `train`")
    of_samples.add_argument("--samples", required=True, help="output_dir of `cdm sample-set`")
    of_samples.add_argument(
        "--pairs",
        type=Path,
        help="picture to write: samples beside the nearest training renders, whose distances are then measured",
    )
    of_samples.add_argument("--stage", help="a stage that was kept, instead of the last one")
    for command, function in ((of_training, train), (of_samples, measure)):
        command.add_argument("--avatars", type=Path, required=True, help="output of render.mjs")
        command.add_argument("--output", type=Path, required=True)
        command.set_defaults(function=function)
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
