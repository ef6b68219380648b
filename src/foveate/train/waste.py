"""Steps that cost time and teach nothing: each kind is told once a run, with its cause and what to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from foveate.config.runs import RLSettings
from foveate.records import Group

logger = logging.getLogger(__name__)

STEPS_IN_A_ROW = 3
"""Steps in which all rewards are one number, or all answers are truncated although there are updates, before that is
told."""
HUGE = 1e30
"""Rewards beyond this have no exact sums in float32, and no squares."""


class WasteWatch:
    """Looks at the metrics of each step, and tells of each kind of waste at the first step that shows it: in the log,
    and as a line of `path` for the report. What stands there from before a run was resumed is not told again."""

    def __init__(self, path: Path, settings: RLSettings) -> None:
        self._path, self._settings = path, settings
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._told = {json.loads(line)["name"] for line in lines}
        self._constant: list[float] = []
        self._truncated_steps = 0

    def observe(self, step: int, record: Mapping[str, float], groups: Sequence[Group]) -> None:
        """`groups`: those that the step trained on, with the answers that were left out; `record`: its metrics."""
        for name, text in self._found(record, groups):
            if name not in self._told:
                self._told.add(name)
                logger.warning("step %d: %s", step, text)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "name": name, "text": text}, ensure_ascii=False) + "\n")

    def _found(self, record: Mapping[str, float], groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
        rewards = [score.value for group in groups for score in group.scores if score.value is not None]
        yield from self._truncated(record)
        yield from _not_parsed(record)
        yield from self._constant_reward(record)
        yield from _no_advantage(record, len(groups))
        yield from _no_update(record)
        largest = max(rewards, key=abs, default=0.0)
        if abs(largest) > HUGE:
            yield (
                "huge_reward",
                (
                    f"a reward is {largest:g}: beyond {HUGE:g} advantages lose their meaning in float32; bound or "
                    "scale the "
                    "reward, -1 to 1 is usual"
                ),
            )

    def _truncated(self, record: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        if record["answer/truncated"] + record["answer/timed_out"] < 1:
            self._truncated_steps = 0
            return
        self._truncated_steps += 1
        if record["optim/updates"] and self._truncated_steps < STEPS_IN_A_ROW:
            return
        masked = self._settings.algorithm.mask_truncated
        then = (
            "algorithm.mask_truncated leaves all of them out of the loss"
            if masked
            else ("a reward that reads the end of an answer finds none there")
        )
        yield (
            "truncated",
            (
                f"all answers were truncated (answer/truncated {record['answer/truncated']:g}) at rollout.max_tokens="
                f"{self._settings.rollout.max_tokens}, or at rollout.time_limit: {then}; raise these limits, or teach "
                "shorter "
                "answers first"
            ),
        )

    def _constant_reward(self, record: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        same = record["reward/std"] == 0 and self._constant[-1:] in ([], [record["reward/mean"]])
        self._constant = [*self._constant, record["reward/mean"]] if same else []
        if len(self._constant) == STEPS_IN_A_ROW:
            yield (
                "constant_reward",
                (
                    f"every answer of {STEPS_IN_A_ROW} steps in a row has the reward {record['reward/mean']:g}: it "
                    "does not "
                    "depend on the answers, or none of them comes near; grade a few answers by hand (rollouts/ has "
                    "them), "
                    "and check reward.name and the ground truth"
                ),
            )


def _not_parsed(record: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for name, value in record.items():
        if name.startswith("reward/") and name.split("/")[-1] == "parsed" and value == 0:
            yield (
                "not_parsed",
                (
                    f"the reward could read none of the answers ({name} 0): they have not the form that it looks for; "
                    "compare the answers in rollouts/ with docs/rewards.md, and ask for that form in the prompt or "
                    "teach it "
                    "with foveate sft first"
                ),
            )


def _no_advantage(record: Mapping[str, float], groups: int) -> Iterator[tuple[str, str]]:
    without, not_graded = (int(record[f"rollout/groups_{name}"]) for name in ("without_advantage", "not_graded"))
    if without + not_graded == groups:
        left_out = f", and {not_graded} have too few graded answers" if not_graded else ""
        yield (
            "no_advantage",
            (
                f"no group had an advantage: in {without} of {groups} all answers got the same reward{left_out} "
                "(reward/mean "
                f"{record['reward/mean']:g}), which says nothing about better or worse; take prompts that the model "
                "solves "
                "now and then, more answers to each (rollout.samples), a finer reward, or algorithm.resample_rounds"
            ),
        )


def _no_update(record: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    updates, skipped = record["optim/updates"], record["optim/update_skipped"]
    if not record["optim/lr"]:
        return
    if not updates:
        yield (
            "no_update",
            (
                "no update was made (optim/updates 0), because no answer contributes to the gradient: the weights "
                "stay as "
                "they are; see rollout/groups_without_advantage, rollout/groups_not_graded and answer/truncated"
            ),
        )
    elif skipped == updates:
        yield (
            "updates_skipped",
            (
                f"all {updates:g} updates were skipped, because their gradients are not finite: the weights stay as "
                "they are; "
                "lower optim.lr, check that the rewards are finite and of ordinary size, and try model.dtype float32"
            ),
        )
