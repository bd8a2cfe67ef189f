"""A checkpoint of improved- or guided-diffusion as a stage: `python conversion/convert_openai_checkpoint.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("convert openai")
