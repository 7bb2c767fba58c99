#!/usr/bin/env bash
# Why clipped ratios are ahead of the filter on tokens, beside runs of llm_lag.sh. Without lag, where a budget of 0.05 is
# never reached: tighter budgets, one gradient step per batch, in which all ratios are 1, and smaller steps. At lags of 4 and
# 16, where data arrives beyond such budgets: tight ones that forward lag alone spends.
#   bash benchmark/llm_clipping.sh [--seeds 2] [--steps 200] [--workers 2] [--out FOLDER] [--smoke]      (steps: batches)
seeds=2 steps=200
source "$(dirname "$0")/options.sh"
flags="--eval-interval 25 --no-anneal-lr --learning-rate 1e-4"
[ $smoke ] && steps=8 flags="--eval-interval 4 --eval-size 50 --warm-start-batches 10"
common=(--reuse "$results/llm_lag.jsonl" --seeds $(seq 1 "$seeds") --steps "$steps" --workers "$workers" --flags="$flags")
compare() { python "$here/llm.py" --out "$results/${study}_$1.jsonl" "${common[@]}" --lags "${@:2}" || failed=$?; }
compare without 0 --methods "grpo" "vaco --tv-threshold 1" "vaco --tv-threshold 0.005" "vaco --tv-threshold 0.01" \
    "vaco --no-filter --num-minibatches 1" "vaco --no-filter --learning-rate 7e-5"
compare with 4 --methods "grpo" "vaco --tv-threshold 0.05" "vaco --tv-threshold 0.01 --tv-anchor learner" \
    "vaco --tv-threshold 0.005 --tv-anchor learner"
compare far 16 --methods "grpo" "vaco --tv-threshold 0.005 --tv-anchor learner"
