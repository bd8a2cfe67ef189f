"""Samples of a cascade, as many as you like: `accelerate launch evaluation/sample.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("sample-set")
