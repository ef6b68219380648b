"""Answers of several turns: what the engines of a run ask between two turns, and the environments that reply.

Each answer has an environment of its own (`foveate.environments`). Where a turn ends, the environment is given its
text, and what it shows becomes tokens in a thread of its own, so that no engine waits for either. What goes wrong with
an environment ends its answer, which is then not graded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any, Literal
from weakref import WeakValueDictionary

from torch import Tensor

from foveate.config.rollout import EnvironmentChoice, EnvironmentSettings
from foveate.encoding.encode import Encoder
from foveate.encoding.turns import TurnReply, Turns
from foveate.environments.build import build_environment, made_once
from foveate.environments.pool import Environments
from foveate.environments.protocol import (
    OF_ENVIRONMENT,
    EnvironmentFailure,
    Observation,
    Opened,
    Step,
    with_opening,
)
from foveate.environments.turns import Turn, is_over, observed_turns, with_last_reward
from foveate.errors import DataError
from foveate.records import Answer, Message, Prompt, SamplingParams, Segment, Task
from foveate.rollout.credit import AnswerCredit, Outcome
from foveate.rollout.engine import Engine, Request

_ENCODERS = 2
"""Threads that turn observations into tokens."""


def _reply(messages: Sequence[Observation]) -> TurnReply:
    texts = tuple(Message(one.role, one.content) for one in messages)
    return TurnReply(texts, tuple(image for one in messages for image in one.images))


@dataclass(frozen=True, slots=True)
class Conversed:
    """The answers to a task. task, prompt: as the environment began it; outcomes: what became of each answer, none
    without environments."""

    task: Task
    prompt: Prompt
    answers: tuple[Answer, ...]
    outcomes: tuple[Outcome, ...] = ()


@dataclass(slots=True)
class _Talk:
    """One answer with its environment. `begun`: its task as the environment began it; `asked`: the texts that it was
    given, with the future of what follows each; `steps`: its replies; `read`: those that the policy reads."""

    task: Task
    begun: Task
    seed: int
    asked: list[tuple[str, Future[Segment | None]]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    read: list[tuple[Observation, ...]] = field(default_factory=list)
    failure: EnvironmentFailure | None = None


class Conversations:
    """The environments of the answers that an engine samples. Each group of answers has a key."""

    def __init__(
        self,
        pool: Environments,
        encoder: Encoder,
        credit: AnswerCredit,
        *,
        when_full: Literal["truncate", "leave_out"] = "truncate",
    ) -> None:
        """`when_full`: what becomes of an answer whose next observation has no room. Raises DataError for a chat
        template that has no form for several turns."""
        self.credit = credit
        self._pool, self._encoder, self._when_full = pool, encoder, when_full
        self._turns = Turns(encoder)
        self._open: dict[tuple[Hashable, int], _Talk] = {}
        self._threads = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="observations")
        self._tiles: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()
        self._restarts = self._unread = 0

    # ---------------------------------------------------------------------------------------------------- the prompts

    def begin(
        self, keys: Sequence[Hashable], tasks: Sequence[Task], requests: Sequence[Request], samples: int
    ) -> list[tuple[Task, Request]]:
        """Open the environments of each group, and wait for them: the tasks and requests that they begin with. Where
        they begin with what cannot be encoded, the answers are those to the task itself, and not graded. Raises
        DataError where those of a group begin differently."""
        futures = [
            [self._pool.open(task, request.seed, (key, number)) for number in range(samples)]
            for key, task, request in zip(keys, tasks, requests, strict=True)
        ]
        found: list[tuple[Task, Request]] = []
        for key, task, request, own in zip(keys, tasks, requests, futures, strict=True):
            results = [future.result() for future in own]
            opened = [one for one in results if isinstance(one, Opened)]
            begun = with_opening(task, opened) if opened else task
            if (begun.messages, begun.images) != (task.messages, task.images):
                try:
                    begun = self._encoder.for_graders(begun)
                    request = replace(request, prompt=self._encoder(begun))
                except DataError as error:  # it costs this group, and no run
                    begun, results = task, [self._unreadable(error)] * samples
            for number, one in enumerate(results):
                failure = one if isinstance(one, EnvironmentFailure) else None
                self._open[key, number] = _Talk(task, begun, request.seed, failure=failure)
            found.append((begun, request))
        return found

    # --------------------------------------------------------------------------------------------------- between turns

    def observe(self, keys: Sequence[Hashable], index: int, number: int, answer: Answer) -> Future[Segment | None]:
        """The segment that an answer to request `index`, of the group `keys[index]`, reads next."""
        key = keys[index], number
        talk, turn = self._open[key], sum(segment.trained for segment in answer.segments)
        seen: Future[Segment | None] = Future()
        if talk.failure is not None:
            seen.set_result(None)
        elif len(talk.asked) >= turn and talk.asked[turn - 1][0] == answer.text:
            return talk.asked[turn - 1][1]
        elif len(talk.asked) != turn - 1:
            talk.failure = EnvironmentFailure("start_again", "the answer was begun anew behind its environment")
            seen.set_result(None)
        else:
            talk.asked.append((answer.text, seen))
            replied = self._pool.step(key, answer.text)
            replied.add_done_callback(partial(self._replied, talk, seen))
        return seen

    def _replied(self, talk: _Talk, seen: Future[Segment | None], replied: Future[Step | EnvironmentFailure]) -> None:
        try:
            self._threads.submit(self._read, talk, replied, seen)
        except RuntimeError:  # the run ends, and nobody waits for it
            seen.set_result(None)

    def _read(self, talk: _Talk, replied: Future[Step | EnvironmentFailure], seen: Future[Segment | None]) -> None:
        """Make tokens of a reply."""
        try:
            seen.set_result(self._segment(talk, replied.result()))
        except CancelledError:
            seen.set_result(None)
        except BaseException as error:  # the environment is wrong for every answer
            seen.set_exception(error)

    def _segment(self, talk: _Talk, step: Step | EnvironmentFailure) -> Segment | None:
        if isinstance(step, EnvironmentFailure):
            talk.failure = step
            return None
        talk.steps.append(step)
        if step.done:
            return None
        read = [*talk.read, step.messages]
        try:
            segment = self._turns(talk.begun, [*map(_reply, read)])
        except DataError as error:
            talk.failure = self._unreadable(error)
            return None
        talk.read = read
        return self._shared(segment)

    def _unreadable(self, error: DataError) -> EnvironmentFailure:
        """The failure of an environment whose messages cannot be encoded."""
        self._unread += 1
        return EnvironmentFailure("invalid", str(error))

    def _shared(self, segment: Segment) -> Segment:
        """The segment with the tiles of an earlier one where these are equal, in shape and grid too: the same tensor is
        encoded once."""
        if segment.tiles is None:
            return segment
        shapes = repr(
            (segment.tiles.shape, [(slot.count, slot.tiles, slot.grid, slot.layout) for slot in segment.slots])
        ).encode()
        content = blake2b(shapes, digest_size=16)
        content.update(segment.tiles.contiguous().numpy().data)
        return replace(segment, tiles=self._tiles.setdefault(content.digest(), segment.tiles))

    # ------------------------------------------------------------------------------------------------------- the ends

    def restart(self, key: Hashable, answers: Sequence[Answer]) -> tuple[Answer, ...] | None:
        """Open environments again that did not show again what they had shown: the answers of the group, with those
        begun anew; None where there are none."""
        anew = list(answers)
        for number, answer in enumerate(answers):
            talk = self._open[key, number]
            if talk.failure is None or talk.failure.kind != "start_again":
                continue
            self._restarts += 1
            self._pool.close((key, number))
            opened = self._pool.open(talk.task, talk.seed, (key, number)).result()
            failure = opened if isinstance(opened, EnvironmentFailure) else None
            self._open[key, number] = _Talk(talk.task, talk.begun, talk.seed, failure=failure)
            anew[number] = Answer.sampled((), (), "", "abort", answer.version)
        return tuple(anew) if any(one is not other for one, other in zip(anew, answers, strict=True)) else None

    def finish(self, key: Hashable, answers: Sequence[Answer]) -> tuple[tuple[Answer, ...], tuple[Outcome, ...]]:
        """The answers of a group with the rewards of their turns, and what became of each. Their environments end."""
        talks = [self._open[key, number] for number in range(len(answers))]
        taken = [[*talk.steps] for talk in talks]  # one that comes late is no part of the answer any more
        last = [self._ask_last(talk, taken[number], (key, number)) for number, talk in enumerate(talks)]
        found = [self._finished(*one) for one in zip(talks, answers, taken, last, strict=True)]
        self.drop(key, len(answers))
        return tuple(answer for answer, _ in found), tuple(outcome for _, outcome in found)

    def drop(self, key: Hashable, samples: int) -> None:
        """End the environments of a group."""
        for number in range(samples):
            if self._open.pop((key, number), None) is not None:
                self._pool.close((key, number))

    def _ask_last(
        self, talk: _Talk, taken: Sequence[Step], key: tuple[Hashable, int]
    ) -> Future[Step | EnvironmentFailure] | None:
        """The reward of an answer that a limit has ended, where its environment has one."""
        asks = self._pool.has_last_reward and self.credit.steps != "none" and talk.failure is None
        return self._pool.last_reward(key) if asks and not is_over(taken) else None

    def _finished(
        self, talk: _Talk, answer: Answer, taken: Sequence[Step], last: Future[Step | EnvironmentFailure] | None
    ) -> tuple[Answer, Outcome]:
        end = None if last is None else last.result()
        if isinstance(end, EnvironmentFailure):
            talk.failure = end
        is_silent = is_over(taken) and all(step.reward is None for step in taken)  # else it never came to its reward
        if isinstance(end, Step):
            taken = with_last_reward(taken, sum(segment.trained for segment in answer.segments), end.reward)
        rewards = self.credit.of_turns(taken)
        segments, turns = list[Segment](), list[Turn]()
        steps, read = iter(zip(taken, rewards, strict=True)), iter(talk.read)
        texts = iter([*(text for text, _ in talk.asked), answer.text])
        for segment in answer.segments:
            if segment.trained:
                step, reward = next(steps, (None, None))
                turn = Turn("assistant", next(texts), tokens=len(segment))
                segments.append(replace(segment, reward=reward))
                turns.append(turn if step is None else turn.stepped(step, reward))
            else:
                segments.append(segment)
                turns += observed_turns(next(read))
        total = None if is_silent else sum(reward or 0.0 for reward in rewards)
        note = "" if talk.failure is None else f"{OF_ENVIRONMENT}{talk.failure.note}"
        is_full = answer.finish == "length" and len(talk.asked) == sum(segment.trained for segment in answer.segments)
        if is_full and self._when_full == "leave_out" and not note:
            note = f"{OF_ENVIRONMENT}the next observation had no room in rollout.max_tokens"
        trace = "" if talk.failure is None else talk.failure.trace
        unread = self.credit.steps == "none" and any(step.reward is not None for step in taken)
        return replace(answer, segments=tuple(segments)), Outcome(tuple(turns), total, note, unread, trace)

    # ----------------------------------------------------------------------------------------------------- whole calls

    def generate(
        self, engine: Engine, tasks: Sequence[Task], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Conversed]:
        """The answers to each request with what became of them, when all are there."""
        keys = [("generate", index) for index in range(len(requests))]
        found = self.begin(keys, tasks, requests, sampling.samples)
        begun = [request for _, request in found]
        while True:
            groups = engine.generate(begun, sampling, partial(self.observe, keys))
            anew = [self.restart(key, group) for key, group in zip(keys, groups, strict=True)]
            if not any(anew):
                ends = [self.finish(key, group) for key, group in zip(keys, groups, strict=True)]
                return [Conversed(task, request.prompt, *end) for (task, request), end in zip(found, ends, strict=True)]
            begun = [
                replace(request, partial_answers=again or group)
                for request, again, group in zip(begun, anew, groups, strict=True)
            ]

    def metrics(self) -> dict[str, float]:
        """Since the run was started: answers that lost their environment, and those that were begun anew because a
        rebuilt one did not show what the first had shown."""
        lost = sum(count for kind, count in self._pool.failures.items() if kind != "start_again")
        return {"environment/failures": float(lost + self._unread), "environment/restarts": float(self._restarts)}

    def shutdown(self) -> None:
        """End its threads."""
        self._threads.shutdown(cancel_futures=True)


def tools_of_environment(settings: EnvironmentChoice | None) -> tuple[Mapping[str, Any], ...]:
    """The schemas that prompts show. Raises ConfigError for an unknown environment or setting."""
    if settings is None:
        return ()
    make, _ = build_environment(settings.name, settings.settings)
    return made_once(settings.name, make)[0]


@contextmanager
def open_conversations(
    settings: EnvironmentSettings | None,
    make_encoder: Callable[[Sequence[Mapping[str, Any]]], Encoder],
    *,
    turn_discount: float = 1.0,
) -> Iterator[tuple[Encoder, Conversations | None]]:
    """The encoder, whose prompts show the tools of the environment, and the environments; None where there are none.
    Raises ConfigError for an unknown environment or setting, DataError for a chat template without several turns."""
    if settings is None:
        yield make_encoder(()), None
        return
    steps = "none" if settings.reward == "function" else settings.credit
    chosen = "reward" in settings.model_fields_set
    credit = AnswerCredit(steps, turn_discount, settings.reward != "environment", chosen)
    limits = settings.model_dump(include={"workers", "time_limit", "memory_limit"})
    with Environments(settings.name, settings.settings, **limits) as pool:
        encoder = make_encoder(pool.tools)
        conversations = Conversations(pool, encoder, credit, when_full=settings.when_full)
        try:
            yield encoder, conversations
        finally:
            conversations.shutdown()
