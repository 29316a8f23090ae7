#!/usr/bin/env bash
# Builds the documentation site into docs/_build/html, in the virtual environment .venv. A warning is an error: links and
# anchors between pages, images and references must exist. Nothing is asked of the network.
#   bash scripts/docs.sh [arguments of sphinx-build]
CONSTRAINTS=${CONSTRAINTS-constraints.txt}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_env "docs"
"$VENV/bin/python" -m sphinx --fail-on-warning --quiet --fresh-env -b html "$@" docs docs/_build/html
echo "the site is docs/_build/html/index.html"
