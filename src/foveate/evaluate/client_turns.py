"""Answers of several turns from servers that speak OpenAI's chat completions: each turn is a request.

Tools stand in the system message and calls in the text, in the form of Hermes, so that any server will do; results of
calls are messages of the user.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from foveate.data.answers import GeneratedAnswer
from foveate.data.conversations import IMAGE_TAG, IMAGE_WORD
from foveate.encoding.chat import with_tools
from foveate.environments.protocol import (
    OF_ENVIRONMENT,
    EnvironmentFailure,
    EnvironmentPool,
    Opened,
    Step,
    with_opening,
)
from foveate.environments.turns import Turn, is_over, observed_turns
from foveate.errors import DataError
from foveate.evaluate.turns import kept_turns
from foveate.records import Message, SamplingParams, Task

Ask = Callable[[Task, int, int], Awaitable[GeneratedAnswer]]
"""(A conversation so far, the number of the answer, the tokens that are left for it) -> its next turn."""
_Reply = TypeVar("_Reply", Opened, Step)
_ENDS = ("stop", "tool_calls")
"""How servers say that a turn is complete."""


async def converse(
    pool: EnvironmentPool, task: Task, seed: int, sampling: SamplingParams, ask: Ask
) -> tuple[Task, tuple[GeneratedAnswer, ...]]:
    """The task as its environments began it, and all answers, side by side, each with an environment of its own. Raises
    DataError for an answer whose environment failed, and where they begin differently."""
    keys = [object() for _ in range(sampling.samples)]  # a row that is asked again has others
    try:
        opened = [await one for one in [asyncio.wrap_future(pool.open(task, seed, key)) for key in keys]]
        begun = with_opening(task, [_of(one) for one in opened])
        found = [_converse(pool, begun, key, number, sampling, ask) for number, key in enumerate(keys)]
        return begun, tuple(await asyncio.gather(*found))
    finally:
        for key in keys:
            pool.close(key)


def _of(reply: _Reply | EnvironmentFailure) -> _Reply:
    """The reply of an environment. Raises DataError for a failure."""
    if isinstance(reply, EnvironmentFailure):
        raise DataError(f"{OF_ENVIRONMENT}{reply.note}")
    return reply


async def _converse(
    pool: EnvironmentPool, begun: Task, key: object, number: int, sampling: SamplingParams, ask: Ask
) -> GeneratedAnswer:
    talk, turns, left = begun, list[Turn](), sampling.max_tokens
    taken: list[Step] = []
    while True:
        answer = await ask(_shown(talk, pool.tools), number, left)
        left -= answer.tokens or 0
        turns.append(Turn("assistant", answer.text, tokens=answer.tokens))
        if answer.finish not in _ENDS:
            break
        step = _of(await asyncio.wrap_future(pool.step(key, answer.text)))
        taken.append(step)
        turns[-1] = turns[-1].stepped(step, step.reward)
        if step.done or left <= 0:
            break
        turns += observed_turns(step.messages)
        said = Message("assistant", answer.text.replace(IMAGE_TAG, IMAGE_WORD))
        read = tuple(Message(one.role, one.content) for one in step.messages)
        images = tuple(image for one in step.messages for image in one.images)
        talk = replace(talk, messages=(*talk.messages, said, *read), images=talk.images + images)
    if pool.has_last_reward and not is_over(taken):
        turns[-1] = turns[-1].rewarded(_of(await asyncio.wrap_future(pool.last_reward(key))).reward)
    return replace(answer, tokens=sampling.max_tokens - left, turns=kept_turns(turns, None))


def _shown(talk: Task, tools: Sequence[Mapping[str, Any]]) -> Task:
    """The conversation with its tools in the form of texts."""
    turns = with_tools([{"role": one.role, "content": one.content} for one in talk.messages], tools)
    return replace(talk, messages=tuple(Message(turn["role"], turn["content"]) for turn in turns))
