"""What the evaluation scripts share."""

from .image_sets import ImageSet, load_image_set
from .quality import EvaluateConfig, evaluate
from .recognition import RecognitionConfig, measure_recognition
from .sampling import SampleConfig, sample
from .search import SearchConfig, search


__all__ = [
    "EvaluateConfig",
    "ImageSet",
    "RecognitionConfig",
    "SampleConfig",
    "SearchConfig",
    "evaluate",
    "load_image_set",
    "measure_recognition",
    "sample",
    "search",
]
