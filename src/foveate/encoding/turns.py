"""The tokens between two turns of an answer: the chat template's own words, and the messages of an environment.

Sampled tokens are never tokenised again. The conversation is rendered with a word in the place of each answer; what the
template writes behind the last of them, up to the next generation prompt, becomes tokens. So thoughts of earlier turns,
which some templates leave out of a conversation, stay in the context as they were sampled: the policy is trained on
what it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from foveate.encoding.chat import IMAGE_MARK, VIDEO_MARK
from foveate.encoding.control import word_id
from foveate.encoding.encode import Encoder, Rendered
from foveate.errors import DataError
from foveate.records import Answer, Image, Message, Prompt, Segment, Task

ANSWER_WORD = "\ufdd0answer\ufdd1"
"""Stands for an answer in a conversation, as `foveate.encoding.chat.IMAGE_WORD` does for a word."""


@dataclass(frozen=True, slots=True)
class TurnReply:
    """The messages that follow an answer, with the images of their marks in order."""

    messages: tuple[Message, ...]
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Turns:
    """Encodes what stands between two turns, for the prompts of one encoder. Each reply has the budget of a prompt for
    its images. Raises DataError when it is made for a chat template that cannot be continued behind an answer."""

    encoder: Encoder

    def __post_init__(self) -> None:
        task = Task("", "", (Message("user", "?"),), (), None, where="the chat template")
        for role in ("user", "tool"):
            self(task, (TurnReply((Message(role, "?"),)),))

    def __call__(self, task: Task, replies: Sequence[TurnReply]) -> Segment:
        """The tokens that are read behind the last answer of a conversation: `task` is its prompt, and each of
        `replies` follows an answer. The stop token of the answer is not among them. Raises DataError where they cannot
        be encoded."""
        last, where = replies[-1], f"{task.where or task.id}, turn {len(replies) + 1}"
        messages, images = [*task.messages], [*task.images]
        for reply in replies:
            messages.append(Message("assistant", ANSWER_WORD))
            messages += [replace(one, content=_without_answer(one.content)) for one in reply.messages]
            images += reply.images
        whole = replace(task, messages=tuple(messages), images=tuple(images), where=where)
        rendered = self.encoder.rendered(whole)
        _, found, behind = rendered.text.rpartition(ANSWER_WORD)
        if not found:
            raise DataError(f"{where}: the chat template leaves out an answer that others follow; use another one")
        prompt, budgets = self.encoder.placed(Rendered(behind, rendered.disguise), last.images, where)
        self._require_end(prompt.token_ids[0], behind)
        prompt = self.encoder.with_pixels(prompt, last.images, budgets, where)
        ids, engine_ids = (np.asarray(own[1:], np.int64) for own in (prompt.token_ids, prompt.engine_ids))
        slots = tuple(replace(slot, position=slot.position - 1) for slot in prompt.slots)
        return Segment(ids, engine_ids, np.zeros(0, np.float32), False, slots, prompt.pixels)

    def _require_end(self, token: int, behind: str) -> None:
        """The template ends an answer with a token of its own, in whose place the sampled stop token stands."""
        family, tokenizer = self.encoder.family, self.encoder.tokenizer
        ends = {*family.stop_ids, *(word_id(tokenizer, word) for word in family.all_control_words(tokenizer))}
        if token not in ends:
            raise DataError(
                f"the chat template writes {behind[:20]!r} behind an answer, which begins with no token that ends one; "
                "answers of several turns need a template that does"
            )


def encode_trace(
    turns: Turns, task: Task, response: str, encode: Callable[[Task], Prompt] | None = None
) -> tuple[Prompt, Answer]:
    """A conversation to imitate in all of its assistant's turns, of which `response` is the last: the prompt before the
    first of them, and the answer, where what others say is only read. Images have their budgets as in `Turns`.
    `encode`: encodes the prompt in place of the encoder."""
    prompt, texts, replies = _split(task)
    segments: list[Segment] = []
    for number, text in enumerate([*texts, response]):
        segments.append(Segment.written(turns.encoder.answer_ids(text)))
        segments += [turns(prompt, replies[: number + 1])] if number < len(replies) else []
    return (encode or turns.encoder)(prompt), Answer(tuple(segments), "", "stop")


def _split(task: Task) -> tuple[Task, list[str], list[TurnReply]]:
    """The task before the first turn of the assistant, and its turns with the reply to each."""
    roles = [message.role for message in task.messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    images, texts = iter(task.images), list[str]()
    replies: list[list[Message]] = []
    if sum(message.content.count(VIDEO_MARK) for message in task.messages[:first]) < len(task.videos):
        raise DataError(f"{task.where}, field videos: a video stands behind a turn of the assistant; put it before")
    own = tuple(islice(images, sum(message.content.count(IMAGE_MARK) for message in task.messages[:first])))
    for message in task.messages[first:]:
        if message.role == "assistant":
            texts.append(message.content)
            replies.append([])
        else:
            replies[-1].append(message)
    seen = [TurnReply(tuple(r), tuple(islice(images, sum(m.content.count(IMAGE_MARK) for m in r)))) for r in replies]
    return replace(task, messages=task.messages[:first], images=own), texts, seen


def _without_answer(text: str) -> str:
    """A text without the word that stands for answers, also where taking it out makes another one."""
    while ANSWER_WORD in text:
        text = text.replace(ANSWER_WORD, "")
    return text
