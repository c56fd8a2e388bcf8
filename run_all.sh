#!/usr/bin/env bash
# Runs the whole study: pre-training, fine-tuning, baselines, test evaluation, report. `run_all.sh --help` lists the options.
# Which runs there are is decided by `study.py plan`; this script carries the plan out. Finished stages are skipped, a killed
# run continues where it was; the first failure stops the study and says how to repeat it.
set -u -o pipefail
HERE=$(CDPATH='' cd "$(dirname "$0")" && pwd)
refuse() { echo "run_all.sh: error: $1" >&2; exit 2; }
SYSTEM=$(command -v python3 || command -v python) || refuse "no python3 found; install Python 3.10 or newer"
for word in "$@"; do case $word in -h|--help) exec "$SYSTEM" "$HERE/study.py" settings --help ;; esac; done
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
case $NNODES$NODE_RANK in *[!0-9]*) refuse "NNODES and NODE_RANK must be numbers, got '$NNODES' and '$NODE_RANK'" ;; esac
[ "$NNODES" -le 1 ] || [ -n "${MASTER_ADDR:-}" ] || refuse "with NNODES=$NNODES set MASTER_ADDR to the address of node 0"
settings=$("$SYSTEM" "$HERE/study.py" settings "$@") || exit
eval "$settings" # DATA_ROOT, OUTPUT, CACHE, GPUS, DRAWN, DRY, TASK, REFERENCE, TITLE

if [ "$DRY" = 1 ]; then # nothing is installed to show commands
  PYTHON=$HERE/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=$SYSTEM
  [ -n "$GPUS" ] || GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2> /dev/null) || GPUS=0
else
  . "$HERE/setup.sh" || exit 1
  [ -n "$GPUS" ] || GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || exit 1
fi
LAUNCH=("$PYTHON")
if [ "$NNODES" -gt 1 ]; then
  LAUNCH+=(-m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$((GPUS > 0 ? GPUS : 1))"
           --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
elif [ "$GPUS" -gt 1 ]; then
  LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
fi
DEVICE=(); [ "$GPUS" -gt 0 ] || DEVICE=(--device cpu)

# ----------------------------------------------------------------------------------------------------------------------
# How a command is started

STOP="" CHILD=""
stop() { # a stop request: the running command writes a checkpoint before it leaves
  STOP=$1
  [ -z "$CHILD" ] || kill -TERM "$CHILD" 2> /dev/null
}
trap 'stop 130' INT
trap 'stop 143' TERM

leave_if_asked() { # a request may come between two commands, or so late that the running one still ends well
  [ -n "$STOP" ] || return 0
  printf '\nrun_all.sh: stopped %s %s; the same run_all.sh command goes on from there.\n' "$1" "$2" >&2
  exit "$STOP"
}

run() { # run NAME COMMAND...: show the command, run it with its output on the screen and in a log, stop the study if it fails
  local name=$1 log="$OUTPUT/logs/$1.log" status start=$SECONDS; shift
  leave_if_asked before "$name"
  printf '\n== %s\n$' "$name"; printf ' %q' "$@"; printf '\n'
  if [ "$DRY" = 1 ]; then return 0; fi
  mkdir -p "$OUTPUT/logs"
  printf '%q ' "$@" >> "$log"; echo >> "$log"
  PYTHONUNBUFFERED=1 "$@" > >(exec tee -ia "$log") 2>&1 &
  CHILD=$!
  [ -z "$STOP" ] || kill -TERM "$CHILD" 2> /dev/null
  while wait "$CHILD"; status=$?; kill -0 "$CHILD" 2> /dev/null; do :; done
  CHILD=""
  if [ "$status" != 0 ]; then
    printf '\nrun_all.sh: stage %s failed with exit code %s after %s s.\n  log:     %s\n  repeat:  ' "$name" "$status" $((SECONDS - start)) "$log" >&2
    printf '%q ' "$@" >&2; printf '\n  then the same run_all.sh command goes on from there.\n' >&2
    exit "$status"
  fi
  echo "   $name: $((SECONDS - start)) s"
}

newer() { # is file $1 there, and no older than the files after it?
  local marker=$1 other; shift
  [ -e "$marker" ] || return 1
  for other in "$@"; do [ "$other" -nt "$marker" ] && return 1; done
  return 0
}

once() { # once NAME MARKER [LAUNCHER...] -- COMMAND...: run it, unless this very command has made the marker before
  local name=$1 marker=$2 launcher=() record="$OUTPUT/logs/$1.command"; shift 2
  while [ "$1" != -- ]; do launcher+=("$1"); shift; done
  shift
  if [ "$DRY" = 0 ] && [ -e "$marker" ] && [ "$(cat "$record" 2> /dev/null)" = "$(printf '%q ' "$@")" ]; then
    echo "== $name: finished before, skipped"
    return
  fi
  run "$name" "${launcher[@]}" "$@"
  # Without the launcher, which differs between nodes; after success, so that a refused command is refused again.
  if [ "$DRY" = 0 ]; then printf '%q ' "$@" > "$record"; fi
  leave_if_asked after "$name"
}

train() { # train NAME FOLDER PARENT SCRIPT FLAGS...: one line of the plan, unless it is finished
  local name=$1 dir="$OUTPUT/$2" needs="$OUTPUT/$3/metrics.json" parent=$3 script=$4; shift 4
  if [ "$DRY" = 0 ] && [ -n "$parent" ] && [ -e "$dir/config.json" ] && ! newer "$dir/config.json" "$needs"; then
    echo "== $name: what it starts from has been trained again, so it is repeated"
    rm -rf -- "${dir:?}"
  fi
  once "$name" "$dir/metrics.json" "${LAUNCH[@]}" -- "$HERE/$script" "$@" ${DEVICE[@]+"${DEVICE[@]}"}
}

evaluate() { # evaluate NAME FOLDER...: score runs on the test images, unless all are scored
  local name=$1 tested=1 dir; shift
  for dir in "$@"; do newer "$dir/test.npz" "$dir/model.pt" || tested=0; done
  if [ "$tested" = 1 ] && [ "$DRY" = 0 ]; then echo "== $name: finished before, skipped"; return; fi
  run "$name" "$PYTHON" "$HERE/evaluate.py" test "${DATA[@]}" "$@"
  leave_if_asked after "$name"
}

# ----------------------------------------------------------------------------------------------------------------------
# The study

echo "study: $TITLE, $([ "$GPUS" -gt 0 ] && echo "$GPUS GPU(s)" || echo CPU), output $OUTPUT"
DATA=(--data_root "$DATA_ROOT" --cache_dir "$CACHE" ${DEVICE[@]+"${DEVICE[@]}"})
if [ "$DRAWN" = 1 ]; then run data "$PYTHON" "$HERE/prepare.py" demo --data_root "$DATA_ROOT"; fi
run splits "$PYTHON" "$HERE/prepare.py" splits --data_root "$DATA_ROOT" --cache_dir "$CACHE" --output "$OUTPUT/splits"
leave_if_asked after splits
PLAN=$("$PYTHON" "$HERE/study.py" plan "$@") || exit
if [ "$DRY" = 0 ]; then printf '%s\n' "$PLAN" > "$OUTPUT/study.tsv"; fi
PLAN=$(tail -n +2 <<< "$PLAN" | tr '\t' '\037') # bash joins empty columns between tabs

for SEED in $(cut -d $'\037' -f 1 <<< "$PLAN" | uniq); do
  RUNS=()
  while IFS=$'\037' read -r -u 3 seed stage arm folder parent sweep value command; do
    [ "$seed" = "$SEED" ] || continue
    [ "$stage" = pretrain ] || RUNS+=("$OUTPUT/$folder")
    eval "words=($command)"
    train "seed${seed}_${stage}_$arm" "$folder" "$parent" "${words[@]}"
  done 3<<< "$PLAN"
  if [ "$NODE_RANK" = 0 ]; then evaluate "seed${SEED}_evaluate" "${RUNS[@]}"; fi
done
[ "$NODE_RANK" = 0 ] || exit 0
if [ "$TASK" = segment ]; then # trivial predictors
  once reference "$OUTPUT/reference.npz" "$PYTHON" -- "$HERE/evaluate.py" reference "${DATA[@]}" $REFERENCE --output "$OUTPUT/reference.npz"
fi
run report "$PYTHON" "$HERE/report.py" "$OUTPUT"
leave_if_asked after report
[ "$DRY" = 1 ] || printf '\nThe study is finished after %d min %d s. Read %s/report/report.md\n' $((SECONDS / 60)) $((SECONDS % 60)) "$OUTPUT"
