#!/usr/bin/env bash
# Language models under lag: the filter, clipped ratios, and neither, with completions of exactly 0, 4 or 16 versions ago,
# at two learning rates: what one method gains over another at a given rate, a smaller one may give to both.
#   bash benchmark/llm_lag.sh [--seeds 3] [--steps 200] [--workers 2] [--out FOLDER] [--smoke]      (steps: batches)
seeds=3 steps=200
source "$(dirname "$0")/options.sh"
lags="0 4 16" flags="--eval-interval 25 --no-anneal-lr --learning-rate 1e-4"
[ $smoke ] && lags="0 4" steps=8 flags="--eval-interval 4 --eval-size 50 --warm-start-batches 10"
methods=("GRPO, filter --tv-threshold 0.005 --tv-anchor learner" "GRPO, clipped --clip-coef 0.2" "GRPO, no filter")
compare() {
    run --out "$results/$1.jsonl" --reuse "$results/llm_threshold.jsonl" "$results/llm_clipping.jsonl" --env-ids chain_sum \
        --methods "${@:2}" --lag-schedule fixed --lags $lags --seeds $(seq 1 "$seeds") --flags="$flags"
    plot_llm "$results/$1.jsonl"
}
compare "$study" "${methods[@]}"
compare "${study}_half" "${methods[@]/%/ --learning-rate 5e-5}"
