"""Amounts that requests share: they wait in order, and what is held is given back."""

from __future__ import annotations

import asyncio

import pytest

from foveate.serve.hosts import is_known_host
from foveate.serve.limits import Budget, tell_loop


def test_who_asks_for_more_than_is_left_waits_and_keeps_the_order():
    async def run():
        budget, order = Budget(10), []

        async def use(name, amount):
            taken = await budget.take(amount)
            order.append((name, taken))
            await asyncio.sleep(0)
            budget.give_back(taken)

        await asyncio.gather(use("a", 6), use("b", 25), use("c", 1))
        return budget, order

    budget, order = asyncio.run(run())
    assert order == [("a", 6), ("b", 10), ("c", 1)], "more than all there is waits for all there is"
    assert budget.used == 0


def test_one_that_gives_up_lets_the_next_one_in():
    async def run():
        budget = Budget(10)
        await budget.take(5)
        large = asyncio.ensure_future(budget.take(10))
        small = asyncio.ensure_future(budget.take(5))
        await asyncio.sleep(0)
        assert not small.done()
        large.cancel()
        assert await asyncio.wait_for(small, 1) == 5
        budget.give_back(10)
        return budget.used

    assert asyncio.run(run()) == 0


def test_a_budget_that_may_not_wait_refuses():
    budget = Budget(10)
    assert budget.take_at_once(10)
    assert not budget.take_at_once(1)
    budget.give_back(10)
    assert budget.take_at_once(1)


@pytest.mark.parametrize(
    "header",
    ["127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "10.1.2.3", "model.localhost:1", "mine:8000"],
)
def test_addresses_and_own_names_are_known_hosts(header):
    assert is_known_host(header, ("mine",))


@pytest.mark.parametrize(
    "header",
    ["", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "a b", "[::1"],
)
def test_other_names_are_not(header):
    assert not is_known_host(header, ("mine",))


def test_a_loop_that_has_ended_is_told_nothing():
    loop, heard = asyncio.new_event_loop(), list[int]()
    tell_loop(loop, heard.append, 1)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    tell_loop(loop, heard.append, 2)
    assert heard == [1]
