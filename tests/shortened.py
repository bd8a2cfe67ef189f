"""The command `cdm` for blocks of the documents: the words that are given, then those that make it short."""

import sys

from cdm_diffusers.commands.main import main


TRAINING = (
    "--max_train_steps 2 --train_batch_size 4 --lr_warmup_steps 1 --validation_inference_steps 2 --report_to none"
)
SHORTER = {
    "train": TRAINING,
    "sample": "--num_inference_steps 2 --num_images_per_label 1",
    "search": "--num_images 20 --seeds 0 --batch_size 20 --num_inference_steps 2 --augmentation_levels 0 500",
}
# What does not get short enough, and who runs it.
LEFT_OUT = {"reproduce": "trains and measures for minutes: tests/test_reproduce.py"}


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    if name in LEFT_OUT:
        print(f"cdm {name} is left out: it {LEFT_OUT[name]}")
    else:
        main([name, *words, *SHORTER.get(name, "").split()])
