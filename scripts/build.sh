#!/usr/bin/env bash
# Builds the release preset: library and Python extension, with --tests the C++ tests too. CUDA
# kernels are built for the GPUs of this machine; without a GPU, or without nvcc, the CPU backend
# alone. SPARSEK_CMAKE_ARGS adds arguments to CMake's.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH:/usr/local/cuda/bin"

options=(-DPython_EXECUTABLE="$PWD/.venv/bin/python")
if [ "${1:-}" = --tests ]; then options+=(-DSPARSEK_BUILD_TESTS=ON); fi
if command -v ccache >/dev/null; then
  options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
fi

# The architectures of the GPUs here, as CMake spells them: "90a", or "80;90a" for two kinds. Empty without a GPU.
gpu_architectures() {
  command -v nvidia-smi >/dev/null || return 0
  local capabilities
  capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || return 0
  # Hopper's wgmma needs the architecture-specific target.
  sort -u <<<"$capabilities" | tr -d . | sed 's/^90$/90a/' | paste -sd ';'
}
architectures=$(gpu_architectures)
if [ -z "$architectures" ]; then
  options+=(-DSPARSEK_CUDA=off)
elif ! command -v nvcc >/dev/null; then
  echo "build: this machine has a GPU but no nvcc on PATH: building the CPU backend alone (CUDA toolkit >= 12.8 needed)"
  options+=(-DSPARSEK_CUDA=off)
else
  echo "build: CUDA kernels for $architectures"
  options+=(-DSPARSEK_CUDA=on "-DSPARSEK_CUDA_ARCHITECTURES=$architectures")
fi

log=build/build.log
mkdir -p build
echo "build: release preset (log: $log)"
# shellcheck disable=SC2086  # SPARSEK_CMAKE_ARGS is a list of words
if ! { cmake --preset release "${options[@]}" ${SPARSEK_CMAKE_ARGS:-} && cmake --build --preset release; } >$log 2>&1; then
  tail -n 60 $log >&2
  echo "build: failed; the whole log is in $log" >&2
  exit 1
fi

# Whoever runs .venv/bin/python imports the package from the build tree.
site_packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$PWD/build/release/python" >"$site_packages/sparsek_build.pth"
