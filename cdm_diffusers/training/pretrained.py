"""A stage whose weights a training begins with."""

from dataclasses import dataclass
from typing import Any

import torch

from ..models import CascadedUNet2DModel
from ..models.arguments import UNetArguments
from ..pipelines.fingerprints import fingerprint
from ..pipelines.loading import load_pipeline
from ..pipelines.stages import CascadeStage


CLASSES = "class_embedding.weight"  # of the data's classes, which may be others


@dataclass(frozen=True)
class Pretrained:
    """
    Args:
        pipeline: folder or Hub id.
        stage: one of its stages.
    """

    pipeline: str
    stage: CascadeStage

    def described(self) -> dict[str, Any]:
        """What `training_config.json` says of it."""
        return {"pipeline": self.pipeline, "stage": self.stage.name, "fingerprint": fingerprint([self.stage])}

    def give_weights(self, unet: CascadedUNet2DModel) -> None:
        """
        Puts the stage's weights into `unet`. Embeddings of classes stay as they are where their number is another one.

        Raises:
            ValueError: the networks differ in more.
        """
        given, own = self.stage.unet.state_dict(), unet.state_dict()
        misfits = [name for name in given | own if shape_of(given, name) != shape_of(own, name)]
        if others := [name for name in misfits if name != CLASSES]:
            shapes = " and here ".join(str(shape_of(weights, others[0]) or "absent") for weights in (given, own))
            raise ValueError(
                f"`pretrained_model_name_or_path` is {self.pipeline!r}, whose stage {self.stage.name} is another "
                f"network: {len(others)} of its tensors differ, of which {others[0]} is there {shapes}. Give "
                "the preset and the options that it was trained with."
            )
        unet.load_state_dict({name: own[name] if name in misfits else given[name] for name in own})


def shape_of(weights: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    """None where there are none of that name."""
    return tuple(weights[name].shape) if name in weights else None


def load_pretrained(pipeline: str, arguments: UNetArguments) -> Pretrained:
    """
    The stage of a cascade, or the only one, that has the sizes of a network's `arguments`.

    Raises:
        ValueError: there is none.
        OSError: there is no such pipeline.
    """
    sizes = arguments.low_res_size, arguments.sample_size
    stages = load_pipeline(pipeline).stages
    for stage in stages:
        if sizes_of(stage) == sizes:
            return Pretrained(pipeline, stage)
    raise ValueError(
        f"`pretrained_model_name_or_path` is {pipeline!r}, which has no stage {as_text(*sizes)}; it has "
        f"{', '.join(as_text(*sizes_of(stage)) for stage in stages)}."
    )


def sizes_of(stage: CascadeStage) -> tuple[int | None, int]:
    """Of its input, None for a base, and of its output."""
    return stage.unet.config.low_res_size, stage.unet.config.sample_size


def as_text(low_res_size: int | None, sample_size: int) -> str:
    """Sizes as people read them."""
    size = f"{sample_size}x{sample_size}"
    return f"of {size}" if low_res_size is None else f"from {low_res_size}x{low_res_size} to {size}"
