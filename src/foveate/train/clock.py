"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Clock:
    """Seconds of each phase of one step, and of what ran beside them, in other threads, for it."""

    seconds: dict[str, float] = field(default_factory=dict)
    overlapped: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def metrics(self, **tokens: float) -> dict[str, float]:
        """Seconds by phase and in all, and tokens per second for the phases whose number of tokens is given."""
        every = self.seconds | self.overlapped
        return {
            **{f"time/{name}": seconds for name, seconds in every.items()},
            "time/step": sum(self.seconds.values()),
            **{f"time/{name}_tokens_per_second": count / every[name] for name, count in tokens.items()},
        }
