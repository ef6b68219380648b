#!/usr/bin/env bash
# Writes locks/*.txt anew: every package of `foveate[all]` with its version, for Linux on x86-64 and Python 3.11, from the
# versions in constraints.txt. It reads descriptions of packages only and downloads none. It needs `uv` (pip install uv)
# and, for the CPU, an index that has torch+cpu: `scripts/lock.sh [--find-links FOLDER]` where that one is not reachable.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p locks
pytorch=https://download.pytorch.org/whl/cpu
cpu=("$@")
[ ${#cpu[@]} -gt 0 ] || cpu=(--extra-index-url "$pytorch" --index-strategy unsafe-best-match)
torch=$(sed -n 's/^torch==//p' constraints.txt)

compile() {
  uv pip compile pyproject.toml --extra all --constraints constraints.txt --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet "$@"
}

{
  echo "# scripts/lock.sh: Linux on x86-64, Python 3.11, NVIDIA GPUs. pip install -r locks/cuda.txt && pip install --no-deps ."
  compile
} > locks/cuda.txt.new
{
  echo "# scripts/lock.sh: Linux on x86-64, Python 3.11, CPU alone. pip install -r locks/cpu.txt && pip install --no-deps ."
  echo "--extra-index-url $pytorch"
  compile --override <(echo "torch==$torch+cpu") "${cpu[@]}"
} > locks/cpu.txt.new
mv locks/cuda.txt.new locks/cuda.txt
mv locks/cpu.txt.new locks/cpu.txt
