"""Which steps, s, solver and guidance are best for a trained stage? `python evaluation/search.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("search")
