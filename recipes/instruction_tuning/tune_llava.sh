#!/usr/bin/env bash
# Tune a LLaVA with a BT-Adapter on VideoChatGPT-100K with the released settings.
#
#   bash recipes/instruction_tuning/tune_llava.sh TRAIN MEDIA_ROOT OUTPUT MODEL [further options of the command]
#
# TRAIN is hf://datasets/MBZUAI/VideoInstruct-100K/VideoInstruct100K.json or a copy, MEDIA_ROOT the folder or archives
# with its videos (ActivityNet's, <video_id>.mp4, .webm, .mkv or .avi), MODEL a LLaVA. A pretrained adapter for its
# image tower goes with it as --bt-adapter. On 8 GPUs the released global batch is 8 x 1:
#
#   LAUNCH="torchrun --nproc-per-node 8" bash recipes/instruction_tuning/tune_llava.sh \
#       VideoInstruct100K.json activitynet.zip tuned llava-hf/llava-1.5-7b-hf --bt-adapter my-adapter-336
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
train=$1 media_root=$2 output=$3 model=$4
shift 4

# The released tuning leaves the gate of the branch as it is.
# shellcheck disable=SC2086  # LAUNCH is a command with its options
${LAUNCH:-python} -m bt_adapter_hf.cli.main finetune \
    --model "$model" --train "$train" --media-root "$media_root" --output-dir "$output" \
    --num-frames 100 --batch-size 1 --epochs 3 --learning-rate 2e-5 --activation-checkpointing --workers 8 \
    --lr-multipliers '{"bt_adapter.fusion_gate": 0}' \
    --set lr_scheduler_type=cosine --set warmup_steps=0.03 --set weight_decay=0 --set max_grad_norm=1 \
    "$@"
