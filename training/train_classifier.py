"""Train an image classifier on the data of a cascade: `accelerate launch training/train_classifier.py --help`."""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("train classifier")
