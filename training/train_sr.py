"""Train a super-resolution stage of a cascade: `accelerate launch training/train_sr.py --help`."""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("train sr")
