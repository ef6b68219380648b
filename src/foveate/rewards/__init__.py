"""Rewards: an answer and its task in, a score out. `REWARDS` is the table of the known ones."""

from __future__ import annotations

from typing import NamedTuple

GROUND_TRUTH = "reward_model.ground_truth"
"""The field of a row that rewards compare answers with."""


class KnownReward(NamedTuple):
    """One line of the table.

    function: the reward, of any signature that `build.adapt` takes; keyword-only arguments are its settings.
    check: for a reward that needs its ground truth in one form, the test of that form: `(task) -> [(field, what is
    wrong)]`, with those settings of the reward that it names. Validation runs it over a dataset before a model is
    loaded. builds: `function` and `check` do work before the first answer (they load a file, build other rewards):
    called with their settings alone they return the reward and the check.
    quick: takes little and bounded time whatever the answer, and may run in the training process itself.
    """

    function: str
    check: str = ""
    builds: bool = False
    quick: bool = False


_HERE = "foveate.rewards"
_ANSWER = f"{_HERE}.text:check_answer"

REWARDS: dict[str, KnownReward] = {
    "grounding": KnownReward(f"{_HERE}.boxes:grounding_reward", f"{_HERE}.boxes:check_box", quick=True),
    "boxes": KnownReward(f"{_HERE}.matching:boxes_reward", f"{_HERE}.matching:check_boxes", quick=True),
    "refcoco": KnownReward(f"{_HERE}.refcoco:refcoco", f"{_HERE}.boxes:check_box", quick=True),
    "temporal_iou": KnownReward(f"{_HERE}.temporal:temporal_iou", f"{_HERE}.temporal:check_span", quick=True),
    "math": KnownReward(f"{_HERE}.math:math_reward", f"{_HERE}.text:check_letter"),
    "geo3k": KnownReward(f"{_HERE}.geo3k:geo3k", _ANSWER),
    "multiple_choice": KnownReward(f"{_HERE}.text:multiple_choice", f"{_HERE}.text:check_choice", quick=True),
    "exact": KnownReward(f"{_HERE}.text:exact", _ANSWER, quick=True),
    "string_match": KnownReward(f"{_HERE}.strings:string_match", f"{_HERE}.strings:check_texts", quick=True),
    "string_list": KnownReward(f"{_HERE}.strings:string_list", f"{_HERE}.strings:check_list", quick=True),
    "search": KnownReward(f"{_HERE}.strings:search", f"{_HERE}.strings:check_search", quick=True),
    "counting": KnownReward(f"{_HERE}.strings:counting", f"{_HERE}.strings:check_count", quick=True),
    "numeric": KnownReward(f"{_HERE}.numeric:numeric", f"{_HERE}.numeric:check_number", quick=True),
    "chartqa": KnownReward(f"{_HERE}.numeric:chartqa", f"{_HERE}.numeric:check_relaxed", quick=True),
    "number_list": KnownReward(f"{_HERE}.numeric:number_list", f"{_HERE}.numeric:check_numbers", quick=True),
    "click": KnownReward(f"{_HERE}.actions:click_reward", f"{_HERE}.actions:check_click", quick=True),
    "web_action": KnownReward(f"{_HERE}.actions:web_action", f"{_HERE}.actions:check_action", quick=True),
    "instruction_following": KnownReward(
        f"{_HERE}.instructions:instruction_following", f"{_HERE}.instructions:check_instructions"
    ),
    "mathvista": KnownReward(f"{_HERE}.benchmarks:mathvista", f"{_HERE}.benchmarks:check_mathvista"),
    "mmmu": KnownReward(f"{_HERE}.benchmarks:mmmu", f"{_HERE}.strings:check_search"),
    "ocrbench": KnownReward(f"{_HERE}.benchmarks:ocrbench", f"{_HERE}.strings:check_texts", quick=True),
    "vero": KnownReward(f"{_HERE}.vero:vero", f"{_HERE}.vero:vero_check", builds=True),
    "format_tags": KnownReward(f"{_HERE}.text:format_tags", quick=True),
    "repetition": KnownReward(f"{_HERE}.text:repetition", quick=True),
    "overlong": KnownReward(f"{_HERE}.shaping:overlong", builds=True, quick=True),
    "length_band": KnownReward(f"{_HERE}.shaping:length_band", builds=True, quick=True),
    "entropy_band": KnownReward(f"{_HERE}.shaping:entropy_band", quick=True),
    "weighted_sum": KnownReward(f"{_HERE}.combine:weighted_sum", f"{_HERE}.combine:weighted_sum_check", builds=True),
    "by_source": KnownReward(f"{_HERE}.combine:by_source", f"{_HERE}.combine:by_source_check", builds=True),
    "process": KnownReward("foveate.evaluate.process:process", builds=True, quick=True),
    "judge": KnownReward(f"{_HERE}.remote:judge", builds=True, quick=True),
    "endpoint": KnownReward(f"{_HERE}.remote:endpoint", builds=True, quick=True),
}
