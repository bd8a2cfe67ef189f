#!/usr/bin/env bash
# A small cascade on Fashion-MNIST from nothing: three stages, trained one after the other, joined and sampled.
# Takes minutes on a CPU; its samples are rough. docs/training.md has the commands of the shipped cascade.
set -euo pipefail

OUTPUT=${OUTPUT:-runs/train-demo}
NAMES="T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
if [ -d "${FASHION_MNIST:-}" ]; then
  DATA=(--train_data_dir "$FASHION_MNIST" --label_names "$NAMES")
else
  DATA=(--dataset_name zalando-datasets/fashion_mnist)
fi

train() {  # kind of stage, preset, steps
  cdm train "$1" --preset "$2" "${DATA[@]}" --output_dir "$OUTPUT/$2" \
    --max_train_steps "$3" --lr_warmup_steps 50 --checkpointing_steps 200 --resume_from_checkpoint latest \
    --logging_steps 50 --validation_steps 0
}

train base fashion_mnist_8 "${BASE_STEPS:-600}"
train sr fashion_mnist_8_to_16 "${SUPER_RES_STEPS:-400}"
train sr fashion_mnist_16_to_32 "${SUPER_RES_STEPS:-400}"

cdm assemble --base "$OUTPUT/fashion_mnist_8" \
  --super_res "$OUTPUT/fashion_mnist_8_to_16" "$OUTPUT/fashion_mnist_16_to_32" --output "$OUTPUT/cascade"
cdm sample "$OUTPUT/cascade" --output "$OUTPUT/samples.png"
