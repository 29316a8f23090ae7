#!/usr/bin/env bash
# Installs what the tests need (PyTorch and Diffusers as peers included) into .venv and runs them.
#   bash scripts/test.sh [pytest arguments], for instance -m "not slow", or -n 8
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_env "parity,server,test"
"$VENV/bin/ruff" check .
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
