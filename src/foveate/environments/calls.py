"""Calls of tools as models write them, read from the text of an answer.

Three forms are read, each between `<tool_call>` and `</tool_call>`: a JSON object with name and arguments (Hermes,
Qwen), `<function=NAME>` with `<parameter=KEY>` (Qwen3-Coder, Qwen3.5), and the name followed by `<arg_key>` and
`<arg_value>` (GLM). Text up to `</think>` is a thought, and calls nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.data.conversations import read_json_text
from foveate.errors import DataError

_OPEN, _CLOSE, _THOUGHT = "<tool_call>", "</tool_call>", "</think>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_PAIRS_NAME = re.compile(r"\s*([\w.-]+)\s*(?=<arg_key>|$)")
_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call. as_text: the form writes all arguments as text, so that what is a number must still be read."""

    name: str
    arguments: Mapping[str, Any]
    as_text: bool = False


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """A call that cannot be read, and why."""

    reason: str


def parse_calls(answer: str) -> list[ToolCall | MalformedCall]:
    """All calls of an answer, in order."""
    parts = answer.rpartition(_THOUGHT)[2].split(_OPEN)[1:]
    return [_parse(*part.partition(_CLOSE)[:2]) for part in parts]


def _parse(body: str, closed: str) -> ToolCall | MalformedCall:
    if not closed:
        return MalformedCall(f"{_OPEN} is not closed by {_CLOSE}")
    if (found := _FUNCTION.fullmatch(body)) is not None:
        return _with_pairs(found[1], found[2], _PARAMETER, "<parameter=NAME>value</parameter>")
    if not body.lstrip().startswith("{") and (found := _PAIRS_NAME.match(body)) is not None:
        return _with_pairs(found[1], body[found.end() :], _PAIR, "<arg_key>name</arg_key> <arg_value>value</arg_value>")
    return _of_json(body)


def _of_json(body: str) -> ToolCall | MalformedCall:
    try:
        value = read_json_text(body)
        arguments = value.get("arguments", value.get("parameters", {}))
        arguments = read_json_text(arguments) if isinstance(arguments, str) else arguments
        name = value.get("name")
    except DataError as error:
        return MalformedCall(f"{body.strip()[:_SHOWN]!r} {error}")
    except (ValueError, AttributeError, RecursionError):
        return MalformedCall(f"{body.strip()[:_SHOWN]!r} is no JSON object with name and arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return MalformedCall('name must be a text and arguments an object, as in {"name": "NAME", "arguments": {}}')
    return ToolCall(name, arguments)


def _with_pairs(name: str, text: str, pair: re.Pattern[str], form: str) -> ToolCall | MalformedCall:
    arguments, end = {}, 0
    while (found := pair.match(text, end)) is not None and found.end() > end:
        arguments[found[1].strip()] = found[2]
        end = found.end()
    if text[end:].strip():
        return MalformedCall(f"{text[end:].strip()[:_SHOWN]!r} is no argument; write {form}")
    return ToolCall(name, arguments, as_text=True)


def hermes_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call in the form of Hermes."""
    return f"{_OPEN}\n{json.dumps({'name': name, 'arguments': dict(arguments)}, ensure_ascii=False)}\n{_CLOSE}"
