# Sourced by the studies, which set defaults before: reads --seeds, --steps, --workers (processes at once), --out, a folder
# for results other than the recorded ones, and --smoke, a run of the whole path in two minutes, with results that mean
# nothing, in a folder of its own.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
workers=2 smoke= default=$steps
results=$here/results
while [ $# -gt 0 ]; do
    case $1 in
    --seeds | --steps | --workers)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "error: $1 ${2:-}: must be a number from 1 on" >&2; exit 2; }
        declare "${1#--}=$2"
        shift 2
        ;;
    --out)
        [ "${2:-}" ] || { echo "error: --out: must be a folder" >&2; exit 2; }
        results=$2
        shift 2
        ;;
    --smoke)
        smoke=1
        shift
        ;;
    *)
        echo "error: $1: the options are --seeds N, --steps N, --workers N, --out FOLDER, --smoke" >&2
        exit 2
        ;;
    esac
done
[ ! $smoke ] || { seeds=1 steps=4096 results=$(mktemp -d); }
# Runs of other lengths are no one study with those that are there
if [ ! $smoke ] && [ "$steps" != "$default" ] && [ "$results" = "$here/results" ]; then
    echo "error: --steps $steps: the recorded runs have $default, type --out FOLDER for others" >&2
    exit 2
fi
study=$(basename "$0" .sh)
failed=0
# A run that fails must not keep the others from being run and shown
run() { python "$here/run.py" --steps "$steps" --workers "$workers" "$@" || { failed=$?; [ $failed -le 1 ] || exit $failed; }; }
plot() { python "$here/plot.py" "$@" || failed=$?; }
trap '[ $failed = 0 ] || exit $failed' EXIT
