#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show: tests, speed, memory, and a small study on photos. Results go to one folder.
# usage: bash tests/gpu.sh [--rehearse] [--output DIR] [--data_root DIR] [PART]...
#   PART         tests pretrain finetune resnet50 rest products scaling objectives choices study
#                (default: all, in this order: the most telling first)
#   --rehearse   the same commands at tiny size on the CPU, to know that they work before the first GPU is met
#   --output     folder of logs, measurements (bench.jsonl) and BENCHMARKS.md (default: gpu_results)
#   --data_root  photos laid out as in the README (default: drawn ones)
# Uses the active environment if it has requirements.txt; the first part needs pytest too, and peers are measured where timm
# and transformers are installed. Each part runs alone, a failed one stops no other, and what a killed one had measured is
# kept. CHOICES="NAME;NAME" and STUDY_ARGS="FLAGS" shorten the last two.
set -u
HERE=$PWD
cd "$(dirname "$0")/.."
ALL=(tests pretrain finetune resnet50 rest products scaling objectives choices study)
REHEARSE="" OUTPUT=gpu_results DATA_ROOT="" PARTS=()
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) REHEARSE=1 ;;
    --output|--data_root)
      case ${2:--} in -*) echo "gpu.sh: error: $1 needs a folder" >&2; exit 2 ;; esac
      folder=$2
      case $folder in /*) ;; *) [ "$HERE" = "$PWD" ] || folder=$HERE/$folder ;; esac # as the caller sees it
      if [ "$1" = --output ]; then OUTPUT=$folder; else DATA_ROOT=$folder; fi
      shift ;;
    -h|--help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) if ! printf '%s\n' "${ALL[@]}" | grep -qxF -- "$1"; then
        echo "gpu.sh: error: unknown part $1; parts are ${ALL[*]}" >&2
        exit 2
      fi
      PARTS+=("$1") ;;
  esac
  shift
done
[ "${#PARTS[@]}" -gt 0 ] || PARTS=("${ALL[@]}")
. ./setup.sh || exit 1
if [ -z "$REHEARSE" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: error: torch sees no GPU; --rehearse runs the same at tiny size on the CPU" >&2
  exit 2
fi
mkdir -p "$OUTPUT" || exit 2
export PYTHONUNBUFFERED=1

if [ -z "$DATA_ROOT" ]; then
  DATA_ROOT=$OUTPUT/photos
  "$PYTHON" prepare.py demo --data_root "$DATA_ROOT" || exit 1
fi
BENCH=("$PYTHON" bench.py --data_root "$DATA_ROOT" --output "$OUTPUT/bench.jsonl" --cache_dir "$OUTPUT/cache")
# A CPU's compiler takes minutes and says nothing of a GPU's; the tests make the graphs without it.
[ -z "$REHEARSE" ] || BENCH=(env TORCHDYNAMO_DISABLE=1 "${BENCH[@]}")
REPEATS=(--repeats 3)
if [ -n "$REHEARSE" ]; then
  BENCH+=(--quick --device cpu --no-compile --model mae_tiny --img_size 32 --batch_size 2)
  REPEATS=(--repeats 1)
fi
PEERS=(--peers eager pil)
if "$PYTHON" -c 'import timm, transformers' 2> /dev/null; then PEERS=(--peers); fi

tests() { # numerics, synchronisation, precision, compilation, accumulation, resume
  if ! "$PYTHON" -c 'import pytest' 2> /dev/null; then
    echo "the tests need pytest; \`pip install pytest\`"
    return 1
  fi
  local beside=()
  if "$PYTHON" -c 'import xdist' 2> /dev/null; then beside=(-n auto --maxprocesses 4 --dist worksteal); fi
  REHEARSE=$REHEARSE "$PYTHON" -m pytest tests/test_gpu.py -q -p no:cacheprovider --durations=10 ${beside[@]+"${beside[@]}"}
}
pretrain() { # steps on synthetic and real batches beside peers, validation, a profile
  "${BENCH[@]}" "${REPEATS[@]}" "${PEERS[@]}" --profile "$OUTPUT/profile" --tasks pretrain
}
finetune() { # the same; then launched as one graph, as the host may launch kernels more slowly than the GPU runs them
  "${BENCH[@]}" "${REPEATS[@]}" "${PEERS[@]}" --profile "$OUTPUT/profile" --tasks finetune &&
    "${BENCH[@]}" "${REPEATS[@]}" --cuda_graph --tasks finetune
}
resnet50() {
  "${BENCH[@]}" "${REPEATS[@]}" --profile "$OUTPUT/profile" --tasks resnet50 || return
  [ -n "$REHEARSE" ] || "${BENCH[@]}" "${REPEATS[@]}" --cuda_graph --tasks resnet50
}
rest() { # the data path, all that is not training, and the study's time by all rates
  "${BENCH[@]}" "${REPEATS[@]}" "${PEERS[@]}" --tasks data rest growth study
}
products() { "${BENCH[@]}" "${REPEATS[@]}" --tasks products; }
scaling() { "${BENCH[@]}" "${REPEATS[@]}" --tasks scaling --synthetic; }
objectives() { # two crops of 256 images, as one objective has them, would not fit everywhere
  local sizes=(--batch_size 128)
  [ -z "$REHEARSE" ] || sizes=(--batch_size 2 --img_size 64) # of smaller images, one objective has no blocks
  "${BENCH[@]}" "${REPEATS[@]}" --tasks objectives --synthetic "${sizes[@]}"
}
choices() {
  local names=()
  [ -z "${CHOICES:-}" ] || IFS=";" read -r -a names <<< "$CHOICES"
  "${BENCH[@]}" "${REPEATS[@]}" --tasks choices --synthetic ${names[@]+--choices "${names[@]}"}
}
study() { # the study's own path: three pre-trainings, four fine-tunings, two baselines, tests, report
  local how=(--output "$OUTPUT/study" --cache_dir "$OUTPUT/cache")
  if [ -n "$REHEARSE" ]; then
    how+=(--gpus 0 --jobs 2 --model mae_tiny --pretrain_args "--img_size 32 --epochs 1 --epoch_updates 2 --batch_size 4 --warmup_epochs 0")
    how+=(--finetune_args "--img_size 32 --epochs 1 --epoch_updates 2 --batch_size 4 --warmup_epochs 0")
  else
    how+=(--pretrain_args "--epochs 4 --epoch_updates 75 --batch_size 128 --warmup_epochs 0.4 ${STUDY_ARGS:-}")
    how+=(--finetune_args "--epochs 5 --epoch_updates 30 --warmup_epochs 0.5 ${STUDY_ARGS:-}")
  fi
  bash run_all.sh --data_root "$DATA_ROOT" "${how[@]}"
}

report() { # of all that was measured so far, in this call and before
  [ ! -s "$OUTPUT/bench.jsonl" ] || "$PYTHON" bench.py --report "$OUTPUT/bench.jsonl" --output "$OUTPUT/BENCHMARKS.md"
}
stop() { # a stop signal ends the part and whatever it has started
  trap - INT TERM
  kill -TERM -- "-$JOB" 2> /dev/null
  wait "$JOB"
  echo "== $part: stopped after $((SECONDS - start)) s" | tee -a "$OUTPUT/summary.txt"
  report
  exit 143
}
run_part() {
  "$1" 2>&1 | tee "$OUTPUT/$1.log"
  return "${PIPESTATUS[0]}"
}

FAILED=()
for part in "${PARTS[@]}"; do
  start=$SECONDS
  echo "== $part"
  set -m # a process group of its own, so that a signal reaches all of it
  run_part "$part" &
  JOB=$!
  set +m
  trap stop INT TERM
  if wait "$JOB"; then verdict=done; else verdict=FAILED; FAILED+=("$part"); fi
  trap - INT TERM
  echo "== $part: $verdict after $((SECONDS - start)) s" | tee -a "$OUTPUT/summary.txt"
done
report || FAILED+=(report)
[ "${#FAILED[@]}" = 0 ] || { echo "gpu.sh: failed: ${FAILED[*]}; logs in $OUTPUT" >&2; exit 1; }
echo "gpu.sh: everything ran; results in $OUTPUT"
