"""Requests for chat completions: OpenAI's interface, as far as an engine here can honour it."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from foveate.data.conversations import IMAGE_WORD
from foveate.data.images import read_image
from foveate.encoding.chat import IMAGE_MARK
from foveate.errors import DataError
from foveate.records import Image, Message, SamplingParams, Task
from foveate.serve.neutral import IGNORED, NEUTRAL, TURN_IGNORED, TURN_NEUTRAL, asks_for_nothing

MOST_VALUES, MOST_TURNS = 2**18, 2**15
"""Values of a body, counted by the marks between them: one that is all brackets unfolds to fifty times its size; and
its messages. Checks of each take long together."""
COLDEST = 0.01
"""The lowest temperature besides 0: below, all that is left is the rounding of the logits."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_DATA_URL = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,19}):", re.IGNORECASE)
_URL_SAFE, _BLANKS = bytes.maketrans(b"-_", b"+/"), b" \t\n\r\v\f"
_ESCAPES = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%2D": b"-", b"%5F": b"_", b"%20": b"", b"%0A": b"", b"%0D": b""}
"""Those of base64 in a URL, in which letters and digits stand for themselves."""
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


class Refused(Exception):
    """A request that cannot be answered as it stands: the HTTP status, what to mend, and the field and the code of
    OpenAI's errors."""

    def __init__(self, status: int, what: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(what)
        self.status, self.field, self.code = status, field, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's servers say it."""
        kind = {429: "rate_limit_error"}.get(self.status, "server_error" if self.status >= 500 else None)
        error = {"message": str(self), "type": kind or "invalid_request_error", "param": self.field, "code": self.code}
        return {"error": error}


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: Any = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(BaseModel):
    """The body of `POST /v1/chat/completions`. `top_k`, `ignore_eos` and `skip_special_tokens` are additions of the
    open engines. `verbatim` is foveate's own: texts and images are joined as they stand; otherwise a line break follows
    each image, as templates have it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    messages: Annotated[list[_Turn], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16), BeforeValidator(_as_list)
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: bool = False
    stream: bool = False
    stream_options: _StreamOptions | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = False
    verbatim: bool = False

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def characters(self) -> int:
        """The length of all texts."""
        parts = (part for turn in self.messages for part in (turn.content if isinstance(turn.content, list) else ()))
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        texts += [turn.content for turn in self.messages]
        return sum(len(text) for text in texts if isinstance(text, str))

    @property
    def images(self) -> int:
        """The number of all images."""
        lists = (turn.content for turn in self.messages if isinstance(turn.content, list))
        return sum(isinstance(part, dict) and part.get("type") == "image_url" for parts in lists for part in parts)

    def task(self, name: str) -> Task:
        """The conversation as a task without an answer; `name` stands for it in error messages."""
        images: list[Image] = []
        messages = []
        for number, turn in enumerate(self.messages):
            place = f"messages[{number}]"
            if turn.role not in _ROLES:
                what = f"{place}.role is {turn.role[:20]!r}; use one of {', '.join(_ROLES)}"
                raise Refused(400, what, f"{place}.role", "invalid_value")
            messages.append(Message(_ROLES[turn.role], self._content(turn, f"{place}.content", images)))
        return Task(name, "request", tuple(messages), tuple(images), None, where=name)

    def sampling(self, limit: int) -> SamplingParams:
        """How the answers are drawn. `limit` is the longest answer; without a number of tokens it ends them."""
        field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        asked = self.max_completion_tokens or self.max_tokens or limit
        if asked > limit:
            raise Refused(400, f"{field} is {asked}, this server gives at most {limit}", field, "invalid_value")
        if 0 < self.temperature < COLDEST:
            what = f"temperature is {self.temperature:g}; use 0 (always the likeliest token) or {COLDEST} to 2"
            raise Refused(400, what, "temperature", "invalid_value")
        return SamplingParams(self.n, asked, self.temperature, self.top_p, max(self.top_k, 0))

    def _content(self, turn: _Turn, place: str, images: list[Image]) -> str:
        if turn.content is None and turn.role == "assistant":
            return ""
        if isinstance(turn.content, str):
            return _text(turn.content)
        if not isinstance(turn.content, list):
            found = "null" if turn.content is None else type(turn.content).__name__
            raise Refused(400, f"{place} must be a text or a list of parts, not {found}", place, "invalid_type")
        return "".join(self._part(part, f"{place}[{i}]", images) for i, part in enumerate(turn.content))

    def _part(self, part: Any, place: str, images: list[Image]) -> str:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return _text(part["text"])
        if kind == "image_url":
            source = part.get("image_url")
            url = source.get("url") if isinstance(source, dict) else source
            if isinstance(url, str):
                images.append(_image(url, f"{place}.image_url"))
                return IMAGE_MARK if self.verbatim else f"{IMAGE_MARK}\n"
        what = 'must be {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": "data:..."}}'
        raise Refused(400, f"{place} {what}", place, "invalid_value")


def read_request(body: bytes) -> ChatRequest:
    """The request in a body. Raises Refused for anything else, and for what no engine here can do."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise Refused(413, f"the body holds more than {MOST_VALUES:,} values", code="request_too_large")
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        hint = "; half of a surrogate pair is no character" if "hex escape" in str(error) else ""
        raise Refused(400, f"the body is not JSON: {error}{hint}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise Refused(400, "the body is not a JSON object", code="invalid_json")
    known = _without_neutral(values, NEUTRAL, IGNORED, "")
    _require_fields(known, ChatRequest.model_fields, "")
    if isinstance(turns := known.get("messages"), list):
        if len(turns) > MOST_TURNS:
            what = f"the body holds {len(turns):,} messages; {MOST_TURNS:,} are read at most"
            raise Refused(413, what, "messages", code="request_too_large")
        known["messages"] = [_known_turn(turn, f"messages[{i}].") for i, turn in enumerate(turns)]
    try:
        asked = ChatRequest.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = _path(first["loc"])
        code = _CODES.get(first["type"], "invalid_type" if first["type"].endswith("_type") else "invalid_value")
        said = "is not a field of this server" if code == "unknown_parameter" else first["msg"]
        raise Refused(400, f"{field}: {said}", field, code) from None
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options is only for requests with stream: true", "stream_options", "invalid_value")
    return asked


def _known_turn(turn: Any, place: str) -> Any:
    if not isinstance(turn, dict):
        return turn
    known = _without_neutral(turn, TURN_NEUTRAL, TURN_IGNORED, place)
    _require_fields(known, _Turn.model_fields, place)
    return known


def _require_fields(known: Mapping[str, Any], fields: Container[str], place: str) -> None:
    """Raise Refused for the first field that there is not; a check of all of them would go on to the last one."""
    if (name := next((name for name in known if name not in fields), None)) is not None:
        field = f"{place}{name}"[:100]
        raise Refused(400, f"{field}: is not a field of this server", field, "unknown_parameter")


def _without_neutral(
    values: dict[str, Any], neutral: dict[str, tuple[Any, ...]], ignored: Sequence[str], place: str
) -> dict[str, Any]:
    """The fields that a server acts on. Raises Refused for a field that asks for what it cannot do."""
    for name in neutral.keys() & values.keys():
        if not asks_for_nothing(values[name], neutral[name]):
            except_as = f" except as {json.dumps(neutral[name][0])}" if neutral[name] else ""
            what = f"{place}{name} is not supported by this server{except_as}; leave it out"
            raise Refused(400, what, f"{place}{name}", "unsupported_parameter")
    kept = {name: value for name, value in values.items() if name not in neutral and name not in ignored}
    return {name: value for name, value in kept.items() if value is not None or name == "content"}


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].role`, as OpenAI writes it."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts)[1:][:100]


def _text(words: str) -> str:
    """A client's text for a message: in it, the mark of an image is a word like any other."""
    return words.replace(IMAGE_MARK, IMAGE_WORD)


def _image(url: str, place: str) -> Image:
    """An image from a `data:` URL or bare base64. Nothing is fetched and no file is opened for a client."""
    found = _DATA_URL.match(url)
    if not found and (scheme := _SCHEME.match(url)):
        what = f"images are read from data: URLs or base64 only, not from {scheme[1]}:"
        if scheme[1].lower() == "data":
            what = "a data: URL has a comma before its data, as in data:image/png;base64,iVBORw0..."
        raise Refused(400, what, place, "invalid_image_url")
    if found and found[1].split(";")[-1].strip().lower() != "base64":
        what = "a data: URL must hold base64, as in data:image/png;base64,iVBORw0..."
        raise Refused(400, what, place, "invalid_image_url")
    try:
        data = _decoded(url[found.end() if found else 0 :])
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"the image is not base64: {error}", place, "invalid_base64") from None
    try:
        return read_image(data, ())
    except DataError as error:
        raise Refused(400, f"the image cannot be read: {error}", place, "invalid_image") from None


def _decoded(text: str) -> bytes:
    """Bytes from base64 as clients write it: broken into lines, without padding, with the letters of URLs, or escaped
    for one."""
    # Each step is one call of C over all of the text: pieces of it as objects would take fifty times its size.
    letters = text.encode("utf-8", "surrogatepass")
    if b"%" in letters:
        for escape, letter in _ESCAPES.items():
            letters = letters.replace(escape, letter).replace(escape.lower(), letter)
    letters = letters.translate(_URL_SAFE, _BLANKS).rstrip(b"=")
    return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
