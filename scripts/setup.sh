#!/usr/bin/env bash
# Prepares this machine and .venv; what is there already is left alone, so a second call takes a moment.
#
#   scripts/setup.sh [--tests] [--dev]
#
# --tests  also GoogleTest, for the C++ tests, and requirements-hf.txt, for tests that are skipped without it
# --dev    also the packages of requirements-dev.txt
#
# PYTHON names the interpreter (default: python3). One that has torch >= 2.10 is used with its own
# packages: torch is not downloaded, and only what is missing is installed. Otherwise
# requirements.txt is installed as pinned.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
python=${PYTHON:-python3}
venv_python=.venv/bin/python

tests=false
dev=false
for argument in "$@"; do
  case $argument in
    --tests) tests=true ;;
    --dev) dev=true ;;
    *) echo "setup.sh: unknown argument $argument" >&2; exit 2 ;;
  esac
done

say() { echo "setup: $*"; }

has_gtest() { echo '#include <gtest/gtest.h>' | c++ -x c++ -std=c++20 -fsyntax-only - 2>/dev/null; }
has_python_headers() {
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

install_system_packages() {
  local missing=()
  command -v c++ >/dev/null || missing+=(build-essential)
  if ! command -v "$python" >/dev/null; then
    missing+=(python3 python3-venv python3-dev)
  else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    has_python_headers || missing+=(python3-dev)
  fi
  if $tests && ! { command -v c++ >/dev/null && has_gtest; }; then missing+=(libgtest-dev); fi
  if [ ${#missing[@]} -eq 0 ]; then return; fi

  local install="apt-get install -y --no-install-recommends ${missing[*]}"
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    say "missing system packages; install them and repeat, on Debian and Ubuntu with" >&2
    echo "  sudo $install" >&2
    exit 1
  fi
  say "$install"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive $install -qq; } >/dev/null
}

# Creates .venv. Where the interpreter has a recent torch, .venv sees that interpreter's packages:
# through --system-site-packages if it is the system's, through a .pth file if it lives in a virtual
# environment of its own.
create_venv() {
  if [ -x $venv_python ]; then return; fi
  local torch_folder
  torch_folder=$("$python" -c 'import os, torch
assert tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 10)
print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null || true)
  if [ -z "$torch_folder" ]; then
    say "creating .venv with $("$python" --version)"
    "$python" -m venv .venv
    return
  fi
  say "creating .venv on top of $(command -v "$python"), whose torch is used as it is"
  "$python" -m venv --system-site-packages .venv
  if ! $venv_python -c 'import torch' 2>/dev/null; then
    echo "$torch_folder" >"$($venv_python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_from.pth"
  fi
  local tool folder
  folder=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))')
  for tool in cmake ctest ninja; do
    if [ -x "$folder/$tool" ]; then ln -s "$folder/$tool" .venv/bin/; fi
  done
  touch .venv/adopted
}

# install_missing <requirements file>...: the pins that the environment does not meet. Its callers ask for its status, which
# turns `set -e` off inside.
install_missing() {
  local options=()
  if [ -e .venv/adopted ]; then options+=(--any-version); fi
  local missing
  missing=$($venv_python scripts/missing_packages.py "${options[@]}" "$@") || return 1
  if [ -z "$missing" ]; then return; fi
  mapfile -t missing <<<"$missing"
  say "installing ${missing[*]}"
  if ! $venv_python -m pip install -qq --disable-pip-version-check "${missing[@]}"; then
    say "pip could not install: ${missing[*]}" >&2
    return 1
  fi
}

install_python_packages() {
  local files=(requirements.txt)
  if $dev; then files+=(requirements-dev.txt); fi
  if ! install_missing "${files[@]}"; then
    say "without a network, point PIP_FIND_LINKS at a folder that holds these wheels and set PIP_NO_INDEX=1" >&2
    exit 1
  fi
  if $tests && ! install_missing requirements-hf.txt; then
    say "the tests that need it will be skipped" >&2
  fi
}

install_system_packages
create_venv
install_python_packages
