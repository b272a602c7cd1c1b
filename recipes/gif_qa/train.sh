#!/usr/bin/env bash
# GIF question answering at the full size of its authors: 120,000 GIFs with questions, one epoch in 30 GPU hours.
#
#   bash recipes/gif_qa/train.sh TABLE LINKS OUTPUT [further options of bt-adapter finetune]
#
# TABLE is a csv of TGIF-QA (Train_frameqa_question.csv), LINKS the addresses of the GIFs (tgif-v1.0.tsv), or a folder.
# At most 10,000 rows' GIFs and those of the next are on the disk at a time (MAX_DISK, 40 GB). After an interruption the
# same command goes on. The language model is ungated; that of the authors is
#
#   LANGUAGE_MODEL=meta-llama/Llama-3.2-3B-Instruct bash recipes/gif_qa/train.sh ...
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
table=$1 links=$2 output=$3
shift 3
case " $* " in
*" --cache-states "*) augment=() ;; # what is made of a GIF once is the same in every epoch
*) augment=(--augment) ;;
esac

bt-adapter check-data "$table" --media-root "$links" --sample 500 --max-broken 0.5 --list "$output.gone.jsonl" || true
python examples/gif_qa_train.py --output-dir "$output" \
    --tower "${TOWER:-microsoft/xclip-base-patch16-16-frames}" \
    --language-model "${LANGUAGE_MODEL:-HuggingFaceTB/SmolLM2-1.7B-Instruct}" --connector "${CONNECTOR:-mlp}" \
    --train "$table" --media-root "$links" --chunk-rows 10000 --max-disk "${MAX_DISK:-40GB}" --max-broken 0.4 \
    --lora --lora-r 16 --load-in-4bit "${augment[@]}" \
    --batch-size 8 --gradient-accumulation-steps 4 --epochs 1 --learning-rate 2e-4 --workers 8 --save-steps 100 \
    --activation-checkpointing --set lr_scheduler_type=cosine --set warmup_steps=0.03 \
    "$@"
