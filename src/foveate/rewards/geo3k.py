r"""The reward of Geometry3K as it is published with verl: 0.9 for the answer in the box and 0.1 for the form.

InternVL3.5's online stage uses it for MMPR-Tiny too.
"""

from __future__ import annotations

from typing import Literal

from foveate.errors import ConfigError
from foveate.records import Score, Task
from foveate.registry import Share
from foveate.rewards.math import matches
from foveate.rewards.text import last_box, truths

try:
    from mathruler.grader import extract_boxed_content, grade_answer
except ImportError:
    raise ConfigError(
        "the geo3k reward needs the mathruler library, which is not installed; "
        "install it with: pip install 'foveate[math]'"
    ) from None

_OPEN, _CLOSE, _BOX = "<think>", "</think>", "\\boxed{"


def geo3k(
    text: str, task: Task, *, format_weight: Share = 0.1, grader: Literal["mathruler", "math_verify"] = "mathruler"
) -> Score:
    r"""(1 - w) accuracy + w format, with w the format weight.

    - format is 1 if the whole text matches `<think>.*</think>.*\boxed{.*}.*`, where a dot is any character.
    - accuracy is 1 if what stands in the last `\boxed{...}` is right. "mathruler" is the published grader: equal after
      normalisation, or a difference that simplifies to 0; a fraction must be reduced and a whole number written as
      one. "math_verify" compares by value (`foveate.rewards.math.matches`), units and multiple choice included.

    A ground truth that is a list accepts any of its entries. Parts: accuracy, format. Raises DataError for a ground
    truth that is neither text nor number.
    """
    form = float(has_form(text))
    accepted = truths(task)
    if grader == "mathruler":
        answer = extract_boxed_content(text)
        right = any(grade_answer(answer, truth) for truth in accepted)
    else:
        box = last_box(text)
        right = box is not None and any(matches(box, truth, task) for truth in accepted)
    value = (1.0 - format_weight) * right + format_weight * form
    return Score(value, {"accuracy": float(right), "format": form})


def has_form(text: str) -> bool:
    r"""Whether a text matches `<think>.*</think>.*\boxed{.*}.*` as a whole. Searched piece by piece: the pattern itself
    takes quadratic time on an answer that repeats its tags."""
    closed = text.find(_CLOSE, len(_OPEN))
    boxed = text.find(_BOX, closed + len(_CLOSE))
    return text.startswith(_OPEN) and closed >= 0 and boxed >= 0 and text.find("}", boxed + len(_BOX)) >= 0
