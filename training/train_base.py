"""Train the base stage of a cascade: `accelerate launch training/train_base.py --help`."""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("train base")
