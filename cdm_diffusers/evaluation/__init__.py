"""What the evaluation scripts share."""

from .image_sets import ImageSet, load_image_set
from .recognition import RecognitionConfig, measure_recognition


__all__ = ["ImageSet", "RecognitionConfig", "load_image_set", "measure_recognition"]
