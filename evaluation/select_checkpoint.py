"""Which checkpoint of a run is best, and how good it is: `python evaluation/select_checkpoint.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.evaluation.select_checkpoint import SelectionConfig, select_checkpoint


if __name__ == "__main__":
    (config,) = HfArgumentParser(SelectionConfig, description=__doc__).parse_args_into_dataclasses()
    select_checkpoint(config)
