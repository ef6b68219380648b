"""Messages -> text, through the checkpoint's own chat template, or InternVL's corrected one where it has none.

`<image>` in a message is the mark of an image; it stays in the rendered text, where the encoder puts the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foveate.records import Message

IMAGE_MARK = "<image>"

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


ANSWER_STARTS = {"<|start|>assistant": ("<|channel|>", "final<|message|>")}
"""By the end of a prompt, the token that answers begin with, and the rest for demonstrated answers that do not have it:
the template of GPT-OSS leaves the channel to the model."""

_PLACES = re.compile(r"(Frame-?\d+: ?)?<image>")


def frames_in(text: str) -> list[bool]:
    """For each image of a rendered prompt whether it is a frame of a video: it stands behind `Frame1: `."""
    return [match[1] is not None for match in _PLACES.finditer(text)]


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    system: str | None = None,
    template: str = CORRECTED_TEMPLATE,
) -> str:
    """The prompt as text, generation prompt included. A `system` message is put in front unless there is one. The
    `template` stands in for a tokenizer without one."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    fallback = None if tokenizer.chat_template else template
    text = tokenizer.apply_chat_template(turns, chat_template=fallback, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text
