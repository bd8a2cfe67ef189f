"""A checkpoint of a training run as a stage: `python conversion/convert_training_checkpoint.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("convert checkpoint")
