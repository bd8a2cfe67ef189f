"""Classification Accuracy Score: `accelerate launch evaluation/classification_accuracy_score.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.evaluation.classification_accuracy_score import (
    ClassificationAccuracyConfig,
    classification_accuracy_score,
)


if __name__ == "__main__":
    (config,) = HfArgumentParser(ClassificationAccuracyConfig, description=__doc__).parse_args_into_dataclasses()
    classification_accuracy_score(config)
