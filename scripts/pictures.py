"""The pictures of README, from a finished run: `python scripts/pictures.py runs/demo`. It needs Debian's chromium."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from foveate.api.run import Run

ROOT = Path(__file__).parents[1]
MOST_BYTES = 150_000
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--force-color-profile=srgb",
)  # fmt: skip


def picture(page: Path, target: Path, width: int, height: int) -> None:
    """The top of a page in a window of this size, as a PNG of few colours."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        subprocess.run(
            ["chromium", *QUIET, f"--user-data-dir={folder}/profile", f"--window-size={width},{height}",
             f"--screenshot={shot}", page.resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
        image = Image.open(shot).convert("RGB").crop((0, 0, width, height))
    image.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    size = target.stat().st_size
    print(f"{target.relative_to(ROOT)}: {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        raise SystemExit(f"{target}: more than {MOST_BYTES // 1000} kB")


def main(run_folder: Path) -> None:
    run = Run(run_folder)
    picture(run.report, ROOT / "docs/report.png", 1120, 1096)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "curve.html"
        run.plot("reward/mean", "eval/greedy_accuracy").save(page)
        picture(page, ROOT / "docs/curve.png", 1200, 224)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
