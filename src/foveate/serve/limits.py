"""Bounds on what all requests of a server hold together."""

from __future__ import annotations

import asyncio
import ctypes
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """`body_bytes`: of one request, its images included. `held_bytes`: of all bodies that are read or whose answers are
    under way; more are refused. `image_bytes`: of images as tensors, with those whose answers are under way, and
    `decoded_pixels`: of images that are being decoded; more wait. `body_s`: seconds without a byte of a body;
    `whole_body_s`: from the first to the last."""

    body_bytes: int = 64 * 2**20
    held_bytes: int = 256 * 2**20
    image_bytes: int = 2 * 2**30
    decoded_pixels: int = 32 * 10**6
    body_s: float = 30.0
    whole_body_s: float = 300.0


def tell_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Call a function in an event loop from another thread, unless the loop has ended, and its clients with it."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def give_memory_back() -> None:
    """Return what large images have left free in the allocator to the system; glibc keeps it otherwise."""
    with suppress(AttributeError):  # another C library, which does as it likes
        ctypes.CDLL(None).malloc_trim(0)


class Budget:
    """An amount that requests share, in one event loop. Whoever takes a part gives it back."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def take_at_once(self, amount: int) -> bool:
        """Whether so much is left; then it is taken."""
        if self.used + amount > self.total:
            return False
        self.used += amount
        return True

    async def take(self, amount: int) -> int:
        """Wait for so much, after all who asked before; for all there is where it is more than that. The amount that
        was taken."""
        amount = min(amount, self.total)
        if self._waiting or not self.take_at_once(amount):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((amount, turn))
            try:
                await turn
            except asyncio.CancelledError:
                self.give_back(0 if turn.cancelled() else amount)
                raise
        return amount

    def give_back(self, amount: int) -> None:
        self.used -= amount
        while self._waiting and (self._waiting[0][1].done() or self.take_at_once(self._waiting[0][0])):
            turn = self._waiting.popleft()[1]
            if not turn.done():
                turn.set_result(None)
