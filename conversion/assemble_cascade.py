"""Join separately trained stages into one CascadedDiffusionPipeline, checking that they fit.

python conversion/assemble_cascade.py --base runs/base --super-res runs/sr-1 runs/sr-2 --output cascade
"""

import argparse

from cdm_diffusers import CascadedDiffusionPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="Folder or Hub id of the base stage.")
    parser.add_argument(
        "--super-res",
        nargs="*",
        default=[],
        help="Folders or Hub ids of up to three super-resolution stages, in order.",
    )
    parser.add_argument("--output", required=True, help="Folder for the cascade.")
    args = parser.parse_args()
    CascadedDiffusionPipeline.from_stages(args.base, *args.super_res).save_pretrained(args.output)


if __name__ == "__main__":
    main()
