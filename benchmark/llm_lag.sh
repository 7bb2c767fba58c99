#!/usr/bin/env bash
# Language models under lag, completions of exactly 0, 4 or 16 versions ago: what does the filter add?
#   bash benchmark/llm_lag.sh [--seeds 3] [--steps 200] [--workers 2] [--out FOLDER] [--smoke]      (steps: batches)
#
# Written down before the first run. Is it the filter, or fewer steps? With two gradient steps per batch the first has D = 0,
# so at most every second step is filtered, and a filter may be no more than one step less. And what one method gains over
# another at a given learning rate, a smaller one may give to both. So each method has three rates; the control with one step,
# which moves half as far, has 2e-4 as well. A method's score at a lag is its held-out accuracy after 200 batches, mean over
# seeds, at its best rate; a run that diverged has 0. The filter is ahead of another method if its score is higher by more than
# twice the standard error of the difference (which does not know that rates were chosen); it is not ahead if the other's is as
# high or higher; else it is open.
seeds=3 steps=200
source "$(dirname "$0")/options.sh"
rates="1e-4 5e-5 2.5e-5" flags="--eval-interval 25 --no-anneal-lr"
methods=("GRPO, filter" "GRPO, clipped" "GRPO, no filter")
controls=("GRPO, no filter, one step" "GRPO, clipped --clip-coef 0.4" "GRPO, decoupled" "GRPO, filter, four steps")
[ $smoke ] && rates="1e-4" steps=8 flags="--eval-interval 4 --eval-size 50 --warm-start-batches 10"
common=(--out "$results/$study.jsonl" --env-ids chain_sum --lag-schedule fixed --flags="$flags")
for seed in $(seq 1 "$seeds"); do # each complete before the next begins
    for rate in $rates; do
        run "${common[@]}" --methods "${methods[@]/%/ --learning-rate $rate}" --lags 0 4 16 --seeds "$seed"
        run "${common[@]}" --methods "${controls[@]/%/ --learning-rate $rate}" --lags 4 16 --seeds "$seed"
    done
    [ $smoke ] || run "${common[@]}" --methods "GRPO, no filter, one step --learning-rate 2e-4" --lags 4 16 --seeds "$seed"
done
plot_llm "$results/$study.jsonl"
