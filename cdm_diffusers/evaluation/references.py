"""
Real images as a reference for samples: their statistics and features, stored under a hash of the images and of the
network that they came from.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from ..data.memory import ImageSubset
from ..files import reveal, temporary_name
from ..processes import from_main
from .batches import run_over
from .features import FeatureExtractor, extract
from .metrics import FeatureStatistics, frechet_distance


def reference_statistics(
    dataset: Dataset,
    extractor: FeatureExtractor,
    cache_dir: str | os.PathLike,
    *,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
) -> FeatureStatistics:
    """
    Statistics of the features of all images, computed batch by batch, or read where `cache_dir` has them.

    Args:
        dataset: items {"image": uint8 (C, H, W), ...} of our data sources, or an [`ImageSet`], or a part of them.
        extractor: on `device`.
        cache_dir: folder of the files `statistics-HASH.safetensors`; what they came from is in their metadata.
    """

    def compute() -> dict[str, torch.Tensor]:
        loader = DataLoader(dataset, batch_size)
        features = run_over(loader, lambda batch: extractor(batch["image"])[0], device, "reference statistics")
        parts = map(FeatureStatistics.from_features, features)
        statistics = functools.reduce(lambda whole, part: FeatureStatistics.merge([whole, part]), parts)
        return {"mean": statistics.mean, "covariance": statistics.covariance}

    source = from_main(lambda: origin(dataset, extractor))
    return _as_statistics(_cached(cache_dir, "statistics", source, compute), source)


def reference_features(
    dataset: Dataset,
    extractor: FeatureExtractor,
    cache_dir: str | os.PathLike,
    *,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[`extract`], or what `cache_dir` has of it in `features-HASH.safetensors`."""

    def compute() -> dict[str, torch.Tensor]:
        features, logits = extract(extractor, dataset, batch_size, device)
        return {"features": features} if logits is None else {"features": features, "logits": logits}

    source = from_main(lambda: origin(dataset, extractor))
    tensors = _cached(cache_dir, "features", source, compute)
    return tensors["features"], tensors.get("logits")


def real_distance(
    dataset: Dataset,
    other: Dataset,
    count: int,
    extractor: FeatureExtractor,
    cache_dir: str | os.PathLike,
    **options,
) -> float:
    """
    What real images reach: the Frechet distance of `count` images drawn from `other` (or all, if fewer) to `dataset`.

    Args:
        options: `batch_size` and `device`.
    """
    order = torch.randperm(len(other), generator=torch.Generator().manual_seed(0))
    features, _ = reference_features(ImageSubset(other, order[:count].tolist()), extractor, cache_dir, **options)
    statistics = reference_statistics(dataset, extractor, cache_dir, **options)
    return from_main(lambda: frechet_distance(FeatureStatistics.from_features(features), statistics))


def read_statistics(file: str | os.PathLike, dataset: Dataset, extractor: FeatureExtractor) -> FeatureStatistics:
    """
    Those of a file that [`reference_statistics`] left in a `cache_dir`.

    Raises:
        ValueError: the file is of another kind, of other images or of another extractor.
    """
    source = from_main(lambda: origin(dataset, extractor))
    return _as_statistics(from_main(lambda: _read(Path(file), source)), source)


def origin(dataset: Dataset, extractor: FeatureExtractor) -> dict[str, str]:
    """What features of `dataset` depend on."""
    return {
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint(),
        "data_fingerprint": dataset.fingerprint(),
        "count": str(len(dataset)),
    }


# ------------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------------


def _cached(
    cache_dir: str | os.PathLike, kind: str, source: dict[str, str], compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(cache_dir).expanduser() / f"{kind}-{key}.safetensors"
    tensors = from_main(lambda: _read(file, source) if file.is_file() else None)
    if tensors is None:
        tensors = compute()
        from_main(lambda: _save(tensors, file, source))
    return tensors


def _save(tensors: dict[str, torch.Tensor], file: Path, source: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(file)
    save_file(tensors, temporary, metadata=source)
    reveal(temporary, file)


def _read(file: Path, source: dict[str, str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{str(file)!r} cannot be read as reference statistics ({error}): give another file; if it is in "
            "`cache_dir`, remove it."
        ) from error
    for key, what in (("extractor", "of another extractor"), ("extractor_fingerprint", "of other weights")):
        if metadata.get(key) != source[key]:
            raise ValueError(
                f"the reference file {str(file)!r} is {what}: {metadata.get(key)!r} and not {source[key]!r}."
            )
    for key in ("data_fingerprint", "count"):
        if metadata.get(key) != source[key]:
            raise ValueError(
                f"the reference file {str(file)!r} is of other images, or of images prepared differently: its {key} "
                f"is {metadata.get(key)!r} and not {source[key]!r}."
            )
    return tensors


def _as_statistics(tensors: dict[str, torch.Tensor], source: dict[str, str]) -> FeatureStatistics:
    return FeatureStatistics(tensors["mean"], tensors["covariance"], int(source["count"]))
