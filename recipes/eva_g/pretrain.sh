#!/usr/bin/env bash
# Pretrain a BT-Adapter branch for EVA-CLIP-g, the image tower of BLIP-2, InstructBLIP and MiniGPT-4, as released.
#
#   bash recipes/eva_g/pretrain.sh TRAIN VALIDATION OUTPUT MODEL [further options of `bt-adapter pretrain`]
#
# TRAIN and VALIDATION are tables of (video, caption), see `bt-adapter pretrain --help`. MODEL is a dual encoder with
# EVA-CLIP-g and its text tower in the format of this package: README.md says how to make one. On 8 GPUs the released
# global batch is 8 x 16:
#
#   LAUNCH="torchrun --nproc-per-node 8" bash recipes/eva_g/pretrain.sh ...
#
# On one GPU: --batch-size 128 --cached-gradient-batch-size 16 contrasts as many clips with each other.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
train=$1 validation=$2 output=$3 model=$4
shift 4

# shellcheck disable=SC2086  # LAUNCH is a command with its options
${LAUNCH:-python} -m bt_adapter_hf.cli.main pretrain \
    --model "$model" --train "$train" --validation "$validation" --output-dir "$output" \
    --num-adapter-layers 4 --num-frames 8 --max-text-length 77 --fusion sum --output-fusion sum \
    --mask-ratio 0.7 --vtc-weight 1 --mbta-weight 0 --mbca-weight 0.1 --temperature 0.01 \
    --crop-scale 0.08 1.0 --batch-size 16 --epochs 1 --learning-rate 2e-6 --lr-multipliers '{"bt_adapter.": 10}' \
    --workers 8 \
    --set lr_scheduler_type=cosine_warmup_with_min_lr --set warmup_steps=0.5 \
    --set 'lr_scheduler_kwargs={"warmup_lr_rate": 0.05, "num_cycles": 0.05555555555555555, "min_lr_rate": 0.0}' \
    "$@"
