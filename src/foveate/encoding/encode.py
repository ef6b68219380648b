"""Task -> Prompt: the one owner of pixels, of the number of image tokens and of where they stand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveate.data.images import load_image
from foveate.encoding.chat import IMAGE_MARK, frames_in, render
from foveate.encoding.family import Family
from foveate.errors import DataError
from foveate.records import ImageSlot, Message, Prompt, Task


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes tasks for one checkpoint. `budget` limits its images in the family's unit: tiles are shared evenly by the
    images of a prompt, at least one each, thumbnails not counted; pixels are those of each image after resizing.
    `max_prompt_tokens` refuses longer prompts; `system` is a system message for prompts that have none."""

    tokenizer: PreTrainedTokenizerBase
    family: Family
    budget: int
    max_prompt_tokens: int
    system: str | None = None

    def __call__(self, task: Task) -> Prompt:
        """Decode, tile and tokenise. Raises DataError naming the row where that fails."""
        text, budgets = self._text(task)
        engine_ids = self._ids(text)
        slots = self._slots(task, engine_ids, budgets)
        token_ids = self._expand(engine_ids, slots)
        if len(token_ids) > self.max_prompt_tokens:
            raise DataError(f"{task.where}, field prompt: {_too_long(len(token_ids), self.max_prompt_tokens)}")
        pixels = None
        if task.images:
            pairs = zip(task.images, budgets, strict=True)
            pixels = torch.cat([self.family.pixels(load_image(image, task.where), budget) for image, budget in pairs])
        return Prompt(tuple(token_ids), slots, pixels, tuple(engine_ids))

    def with_box_frame(self, task: Task) -> Task:
        """The task with the frame of the boxes that the model will write about its first image, for the graders."""
        if not task.images:
            return task
        image, budget = task.images[0], self.family.share(self.budget, len(task.images))
        frame = self.family.box_frame(image.width, image.height, budget)
        return replace(task, meta={**task.meta, "box_frame": frame})

    def validation_errors(self, task: Task) -> list[tuple[str, str]]:
        """The reasons why a task cannot be encoded, as (field, fault), from its text and image headers alone."""
        try:
            length = self.length(task)
        except DataError as error:
            field, _, fault = str(error).removeprefix(f"{task.where}, field ").partition(": ")
            return [(field, fault)]
        return [("prompt", _too_long(length, self.max_prompt_tokens))] if length > self.max_prompt_tokens else []

    def length(self, task: Task) -> int:
        """Number of prompt tokens, from the text and the image headers alone: no pixel is decoded."""
        text, budgets = self._text(task)
        engine_ids = self._ids(text)
        return len(engine_ids) + sum(slot.count - 1 for slot in self._slots(task, engine_ids, budgets))

    def answer_ids(self, response: str) -> tuple[int, ...]:
        """A demonstrated answer as token ids, with the stop token that ends it and, where it lacks it, the start that
        its prompt asks for: GPT-OSS names a channel."""
        prompt = render((Message("user", "?"),), self.tokenizer, template=self.family.template)
        for end, (token, rest) in self.family.answer_starts.items():
            if prompt.endswith(end) and not response.startswith(token):
                response = token + rest + response
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

    def _ids(self, text: str) -> list[int]:
        """`tokenizer.encode` in half of its time: without offsets and masks, which are not read here."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, PreTrainedTokenizerFast) and not tokenizer.split_special_tokens:
            backend = tokenizer.backend_tokenizer
            if not (backend.encode_special_tokens or backend.truncation or backend.padding):
                return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return tokenizer.encode(text, add_special_tokens=False)

    def _text(self, task: Task) -> tuple[str, list[int]]:
        """The prompt with what stands for an image in place of its mark, and the budget of each image."""
        try:
            text = render(task.messages, self.tokenizer, self.system, self.family.template)
        except TemplateError as error:
            raise DataError(f"{task.where}, field prompt: the model's chat template refuses it: {error}") from error
        marks = text.count(IMAGE_MARK)
        if marks != len(task.images):
            raise DataError(
                f"{task.where}, field prompt: {marks} {IMAGE_MARK} marks for {len(task.images)} images; "
                "each image needs one mark, in order"
            )
        if marks and not self.family.sees_images:
            raise DataError(f"{task.where}, field images: {self.family.name} is a text-only model and sees no images")
        for word in self.family.reserved:
            if word in text:
                raise DataError(f"{task.where}, field prompt: contains the placeholder {word}; write {IMAGE_MARK}")
        frames = frames_in(text)
        each, frame = self.family.share(self.budget, frames.count(False)), self.family.frame_budget(self.budget)
        return text.replace(IMAGE_MARK, self.family.image_text), [frame if is_frame else each for is_frame in frames]

    def _slots(self, task: Task, engine_ids: list[int], budgets: list[int]) -> tuple[ImageSlot, ...]:
        slots = []
        grown = 0
        places = [i for i, token in enumerate(engine_ids) if token == self.family.image_token_id]
        for place, image, budget in zip(places, task.images, budgets, strict=True):
            try:
                shape = self.family.shape(image.width, image.height, budget)
            except DataError as error:
                raise DataError(f"{task.where}, field images: {error}") from error
            slots.append(ImageSlot(place + grown, shape.tokens, shape.entries, shape.grid))
            grown += shape.tokens - 1
        return tuple(slots)

    def _expand(self, engine_ids: list[int], slots: tuple[ImageSlot, ...]) -> list[int]:
        counts = iter(slots)
        token_ids: list[int] = []
        for token in engine_ids:
            repeat = next(counts).count if token == self.family.image_token_id else 1
            token_ids.extend([token] * repeat)
        return token_ids


def _too_long(length: int, limit: int) -> str:
    return (
        f"{length} tokens with its images, the limit is {limit}; raise data.max_prompt_tokens or lower "
        "model.max_tiles or model.max_pixels"
    )
