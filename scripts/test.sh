#!/usr/bin/env bash
# Installs what the tests need into .venv, PyTorch and Diffusers included, and runs ruff, pyright and the tests.
#   bash scripts/test.sh [pytest arguments], for instance -m "not slow" or -n 8
# Versions are those of constraints.txt; with CONSTRAINTS= they are the newest that pyproject.toml allows.
CONSTRAINTS=${CONSTRAINTS-constraints.txt}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_env "parity,server,test"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
"$VENV/bin/pyright" --pythonpath "$VENV/bin/python"
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
