#!/usr/bin/env bash
# Anchors: VACO and PPO without lag, 1M steps, to hold against published results of PPO; with two seeds more on HalfCheetah,
# where runs differ most, a tighter budget on Hopper, and the policy before training, for the scale.
#   bash benchmark/mujoco_1m.sh [--seeds 3] [--steps 1000000] [--workers 2] [--out FOLDER] [--smoke]
seeds=3 steps=1000000
source "$(dirname "$0")/options.sh"
envs="HalfCheetah-v4 Hopper-v4 Walker2d-v4 Humanoid-v4"
[ $smoke ] && envs="Hopper-v4"
# One actor with 16 environments, as many steps as CleanRL's batch
common=(--lag-schedule fixed --flags="--num-actors 1 --num-envs 16 --num-steps 128" --out "$results/$study.jsonl")
run "${common[@]}" --env-ids $envs --methods "untrained" --seeds 1
run "${common[@]}" --env-ids $envs --methods "VACO" "PPO-clip" --seeds $(seq 1 "$seeds")
if [ ! $smoke ]; then
    run "${common[@]}" --env-ids HalfCheetah-v4 --methods "VACO" "PPO-clip" --seeds $((seeds + 1)) $((seeds + 2))
    run "${common[@]/$study.jsonl/hopper_1m.jsonl}" --env-ids Hopper-v4 --methods "VACO --tv-threshold 0.1" --seeds $(seq 1 "$seeds")
fi
plot "$results/$study.jsonl" --figures main return curves
