"""How near are samples to real images? Frechet distance and more. `python evaluation/evaluate.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("evaluate")
