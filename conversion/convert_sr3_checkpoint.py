"""An SR3 checkpoint (Janspiry's implementation, `_gen.pth`) as a stage of a cascade.

python conversion/convert_sr3_checkpoint.py I640000_E37_gen.pth --output faces-16-to-128

Networks of the published configurations need no further option; others need what their weights' shapes do not tell.
"""

import argparse

from cdm_diffusers.conversion.sr3 import SR3Settings
from cdm_diffusers.conversion.stages import convert_sr3_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="The file that ends in _gen.pth.")
    parser.add_argument("--output", required=True, help="Folder for the stage.")
    parser.add_argument("--image_size", type=int, help="Height and width of the images (`r_resolution`).")
    parser.add_argument("--low_res", type=int, help="Height and width of the input (`l_resolution`).")
    parser.add_argument("--norm_groups", type=int, help="Groups of the group norms.")
    parser.add_argument("--diffusion_steps", type=int, help="Steps of the training, T; most files carry them.")
    parser.add_argument("--linear_start", type=float, help="First beta of the training; most files carry it.")
    parser.add_argument("--linear_end", type=float, help="Last beta of the training; most files carry it.")
    parser.add_argument(
        "--low_res_interpolation",
        choices=("pillow_bicubic", "bicubic", "bilinear"),
        help="How low-resolution images are enlarged; default: as SR3's data preparation does.",
    )
    parser.add_argument("--dropout", type=float, help="Dropout, which only matters to further training.")
    return parser.parse_args()


if __name__ == "__main__":
    options = vars(parse_args())
    checkpoint, output = options.pop("checkpoint"), options.pop("output")
    print("\n".join(convert_sr3_checkpoint(checkpoint, output, SR3Settings(**options))))
