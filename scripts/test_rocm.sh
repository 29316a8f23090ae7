#!/usr/bin/env bash
# Compiles the training functions for MI300X (gfx942) with XLA's ROCm compiler, in a virtual environment of its own with
# JAX's ROCm plugin. Needs Linux, gcc and readelf, but no GPU and no ROCm. Ends with a table of times and memory.
#   bash scripts/test_rocm.sh [pytest arguments]
VENV=${VENV:-.venv-rocm}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for tool in gcc readelf; do
  command -v "$tool" > /dev/null || { echo "$tool is missing: apt-get install gcc binutils" >&2; exit 1; }
done
make_env "rocm,test"
source scripts/rocm_env.sh
exec "$VENV/bin/python" -m pytest -m rocm "$@" tests/rocm
