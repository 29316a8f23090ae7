#!/usr/bin/env bash
# Installs what the tests need into .venv, PyTorch and Diffusers included, and runs ruff and the tests.
#   bash scripts/test.sh [pytest arguments], for instance -m "not slow" or -n 8
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_env "parity,server,test"
"$VENV/bin/ruff" check .
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
