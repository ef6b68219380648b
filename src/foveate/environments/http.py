"""`http`: an environment behind a server. Each call is one POST of a JSON object, and its reply is another one."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from foveate.config.base import is_http_address
from foveate.data.conversations import IMAGE_TAG, IMAGE_WORD
from foveate.data.image_values import decoded_base64
from foveate.data.images import read_image
from foveate.data.videos import refuse_videos
from foveate.environments.protocol import Environment, Observation, Step
from foveate.errors import ConfigError, DataError, one_line
from foveate.records import Image, Task
from foveate.registry import suggestion
from foveate.rewards.text import jsonable

LONGEST_REPLY = 2**25
"""Bytes of the longest reply that is read."""
_OPENED, _STEPPED = ("session", "messages"), ("session", "messages", "reward", "done", "info")


def http(*, url: str, timeout: float = 8.0) -> Environment:
    """An environment behind a server that takes JSON by POST: {op: "reset", task, seed}, {op: "step", session, answer}
    and {op: "close", session}. url: where to post, http or https; timeout: seconds without a sign of the server until
    a call is given up."""
    if not is_http_address(url):
        raise ConfigError(f"environment http: url must begin with http:// or https:// and a host, found {url!r}")
    if timeout <= 0:
        raise ConfigError(f"environment http: timeout must be greater than 0, found {timeout:g}")
    return _HTTP(url, timeout)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _HTTP(Environment):
    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._session: Any = None
        self._answers = True
        self._opener = urllib.request.build_opener(_NoRedirect)

    def reset(self, task: Task, seed: int) -> Sequence[Observation]:
        refuse_videos(task, "an environment over HTTP")
        shown = {
            "id": task.id,
            "data_source": task.source,
            "messages": [{"role": one.role, "content": one.content} for one in task.messages],
            "images": [_in_base64(image) for image in task.images],
            "ground_truth": jsonable(task.answer),
            "extra_info": jsonable(dict(task.meta)),
        }
        reply = self._post({"op": "reset", "task": shown, "seed": seed})
        self._require_known(reply, _OPENED)
        self._session = reply.get("session")
        return _messages(reply)

    def step(self, answer: str) -> Step:
        reply = self._post({"op": "step", "session": self._session, "answer": answer})
        self._require_known(reply, _STEPPED)
        if not reply.keys() & {"messages", "reward", "done"}:
            raise DataError(f"{self._url} replied to a step with none of messages, reward and done")
        info = reply.get("info") or {}
        if not isinstance(info, Mapping) or not isinstance(reply.get("done", False), bool):
            raise DataError(f"{self._url} replied with done or info of another type than true or false, and an object")
        return Step(_messages(reply), reply.get("reward"), reply.get("done", False), info)

    def close(self) -> None:
        if self._session is not None and self._answers:  # else this would wait for it again
            self._post({"op": "close", "session": self._session})

    def _require_known(self, reply: Mapping[str, Any], known: Sequence[str]) -> None:
        for key in reply:
            if key not in known:
                what = f"{key[:40]!r}{suggestion(key, known, then='known')}"
                raise DataError(f"{self._url} replied with the unknown field {what}: {', '.join(known)}")

    def _post(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json", "Accept": "application/json"}
        )
        try:
            status, text = self._reply_to(request)
        except (OSError, HTTPException) as error:
            self._answers = False
            raise ConnectionError(f"{self._url} does not answer: {one_line(error)}") from None
        if status is not None:
            raise ConnectionError(f"{self._url} replied {status}: {text[:200].decode('utf-8', 'replace')}")
        if len(text) > LONGEST_REPLY:
            raise DataError(f"{self._url} replied with more than {LONGEST_REPLY:,} bytes")
        try:
            reply = json.loads(text or "{}")
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, Mapping):
            raise DataError(f"{self._url} replied with {text[:60]!r}; it must be a JSON object")
        return reply

    def _reply_to(self, request: urllib.request.Request) -> tuple[int | None, bytes]:
        """The body of a reply, with its status where that is an error."""
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return None, response.read(LONGEST_REPLY + 1)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(200)


def _in_base64(image: Image) -> str:
    data = image.data if image.path is None else Path(image.path).read_bytes()
    return base64.b64encode(data or b"").decode()


def _messages(reply: Mapping[str, Any]) -> tuple[Observation, ...]:
    """The messages of a reply: {role, content, images: [base64]}. Its images are marked in the content, or stand in
    front of it where it has no mark."""
    given = reply.get("messages") or []
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise DataError("messages of the server must be a list of {role, content, images}")
    return tuple(map(_message, given))


def _message(given: Mapping[str, Any]) -> Observation:
    content, values = given.get("content", ""), given.get("images") or []
    if not isinstance(content, str) or not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise DataError("a message of the server must have a text as content, and base64 texts as images")
    images = tuple(read_image({"bytes": decoded_base64(value)}, ()) for value in values)
    if not images:
        content = content.replace(IMAGE_TAG, IMAGE_WORD)
    elif IMAGE_TAG not in content:
        content = "\n".join([IMAGE_TAG] * len(images) + ([content] if content else []))
    return Observation(str(given.get("role", "user")), content, images)
