#!/usr/bin/env bash
# The tests: bash test.sh [pytest arguments]. Makes .venv if no virtual environment is active, installs what is missing.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
python -m ruff check --quiet .
exec python -m pytest -q "$@"
