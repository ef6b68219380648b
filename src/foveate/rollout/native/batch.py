"""The answers of the native engine while they are sampled: requests that wait, and rows that a step extends.

An answer of several turns leaves its row where a turn ends, and waits for what it observes. It has its keys and values
meanwhile (`kept`), unless its request is put back for others; then it joins again from its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.parallel.packing import next_position
from foveate.records import Answer, PackedGroup, SamplingParams, Segment
from foveate.rollout.engine import Observe, Request, behind, has_turn_ended
from foveate.rollout.native.cache import BatchCache
from foveate.rollout.native.graphs import Step
from foveate.rollout.native.sampling import uniforms
from foveate.rollout.native.shelves import Kept
from foveate.rollout.native.tables import AnswerTables, split_experts

Watch = Callable[[int, int, float], str]
"""Called with every token: (number of the answer, token, log-prob) -> the finish of an answer that is to end with this
token, "" for one that goes on."""
Draw = Callable[[Tensor, Tensor, SamplingParams], tuple[Tensor, Tensor]]
"""Hidden states (B, D) and uniform numbers (B,) -> tokens and their log-probs (B,)."""


@dataclass(slots=True, eq=False)
class DecodeJob:
    """A request on its way. `answers` are those that are there, with finish "abort" where they are to go on; None are
    not begun. `rows`: which of them have rows, the first since the step `joined`; `asked`: which wait for an
    observation, and `kept` what the cache has of these. Tokens of one `kind` are drawn alike. With `ignores_stop`
    answers go on behind stop tokens."""

    key: Any
    request: Request
    sampling: SamplingParams
    watch: Watch | None = None
    observe: Observe | None = None
    ignores_stop: bool = False
    answers: list[Answer | None] = field(default_factory=list)
    rows: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    kept: dict[int, Kept] = field(default_factory=dict)
    joined: int = 0
    kind: SamplingParams = field(init=False)
    prompt_experts: np.ndarray | None = field(init=False)

    def __post_init__(self) -> None:
        self.kind = replace(self.sampling, samples=1, max_tokens=1)
        begun = (one if len(one) or one.finish != "abort" else None for one in self.request.partial_answers)
        self.answers = [*begun] or [None] * self.sampling.samples
        known = (one.prompt_experts for one in self.request.partial_answers)
        self.prompt_experts = next((experts for experts in known if experts is not None), None)

    @property
    def unfinished(self) -> list[int]:
        """The numbers of the answers that are to be sampled and have no rows, those first that were begun."""
        busy = self.rows | self.asked
        free = [(one, i) for i, one in enumerate(self.answers) if i not in busy]
        begun = [i for one, i in free if one is not None and one.finish == "abort"]
        return begun + [i for one, i in free if one is None]

    @property
    def is_held(self) -> bool:
        """Whether the cache has any of it."""
        return bool(self.rows or self.kept)

    @property
    def is_done(self) -> bool:
        return not (self.rows or self.asked or self.unfinished)

    @property
    def group(self) -> tuple[Answer, ...]:
        """All answers, when they are there."""
        return tuple(one for one in self.answers if one is not None)

    @property
    def was_begun(self) -> bool:
        return bool(self.group)

    @property
    def begun(self) -> tuple[Answer, ...]:
        return tuple(one for number in self.unfinished if (one := self.answers[number]) is not None)

    @property
    def limit(self) -> int:
        """Tokens that each of its answers takes in at most: the last one is never fed back."""
        return self.sampling.max_tokens - 1

    @property
    def tokens(self) -> int:
        """Those that go through the model when it joins, at most."""
        return len(self.request.prompt) + sum(map(len, self.begun))


@dataclass(slots=True, eq=False)
class _Live:
    """An answer that has a row: number `number` of a job, of which `begun` tokens were there when it joined. It has its
    numbers in the row `seat` of the batch's tables, and its last token at step `last`."""

    job: DecodeJob
    number: int
    begun: int
    seat: int
    last: int
    version: int


class DecodeBatch:
    """Jobs that wait, in order, and those whose answers have rows. All tables are tensors on the device: `last_B` and
    `position_B` hold what the next step is given of each row, `uniform_B` the numbers that draw its tokens.

    Of the rows of recorded steps, as many as the share `slack` may be of answers that are complete: they go on through
    the model until more are, and what they are given is not looked at. Other steps have no place for it."""

    def __init__(
        self,
        decode: Callable[[tuple[int, ...]], str],
        device: torch.device,
        token_budget: int,
        *,
        slack: float = 0.0,
        turn: int | None = None,
    ) -> None:
        self.token_budget, self.turn = token_budget, turn
        self.cache = BatchCache(device, recorded=slack > 0)
        self.replay: Step | None = None
        self.waiting: list[DecodeJob] = []
        self.running: list[DecodeJob] = []
        self.live: list[_Live | None] = []
        self.failed: list[DecodeJob] = []
        self.asked: dict[Future[Segment | None], tuple[DecodeJob, int]] = {}
        self._kinds: list[tuple[SamplingParams, Tensor | None]] = []
        self._decode, self._device, self._slack = decode, device, slack
        self._tables = AnswerTables(device)
        self._seat_B = self._end_B = self.last_B = torch.zeros(0, dtype=torch.int64, device=device)
        self._next_end = 0

    # ------------------------------------------------------------------------------------------------------- the rows

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.asked)

    @property
    def left(self) -> list[DecodeJob]:
        """The jobs that are begun and have no rows, when a pause has ended the steps."""
        found = [job for job in self.waiting if job.was_begun]
        return found + [job for job in dict.fromkeys(job for job, _ in self.asked.values()) if job not in found]

    @property
    def ahead(self) -> int:
        """How many more tokens a live answer may have at most."""
        return max(one.last for one in self.live if one is not None) - self.cache.rows.step

    @property
    def position_B(self) -> Tensor:
        return self._end_B + self.cache.rows.length_B

    def packed_groups(self, jobs: Sequence[DecodeJob]) -> list[PackedGroup]:
        """The groups that go through the model for jobs that join."""
        return [PackedGroup(job.request.prompt, job.begun) for job in jobs]

    def join(self, jobs: Sequence[DecodeJob], version: int) -> tuple[list[int], list[int]]:
        """The answers that were announced to the cache have rows now: these rows, and their numbers among those that
        were announced."""
        newcomers: list[_Live] = []
        for job in jobs:
            job.joined = self.cache.rows.step
            newcomers += [self._seated(job, number, version) for number in job.unfinished]
        self.running += [job for job in jobs if job not in self.running]
        return self._become_rows(newcomers)

    def come_back(self, returning: Sequence[tuple[DecodeJob, int]], version: int) -> tuple[list[int], list[int]]:
        """The same for answers whose return was announced to the cache."""
        for job, number in returning:
            del job.kept[number]
        return self._become_rows([self._seated(job, number, version) for job, number in returning])

    def _seated(self, job: DecodeJob, number: int, version: int) -> _Live:
        before = job.answers[number]
        begun = 0 if before is None else len(before)
        job.rows.add(number)
        last = self.cache.rows.step + job.sampling.max_tokens - begun - 1
        seat = self._tables.take(uniforms(job.request.seed, number, job.sampling.max_tokens))
        return _Live(job, number, begun, seat, last, version)

    def _become_rows(self, newcomers: list[_Live]) -> tuple[list[int], list[int]]:
        ends = [next_position(one.job.request.prompt, one.job.answers[one.number]) - one.begun for one in newcomers]
        former = len(self.live)
        self.live += newcomers
        self._seat_B = torch.cat([self._seat_B, self._on_device([one.seat for one in newcomers])])
        self._end_B = torch.cat([self._end_B, self._on_device(ends)])
        self.last_B = torch.cat([self.last_B, torch.zeros_like(self._end_B[former:])])
        found = self.reorder(self.cache.join())
        rows = [row for row, was in enumerate(found) if was >= former]
        return rows, [found[row] - former for row in rows]

    def reorder(self, source_B: Tensor) -> list[int]:
        """The rows are those of `source_B` now."""
        self.replay = None
        source = source_B.tolist()
        self.live = [self.live[row] for row in source]
        self._seat_B, self._end_B, self.last_B = self._seat_B[source_B], self._end_B[source_B], self.last_B[source_B]
        self._next_end = min((one.last for one in self.live if one is not None), default=0)
        self._kinds = self._kinds_of(range(len(self.live)))
        return source

    def _kinds_of(self, rows: Sequence[int]) -> list[tuple[SamplingParams, Tensor | None]]:
        """Which of some rows are drawn alike; None: all."""
        kinds: dict[SamplingParams, list[int]] = {}
        for place, row in enumerate(rows):
            if (one := self.live[row]) is not None:
                kinds.setdefault(one.job.kind, []).append(place)
        if len(kinds) == 1:
            return [(next(iter(kinds)), None)]
        return [(sampling, self._on_device(places)) for sampling, places in kinds.items()]

    # ----------------------------------------------------------------------------------------------------- the tokens

    def sample(self, hidden: Tensor, draw: Draw, newcomers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """A token of each row, or of `newcomers` alone, from their hidden states (B, D); with its log-prob."""
        index = slice(None) if newcomers is None else self._on_device(newcomers)
        seat, at = self._seat_B[index], self._tables.place(self.cache.rows.length_B[index])
        uniform = self._tables.uniform(seat, at)
        kinds = self._kinds if newcomers is None else self._kinds_of(newcomers)
        if len(kinds) == 1 and kinds[0][1] is None:
            token_B, logprob_B = draw(hidden, uniform, kinds[0][0])
        else:
            token_B, logprob_B = torch.zeros_like(seat), torch.zeros(len(seat), device=self._device)
            for sampling, own in kinds:
                assert own is not None
                token_B[own], logprob_B[own] = draw(hidden[own], uniform[own], sampling)
        self._tables.write(seat, at, token_B, logprob_B)
        if isinstance(index, slice):
            self.last_B = token_B
        else:
            self.last_B[index] = token_B
        return token_B, logprob_B

    def finish(
        self, token_B: Tensor, logprob_B: Tensor, stop: Tensor, paused: bool, newcomers: Sequence[int] | None = None
    ) -> list[DecodeJob]:
        """Let the answers leave that are complete with these tokens, all of them when the engine pauses. The jobs that
        have no live answer any more."""
        stopped, step = torch.isin(token_B, stop), self.cache.rows.step
        watched = any(job.watch is not None for job in self.running)
        if not (paused or watched or step >= self._next_end or bool(stopped.any())):
            return []
        ended: list[tuple[int, str]] = []
        token_ids, logprobs = (token_B.tolist(), logprob_B.tolist()) if watched else ([], [])
        rows = range(len(self.live)) if newcomers is None else newcomers
        for place, (row, is_stop) in enumerate(zip(rows, stopped.tolist(), strict=True)):
            one = self.live[row]
            if one is None:
                continue
            said = ""
            if one.job.watch is not None:
                said = one.job.watch(one.number, token_ids[place], logprobs[place])
            end = "length" if step >= one.last else "abort" if paused else ""
            if finish := "stop" if is_stop and not one.job.ignores_stop else said or end:
                ended.append((row, finish))
        return self._leave(ended, paused)

    def _leave(self, ended: Sequence[tuple[int, str]], paused: bool = False) -> list[DecodeJob]:
        done: list[DecodeJob] = []
        park: list[int] = []
        for row, finish in ended:
            one = self.live[row]
            assert one is not None
            job, number, self.live[row] = one.job, one.number, None
            job.answers[number] = answer = self._answer(one, finish)
            self._tables.give_back(one.seat)
            job.rows.discard(number)
            if finish == "stop" and job.observe is not None:
                job.kept[number] = self.cache.rows.kept[row]
                self.ask(job, number, answer)
                park.append(row)
            if not job.is_held:
                self.running.remove(job)
            if not job.rows and not job.asked and (paused or job.observe is None or job.is_done):
                done.append(job)
        if ended:
            self._next_end = min((one.last for one in self.live if one is not None), default=0)
            missing = sum(one is None for one in self.live)
            if park or self.replay is None or missing == len(self.live) or missing > self._slack * len(self.live):
                self.tidy(park)
        return done

    def tidy(self, park: Sequence[int] = (), gone: Sequence[Kept] = ()) -> None:
        """Answers that are complete leave their rows, and those in the rows `park` keep their memory; what is kept of
        `gone` is dropped."""
        stay = [row for row, one in enumerate(self.live) if one is not None]
        if len(stay) < len(self.live) or gone:
            self.reorder(self.cache.drop(stay, park, gone))

    def put_back(self, job: DecodeJob, place: int) -> None:
        """Its answers leave their rows and wait at a place of the queue, to go on from the tokens that they have."""
        gone = [*job.kept.values()]
        job.kept.clear()
        rows = [(row, "abort") for row, one in enumerate(self.live) if one is not None and one.job is job]
        self._leave(rows)
        self.tidy(gone=gone)
        if job in self.running:
            self.running.remove(job)
        if job.unfinished and job not in self.waiting:
            self.waiting.insert(place, job)

    # ----------------------------------------------------------------------------------------------- the observations

    def add(self, job: DecodeJob, stop_ids: Sequence[int]) -> None:
        """A job waits for its rows, and answers of it that were interrupted behind a turn for their observations."""
        for number in job.unfinished if job.observe is not None else ():
            answer = job.answers[number]
            if answer is not None and has_turn_ended(answer, stop_ids):
                self.ask(job, number, answer)
        if job.unfinished:
            self.waiting.append(job)

    def ask(self, job: DecodeJob, number: int, answer: Answer) -> None:
        """Ask what an answer reads next."""
        assert job.observe is not None
        job.answers[number] = replace(answer, finish="abort")
        job.asked.add(number)
        with torch.inference_mode(False):  # the caller may make tensors that are trained on
            self.asked[job.observe(job.key, number, replace(answer, finish="stop"))] = job, number

    def wait(self, seconds: float) -> None:
        """Until an observation is there, and so long at most."""
        wait(self.asked, seconds, FIRST_COMPLETED)

    def collect(self) -> tuple[list[tuple[DecodeJob, int]], list[DecodeJob]]:
        """Take the observations that are there: the answers that go on from what the cache keeps of them, and the jobs
        that are complete with what has come. Answers of which it keeps nothing wait with their jobs."""
        returning: list[tuple[DecodeJob, int]] = []
        done: list[DecodeJob] = []
        gone: list[Kept] = []
        for future in [one for one in self.asked if one.done()]:
            job, number = self.asked.pop(future)
            seen, answer = future.result(), job.answers[number]
            assert answer is not None
            job.asked.discard(number)
            if seen is not None and len(answer) + len(seen) < job.sampling.max_tokens:
                job.answers[number] = behind(answer, seen)
                if number in job.kept and any(slot.bidirectional for slot in seen.slots):
                    gone.append(job.kept.pop(number))  # what stands before such an image goes through with it
                if number in job.kept:
                    job.asked.add(number)  # until it has its row
                    returning.append((job, number))
                elif job not in self.waiting:
                    self.waiting.insert(0, job)
                if job in self.running and not job.is_held:
                    self.running.remove(job)
                continue
            job.answers[number] = replace(answer, finish="stop" if seen is None else "length")
            if number in job.kept:
                gone.append(job.kept.pop(number))
            if job in self.running and not job.is_held:
                self.running.remove(job)
            if job.is_done:
                done.append(job)
        if gone:
            self.tidy(gone=gone)
        return returning, done

    def note_prefill(self, jobs: Sequence[DecodeJob], experts: Tensor) -> None:
        """The experts (T, layers, experts per token) of the packed row of jobs that are about to join."""
        self._tables.keep_experts(*experts.shape[1:])
        for job, (prompt, begun) in zip(jobs, split_experts(self.packed_groups(jobs), experts), strict=True):
            job.prompt_experts = prompt if job.prompt_experts is None else job.prompt_experts
            for number, answer in zip(job.unfinished, begun, strict=False):
                job.answers[number] = answer

    def note_step(self, experts: Tensor) -> None:
        """Those of one token of each row, (B, layers, experts per token)."""
        self._tables.write_experts(self._seat_B, self._tables.place(self.cache.rows.length_B), experts)

    def _answer(self, one: _Live, finish: str) -> Answer:
        """The answer of a row, with what was there before."""
        end = one.job.sampling.max_tokens - one.last + self.cache.rows.step
        before = one.job.answers[one.number]
        new = slice(one.begun, end)
        ids, logprobs, experts = self._tables.read(one.seat, new)
        turn = [] if before is None or not before.segments[-1].trained else before.segments[-1].token_ids.tolist()
        text = self._decode((*turn, *ids))
        more = Answer.sampled(ids, logprobs, text, finish, one.version)
        if experts is not None:
            own = replace(more.segments[0], routed_experts=experts)
            more = replace(more, segments=(own,), prompt_experts=one.job.prompt_experts)
        return more if before is None else before.continued_by(more, text)

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
