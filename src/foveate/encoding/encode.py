"""Task -> Prompt: the one owner of pixels, of the number of image tokens and of where they stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveate.config.data import VideoSettings
from foveate.data.conversations import IMAGE_WORD
from foveate.data.images import load_image
from foveate.data.rows import fault_of
from foveate.data.videos import video_frames
from foveate.encoding.chat import (
    ANSWER_WORDS,
    IMAGE_MARK,
    VIDEO_MARK,
    continued,
    frames_in,
    opened_by,
    render,
    some_prompt,
    template_of,
)
from foveate.encoding.control import Disguise, encode_text, pattern_of, without_panics, word_id
from foveate.encoding.family import Clip, Family, ImageShape
from foveate.errors import DataError, one_line
from foveate.records import Image, ImageSlot, Message, Prompt, Task
from foveate.rewards.pool import with_opened

Medium = Image | Clip
"""That which stands at an image mark of a prompt."""
_MARKS = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")


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
    schemas of functions that every prompt shows; `video`: which frames of videos are shown; `route`: what compresses
    tiles of prompts with their pixels, of a model that does (`length` is a bound then)."""

    tokenizer: PreTrainedTokenizerBase
    family: Family
    budget: int
    max_prompt_tokens: int
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    video: VideoSettings = field(default_factory=VideoSettings)
    route: Callable[[Sequence[Prompt]], Sequence[Prompt]] | None = None

    def __call__(self, task: Task, degrade: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None) -> Prompt:
        """Decode, tile and tokenise; `degrade` changes images, but not frames of videos, and keeps their sizes. Raises
        DataError naming the row where that fails."""
        task, media = self._unrolled(task)
        prompt, budgets = self.placed(self.rendered(task), media, task.where)
        self._require_short(len(prompt), task.where)
        return self.routed([self.with_pixels(prompt, media, budgets, task.where, degrade)])[0]

    @property
    def plain(self) -> Encoder:
        """The same without `route`."""
        return self if self.route is None else replace(self, route=None)

    def routed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts as they were encoded, with the tiles compressed that `route` chooses, if there is one."""
        if self.route is None:
            return [*prompts]
        found = iter(self.route([prompt for prompt in prompts if prompt.pixels is not None]))
        return [prompt if prompt.pixels is None else next(found) for prompt in prompts]

    def beside(self, task: Task, other: Prompt) -> Prompt:
        """The same for a task that shows the images of another prompt, with its pixels, which are not decoded again."""
        task, media = self._unrolled(task)
        prompt = replace(self.placed(self.rendered(task), media, task.where)[0], pixels=other.pixels)
        self._require_short(len(prompt), task.where)
        return self.routed([prompt])[0]

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
        task, media = self._unrolled(task)
        engine_ids, slots, _ = self._laid_out(self.rendered(task), media, task.where)
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
            found, limit = f"{length} tokens with its images", self.max_prompt_tokens
            names = ", ".join(str(tool["function"]["name"]) for tool in self.tools)
            tools, fewer = (f" and the tools that it shows ({names})", ", or show fewer tools") if names else ("", "")
            raise DataError(
                f"{where}, field prompt: {found}{tools}, the limit is {limit}; raise data.max_prompt_tokens or lower "
                f"model.max_tiles or model.max_pixels{fewer}"
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

    def _unrolled(self, task: Task) -> tuple[Task, tuple[Medium, ...]]:
        """The task with an image mark for each clip of its videos, and all that stands at image marks, in order."""
        if not task.videos:
            return task, task.images
        found = [mark for message in task.messages for mark in _MARKS.findall(message.content)]
        if found.count(VIDEO_MARK) != len(task.videos) or found.count(IMAGE_MARK) != len(task.images):
            raise DataError(
                f"{task.where}, field prompt: {found.count(IMAGE_MARK)} {IMAGE_MARK} and {found.count(VIDEO_MARK)} "
                f"{VIDEO_MARK} marks for {len(task.images)} images and {len(task.videos)} videos; each needs one mark"
            )
        if not self.family.sees_images:
            raise DataError(f"{task.where}, field videos: {self.family.name} is a text-only model and sees no videos")
        images, videos, media = iter(task.images), iter(task.videos), list[Medium]()

        def place(mark: re.Match[str]) -> str:
            if mark[0] == IMAGE_MARK:
                media.append(next(images))
                return IMAGE_MARK
            clips = self.family.clips(next(videos), self.video)
            media.extend(clips)
            return "".join(clip.text + IMAGE_MARK for clip in clips)

        try:
            messages = tuple(replace(one, content=_MARKS.sub(place, one.content)) for one in task.messages)
        except DataError as error:
            raise DataError(f"{task.where}, field videos: {error}") from error
        return replace(task, messages=messages, videos=()), tuple(media)

    def placed(self, rendered: Rendered, images: Sequence[Medium], where: str) -> tuple[Prompt, list[int]]:
        """The tokens of a text with the places of its images, still without their pixels, and the budget of each."""
        engine_ids, slots, budgets = self._laid_out(rendered, images, where)
        return Prompt(tuple(self._expand(engine_ids, slots)), slots, None, tuple(engine_ids)), budgets

    def _laid_out(
        self, rendered: Rendered, images: Sequence[Medium], where: str
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
        frames = [seen or isinstance(one, Clip) for seen, one in zip(frames_in(text), images, strict=True)]
        each, frame = self.family.share(self.budget, frames.count(False)), self.family.frame_budget(self.budget)
        budgets = [frame if is_frame else each for is_frame in frames]
        text = self._written(text, images, budgets, where).replace(IMAGE_WORD, IMAGE_MARK)
        engine_ids = self._prompt_ids(Rendered(text, rendered.disguise), where)
        return engine_ids, self._slots(images, engine_ids, budgets, where), budgets

    def with_pixels(
        self,
        prompt: Prompt,
        images: Sequence[Medium],
        budgets: Sequence[int],
        where: str,
        degrade: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
    ) -> Prompt:
        """The prompt with the pixels of its images and frames, which are decoded now."""
        if not images:
            return prompt
        pieces: list[Tensor] = []
        pairs = [*zip(images, budgets, strict=True)]
        for video, run in groupby(pairs, lambda pair: pair[0].video if isinstance(pair[0], Clip) else None):
            if video is None:
                for one, n in run:
                    assert isinstance(one, Image)
                    image = load_image(one, where)
                    pieces.append(self.family.pixels(image if degrade is None else degrade(image), n))
            else:
                pieces += self._clip_pixels([(one, n) for one, n in run if isinstance(one, Clip)], where)
        return replace(prompt, pixels=torch.cat(pieces))

    def _clip_pixels(self, clips: Sequence[tuple[Clip, int]], where: str) -> Iterator[Tensor]:
        """The pixels of clips of one video, all of one size. Its frames are decoded one after the other, each once."""
        (first, budget), family = clips[0], self.family
        indices = sorted({frame for clip, _ in clips for frame in clip.frames})
        made = {
            index: family.pixels(image, budget) if first.size is None else family.clip_pixels(image, first)
            for index, image in zip(indices, video_frames(first.video, indices, where), strict=True)
        }
        for clip, _ in clips:
            yield torch.cat([made[frame] for frame in clip.frames])

    def _shape(self, image: Medium, budget: int) -> ImageShape:
        if isinstance(image, Image):
            return self.family.shape(image.width, image.height, budget)
        if image.size is None:
            return self.family.shape(image.video.width, image.video.height, budget)
        return self.family.clip_shape(image)

    def _written(self, text: str, images: Sequence[Medium], budgets: Sequence[int], where: str) -> str:
        """The text with what stands for each image in place of its mark."""
        first, *rest = text.split(IMAGE_MARK)
        pieces = [first]
        for image, budget, after in zip(images, budgets, rest, strict=True):
            try:
                if isinstance(image, Clip) and image.size is not None:
                    pieces += [self.family.video_text, after]
                else:
                    seen = image if isinstance(image, Image) else image.video
                    pieces += [self.family.written(seen.width, seen.height, budget), after]
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
        self, images: Sequence[Medium], engine_ids: list[int], budgets: list[int], where: str
    ) -> tuple[ImageSlot, ...]:
        slots: list[ImageSlot] = []
        grown = 0
        places = iter([i for i, token in enumerate(engine_ids) if token in self._placeholders])
        both_ways = self.family.bidirectional_images
        for image, budget in zip(images, budgets, strict=True):
            try:
                shape = self._shape(image, budget)
            except DataError as error:
                raise DataError(f"{where}, field images: {error}") from error
            tokens, entries = shape.tokens // shape.runs, shape.entries // shape.runs
            for _ in range(shape.runs):
                place, grid = next(places) + grown, shape.grid
                sides = (self.family.sides[0],) * entries if self.family.sides is not None else ()
                more = shape.layout, shape.times, shape.frames, sides
                slots.append(ImageSlot(place, tokens, entries, grid, both_ways, *more))
                grown += tokens - 1
        if next(places, None) is not None:
            raise DataError(f"{where}, field prompt: contains the placeholder of an image; write {IMAGE_MARK}")
        return tuple(slots)

    @property
    def _placeholders(self) -> tuple[int, int]:
        return self.family.image_token_id, self.family.video_token_id

    def _expand(self, engine_ids: list[int], slots: tuple[ImageSlot, ...]) -> list[int]:
        counts = iter(slots)
        token_ids: list[int] = []
        for token in engine_ids:
            repeat = next(counts).count if token in self._placeholders else 1
            token_ids.extend([token] * repeat)
        return token_ids


@lru_cache(maxsize=64)
def _control_words(
    family: Family, tokenizer: PreTrainedTokenizerBase, _template: str, allowed: tuple[str, ...]
) -> tuple[tuple[str, ...], re.Pattern[str] | None]:
    """`Encoder._control_words`, found once for each template."""
    words = tuple(word for word in family.all_control_words(tokenizer) if word not in allowed)
    return words, pattern_of(words)
