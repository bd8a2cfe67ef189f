"""The cascade in colour that ships with the repository loads, keeps its limits, and its stages follow each other."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.data.transforms import area_resize, to_uint8
from cdm_diffusers.evaluation.sample import counted_evaluations
from cdm_diffusers.evaluation.spectra import spectrum_ratios


CASCADE = Path(__file__).parent.parent / "checkpoints" / "avatars-256"


@pytest.fixture(scope="module")
def pipe():
    pipe = CascadedDiffusionPipeline.from_pretrained(CASCADE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_loads_in_float32(pipe):
    assert sum(file.stat().st_size for file in CASCADE.rglob("*.safetensors")) <= 33e6
    assert {stage.unet.dtype for stage in pipe.stages} == {torch.float32}
    assert len(pipe.config.id2label) == 13 and pipe.config.id2label[3] == "fun-emoji"


def test_samples_in_26_evaluations_that_follow_their_low_resolution(pipe):
    """One of each class: each image averaged down is the one before it, but for what s = 100 and blur leave open."""
    with counted_evaluations(pipe) as evaluations:
        output = pipe(
            list(range(13)), generator=torch.Generator().manual_seed(1), output_type="pt", output_stages=True
        )
    assert evaluations == {"base": 13 * 20, "super_res_1": 13 * 5, "super_res_2": 13}
    images = list(output.stages.values())
    assert [tuple(image.shape) for image in images] == [(13, 3, size, size) for size in (16, 64, 256)]
    for low, high in itertools.pairwise(images):
        assert (area_resize(high, low.shape[-1]) - low).abs().mean() < 0.03  # of a range of 1
    low = images[0]
    between = (low[:, None] - low[None]).abs().mean((2, 3, 4))[~torch.eye(13, dtype=torch.bool)]
    assert between.mean() > 0.15  # 0.23: no two classes look alike


def test_sharp_settings_have_more_detail_within_40_evaluations(pipe):
    """4 of them at 256x256, where the same 64x64 images get more power in the highest octave (8% over 130 samples)."""
    assert pipe.evaluations(settings="sharp") == {"base": 20, "super_res_1": 8, "super_res_2": 4}
    labels = ["adventurer", "fun-emoji", "notionists", "pixel-art"]
    output = pipe(labels, generator=torch.Generator().manual_seed(1), output_type="pt", output_stages=True)
    low = output.stages["super_res_1"]
    sharp = pipe(
        labels, image=low, generator=torch.Generator().manual_seed(1), output_type="pt", settings="sharp"
    ).images
    assert spectrum_ratios(to_uint8(2 * sharp - 1), to_uint8(2 * output.images - 1))["64 to 128"] > 1.03
    assert (area_resize(sharp, 64) - low).abs().mean() < 0.01


def test_a_drawing_that_was_averaged_down_comes_back(pipe):
    """A disc with an outline: flat inside within 2 of 255 in the median, and in all nearer than bicubic upsampling."""
    size = 256
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    face = ((rows - 128) ** 2 + (columns - 128) ** 2).sqrt()
    image = torch.where(
        face[None] < 80, torch.tensor([0.95, 0.8, 0.7]).view(3, 1, 1), torch.tensor([0.65, 0.85, 0.75]).view(3, 1, 1)
    )
    image = torch.where((face[None] - 80).abs() < 3, torch.zeros(()), image)[None]
    low = area_resize(image, 64)
    made = pipe(["adventurer"], image=low, generator=torch.Generator().manual_seed(0), output_type="pt").images
    flat = (face < 70)[None, None].expand_as(image)
    assert (made - image)[flat].abs().median() < 2 / 255
    bicubic = F.interpolate(low, size, mode="bicubic")
    assert (made - image).abs().mean() < 0.7 * (bicubic - image).abs().mean()
