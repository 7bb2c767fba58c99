#!/usr/bin/env bash
# Anchors: VACO and PPO without lag, 1M steps, to hold against published results of PPO.
#   bash benchmark/mujoco_1m.sh [--seeds 3] [--steps 1000000] [--workers 2] [--out FOLDER] [--smoke]
seeds=3 steps=1000000
source "$(dirname "$0")/options.sh"
envs="HalfCheetah-v4 Hopper-v4 Walker2d-v4 Humanoid-v4"
[ $smoke ] && envs="Hopper-v4"
# One actor with 16 environments, as many steps as CleanRL's batch
common=(--out "$results/$study.jsonl" --env-ids $envs --lag-schedule fixed)
common+=(--flags="--num-actors 1 --num-envs 16 --num-steps 128")
run "${common[@]}" --methods "untrained" --seeds 1
run "${common[@]}" --methods "VACO" "PPO-clip" --seeds $(seq 1 "$seeds")
plot "$results/$study.jsonl"
