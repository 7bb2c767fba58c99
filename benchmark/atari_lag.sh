#!/usr/bin/env bash
# Atari under lag. 10M steps of one run are hours on a few cores.
#   bash benchmark/atari_lag.sh [--seeds 3] [--steps 10000000] [--workers 2] [--out FOLDER] [--smoke]
seeds=3 steps=10000000
source "$(dirname "$0")/options.sh"
envs="Pong-v5 Breakout-v5" lags="0 8" methods=("VACO" "PPO-clip" "IMPALA" "IMPALA, 1 epoch")
[ $smoke ] && envs="Breakout-v5" lags="0" methods=("VACO") steps=2048
common=(--out "$results/$study.jsonl" --env-ids $envs)
common+=(--flags="--bf16 --num-actors 4 --num-envs 2 --num-steps 128 --rollouts-per-batch 4")
untrained=100000 # steps
[ $smoke ] && untrained=$steps
run "${common[@]}" --methods "untrained" --seeds 1 --steps $untrained
run "${common[@]}" --methods "${methods[@]}" --lags $lags --seeds $(seq 1 "$seeds")
plot "$results/$study.jsonl"
