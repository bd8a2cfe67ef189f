"""Samples of a cascade, as many as you like: `accelerate launch evaluation/sample.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.evaluation.sample import SampleConfig, sample


if __name__ == "__main__":
    (config,) = HfArgumentParser(SampleConfig, description=__doc__).parse_args_into_dataclasses()
    sample(config)
