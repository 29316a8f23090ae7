# Sourced by the other scripts: makes a virtual environment in .venv (or $VENV) with this project and extras.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}

make_env() {  # make_env EXTRAS: makes the environment once, and installs again only if pyproject.toml changed
  local python=${PYTHON:-python3} stamp
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is $("$python" --version), expected Python 3.11 or newer: set PYTHON=/path/to/python3.11" >&2; exit 1; }
  stamp="$VENV/.installed-$(cksum pyproject.toml | cut -d' ' -f1)-$1"
  if [ ! -e "$stamp" ]; then
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip
    # setuptools warns of every editable installation, pip --quiet or not
    PYTHONWARNINGS="ignore:Editable installation${PYTHONWARNINGS:+,$PYTHONWARNINGS}" \
      "$VENV/bin/python" -m pip install --quiet -e ".${1:+[$1]}" ${CONSTRAINTS:+-c "$CONSTRAINTS"}
    touch "$stamp"
  fi
}
