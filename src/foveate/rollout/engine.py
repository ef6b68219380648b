"""The engine seam: prompts in, sampled answers with log-probs out, weights published by version."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from foveate.records import Answer, Prompt, SamplingParams, Segment

Weights = Iterable[tuple[str, Tensor]]
Observe = Callable[[int, int, Answer], "Future[Segment | None]"]
"""Called where an answer has ended with a stop token: (index of the request, number of the answer, the answer so far)
-> what it reads next, or None where it is finished. It does not wait, and may be asked for the same again."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer. The answers depend on `seed`, the prompt, the weights and the sampling parameters alone:
    not on what else is in the batch, nor on any state of the engine. (Served engines keep this up to the rounding of
    their kernels, which may differ with the batch.)

    partial_answers: those to an earlier request for the same, which `pause` interrupted, or nothing. Those with finish
    "abort" are continued from their tokens under the present weights, with new keys and values, and where these end in
    a stop token, from what follows it; the others stay as they are."""

    prompt: Prompt
    seed: int
    partial_answers: tuple[Answer, ...] = ()


@runtime_checkable
class Engine(Protocol):
    """Samples answers: one engine, or all engines of a run (`foveate.cluster`).

    Placeholder tokens of images are never sampled, nor rows of the vocabulary that the tokenizer does not have. Every
    engine passes `tests/rollout/test_engine_conformance.py`.
    """

    version: int

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> list[tuple[Answer, ...]]:
        """`sampling.samples` answers per request, in order, each with the version of the weights that sampled it."""
        ...

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        """(index of the request, its answers) as each group finishes, every index once. Closing the iterator aborts
        what is unfinished. After a `pause` it gives what it has begun, unfinished answers with finish "abort", and
        ends: indices that are missing were not begun.

        With `observe` answers have several turns: where one ends with a stop token, it waits for what it reads next,
        while the others go on, and then goes on behind that. `sampling.max_tokens` bounds all of its tokens; where an
        observation leaves no room for another token, it ends without it, with finish "length"."""
        ...

    def pause(self) -> None:
        """Called beside a stream, from another thread: that stream ends early, and so does any that begins before
        `resume`."""
        ...

    def resume(self) -> None:
        """Streams are whole again. Called when none is under way."""
        ...

    def sleep(self) -> None:
        """Nothing is asked before the next `publish`: an engine that shares a device with the trainer gives back the
        memory of weights and caches until then."""
        ...

    def publish(self, version: int, weights: Weights = (), /) -> Mapping[str, float] | None:
        """Take over the named weights, or those of the workers of a run; answers sampled from now on carry `version`.
        The tensors must keep their values until the next `publish`: a server that dies before that gets them again.
        Returns metrics, if there are any."""
        ...

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids that the engine's model reads for a prompt, images expanded."""
        ...

    def close(self) -> None:
        """End all that runs for the engine. It cannot be used afterwards; closing it again does nothing."""
        ...


def has_turn_ended(answer: Answer, stop_ids: Sequence[int]) -> bool:
    """Whether an answer that is to go on waits for an observation: what it has sampled last ended with a stop token."""
    last = answer.segments[-1]
    return answer.finish == "abort" and last.trained and len(last) > 0 and int(last.token_ids[-1]) in stop_ids


def behind(answer: Answer, seen: Segment) -> Answer:
    """An answer with what it has observed, to go on from there."""
    return replace(answer, segments=(*answer.segments, seen), text="", finish="abort")


def in_order(groups: Iterable[tuple[int, tuple[Answer, ...]]], requests: Sequence[Request]) -> list[tuple[Answer, ...]]:
    """All groups of a stream, in the order of the requests."""
    found = dict(groups)
    return [found[index] for index in range(len(requests))]
