"""Rewards from elsewhere: a language model that judges, and a server that scores.

Both are asked by openai's asynchronous client (`pip install 'foveate[client]'`), `concurrency` requests at once, and
equal requests once (`foveate.rewards.requests`). A server that is busy or gone is asked again for as long as its
patience lasts. The time limit of the worker processes (`foveate.rewards.pool`) does not count this waiting.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from foveate.data.images import open_picture
from foveate.data.videos import refuse_videos
from foveate.errors import ConfigError
from foveate.records import Image, Score, Task
from foveate.rewards.build import WHOLE, Reward, WrongResult, as_score, is_number
from foveate.rewards.requests import RemoteServer, ServerReply, Session
from foveate.rewards.text import jsonable, question

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_ERROR_FIELDS = {"error", "errors", "code", "status", "status_code", "detail", "message"}
RUBRIC = """You grade an answer to a question.

Question:
{question}

Reference answer:
{truth}

Answer to grade:
{answer}

Does the answer agree with the reference? Close with one line `score: N`, where N is a number from 0 (wrong) to \
{scale} (right)."""

_NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+"
_SCORE = re.compile(
    rf"score[\"'*]*\s*[:=：][\s\"'*]*([+-]?(?:{_NUMBER}))(?:\s*/\s*({_NUMBER}))?([%％_x/]|[.,]\d)?", re.IGNORECASE
)
"""A score, the scale that stands behind it, and what makes another number of it."""


def judge(
    *,
    url: str,
    model: str,
    prompt: str = RUBRIC,
    scale: float = 10.0,
    max_tokens: int = 512,
    temperature: float = 0.0,
    images: bool = False,
    api_key_variable: str = "OPENAI_API_KEY",
    retries: int = 3,
    timeout: float = 60.0,
    concurrency: int = 64,
    patience: float = 300.0,
) -> Reward:
    """The score that a judge model gives, divided by `scale` and held to 0..1.

    Args:
        url: base of an OpenAI-compatible server, such as `http://localhost:8000/v1`.
        model: name of the judge on that server.
        prompt: what the judge is asked; {question}, {truth}, {answer} and {scale} are filled in. It must make the judge
            write `score: N`, also in JSON; the last one counts.
        max_tokens, temperature: of the judge's answer.
        images: whether the judge sees the images of the task.
        api_key_variable: the environment variable that holds the key; no key is sent if it is not set.
        retries: how often a request is repeated at once when the server is busy or does not answer.
        timeout: seconds without a sign of the server until a request is given up.
        concurrency: requests that are under way at once.
        patience: seconds for which the server may be down before answers are not graded.

    A reply without a score, one that was cut at `max_tokens`, and a server that refuses, raise ValueError and
    ConnectionError: the answer is not graded, with the reason as its note. Raises ConfigError for a prompt without
    {answer} and a scale that is not positive.
    """
    if "{answer}" not in prompt:
        raise ConfigError("reward judge: prompt must contain {answer}; it may contain {question}, {truth} and {scale}")
    if not 0 < scale < math.inf:
        raise ConfigError(f"reward judge: scale must be a finite number greater than 0, found {scale:g}")
    server = RemoteServer(url, "reward judge", api_key_variable, retries, timeout, concurrency, patience)

    async def fetch(session: Session, text: str, task: Task) -> str:
        values = {"{question}": question(task), "{truth}": str(jsonable(task.answer)), "{answer}": text}
        content: Any = _fill(prompt, {**values, "{scale}": f"{scale:g}"})
        if images:
            refuse_videos(task, "the judge")
            shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in task.images]
            content = [*shown, {"type": "text", "text": content}]
        messages = [{"role": "user", "content": content}]
        asked = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        return (await session.ask(server, json.dumps(asked), partial(_chat, asked))).text

    def reward(_text: str, _task: Task, reply: str) -> Score:
        return _last_score(reply, scale)

    return Reward("judge", reward, fetch=fetch)


def _last_score(reply: str, scale: float) -> Score:
    """The last score that a judge has written. Raises ValueError where there is none, or where it is another number."""
    marks = _SCORE.findall(reply)
    if not marks:
        raise ValueError(f"the judge wrote no `score: N`: {reply[-80:]!r}")
    number, out_of, more = marks[-1]
    if more or float(out_of or scale) != scale:
        read = number + (out_of and f"/{out_of}") + more
        raise ValueError(f"the judge wrote score: {read[:40]}, which is no number of 0 to {scale:g}")
    return Score(min(max(float(number) / scale, 0.0), 1.0))


async def _chat(asked: dict[str, Any], client: AsyncOpenAI, headers: dict[str, Any]) -> ServerReply:
    try:
        reply = await client.chat.completions.create(**asked, extra_headers=headers)
        choice, used = reply.choices[0], reply.usage  # openai takes what servers send without a look at it
        why, text = choice.finish_reason, choice.message.content or ""
        assert isinstance(text, str)
    except (AttributeError, LookupError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"the judge's reply is no chat completion with a text ({type(error).__name__})") from error
    if why == "length":  # a score in it may be one that it was still weighing, or half of a number
        raise ValueError(f"the judge's reply was cut at max_tokens={asked['max_tokens']}")
    tokens = (used.prompt_tokens, used.completion_tokens) if used else ()
    return ServerReply(text, *(count if isinstance(count, int) else 0 for count in tokens))


def endpoint(
    *,
    url: str,
    api_key_variable: str = "",
    retries: int = 3,
    timeout: float = 60.0,
    concurrency: int = 64,
    patience: float = 300.0,
) -> Reward:
    """The score that a server of yours gives.

    For each answer it gets `data_source`, `question`, `solution_str`, `ground_truth` and `extra_info`, by POST as JSON.
    It sends back a number, or a mapping as `build.as_score` takes it; one with the form of an error (`_is_error`) is an
    error of the server, as a refusal is, and no score.

    Args:
        url: where to post.
        api_key_variable: the environment variable that holds a bearer token; "" sends none.
        retries, timeout, concurrency, patience: as with `judge`.
    """
    server = RemoteServer(url, "reward endpoint", api_key_variable, retries, timeout, concurrency, patience)

    async def fetch(session: Session, text: str, task: Task) -> str:
        body = {
            "data_source": task.source,
            "question": question(task),
            "solution_str": text,
            "ground_truth": jsonable(task.answer),
            "extra_info": jsonable(dict(task.meta)),
        }

        async def request(client: AsyncOpenAI, headers: dict[str, Any]) -> ServerReply:
            reply = await client.post(url, body=body, cast_to=str, options={"headers": headers})
            if _is_error(reply):
                raise ConnectionError(f"{url} replied with an error: {reply[:200]}")
            return ServerReply(reply)

        return (await session.ask(server, json.dumps(body), request)).text

    def reward(_text: str, _task: Task, reply: str) -> Score:
        try:
            return as_score(json.loads(reply), "endpoint")
        except WrongResult as error:  # of this answer: the server may score the next one
            raise ValueError(str(error)) from None

    return Reward("endpoint", reward, fetch=fetch)


def _is_error(reply: str) -> bool:
    """Whether a reply is a mapping with a field of errors such as `code` and no score; numbers alone, with other names
    among theirs, are the parts of one."""
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        return False  # which is said where the score is read
    if not isinstance(value, Mapping):
        return False
    errors = [name for name in value if name.lower() in _ERROR_FIELDS]
    is_parts = len(errors) < len(value) and all(map(is_number, value.values()))
    is_parts = is_parts and not any(100 <= value[name] < 600 for name in errors)  # a status of HTTP
    return bool(errors) and not is_parts and not any(is_number(value.get(name)) for name in WHOLE)


def data_url(image: Image) -> str:
    """An image as a `data:` URL, encoded as it is stored."""
    data = image.path.read_bytes() if image.path else image.data or b""
    return f"data:{_media_type(data)};base64,{base64.b64encode(data).decode()}"


def _media_type(data: bytes) -> str:
    with open_picture(data) as (picture, _):
        return picture.get_format_mimetype() or "application/octet-stream"


def _fill(prompt: str, values: Mapping[str, str]) -> str:
    """The prompt with its fields filled in at once, so that braces in an answer are left as they are."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found.group()], prompt)
