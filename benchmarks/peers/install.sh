#!/usr/bin/env bash
# An environment for one peer:  install.sh trl|verl FOLDER
# torch is the CPU build; torchvision, which transformers' image processors of these versions want, is linked to CUDA
# libraries and imports beside it only if two of its operators are declared first.
set -euo pipefail
peer=$1 folder=$2
[ -e "$folder/ready" ] && exit 0
python3 -m venv "$folder"
pip() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
case $peer in
  trl) pip torch==2.13.0 trl==1.16.0 transformers==5.19.0 pillow datasets ;;
  verl) pip torch==2.13.0 verl==0.9.1 pillow datasets ;;
  *) echo "unknown peer $peer; known: trl, verl" >&2; exit 2 ;;
esac
pip --no-deps torchvision==0.28.0
cp "$(dirname "$0")/declare_operators.py" "$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/"
echo 'import declare_operators' > "$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/declare_operators.pth"
touch "$folder/ready"
