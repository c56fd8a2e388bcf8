#!/usr/bin/env bash
# Sets up the environment and runs everything that needs no GPU. SAMPLE_ROOT=DIR adds the tests on real photos.
set -eu
cd "$(dirname "$0")/.."
REQUIREMENTS=requirements-dev.txt
. ./setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
export REHEARSE=${REHEARSE-1} # the tests for GPUs run on the CPU
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # files of tests run side by side
SEED=${SEED:-0} # of the random cases: the same ones in every run, others with SEED=N
exec "$PYTHON" -m pytest tests -q --hypothesis-seed="$SEED" --durations=10 -p no:cacheprovider -n auto --maxprocesses 4 --dist loadfile "$@"
