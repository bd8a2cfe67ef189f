"""The base of a stage or cascade as a plain DDPMPipeline around Diffusers' UNet2DModel, where that can express it.

python conversion/export_to_diffusers.py imagenet-64 --output imagenet-64-diffusers
"""

import argparse

from cdm_diffusers.conversion.stages import export_to_diffusers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="Folder or Hub id of the stage or cascade.")
    parser.add_argument("--output", required=True, help="Folder for the pipeline.")
    options = parser.parse_args()
    export_to_diffusers(options.stage, options.output)
