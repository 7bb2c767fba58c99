#!/usr/bin/env bash
# The filter on tokens at lag 4: its budget, and where it is measured from. The learning rate is one at
# which data of that age can still be used.
#   bash benchmark/llm_threshold.sh [--seeds 2] [--steps 200] [--workers 2] [--out FOLDER] [--smoke]      (steps: batches)
seeds=2 steps=200
source "$(dirname "$0")/options.sh"
methods=("GRPO, no filter") flags="--eval-interval 25 --no-anneal-lr --learning-rate 1e-4"
for threshold in 0.0025 0.005 0.01 0.02; do methods+=("GRPO, filter --tv-threshold $threshold --tv-anchor learner"); done
for threshold in 0.02 0.05 0.1; do methods+=("GRPO, filter --tv-threshold $threshold --tv-anchor behavior"); done
[ $smoke ] && steps=8 flags="--eval-interval 4 --eval-size 50 --warm-start-batches 10"
run --out "$results/$study.jsonl" --env-ids chain_sum --methods "${methods[@]}" --lag-schedule fixed --lags 4 \
    --seeds $(seq 1 "$seeds") --flags="$flags"
plot_llm "$results/$study.jsonl"
