#!/usr/bin/env bash
# What takes longer than the suite: the full demo with its claims, objectives until they have learnt, kills and faults, Slurm,
# the over-fitting tests at 224 px.
# usage: bash tests/acceptance.sh [demo|objectives|stress|faults|slurm|slow|clean]...   (all; SAMPLE_ROOT=DIR adds real photos)
set -eu
cd "$(dirname "$0")/.."
REQUIREMENTS=requirements-dev.txt
. ./setup.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

memory_below() { # memory_below PID: resident memory of a process and all that descend from it, in kB
  # By descent: each training has a session of its own, so the process group would leave it out.
  cat /proc/[0-9]*/status 2> /dev/null | awk -v root="$1" '
    /^Pid:/ { pid = $2 } /^PPid:/ { parent[pid] = $2 } /^VmRSS:/ { rss[pid] = $2 }
    END { for (p in rss) { q = p; while (q in parent && q != root) q = parent[q]; if (q == root) sum += rss[p] } print sum + 0 }'
}

sample_memory() { # sample_memory PID FILE: each second until it ends, the largest memory so far into FILE
  local peak=0 now
  while kill -0 "$1" 2> /dev/null; do
    now=$(memory_below "$1")
    if [ "$now" -gt "$peak" ]; then peak=$now; echo "$peak" > "$2"; fi
    sleep 1
  done
}

for part in ${*:-clean demo objectives stress faults slurm slow}; do
  case $part in
    clean) # from a clone with nothing installed; the suite leaves no file behind
      git clone -q . "$folder/clone"
      (cd "$folder/clone" && bash .ci/run && test -z "$(git status --porcelain)") ;;
    demo)
      start=$SECONDS
      echo 0 > "$folder/peak"
      bash run_all.sh --demo --output "$folder/demo" --cache_dir "$folder/cache" &
      demo=$!
      sample_memory "$demo" "$folder/peak" &
      wait "$demo"
      peak=$(($(cat "$folder/peak") / 1024))
      echo "demo: $((SECONDS - start)) s, peak memory $peak MiB (resident, all its processes together)"
      if [ "$peak" -le 0 ] || [ "$peak" -ge 2048 ]; then
        echo "acceptance.sh: the demo's peak memory must lie below 2 GiB" >&2
        exit 1
      fi
      "$PYTHON" tests/check_demo.py "$folder/demo"
      if [ -n "${SAMPLE_ROOT:-}" ]; then
        bash run_all.sh --demo --data_root "$SAMPLE_ROOT" --output "$folder/photos" --cache_dir "$folder/cache"
        "$PYTHON" tests/check_demo.py "$folder/photos"
      fi ;;
    objectives) # each trained with three seeds until it has learnt what it is asked; its frozen encoder beside random ones
      "$PYTHON" tests/check_objectives.py "$folder/objectives"
      if [ -n "${SAMPLE_ROOT:-}" ]; then
        "$PYTHON" tests/check_objectives.py "$folder/objectives_photos" --data_root "$SAMPLE_ROOT"
      fi ;;
    stress) # trainings killed again and again; then whole studies: their script, one of its processes, or all
      "$PYTHON" tests/stress.py kills 20
      "$PYTHON" tests/stress.py studies 20 --seed "${SEED:-0}" ;;
    slurm) "$PYTHON" tests/real_slurm.py ;; # a real one, where it may be installed
    faults) # 10,320 faults from a seed, each judged, and any words as command lines; SEED=N tries others
      "$PYTHON" tests/stress.py files 10000 --seed "${SEED:-0}"
      "$PYTHON" tests/stress.py processes 320 --seed "${SEED:-0}"
      FUZZ=1000 "$PYTHON" -m pytest tests/test_command_lines.py -q -p no:cacheprovider ;;
    slow) "$PYTHON" -m pytest tests -q -m slow -s -p no:cacheprovider ;;
    *) echo "acceptance.sh: error: unknown part $part" >&2; exit 2 ;;
  esac
done
echo "acceptance: everything held"
