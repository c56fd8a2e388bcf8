#!/usr/bin/env bash
# What takes longer than the suite: the full demo with its claims, the 20-kill stress, the over-fitting tests at 224 px.
# usage: bash tests/acceptance.sh [demo|stress|slow|clean]...   (default: all; SAMPLE_ROOT=DIR adds real photos)
set -eu
cd "$(dirname "$0")/.."
REQUIREMENTS=requirements-dev.txt
. ./setup.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

check_demo() { # every arm beats the trivial predictors, every MAE arm also the mean training mask
  "$PYTHON" - "$1" <<'PY'
import json, sys
from pathlib import Path
import numpy as np
from metrics import dataset_scores
study = Path(sys.argv[1])
reference = np.load(study / "reference.npz")
iou = {name: float(dataset_scores(reference[f"counts_{name}"])["iou"]) for name in ("all_animal", "all_background", "mean_mask")}
trivial, failed = max(iou["all_animal"], iou["all_background"]), []
for line in (study / "study.tsv").read_text().splitlines()[1:]:
    _, stage, arm, folder = line.split("\t")[:4]
    if stage == "pretrain":
        metrics = json.loads((study / folder / "metrics.json").read_text())
        good = all(metrics["last"][f"loss_{k}"] < 0.95 * v for k, v in metrics["predict_zero"].items())
        print(f"{arm}: pre-training {'ends below' if good else 'DOES NOT END BELOW'} predicting zero")
    else:
        score = float(dataset_scores(np.load(study / folder / "test.npz")["counts"])["iou"])
        bound = trivial if arm == "resnet50" else max(trivial, iou["mean_mask"])
        good = score > bound
        print(f"{arm}: test IoU {score:.3f} {'beats' if good else 'DOES NOT BEAT'} {bound:.3f}")
    failed += [] if good else [arm]
sys.exit(bool(failed))
PY
}

for part in ${*:-clean demo stress slow}; do
  case $part in
    clean) # from a clone with nothing installed; the suite leaves no file behind
      git clone -q . "$folder/clone"
      (cd "$folder/clone" && bash .ci/run && test -z "$(git status --porcelain)") ;;
    demo)
      start=$SECONDS
      bash run_all.sh --demo --output "$folder/demo" --cache_dir "$folder/cache"
      echo "demo: $((SECONDS - start)) s"
      check_demo "$folder/demo"
      if [ -n "${SAMPLE_ROOT:-}" ]; then
        bash run_all.sh --demo --data_root "$SAMPLE_ROOT" --output "$folder/photos" --cache_dir "$folder/cache"
        check_demo "$folder/photos"
      fi ;;
    stress) "$PYTHON" tests/stress.py 20 ;;
    slow) "$PYTHON" -m pytest tests -q -m slow -s -p no:cacheprovider ;;
    *) echo "acceptance.sh: error: unknown part $part" >&2; exit 2 ;;
  esac
done
echo "acceptance: everything held"
