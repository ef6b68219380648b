#!/usr/bin/env bash
# SGLang's server, scheduler and weight code on CPUs, in a virtual environment of its own, for the tests of the engine.
# Its kernels are not among what PyPI has for CPUs: they are stood in for by scripts/sgl_kernel, and what runs is
# torch's own attention. This says nothing about the speed or the rounding of the kernels that SGLang ships.
#
#   scripts/install_sglang_cpu.sh VENV
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 VENV" >&2; exit 2; }
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
sglang=${SGLANG:-0.5.23} torch=${TORCH:-2.13.0} torchvision=${TORCHVISION:-0.28.0}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

pip --no-deps "sglang==$sglang" "torchvision==$torchvision"
pip "torch==$torch+cpu" 2>/dev/null || pip --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
pip --no-deps -r "$here/sglang_cpu_requirements.txt"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/torchvision_on_cpu.py" "$site/"
echo 'import torchvision_on_cpu' > "$site/torchvision_on_cpu.pth"
rm -rf "$site/sgl_kernel"
cp -r "$here/sgl_kernel" "$site/"
SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -c 'import sglang.srt.server_args, torch; print("sglang", sglang.__version__, "torch", torch.__version__)'
