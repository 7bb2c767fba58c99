#!/usr/bin/env bash
# Why clipped ratios are ahead of the filter on tokens in llm_lag.sh: tighter budgets without lag, where 0.05 is never
# reached, looser ones at lag 16, where it always is, and a third of the learning rate there.
#   bash benchmark/llm_clipping.sh [--seeds 2] [--steps 200] [--workers 2] [--out FOLDER] [--smoke]      (steps: batches)
seeds=2 steps=200
source "$(dirname "$0")/options.sh"
flags="--eval-interval 25 --no-anneal-lr --learning-rate 1e-4" lag=16
[ $smoke ] && steps=8 lag=4 flags="--eval-interval 4 --eval-size 50 --warm-start-batches 10"
compare() { # name, lag, methods
    python "$here/llm.py" --out "$results/${study}_$1.jsonl" --lags "$2" --seeds $(seq 1 "$seeds") --steps "$steps" \
        --workers "$workers" --flags="$flags" --methods "${@:3}"
}
compare no_lag 0 "vaco --tv-threshold 0.005" "vaco --tv-threshold 0.01" "vaco --tv-threshold 0.015"
slower="--learning-rate 3e-5"
compare lag $lag "vaco --tv-threshold 0.1" "vaco --tv-threshold 0.2" \
    "vaco --tv-threshold 0.05 $slower" "grpo $slower" "vaco --tv-threshold 1 $slower"
