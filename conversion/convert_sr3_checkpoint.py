"""An SR3 checkpoint (`_gen.pth`) as a stage: `python conversion/convert_sr3_checkpoint.py --help`"""

from cdm_diffusers.commands.main import script


if __name__ == "__main__":
    script("convert sr3")
