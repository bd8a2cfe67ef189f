"""Random draws for a batch of images, or for one part of a batch that processes or passes share."""

from collections.abc import Callable, Sequence

import torch


class PartGenerator(torch.Generator):
    """
    A generator for the `part`-th of `num_parts` equal parts of a batch. What [`draw`] makes with it is this part of
    what it makes for the batch, so that a batch gets the same draws however it is split.
    """

    part, num_parts = 0, 1


def draw(
    sample: Callable[..., torch.Tensor],
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device | str,
    batch_dim: int = 0,
) -> torch.Tensor:
    """
    A random tensor of `shape`.

    Args:
        sample: `torch.rand`, `randn_tensor` or the like; called with a shape, `generator=` and `device=`.
        shape: of the result, which is for one part of the batch where `generator` is a [`PartGenerator`].
        generator: draws on its own device; a list, one for each image, if `sample` takes it.
        device: of the result.
        batch_dim: the dimension of `shape` that counts images.
    """
    source = getattr(generator, "device", device)
    num_parts = getattr(generator, "num_parts", 1)
    if num_parts == 1:
        return sample(shape, generator=generator, device=source).to(device)
    # All of the batch is drawn, and the rest freed: generators cannot be entered in the middle, and pieces drawn one
    # after another differ from the whole (CPUs fill vectors, CUDA counts by the size of its grid). What that takes,
    # 1.6 GB for 2,048 images of 256x256, is free again before the network runs.
    size = shape[batch_dim]
    whole = (*shape[:batch_dim], size * num_parts, *shape[batch_dim + 1 :])
    drawn = sample(whole, generator=generator, device=source)
    return drawn.narrow(batch_dim, generator.part * size, size).clone().to(device)
