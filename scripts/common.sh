# Sourced by the scripts beside it: a virtual environment in .venv (or $VENV) with this project and some extras.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}

make_env() {  # make_env EXTRAS: creates the environment once, installs again only when pyproject.toml changed
  local python=${PYTHON:-python3} stamp
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; $("$python" --version) was found. Set PYTHON=/path/to/python3.11" >&2; exit 1; }
  stamp="$VENV/.installed-$(cksum pyproject.toml | cut -d' ' -f1)-$1"
  if [ ! -e "$stamp" ]; then
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip
    "$VENV/bin/python" -m pip install --quiet -e ".${1:+[$1]}"
    touch "$stamp"
  fi
}
