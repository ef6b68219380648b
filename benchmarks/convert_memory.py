"""Peak memory of `foveate convert` on a synthetic 2 GB checkpoint, in each direction.

    python benchmarks/convert_memory.py [--folder /scratch]

The checkpoint has the shapes of InternVL3.5-1B in bfloat16: random bytes in a sharded GitHub-format folder. Every
conversion runs in a process of its own, whose peak resident memory (Python, torch and transformers included) must stay
below three times the largest tensor plus 500 MB. The folders are deleted at the end; they need 6 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers.toy_sizes import sized
from transformers import InternVLConfig

from foveate.encoding.chat import CORRECTED_TEMPLATE
from foveate.models.checkpoint.configs import hf_to_chat
from foveate.models.checkpoint.convert import in_layout
from foveate.models.checkpoint.formats import expected_shapes
from foveate.models.checkpoint.safetensors_io import ByteRange, Stored, write_weights
from foveate.models.checkpoint.small_files import write_json
from foveate.models.sizes import published_config
from foveate.models.tiny import TinySize, tiny_config, tiny_tokenizer

SHARD_BYTES = 5 * 10**8
MARGIN = sized(500 * 10**6, toy=2 * 10**9)


def tiny() -> InternVLConfig:
    return tiny_config(TinySize(), tiny_tokenizer(640))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to put the 6 GB; else a temporary folder")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as name:
        folder = Path(name)
        largest, total = synthesise(folder / "chat", sized(lambda: published_config("1B"), toy=tiny)())
        limit = 3 * largest + MARGIN
        print(f"checkpoint {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB")
        worst = 0
        for source, target, layout in (("chat", "hf", "hf"), ("hf", "back", "chat")):
            start = time.perf_counter()
            peak = peak_of_convert(folder / source, folder / target, layout)
            seconds = time.perf_counter() - start
            worst = max(worst, peak)
            print(f"{source} -> {layout}: peak {peak / 1e6:.0f} MB, {seconds:.1f} s ({total / 1e6 / seconds:.0f} MB/s)")
        same = digest(folder / "chat") == digest(folder / "back")
        print(f"bitwise equal after the round trip: {same}")
        if worst > limit or not same:
            raise SystemExit("too much memory, or other bytes")


def synthesise(folder: Path, config: InternVLConfig) -> tuple[int, int]:
    """Write the checkpoint from a file of random bytes; returns the bytes of its largest tensor and of all."""
    folder.mkdir()
    tokenizer = tiny_tokenizer(640)
    tokenizer.chat_template = CORRECTED_TEMPLATE
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", hf_to_chat(config.to_dict() | {"dtype": "bfloat16"}, 12))
    shapes = expected_shapes(config)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    noise = folder.parent / "noise"
    with open(noise, "wb") as file:
        for _ in range(-(-max(sizes.values()) // 2**20) + len(sizes) + 1):
            file.write(os.urandom(2**20))
    # Every tensor begins elsewhere in the noise, so that no two are the same.
    tensors = {
        name: Stored("BF16", shapes[name], (ByteRange(noise, i * 1_000_003, size),))
        for i, (name, size) in enumerate(sizes.items())
    }
    write_weights(folder, in_layout(tensors, "chat"), SHARD_BYTES, lambda _: None)
    noise.unlink()
    return max(sizes.values()), sum(sizes.values())


def peak_of_convert(source: Path, target: Path, layout: str) -> int:
    """Peak resident bytes of a process that converts."""
    code = (
        "import resource, sys; from pathlib import Path; from foveate.models.checkpoint.convert import convert;"
        f"convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], shard_bytes={SHARD_BYTES});"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(source), str(target), layout]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file."""
    made = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            made[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return made


if __name__ == "__main__":
    main()
