#!/usr/bin/env bash
# Atari under lag: Pong without lag, and with data of the last 9 policies; a wider budget without lag.
#   bash benchmark/atari_lag.sh [--seeds 3] [--steps 1000000] [--workers 2] [--out FOLDER] [--smoke]
# For 10M steps, with an accelerator: --steps 10000000 --out FOLDER
#
# Written down before the first run. Does VACO's default budget for Atari, 0.05, learn Pong in 1M steps as PPO-clip does,
# without lag and at a lag of 8? It stays the default if its mean return without lag is within one standard deviation of
# PPO-clip's, and above that of a budget of 0.1.
seeds=3 steps=1000000
source "$(dirname "$0")/options.sh"
env=Pong-v5 lags="0 8"
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647 # docs/atari.md
[ $smoke ] && lags="0" steps=2048
untrained=$((steps / 10))
common=(--out "$results/$study.jsonl" --env-ids $env)
common+=(--flags="--bf16 --num-actors 4 --num-envs 2 --num-steps 128 --rollouts-per-batch 4")
run "${common[@]}" --methods "untrained" --seeds 1 --steps $untrained
run "${common[@]}" --methods "VACO" "PPO-clip" --lags $lags --seeds $(seq 1 "$seeds")
run "${common[@]}" --methods "VACO --tv-threshold 0.1" --seeds 1
plot "$results/$study.jsonl"
