"""Rows to servers that speak OpenAI's chat completions: bounded concurrency, several servers, tries with back-off."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from foveate.config.base import is_http_address
from foveate.data.answers import GeneratedAnswer, GeneratedRow, prompt_fields
from foveate.data.conversations import IMAGE_WORD
from foveate.data.table import TaskTable
from foveate.data.videos import refuse_videos
from foveate.encoding.chat import IMAGE_MARK
from foveate.environments.protocol import EnvironmentPool
from foveate.errors import ConfigError, DataError
from foveate.evaluate.client_turns import converse
from foveate.evaluate.shards import Failed
from foveate.records import SamplingParams, Task
from foveate.rewards.remote import data_url
from foveate.rewards.requests import bounded_http
from foveate.rollout.seeds import seed_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

FIRST_REST, LONGEST_REST = 0.5, 30.0
"""Seconds that a server is left alone after its first failure; it doubles with each further one, up to the longest."""
_REFUSED = frozenset({400, 413, 415, 422})
_FATAL = frozenset({401, 403, 404})
_BROKEN_OFF = frozenset({"abort", "error"})
"""How vLLM and SGLang mark an answer that they did not finish."""
_KEY, MOST_REPLY_BYTES = "no-key", 256 * 2**20


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Where and how to ask. `model` None takes the one that the server lists first. `patience` bounds the rows in a
    row without any success, after which the work is given up."""

    endpoints: tuple[str, ...]
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 64
    retries: int = 8
    timeout: float = 600.0
    system: str | None = None
    logprobs: bool = False
    first_rest: float = FIRST_REST

    @property
    def patience(self) -> int:
        return max(20, 2 * self.concurrency)


@dataclass(slots=True)
class Endpoint:
    """One endpoint: how busy it is, and until when it is left alone."""

    url: str
    client: AsyncOpenAI
    model: str
    verbatim: bool
    busy: int = 0
    failures: int = 0
    rests_until: float = 0.0

    def failed(self, started: float, first_rest: float) -> None:
        """Rest longer each time. Requests that were under way together count as one failure."""
        if started >= self.rests_until:
            self.failures += 1
            self.rests_until = time.monotonic() + min(LONGEST_REST, first_rest * 2 ** min(self.failures - 1, 10))


class BadReply(Exception):
    """A reply that is no chat completion, or not the one that was asked for."""


@dataclass(slots=True)
class ChatClient:
    """Asks servers for rows of a table; `deliver` is called with every outcome, in the order in which they come.
    `environments`: those of answers with several turns."""

    settings: ClientSettings
    sampling: SamplingParams
    seed: int
    deliver: Callable[[GeneratedRow | Failed], None]
    servers: list[Endpoint] = field(default_factory=list)
    lost: int = 0
    environments: EnvironmentPool | None = None

    def run(self, table: TaskTable, rows: Iterable[int]) -> None:
        """Ask for `rows` of `table`. Raises ConfigError for servers that do not answer, refuse the key or lack the
        model, and when `patience` rows have failed with none between them that did not."""
        asyncio.run(self._run(table, rows))

    async def _run(self, table: TaskTable, rows: Iterable[int]) -> None:
        async with AsyncExitStack() as stack:
            for url in self.settings.endpoints:
                self.servers.append(await self._connect(url, stack))
            remaining = iter(rows)
            tasks = [asyncio.create_task(self._work(table, remaining)) for _ in range(self.settings.concurrency)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _connect(self, url: str, stack: AsyncExitStack) -> Endpoint:
        openai = _openai()
        client = openai.AsyncOpenAI(
            base_url=url, api_key=os.environ.get(self.settings.key_variable) or _KEY, max_retries=0,
            timeout=self.settings.timeout, **bounded_http(MOST_REPLY_BYTES),
        )  # fmt: skip
        await stack.enter_async_context(client)
        try:
            listed = [(model.id, model.owned_by) async for model in client.models.list(timeout=30.0)]
        except openai.APIStatusError as error:
            raise self._fatal(url, error) from error
        except Exception as error:  # the border around a server
            raise ConfigError(
                f"{url} does not answer ({_reason(error)}); start the server, or fix --endpoint (its address ends "
                "in /v1 as a rule)"
            ) from error
        wanted = self.settings.model or (listed[0][0] if listed else None)
        owners = dict(listed)
        if wanted is None or wanted not in owners:
            raise ConfigError(
                f"{url} has no model {wanted!r}; it has {', '.join(owners) or 'none'}; give --served-model"
            )
        return Endpoint(url, client, wanted, owners[wanted] == "foveate")

    async def _work(self, table: TaskTable, remaining: Iterable[int]) -> None:
        for index in remaining:
            outcome = await self._ask(table[index], index)
            self.lost = self.lost + 1 if isinstance(outcome, Failed) and outcome.kind == "failed" else 0
            self.deliver(outcome)
            if self.lost >= self.settings.patience:
                assert isinstance(outcome, Failed)
                raise ConfigError(
                    f"{self.lost} rows in a row failed, the last by: {outcome.reason}; "
                    "finished rows are kept, and the same command continues with the rest"
                )

    async def _ask(self, task: Task, index: int) -> GeneratedRow | Failed:
        reason = ""
        for attempt in range(1, self.settings.retries + 2):
            server = min(self.servers, key=lambda one: (max(one.rests_until, time.monotonic()), one.busy))
            rest = server.rests_until - time.monotonic()
            if rest > 0:
                await asyncio.sleep(rest * random.uniform(1.0, 1.25))
            started = time.monotonic()
            server.busy += 1
            try:
                asked, answers, used = await self._answers_of(server, task, index)
            except Exception as error:  # the border around a server
                status = _status(error)
                if status in _FATAL:
                    raise self._fatal(server.url, error) from error
                reason = _reason(error)
                if status in _REFUSED or isinstance(error, DataError):
                    return Failed(index, task.id, "refused", reason, attempt)
                server.failed(started, self.settings.first_rest)
            else:
                server.failures = 0
                taken = time.monotonic() - started
                return GeneratedRow(
                    **prompt_fields(asked),
                    answers=answers,
                    index=index,
                    prompt_tokens=used.get("prompt"),
                    answer_tokens=used.get("completion"),
                    seconds=round(taken, 4),
                    tries=attempt,
                    server=server.url,
                )
            finally:
                server.busy -= 1
        return Failed(index, task.id, "failed", reason, self.settings.retries + 1)

    async def _answers_of(
        self, server: Endpoint, task: Task, index: int
    ) -> tuple[Task, tuple[GeneratedAnswer, ...], Mapping[str, int]]:
        """A row as its environments began it, all answers to it, and the tokens that the server counts."""
        if self.environments is None:
            reply = await self._request(server, task, index, self.sampling)
            usage = reply.usage
            counts = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens} if usage else {}
            return task, _answers(reply, self.sampling.samples), counts
        one = replace(self.sampling, samples=1)

        async def ask(asked: Task, number: int, left: int) -> GeneratedAnswer:
            reply = await self._request(server, asked, index + number, replace(one, max_tokens=left))
            [answer] = _answers(reply, 1)
            return answer

        seed = seed_of("eval", self.seed, index)
        return *await converse(self.environments, task, seed, self.sampling, ask), {}

    async def _request(self, server: Endpoint, task: Task, index: int, sampling: SamplingParams) -> Any:
        extra: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
        if server.verbatim:
            extra["verbatim"] = True
        reply = await server.client.chat.completions.create(
            model=server.model,
            messages=messages_of(task, self.settings.system, verbatim=server.verbatim),
            n=sampling.samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed_of("eval", self.seed, index),
            logprobs=self.settings.logprobs,
            extra_body=extra,
        )
        _answers(reply, sampling.samples)
        return reply

    def _fatal(self, url: str, error: Exception) -> ConfigError:
        what = f"is the key in ${self.settings.key_variable} right?" if _status(error) != 404 else "is the model right?"
        return ConfigError(f"{url} refuses every request ({_reason(error)}); {what} Finished rows are kept")


def messages_of(task: Task, system: str | None, *, verbatim: bool) -> Any:
    """A task as OpenAI's messages, images as data: URLs. Servers put a line break behind each image, so the one
    that stands in the text leaves, unless texts are taken `verbatim`."""
    refuse_videos(task, "a served model")
    images = iter(task.images)
    turns: list[dict[str, Any]] = []
    if system is not None and task.messages[0].role != "system":
        turns.append({"role": "system", "content": system})
    for message in task.messages:
        first, *rest = message.content.split(IMAGE_MARK)
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first and rest else []
        for text in rest:
            parts.append({"type": "image_url", "image_url": {"url": data_url(next(images))}})
            kept = (text if verbatim else text.removeprefix("\n")).replace(IMAGE_WORD, IMAGE_MARK)
            parts += [{"type": "text", "text": kept}] if kept else []
        turns.append({"role": message.role, "content": parts or first.replace(IMAGE_WORD, IMAGE_MARK)})
    return turns


def _answers(reply: Any, wanted: int) -> tuple[GeneratedAnswer, ...]:
    """The answers of a reply. Raises BadReply where it lacks any of them: an answer that is not there is not empty."""
    try:
        choices = sorted(reply.choices, key=lambda choice: choice.index)
    except (AttributeError, TypeError):
        raise BadReply(f"the reply is no chat completion: {str(reply)[:80]!r}") from None
    if len(choices) != wanted:
        raise BadReply(f"the reply holds {len(choices)} answers instead of {wanted}")
    total = reply.usage.completion_tokens if reply.usage and wanted == 1 else None
    return tuple(_answer(choice, total) for choice in choices)


def _answer(choice: Any, total: int | None) -> GeneratedAnswer:
    extra = choice.message.model_extra or {}
    thought = extra.get("reasoning_content") or extra.get("reasoning")
    if choice.finish_reason in _BROKEN_OFF:
        raise BadReply(f"the server broke the answer off ({choice.finish_reason})")
    said = choice.message.content
    if said is None and not thought:
        raise BadReply("an answer of the reply has no content")
    text = (f"<think>{thought}</think>\n" if thought else "") + (said or "")
    listed = choice.logprobs.content if choice.logprobs and choice.logprobs.content else ()
    pieces = tuple((entry.token, round(entry.logprob, 4)) for entry in listed)
    return GeneratedAnswer(text, choice.finish_reason or "stop", len(pieces) or total, pieces)


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError:
        raise ConfigError("openai is not installed; run pip install 'foveate[client]'") from None
    return openai


def _status(error: Exception) -> int | None:
    openai: Any = _openai()
    return error.status_code if isinstance(error, openai.APIStatusError) else None  # pyright: ignore


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    return (f"{text} ({type(cause).__name__}: {cause})" if cause else text)[:300]


def endpoints_of(urls: Sequence[str]) -> tuple[str, ...]:
    """Addresses as given, without a slash at the end. Raises ConfigError for one that is none."""
    for url in urls:
        if not is_http_address(url):
            raise ConfigError(
                f"--endpoint {url}: must begin with http:// or https:// and a host, such as http://127.0.0.1:8000/v1"
            )
    return tuple(url.rstrip("/") for url in urls)
