"""Task -> Prompt: the one owner of pixels, of the number of image tokens and of where they stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveate.data.conversations import IMAGE_WORD
from foveate.data.images import load_image
from foveate.data.rows import fault_of
from foveate.encoding.chat import (
    ANSWER_WORDS,
    IMAGE_MARK,
    continued,
    frames_in,
    opened_by,
    render,
    some_prompt,
    template_of,
)
from foveate.encoding.control import Disguise, encode_text, pattern_of, without_panics, word_id
from foveate.encoding.family import Family
from foveate.errors import DataError, one_line
from foveate.records import Image, ImageSlot, Message, Prompt, Task
from foveate.rewards.pool import with_opened


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as text; with a disguise where the rows' own text holds control words."""

    text: str
    disguise: Disguise | None


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes tasks for one checkpoint. `budget` limits its images in the family's unit: tiles are shared evenly by the
    images of a prompt, at least one each, thumbnails not counted; pixels are those of each image after resizing.
    `max_prompt_tokens` refuses longer prompts; `system` is a system message for prompts that have none; `tools`: JSON
    schemas of functions that every prompt shows."""

    tokenizer: PreTrainedTokenizerBase
    family: Family
    budget: int
    max_prompt_tokens: int
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    def __call__(self, task: Task) -> Prompt:
        """Decode, tile and tokenise. Raises DataError naming the row where that fails."""
        prompt, budgets = self.placed(self.rendered(task), task.images, task.where)
        self._require_short(len(prompt), task.where)
        return self.with_pixels(prompt, task.images, budgets, task.where)

    @property
    def opened(self) -> str:
        """The tag that the chat template has opened for every answer, such as `<think>`; see `opened_by`."""
        return opened_by(some_prompt(self.tokenizer, self.family.template))

    def for_graders(self, task: Task) -> Task:
        """The task with what graders must know of its prompt: the frame of the boxes that the model will write about
        its first image, and what the prompt has opened for the answer."""
        task = with_opened(task, self.opened)
        if not task.images:
            return task
        image, budget = task.images[0], self.family.share(self.budget, len(task.images))
        frame = self.family.box_frame(image.width, image.height, budget)
        return replace(task, meta={**task.meta, "box_frame": frame})

    def validation_errors(self, task: Task) -> list[tuple[str, str]]:
        """The reasons why a task cannot be encoded, as (field, fault), from its text and image headers alone."""
        try:
            self.checked_length(task)
        except DataError as error:
            return [fault_of(error, task.where)]
        return []

    def checked_length(self, task: Task) -> int:
        """`length`. Raises DataError naming the row for a task that cannot be encoded."""
        length = self.length(task)
        self._require_short(length, task.where)
        return length

    def length(self, task: Task) -> int:
        """Number of prompt tokens, from the text and the image headers alone: no pixel is decoded."""
        engine_ids, slots, _ = self._laid_out(self.rendered(task), task.images, task.where)
        return len(engine_ids) + sum(slot.count - 1 for slot in slots)

    def answer_ids(self, response: str) -> tuple[int, ...]:
        """A demonstrated answer as token ids, with the stop token that ends it and, where it lacks it, the start that
        its prompt asks for: GPT-OSS names a channel. A tag that the chat template has opened is not written again.
        Raises DataError, without a place, for an answer that opens again what the template has closed."""
        prompt, allowed = some_prompt(self.tokenizer, self.family.template), ()
        for end, (token, rest) in self.family.answer_starts.items():
            if prompt.endswith(end):
                allowed = ANSWER_WORDS
                response = response if response.startswith(token) else token + rest + response
        try:
            response = continued(response, opened_by(prompt))
        except ValueError as error:
            raise DataError(str(error)) from error
        words, pattern = self._control_words(allowed)
        if pattern is not None and pattern.search(response):
            return (*encode_text(self.tokenizer, words, response), self.family.stop_ids[0])
        return (*self.tokenizer.encode(response, add_special_tokens=False), self.family.stop_ids[0])

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """The text of an answer: without its stop token, with the tokens of boxes and references."""
        end = len(token_ids) - (1 if token_ids and token_ids[-1] in self.family.stop_ids else 0)
        text = self.tokenizer.decode(list(token_ids[:end]), skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def pieces(self, token_ids: tuple[int, ...]) -> list[str]:
        """The text of each token by itself; a character that spans several tokens is no text in any of them."""
        return self.tokenizer.batch_decode([[token] for token in token_ids], skip_special_tokens=False)

    def _require_short(self, length: int, where: str) -> None:
        if length > self.max_prompt_tokens:
            raise DataError(
                f"{where}, field prompt: {length} tokens with its images, the limit is {self.max_prompt_tokens}; raise "
                "data.max_prompt_tokens or lower model.max_tiles or model.max_pixels"
            )

    def _prompt_ids(self, rendered: Rendered, where: str) -> list[int]:
        """The tokens of a rendered prompt."""
        if rendered.disguise is None:
            try:
                with without_panics():
                    return self._ids(rendered.text)
            except Exception as error:  # tokenizers raises bare exceptions
                raise DataError(
                    f"{where}, field prompt: the model's tokenizer refuses it: {one_line(error)[:300]}"
                ) from error
        ids: list[int] = []
        try:
            for is_control, part in rendered.disguise.parts(rendered.text):
                words = rendered.disguise.words
                ids += [word_id(self.tokenizer, part)] if is_control else encode_text(self.tokenizer, words, part)
        except DataError as error:
            raise DataError(f"{where}, field prompt: {error}") from error
        return ids

    def _ids(self, text: str) -> list[int]:
        """`tokenizer.encode` in half of its time: without offsets and masks, which are not read here."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, PreTrainedTokenizerFast) and not tokenizer.split_special_tokens:
            backend = tokenizer.backend_tokenizer
            if not (backend.encode_special_tokens or backend.truncation or backend.padding):
                return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return tokenizer.encode(text, add_special_tokens=False)

    def rendered(self, task: Task) -> Rendered:
        """The conversation of a task as the chat template writes it, with the marks of its images."""
        disguise, messages = self._disguised(task)
        try:
            text = render(messages, self.tokenizer, self.system, self.family.template, self.tools)
        except Exception as error:  # a template is a program, and may raise anything
            what = f"the model's chat template refuses it: {one_line(error)[:300]}"
            raise DataError(f"{task.where}, field prompt: {what}") from error
        return Rendered(text, disguise)

    def placed(self, rendered: Rendered, images: Sequence[Image], where: str) -> tuple[Prompt, list[int]]:
        """The tokens of a text with the places of its images, still without their pixels, and the budget of each."""
        engine_ids, slots, budgets = self._laid_out(rendered, images, where)
        return Prompt(tuple(self._expand(engine_ids, slots)), slots, None, tuple(engine_ids)), budgets

    def _laid_out(
        self, rendered: Rendered, images: Sequence[Image], where: str
    ) -> tuple[list[int], tuple[ImageSlot, ...], list[int]]:
        """The same with one placeholder for each run of an image's tokens: ids, places, budgets."""
        text = rendered.text
        marks = text.count(IMAGE_MARK)
        if marks != len(images):
            raise DataError(
                f"{where}, field prompt: {marks} {IMAGE_MARK} marks for {len(images)} images; "
                "each image needs one mark, in order"
            )
        if marks and not self.family.sees_images:
            raise DataError(f"{where}, field images: {self.family.name} is a text-only model and sees no images")
        for word in self.family.reserved:
            if word in text:
                what = f"the chat template or the system message writes the placeholder {word}; leave it out"
                raise DataError(f"{where}, field prompt: {what}")
        frames = frames_in(text)
        each, frame = self.family.share(self.budget, frames.count(False)), self.family.frame_budget(self.budget)
        budgets = [frame if is_frame else each for is_frame in frames]
        text = self._written(text, images, budgets, where).replace(IMAGE_WORD, IMAGE_MARK)
        engine_ids = self._prompt_ids(Rendered(text, rendered.disguise), where)
        return engine_ids, self._slots(images, engine_ids, budgets, where), budgets

    def with_pixels(self, prompt: Prompt, images: Sequence[Image], budgets: Sequence[int], where: str) -> Prompt:
        """The prompt with the pixels of its images, which are decoded now."""
        if not images:
            return prompt
        pairs = zip(images, budgets, strict=True)
        pixels = torch.cat([self.family.pixels(load_image(image, where), budget) for image, budget in pairs])
        return replace(prompt, pixels=pixels)

    def _written(self, text: str, images: Sequence[Image], budgets: Sequence[int], where: str) -> str:
        """The text with what stands for each image in place of its mark."""
        first, *rest = text.split(IMAGE_MARK)
        pieces = [first]
        for image, budget, after in zip(images, budgets, rest, strict=True):
            try:
                pieces += [self.family.written(image.width, image.height, budget), after]
            except DataError as error:
                raise DataError(f"{where}, field images: {error}") from error
        return "".join(pieces)

    def _control_words(self, allowed: tuple[str, ...]) -> tuple[tuple[str, ...], re.Pattern[str] | None]:
        """The control words of the family without some that are allowed, and what finds them."""
        return _control_words(self.family, self.tokenizer, template_of(self.tokenizer, self.family.template), allowed)

    def _disguised(self, task: Task) -> tuple[Disguise | None, tuple[Message, ...]]:
        """The messages, with stand-ins for control words where they hold any."""
        words, pattern = self._control_words(())
        if pattern is None or not any(pattern.search(message.content) for message in task.messages):
            return None, task.messages
        try:
            disguise = Disguise(words, [self.system or "", *(message.content for message in task.messages)])
        except DataError as error:
            raise DataError(f"{task.where}, field prompt: {error}") from error
        return disguise, tuple(Message(message.role, disguise.hide(message.content)) for message in task.messages)

    def _slots(
        self, images: Sequence[Image], engine_ids: list[int], budgets: list[int], where: str
    ) -> tuple[ImageSlot, ...]:
        slots: list[ImageSlot] = []
        grown = 0
        places = iter([i for i, token in enumerate(engine_ids) if token == self.family.image_token_id])
        both_ways = self.family.bidirectional_images
        for image, budget in zip(images, budgets, strict=True):
            try:
                shape = self.family.shape(image.width, image.height, budget)
            except DataError as error:
                raise DataError(f"{where}, field images: {error}") from error
            tokens, entries = shape.tokens // shape.runs, shape.entries // shape.runs
            for _ in range(shape.runs):
                slots.append(ImageSlot(next(places) + grown, tokens, entries, shape.grid, both_ways, shape.layout))
                grown += tokens - 1
        if next(places, None) is not None:
            raise DataError(f"{where}, field prompt: contains the placeholder of an image; write {IMAGE_MARK}")
        return tuple(slots)

    def _expand(self, engine_ids: list[int], slots: tuple[ImageSlot, ...]) -> list[int]:
        counts = iter(slots)
        token_ids: list[int] = []
        for token in engine_ids:
            repeat = next(counts).count if token == self.family.image_token_id else 1
            token_ids.extend([token] * repeat)
        return token_ids


@lru_cache(maxsize=64)
def _control_words(
    family: Family, tokenizer: PreTrainedTokenizerBase, _template: str, allowed: tuple[str, ...]
) -> tuple[tuple[str, ...], re.Pattern[str] | None]:
    """`Encoder._control_words`, found once for each template."""
    words = tuple(word for word in family.all_control_words(tokenizer) if word not in allowed)
    return words, pattern_of(words)
