"""A base as a plain pipeline of Diffusers: `python conversion/export_to_diffusers.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("export")
