"""Rewards from elsewhere: a language model that judges, and a server that scores.

Both speak JSON over HTTP with the standard library. A request that finds the server busy or gone is tried again; how
long an answer may take in all is the time limit of the worker processes (`foveate.rewards.pool`).
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image as Picture

from foveate.records import Image, Score, Task
from foveate.registry import ConfigError
from foveate.rewards.build import Reward
from foveate.rewards.custom import as_score
from foveate.rewards.text import jsonable, question

RUBRIC = """You grade an answer to a question.

Question:
{question}

Reference answer:
{truth}

Answer to grade:
{answer}

Does the answer agree with the reference? Close with one line `score: N`, where N is a number from 0 (wrong) to \
{scale} (right)."""

_SCORE = re.compile(r"score\**\s*[:=]\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_FIRST_WAIT = 0.5
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


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
) -> Reward:
    """The score that a judge model gives, divided by `scale` and held to 0..1.

    Args:
        url: base of an OpenAI-compatible server, such as `http://localhost:8000/v1`.
        model: name of the judge on that server.
        prompt: what the judge is asked; {question}, {truth}, {answer} and {scale} are filled in. It must make the judge
            write `score: N`; the last one counts.
        max_tokens, temperature: of the judge's reply.
        images: whether the judge sees the pictures of the task.
        api_key_variable: the environment variable that holds the key; no key is sent if it is not set.
        retries: how often a request is repeated when the server is busy or does not answer.
        timeout: seconds without a sign of the server until a request is given up.

    A reply without a score, and a server that refuses, raise ValueError and ConnectionError: the border around graders
    scores the answer 0 and notes it. Raises ConfigError for a prompt without {answer} and a scale that is not positive.
    """
    if "{answer}" not in prompt:
        raise ConfigError("reward judge: prompt must contain {answer}; it may contain {question}, {truth} and {scale}")
    if scale <= 0:
        raise ConfigError(f"reward judge: scale must be greater than 0, found {scale:g}")
    address = f"{_checked(url, 'judge').rstrip('/')}/chat/completions"

    def reward(text: str, task: Task) -> Score:
        values = {"{question}": question(task), "{truth}": str(jsonable(task.answer)), "{answer}": text}
        asked = _fill(prompt, {**values, "{scale}": f"{scale:g}"})
        content: Any = asked
        if images:
            content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in task.images]
            content.append({"type": "text", "text": asked})
        body = {"model": model, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": max_tokens, "temperature": temperature}
        reply = post(address, body, key=os.environ.get(api_key_variable, ""), retries=retries, timeout=timeout)
        said = reply["choices"][0]["message"]["content"]
        marks = _SCORE.findall(said)
        if not marks:
            raise ValueError(f"the judge wrote no `score: N`: {said[-80:]!r}")
        return Score(min(max(float(marks[-1]) / scale, 0.0), 1.0))

    return reward


def endpoint(*, url: str, api_key_variable: str = "", retries: int = 3, timeout: float = 60.0) -> Reward:
    """The score that a server of one's own gives.

    For each answer it gets `data_source`, `question`, `solution_str`, `ground_truth` and `extra_info`, by POST as JSON.
    It replies with a number, or with a mapping that holds the number under "score"; other numbers of it become parts.

    Args:
        url: where to post.
        api_key_variable: the environment variable that holds a bearer token; "" sends none.
        retries, timeout: as with `judge`.
    """
    address = _checked(url, "endpoint")

    def reward(text: str, task: Task) -> Score:
        body = {
            "data_source": task.source,
            "question": question(task),
            "solution_str": text,
            "ground_truth": jsonable(task.answer),
            "extra_info": jsonable(dict(task.meta)),
        }
        return as_score(post(address, body, key=os.environ.get(api_key_variable, ""), retries=retries, timeout=timeout))

    return reward


def post(url: str, body: Mapping[str, Any], *, key: str, retries: int, timeout: float) -> Any:
    """The JSON reply to a JSON body. Waits 0.5 s, 1 s, 2 s, ... before another try when the server cannot be reached,
    is busy or fails; raises ConnectionError when it refuses or the tries are used up."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(200).decode(errors="replace")
            problem = f"{url} replied {error.code} {error.reason}: {said}"
            if error.code not in _TRY_AGAIN:
                break
        except OSError as error:
            problem = f"{url} does not answer: {error}"
        if attempt < retries:
            time.sleep(_FIRST_WAIT * 2**attempt)
    raise ConnectionError(problem)


def data_url(image: Image) -> str:
    """A picture as a `data:` URL, encoded as it is stored."""
    data = image.path.read_bytes() if image.path else image.data or b""
    return f"data:{_media_type(data)};base64,{base64.b64encode(data).decode()}"


def _media_type(data: bytes) -> str:
    with Picture.open(BytesIO(data)) as picture:
        return picture.get_format_mimetype() or "application/octet-stream"


def _fill(prompt: str, values: Mapping[str, str]) -> str:
    """The prompt with its fields filled in at once, so that braces in an answer are left as they are."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found.group()], prompt)


def _checked(url: str, name: str) -> str:
    if not re.match(r"https?://[^/\s]+", url):
        raise ConfigError(f"reward {name}: url must begin with http:// or https:// and a host, found {url!r}")
    return url
