"""Draws for parts of a batch, which together are those for the whole."""

import pytest
import torch

from cdm_diffusers.conditioning_augmentation import BlurConditioningAugmentation, GaussianConditioningAugmentation
from cdm_diffusers.data.transforms import random_crop, random_flip
from cdm_diffusers.draws import PartGenerator
from cdm_diffusers.losses import SimpleLoss
from cdm_diffusers.schedulers import CascadedDDPMScheduler, ContinuousDDPMScheduler


def losses_of(scheduler):
    return lambda images, generator: SimpleLoss(scheduler)(lambda x_t, condition: x_t, images, generator)


def augmented(augmentation):
    return lambda images, generator: augmentation(images, generator)[0]


DRAWS = {
    "flips": random_flip,
    "crops": lambda images, generator: random_crop(images, images[..., ::2, ::2], 0.5, generator)[0],
    "blur": augmented(BlurConditioningAugmentation()),
    "levels": augmented(GaussianConditioningAugmentation(CascadedDDPMScheduler(), zero_level_probability=0.3)),
    "discrete times": losses_of(CascadedDDPMScheduler()),
    "continuous times": losses_of(ContinuousDDPMScheduler()),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_parts_are_those_of_the_whole(name, num_parts):
    """Of images with 3 x 6 x 6 numbers, not whole vectors of 16."""
    images = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = DRAWS[name](images, torch.Generator().manual_seed(1))
    generator, parts = PartGenerator("cpu"), []
    for part, of_part in enumerate(images.chunk(num_parts)):
        generator.part, generator.num_parts = part, num_parts
        parts.append(DRAWS[name](of_part, generator.manual_seed(1)))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    assert not torch.equal(parts[0], parts[-1]) or num_parts == 1
