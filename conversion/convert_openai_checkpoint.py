"""A checkpoint of improved-diffusion or guided-diffusion as a stage of a cascade: see docs/openai.md.

python conversion/convert_openai_checkpoint.py 64x64_diffusion.pt --output imagenet-64

The 19 published files need no further option. Other networks of these two repositories need what their weights' shapes
do not tell; the names are those of the repositories' own flags, as far as there are such.
"""

import argparse

from cdm_diffusers.conversion.openai_structure import OpenAISettings
from cdm_diffusers.conversion.stages import convert_openai_checkpoint


def parse_args() -> argparse.Namespace:
    def flag(text: str) -> bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text.lower() in ("true", "1", "yes")

    switch = {"type": flag, "nargs": "?", "const": True}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="The file (.pt, or safetensors with the same names).")
    parser.add_argument("--output", required=True, help="Folder for the stage.")
    parser.add_argument("--image_size", type=int, help="Height and width of the images (upsampler: `large_size`).")
    parser.add_argument("--low_res", type=int, help="Height and width of an upsampler's input (`small_size`).")
    parser.add_argument("--num_heads", type=int, help="Attention heads by number.")
    parser.add_argument("--num_head_channels", type=int, help="Attention heads by width.")
    parser.add_argument("--new_attention_order", help="As `use_new_attention_order`: true or false.", **switch)
    parser.add_argument("--rescale_timesteps", help="Times rescaled to 0..1000: true or false.", **switch)
    parser.add_argument("--noise_schedule", choices=("cosine", "linear"), help="Noise schedule of the training.")
    parser.add_argument("--diffusion_steps", type=int, help="Steps of the training, T.")
    parser.add_argument("--dropout", type=float, help="Dropout, which only matters to further training.")
    return parser.parse_args()


if __name__ == "__main__":
    options = vars(parse_args())
    checkpoint, output = options.pop("checkpoint"), options.pop("output")
    print("\n".join(convert_openai_checkpoint(checkpoint, output, OpenAISettings(**options))))
