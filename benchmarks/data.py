"""
Prints how fast images are read, and how much memory a stream of them takes, as JSON lines.

    OMP_NUM_THREADS=1 python -m benchmarks.data
    OMP_NUM_THREADS=1 python -m benchmarks.data --measure stream --gigabytes 10

`rate` compares one process's reading with plain PIL's, `np.array(Image.open(file).convert("RGB"))` and the same crop
and resize, as it comes and as the tensor that a network takes: their milliseconds an image, in CPU time, in turns;
`ratio` is a side's time by the first one's. `workers` is images per second of a data loader, on the wall. `draft` is
what JPEG's decoding at a smaller scale would save, and how far it moves what stages learn from, averages of the
pixels, 0 to 255. `stream` reads tar files, over and over, as a training does, and says how much memory the process
has every half gigabyte. All pictures are made for it: smooth ones with noise, which compress like photographs; for
`stream` noise alone.
"""

import argparse
import io
import itertools
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import CPU, compare, emit, rounded
from cdm_diffusers.data.config import DataConfig
from cdm_diffusers.data.sources import open_images
from cdm_diffusers.data.transforms import area_resize, image_to_tensor, to_float
from cdm_diffusers.training.batches import LaneBatches, Split


MEASURES = ("rate", "workers", "draft", "stream")
KINDS = [("png", 64, 64), ("png", 256, 256), ("jpeg", 256, 256), ("jpeg", 512, 256)]  # with size and source resolution


def picture(seed: int, size: int, noise_only: bool = False) -> Image.Image:
    """Made up, of `size` pixels a side."""
    generator = np.random.default_rng(seed)
    if noise_only:
        return Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))
    coarse = Image.fromarray(generator.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + generator.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str) -> bytes:
    """As a file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return buffer.getvalue()


def write_pictures(folder: Path, kind: str, size: int, count: int) -> list[Path]:
    """Files in one class folder."""
    (folder / "a").mkdir(parents=True)
    files = [folder / "a" / f"{index:05d}.{kind}" for index in range(count)]
    for index, file in enumerate(files):
        file.write_bytes(encoded(picture(index, size), kind))
    return files


def plain_pil(file: Path, source_resolution: int) -> np.ndarray:
    """What anybody would write."""
    image = Image.open(file).convert("RGB")
    if image.size != (source_resolution, source_resolution):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((source_resolution, source_resolution), Image.Resampling.BILINEAR)
    return np.array(image)


def rate(folder: Path, count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Of each kind, in one process."""
    for kind, size, resolution in KINDS:
        place = folder / f"{kind}-{size}"
        files = write_pictures(place, kind, size, count)
        rows = open_images(DataConfig(train_data_dir=str(place), source_resolution=resolution)).dataset
        batches = [list(range(start, min(start + 16, count))) for start in range(0, count, 16)]
        works: dict[str, Callable[[], Any]] = {
            "plain PIL": lambda files=files, resolution=resolution: [plain_pil(file, resolution) for file in files],
            "plain PIL, to (C, H, W)": lambda files=files, resolution=resolution: [
                torch.from_numpy(plain_pil(file, resolution).transpose(2, 0, 1).copy()) for file in files
            ],
            "ours": lambda rows=rows, batches=batches: [rows.__getitems__(batch) for batch in batches],
        }
        times = compare(works, rounds)
        for figures in times.values():
            figures["milliseconds_an_image"] = rounded(figures.pop("milliseconds") / count)
            del figures["quartiles"]
        yield {"kind": kind, "size": size, "source_resolution": resolution, "images": count, **times}


def workers(folder: Path, count: int, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """Images a second with so many processes that load."""
    write_pictures(folder / "workers", "jpeg", 256, count)
    rows = open_images(DataConfig(train_data_dir=str(folder / "workers"), source_resolution=256)).dataset
    for number in numbers:
        loader = torch.utils.data.DataLoader(rows, 32, num_workers=number, persistent_workers=number > 0)
        for _ in loader:  # workers have started
            pass
        start = time.perf_counter()
        for _ in loader:
            pass
        yield {"workers": number, "images_per_second": rounded(count / (time.perf_counter() - start))}


def draft(count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """JPEGs of 512 pixels for a source resolution of 256: decoded whole and resized, or decoded at half the size."""
    files = [encoded(picture(index, 512), "jpeg") for index in range(count)]

    def decode(file: bytes, is_draft: bool) -> torch.Tensor:
        image = Image.open(io.BytesIO(file))
        if is_draft:
            image.draft("RGB", (256, 256))
        return image_to_tensor(image, 256, 3)

    whole, half = (torch.stack([decode(file, is_draft) for file in files]) for is_draft in (False, True))
    times = compare(
        {name: lambda d=d: [decode(f, d) for f in files] for name, d in (("whole", 0), ("draft", 1))}, rounds
    )
    differences = {}
    for size in (256, 64, 16):
        moved = 127.5 * (area_resize(to_float(half), size) - area_resize(to_float(whole), size)).abs()
        differences[size] = {"mean": rounded(moved.mean().item()), "largest": rounded(moved.max().item())}
    yield {
        "ratio": times["draft"]["ratio"],
        "ratio_quartiles": times["draft"]["ratio_quartiles"],
        "moved": differences,
    }


def stream(folder: Path, gigabytes: float, megabytes: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """Resident memory while so much is read of `megabytes` of tar files, in batches of 64 images of 256x256."""
    each = len(encoded(picture(0, 256, noise_only=True), "png"))
    shards, of_shard = 64, max(megabytes * 10**6 // each // 64, 1)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for index in range(shard * of_shard, (shard + 1) * of_shard):
                content = encoded(picture(index, 256, noise_only=True), "png")
                for suffix, data in (("png", content), ("cls", b"0")):
                    entry = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    config = DataConfig(train_data_dir=str(folder), source_resolution=256, streaming=True, num_classes=1)
    rows, split = open_images(config).stream, Split(64, 1, 0, 1, by_process=True)
    batches = LaneBatches(rows, split, rows.num_lanes(64), CPU, None, num_workers=num_workers)
    size = sum(file.stat().st_size for file in folder.glob("*.tar")) / (shards * of_shard)
    seen, memory, start = 0, [], time.perf_counter()
    for epoch in itertools.count():
        for batch in batches.epoch(epoch, 0):
            before, seen = seen, seen + size * len(batch["image"])
            if seen // 5e8 > before // 5e8:
                memory.append(round(resident()))
                print(f"{seen / 1e9:.1f} GB: {memory[-1]} MiB", file=sys.stderr, flush=True)
        if seen >= 1e9 * gigabytes:
            break
    taken = time.perf_counter() - start
    images = {"gigabytes": rounded(seen / 1e9), "epochs": epoch + 1, "images": round(seen / size)}
    images |= {"lanes": rows.num_lanes(64), "workers": num_workers, "images_per_second": rounded(seen / size / taken)}
    yield {**images, "resident_mebibytes_every_half_gigabyte": memory}


def resident() -> float:
    """Memory that this process has now, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=["rate", "workers", "draft"])
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="For `stream`, the first.")
    parser.add_argument("--gigabytes", type=float, default=10, help="That `stream` reads.")
    parser.add_argument("--megabytes", type=int, default=1000, help="Of tar files that `stream` writes and reads.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "rate": lambda: rate(folder, options.num_images, options.rounds),
            "workers": lambda: workers(folder, options.num_images, options.workers),
            "draft": lambda: draft(options.num_images // 4, options.rounds),
            "stream": lambda: stream(folder, options.gigabytes, options.megabytes, options.workers[0]),
        }
        for measured in options.measure:
            for figures in parts[measured]():
                emit("data", {"measure": measured, **figures}, CPU)


if __name__ == "__main__":
    main()
