#!/usr/bin/env bash
# Installs the project with each Python and with both ends of its range of JAX into virtual environments of their own,
# and runs the quick tests in each. Ends with a table. Needs uv (pip install uv), which finds or downloads the Pythons.
#   bash scripts/test_pythons.sh [PYTHON:JAX ...]        for instance 3.12:0.11.2; PYTHON may be the path of one
#   PYTEST="-n 2 tests/convert" bash scripts/test_pythons.sh 3.13:0.11.2
# FOLDER holds the environments, which are made anew; the default is a temporary one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# the lowest JAX with the oldest Python; the highest, which is not there for 3.11, with the others
pairs=("$@")
[ $# -gt 0 ] || pairs=(3.11:0.10.0 3.12:0.11.2 3.13:0.11.2)
read -ra tests <<< "${PYTEST:--n 2 --dist loadfile --no-loadscope-reorder}"
command -v uv > /dev/null || { echo "uv is missing: pip install uv" >&2; exit 1; }
folder=${FOLDER:-$(mktemp -d)}
[ -n "${FOLDER:-}" ] || trap 'rm -rf "$folder"' EXIT
table=() failed=0
for pair in "${pairs[@]}"; do
  python=${pair%:*} jax=${pair##*:} env="$folder/$(basename "${pair%:*}")-${pair##*:}"
  echo "== Python $python, JAX $jax"
  uv venv --quiet --clear --python "$python" "$env"
  uv pip install --quiet --python "$env/bin/python" -e '.[test]' "jax==$jax"
  started=$SECONDS status=passed
  "$env/bin/python" -m pytest -m "not slow" -p no:cacheprovider "${tests[@]}" || { status=failed; failed=1; }
  table+=("$("$env/bin/python" -c 'import jax, platform; print("Python", platform.python_version(), "JAX", jax.__version__)'): \
$status in $((SECONDS - started)) s")
done
printf '%s\n' "${table[@]}"
exit $failed
