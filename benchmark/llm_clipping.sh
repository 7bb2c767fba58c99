#!/usr/bin/env bash
# Clipped ratios at lag 4, tuned as much as the filter was by llm_threshold.sh, and what a smaller learning rate does.
#   bash benchmark/llm_clipping.sh [--seeds 2] [--steps 200] [--workers 2] [--out FOLDER] [--smoke]      (steps: batches)
seeds=2 steps=200
source "$(dirname "$0")/options.sh"
flags="--eval-interval 25 --no-anneal-lr --learning-rate 1e-4"
[ $smoke ] && steps=8 flags="--eval-interval 4 --eval-size 50 --warm-start-batches 10"
methods=("GRPO, filter --tv-threshold 0.005 --tv-anchor learner")
for clip in 0.02 0.05 0.1 0.2 0.4; do methods+=("GRPO, clipped --clip-coef $clip"); done
methods+=("GRPO, clipped --clip-coef 0.2 --learning-rate 5e-5" "GRPO, no filter" "GRPO, no filter --learning-rate 5e-5")
run --out "$results/$study.jsonl" --reuse "$results/llm_threshold.jsonl" --env-ids chain_sum --methods "${methods[@]}" \
    --lag-schedule fixed --lags 4 --seeds $(seq 1 "$seeds") --flags="$flags"
plot_llm "$results/$study.jsonl"
