#!/usr/bin/env bash
# Runs the whole study: pre-training, fine-tuning, baselines, test evaluation, report. Finished stages are skipped, a killed
# run continues where it was; the first failure stops the study and says how to repeat it.
usage() {
  cat <<'TEXT'
usage: bash run_all.sh [options]
  --demo                 small model, short schedule, 128 px; draws its own data unless --data_root is given (minutes on a CPU)
  --data_root DIR        folder with coco/ and oxford-iiit-pet/ (default: data; the demo's drawn data: data/demo)
  --output DIR           folder of runs and report (default: runs/study, runs/demo or runs/demo_NAME-OF-DATA_ROOT)
  --gpus N               processes on this node, one per GPU (default: all GPUs; 0: CPU)
  --seeds "0 1 2"        repeat the study with these seeds (default: 0)
  --sweep NAME           animal_fraction or label_fraction; may be given twice
  --extra_arms           also pre-train on the Pets training images and on all of COCO
  --model NAME           mae_tiny, mae_small, mae_base (default), mae_large, mae_huge
  --pretrain_args "..."  more flags for pretrain.py, e.g. "--epochs 800 --batch_size 64"
  --finetune_args "..."  more flags for finetune.py and baseline.py
  --cache_dir DIR        folder of decoded images (default: cache)
  --dry_run              print every command and leave
Several nodes: start it on each node with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set, on a shared file system.
TEXT
}
set -u -o pipefail
HERE=$(CDPATH='' cd "$(dirname "$0")" && pwd)
refuse() { echo "run_all.sh: error: $1" >&2; exit 2; }
DEMO=0 DATA_ROOT="" OUTPUT="" GPUS="" SEEDS=0 SWEEPS="" EXTRA=0 MODEL="" PRE="" FINE="" CACHE=cache DRY=0
while [ $# -gt 0 ]; do
  case $1 in
    --demo) DEMO=1 ;;
    --extra_arms) EXTRA=1 ;;
    --dry_run) DRY=1 ;;
    --data_root|--output|--gpus|--seeds|--sweep|--model|--pretrain_args|--finetune_args|--cache_dir)
      [ $# -ge 2 ] || refuse "$1 needs a value (see --help)"
      case $1 in
        --data_root) DATA_ROOT=$2 ;; --output) OUTPUT=$2 ;; --gpus) GPUS=$2 ;; --seeds) SEEDS=$2 ;; --sweep) SWEEPS="$SWEEPS $2" ;;
        --model) MODEL=$2 ;; --pretrain_args) PRE=$2 ;; --finetune_args) FINE=$2 ;; --cache_dir) CACHE=$2 ;;
      esac
      shift ;;
    -h|--help) usage; exit 0 ;;
    *) refuse "unknown option $1 (see --help)" ;;
  esac
  shift
done
for s in $SEEDS; do case $s in *[!0-9]*|0?*|??????????*) refuse "--seeds takes whole numbers below a billion, got '$s'" ;; esac; done
[ -n "${SEEDS// /}" ] || refuse "--seeds is empty"
s=$(printf '%s\n' $SEEDS | sort | uniq -d | head -n 1)
[ -z "$s" ] || refuse "--seeds names $s twice; a repeated seed is no further evidence"
for s in $SWEEPS; do
  case $s in animal_fraction|label_fraction) ;; *) refuse "--sweep takes animal_fraction or label_fraction, got '$s'" ;; esac
done
case ${MODEL:-mae_base} in mae_tiny|mae_small|mae_base|mae_large|mae_huge) ;; *) refuse "unknown --model '$MODEL'" ;; esac
case $GPUS in *[!0-9]*) refuse "--gpus takes a number, got '$GPUS'" ;; esac
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
case $NNODES$NODE_RANK in *[!0-9]*) refuse "NNODES and NODE_RANK must be numbers, got '$NNODES' and '$NODE_RANK'" ;; esac
[ "$NNODES" -le 1 ] || [ -n "${MASTER_ADDR:-}" ] || refuse "with NNODES=$NNODES set MASTER_ADDR to the address of node 0"
DRAWN=0
if [ -z "$DATA_ROOT" ]; then
  if [ "$DEMO" = 1 ]; then DATA_ROOT=data/demo DRAWN=1; else DATA_ROOT=data; fi
fi
for file in coco/annotations/instances_train2017.json coco/annotations/instances_val2017.json oxford-iiit-pet/annotations/list.txt; do
  [ "$DRAWN$DRY" != 00 ] || [ -e "$DATA_ROOT/$file" ] ||
    refuse "$(printf '%q' "$DATA_ROOT/$file") not found; get the data with: python prepare.py download --data_root $(printf '%q' "$DATA_ROOT")"
done
if [ -z "$OUTPUT" ]; then
  if [ "$DEMO" = 0 ]; then OUTPUT=runs/study; elif [ "$DRAWN" = 1 ]; then OUTPUT=runs/demo; else OUTPUT=runs/demo_$(basename "$DATA_ROOT"); fi
fi
[ ! -e "$OUTPUT" ] || [ -d "$OUTPUT" ] || refuse "--output $(printf '%q' "$OUTPUT") is a file"
SYSTEM=$(command -v python3 || command -v python) || refuse "no python3 found; install Python 3.10 or newer"
words() { "$SYSTEM" -c 'import shlex, sys; sys.stdout.write("".join(w + "\0" for w in shlex.split(sys.argv[1])))' "$1"; }
for s in "$PRE" "$FINE"; do words "$s" > /dev/null 2>&1 || refuse "unbalanced quotes in the flags: $(printf '%q' "$s")"; done

if [ "$DRY" = 1 ]; then # nothing is installed to show commands
  PYTHON=$HERE/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=$SYSTEM
  [ -n "$GPUS" ] || GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2> /dev/null) || GPUS=0
else
  . "$HERE/setup.sh" || exit 1
  [ -n "$GPUS" ] || GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || exit 1
fi
mapfile -d '' -t PRETRAIN_ARGS < <(words "$PRE")
mapfile -d '' -t FINETUNE_ARGS < <(words "$FINE")

# ----------------------------------------------------------------------------------------------------------------------
# How a command is started

if [ "$NNODES" -gt 1 ]; then
  LAUNCH=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$((GPUS > 0 ? GPUS : 1))"
          --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
elif [ "$GPUS" -gt 1 ]; then
  LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS")
else
  LAUNCH=("$PYTHON")
fi
COMMON=(--data_root "$DATA_ROOT" --cache_dir "$CACHE")
DEVICE=(); [ "$GPUS" -gt 0 ] || DEVICE=(--device cpu)
SIZE=(--model "${MODEL:-mae_base}"); IMG=224
PRETRAIN=(); FINETUNE=(); DECAY=(); RESNET=()
if [ "$DEMO" = 1 ]; then # the same path at a size that two CPU cores finish in minutes
  SIZE=(--model "${MODEL:-mae_tiny}"); IMG=128
  small=(--img_size 128 --cache_size 160 --no-compile --log_every 10)
  PRETRAIN=("${small[@]}" --epochs 12 --batch_size 16 --blr 16e-3 --warmup_epochs 2)
  FINETUNE=("${small[@]}" --epochs 10 --batch_size 8 --blr 32e-3 --warmup_epochs 1)
  DECAY=(--layer_decay 0.8) # four blocks, not twelve
  RESNET=(--epochs 2 --blr 16e-3)
fi
for ((i = 0; i + 1 < ${#FINETUNE_ARGS[@]}; i++)); do [ "${FINETUNE_ARGS[i]}" != --img_size ] || IMG=${FINETUNE_ARGS[i + 1]}; done
PAPER_MIXED=(); MIXED_NOTE=""

run() { # run NAME COMMAND...: show the command, run it with its output on the screen and in a log, stop the study if it fails
  local name=$1 log="$OUTPUT/logs/$1.log" status start=$SECONDS; shift
  printf '\n== %s\n$' "$name"; printf ' %q' "$@"; printf '\n'
  if [ "$DRY" = 1 ]; then return 0; fi
  mkdir -p "$OUTPUT/logs"
  printf '%q ' "$@" >> "$log"; echo >> "$log"
  PYTHONUNBUFFERED=1 "$@" > >(exec tee -ia "$log") 2>&1 &
  CHILD=$!
  trap 'kill -TERM "$CHILD" 2>/dev/null' INT TERM # a checkpoint is written before it leaves
  while wait "$CHILD"; status=$?; kill -0 "$CHILD" 2>/dev/null; do :; done
  trap - INT TERM
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

train() { # train STAGE ARM "DEPENDENCY" SCRIPT FLAGS...: one run in $OUTPUT/seed$SEED/STAGE_ARM, unless it is finished
  local stage=$1 arm=$2 needs=$3 script=$4 dir="seed$SEED/$1_$2"; shift 4
  if [ "$ACTION" = list ]; then printf '%s\t%s\t%s\t%s\n' "$SEED" "$stage" "$arm" "$dir"; return; fi
  local command=("$HERE/$script" "$@" "${COMMON[@]}" ${DEVICE[@]+"${DEVICE[@]}"} --seed "$SEED" --split_seed "$SEED" --output_dir "$OUTPUT/$dir")
  local name="seed${SEED}_${stage}_$arm" started="$OUTPUT/$dir/config.json" marker="$OUTPUT/$dir/metrics.json"
  [ "$stage" = pretrain ] || RUNS+=("$OUTPUT/$dir")
  if [ "$DRY" = 0 ] && [ -n "$needs" ] && [ -e "$started" ] && ! newer "$started" "$needs"; then
    echo "== $name: what it starts from has been trained again, so it is repeated"
    rm -rf -- "${OUTPUT:?}/$dir"
  fi
  once "$name" "$marker" "${LAUNCH[@]}" -- "${command[@]}"
}

once() { # once NAME MARKER [LAUNCHER...] -- COMMAND...: run it, unless this very command has made the marker before
  local name=$1 marker=$2 launcher=() record="$OUTPUT/logs/$1.command"; shift 2
  while [ "$1" != -- ]; do launcher+=("$1"); shift; done
  shift
  if [ "$DRY" = 0 ] && [ -e "$marker" ] && [ "$(cat "$record" 2>/dev/null)" = "$(printf '%q ' "$@")" ]; then
    echo "== $name: finished before, skipped"
    return
  fi
  run "$name" "${launcher[@]}" "$@"
  # Without the launcher, which differs between nodes; after success, so that a refused command is refused again.
  if [ "$DRY" = 0 ]; then printf '%q ' "$@" > "$record"; fi
}

# ----------------------------------------------------------------------------------------------------------------------
# The study

pretrain() { # pretrain ARM FLAGS...
  local arm=$1; shift
  train pretrain "$arm" "" pretrain.py "${SIZE[@]}" ${PRETRAIN[@]+"${PRETRAIN[@]}"} "$@" ${PRETRAIN_ARGS[@]+"${PRETRAIN_ARGS[@]}"}
}
finetune() { # finetune ARM PRETRAIN_ARM FLAGS...
  local arm=$1 from="$OUTPUT/seed$SEED/pretrain_$2"; shift 2
  train finetune "$arm" "$from/metrics.json" finetune.py "${SIZE[@]}" --init "$from/model.pt" ${FINETUNE[@]+"${FINETUNE[@]}"} ${DECAY[@]+"${DECAY[@]}"} "$@" ${FINETUNE_ARGS[@]+"${FINETUNE_ARGS[@]}"}
}
baseline() { # baseline ARM MODEL FLAGS...
  local arm=$1 model=$2; shift 2
  train baseline "$arm" "" baseline.py --model "$model" ${FINETUNE[@]+"${FINETUNE[@]}"} "$@" ${FINETUNE_ARGS[@]+"${FINETUNE_ARGS[@]}"}
}
one_seed() {
  local arm fraction
  RUNS=()
  pretrain animal --split animal
  pretrain non_animal --split non_animal
  pretrain mixed --split mixed ${PAPER_MIXED[@]+"${PAPER_MIXED[@]}"}
  [ "$EXTRA" = 0 ] || for arm in pets all; do pretrain "$arm" --split "$arm"; done
  finetune animal animal
  finetune half animal --train_fraction 0.5
  finetune non_animal non_animal
  finetune mixed mixed
  [ "$EXTRA" = 0 ] || for arm in pets all; do finetune "$arm" "$arm"; done
  baseline mae "${SIZE[1]}"
  baseline resnet50 resnet50 ${RESNET[@]+"${RESNET[@]}"}
  case $SWEEPS in *animal_fraction*)
    for fraction in 0 0.05 0.1 0.25 0.5 0.75 1; do
      # With unique images the study's own arms are the doses 0 and 1 (and 0.5, when it has the same size).
      case " ${PRETRAIN_ARGS[*]-} " in *" --animal_images unique "*)
        case $fraction in 0|1) continue ;; 0.5) [ -n "$MIXED_NOTE" ] || continue ;; esac ;;
      esac
      pretrain "dose_$fraction" --split mixed --animal_fraction "$fraction" --animal_images unique
      finetune "dose_$fraction" "dose_$fraction"
    done ;;
  esac
  case $SWEEPS in *label_fraction*)
    for fraction in 0.05 0.1 0.25 0.5; do # all labels: the arms above
      for arm in animal non_animal mixed; do finetune "${arm}_labels_$fraction" "$arm" --train_fraction "$fraction" --equal_updates; done
      baseline "mae_labels_$fraction" "${SIZE[1]}" --train_fraction "$fraction" --equal_updates
    done ;;
  esac
}

echo "study: model ${SIZE[1]}, data $DATA_ROOT, seeds $SEEDS, $([ "$GPUS" -gt 0 ] && echo "$GPUS GPU(s)" || echo CPU), output $OUTPUT"
if [ "$DRAWN" = 1 ]; then run data "$PYTHON" "$HERE/prepare.py" demo --data_root "$DATA_ROOT"; fi
run splits "$PYTHON" "$HERE/prepare.py" splits --data_root "$DATA_ROOT" --cache_dir "$CACHE" --output "$OUTPUT/splits"
animals=25739 # the paper's; a dry run without data supposes it
if [ "$DRY" = 0 ] || [ -e "$DATA_ROOT/coco/annotations/instances_train2017.json" ]; then
  labels=$CACHE; [ "$DRY" = 0 ] || labels=$(mktemp -d)
  animals=$("$PYTHON" -c 'import sys; sys.path.insert(0, sys.argv[1]); import splits; print(splits.reference_size(sys.argv[2], cache_dir=sys.argv[3]))' "$HERE" "$DATA_ROOT" "$labels")
  [ "$DRY" = 0 ] || rm -rf "$labels"
fi
if [ "$animals" = 25739 ] && [ "$DEMO" = 0 ]; then PAPER_MIXED=(--num_images 25918) MIXED_NOTE=1; fi # the paper's size of the mixed split
if [ "$DRY" = 0 ]; then
  mkdir -p "$OUTPUT"
  ACTION=list
  for SEED in $SEEDS; do one_seed; done > "$OUTPUT/study.tsv"
fi
ACTION=run
for SEED in $SEEDS; do
  one_seed
  [ "$NODE_RANK" = 0 ] || continue
  tested=1
  for dir in "${RUNS[@]}"; do newer "$dir/test.npz" "$dir/model.pt" || tested=0; done
  if [ "$tested" = 1 ] && [ "$DRY" = 0 ]; then echo "== seed${SEED}_evaluate: finished before, skipped"; continue; fi
  run "seed${SEED}_evaluate" "$PYTHON" "$HERE/evaluate.py" test "${COMMON[@]}" ${DEVICE[@]+"${DEVICE[@]}"} "${RUNS[@]}"
done
[ "$NODE_RANK" = 0 ] || exit 0
once reference "$OUTPUT/reference.npz" "$PYTHON" -- "$HERE/evaluate.py" reference "${COMMON[@]}" ${DEVICE[@]+"${DEVICE[@]}"} --img_size "$IMG" --output "$OUTPUT/reference.npz"
run report "$PYTHON" "$HERE/report.py" "$OUTPUT"
[ "$DRY" = 1 ] || printf '\nThe study is finished after %d min %d s. Read %s/report/report.md\n' $((SECONDS / 60)) $((SECONDS % 60)) "$OUTPUT"
