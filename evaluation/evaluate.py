"""How near are samples to real images? Frechet distance and more. `python evaluation/evaluate.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.evaluation.evaluate import EvaluateConfig, evaluate


if __name__ == "__main__":
    (config,) = HfArgumentParser(EvaluateConfig, description=__doc__).parse_args_into_dataclasses()
    evaluate(config)
