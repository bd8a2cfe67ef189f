"""Which steps, s, solver and guidance are best for a trained stage? `python evaluation/search.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.studies.search import SearchConfig, search


if __name__ == "__main__":
    (config,) = HfArgumentParser(SearchConfig, description=__doc__).parse_args_into_dataclasses()
    search(config)
