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
from foveate.models.forward import evaluating, hidden_states
from foveate.models.logprobs import logits_of
from foveate.models.policy import DTYPES, Policy
from foveate.parallel.fsdp import full_tensor
from foveate.parallel.packing import pack
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Request, in_order
from foveate.rollout.native.batch import DecodeBatch, Watch
from foveate.rollout.native.cache import GroupCache, cached_numbers
from foveate.rollout.native.graphs import recorder
from foveate.rollout.native.sampling import draw

_TOKENS = 32_768
_LOGITS = 1 << 24
"""Logits held at a time, rows x vocabulary: 2**24 float32 values are 64 MB."""
_SLACK, _WORTH = 0.25, 16
"""Where steps are recorded: which share of the rows may be done before the rest is recorded anew, and how many steps
must be ahead to record one."""


@dataclass(slots=True)
class Stats:
    """Counts of the engine's work since it was made. `prefills` and `prefill_tokens` count prompts and their tokens,
    those of answers that go on included; `decode_steps` counts forward passes over live answers, `decode_tokens` the
    answer tokens that went through them (the last token of an answer is never fed back)."""

    prefills: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0


class NativeEngine:
    """Samples with a policy's model in this process (the `Engine` seam of `foveate.rollout.engine`).

    Requests are answered in decode batches. The prompts of a batch go through the model as one packed row, each once,
    images included; then every step takes one token of each live answer through it, and finished answers leave. Answers
    that were interrupted go on behind their prompt: all their tokens go through the model in that first row. The
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
    ) -> None:
        """`decode` gives the text of an answer (`Encoder.decode`). `token_budget` bounds the tokens in the key-value
        cache, prompts and longest possible answers together (None: `cache_tokens`); a prompt whose answers
        alone exceed it has a batch to itself. With `own_weights` the model belongs to the engine and `publish` copies
        into it; without, whoever trains the policy changes the very tensors that the engine reads."""
        self.policy = policy
        self.version = version
        self.stats = Stats()
        self._decode = decode
        self._token_budget = token_budget
        self._own_weights = own_weights
        self._paused = threading.Event()
        weight = policy.part("head").weight
        assert isinstance(weight, Tensor)
        unknown = range(len(policy.tokenizer), len(weight))  # rows of the vocabulary that the tokenizer does not have
        banned = sorted({*policy.family.placeholder_ids, *unknown})
        self._banned = torch.tensor(banned, dtype=torch.int64, device=policy.device)
        self._stop = torch.tensor(policy.family.stop_ids, device=policy.device)
        self._record = recorder(policy)

    @classmethod
    def copy_of(
        cls,
        policy: Policy,
        decode: Callable[[tuple[int, ...]], str],
        *,
        version: int = 0,
        token_budget: int | None = None,
        dtype: str | None = None,
    ) -> NativeEngine:
        """An engine with its own copy of the policy's weights, in `dtype` (None: theirs), which changes by `publish`
        alone."""
        copies = {}
        if dtype is not None:  # of no buffer: rotations stay as exact as they are
            parameters = policy.model.parameters()
            copies = {id(p): nn.Parameter(p.detach().to(DTYPES[dtype], copy=True)) for p in parameters}
        own = replace(policy, model=copy.deepcopy(policy.model, copies).requires_grad_(False))
        return cls(own, decode, version=version, token_budget=token_budget, own_weights=True)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[tuple[Answer, ...]]:
        """`sampling.samples` answers per request, in the order of the requests. An answer ends with a stop token, which
        it includes (finish "stop"), or after `sampling.max_tokens` tokens (finish "length")."""
        return in_order(self.stream(requests, sampling), requests)

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        """Groups as they finish, computed as the caller asks for them."""
        open_ = [
            i
            for i, r in enumerate(requests)
            if not r.partial_answers or any(c.finish == "abort" for c in r.partial_answers)
        ]
        yield from ((i, request.partial_answers) for i, request in enumerate(requests) if i not in open_)
        budget = self._token_budget or cache_tokens(self.policy)
        for members in plan_decode_batches([len(requests[i].prompt) for i in open_], sampling, budget):
            if self._paused.is_set():
                return
            decode_batch = self.begin([requests[open_[i]] for i in members], sampling)
            while decode_batch.live:
                for number in self._advance(decode_batch):
                    yield open_[members[number]], decode_batch.group(number, self._decode)

    def begin(self, requests: Sequence[Request], sampling: SamplingParams, watch: Watch | None = None) -> DecodeBatch:
        """A decode batch that the caller advances by `step`, beside others where it likes. `watch` may end answers."""
        slack = 0.0 if self._record is None else _SLACK
        return DecodeBatch(requests, sampling, self.version, self.policy.device, slack, watch)

    def step(self, decode_batch: DecodeBatch) -> dict[int, tuple[Answer, ...]]:
        """Sample one token of each live answer: the groups that are complete now, by the number of their request. While
        the engine is paused these are all that are left, unfinished answers with finish "abort". The model must be in
        evaluation mode: to set hundreds of modules in every step would take longer than some steps."""
        with torch.inference_mode():
            finished = self._step(decode_batch)
        return {number: decode_batch.group(number, self._decode) for number in finished}

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

    def _advance(self, decode_batch: DecodeBatch) -> list[int]:
        """Sample until requests of the batch have all their answers: their numbers. No caller's code runs within,
        where autograd is off and the model in evaluation mode."""
        finished: list[int] = []
        with torch.inference_mode(), evaluating(self.policy.model):
            while not finished:
                finished = self._step(decode_batch)
        return finished

    def _step(self, decode_batch: DecodeBatch) -> list[int]:
        cache = decode_batch.cache
        hidden = self._prefill(decode_batch) if cache is None else self._decode_step(decode_batch, cache)
        token_B, logprob_B = self._sample(hidden, decode_batch.uniform_B, decode_batch.sampling)
        return decode_batch.take(token_B, logprob_B, self._stop, self._paused.is_set())

    def _prefill(self, decode_batch: DecodeBatch) -> Tensor:
        """The last hidden state of each answer, (B, D): that of its prompt, or of its last token where it was begun.
        The batch gets its cache, with the keys and values of prompts and of what was begun."""
        device = self.policy.device
        batch = pack(decode_batch.packed_groups).to(device)
        lengths = [len(packed.prompt) for packed in decode_batch.packed_groups]
        sampling = decode_batch.sampling
        cache = GroupCache(batch.forest, lengths, sampling.samples, sampling.max_tokens - 1, device)
        decode_batch.cache = cache
        hidden = hidden_states(self.policy, batch, cache)
        cache.fork()
        self.stats.prefills += len(decode_batch.packed_groups)
        self.stats.prefill_tokens += batch.forest.tokens
        decode_batch.packed_groups = []  # so that their images are freed
        return hidden[cache.rows.last_B]

    def _decode_step(self, decode_batch: DecodeBatch, cache: GroupCache) -> Tensor:
        """One token of each live answer through the language model: the hidden states (B, D)."""
        language: Any = self.policy.part("language")

        def through(last_B: Tensor, position_B: Tensor) -> Tensor:
            embeddings = language.get_input_embeddings()(last_B)[None]
            out = language(inputs_embeds=embeddings, position_ids=position_B[None], cache=cache, use_cache=False)
            return out.last_hidden_state[0]

        if not cache.rows.is_fixed:
            decode_batch.replay = None  # before another is recorded, so that its memory is free
            cache.rows.loosen()
            if self._record is not None and decode_batch.ahead > _WORTH:
                cache.rows.fix()
                decode_batch.replay = self._record(through, decode_batch.last_B, decode_batch.position_B)
        hidden = (decode_batch.replay or through)(decode_batch.last_B, decode_batch.position_B)
        cache.extend()
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(decode_batch.live)
        return hidden

    def _sample(self, hidden: Tensor, uniform_B: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
        """Token ids and log-probs (B,) drawn from hidden states (B, D), as many rows at a time as bounds the logits."""
        weight = self.policy.part("head").weight
        assert isinstance(weight, Tensor)
        rows = max(1, _LOGITS // len(weight))
        drawn = [
            draw(logits_of(some, weight), uniform, sampling, self._banned)
            for some, uniform in zip(hidden.split(rows), uniform_B.split(rows), strict=True)
        ]
        return torch.cat([token for token, _ in drawn]), torch.cat([logprob for _, logprob in drawn])


def cache_tokens(policy: Policy) -> int:
    """How many tokens a decode batch may hold by default: 32,768, or what half of a GPU's free memory has room for,
    each with its keys and values in all layers, and with 16 hidden states while it is first computed."""
    if policy.device.type != "cuda":
        return _TOKENS
    head = policy.part("head").weight
    assert isinstance(head, Tensor)
    size = (cached_numbers(policy) + 16 * head.shape[1]) * head.element_size()
    held = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    return max(_TOKENS, int((torch.cuda.mem_get_info(policy.device)[0] + held) / 2 / size))


def plan_decode_batches(prompt_lengths: Sequence[int], sampling: SamplingParams, token_budget: int) -> list[list[int]]:
    """Indices of the prompts of each decode batch, prompts of like length together, so that little of the cache is
    padding.

    A prompt takes as many cache tokens as the longest of its batch, plus `max_tokens` for each of its answers.
    """
    decode_batches: list[list[int]] = []
    for index in sorted(range(len(prompt_lengths)), key=lambda i: prompt_lengths[i]):
        tokens = prompt_lengths[index] + sampling.samples * sampling.max_tokens
        if not decode_batches or (len(decode_batches[-1]) + 1) * tokens > token_budget:
            decode_batches.append([])
        decode_batches[-1].append(index)
    return decode_batches


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
