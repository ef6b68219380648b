"""The native engine: batched sampling with the policy's own modules, every prompt computed once for all its answers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import DataError
from foveate.models.forward import embed, evaluating, hidden_states
from foveate.models.policy import DTYPES, Policy
from foveate.models.routing import Routing, follow_routers
from foveate.models.sizes import state_numbers
from foveate.parallel.fsdp import full_tensor
from foveate.parallel.packing import pack, pack_tails
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Observe, Request, in_order
from foveate.rollout.native.batch import DecodeBatch, DecodeJob
from foveate.rollout.native.cache import cached_numbers
from foveate.rollout.native.graphs import recorder
from foveate.rollout.native.prefixes import Beginnings, shared_beginnings
from foveate.rollout.native.room import Use, row_of
from foveate.rollout.native.sampling import Logits, draw
from foveate.rollout.native.shelves import FIRST_ROOM
from foveate.rollout.native.tables import with_experts

_TOKENS = 32_768
_SLACK, _WORTH = 0.25, 16
"""Where steps are recorded: which share of the rows may be done before the rest is recorded anew, and how many steps
must be ahead to record one."""
_LOOK = 0.05
"""Seconds after which a pause is noticed at the latest where all answers wait for observations."""
_PREFILL = 4096
"""Tokens of newcomers that go through the model between two steps of those that are there; one prompt may be longer."""


@dataclass(slots=True)
class Stats:
    """Counts of the engine's work since it was made. `prefills` and `prefill_tokens` count prompts and their tokens,
    those of answers that go on included, what several of a prompt have in common once; `decode_steps` counts forward
    passes over live answers, `decode_tokens` the answer tokens that went through them (the last token of an answer is
    never fed back). `turns` counts answers that went on behind an observation from what was kept of them, `turn_tokens`
    what went through the model for it: the observation, and the token before it."""

    prefills: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    turns: int = 0
    turn_tokens: int = 0


class NativeEngine:
    """Samples with a policy's model in this process (the `Engine` seam of `foveate.rollout.engine`).

    Answers are the rows of a running batch (`foveate.rollout.native.batch`), and every step takes one token of each of
    them through the model. They leave when they are finished, and requests that wait join, in their order, as far as
    the cache has room: several prompts go through the model as one packed row, each once, images included. Room is
    taken as answers grow. Where none is left, the request that joined last is put back, and goes on later from the
    tokens that it has: they go through the model behind their prompt, as those of answers that were interrupted. The
    reported log-probs are those of `foveate.rollout.native.sampling.draw`: over the whole vocabulary, comparable with
    the trainer's. On a GPU, steps are recorded and replayed (`foveate.rollout.native.graphs`).
    """

    def __init__(
        self,
        policy: Policy,
        decode: Callable[[tuple[int, ...]], str],
        *,
        version: int = 0,
        token_budget: int | None = None,
        own_weights: bool = False,
        record_experts: bool = False,
    ) -> None:
        """`decode` gives the text of an answer (`Encoder.decode`). `token_budget` bounds the tokens that the key-value
        cache has room for, of prompts and answers together (None: `cache_tokens`); a prompt whose answers alone exceed
        it has the engine to itself. With `own_weights` the model belongs to the engine and `publish` copies
        into it; without, whoever trains the policy changes the very tensors that the engine reads. `record_experts`:
        answers say which experts of a mixture their tokens were computed with, and are continued with these. Raises
        ConfigError where the routers of the model are not known."""
        self.policy = policy
        self.version = version
        self.stats = Stats()
        self._decode = decode
        self._token_budget = token_budget
        self._own_weights = own_weights
        self._paused = threading.Event()
        weight = policy.part("head").weight
        assert isinstance(weight, Tensor)
        self._known = min(len(policy.tokenizer), len(weight))  # the vocabulary may have more rows
        banned = sorted(token for token in policy.family.placeholder_ids if token < self._known)
        self._banned = torch.tensor(banned, dtype=torch.int64, device=policy.device)
        self._stop = torch.tensor(policy.family.stop_ids, device=policy.device)
        self._logits = Logits()
        self._record = recorder(policy)
        self._records_experts = record_experts
        if record_experts:
            follow_routers(policy.model, "record_experts")

    @classmethod
    def copy_of(
        cls,
        policy: Policy,
        decode: Callable[[tuple[int, ...]], str],
        *,
        version: int = 0,
        token_budget: int | None = None,
        dtype: str | None = None,
        record_experts: bool = False,
    ) -> NativeEngine:
        """An engine with its own copy of the policy's weights, in `dtype` (None: theirs), which changes by `publish`
        alone."""
        copies = {}
        if dtype is not None:  # of no buffer: rotations stay as exact as they are
            parameters = policy.model.parameters()
            copies = {id(p): nn.Parameter(p.detach().to(DTYPES[dtype], copy=True)) for p in parameters}
        own = replace(policy, model=copy.deepcopy(policy.model, copies).requires_grad_(False), features=None)
        return cls(
            own, decode, version=version, token_budget=token_budget, own_weights=True, record_experts=record_experts
        )

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> list[tuple[Answer, ...]]:
        """`sampling.samples` answers per request, in the order of the requests. An answer ends with a stop token, which
        it includes (finish "stop"), or after `sampling.max_tokens` tokens (finish "length")."""
        observing = () if observe is None else (observe,)  # subclasses may know one turn alone
        return in_order(self.stream(requests, sampling, *observing), requests)

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        """Groups as they finish, computed as the caller asks for them."""
        batch = self.open()
        for index, request in enumerate(requests):
            job = DecodeJob(index, request, sampling, observe=observe)
            if job.unfinished:
                batch.add(job, self.policy.family.stop_ids)
            else:
                yield index, request.partial_answers
        while batch.busy:
            for job in self._advance(batch):
                yield job.key, job.group
            if self._paused.is_set() and not batch.live:
                yield from ((job.key, job.group) for job in batch.left)
                return

    def open(self, token_budget: int | None = None, turn: int | None = None) -> DecodeBatch:
        """A batch whose `waiting` requests are answered by `step`. With a `turn`, who waits gets the place of the one
        that has had the most steps, and at least so many; it goes on later."""
        slack = 0.0 if self._record is None else _SLACK
        budget = token_budget or self._token_budget or cache_tokens(self.policy)
        return DecodeBatch(self._decode, self.policy.device, budget, slack=slack, turn=turn)

    def step(self, batch: DecodeBatch) -> list[DecodeJob]:
        """Let jobs join, and sample one token of each live answer: the jobs that have all their answers now. While the
        engine is paused nothing joins, and all that are left are given, unfinished answers with finish "abort". The
        model must be in evaluation mode: to set hundreds of modules in every step would take longer than some steps.
        Where the prompts of jobs cannot be computed, these are in `batch.failed`, and the others go on."""
        with torch.inference_mode():
            return self._step(batch)

    def pause(self) -> None:
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Answers sampled from now on carry `version`. An engine with its own weights copies all of `weights`, named as
        in the model's state dict, one after the other; those that are sharded over ranks are gathered for it. Raises
        DataError, with nothing changed, where a name is unknown or missing or a shape differs. An engine that shares
        the policy's weights has them already and looks at none."""
        if self._own_weights:
            _copy_weights(self.policy.model, dict(weights))
        self.version = version

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's own: nothing is expanded here."""
        return prompt.token_ids

    def sleep(self) -> None:
        """Nothing to give back: the weights are the trainer's, and the cache of a batch goes with it."""

    def healthy(self) -> bool:
        return True

    def statistics(self) -> dict[str, float]:
        return {name: float(count) for name, count in asdict(self.stats).items()}

    def close(self) -> None:
        """Nothing runs outside of a call."""

    def _advance(self, batch: DecodeBatch) -> list[DecodeJob]:
        """Sample until jobs of the batch have all their answers, or the engine is paused. No caller's code runs within,
        where autograd is off and the model in evaluation mode."""
        finished: list[DecodeJob] = []
        with torch.inference_mode(), evaluating(self.policy.model):
            while batch.busy and not finished and (batch.live or not self._paused.is_set()):
                finished = self._step(batch)
                if batch.asked and not (finished or batch.live):
                    batch.wait(_LOOK)
        return finished

    def _step(self, batch: DecodeBatch) -> list[DecodeJob]:
        rows, finished = batch.cache.rows, list[DecodeJob]()
        if batch.asked and not self._paused.is_set():
            returning, finished = batch.collect()
            finished += self._go_on(batch, returning)
        if not rows.is_fixed or (batch.turn is not None and batch.waiting):
            batch.tidy()
            if not self._paused.is_set():
                finished += self._let_join(batch)
            while len(batch.running) > 1 and Use(rows).places > batch.token_budget:
                batch.put_back(batch.running[-1], 0)
        if batch.live:
            hidden = self._decode_step(batch)
            found = batch.sample(hidden, self._draw)
            finished += batch.finish(*found, self._stop, self._paused.is_set())
        return finished

    def _let_join(self, batch: DecodeBatch) -> list[DecodeJob]:
        """Let those join that wait and have room; the jobs that their first tokens complete."""
        jobs = self._choose(batch)
        if not jobs and batch.waiting and batch.turn is not None:
            leaving = min(batch.running, key=lambda job: job.joined)
            if batch.cache.rows.step - leaving.joined >= batch.turn:
                batch.put_back(leaving, len(batch.waiting))
                jobs = self._choose(batch)
        finished: list[DecodeJob] = []
        while jobs and not finished:
            together = jobs[: row_of([job.tokens for job in jobs], self.policy.device)]
            del batch.waiting[: len(together)], jobs[: len(together)]
            batch.failed = together
            hidden = self._prefill(batch, together)
            batch.failed = []
            last = hidden[batch.cache.rows.last_B]
            newcomers, order = batch.join(together, self.version)
            found = batch.sample(last[order], self._draw, newcomers)
            finished = batch.finish(*found, self._stop, self._paused.is_set(), newcomers)
        return finished

    def _go_on(self, batch: DecodeBatch, returning: Sequence[tuple[DecodeJob, int]]) -> list[DecodeJob]:
        """Let answers go on behind what they have observed: their observations go through the model as one row, which
        meets what the cache keeps of them. The jobs that their first tokens complete."""
        if not returning:
            return []
        tails = []
        for job, number in returning:
            answer = job.answers[number]
            assert answer is not None
            job.asked.discard(number)
            tails.append((job.request.prompt, answer, job.kept[number].answer_length))
        packed, routing = pack_tails(tails).to(self.policy.device), self._routing()
        kept = [job.kept[number] for job, number in returning]
        batch.cache.announce_return(kept, packed.forest.length)
        embeddings, more = embed(self.policy, packed)
        language: Any = self.policy.part("language")
        position = packed.position_T[..., None, :]
        out = language(
            inputs_embeds=embeddings[None], position_ids=position, cache=batch.cache, routing=routing, use_cache=False,
            **more,
        )  # fmt: skip
        if routing is not None:
            parts = zip(returning, tails, routing.experts().split(packed.forest.length), strict=True)
            for (job, number), (_, answer, begin), experts in parts:
                job.answers[number] = with_experts(answer, experts, begin)
        last = out.last_hidden_state[0][batch.cache.rows.last_B]
        self.stats.turns += len(returning)
        self.stats.turn_tokens += packed.forest.tokens
        newcomers, order = batch.come_back(returning, self.version)
        found = batch.sample(last[order], self._draw, newcomers)
        return batch.finish(*found, self._stop, self._paused.is_set(), newcomers)

    def _choose(self, batch: DecodeBatch) -> list[DecodeJob]:
        """The first of those that wait, as many as have room, and as do not keep those waiting who have rows."""
        use, tokens = Use(batch.cache.rows), 0
        for number, job in enumerate(batch.waiting):
            lengths = [len(one) for one in job.begun]
            lengths += [0] * (len(job.unfinished) - len(lengths))
            places = use.with_more(len(job.request.prompt), lengths, job.limit)
            tokens += job.tokens
            is_first = number == 0 and not batch.running
            is_long = number > 0 and bool(batch.running) and tokens > _PREFILL
            if not is_first and (places > batch.token_budget or is_long):
                return batch.waiting[:number]
        return batch.waiting[:]

    def _prefill(self, batch: DecodeBatch, jobs: Sequence[DecodeJob]) -> Tensor:
        """The hidden states (T, D) of the packed row of prompts and begun answers, whose keys and values the cache
        keeps."""
        groups = batch.packed_groups(jobs)
        tree = Beginnings(groups, [], {}) if self._records_experts else shared_beginnings(groups)
        packed = pack(tree.groups, tree.cuts).to(self.policy.device)
        routing = self._routing(packed.routed_experts)
        lengths = [len(job.request.prompt) for job in jobs]
        limits = [[job.limit] * len(job.unfinished) for job in jobs]
        batch.cache.announce(packed.forest, lengths, limits, tree.held)
        try:
            hidden = hidden_states(self.policy, packed, batch.cache, routing=routing)
        except BaseException:
            batch.cache.abandon()
            raise
        if routing is not None:
            batch.note_prefill(jobs, routing.experts())
        self.stats.prefills += len(jobs)
        self.stats.prefill_tokens += packed.forest.tokens
        return hidden

    def _decode_step(self, batch: DecodeBatch) -> Tensor:
        """One token of each live answer through the language model: the hidden states (B, D)."""
        language: Any = self.policy.part("language")
        cache = batch.cache

        routing = self._routing()

        def through(last_B: Tensor, position_B: Tensor) -> Tensor:
            embeddings, position = language.get_input_embeddings()(last_B)[None], position_B[None]
            out = language(
                inputs_embeds=embeddings, position_ids=position, cache=cache, routing=routing, use_cache=False
            )
            return out.last_hidden_state[0]

        if not cache.rows.is_fixed:
            batch.replay = None  # before another is recorded, so that its memory is free
            moved = cache.promote()
            if moved is not None:
                batch.reorder(moved)
            if self._record is not None:
                cache.rows.fix()
                if min(batch.ahead, cache.rows.steady) > _WORTH:
                    batch.replay = self._record(through, batch.last_B, batch.position_B)
                else:
                    cache.rows.loosen()
        hidden = (batch.replay or through)(batch.last_B, batch.position_B)
        if routing is not None:
            batch.note_step(routing.experts())
        cache.extend()
        self.stats.decode_steps += 1
        self.stats.decode_tokens += sum(one is not None for one in batch.live)
        return hidden

    def _routing(self, replay: Tensor | None = None) -> Routing | None:
        """The choices of routers in a pass of this engine, which it records."""
        return Routing(replay, records=True) if self._records_experts else None

    def _draw(self, hidden: Tensor, uniform_B: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
        """Token ids and log-probs (B,) drawn from hidden states (B, D)."""
        weight = self.policy.part("head").weight
        assert isinstance(weight, Tensor)
        drawn, first = [], 0
        for logits in self._logits.of(hidden, weight):
            uniform = uniform_B[first : first + len(logits)]
            drawn.append(draw(logits, uniform, sampling, self._banned, self._known))
            first += len(logits)
        return torch.cat([token for token, _ in drawn]), torch.cat([logprob for _, logprob in drawn])


def cache_tokens(policy: Policy) -> int:
    """How many tokens a decode batch may hold by default: 32,768, or what half of a GPU's free memory has room for,
    each with its keys and values in all layers, and with 16 hidden states while it is first computed. States of
    recurrent layers count as those of the tokens that an answer begins with room for."""
    if policy.device.type != "cuda":
        return _TOKENS
    head = policy.part("head").weight
    assert isinstance(head, Tensor)
    config: Any = policy.model.config
    states = state_numbers(config.get_text_config()) * 4 // FIRST_ROOM
    size = (cached_numbers(policy) + 16 * head.shape[1]) * head.element_size() + states
    held = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    return max(
        _TOKENS if not states else FIRST_ROOM, int((torch.cuda.mem_get_info(policy.device)[0] + held) / 2 / size)
    )


@torch.no_grad()
def _copy_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    known = model.state_dict()
    missing = sorted({name for name, _ in model.named_parameters()} - weights.keys())
    unknown = sorted(weights.keys() - known.keys())
    if missing or unknown:
        what, names = ("lack", missing) if missing else ("hold an unknown", unknown)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise DataError(f"published weights {what} {names[0]}{more}; publish the whole state dict of the same model")
    for name, tensor in weights.items():
        if tensor.shape != known[name].shape:
            found, wanted = tuple(tensor.shape), tuple(known[name].shape)
            raise DataError(f"published weights: {name} has shape {found}, the engine's model has {wanted}")
    for name, tensor in weights.items():
        known[name].copy_(full_tensor(tensor))
