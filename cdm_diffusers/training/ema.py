"""The moving average of the weights."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel

from .sharding import local


class LerpEMAModel(EMAModel):
    """
    Bit-identical to [`EMAModel`], with one pass over the weights on a CPU instead of two and a temporary copy. Of
    sharded parameters, each process averages its shards.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Moves the average towards the parameters."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        weight = 1 - self.cur_decay_value
        averages, parameters = ([local(tensor) for tensor in part] for part in (self.shadow_params, parameters))
        # From a weight of 0.5 on, lerp starts from the other end, which rounds differently.
        if weight < 0.5 and averages[0].device.type == "cpu":
            torch._foreach_lerp_(averages, parameters, weight)
        else:
            torch._foreach_sub_(averages, torch._foreach_sub(averages, parameters), alpha=weight)
