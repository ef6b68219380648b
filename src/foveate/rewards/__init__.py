"""Rewards: text and a task in, a score out.

`REWARDS` names the graders, `(text, task, *, settings) -> Score`; keyword-only arguments are their settings. `BUILDERS`
names those that do work before the first answer, such as loading a file or building other rewards: called with their
settings alone they return the grader. `CHECKS` names, for the graders that need their ground truth in one form, the
test of that form: `(task) -> [(field, what)]`, one entry per fault, which validation runs over a whole dataset before
any model is loaded; `CHECK_BUILDERS` those that are built from settings. What `QUICK` names takes little and bounded
time, whatever the answer, and may run in the training process itself.
"""

from __future__ import annotations

REWARDS: dict[str, str] = {
    "grounding": "foveate.rewards.boxes:grounding_reward",
    "boxes": "foveate.rewards.matching:boxes_reward",
    "refcoco": "foveate.rewards.refcoco:refcoco",
    "math": "foveate.rewards.math:math_reward",
    "geo3k": "foveate.rewards.geo3k:geo3k",
    "multiple_choice": "foveate.rewards.text:multiple_choice",
    "exact": "foveate.rewards.text:exact",
    "format_tags": "foveate.rewards.text:format_tags",
    "repetition": "foveate.rewards.text:repetition",
}

BUILDERS: dict[str, str] = {
    "weighted_sum": "foveate.rewards.combine:weighted_sum",
    "by_source": "foveate.rewards.combine:by_source",
    "overlong": "foveate.rewards.text:overlong",
    "compute_score": "foveate.rewards.custom:compute_score",
    "judge": "foveate.rewards.remote:judge",
    "endpoint": "foveate.rewards.remote:endpoint",
}

CHECKS: dict[str, str] = {
    "grounding": "foveate.rewards.boxes:check_truth",
    "refcoco": "foveate.rewards.boxes:check_truth",
    "boxes": "foveate.rewards.matching:check_truth",
    "math": "foveate.rewards.text:check_truth",
    "geo3k": "foveate.rewards.text:check_truth",
    "multiple_choice": "foveate.rewards.text:check_truth",
    "exact": "foveate.rewards.text:check_truth",
}

CHECK_BUILDERS: dict[str, str] = {
    "weighted_sum": "foveate.rewards.combine:weighted_sum_check",
    "by_source": "foveate.rewards.combine:by_source_check",
}

QUICK = frozenset(
    {"grounding", "refcoco", "boxes", "multiple_choice", "exact", "format_tags", "overlong", "repetition"}
)
