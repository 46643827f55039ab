#!/usr/bin/env bash
# Format, lint, types and tests in one go. Arguments go to pytest. SKIP_SETUP=1 uses the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
export OMP_NUM_THREADS=1
ruff format --check .
ruff check .
mypy
python -m pytest "$@"
