"""A stage whose weights a training begins with."""

from dataclasses import dataclass, fields
from typing import Any

from ..models import CascadedUNet2DModel
from ..models.arguments import UNetArguments
from ..pipelines.fingerprints import fingerprint
from ..pipelines.loading import load_pipeline
from ..pipelines.stages import CascadeStage
from .resolve import section


CLASSES = "class_embedding.weight"
# What must be the same in both networks.
ARGUMENTS = [
    argument.name
    for argument in fields(UNetArguments)
    if argument.name not in ("num_classes", "null_class", "dropout")
]
# What a network may have besides.
MAY_BE_ADDED = ("low_res_skip", "low_res_skip_threshold")


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
        """Puts the stage's weights into `unet`. Embeddings of other classes in number stay as they are."""
        given, own = self.stage.unet.state_dict(), unet.state_dict()
        if any(self.stage.unet.config[name] != unet.config[name] for name in ("num_classes", "null_class")):
            given[CLASSES] = own.get(CLASSES)
        unet.load_state_dict({name: given[name] for name in own})


def load_pretrained(pipeline: str, arguments: UNetArguments) -> Pretrained:
    """
    The stage of a cascade, or the only one, that has the sizes of a network's `arguments`.

    Raises:
        ValueError: there is none, or it is another network.
        OSError: there is no such pipeline.
    """
    sizes = arguments.low_res_size, arguments.sample_size
    stages = load_pipeline(pipeline).stages
    found = [stage for stage in stages if sizes_of(stage) == sizes]
    if not found:
        raise ValueError(
            f"`pretrained_model_name_or_path` is {pipeline!r}, which has no stage {as_text(*sizes)}; it has "
            f"{', '.join(as_text(*sizes_of(stage)) for stage in stages)}."
        )
    of_stage = section(UNetArguments, found[0].unet.config)
    for name in ARGUMENTS:
        there, here = getattr(of_stage, name), getattr(arguments, name)
        if there != here and (there or name not in MAY_BE_ADDED):
            raise ValueError(
                f"`pretrained_model_name_or_path` is {pipeline!r}, whose stage {found[0].name} is another network: "
                f"its `{name}` is {there}, here it is {here}. Give the preset and the options that it was "
                "trained with."
            )
    return Pretrained(pipeline, found[0])


def sizes_of(stage: CascadeStage) -> tuple[int | None, int]:
    """Of its input, None for a base, and of its output."""
    return stage.unet.config.low_res_size, stage.unet.config.sample_size


def as_text(low_res_size: int | None, sample_size: int) -> str:
    """Sizes as people read them."""
    size = f"{sample_size}x{sample_size}"
    return f"of {size}" if low_res_size is None else f"from {low_res_size}x{low_res_size} to {size}"
