"""A teacher behind a server of vLLM: how probable it finds the tokens of answers, by the log-probs of prompts.

Tokens go in as ids and images as the tiles that the trainer sees, so nothing is tokenised or resized again. Each answer
is a request with its prompt before it: the server computes that prompt for each of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.encoding.family import Family
from foveate.errors import ConfigError, EngineError
from foveate.models.families import served_as
from foveate.parallel.packing import answer_slots
from foveate.records import Answer, PackedGroup, Prompt
from foveate.rewards.requests import RemoteServer, RequestThread, ServerReply, Session
from foveate.rollout.server.turns import extended
from foveate.rollout.vllm.engine import GENERATE, image_features

if TYPE_CHECKING:
    from openai import AsyncOpenAI

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the server's key, which is not sent where it is not set."""
_CONCURRENT, _GROUPS = 16, 4
"""Requests under way at once, and groups whose images are held for them."""
_TIMEOUT_S, _PATIENCE_S = 600.0, 300.0
_SETTING = "algorithm.teacher"


class RemoteTeacher:
    """The teacher at an address. Its log-probs are those of temperature 1."""

    def __init__(self, url: str, family: Family, dtype: torch.dtype, patience: float = _PATIENCE_S) -> None:
        """`family`: of the prompts; `dtype`: of the server's weights, in which images are sent; `patience`: seconds for
        which the server may be down. Raises ConfigError for a family that vLLM does not serve."""
        served_as(family, "vllm")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._family, self._dtype = family, dtype
        self._server = RemoteServer(self.url, _SETTING, KEY_VARIABLE, 3, _TIMEOUT_S, _CONCURRENT, patience)

    def logprobs(self, groups: Sequence[PackedGroup]) -> list[Tensor]:
        """Log-probs (M,), float32, of the trained tokens of each group. Raises EngineError where the server refuses, is
        down for longer than its patience, or has read other tokens."""
        return self._fetched(self._all, groups)

    def check(self, tokenizer: Any) -> None:
        """Raise ConfigError unless the server gives log-probs of prompts and has this tokenizer: the text of all of its
        tokens, one after the other, is the same there."""
        ids = list(range(len(tokenizer)))
        try:
            text = self._fetched(self._post, "/detokenize", {"tokens": ids}).get("prompt")
            given = self._fetched(self._post, GENERATE, _body(ids[:2])).get("prompt_logprobs")
        except EngineError as error:
            raise ConfigError(
                f"{_SETTING}: {error}; a teacher behind a server needs vLLM's (vllm serve MODEL --enable-scale-out)"
            ) from error
        if text != tokenizer.decode(ids, skip_special_tokens=False) or given is None:
            raise ConfigError(
                f"{_SETTING}: the tokenizer of {self.url} is another than the model's; log-probs of the same tokens "
                "are compared, so serve a teacher with the model's tokenizer"
            )

    def _fetched(self, fetch: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """The result of a fetch, whose connections are closed with it."""
        requests = RequestThread()
        try:
            return requests.submit(fetch, *arguments).result()
        finally:
            requests.close()

    async def _all(self, session: Session, groups: Sequence[PackedGroup]) -> list[Tensor]:
        room = asyncio.Semaphore(_GROUPS)
        return await asyncio.gather(*(self._group(session, group, room) for group in groups))

    async def _group(self, session: Session, group: PackedGroup, room: asyncio.Semaphore) -> Tensor:
        async with room:
            images = self._features(group.prompt)
            answers = (self._answer(session, group.prompt, images, answer) for answer in group.answers)
            return torch.tensor([logp for found in await asyncio.gather(*answers) for logp in found])

    async def _answer(self, session: Session, prompt: Prompt, images: Any, answer: Answer) -> list[float]:
        """Log-probs of the trained tokens of one answer; `images`: those of the prompt."""
        whole = extended(prompt, answer)
        body = _body(whole.token_ids, self._features(whole) if answer_slots(answer) else images)
        given = (await self._post(session, GENERATE, body)).get("prompt_logprobs") or []
        found, at = [], len(prompt)
        for segment in answer.segments:
            places = range(at, at + len(segment)) if segment.trained else ()
            try:
                found += [given[place][str(whole.token_ids[place])]["logprob"] for place in places]
            except (LookupError, TypeError):
                raise EngineError(f"{_SETTING}: {self.url} has read other tokens than it was sent") from None
            at += len(segment)
        for logp in found:
            if not (isinstance(logp, int | float) and math.isfinite(logp) and logp < 1e-3):
                raise EngineError(f"{_SETTING}: {self.url} gave {logp!r:.40} as a log-prob, which is none")
        return found

    def _features(self, prompt: Prompt) -> dict[str, Any] | None:
        return None if prompt.pixels is None else image_features(self._family, prompt, self._dtype)

    async def _post(self, session: Session, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async def request(client: AsyncOpenAI, headers: dict[str, Any]) -> ServerReply:
            options: Any = {"headers": headers}
            return ServerReply(await client.post(self.url + path, body=body, cast_to=str, options=options))

        hashes = (body.get("features") or {}).get("mm_hashes")
        tokens = body.get("token_ids") or body["tokens"]
        content = hashlib.sha256(json.dumps([path, tokens, hashes]).encode()).hexdigest()
        try:
            reply = (await session.ask(self._server, content, request)).text
            found = json.loads(reply)
        except ConnectionError as error:
            raise EngineError(str(error)) from error
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise EngineError(f"{_SETTING}: {self.url}{path} replied what is no mapping in JSON: {reply[:80]!r}")
        return found


def _body(token_ids: Sequence[int], features: dict[str, Any] | None = None) -> dict[str, Any]:
    """A request for the log-probs of all tokens but the first, and for one more token, since there is none for less."""
    params = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
    images = {} if features is None else {"features": features}
    return {"token_ids": list(token_ids), "sampling_params": params, **images}
