"""The moving average of the weights."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel


class LerpEMAModel(EMAModel):
    """[`EMAModel`] to the bit, with one pass over the weights on a CPU in place of two and a temporary copy."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Moves the average towards the parameters."""
        decay = self.get_decay(self.optimization_step + 1)
        # From a weight of 0.5 on, lerp starts from the other end, which rounds differently.
        if 1 - decay >= 0.5 or self.shadow_params[0].device.type != "cpu":
            super().step(parameters)
            return
        self.optimization_step += 1
        self.cur_decay_value = decay
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - decay)
