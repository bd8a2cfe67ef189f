"""Join separately trained stages into one cascade: `python conversion/assemble_cascade.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("assemble")
