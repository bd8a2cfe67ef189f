"""Train an image classifier on the data of a cascade: `accelerate launch training/train_classifier.py --help`."""

from transformers import HfArgumentParser

from cdm_diffusers.evaluation.classifier import ClassifierConfig, train_classifier


if __name__ == "__main__":
    (config,) = HfArgumentParser(ClassifierConfig, description=__doc__).parse_args_into_dataclasses()
    train_classifier(config)
