"""The paper's tables and figures on your data: `python evaluation/reproduce.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.studies.experiments import EXPERIMENTS
from cdm_diffusers.studies.reproduce import ReproduceConfig, reproduce


if __name__ == "__main__":
    parser = HfArgumentParser(ReproduceConfig, description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS, help="The table or figure.")
    config, chosen = parser.parse_args_into_dataclasses()
    reproduce(chosen.name, config)
