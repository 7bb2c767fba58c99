# Sourced by the studies, which set defaults before: reads --seeds, --steps, --workers (processes at once), --out, a folder
# for results other than the recorded ones, and --smoke, a run of the whole path in two minutes, with results that mean
# nothing, in a folder of its own.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
workers=2 smoke= default=$steps
results=$here/results
usage="the options are --seeds N, --steps N, --workers N, --out FOLDER, --smoke"
case " $* " in
*" --help "* | *" -h "*) sed -n '2,/^[^#]/{s/^# *//p}' "$0"; echo "$usage"; exit ;;
*" --smoke "*) smoke=1 seeds=1 steps=4096 results=$(mktemp -d) ;; # but for what is typed
esac
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
    --smoke) shift ;;
    *)
        echo "error: $1: $usage" >&2
        exit 2
        ;;
    esac
done
# Runs of other lengths are no one study with those that are there
if [ "$steps" != "$default" ] && [ "$results" = "$here/results" ]; then
    echo "error: --steps $steps: the recorded runs have $default, use --out FOLDER for others" >&2
    exit 2
fi
study=$(basename "$0" .sh)
failed=0
# A run that fails must not keep the others from being run and shown
run() { python "$here/run.py" --steps "$steps" --workers "$workers" "$@" || { failed=$?; [ $failed -le 1 ] || exit $failed; }; }
plot() { python "$here/plot.py" "$@" || failed=$?; }
plot_llm() { python "$here/plot_llm.py" "$@" || failed=$?; }
trap '[ $failed = 0 ] || exit $failed' EXIT
