"""Training rows that stand in an evaluation set, by the content of their images and the words of their questions."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from foveate.data.images import load_image
from foveate.data.table import TaskTable
from foveate.records import Image, Task

_WORD = re.compile(r"[^\W_]+")
_FEWEST_WORDS = 4
"""Words of a question below which it says nothing by itself: `What is x?` stands in many sets."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row of one table that an evaluation set has, too: where it stands, and which of both it shares."""

    where: str
    image: bool
    question: bool

    @property
    def shared(self) -> str:
        """In words: the image, the question, or both."""
        return " and ".join(name for name, has in (("image", self.image), ("question", self.question)) if has)


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """The fingerprints of the images and questions of evaluation rows."""

    images: frozenset[bytes]
    questions: frozenset[bytes]

    @classmethod
    def of(cls, table: Iterable[Task], advance: Callable[[int], object] = lambda _: None) -> EvaluationSet:
        """Of all rows of a table; `advance` is told of each."""
        images: set[bytes] = set()
        questions: set[bytes] = set()
        for task in table:
            images.update(map(image_fingerprint, task.images))
            questions.update(filter(None, [question_fingerprint(task)]))
            advance(1)
        return cls(frozenset(images), frozenset(questions))

    def shared(self, task: Task) -> Overlap | None:
        """The overlap of a row with this set; None where it shares nothing."""
        image = any(image_fingerprint(one) in self.images for one in task.images)
        question = (question_fingerprint(task) or b"") in self.questions
        return Overlap(task.where, image, question) if image or question else None


def image_fingerprint(image: Image) -> bytes:
    """The hash of an image's pixels in RGB, upright: the same for a copy under another name or in another lossless
    format, another for one that was resized or compressed."""
    pixels = np.asarray(load_image(image))
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()


def question_fingerprint(task: Task) -> bytes | None:
    """The hash of the words of a row's last question, in small letters, without marks and punctuation; None for fewer
    than four words."""
    asked = [message.content for message in task.messages if message.role == "user"]
    text = unicodedata.normalize("NFKC", asked[-1] if asked else "").casefold().replace("<image>", " ")
    words = _WORD.findall(text)
    if len(words) < _FEWEST_WORDS:
        return None
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def overlaps(
    table: TaskTable, against: EvaluationSet, advance: Callable[[int], object] = lambda _: None
) -> list[Overlap]:
    """The rows of a table that share an image or a question with an evaluation set, in order."""
    found = []
    for task in table:
        found.append(against.shared(task))
        advance(1)
    return [one for one in found if one is not None]
