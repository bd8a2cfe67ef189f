"""What the evaluation scripts share."""

from .checkpoint_selection import SelectionConfig, select_checkpoint
from .image_sets import ImageSet, load_image_set
from .likelihood import LikelihoodConfig, measure_likelihood
from .quality import EvaluateConfig, evaluate
from .recognition import RecognitionConfig, measure_recognition
from .sampling import SampleConfig, sample
from .search import SearchConfig, search


__all__ = [
    "EvaluateConfig",
    "ImageSet",
    "LikelihoodConfig",
    "RecognitionConfig",
    "SampleConfig",
    "SearchConfig",
    "SelectionConfig",
    "evaluate",
    "load_image_set",
    "measure_likelihood",
    "measure_recognition",
    "sample",
    "search",
    "select_checkpoint",
]
