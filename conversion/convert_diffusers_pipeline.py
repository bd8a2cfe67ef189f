"""A pipeline of Diffusers around a UNet2DModel (the DDPM family) as a base stage of a cascade.

python conversion/convert_diffusers_pipeline.py google/ddpm-cifar10-32 --output cifar10-32
"""

import argparse

from cdm_diffusers.conversion.stages import convert_diffusers_pipeline


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Folder or Hub id of the pipeline.")
    parser.add_argument("--output", required=True, help="Folder for the stage.")
    options = parser.parse_args()
    print("\n".join(convert_diffusers_pipeline(options.source, options.output)))
