#!/usr/bin/env bash
# All that needs a GPU in one command, within eight minutes: the tests marked `gpu`, then the search's
# figures and its share of a prefill. From the root of the repository:
#
#     PYTHON=.venv/bin/python OUT=build/gpu benchmarks/gpu.sh
#
# Texts are left in $OUT. Fails where there is no GPU, a test fails, or one of them takes too long.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-build/gpu}
mkdir -p "$out"

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "no CUDA device is visible to $python; nothing was run" >&2
  exit 1
}
status=0
timeout 200 "$python" -m pytest -m gpu -q -rs tests/vqguard 2>&1 | tee "$out/tests.txt" || status=1
timeout 260 "$python" -m benchmarks.search_cuda 2>&1 | tee "$out/search.txt" || status=1
exit "$status"
