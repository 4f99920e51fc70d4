#!/usr/bin/env bash
# Runs a command with the Python package, whose extension is first compiled against the libraries of scripts/gpu_build.sh:
# for a machine with a GPU and PyTorch, where compiling the CUDA kernels would take long.
#   scripts/gpu_python.sh python3 -m pytest tests/python -q
#   scripts/gpu_python.sh python3 benchmarks/bench_forward.py
# PYTHON names the interpreter (python3), which needs torch, nanobind, cmake and ninja; SPARSEK_GPU_DIR the libraries'
# folder (.carry/gpu); SPARSEK_GPU_BUILD the build folder (in TMPDIR, reused by the next call).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
libraries=$PWD/${SPARSEK_GPU_DIR:-.carry/gpu}
build=${SPARSEK_GPU_BUILD:-${TMPDIR:-/tmp}/sparsek-gpu-python}
if [ ! -f "$libraries/libsparsek.a" ]; then
  echo "gpu_python: no $libraries/libsparsek.a: run scripts/gpu_build.sh first" >&2
  exit 1
fi

# Tools that pip installed beside the interpreter.
PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
export PATH
mkdir -p "$build"
if ! { cmake -S bindings -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "-DPython_EXECUTABLE=$(command -v "$python")" \
  "-DSPARSEK_PREBUILT=$libraries/libsparsek.a" \
  "-DSPARSEK_CUDA_LIBRARIES=$libraries/libcudart_static.a;dl;rt" &&
  cmake --build "$build"; } >"$build/build.log" 2>&1; then
  tail -n 40 "$build/build.log" >&2
  echo "gpu_python: failed; the whole log is in $build/build.log" >&2
  exit 1
fi

if [ -f "$libraries/revision" ]; then
  SPARSEK_REVISION=$(<"$libraries/revision")
  export SPARSEK_REVISION
fi
export PYTHONPATH=$build/python${PYTHONPATH:+:$PYTHONPATH}
exec "$@"
