"""The cascade in colour that ships with the repository loads, keeps its limits, and its stages follow each other."""

from pathlib import Path

import pytest
import torch

from cdm_diffusers import CascadedDiffusionPipeline
from cdm_diffusers.data.transforms import area_resize
from cdm_diffusers.evaluation.seeded_sampling import counted_evaluations


CASCADE = Path(__file__).parent.parent / "checkpoints" / "avatars-64"


@pytest.fixture(scope="module")
def pipe():
    pipe = CascadedDiffusionPipeline.from_pretrained(CASCADE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_loads_in_float32(pipe):
    assert sum(file.stat().st_size for file in CASCADE.rglob("*.safetensors")) <= 21e6
    assert pipe.base_unet.dtype == pipe.super_res_1_unet.dtype == torch.float32
    assert len(pipe.config.id2label) == 13 and pipe.config.id2label[3] == "fun-emoji"


def test_samples_in_30_evaluations_that_follow_their_low_resolution(pipe):
    """One of each class: the 64x64 image averaged down is the 16x16 one, but for what s = 100 leaves open."""
    with counted_evaluations(pipe) as evaluations:
        output = pipe(
            list(range(13)), generator=torch.Generator().manual_seed(1), output_type="pt", output_stages=True
        )
    assert evaluations == {"base": 13 * 20, "super_res_1": 13 * 10}
    low, high = output.stages["base"], output.stages["super_res_1"]
    assert low.shape == (13, 3, 16, 16) and high.shape == (13, 3, 64, 64)
    assert (area_resize(high, 16) - low).abs().mean() < 0.03  # 0.016; of a range of 1
    between = (low[:, None] - low[None]).abs().mean((2, 3, 4))[~torch.eye(13, dtype=torch.bool)]
    assert between.mean() > 0.15  # 0.23: no two classes look alike
