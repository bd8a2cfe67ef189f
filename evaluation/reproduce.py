"""The paper's tables and figures on your data: `python evaluation/reproduce.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("reproduce")
