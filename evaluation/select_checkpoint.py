"""Which checkpoint of a run is best, and how good it is: `python evaluation/select_checkpoint.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("select-checkpoint")
