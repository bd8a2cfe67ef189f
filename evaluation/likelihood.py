"""Bits per dimension of a cascade and of its stages: `python evaluation/likelihood.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("likelihood")
