"""Bits per dimension of a cascade and of its stages: `python evaluation/likelihood.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.evaluation.likelihood import LikelihoodConfig, measure_likelihood


if __name__ == "__main__":
    (config,) = HfArgumentParser(LikelihoodConfig, description=__doc__).parse_args_into_dataclasses()
    measure_likelihood(config)
