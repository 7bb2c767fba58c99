# Sourced by the studies, which set defaults before: reads --seeds, --steps, --workers (processes at once) and --smoke, a
# run of the whole path in two minutes, with results that mean nothing, in a folder of its own.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
workers=2 smoke=
results=$here/results
while [ $# -gt 0 ]; do
    case $1 in
    --seeds | --steps | --workers)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "error: $1 ${2:-}: must be a number from 1 on" >&2; exit 2; }
        declare "${1#--}=$2"
        shift 2
        ;;
    --smoke)
        smoke=1 seeds=1 steps=4096 results=$(mktemp -d)
        shift
        ;;
    *)
        echo "error: $1: the options are --seeds N, --steps N, --workers N, --smoke" >&2
        exit 2
        ;;
    esac
done
study=$(basename "$0" .sh)
failed=0
# A run that fails must not keep the others from being run and shown
run() { python "$here/run.py" --steps "$steps" --workers "$workers" "$@" || { failed=$?; [ $failed -le 1 ] || exit $failed; }; }
plot() { python "$here/plot.py" "$@" || failed=$?; }
trap '[ $failed = 0 ] || exit $failed' EXIT
