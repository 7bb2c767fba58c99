#!/usr/bin/env bash
# Part A of PROTOCOL.md: every method at several widths of its trust region, with data of the last 9 policies, and without lag.
#   bash benchmark/width.sh [--seeds 3] [--steps 300000] [--workers 2] [--out FOLDER] [--smoke]
seeds=3 steps=300000
source "$(dirname "$0")/options.sh"
envs="HalfCheetah-v4 Hopper-v4 Walker2d-v4"
widths=("VACO --tv-threshold 0.1" "VACO --tv-threshold 0.2" "PPO-clip" "PPO-clip --clip-coef 0.6" "PPO-KL" "PPO-KL --kl-target 0.12" "SPO")
widths+=("stop by TV --tv-threshold 0.1" "stop by TV --tv-threshold 0.2" "VACO, no filter")
lagged=("VACO --tv-anchor learner --tv-threshold 0.1" "APPO" "APPO --clip-coef 0.4" "GePPO" "GePPO --clip-coef 0.4")
lagged+=("decoupled PPO" "VACO, no alignment --tv-threshold 0.2") # without lag they are others
last=("PPO-clip --clip-coef 0.4" "SPO --spo-eps 1.6")
if [ $smoke ]; then
    envs="Hopper-v4" widths=("VACO" "PPO-clip" "PPO-clip --clip-coef 0.6") lagged=("GePPO") last=("SPO")
fi
actors="--num-actors 8 --num-envs 2 --num-steps 128 --rollouts-per-batch 8"
common=(--out "$results/$study.jsonl" --env-ids $envs)
run "${common[@]}" --methods "untrained" --seeds 1 --steps $((steps / 3)) --flags="$actors"
for seed in $(seq 1 "$seeds"); do # each complete before the next begins
    one=("${common[@]}" --seeds "$seed" --flags="$actors --compile")
    run "${one[@]}" --methods "${widths[@]}" --lags 0 8
    run "${one[@]}" --methods "${lagged[@]}" --lags 8
    run "${common[@]}" --seeds "$seed" --methods "IMPALA, 1 epoch" --lags 0 8 --flags="$actors" # which has no --compile
done
common+=(--seeds $(seq 1 "$seeds") --flags="$actors --compile")
run "${common[@]}" --methods "${last[@]}" --lags 0 8
run "${common[@]}" --methods "decoupled PPO --clip-coef 0.4" --lags 8
plot "$results/$study.jsonl" --figures width return tv
