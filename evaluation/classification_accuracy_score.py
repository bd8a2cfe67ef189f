"""Classification Accuracy Score: `accelerate launch evaluation/classification_accuracy_score.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("cas")
