"""Steps that cost time and teach nothing: each kind is told once a run, with its cause and what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from foveate.config.runs import RLSettings
from foveate.files import add_json_line
from foveate.log import read_metrics
from foveate.records import Group

logger = logging.getLogger(__name__)

STEPS_IN_A_ROW = 3
"""Steps in which all rewards are one number, or all answers are truncated although there are updates, before that is
told."""
HUGE = 1e30
"""Rewards beyond this have no exact sums in float32, and no squares."""

TEXTS = {
    "truncated": (
        "all answers were truncated (answer/truncated {truncated:g}) at rollout.max_tokens={max_tokens}, or at "
        "rollout.time_limit: {then}; raise these limits, or teach shorter answers first"
    ),
    "not_parsed": (
        "the reward could read none of the answers ({name} 0): they have not the form that it looks for; compare the "
        "answers in rollouts/ with docs/rewards.md, and ask for that form in the prompt, or teach it with foveate sft"
        " first"
    ),
    "constant_reward": (
        "every answer of {steps} steps in a row has the reward {mean:g}: it does not depend on the answers, or none "
        "of them comes near; grade a few answers of rollouts/ by hand, and check reward.name and the ground truth"
    ),
    "no_advantage": (
        "no group had an advantage: {equal} of {groups} have equal rewards (reward/mean {mean:g}), {not_graded} too "
        "few graded answers, and neither says what is better; take prompts that the model solves now and then, more "
        "answers to each (rollout.samples), a finer reward, or algorithm.resample_rounds"
    ),
    "no_update": (
        "no update was made (optim/updates 0), because no answer contributes to the gradient: the weights stay as "
        "they are; see rollout/groups_without_advantage, rollout/groups_not_graded and answer/truncated"
    ),
    "updates_skipped": (
        "all {updates:g} updates were skipped, because their gradients are not finite: the weights stay as they are; "
        "lower optim.lr, check that rewards are of ordinary size, and try model.dtype=float32"
    ),
    "huge_reward": (
        "a reward is {reward:g}: beyond {huge:g} advantages lose their meaning in float32; bound or scale the reward,"
        " -1 to 1 is usual"
    ),
}
"""The kinds of waste, in the words of the log and of the report: what was found, why, and what to do."""


class WasteWatch:
    """Looks at the metrics of each step, and tells of each kind of waste at the first step that shows it: in the log,
    and as a line of `path` for the report. What stands there from before a run was resumed is not told again."""

    def __init__(self, path: Path, settings: RLSettings) -> None:
        self._path, self._settings = path, settings
        self._told = {told["name"] for told in read_metrics(path)} if path.exists() else set()
        self._constant: list[float] = []
        self._truncated_steps = 0

    def observe(self, step: int, record: Mapping[str, float], groups: Sequence[Group]) -> None:
        """`groups`: those that the step trained on, with the answers that were left out; `record`: its metrics."""
        for name, facts in self._found(record, groups):
            if name not in self._told:
                self._told.add(name)
                text = TEXTS[name].format(**facts)
                logger.warning("step %d: %s", step, text)
                add_json_line(self._path, {"step": step, "name": name, "text": text})

    def _found(
        self, record: Mapping[str, float], groups: Sequence[Group]
    ) -> Iterator[tuple[str, dict[str, float | str]]]:
        """The kinds that the step shows, with what their texts name."""
        updates, mean = record["optim/updates"], record["reward/mean"]
        whole = record["answer/truncated"] + record["answer/timed_out"] >= 1
        self._truncated_steps = self._truncated_steps + 1 if whole else 0
        if whole and (not updates or self._truncated_steps >= STEPS_IN_A_ROW):
            then = "a reward that reads the end of an answer finds none"
            if self._settings.algorithm.mask_truncated:
                then = "algorithm.mask_truncated leaves all of them out of the loss"
            max_tokens = self._settings.rollout.max_tokens
            yield "truncated", {"truncated": record["answer/truncated"], "max_tokens": max_tokens, "then": then}
        for name, value in record.items():
            if name.startswith("reward/") and name.endswith("/parsed") and value == 0:
                yield "not_parsed", {"name": name}
        if record["reward/std"]:
            self._constant = []
        else:
            self._constant = [one for one in self._constant if one == mean] + [mean]
        teacher = self._settings.algorithm.teacher  # which teaches whatever the rewards are
        if len(self._constant) == STEPS_IN_A_ROW and teacher is None:
            yield "constant_reward", {"steps": STEPS_IN_A_ROW, "mean": mean}
        equal, not_graded = record["rollout/groups_without_advantage"], record["rollout/groups_not_graded"]
        if equal + not_graded == len(groups) and teacher is None:
            facts = {"equal": int(equal), "groups": len(groups), "not_graded": int(not_graded), "mean": mean}
            yield "no_advantage", facts
        if record["optim/lr"] and not updates:
            yield "no_update", {}
        if updates and record["optim/update_skipped"] == updates:
            yield "updates_skipped", {"updates": updates}
        rewards = (score.value for group in groups for score in group.scores if score.value is not None)
        largest = max(rewards, key=abs, default=0.0)
        if abs(largest) > HUGE:
            yield "huge_reward", {"reward": largest, "huge": HUGE}
