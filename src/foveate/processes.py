"""Worker processes that start without the script that started the run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Any


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _without_main():
            return ForkServerProcess._Popen(process_obj)  # pyright: ignore[reportAttributeAccessIssue]


class _Context(ForkServerContext):
    Process = _Process  # pyright: ignore[reportAssignmentType]


def worker_context(preload: Sequence[str]) -> ForkServerContext:
    """A multiprocessing context whose processes come from a fork server that has imported the modules `preload`.

    They do not import the caller's `__main__`, so that a script needs no `if __name__ == "__main__":`. What they are
    sent must not be defined there, unless it is sent by value (`foveate.registry.pickled`)."""
    context = _Context()
    context.set_forkserver_preload([*preload])
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
