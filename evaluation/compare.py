"""Is one row of an experiment better than another, or about equal? `python evaluation/compare.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.studies.compare import CompareConfig, compare


if __name__ == "__main__":
    (config,) = HfArgumentParser(CompareConfig, description=__doc__).parse_args_into_dataclasses()
    compare(config)
