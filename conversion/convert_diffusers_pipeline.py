"""A DDPM pipeline of Diffusers as a base stage: `python conversion/convert_diffusers_pipeline.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("convert diffusers")
