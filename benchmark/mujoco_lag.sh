#!/usr/bin/env bash
# Part B of PROTOCOL.md: VACO and its rivals, each at the width that part A chose, with data of the last 1, 5 or 17 policies.
#   bash benchmark/mujoco_lag.sh [--seeds 5] [--steps 300000] [--workers 2] [--out FOLDER] [--smoke]
seeds=5 steps=300000
source "$(dirname "$0")/options.sh"
envs="HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4" lags="4 16"
methods=("VACO" "PPO-clip --clip-coef 0.6" "PPO-KL --kl-target 0.12" "PPO-clip")
lagged=("VACO --tv-anchor learner" "decoupled PPO" "GePPO") # without lag the first is VACO, the others are PPO-clip
[ $smoke ] && envs="Hopper-v4" lags="4" methods=("VACO") lagged=()
actors="--num-actors 8 --num-envs 2 --num-steps 128 --rollouts-per-batch 8"
common=(--out "$results/$study.jsonl" --env-ids $envs)
run "${common[@]}" --methods "untrained" --seeds 1 --steps $((steps / 3)) --flags="$actors"
for seed in $(seq 4 $((seeds + 3))); do # each complete before the next begins
    run "${common[@]}" --methods "${methods[@]}" --lags 0 --seeds "$seed" --flags="$actors --compile"
    run "${common[@]}" --methods "${methods[@]}" "${lagged[@]}" --lags $lags --seeds "$seed" --flags="$actors --compile"
done
plot "$results/$study.jsonl"
