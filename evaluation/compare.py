"""Is one row of an experiment better than another, or about equal? `python evaluation/compare.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("compare")
