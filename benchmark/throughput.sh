#!/usr/bin/env bash
# Measures our scripts and, side by side, CleanRL's PPO, Stable-Baselines3 and TorchRL, and Sample Factory, which have
# virtual environments of their own.
# Leave the machine alone meanwhile.
#   bash benchmark/throughput.sh [--smoke] [flags of throughput.py, for instance --rounds 5]
# --smoke, first: short runs of our continuous control, without peers, into a folder of their own.
set -euo pipefail
cd "$(dirname "$0")"
scripts="vaco_async_mujoco vaco_async_atari" seconds=20 smoke=
case " $* " in *" --help "* | *" -h "*) exec python throughput.py --help ;; esac # which would install, else
if [ "${1:-}" = --smoke ]; then
    shift
    smoke=1 scripts="vaco_async_mujoco" seconds=2
    set -- --only mujoco --rounds 1 --scale 0.05 --out "$(mktemp -d)/throughput.md" "$@"
fi
python -c "import throughput, tyro; tyro.cli(throughput.Args, prog='throughput.sh')" "$@" # a wrong flag ends it before anything is installed
peers=${PEERS:-$HOME/.cache/vaco-peers}
torch=$(grep '^torch==' ../requirements.txt)
# Torch first, by itself: else the peers would choose another build of it. An environment is made anew for other versions
install() {
    local environment=$peers/$1
    shift
    [ "$(cat "$environment/ready" 2>/dev/null)" != "$torch $*" ] || return 0
    python3 -m venv --clear "$environment"
    "$environment/bin/pip" install "$torch"
    "$environment/bin/pip" install "$@"
    echo "$torch $*" > "$environment/ready"
}
if [ ! $smoke ]; then
    install sb3 stable-baselines3==2.9.2 tensorboard==2.21.0 "gymnasium[mujoco]==1.4.0" mujoco==4.0.0 ale-py==0.12.1 \
        opencv-python-headless==5.0.0.93 envpool==1.2.5 torchrl==0.14.1 tensordict==0.14.3
    # Not its extras: they pin what no longer installs
    install sf sample-factory==2.1.1 gymnasium==0.29.1 numpy==1.26.4 ale-py==0.10.2 mujoco==2.3.7 imageio==2.38.1
    set -- --peers "$peers" "$@"
fi
python throughput.py "$@"
echo "The limits: each side alone"
for script in $scripts; do
    for part in learner actors envpool; do
        echo "$script: $(python alone.py $part $script --seconds $seconds | tail -n 1)"
    done
done
