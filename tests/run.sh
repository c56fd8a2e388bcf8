#!/usr/bin/env bash
# Sets up the environment and runs everything that needs no GPU. SAMPLE_ROOT=DIR adds the tests on real photos.
set -eu
cd "$(dirname "$0")/.."
REQUIREMENTS=requirements-dev.txt
. ./setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest tests -q --durations=10 -p no:cacheprovider "$@"
