#!/usr/bin/env bash
# Runs the complete study: pre-training, fine-tuning, baselines, test evaluation, report. `run_all.sh --help` lists the options.
# Which runs there are is decided by `study.py plan`; this script carries the plan out, one run after another or --jobs at a
# time. Finished stages are skipped, a killed run continues where it was. Repeat the command after whatever stopped it.
set -u -o pipefail
HERE=$(CDPATH='' cd "$(dirname "$0")" && pwd)
refuse() { echo "run_all.sh: error: $1" >&2; exit 2; }
SYSTEM=$(command -v python3 || command -v python) || refuse "no python3 found; install Python 3.10 or newer"
for word in "$@"; do case $word in -h|--help) exec "$SYSTEM" "$HERE/study.py" settings --help ;; esac; done
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
case $NNODES$NODE_RANK in *[!0-9]*) refuse "NNODES and NODE_RANK must be numbers, got '$NNODES' and '$NODE_RANK'" ;; esac
[ "$NNODES" -le 1 ] || [ -n "${MASTER_ADDR:-}" ] || refuse "with NNODES=$NNODES set MASTER_ADDR to the address of node 0"
settings=$("$SYSTEM" "$HERE/study.py" settings "$@") || exit
eval "$settings" # DATA_ROOT, OUTPUT, CACHE, GPUS, JOBS, CPU_JOBS, CPU_THREADS, CPU_CORES, DRAWN, DRY, SLURM, TASK, SPLITS, PROBES, REFERENCE, TITLE
PART=${RUN_ALL_PART:-} # what a job of Slurm does of the study, see slurm.py: read, or report
[ "$SLURM" = 0 ] || [ "$NNODES" -le 1 ] || refuse "--slurm goes without NNODES; each run is a job of its own"

if [ "$DRY" = 1 ]; then # nothing is installed to show commands
  PYTHON=$HERE/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=$SYSTEM
  [ -n "$GPUS" ] || GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2> /dev/null) || GPUS=0
else
  . "$HERE/setup.sh" || exit 1
  found=$("$PYTHON" "$HERE/check_plan.py" "$@") || exit # before anything is written
  [ -n "$GPUS" ] || GPUS=${found##*$'\n'} # its last line
fi

# ----------------------------------------------------------------------------------------------------------------------
# How a training is started

DEVICE=()
if [ "$GPUS" = 0 ]; then
  DEVICE=(--device cpu)
  JOBS=$CPU_JOBS
  THREADS_ALONE=${OMP_NUM_THREADS:-$CPU_CORES}
  # With all threads each, two trainings slow one another many times.
  if [ "$JOBS" -gt 1 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPU_THREADS}; fi
  # Keep freed memory for the next step instead of returning it to the system and clearing it anew.
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2000000000} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-30000000}
fi
JOBS=${JOBS:-1}
[ "$GPUS" = 0 ] || [ "$JOBS" -le "$GPUS" ] || refuse "--jobs $JOBS needs a GPU for each run, and there are $GPUS"
[ "$JOBS" = 1 ] || [ "$NNODES" -le 1 ] || refuse "--jobs goes with one node; several nodes share each run"
LAUNCH=("$PYTHON") # runs side by side have a GPU each; a run alone is divided over all of them
if [ "$NNODES" -gt 1 ]; then
  LAUNCH+=(-m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$((GPUS > 0 ? GPUS : 1))"
           --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
elif [ "$GPUS" -gt 1 ] && [ "$JOBS" = 1 ]; then
  LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
fi
QUIET="" # runs side by side write to their logs, and one line tells of all
[ "$JOBS" = 1 ] || QUIET=1

# ----------------------------------------------------------------------------------------------------------------------
# How a command is run

STOP="" CHILD="" # CHILD: what runs now, a process or (negative) a group of processes
ask_child() { # until the request has arrived, or the child has ended: a group exists only once its leader has made it
  until kill -TERM -- "$CHILD" 2> /dev/null || ! kill -0 "${CHILD#-}" 2> /dev/null; do sleep 0.1; done
}
stop() { # a stop request: running trainings write a checkpoint before they leave
  STOP=$1
  [ -z "$CHILD" ] || ask_child
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 138' USR1 # Slurm: the time limit is near
WITH_US=() # what a command that this script waits for is started with: it is stopped when this script is killed
setpriv --pdeathsig TERM true 2> /dev/null && WITH_US=(setpriv --pdeathsig TERM)

await() { # await PID: wait for the end of CHILD, also when a stop request interrupts the waiting
  local status
  [ -z "$STOP" ] || ask_child
  while wait "$1"; status=$?; kill -0 "$1" 2> /dev/null; do :; done
  while kill -0 -- "$CHILD" 2> /dev/null; do sleep 0.2; done # a group may outlive its first process
  CHILD=""
  return "$status"
}

leave_if_asked() { # a request may come between two commands, or so late that the running one still ends well
  [ -n "$STOP" ] || return 0
  if [ "$STOP" = 138 ] && [ -n "$PART" ]; then scontrol requeue "$SLURM_JOB_ID" && exit 0; fi
  printf '\nrun_all.sh: stopped %s %s; the same run_all.sh command goes on from there.\n' "$1" "$2" >&2
  exit "$STOP"
}

run() { # run NAME PURPOSE COMMAND...: run it with its output in a log, and on the screen unless QUIET; stop the study if it fails
  local name=$1 purpose=$2 log="$OUTPUT/logs/$1.log" status start=$SECONDS; shift 2
  leave_if_asked before "$name"
  printf '\n== %s: %s\n' "$name" "$purpose"
  [ -n "$QUIET" ] && [ "$DRY" = 0 ] || { printf '$'; printf ' %q' "$@"; printf '\n'; }
  if [ "$DRY" = 1 ]; then return 0; fi
  mkdir -p "$OUTPUT/logs"
  printf '%q ' "$@" >> "$log"; echo >> "$log"
  if [ -n "$QUIET" ]; then
    PYTHONUNBUFFERED=1 ${WITH_US[@]+"${WITH_US[@]}"} "$@" >> "$log" 2>&1 &
  else
    PYTHONUNBUFFERED=1 ${WITH_US[@]+"${WITH_US[@]}"} "$@" > >(trap '' TERM; exec tee -ia "$log") 2>&1 & # tee outlives a request to the whole group
  fi
  CHILD=$!
  await "$CHILD"
  status=$?
  if [ "$status" != 0 ]; then
    [ -z "$QUIET" ] || tail -n 5 "$log" >&2
    printf '\nrun_all.sh: stage %s failed with exit code %s after %s s.\n  log:     %s\n  repeat:  ' "$name" "$status" $((SECONDS - start)) "$log" >&2
    printf '%q ' "$@" >&2; printf '\n  then the same run_all.sh command goes on from there.\n' >&2
    exit "$status"
  fi
  echo "   $name: $((SECONDS - start)) s"
  leave_if_asked after "$name"
}

once() { # once NAME PURPOSE MARKER COMMAND...: run it, unless this very command has made the marker before
  local name=$1 purpose=$2 marker=$3 record="$OUTPUT/logs/$1.command"; shift 3
  if [ "$DRY" = 0 ] && [ -e "$marker" ] && [ "$(cat "$record" 2> /dev/null)" = "$(printf '%q ' "$@")" ]; then
    echo "== $name: finished before, skipped"
    return
  fi
  run "$name" "$purpose" "$@"
  if [ "$DRY" = 0 ]; then printf '%q ' "$@" > "$record"; fi
}

train() { # train FOLDER...: trainings of the plan, parents before those that start from them, AT_ONCE or JOBS at a time
  local folder status watcher how=("$PYTHON" "$HERE/carry_out.py" "$OUTPUT" --plan "$TABLE" --launch "$(printf '%q ' "${LAUNCH[@]}")")
  how+=(--flags "${DEVICE[*]-}")
  [ "$DRY" = 0 ] || how+=(--dry_run)
  if [ "$JOBS" = 1 ] || [ "$DRY" = 1 ]; then
    for folder in "$@"; do
      leave_if_asked before "$folder"
      "${how[@]}" --run "$folder" &
      CHILD=$!
      await "$CHILD"
      status=$?
      leave_if_asked after "$folder" # before the status, which is that of the request that reached the training
      [ "$status" = 0 ] || exit "$status" # it has said what failed
    done
    return
  fi
  [ "$#" -gt 0 ] || return 0
  leave_if_asked before "the next runs"
  ${WITH_US[@]+"${WITH_US[@]}"} "$PYTHON" "$HERE/status.py" "$OUTPUT" --watch --jobs "$JOBS" < /dev/null &
  watcher=$!
  printf '%s\0' "$@" | JOB_GPUS=$GPUS exec ${WITH_US[@]+"${WITH_US[@]}"} setsid xargs -0 -n 1 -P "${AT_ONCE:-$JOBS}" --process-slot-var=JOB_SLOT "${how[@]}" --quiet --wait --run &
  CHILD=-$!
  await "$!" # a failed run stops no other
  kill "$watcher" 2> /dev/null
  wait "$watcher" 2> /dev/null
  leave_if_asked after "the runs above"
}

evaluate() { # evaluate FOLDER...: score finished runs on the test images
  if [ "$#" = 0 ]; then echo "== evaluate: finished before, skipped"; return; fi
  run evaluate "scoring each network once on the test images" "$PYTHON" "$HERE/evaluate.py" test "${DATA[@]}" "$@"
}

# ----------------------------------------------------------------------------------------------------------------------
# The study

where="CPU, $JOBS run(s) at a time"
[ "$GPUS" = 0 ] || where="$GPUS GPU(s), $JOBS run(s) at a time"
[ "$SLURM" = 0 ] || where="each run a job of Slurm"
echo "study: $TITLE, $where, output $OUTPUT"

lock_study() { # one run_all.sh at a time works in a folder; what a killed one has left behind leaves first
  local owner
  mkdir -p "$OUTPUT" && exec 9>> "$OUTPUT/.lock" || exit 1
  flock -n -E 1 9
  case $? in
    0) ;;
    1)
      read -r owner < "$OUTPUT/.lock"
      if [ "${owner% *}" != "$HOSTNAME" ] || kill -0 "${owner##* }" 2> /dev/null; then
        refuse "another run_all.sh works in $(printf '%q' "$OUTPUT"); wait for it or choose another --output"
      fi
      echo "   an earlier run_all.sh was killed; waiting until its last runs have written their checkpoints"
      flock -w 300 9 || refuse "runs of a killed run_all.sh still work in $(printf '%q' "$OUTPUT"); stop them first" ;;
    *) refuse "$(printf '%q' "$OUTPUT") cannot be locked; choose an --output on a file system that has locks (flock)" ;;
  esac
  echo "$HOSTNAME $$" > "$OUTPUT/.lock"
}

if [ "$DRY" = 0 ]; then
  [ -n "$PART" ] || [ ! -e "$OUTPUT/logs/slurm.jobs" ] || "$PYTHON" "$HERE/slurm.py" queued "$OUTPUT" || exit
  if [ "$NODE_RANK" = 0 ] && command -v flock > /dev/null; then lock_study; fi
fi
DATA=(--data_root "$DATA_ROOT" --cache_dir "$CACHE" ${DEVICE[@]+"${DEVICE[@]}"})
eval "SPLITS=($SPLITS)" # flags, quoted for bash
TABLE=$OUTPUT/study.tsv
[ "$DRY" = 0 ] || TABLE=$(mktemp)

plan() { # data, splits, and the table of runs
  if [ "$DRAWN" = 1 ]; then
    run data "drawing photos of animals and things, so that nothing need be downloaded" "$PYTHON" "$HERE/prepare.py" demo --data_root "$DATA_ROOT"
  fi
  run splits "listing which images each arm sees" "$PYTHON" "$HERE/prepare.py" splits --data_root "$DATA_ROOT" --cache_dir "$CACHE" --output "$OUTPUT/splits" ${SPLITS[@]+"${SPLITS[@]}"}
  "$PYTHON" "$HERE/study.py" plan "$@" > "$TABLE.$$" || { status=$?; rm -f "$TABLE.$$"; exit "$status"; }
  mv "$TABLE.$$" "$TABLE" || exit
}

folders() { "$PYTHON" "$HERE/carry_out.py" "$OUTPUT" --plan "$TABLE" --list "$1"; } # separated by NUL

train_all() {
  if [ "$JOBS" = 1 ]; then
    mapfile -d '' -t ALL < <(folders in_order)
    train "${ALL[@]}"
  elif [ "$GPUS" = 0 ]; then
    mapfile -d '' -t ALONE < <(folders alone) # with nothing beside it, its memory is not added to that of others
    mapfile -d '' -t OTHERS < <(folders others)
    # Passive: threads that wait for one another leave the core to whatever else runs on this machine.
    AT_ONCE=1 OMP_NUM_THREADS=$THREADS_ALONE OMP_WAIT_POLICY=passive train "${ALONE[@]}"
    train "${OTHERS[@]}"
  else # as soon as a GPU is free; a run waits for the one that it starts from
    mapfile -d '' -t ALL < <(folders side_by_side)
    train "${ALL[@]}"
  fi
}

name_unfinished() { # name_unfinished FOLDER...: what failed, with its log and command, and what did not finish for another reason
  local folder log
  printf '\nrun_all.sh: some runs failed; the report names what is missing. The same command repeats them:\n'
  for folder in "$@"; do
    log="$OUTPUT/logs/${folder/\//_}"
    if [ -e "$log.failed" ]; then
      cat "$log.failed"
    else
      printf 'run_all.sh: %s did not finish: it was stopped, or what it starts from failed.\n  log:     %s\n' "$folder" "$log.log"
    fi
  done
}

[ -n "$PART" ] || plan "$@"
if [ "$SLURM" = 1 ] && [ -z "$PART" ]; then
  "$PYTHON" "$HERE/slurm.py" submit "$TABLE" "$@"
  status=$?
  [ "$DRY" = 0 ] || rm -f "$TABLE"
  exit "$status"
fi
if [ "$PART" != report ]; then
  # What is decoded now lies in the cache when the trainings ask for it. On the screen also where runs are QUIET: it says how long it takes.
  QUIET="" run read "reading all photos and trimaps that the study needs" "$PYTHON" "$HERE/read_data.py" "$OUTPUT"
fi
[ "$PART" != read ] || exit 0
[ "$PART" = report ] || train_all
[ "$NODE_RANK" = 0 ] || exit 0
mapfile -d '' -t UNTESTED < <(folders "$([ "$DRY" = 1 ] && echo tests || echo untested)")
evaluate ${UNTESTED[@]+"${UNTESTED[@]}"}
if [ "$PROBES" = 1 ] && { [ "$DRY" = 1 ] || compgen -G "$(printf '%q' "$OUTPUT")/seed*/pretrain_*/metrics.json" > /dev/null; }; then
  run probe "asking frozen encoders what they know" "$PYTHON" "$HERE/probe.py" "${DATA[@]}" --random "$OUTPUT"
fi
if [ "$TASK" = segment ]; then
  once reference "scoring predictors that look at no image" "$OUTPUT/reference.npz" "$PYTHON" "$HERE/evaluate.py" reference "${DATA[@]}" $REFERENCE --output "$OUTPUT/reference.npz"
fi
run report "tables, statistics and figures" "$PYTHON" "$HERE/report.py" "$OUTPUT"
[ "$DRY" = 0 ] || { rm -f "$TABLE"; exit 0; }
[ -z "$QUIET" ] || { echo; tail -n 5 "$OUTPUT/logs/report.log"; } # the numbers that matter, which only the log has
mapfile -d '' -t UNFINISHED < <(folders unfinished)
if [ "${#UNFINISHED[@]}" -gt 0 ]; then
  name_unfinished "${UNFINISHED[@]}" >&2
  exit 1
fi
printf '\nThe study is finished after %d min %d s. Read %s/report/report.html\n' $((SECONDS / 60)) $((SECONDS % 60)) "$OUTPUT"
