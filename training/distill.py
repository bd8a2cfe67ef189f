"""Distil a stage of a cascade into one of few steps: `accelerate launch training/distill.py --help`."""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("distill")
