r"""Vero's routed reward (arXiv 2604.04917): each row names what scores it, and the form counts beside it.

value = (1 - w) a + w f, with w the format weight (0.2), f the form and a the value of the reward that
`extra_info.reward_type` names; without form a is 0. Rows that are judged keep the judge's value without form, as
published. f is 0 unless the answer is `<think>...</think><answer>...</answer>` and both hold something; of a row whose
answer stands in a box it is 0.5 unless that is one box, and of boxes and clicks 0.5 if there are several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.errors import DataError
from foveate.records import Answer, Score, Task
from foveate.registry import Share, suggestion
from foveate.rewards.boxes import AnswerFrame, TruthFrame
from foveate.rewards.build import Reward, TruthCheck, build_reward, truth_check
from foveate.rewards.combine import combined_reward
from foveate.rewards.plain_text import tagged_answer
from foveate.rewards.requests import Session

REWARD_TYPE = "reward_type"
"""The field of `extra_info` that names the reward of a row."""
TYPES: dict[str, str] = {
    "string_match": "string_match",
    "multiple_choice": "multiple_choice",
    "numeric": "numeric",
    "number_list": "number_list",
    "list_string_match": "string_match",
    "counting": "counting",
    "search": "search",
    "web_action": "web_action",
    "grounding": "boxes",
    "clicking": "click",
    "instruction_following": "instruction_following",
    "instruction_following_llm_judge": "instruction_following",
    "llm_judge": "judge",
}
"""From Vero's types of rows to rewards."""
_SETTINGS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"extraction": "text"},
    "numeric": {"tolerance": 0.0},
    "grounding": {"kind": "located"},
}
_PLACED = ("grounding", "clicking")
_FREE = ("instruction_following", "instruction_following_llm_judge", "llm_judge")
_JUDGED = ("instruction_following_llm_judge", "llm_judge")
_BOXED = re.compile(r"\\boxed\s*\{")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def vero(
    *,
    format_weight: Share = 0.2,
    judge: dict[str, Any] = {},  # noqa: B006
    instruction_weight: Share = 0.5,
    answer_frame: AnswerFrame = "thousandths",
    truth_frame: TruthFrame = "thousandths",
) -> Reward:
    """The reward of Vero's rows; see the head of this file.

    Args:
        format_weight: w, the share of the form.
        judge: settings of the judge (`remote.judge`), which gets the text inside `<answer>`; without them rows that
            are to be judged are reported before the run.
        instruction_weight: of rows that are checked and judged, the share of the instructions.
        answer_frame, truth_frame: what coordinates of boxes and clicks are (`boxes.grounding_reward`).

    Parts: accuracy (a), format (f), those of the row's reward as `TYPE/part`, and judge. The reward raises DataError
    for a row of no type.
    """
    built = _Lazy(answer_frame, truth_frame)
    judging = build_reward("judge", judge) if judge else None

    async def fetch(session: Session, text: str, task: Task) -> tuple[Any, ...]:
        if _type_of(task) not in _JUDGED or judging is None or judging.fetch is None:
            return ()
        return (await judging.fetch(session, _inside(text), task),)

    def score(answer: Answer | str, task: Task, fetched: tuple[Any, ...] = ()) -> Score:
        text = answer if isinstance(answer, str) else answer.text
        kind, form = _type_of(task), vero_form(text, _type_of(task))
        parts: dict[str, float] = {}
        value, note = 0.0, ""
        if kind != "llm_judge":
            own = built[kind].score(text, task)
            if own.value is None:
                return own
            value, note = own.value * (form > 0), own.note
            parts = {f"{kind}/{part}": number for part, number in own.parts.items()}
        if kind in _JUDGED:
            if judging is None:
                raise DataError(f"{task.where}, field extra_info.{REWARD_TYPE}: {_NO_JUDGE}")
            judged = judging.score(_inside(text), task, *fetched)
            if judged.value is None:
                return judged
            share = instruction_weight if kind != "llm_judge" else 0.0
            value = share * value + (1 - share) * judged.value
            parts["judge"] = judged.value
        total = (1 - format_weight) * value + format_weight * form
        return Score(total, {"accuracy": value, "format": form, **parts}, note)

    return combined_reward("vero", score, fetch, {"judge": judging} if judging else {})


class _Lazy(dict[str, Reward]):
    """The reward of each type, built when the first row asks for it: some need a library that other rows do not."""

    def __init__(self, answer_frame: AnswerFrame, truth_frame: TruthFrame) -> None:
        self._frames = {"answer_frame": answer_frame, "truth_frame": truth_frame}

    def __missing__(self, kind: str) -> Reward:
        self[kind] = build_reward(TYPES[kind], _SETTINGS.get(kind, {}) | (self._frames if kind in _PLACED else {}))
        return self[kind]


def vero_check(
    *,
    format_weight: Share = 0.2,  # noqa: ARG001
    judge: dict[str, Any] = {},  # noqa: B006
    instruction_weight: Share = 0.5,  # noqa: ARG001
    answer_frame: AnswerFrame = "thousandths",  # noqa: ARG001
    truth_frame: TruthFrame = "thousandths",
) -> TruthCheck:
    """The faults that the reward of a row's type finds in it; a type that is not known is one."""
    return _TypeCheck(truth_frame, bool(judge))


@dataclass(frozen=True, slots=True)
class _TypeCheck:
    truth_frame: TruthFrame
    has_judge: bool

    def __call__(self, task: Task) -> Sequence[tuple[str, str]]:
        kind = str(task.meta.get(REWARD_TYPE, ""))
        if kind not in TYPES:
            return [(f"extra_info.{REWARD_TYPE}", _no_type(kind))]
        if kind in _JUDGED and not self.has_judge:
            return [(f"extra_info.{REWARD_TYPE}", _NO_JUDGE)]
        settings = {"truth_frame": self.truth_frame} if kind in _PLACED else {}
        check = truth_check(TYPES[kind], settings) if kind != "llm_judge" else None
        return check(task) if check else []


def vero_form(text: str, kind: str) -> float:
    """The form of an answer to a row of a type: 0, 0.5 or 1."""
    if any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    opened, thought, behind, said = (text.find(tag) for tag in _TAGS)
    outside = text[:opened] + text[thought + len(_TAGS[1]) : behind] + text[said + len(_TAGS[3]) :]
    if not opened < thought < behind < said or outside.strip():
        return 0.0
    answer = text[behind + len(_TAGS[2]) : said]
    if not text[opened + len(_TAGS[0]) : thought].strip() or not answer.strip():
        return 0.0
    if kind in _FREE:
        return 1.0
    if kind in _PLACED:
        return 1.0 if answer.count(r"\boxed") < 2 else 0.5
    boxes = _boxes(answer)
    return 1.0 if len(boxes) == 1 and boxes[0] else 0.5


def _boxes(text: str) -> list[str]:
    """The contents of the closed boxes of a text; of nested ones the outermost."""
    found: list[str] = []
    end = 0
    while opened := _BOXED.search(text, end):
        depth, end = 1, opened.end()
        while depth and end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        if depth:
            break
        found.append(text[opened.end() : end - 1].strip())
    return found


def _inside(text: str) -> str:
    tagged = tagged_answer(text, "first")
    return (text if tagged is None else tagged).strip()


def _type_of(task: Task) -> str:
    kind = str(task.meta.get(REWARD_TYPE, ""))
    if kind not in TYPES:
        raise DataError(f"{task.where}, field extra_info.{REWARD_TYPE}: {_no_type(kind)}")
    return kind


_NO_JUDGE = "the row is to be judged; give the reward vero its setting judge: {url: .., model: ..}"


def _no_type(kind: str) -> str:
    known: Mapping[str, str] = TYPES
    return f"{kind!r} is no type of Vero's rows{suggestion(kind, known, then='known')}: {', '.join(known)}"
