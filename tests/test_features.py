"""Feature extractors: small networks of the same interfaces, and EfficientNet-lite0 itself."""

import hashlib
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from cdm_diffusers.data.memory import InMemoryImages
from cdm_diffusers.data.transforms import to_float
from cdm_diffusers.evaluation import features as features_module
from cdm_diffusers.evaluation.classifier import ClassifierConfig, build_classifier
from cdm_diffusers.evaluation.features import SamePaddingConv2d, extract, load_extractor


class TinyInception(nn.Module):
    """The interface of inception-2015-12-05.pt: it resizes uint8 images and returns features or probabilities."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(12, 7)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        x = F.interpolate(img.to(torch.float32), size=[9, 9], mode="bilinear", align_corners=False)
        features = self.layers(x / 127.5 - 1).flatten(1)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(1)


@pytest.fixture
def inception_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(TinyInception().eval()).save(path)
    return path


def random_images(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The official Inception


def test_inception_features_and_logits(inception_file):
    extractor = load_extractor(str(inception_file))
    network, images = torch.jit.load(inception_file), random_images(5, 3, 16, 16)
    features, logits = extractor(images)
    assert torch.equal(features, network(images, return_features=True))
    # The Inception Score's authors leave out the bias.
    torch.testing.assert_close(logits.softmax(1), network(images, no_output_bias=True))
    grey = random_images(2, 1, 16, 16)
    assert torch.equal(extractor(grey)[0], extractor(grey.repeat(1, 3, 1, 1))[0])


def test_only_the_official_file_gives_fid(inception_file, monkeypatch):
    other = load_extractor(str(inception_file))
    assert other.distance_name == "Frechet distance"
    assert "not the official" in other.name and sha256(inception_file)[:12] in other.name and "299x299" in other.name
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", sha256(inception_file))
    official = load_extractor(str(inception_file))
    assert official.distance_name == "FID" and official.name.startswith("inception (official FID weights), 299x299")


def test_inception_is_downloaded_once(inception_file, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features_module, "INCEPTION_URL", inception_file.as_uri())
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", sha256(inception_file))
    assert load_extractor("inception").distance_name == "FID"
    inception_file.unlink()
    assert load_extractor("inception").distance_name == "FID"


def test_download_of_another_file_or_of_none_is_refused(inception_file, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features_module, "INCEPTION_URL", inception_file.as_uri())
    with pytest.raises(OSError, match="cannot be downloaded"):
        load_extractor("inception")  # its hash is not the official one
    monkeypatch.setattr(features_module, "INCEPTION_URL", (tmp_path / "nothing.pt").as_uri())
    with pytest.raises(OSError, match=r"give its path as `extractor`"):
        load_extractor("inception")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_file_that_is_no_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        load_extractor(str(tmp_path / "absent.pt"))
    (tmp_path / "broken.pt").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        load_extractor(str(tmp_path / "broken.pt"))


# EfficientNet-lite0


@pytest.fixture(scope="module")
def efficientnet():
    return load_extractor("efficientnet-lite0")


def test_efficientnet_lite0_recognises_a_photograph(efficientnet):
    """All weights found their places (loading is strict), and a photograph of an officer is a military uniform."""
    assert sum(parameter.numel() for parameter in efficientnet.parameters()) == 4_652_008
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = torch.from_numpy(np.array(Image.open(file).convert("RGB").crop((0, 0, 512, 512))))
    images = torch.stack([photograph.permute(2, 0, 1), random_images(3, 512, 512)])
    features, logits = efficientnet(images)
    assert features.shape == (2, 1280) and logits.shape == (2, 1000) and features.dtype == torch.float32
    assert logits[0].argmax() == 652
    torch.testing.assert_close(features[:1], efficientnet(images[:1])[0], rtol=1e-3, atol=1e-4)
    assert efficientnet.name == "efficientnet-lite0 (ImageNet), 224x224 bicubic, antialiased"


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (8, 5, 2), (7, 3, 2), (7, 5, 2), (6, 5, 1)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    """Output i sees inputs from i * stride - (total // 2) on, zeros beyond the border."""
    conv = SamePaddingConv2d(1, 1, kernel, stride=stride, bias=False)
    x = torch.randn(1, 1, size, size)
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + kernel - size, 0) // 2
    canvas = torch.zeros(size + 2 * kernel, size + 2 * kernel)
    canvas[kernel : kernel + size, kernel : kernel + size] = x[0, 0]
    starts = [kernel - before + i * stride for i in range(outputs)]
    expected = torch.stack(
        [
            torch.stack([(canvas[i : i + kernel, j : j + kernel] * conv.weight[0, 0]).sum() for j in starts])
            for i in starts
        ]
    )
    torch.testing.assert_close(conv(x)[0, 0], expected)


# DINOv2


def test_dinov2_class_token(tmp_path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=56, image_size=56, mlp_ratio=1
    )
    torch.manual_seed(0)
    model = Dinov2Model(config).eval()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dino")
    extractor = load_extractor(f"dinov2:{tmp_path / 'dino'}")
    images = random_images(2, 3, 224, 224)  # needs no resizing
    pixels = (images.numpy() / 255 - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(pixels).float()).last_hidden_state[:, 0]
    features, logits = extractor(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert logits is None and "224x224" in extractor.name and "dino" in extractor.name


# Classifiers of ours


def save_classifier(folder, seed=0, image_size=8):
    torch.manual_seed(seed)
    config = ClassifierConfig(train_data_dir=".", output_dir="", image_size=image_size, num_channels=1)
    classifier = build_classifier(config, {0: "a", 1: "b", 2: "c"}).eval()
    classifier.model.save_pretrained(folder)
    return classifier


def test_classifier_features_in_order(tmp_path):
    classifier = save_classifier(tmp_path / "net")
    extractor = load_extractor(str(tmp_path / "net"))
    images = random_images(7, 1, 8, 8)
    features, logits = extract(extractor, InMemoryImages(images, None), batch_size=3)
    with torch.no_grad():
        expected_logits, expected = classifier(to_float(images))
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits, expected_logits)
    assert extractor.name == "classifier net, 8x8, not resized"


def test_fingerprint_follows_the_weights(tmp_path):
    save_classifier(tmp_path / "a" / "net")
    save_classifier(tmp_path / "b" / "net", seed=1)
    first, again, other = (load_extractor(str(tmp_path / name / "net")) for name in ("a", "a", "b"))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 8, 8)])
def test_classifier_refuses_other_images(tmp_path, shape):
    save_classifier(tmp_path / "net")
    with pytest.raises(ValueError, match="takes 8x8 images of 1 channels, and these are"):
        load_extractor(str(tmp_path / "net"))(random_images(*shape))


def test_images_must_be_uint8_and_extractors_known(tmp_path):
    save_classifier(tmp_path / "net")
    with pytest.raises(ValueError, match=r"torch\.float32"):
        load_extractor(str(tmp_path / "net"))(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="'vgg'; it must be"):
        load_extractor("vgg")
    (Path(tmp_path) / "empty").mkdir()
    with pytest.raises(ValueError, match="no classifier"):
        load_extractor(str(tmp_path / "empty"))
