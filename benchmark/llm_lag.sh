#!/usr/bin/env bash
# Language models under lag: the filter, clipped ratios, and neither (a budget of 1), with completions of exactly 0, 4 or
# 16 versions ago. The budget (0.05) is a choice after llm_threshold.sh, at lag 4; the clipping range (0.2) is not tuned.
#   bash benchmark/llm_lag.sh [--seeds 3] [--steps 200] [--workers 2] [--out FOLDER] [--smoke]      (steps: batches)
seeds=3 steps=200
source "$(dirname "$0")/options.sh"
lags="0 4 16" flags="--eval-interval 25 --no-anneal-lr --learning-rate 1e-4"
[ $smoke ] && lags="0 4" steps=8 flags="--eval-interval 4 --eval-size 50 --warm-start-batches 10"
python "$here/llm.py" --out "$results/$study.jsonl" --methods "vaco --tv-threshold 0.05" grpo "vaco --tv-threshold 1" --lags $lags --seeds $(seq 1 "$seeds") \
    --steps "$steps" --workers "$workers" --flags="$flags"
