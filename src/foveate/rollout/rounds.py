"""Answers of several turns from engines that are elsewhere: each turn is a round of requests.

Between two rounds of a group its answers wait for each other's observations, and their tokens go through the model
again, as those of answers that were interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import replace

from foveate.records import Answer, SamplingParams, Segment
from foveate.rollout.engine import Observe, Request, behind, has_turn_ended

_Groups = Generator[tuple[int, tuple[Answer, ...]]]


def stream_in_rounds(
    stream: Callable[[Sequence[Request], SamplingParams], _Groups],
    requests: Sequence[Request],
    sampling: SamplingParams,
    observe: Observe,
    stop_ids: Sequence[int],
) -> _Groups:
    """As `Engine.stream`, with one that knows answers of one turn. A pause ends it between two rounds, too."""
    left = {index: _resumed(index, request, sampling, observe, stop_ids) for index, request in enumerate(requests)}
    done = {i: {n for n, one in enumerate(r.partial_answers) if one.finish == "stop"} for i, r in left.items()}
    while left:
        numbers, is_paused = [*left], False
        asked: dict[int, list[tuple[Answer, Future[Segment | None] | None]]] = {}
        for place, group in stream([left[index] for index in numbers], sampling):
            index = numbers[place]
            asked[index] = [
                (answer, observe(index, i, answer) if answer.finish == "stop" and i not in done[index] else None)
                for i, answer in enumerate(group)
            ]
            is_paused |= any(answer.finish == "abort" for answer in group)
        is_paused |= len(asked) < len(left)
        for index, group in asked.items():
            if is_paused:
                answers = [one if future is None else replace(one, finish="abort") for one, future in group]
            else:
                answers = [_behind(one, future, sampling) for one, future in group]
                done[index].update(i for i, one in enumerate(answers) if one.finish == "stop")
            if is_paused or all(answer.finish != "abort" for answer in answers):
                del left[index]
                yield index, tuple(answers)
            else:
                left[index] = replace(left[index], partial_answers=tuple(answers))
        if is_paused:
            yield from ((i, one.partial_answers) for i, one in left.items() if one.partial_answers)
            return


def _resumed(
    index: int, request: Request, sampling: SamplingParams, observe: Observe, stop_ids: Sequence[int]
) -> Request:
    """The request with observations of answers that were interrupted while they waited for them."""
    answers = [*request.partial_answers]
    for number, answer in enumerate(answers):
        if has_turn_ended(answer, stop_ids):
            turn = replace(answer, finish="stop")
            answers[number] = _behind(turn, observe(index, number, turn), sampling)
    return replace(request, partial_answers=tuple(answers))


def _behind(answer: Answer, future: Future[Segment | None] | None, sampling: SamplingParams) -> Answer:
    if future is None:
        return answer
    seen = future.result()
    if seen is None:
        return answer
    has_room = len(answer) + len(seen) < sampling.max_tokens
    return behind(answer, seen) if has_room else replace(answer, finish="length")
