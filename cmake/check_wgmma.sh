#!/bin/sh
# Runs a CUDA compiler command and fails where ptxas notes that it serialised warpgroup matrix instructions (C7510 ... C7520): such code is
# right but 10 - 30 % slower, and the note shows with -Xptxas=-v only. Other notes of -v are dropped.
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$@" 2>"$log"
status=$?
grep -vE '^ptxas info +: (Compiling entry|Function properties|Used [0-9]+ registers|Compile time|[0-9]+ bytes [gs]mem|\(C75)|^ +[0-9]+ bytes stack frame|^$' "$log" >&2
if grep -E '\(C75(1[0-9]|20)\)' "$log" >&2; then
  echo "error: the compiler serialised wgmma instructions (see above)" >&2
  exit 1
fi
exit $status
