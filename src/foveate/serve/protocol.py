"""OpenAI's chat completions, as far as an engine here can honour them: what a request says, and what a reply holds."""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foveate.data.images import read_image
from foveate.errors import DataError
from foveate.records import Answer, Image, Message, Prompt, SamplingParams, Task

MARK = "<image>"
_DATA_URL = re.compile(r"data:[\w.+/-]+;base64,")
_NOTHING = (None, 0, "", [], {}, False)
IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""
NEUTRAL = ("stop", "frequency_penalty", "presence_penalty", "logit_bias", "tools", "top_logprobs", "response_format")
"""Fields that are understood while they ask for nothing; an engine here cannot do what they say otherwise."""


class Refused(Exception):
    """A request that cannot be answered as it stands: the HTTP status, and what to mend."""

    def __init__(self, status: int, what: str, field: str | None = None) -> None:
        super().__init__(what)
        self.status, self.field = status, field

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": "invalid_request_error", "param": self.field, "code": None}}


class _Url(BaseModel):
    url: str


class _Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: _Url | None = None


class _Turn(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[_Part]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of `POST /v1/chat/completions`. `top_k` is an addition of the open engines. `verbatim` is foveate's own:
    texts and pictures are joined as they stand; otherwise a line break follows each picture, as templates have it."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[_Turn], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: bool = False
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    verbatim: bool = False

    def task(self, name: str) -> Task:
        """The conversation as a task without an answer; `name` stands for it in error messages."""
        images: list[Image] = []
        messages = tuple(Message(turn.role, self._content(turn, images)) for turn in self.messages)
        return Task(name, "request", messages, tuple(images), None, where=name)

    def sampling(self, limit: int) -> SamplingParams:
        """How the answers are drawn. Without a number of tokens, and beyond it, `limit` ends them."""
        asked = self.max_completion_tokens or self.max_tokens or limit
        if asked > limit:
            raise Refused(400, f"max_tokens is {asked}, this server gives at most {limit}", "max_tokens")
        return SamplingParams(self.n, asked, self.temperature, self.top_p, max(self.top_k, 0))

    def _content(self, turn: _Turn, images: list[Image]) -> str:
        if isinstance(turn.content, str):
            return turn.content
        text = ""
        for part in turn.content:
            if part.type == "text":
                text += part.text
            elif part.image_url is None:
                raise Refused(400, "a part of type image_url lacks image_url.url", "messages")
            else:
                images.append(_picture(part.image_url.url))
                text += MARK if self.verbatim else f"{MARK}\n"
        return text


def read_request(body: bytes) -> ChatRequest:
    """The request in a body. Raises Refused for anything else, and for what no engine here can do."""
    try:
        values = json.loads(body)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refused(400, "the body is not a JSON object")
    for name in NEUTRAL:
        if values.pop(name, None) not in _NOTHING:
            raise Refused(400, f"{name} is not supported by this server; leave it out", name)
    known = {name: value for name, value in values.items() if name not in IGNORED and value is not None}
    try:
        return ChatRequest.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{field}: {first['msg']}", field) from None


def _picture(url: str) -> Image:
    """A picture from a `data:` URL or bare base64. Nothing is fetched and no file is opened for a client."""
    found = _DATA_URL.match(url)
    if not found and re.match(r"[a-z][a-z0-9+.-]*:", url, re.IGNORECASE):
        scheme = url.split(":")[0][:20]
        raise Refused(400, f"pictures are read from data: URLs or base64 only, not from {scheme}:", "messages")
    try:
        data = base64.b64decode(url[found.end() if found else 0 :], validate=True)
        return read_image(data, ())
    except (binascii.Error, ValueError, DataError) as error:
        raise Refused(400, f"a picture cannot be read: {error}", "messages") from None


# ---------------------------------------------------------------------------------------------------------- replies


def reply(
    model: str, prompt: Prompt, answers: Sequence[Answer], pieces: Sequence[Sequence[str]] | None
) -> dict[str, Any]:
    """A chat completion. `pieces` are the texts of the tokens of each answer where their log-probs are wanted."""
    tokens = sum(len(answer) for answer in answers)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": answer.finish,
            "logprobs": None if pieces is None else _logprobs(pieces[index], answer),
        }
        for index, answer in enumerate(answers)
    ]
    usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
    return {**_head(model, "chat.completion"), "choices": choices, "usage": usage}


def events(whole: dict[str, Any], with_usage: bool) -> Iterator[str]:
    """The same as server-sent events. An answer is one piece: the engine finishes a wave before it says anything."""
    head = {**whole, "object": "chat.completion.chunk"}
    usage = head.pop("usage")
    for choice in whole["choices"]:
        delta = {"index": choice["index"], "delta": choice["message"], "logprobs": choice["logprobs"]}
        yield _event({**head, "choices": [{**delta, "finish_reason": None}]})
        end = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
        yield _event({**head, "choices": [end]})
    if with_usage:
        yield _event({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _logprobs(pieces: Sequence[str], answer: Answer) -> dict[str, Any]:
    return {
        "content": [
            {"token": piece, "logprob": logprob, "bytes": list(piece.encode()), "top_logprobs": []}
            for piece, logprob in zip(pieces, answer.logprobs.tolist(), strict=True)
        ]
    }


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
