#!/usr/bin/env bash
# Builds what a machine with a Hopper GPU needs to check and time the CUDA code, on a machine that may have none:
# the programs sparsek_cuda_* and the static libraries that scripts/gpu_python.sh links the Python extension with. The
# result lies in SPARSEK_GPU_DIR (.carry/gpu), stripped; SPARSEK_GPU_BUILD names the build folder (build/gpu),
# SPARSEK_CUDA_ARCHITECTURES other architectures than 90a, SPARSEK_CMAKE_ARGS arguments for CMake, JOBS limits the
# compilers that run at once.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH:/usr/local/cuda/bin"

if ! command -v nvcc >/dev/null; then
  echo "gpu_build: no nvcc on PATH (CUDA toolkit >= 12.8 needed)" >&2
  exit 1
fi

build=${SPARSEK_GPU_BUILD:-build/gpu} out=${SPARSEK_GPU_DIR:-.carry/gpu} log=${SPARSEK_GPU_BUILD:-build/gpu}.log
options=(-DCMAKE_BUILD_TYPE=Release -DSPARSEK_CUDA=on -DSPARSEK_BUILD_TESTS=ON -DSPARSEK_BUILD_BENCHMARKS=ON
  "-DSPARSEK_CUDA_ARCHITECTURES=${SPARSEK_CUDA_ARCHITECTURES:-90a}")
if command -v ccache >/dev/null; then
  options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
fi
mkdir -p build "$out"

# shellcheck disable=SC2086  # SPARSEK_CMAKE_ARGS is a list of words
if ! { cmake -S . -B "$build" -G Ninja "${options[@]}" ${SPARSEK_CMAKE_ARGS:-} &&
  cmake --build "$build" ${JOBS:+-j "$JOBS"} --target sparsek sparsek_gpu_programs; } >"$log" 2>&1; then
  grep -a -m 20 -E '(error|undefined reference)' "$log" >&2 || true
  tail -n 20 "$log" >&2
  echo "gpu_build: failed; the whole log is in $log" >&2
  exit 1
fi

# The runtime that the library was compiled for, beside it.
cudart=$(sed -n 's/^CUDA_cudart_static_LIBRARY:[A-Z]*=//p' "$build/CMakeCache.txt")
cp "$build/libsparsek.a" "$cudart" "$build"/tests/cpp/sparsek_cuda_* "$build"/benchmarks/sparsek_cuda_* "$out"
# What results are labelled with on a machine that has no clone.
git describe --always --dirty --abbrev=12 --exclude='*' >"$out/revision" 2>/dev/null || rm -f "$out/revision"
strip --strip-debug "$out"/*.a
strip "$out"/sparsek_cuda_*
du -sh "$out"
