#!/usr/bin/env bash
# To be run after mujoco_lag.sh, whose runs without lag it takes over: they set the scale of scores.
# What the parts of VACO do: under backward lag (mixture, lag 8), beside others with wider trust regions, too, because only
# VACO's is as wide as 0.2; and under forward lag (more and more updates, lag 0).
#   bash benchmark/ablation.sh [--seeds 3] [--steps 300000] [--workers 2] [--out FOLDER] [--smoke]
seeds=3 steps=300000
source "$(dirname "$0")/options.sh"
envs="HalfCheetah-v4 Hopper-v4"
parts=("VACO, no filter" "VACO, no alignment" "VACO --no-filter --no-align" "VACO --tv-anchor learner")
wider=("PPO-clip" "PPO-clip --clip-coef 0.4" "decoupled PPO" "decoupled PPO --clip-coef 0.4")
wider+=("SPO" "SPO --spo-eps 0.4" "SPO --num-minibatches 4") # SPO's authors have minibatches of 512
scale=("VACO" "PPO-clip" "SPO" "decoupled PPO" "IMPALA") scale_seeds=5
budgets=("VACO" "VACO --tv-threshold 0.05" "VACO --tv-threshold 0.1" "VACO --tv-threshold 0.4")
epochs=("VACO" "PPO-clip") # of 10 epochs
for n in 1 4 20; do epochs+=("VACO --update-epochs $n" "PPO-clip --update-epochs $n"); done
if [ $smoke ]; then
    envs="Hopper-v4" parts=() wider=() scale=("VACO") scale_seeds=1 budgets=("VACO" "VACO --tv-threshold 0.05")
    epochs=("VACO" "VACO --update-epochs 2")
fi
actors="--num-actors 8 --num-envs 2 --num-steps 128 --rollouts-per-batch 8"
common=(--env-ids $envs --flags="$actors") reuse=("$results/mujoco_lag.jsonl") # which has the runs without lag
for part in lag8 epochs; do
    out="$results/${study}_$part.jsonl"
    run --out "$out" "${common[@]}" --methods "untrained" --seeds 1 --reuse "${reuse[@]}"
    run --out "$out" "${common[@]}" --methods "${scale[@]}" --seeds $(seq 1 $scale_seeds) --reuse "${reuse[@]}"
    reuse+=("$out")
done
common+=(--seeds $(seq 1 "$seeds") --reuse "${reuse[@]}")
run --out "$results/${study}_lag8.jsonl" "${common[@]}" --methods "${budgets[@]}" "${parts[@]}" "${wider[@]}" --lags 8
run --out "$results/${study}_epochs.jsonl" "${common[@]}" --methods "${epochs[@]}" --lags 0
lag8=("$results/${study}_lag8.jsonl" --lags 8)
plot "${lag8[@]}" --figures main return tv
[ $smoke ] || plot "${lag8[@]}" --figures curves --methods VACO "${parts[@]}" --out "$results/${study}_parts"
[ $smoke ] || plot "${lag8[@]}" --figures curves --methods VACO "${wider[@]}" --out "$results/${study}_wider"
plot "${lag8[@]}" --figures return curves tv --x tv-threshold=0.2 --methods "${budgets[@]}" --out "$results/${study}_threshold"
plot "$results/${study}_epochs.jsonl" --x update-epochs=10 --methods "${epochs[@]}"
