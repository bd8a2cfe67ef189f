"""Are samples recognised, as varied as real images, and no copies? `python evaluation/recognition.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("recognition")
