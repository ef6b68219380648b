"""Conversations as people write them: a text, messages by role and content, turns by from and value, lists of parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foveate.errors import DataError
from foveate.records import Message

IMAGE_TAG = "<image>"
IMAGE_WORD = "\ufdd0image\ufdd1"
"""Stands in a message for the text `<image>` where that is a word of somebody's and marks no image: two characters that
Unicode reserves for such uses."""
ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {
    "human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "developer": "system", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
"""Other names of the roles."""
TURN_KEYS = {"role": "content", "from": "value"}
"""The two forms of a turn: the key of its role, and that of its content."""

_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes", "base64", "data")
_READ_KEYS = frozenset((*TURN_KEYS, *TURN_KEYS.values(), "name", "weight", "id"))
"""Keys of a turn that change nothing about it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt, without a last turn of the assistant, which is its `response`. `images`: for each `<image>` mark in
    order the value of the image that stands in the content itself, or None for one of the images column."""

    messages: tuple[Message, ...]
    images: list[Any]
    response: str | None
    remarks: tuple[str, ...]


def read_conversation(value: Any, system: Any = None) -> Conversation:
    """A text as one question, or messages, with a system message put in front. Raises DataError, without a place, for
    anything else, for roles that are not known, and where there is no question."""
    turns = _turns(value)
    if isinstance(system, str) and system and turns[0][0] != "system":
        turns = [("system", system), *turns]
    images: list[Any] = []
    messages: list[Message] = []
    remarks: dict[str, None] = {}
    for position, (role, content) in enumerate(turns):
        if role not in ROLES:
            raise DataError(f"message {position} has the role {role!r}; allowed: {', '.join((*ROLES, *ROLE_NAMES))}")
        text, found = _content(content, position)
        last = position == len(turns) - 1
        images += found if not (last and role == "assistant") else []
        messages.append(Message(role, text))
    response = messages.pop().content if messages[-1].role == "assistant" else None
    if not any(message.role == "user" for message in messages):
        raise DataError("has no question: a message of the user must come before the answer")
    for turn in value if isinstance(value, list) else []:
        remarks.update(dict.fromkeys(_unread_keys(turn)))
    return Conversation(tuple(messages), images, response, tuple(remarks))


def answer_text(value: Any, prompt: Sequence[Message]) -> str:
    """An answer given as messages, with or without the prompt in front of it. Raises DataError, without a place, if
    that leaves more or less than one message of the assistant."""
    given = _turns([value] if isinstance(value, Mapping) else value)
    turns = [(role, _content(content, position)[0]) for position, (role, content) in enumerate(given)]
    *before, (role, text) = turns
    asked = [(message.role, _bare(message.content)) for message in prompt if message.role != "system"]
    repeated = [(role, _bare(text)) for role, text in before if role != "system"]
    if role != "assistant" or (repeated and repeated != asked):
        roles = ", ".join(str(role) for role, _ in turns)
        raise DataError(
            f"is a conversation ({roles}); an answer must be a text, or one message of the assistant, alone or behind "
            "the messages of the prompt"
        )
    return text


def are_messages(value: Any) -> bool:
    """Whether a value is a turn, or a list of them, and nothing else."""
    turn = value[0] if isinstance(value, list) and value else value
    return isinstance(turn, Mapping) and any({role, content} <= turn.keys() for role, content in TURN_KEYS.items())


def common_prompt(chosen: Any, rejected: Any) -> Any:
    """The turns with which two conversations begin alike, which are the prompt of a pair that has no other one; None
    for answers that are no conversations of several turns."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return None
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    return chosen[:same] or None


def in_front(messages: Sequence[Message], images: int, tag: str = IMAGE_TAG) -> tuple[Message, ...]:
    """The messages with a mark per image, or a `tag` of another kind, in front of the first question."""
    first = next(position for position, message in enumerate(messages) if message.role == "user")
    asked = replace(messages[first], content=f"{tag}\n" * images + messages[first].content)
    return (*messages[:first], asked, *messages[first + 1 :])


def valid_unicode(text: str) -> str:
    """The text itself. Raises DataError for halves of characters, which JSON can hold, and no file and no tokenizer
    takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"is not valid Unicode: {shown(text[error.start])} at character {error.start}") from None
    return text


def read_json_text(text: str) -> Any:
    """The value of JSON text. Raises DataError for halves of characters, which escapes can write, another ValueError
    for what is no JSON, and RecursionError for what is nested too deep."""
    value = json.loads(text)
    valid_unicode(json.dumps(value, ensure_ascii=False))
    return value


def with_words(text: str) -> str:
    """The text as its readers see it: `<image>` where it is a word, too."""
    return text.replace(IMAGE_WORD, IMAGE_TAG)


def shown(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _turns(value: Any) -> list[tuple[Any, Any]]:
    """Role and content of each turn, the roles by their usual names."""
    if isinstance(value, str) and value:
        return [("user", value)]
    if not isinstance(value, list) or not value:
        raise DataError(f"must be a text, or a list of messages {{role, content}}, at least one, not {shown(value)}")
    turns = []
    for position, turn in enumerate(value):
        for key, inner in TURN_KEYS.items() if isinstance(turn, dict) else ():
            if isinstance(role := turn.get(key), str):
                turns.append((ROLE_NAMES.get(role, role), turn.get(inner)))
                break
        else:
            raise DataError(f"message {position} must be {{role, content}} or {{from, value}}, not {shown(turn)}")
    return turns


def _content(content: Any, position: int) -> tuple[str, list[Any]]:
    """The text of a message, and for each of its image marks the value of the image, or None."""
    if isinstance(content, str):
        return valid_unicode(content), [None] * content.count(IMAGE_TAG)
    if not isinstance(content, list) or not content:
        raise DataError(f"message {position} must have a text or a list of parts as content, not {shown(content)}")
    texts: list[str] = []
    images: list[Any] = []
    for part in content:
        text, found = _part(part, position)
        texts.append(text)
        images += found
    for before, after in zip(range(len(texts)), texts[1:], strict=False):  # as InternVL writes it: <image>\nWhat?
        if texts[before] == IMAGE_TAG and not after.startswith("\n"):
            texts[before] += "\n"
    return "".join(texts), images


def _part(part: Any, position: int) -> tuple[str, list[Any]]:
    if isinstance(part, str):
        return valid_unicode(part), [None] * part.count(IMAGE_TAG)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind is None:  # Qwen's short form: {image: ...}, {text: ...}
        kind = next((key for key in ("text", "image", "video", "audio") if part.get(key) is not None), None)
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        text = valid_unicode(part["text"])
        return text, [None] * text.count(IMAGE_TAG)
    if kind in _IMAGE_PARTS:
        given = {key: part[key] for key in part if key != "type" and part[key] is not None and part[key] != ""}
        return IMAGE_TAG, [given if any(key in given for key in _IMAGE_KEYS) else None]
    if kind == "video":
        if any(part[key] not in (None, "") for key in part if key != "type"):
            raise DataError(f"message {position} has a video as a part; name its file in the column videos")
        return "<video>", []
    raise DataError(f"message {position} has a part that is neither text nor image: {shown(part)}")


def _unread_keys(turn: Any) -> list[str]:
    if turn.keys() <= _READ_KEYS:
        return []
    unread = [name for name in turn if name not in _READ_KEYS and turn[name] not in (None, [], "", {})]
    if media := [name for name in unread if name.rstrip("s") in ("image", "video", "audio")]:
        raise DataError(f"messages have {media[0]} of their own; give images in the column images, or as parts")
    return [f"messages have {name}, which nobody reads" for name in unread]


def _bare(text: str) -> str:
    """A text without its image marks, to compare prompts by."""
    return " ".join(text.replace(IMAGE_TAG, " ").split())
