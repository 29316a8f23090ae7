#!/usr/bin/env bash
# Installs the project into .venv, converts the small Wan in assets/tiny-wan, trains it on the CPU for about five minutes,
# and prints the held-out reward before and after.
#   bash scripts/quickstart.sh [--config.KEY=VALUE ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
echo "== installing into $VENV"
make_env ""
started=$SECONDS
echo "== converting assets/tiny-wan"
"$VENV/bin/python" -m convert.from_diffusers --src assets/tiny-wan --dst models/tiny-wan --dtype float32 --overwrite
echo "== training"
"$VENV/bin/python" -m grpo.train --config=configs/quickstart.py "$@"
echo "== done in $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s after the installation"
