"""How long 3,500 prompts with pictures take to be filtered by length, for each family that sees pictures.

    python benchmarks/length_filter.py [--rows 3500] [--model FOLDER ...]

Each row has one JPEG file of its own, and every seventh has four. Nothing but their headers is read. Two times are
told, on the clock and of processor time: the filter alone, as a run makes it before its first step, and the whole
command `foveate prepare filter`, which starts Python, checks every row, and writes what stays. The filter alone must
take less than 10 s on the clock. By default the models are tiny ones of InternVL and of Qwen3-VL.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa

from foveate.config.data import DataSettings
from foveate.data.table import row_schema, write_rows
from foveate.encoding.dataset import read_checked
from foveate.models.checkpoint.inspect import load_encoder
from foveate.models.tiny import build_tiny

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from family_cases import build_family

LIMIT_S = 10.0
PROMPT_TOKENS = 2048
TEXT = "Please look at the picture and tell how many of the small red things are left of the large blue one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3500)
    parser.add_argument("--model", type=Path, action="append", help="model folder; may be given several times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="foveate-length-") as name:
        folder = Path(name)
        file = make_rows(folder, options.rows)
        worst = 0.0
        for model in options.model or tiny_models(folder):
            took, used, kept = filter_alone(file, model)
            worst = max(worst, took)
            print(f"{model.name}: the filter {took:.2f} s ({used:.2f} s of processor time), {kept} rows stay", end="; ")
            took, used = whole_command(file, model, folder / f"out-{model.name}")
            print(f"`prepare filter` {took:.2f} s ({used:.2f} s); load {os.getloadavg()[0]:.1f}")
        if worst > LIMIT_S:
            raise SystemExit(f"{worst:.1f} s on the clock, more than {LIMIT_S:.0f}")


def make_rows(folder: Path, rows: int) -> Path:
    """A parquet file of rows with JPEG files of 64 to 1,600 pixels a side."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()

    def picture(name: str) -> str:
        path = folder / "images" / f"{name}.jpg"
        width, height = (int(side) for side in rng.integers(64, 1600, 2))
        PIL.Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist())).save(path, quality=30)
        return str(path)

    def generate():
        for index in range(rows):
            images = [picture(f"{index}-{i}") for i in range(4 if index % 7 == 0 else 1)]
            words = " ".join(rng.choice(TEXT.split(), int(rng.integers(5, 60))))
            yield {
                "data_source": "test",
                "prompt": [{"role": "user", "content": "<image>\n" * len(images) + words}],
                "images": images,
                "ability": "counting",
                "reward_model": {"style": "rule", "ground_truth": "3"},
                "extra_info": {"id": str(index)},
            }

    write_rows(folder / "rows.parquet", generate(), row_schema(pa.string(), {"id": pa.string()}))
    return folder / "rows.parquet"


def tiny_models(folder: Path) -> list[Path]:
    return [build_tiny(folder / "InternVL"), build_family(folder / "Qwen3-VL", "qwen3_vl")]


def filter_alone(file: Path, model: Path) -> tuple[float, float, int]:
    """Seconds on the clock and of processor time that a run takes to read its file and drop the rows that are too long,
    and the rows that stay."""
    begin, busy = time.perf_counter(), processor_seconds()
    encoder = load_encoder(str(model), max_tiles=None, max_prompt_tokens=PROMPT_TOKENS)
    data = DataSettings(train=(str(file),), max_prompt_tokens=PROMPT_TOKENS, on_bad_row="skip")
    table, _ = read_checked([str(file)], data, encoder, None)
    return time.perf_counter() - begin, processor_seconds() - busy, len(table)


def whole_command(file: Path, model: Path, out: Path) -> tuple[float, float]:
    """Seconds on the clock and of processor time of `foveate prepare filter`."""
    begin, busy = time.perf_counter(), processor_seconds()
    command = [sys.executable, "-c", "from foveate.cli.app import main; main()", "prepare", "filter", str(file)]
    options = ["--out", str(out), "--model", str(model), "--max-prompt-tokens", str(PROMPT_TOKENS)]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin, processor_seconds() - busy


def processor_seconds() -> float:
    """Of this process and its children that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
