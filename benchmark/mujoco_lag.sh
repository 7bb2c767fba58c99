#!/usr/bin/env bash
# The lag study: every method with data of the last 1, 5 or 17 policies (mixture, lag 0, 4, 16), equal data and networks.
#   bash benchmark/mujoco_lag.sh [--seeds 5] [--steps 300000] [--workers 2] [--out FOLDER] [--smoke]
seeds=5 steps=300000
source "$(dirname "$0")/options.sh"
envs="HalfCheetah-v4 Hopper-v4 Walker2d-v4" lags="0 4 16"
main=("VACO" "PPO-clip" "SPO" "decoupled PPO" "IMPALA")
more=("PPO-KL" "IMPALA, 1 epoch" "VACO, no filter" "VACO, no alignment") # with three seeds
[ $smoke ] && envs="Hopper-v4" lags="0 4" main=("VACO") more=()
actors="--num-actors 8 --num-envs 2 --num-steps 128 --rollouts-per-batch 8"
few=$((seeds < 3 ? seeds : 3))
common=(--out "$results/$study.jsonl" --env-ids $envs --flags="$actors")
run "${common[@]}" --methods "untrained" --lags 0 --seeds 1
common+=(--lags $lags)
run "${common[@]}" --methods "${main[@]}" "${more[@]}" --seeds $(seq 1 $few)
[ "$seeds" -le "$few" ] || run "${common[@]}" --methods "${main[@]}" --seeds $(seq $((few + 1)) "$seeds")
plot "$results/$study.jsonl"
