#!/usr/bin/env bash
# Builds the source distribution, the wheel from it, and an environment outside the clone with that wheel alone; then the
# journeys of tests/test_journeys.py run there. `scripts/fresh_install.sh FOLDER` keeps the environment in FOLDER/venv.
set -euo pipefail
clone=$(cd "$(dirname "$0")/.." && pwd)
place=${1:-$(mktemp -d)}
mkdir -p "$place"
${PYTHON:-python3} -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet build
rm -rf "$place/dist"
"$place/venv/bin/python" -m build --outdir "$place/dist" "$clone" > "$place/build.log"
"$place/venv/bin/pip" install --quiet -c "$clone/constraints.txt" "$(echo "$place"/dist/*.whl)[math,serve]" datasets nbclient ipykernel
cd "$place"
venv/bin/foveate --version
venv/bin/foveate doctor demo > doctor.txt
cd "$clone"
FOVEATE_JOURNEY_PYTHON="$place/venv/bin/python" .venv/bin/python -m pytest -m journey tests/test_journeys.py --durations=0
