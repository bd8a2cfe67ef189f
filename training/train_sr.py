"""Train a super-resolution stage of a cascade: `accelerate launch training/train_sr.py --help`."""

from transformers import HfArgumentParser

from cdm_diffusers.training.config import TrainingConfig
from cdm_diffusers.training.loop import train


if __name__ == "__main__":
    (config,) = HfArgumentParser(TrainingConfig, description=__doc__).parse_args_into_dataclasses()
    train(config, super_resolution=True)
