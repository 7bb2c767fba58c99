#!/usr/bin/env bash
# Language models: is it the filter, or fewer steps? With two gradient steps per batch the first has D = 0, so at most every
# second step is filtered, and a filter may be no more than one step less.
#   bash benchmark/llm_control.sh [--seeds 3] [--steps 200] [--workers 2] [--out FOLDER] [--smoke]      (steps: batches)
#
# Written down before the first run. Each method at three learning rates (one step, which moves half as far, at a higher
# one, too), completions of exactly 4 or 16 versions ago. A method's score at a lag is its held-out accuracy after 200
# batches, mean over seeds, at its best rate. The filter adds something over another method if its score is higher by more
# than twice the standard error of the difference; it adds nothing if the other's is as high or higher; else it is open.
seeds=3 steps=200
source "$(dirname "$0")/options.sh"
lags="4 16" rates="1e-4 5e-5 2.5e-5" flags="--eval-interval 25 --no-anneal-lr"
methods=("GRPO, filter" "GRPO, no filter" "GRPO, no filter, one step" "GRPO, clipped" "GRPO, clipped --clip-coef 0.4")
methods+=("GRPO, decoupled" "GRPO, filter, four steps")
if [ $smoke ]; then
    lags="4" rates="1e-4" steps=8 flags="--eval-interval 4 --eval-size 50 --warm-start-batches 10"
fi
for rate in $rates; do
    out="$results/${study}_$rate.jsonl"
    run --out "$out" --env-ids chain_sum --methods "${methods[@]}" --lag-schedule fixed --lags $lags --seeds $(seq 1 "$seeds") \
        --flags="$flags --learning-rate $rate"
    plot_llm "$out"
done
[ $smoke ] || run --out "$results/${study}_2e-4.jsonl" --env-ids chain_sum --methods "GRPO, no filter, one step" \
    --lag-schedule fixed --lags $lags --seeds $(seq 1 "$seeds") --flags="$flags --learning-rate 2e-4"
[ $smoke ] || plot_llm "$results/${study}_2e-4.jsonl"
