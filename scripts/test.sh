#!/usr/bin/env bash
# Runs the C++ tests (ctest) and the Python tests (pytest, which gets this script's arguments) of the release build.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

status=0
# Of several hundred C++ tests only the failures and the summary are shown.
ctest --preset release | grep -vE '^ *Start |Passed ' || status=$?
python -m pytest tests/python "$@" || status=$?
exit $status
