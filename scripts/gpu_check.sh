#!/usr/bin/env bash
# What has to be run on a machine with a GPU before CUDA code counts as done, after scripts/gpu_build.sh elsewhere:
#   scripts/gpu_check.sh [check] [sanitize] [python] [bench]     default: all four, in this order
# check     every row of the case tables and the adversarial ones, every stage and backend, against the fp64 reference
# sanitize  compute-sanitizer's memcheck and racecheck over the small rows
# python    the tests that need a GPU
# bench     make bench's program with every peer; its JSON
# Logs and JSON go to OUT (benchmarks/results/gpu). Every step runs even if an earlier one failed; the last line says how many did.
set -uo pipefail
cd "$(dirname "$0")/.."

programs=${SPARSEK_GPU_DIR:-.carry/gpu}
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
chmod +x "$programs"/sparsek_cuda_*
failed=()

step() {  # step <name> <command ...>
  local name=$1 start=$SECONDS
  shift
  echo "=== $name"
  if "$@" >"$out/$name.txt" 2>&1; then
    tail -n 12 "$out/$name.txt"
    echo "=== $name: passed in $((SECONDS - start)) s"
  else
    failed+=("$name")
    tail -n 60 "$out/$name.txt"
    echo "=== $name: FAILED after $((SECONDS - start)) s"
  fi
}

quick=(--quick --guard-bytes 0 --timeout 300)
for what in ${*:-check sanitize python bench}; do
  case $what in
    check)
      for program in "$programs"/sparsek_cuda_*check; do step "${program##*/sparsek_cuda_}" "$program"; done
      ;;
    sanitize)
      for program in "$programs"/sparsek_cuda_{check,backward_check}; do
        for tool in memcheck racecheck; do
          step "${program##*/sparsek_cuda_}-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$program" "${quick[@]}"
        done
      done
      for tool in memcheck racecheck; do
        step "decode_check-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$programs/sparsek_cuda_decode_check" --quick
      done
      ;;
    python) step python scripts/gpu_python.sh python3 -m pytest tests/python -q -k "cuda and not inductor" ;;
    bench)
      step bench scripts/gpu_python.sh python3 benchmarks/bench_forward.py --peers all --output "$out/forward.json"
      ;;
    *)
      echo "gpu_check: unknown step $what" >&2
      exit 2
      ;;
  esac
done
if ((${#failed[@]})); then
  echo "gpu_check: failed: ${failed[*]}"
  exit 1
fi
echo "gpu_check: all passed"
