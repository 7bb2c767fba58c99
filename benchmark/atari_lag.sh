#!/usr/bin/env bash
# Atari under lag. 10M steps of one run are hours on a few cores.
#   bash benchmark/atari_lag.sh [--seeds 3] [--steps 10000000] [--workers 2] [--smoke]
seeds=3 steps=10000000
source "$(dirname "$0")/options.sh"
envs="Pong-v5 Breakout-v5" lags="0 8" methods=("VACO" "PPO-clip" "IMPALA" "untrained")
[ $smoke ] && envs="Breakout-v5" lags="0" methods=("VACO" "untrained") steps=2048
run --out "$results/$study.jsonl" --env-ids $envs --lags $lags --methods "${methods[@]}" --seeds $(seq 1 "$seeds") \
    --flags="--bf16 --num-actors 4 --num-envs 2 --num-steps 128 --rollouts-per-batch 4"
plot "$results/$study.jsonl"
