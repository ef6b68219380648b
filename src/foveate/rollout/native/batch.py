"""The answers of a decode batch of the native engine while they are sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from foveate.parallel.packing import prompt_end
from foveate.records import Answer, PackedGroup, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.cache import GroupCache
from foveate.rollout.native.graphs import Step
from foveate.rollout.native.sampling import uniforms

Watch = Callable[[int, int, int, float], str]
"""Called with every token: (number of the request, number of its answer, token, log-prob) -> the finish of an answer
that is to end with this token, "" for one that goes on."""


class DecodeBatch:
    """Some requests with their S answers, numbered request by request. A row of the batch is a live answer: `answers`
    says which one, and `last_B`, `position_B` and `uniform_B` hold what its next token needs. Where a request was begun
    before, its unfinished answers go on and the others are what they were.

    Of all rows, as many as the share `slack` may be of answers that are complete: they go on through the model until
    more are, and what they are given is not looked at. `watch`, if there is one, sees every token of the others."""

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        version: int,
        device: torch.device,
        slack: float = 0.0,
        watch: Watch | None = None,
    ) -> None:
        self.sampling, self._watch = sampling, watch
        samples, self._limit = sampling.samples, sampling.max_tokens
        self.cache: GroupCache | None = None
        self.replay: Step | None = None
        self._samples, self._version, self._device, self._slack = samples, version, device, slack
        self._before = [one for request in requests for one in request.partial_answers or [None] * samples]
        self.answers = [i for i, one in enumerate(self._before) if one is None or one.finish == "abort"]
        self.live = [*range(len(self.answers))]
        self.packed_groups = [
            PackedGroup(r.prompt, tuple(one for one in r.partial_answers if one.finish == "abort")) for r in requests
        ]
        self._finish = ["" if one is None else one.finish for one in self._before]
        self._lengths = [0 if one is None else len(one) for one in self._before]
        self._open = [0] * len(requests)
        for answer in self.answers:
            self._open[answer // samples] += 1
        uniform = [uniforms(request.seed, i, self._limit) for request in requests for i in range(samples)]
        self._uniform = functional.pad(torch.stack(uniform), (0, 1)).to(device)  # a place for what nobody looks at
        self._token_ids = torch.zeros(self._uniform.shape, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(self._uniform.shape, device=device)
        ends = [prompt_end(request.prompt) for request in requests]
        self._answer_B = self._on_device(self.answers)
        self._length_B = self._on_device([self._lengths[answer] for answer in self.answers])
        self.position_B = self._on_device([ends[i // samples] + self._lengths[i] - 1 for i in self.answers])
        self.last_B = self._answer_B

    @property
    def ahead(self) -> int:
        """How many more tokens a live answer may have at most."""
        return self._limit - min(self._lengths[self.answers[row]] for row in self.live)

    @property
    def uniform_B(self) -> Tensor:
        """The uniform numbers that draw the next tokens."""
        return self._uniform[self._answer_B, self._length_B]

    def take(self, token_B: Tensor, logprob_B: Tensor, stop: Tensor, paused: bool) -> list[int]:
        """Append a token to every live answer; those that are complete leave, all of them when the engine pauses. The
        requests that have no live answer any more."""
        self._token_ids[self._answer_B, self._length_B] = token_B
        self._logprobs[self._answer_B, self._length_B] = logprob_B
        self._length_B = (self._length_B + 1).clamp(max=self._limit)
        self.position_B, self.last_B = self.position_B + 1, token_B
        live: list[int] = []
        ended: list[int] = []
        stops = torch.isin(token_B, stop).tolist()
        watched = self._watched(token_B, logprob_B)
        for row in self.live:
            answer = self.answers[row]
            self._lengths[answer] += 1
            end = "length" if self._lengths[answer] == self._limit else "abort" if paused else ""
            finish = "stop" if stops[row] else watched.get(row, end)
            if finish:
                self._finish[answer] = finish
                ended.append(answer // self._samples)
                self._open[ended[-1]] -= 1
            else:
                live.append(row)
        self.live = live
        if ended and (not live or len(self.answers) - len(live) > self._slack * len(self.answers)):
            self._keep(live)
        return [number for number in sorted(set(ended)) if not self._open[number]]

    def _watched(self, token_B: Tensor, logprob_B: Tensor) -> dict[int, str]:
        """The rows whose answers end by the word of `watch`, with their finish."""
        if self._watch is None:
            return {}
        token_ids, logprobs = token_B.tolist(), logprob_B.tolist()
        said = {}
        for row in self.live:
            request, answer = divmod(self.answers[row], self._samples)
            said[row] = self._watch(request, answer, token_ids[row], logprobs[row])
        return {row: finish for row, finish in said.items() if finish}

    def _keep(self, live: list[int]) -> None:
        assert self.cache is not None
        order = self.cache.drop(live) if live else []
        self.live = [*range(len(order))]
        self.answers = [self.answers[row] for row in order]
        rows = self._on_device(order)
        self._answer_B, self._length_B = self._answer_B[rows], self._length_B[rows]
        self.position_B, self.last_B = self.position_B[rows], self.last_B[rows]

    def group(self, number: int, decode: Callable[[tuple[int, ...]], str]) -> tuple[Answer, ...]:
        """All answers to a request."""
        own = slice(number * self._samples, (number + 1) * self._samples)
        rows = zip(self._token_ids[own].tolist(), self._logprobs[own].tolist(), strict=True)
        group: list[Answer] = []
        for answer, (token_ids, logprobs) in zip(range(own.start, own.stop), rows, strict=True):
            before = self._before[answer]
            if before is not None and before.finish != "abort":
                group.append(before)
                continue
            new = slice(0 if before is None else len(before), self._lengths[answer])
            ids, finish = tuple(token_ids[new]), self._finish[answer]
            whole = ids if before is None else before.token_ids + ids
            more = Answer.sampled(ids, logprobs[new], decode(whole), finish, self._version)
            group.append(more if before is None else before.continued_by(more, more.text))
        return tuple(group)

    def _on_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
