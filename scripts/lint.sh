#!/usr/bin/env bash
# Format, lint and spelling of every tracked source. With --fix the formatters and ruff rewrite files instead.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

mapfile -t sources < <(git ls-files '*.cc' '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh')
if [ "${1:-}" = --fix ]; then
  clang-format -i "${sources[@]}"
  ruff check --quiet --fix .
  ruff format --quiet .
  exit
fi
clang-format --dry-run -Werror "${sources[@]}"
ruff check --quiet .
ruff format --quiet --check .
mapfile -t texts < <(git ls-files)
codespell "${texts[@]}"
echo "lint: ${#sources[@]} C++ and CUDA sources formatted, ruff and codespell clean"
