"""The replies to a request for a chat completion: whole, or in pieces as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Send

from foveate.records import Answer

TokenText = tuple[str, float]
"""The text of a token and its log-prob."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply to one request, whole or in pieces that share its id."""

    model: str
    prompt_tokens: int
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, answers: Sequence[Answer], texts: Sequence[str], entries: Sequence[Sequence[TokenText]] | None
    ) -> dict[str, Any]:
        """A chat completion. `entries` are the tokens of each answer where their log-probs are wanted."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": answer.finish,
                "logprobs": None if entries is None else _logprobs(entries[index]),
            }
            for index, (answer, text) in enumerate(zip(answers, texts, strict=True))
        ]
        usage = self.usage(sum(len(answer) for answer in answers))
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def usage(self, answer_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answer_tokens,
            "total_tokens": self.prompt_tokens + answer_tokens,
        }

    def event(
        self, index: int, delta: dict[str, Any], finish: str | None = None, entries: Sequence[TokenText] | None = None
    ) -> dict[str, Any]:
        """A piece of an answer."""
        logprobs = None if entries is None else _logprobs(entries)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        more = {"usage": None} if self.with_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def usage_event(self, answer_tokens: int) -> dict[str, Any]:
        """The last piece, for those who ask for the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(answer_tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class EventStream:
    """Server-sent events over ASGI. The response begins with the first event."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        self._send = send

    async def write(self, content: dict[str, Any]) -> None:
        await self._write(json.dumps(content, ensure_ascii=False))

    async def end(self) -> None:
        await self._write("[DONE]")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: dict[str, Any]) -> None:
        """End with an error, which clients raise."""
        await self.write(error)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, data: str) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


def _logprobs(entries: Sequence[TokenText]) -> dict[str, Any]:
    return {
        "content": [
            {"token": piece, "logprob": logprob, "bytes": list(piece.encode()), "top_logprobs": []}
            for piece, logprob in entries
        ]
    }
