"""What the training scripts share: data, configuration, the stage being trained and the loop."""

from .config import TrainingConfig
from .loop import train


__all__ = ["TrainingConfig", "train"]
