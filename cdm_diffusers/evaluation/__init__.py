"""What the evaluation scripts share."""

from .recognition import RecognitionConfig, measure_recognition


__all__ = ["RecognitionConfig", "measure_recognition"]
