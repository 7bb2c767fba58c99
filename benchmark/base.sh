#!/usr/bin/env bash
# VACO and PPO-clip without lag, 1M steps, on the base that all methods have.
#   bash benchmark/base.sh [--seeds 5] [--steps 1000000] [--workers 2] [--out FOLDER] [--smoke]
#
# Question: which base is strongest without lag, for PPO-clip and VACO alike? One actor with 16 environments of 128 steps,
# lockstep, lag 0. Written down before the first run ("earlier" was "today's"):
# - Screening, 300k steps, seeds 1 and 2, five tasks. The score of a run is its return over the last 100 episodes, 0 being
#   the policy before training and 1 the mean of PPO-clip on the earlier base. The base with the highest mean score over
#   tasks and both methods is chosen; a simpler one wins if it is within 0.05. From simple to complex: the earlier one, (1)
#   the standard deviation at the start, (2) actions scaled to their bounds, 1 + 2, 1 + 2 + a constant learning rate,
#   1 + 2 + value targets recomputed every epoch, 1 + 2 + a critic-only pass before advantages are computed.
# - Confirmation, 1M steps, seeds 3 to 7: the chosen base and the earlier one. It is kept if its mean score there is higher.
# Tasks with bounds of -1 and 1 (all but Humanoid) are the same with (2) and without it, so they run once.
# This script runs the chosen base at 1M steps. Commit 318b5cd has the screening, with its trial flags: its own base.sh. The
# earlier base is commit 8f8aef6: there, run.py with the flags below and `VACO` (whose budget was 0.2) and `PPO-clip`.
# docs/results.md has what came of it.
seeds=5 steps=1000000
source "$(dirname "$0")/options.sh"
envs="HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4"
[ $smoke ] && envs="Humanoid-v4"
common=(--lag-schedule fixed --out "$results/$study.jsonl" --env-ids $envs)
one="--num-actors 1 --num-envs 16 --num-steps 128 --compile"
run "${common[@]}" --methods "untrained" --seeds 1 --steps $((steps / 10)) --flags="$one"
run "${common[@]}" --methods "VACO" "VACO --tv-threshold 0.2" "PPO-clip" --seeds $(seq 3 $((seeds + 2))) --flags="$one"
plot "$results/$study.jsonl" --figures curves
