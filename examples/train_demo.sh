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

train() {  # script, preset, steps
  accelerate launch --num_processes 1 "training/$1.py" --preset "$2" "${DATA[@]}" --output_dir "$OUTPUT/$2" \
    --max_train_steps "$3" --lr_warmup_steps 50 --checkpointing_steps 200 --resume_from_checkpoint latest \
    --logging_steps 50 --validation_steps 0
}

train train_base fashion_mnist_8 "${BASE_STEPS:-600}"
train train_sr fashion_mnist_8_to_16 "${SUPER_RES_STEPS:-400}"
train train_sr fashion_mnist_16_to_32 "${SUPER_RES_STEPS:-400}"

python conversion/assemble_cascade.py --base "$OUTPUT/fashion_mnist_8" \
  --super-res "$OUTPUT/fashion_mnist_8_to_16" "$OUTPUT/fashion_mnist_16_to_32" --output "$OUTPUT/cascade"
python examples/sample_grid.py --pipeline "$OUTPUT/cascade" --output "$OUTPUT/samples.png"
