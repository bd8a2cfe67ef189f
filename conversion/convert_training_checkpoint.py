"""A checkpoint of training/train_base.py or train_sr.py as a stage, with its averaged or its last weights.

python conversion/convert_training_checkpoint.py runs/base/checkpoint-1000 --output base-1000
"""

import argparse

from cdm_diffusers.conversion.training_checkpoints import convert_training_checkpoint


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="The checkpoint's folder.")
    parser.add_argument("--output", required=True, help="Folder for the stage.")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="Averaged or last. Default: ema.")
    options = parser.parse_args()
    convert_training_checkpoint(options.checkpoint, options.output, options.weights)
