"""Messages -> text, through the checkpoint's own chat template, or InternVL's corrected one where it has none.

`<image>` in a message is the mark of an image; it stays in the rendered text, where the encoder puts the image.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from foveate.encoding.template_bounds import bound_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foveate.records import Message

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"

CORRECTED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""InternVL's dialogue template with a newline after the role, the image, the end mark and the generation prompt."""


THINKING_SYSTEM = (
    "You are an AI assistant that rigorously follows this response protocol:\n\n"
    "1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and reason "
    "through the problem step-by-step. Enclose this entire thinking process within <think> and </think> tags.\n\n"
    "2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the "
    "answer from the think section with a newline.\n\n"
    "Ensure that the thinking process is thorough but remains focused on the query. The final answer should be "
    "standalone and not reference the thinking section."
)
"""The system message of InternVL3.5's thinking mode, word for word as on its model card (`R1_SYSTEM_PROMPT`)."""


DEFAULT_SYSTEM = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    "internvl3_5_gpt_oss": (
        "You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
        "Current date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must be included for every "
        "message."
    ),
}
"""By the name of a conversation template of InternVL, the system message that its conversations begin with where a row
has none: all of its SFT and MPO data, and every call of its `chat`."""


TURN_WORDS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"),
    *("<|startoftext|>", "<|endofprompt|>"),
)
"""Words that begin and end turns and texts, in ChatML and in the format of GPT-OSS."""


CONTENT_WORDS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
)
"""Words with tokens of their own that people and models write: they are no control words."""


ANSWER_WORDS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")
"""Control words that demonstrated answers may hold where `ANSWER_STARTS` lets them name their channels."""


ANSWER_STARTS = {"<|start|>assistant": ("<|channel|>", "final<|message|>")}
"""By the end of a prompt, the token that answers begin with, and the rest for demonstrated answers that do not have it:
the template of GPT-OSS leaves the channel to the model."""

_OPENED = re.compile(r"<([A-Za-z_]\w*)>\s*(?:</\1>\s*)?$")

TEMPLATE_S = 10.0
"""Seconds that a chat template may take for a prompt."""
_LOOK_S = 0.5

_PLACES = re.compile(r"(Frame-?\d+: ?)?<image>")


def frames_in(text: str) -> list[bool]:
    """For each image of a rendered prompt whether it is a frame of a video: it stands behind `Frame1: `."""
    return [match[1] is not None for match in _PLACES.finditer(text)]


def some_prompt(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The text of a prompt, which ends in what the chat template writes for the model before its answer."""
    return _some_prompt(tokenizer, template_of(tokenizer, template))


def template_of(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The chat template in force: the tokenizer's own, or the one that stands in for it."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else template


@lru_cache(maxsize=64)
def _some_prompt(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    bound_templates()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


def opened_by(prompt: str) -> str:
    """The tag at the end of a prompt that the chat template has opened for the model (`<think>` and a line break), or
    opened and closed, where it switches thinking off; "" for none."""
    found = _OPENED.search(prompt)
    return found[0] if found else ""


def continued(response: str, opened: str) -> str:
    """A demonstrated answer as the continuation of a prompt that has opened a tag: not with the tag again. Raises
    ValueError for an answer that opens again what the template has closed."""
    tag, end = opened.split(">")[0] + ">", "</" + opened[1:].split(">")[0] + ">"
    body = response.lstrip()
    if not opened or not body.startswith(tag):
        return response
    inside, closed, rest = body.removeprefix(tag).partition(end)
    if end not in opened:
        left, space = body.removeprefix(tag), opened.removeprefix(tag)
        return left.removeprefix(space) if left.startswith(space) else left.lstrip(space)
    if inside.strip() or not closed:
        raise ValueError(
            f"begins with {tag}, which the chat template has closed already in front of every answer; leave the "
            "thoughts "
            "out, or use a chat template that leaves them open"
        )
    return rest.lstrip()


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    system: str | None = None,
    template: str = CORRECTED_TEMPLATE,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The prompt as text, generation prompt included. A `system` message is put in front unless there is one. The
    `template` stands in for a tokenizer without one. Schemas of `tools` are shown by the template, or, where it knows
    none, in the system message; results of calls then stand in messages of the user. Raises what the template raises,
    and TimeoutError where it has not ended after `TEMPLATE_S`."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    fallback = None if tokenizer.chat_template else template
    shown: dict[str, Any] = {}
    if tools or any(turn["role"] == "tool" for turn in turns):
        if not shows_tools(tokenizer, template_of(tokenizer, template)):
            turns = with_tools(turns, tools)
        elif tools:
            shown = {"tools": [*tools]}
    bound_templates()
    with _time_limit(TEMPLATE_S):
        text = tokenizer.apply_chat_template(
            turns, chat_template=fallback, tokenize=False, add_generation_prompt=True, **shown
        )
    assert isinstance(text, str)
    return text


_TOOL = {"type": "function", "function": {"name": "some_tool", "description": "?", "parameters": {"type": "object"}}}


@lru_cache(maxsize=64)
def shows_tools(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a chat template shows tools, and results of calls as messages of their own role, which is tried out."""
    turns = [{"role": role, "content": f"{role}?"} for role in ("user", "assistant", "tool")]
    bound_templates()
    try:
        with _time_limit(TEMPLATE_S):
            text = str(
                tokenizer.apply_chat_template(
                    turns, chat_template=template, tokenize=False, add_generation_prompt=True, tools=[_TOOL]
                )
            )
    except Exception:  # a template is a program, and may raise anything
        return False
    return "some_tool" in text and "tool?" in text


TOOL_RULES = (
    "You have these functions:\n<tools>\n{schemas}\n</tools>\n\n"
    "A call is a JSON object with the function's name and its arguments, between tags:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}\n</tool_call>\n'
    "The result follows in the next message."
)
"""What a system message says of tools where the chat template knows none, in the form of Hermes."""


def with_tools(turns: Sequence[dict[str, str]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The conversation for a template that knows no tools: their schemas stand in the system message, and the results
    of calls, those of one turn together, in a message of the user."""
    turns = [turn for role, run in groupby(turns, lambda turn: turn["role"]) for turn in _of_user(role, [*run])]
    if not tools:
        return turns
    rules = TOOL_RULES.format(schemas="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": rules}, *turns]
    return [{"role": "system", "content": f"{turns[0]['content']}\n\n{rules}"}, *turns[1:]]


def _of_user(role: str, run: list[dict[str, str]]) -> list[dict[str, str]]:
    """Messages of one role that follow each other: results of calls as one message of the user, others as they are."""
    if role != "tool":
        return run
    return [
        {"role": "user", "content": "\n".join(f"<tool_response>\n{one['content']}\n</tool_response>" for one in run)}
    ]


_deadlines: dict[int, float] = {}
"""When the templates that run now must have ended, by thread, on the clock of `_spent`."""
_lock = threading.Lock()
_watcher = threading.Thread()


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Within it this thread gets a TimeoutError after some processor seconds of its own, which other programs do not
    make longer. It reaches code in Python only, such as that of a template. One thread watches all, while there are
    any: a timer for each would take as long as a template."""
    global _watcher
    own = threading.get_ident()
    with _lock:
        _deadlines[own] = _spent(own) + seconds
        if not _watcher.is_alive():
            _watcher = threading.Thread(target=_watch, name="templates", daemon=True)
            _watcher.start()
    try:
        yield
    except TimeoutError:
        raise TimeoutError(f"it takes more than {seconds:g} s") from None
    finally:
        with _lock:
            if _deadlines.pop(own, None) is None:  # a TimeoutError that came too late
                _interrupt(own, None)


def _spent(thread: int) -> float:
    """Processor seconds of a thread; seconds of the clock on systems that do not tell them."""
    if sys.platform != "linux":
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _watch() -> None:
    while True:
        time.sleep(_LOOK_S)
        with _lock:
            for thread, deadline in [*_deadlines.items()]:
                if deadline < _spent(thread):
                    del _deadlines[thread]
                    _interrupt(thread, TimeoutError)
            if not _deadlines:
                return


def _interrupt(thread: int, error: type[Exception] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )
