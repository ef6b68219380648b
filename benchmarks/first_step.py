"""The native engine, which writes down when it is first asked for answers: benchmarks/start.py names it in a recipe."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from foveate.records import Answer, SamplingParams
from foveate.rollout.engine import Observe, Request
from foveate.rollout.native.engine import NativeEngine

MOMENT = "FOVEATE_BENCHMARK_MOMENT"
"""The file that says when that was, and what the process had used by then."""


class FirstStep(NativeEngine):
    """Answers as any native engine does."""

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        moment = Path(os.environ[MOMENT])
        if not moment.exists():
            moment.write_text(json.dumps({"wall": time.monotonic(), "cpu": sum(os.times()[:4])}))
        return super().stream(requests, sampling, observe)
