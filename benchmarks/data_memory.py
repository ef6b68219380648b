"""How much memory a long grounding dataset takes while it streams.

    python benchmarks/data_memory.py [--rows 1000000] [--batches 2000] [--batch 256]

Writes rows with a handful of pictures by path, opens them, takes shuffled batches over all of the file, and prints the
resident memory (VmRSS, and its peak VmHWM) after each phase: after the imports (PyTorch included), after opening, and
while streaming. With `--one-group` the file has a single row group, as some other tools write it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq

from foveate.data.stream import Stream
from foveate.data.table import BOX, open_tasks, row_schema, write_rows
from foveate.datasets.grounding import EXTRA_INFO

SCHEMA = row_schema(BOX, EXTRA_INFO)


def write(file: Path, rows: int) -> None:
    """Rows as `foveate prepare grounding` writes them."""
    for number in range(50):
        PIL.Image.new("RGB", (640, 480)).save(file.parent / f"{number}.jpg")

    def generate():
        rng = np.random.default_rng(0)
        for index in range(rows):
            x, y = rng.uniform(0, 500, 2).tolist()
            sent = f"the object number {index} that stands to the left of number {index + 1}"
            yield {
                "data_source": "grounding",
                "prompt": [{"role": "user", "content": f"<image>\nLocate <ref>{sent}</ref>"}],
                "images": [str(file.parent / f"{index % 50}.jpg")],
                "ability": "grounding",
                "reward_model": {"style": "rule", "ground_truth": [x, y, x + 300, y + 200]},
                "extra_info": {"split": "train", "index": index, "id": str(index), "height": 480, "width": 640,
                               "question": sent, "dataset": "synthetic"},
            }  # fmt: skip

    write_rows(file, generate(), SCHEMA)


def memory() -> str:
    """Resident memory of this process now and at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return f"{now:.0f} MB, peak {peak:.0f} MB"


def stream(file: Path, batches: int, batch: int) -> None:
    print(f"imports: {memory()}")
    begin = time.perf_counter()
    table = open_tasks(file)
    order = Stream(len(table), 0, batch, source_of=table.path_of)
    print(f"open, {len(table)} rows: {memory()}; {time.perf_counter() - begin:.1f} s")
    begin, busy = time.perf_counter(), time.process_time()
    for number in range(1, batches + 1):
        tasks = [table[index] for index in order.draw()]
        if number in (batches // 4, batches // 2, batches):
            print(f"{number} batches of {len(tasks)}, shuffled: {memory()}")
    rows = batches * batch
    busy = (time.process_time() - busy) / rows
    print(f"{rows} rows in {time.perf_counter() - begin:.1f} s; {1e3 * busy:.2f} ms of CPU per row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--one-group", action="store_true", help="stream a file with one row group")
    parser.add_argument("--file", type=Path, help="stream this file (used by the script for a process of its own)")
    options = parser.parse_args()
    if options.file is not None:
        stream(options.file, options.batches, options.batch)
        return
    folder = Path(tempfile.mkdtemp(prefix="foveate-memory-"))
    try:
        file = folder / "train.parquet"
        begin = time.perf_counter()
        write(file, options.rows)
        print(f"written in {time.perf_counter() - begin:.0f} s, {file.stat().st_size / 1e6:.0f} MB on disk")
        if options.one_group:
            pq.write_table(pq.read_table(file), file, row_group_size=options.rows)
        again = [sys.executable, __file__, "--file", str(file), "--batches", str(options.batches)]
        subprocess.run([*again, "--batch", str(options.batch)], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
