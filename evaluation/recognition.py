"""Are samples recognised, as varied as real images, and no copies? `python evaluation/recognition.py --help`"""

from transformers import HfArgumentParser

from cdm_diffusers.evaluation.recognition import RecognitionConfig, measure_recognition


if __name__ == "__main__":
    (config,) = HfArgumentParser(RecognitionConfig, description=__doc__).parse_args_into_dataclasses()
    measure_recognition(config)
