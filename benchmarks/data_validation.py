"""How long it takes to check rows before a run: headers of pictures on disk, marks, ground truth, and prompt length.

    python benchmarks/data_validation.py [--rows 100000] [--workers 2]

Every row has a picture file of its own. Prints the seconds of writing, of checking with one and with `workers`
processes, and of `prepare filter` (check, length filter, write), and the rows per second.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa

from foveate.data.table import BOX, open_tasks, row_schema, write_rows
from foveate.data.validate import ReadOptions, RowInspection, inspect_rows
from foveate.datasets.filter import Limits, prepare_filter
from foveate.encoding.dataset import RowCheck
from foveate.models.checkpoint.inspect import load_encoder
from foveate.models.tiny import TinySize, build_tiny
from foveate.rewards.boxes import check_box

TEXT = "the large small red blue green left right upper lower person dog chair cup bicycle near behind with of a"
WORDS = TEXT.split()


def make_rows(folder: Path, rows: int) -> Path:
    """Rows of the schema with a JPEG file each; the files are copies of 64 pictures of different sizes."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(64):
        width, height = (int(side) for side in rng.integers(64, 1280, 2))
        encoded = io.BytesIO()
        PIL.Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist())).save(encoded, "JPEG", quality=30)
        pictures.append(encoded.getvalue())
    (folder / "images").mkdir(parents=True)

    def generate():
        for index in range(rows):
            path = folder / "images" / f"{index}.jpg"
            path.write_bytes(pictures[index % len(pictures)])
            sent = " ".join(rng.choice(WORDS, int(rng.integers(3, 40))))
            x, y = rng.uniform(0, 500, 2)
            yield {
                "data_source": "grounding",
                "prompt": [{"role": "user", "content": f"<image>\nLocate <ref>{sent}</ref>"}],
                "images": [str(path)],
                "ability": "grounding",
                "reward_model": {"style": "rule", "ground_truth": [x, y, x + 300, y + 200]},
                "extra_info": {"id": str(index)},
            }

    write_rows(folder / "rows.parquet", generate(), row_schema(BOX, {"id": pa.string()}))
    return folder / "rows.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", help="model folder whose prompts are counted; by default a tiny random one")
    parser.add_argument("--one", action="store_true", help="also measure one process")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="foveate-validation-"))
    try:
        begin = time.perf_counter()
        file = make_rows(folder, options.rows)
        print(f"{options.rows} rows written in {time.perf_counter() - begin:.1f} s; load {os.getloadavg()[0]:.1f}")
        encoder = load_encoder(
            options.model or str(build_tiny(folder / "tiny", TinySize())), max_tiles=12, max_prompt_tokens=512
        )
        for workers in ([1] if options.one else []) + [options.workers]:
            begin = time.perf_counter()
            found = inspect_rows(open_tasks(file), RowInspection(RowCheck(check_box, encoder)), workers=workers)
            took = time.perf_counter() - begin
            print(f"check, {workers} processes: {took:.1f} s, {options.rows / took:.0f} rows/s, kept {len(found.kept)}")
        begin, busy = time.perf_counter(), os.times()
        made = prepare_filter(
            [file], folder / "out", Limits(prompt_tokens=512), length=encoder.length,
            reading=ReadOptions(workers=options.workers),
        )  # fmt: skip
        took, after = time.perf_counter() - begin, os.times()
        cpu = sum(after[:4]) - sum(busy[:4])
        print(f"prepare filter: {took:.1f} s ({cpu:.1f} s of CPU), {made.rows}, {dict(made.counts)}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
