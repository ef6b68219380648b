"""Rewards made of rewards: a weighted sum of several, and one for each source of tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from foveate.errors import ConfigError, DataError
from foveate.records import Answer, Score, Task
from foveate.registry import FiniteNumber, shown_name, suggestion
from foveate.rewards.build import NeedsTruth, Reward, RewardJob, TruthCheck, build_reward, truth_check
from foveate.rewards.matching import also_pixels
from foveate.rewards.requests import Session

ANY_SOURCE = "*"
SOURCE, _EXTRA = "data_source", "extra_info."
_PLACED, _TELLING_ROWS = ("grounding", "boxes", "click"), 20
LOOKED_AT = 200
"""Rows that are looked at for doubts, those of each source by turns: reading rows from everywhere takes long."""


def weighted_sum(*, weights: dict[str, FiniteNumber], settings: dict[str, dict[str, Any]] = {}) -> Reward:  # noqa: B006
    """The sum of several rewards, each times its weight.

    Args:
        weights: reward (a name or an import path) -> weight. The weights need not add up to 1.
        settings: reward -> its settings, for those that have any.

    The parts of the score are the value of each reward by its name, and its own parts as `name/part`. Notes are joined.
    An answer that one of them cannot grade is not graded at all. Raises ConfigError for no weights, an unknown reward
    and settings of a reward without weight.
    """
    _require("weighted_sum", "weights", weights, settings)
    rewards = {name: build_reward(name, settings.get(name, {})) for name in weights}

    async def fetch(session: Session, answer: Any, task: Task) -> dict[str, Any]:
        fetches = {name: one.fetch(session, one.read(answer), task) for name, one in rewards.items() if one.fetch}
        return dict(zip(fetches, await asyncio.gather(*fetches.values()), strict=True))

    def total(answer: Answer | str, task: Task, fetched: Mapping[str, Any] = {}) -> Score:
        scores = {
            name: single.score(answer, task, *((fetched[name],) if name in fetched else ()))
            for name, single in rewards.items()
        }
        values: dict[str, float] = {}
        for name, score in scores.items():
            if score.value is None:
                return replace(score, note=f"{score.note} (part {shown_name(name)})")
            values[name] = score.value
        shown = {name: shown_name(name) for name in scores}
        parts = {shown[name]: value for name, value in values.items()}
        parts |= {f"{shown[name]}/{part}": v for name, one in scores.items() for part, v in one.parts.items()}
        notes = "; ".join(f"{shown[name]}: {score.note}" for name, score in scores.items() if score.note)
        return Score(sum(weights[name] * value for name, value in values.items()), parts, notes)

    joint = {name: one.together for name, one in rewards.items() if one.together is not None}

    def together(jobs: Sequence[RewardJob]) -> list[tuple[Any, ...]]:
        merged: list[dict[str, Any]] = [dict(*fetched) for *_, fetched in jobs]
        for name, look in joint.items():
            read = [(rewards[name].read(answer), task, ()) for answer, task, _ in jobs]
            for own, (value,) in zip(merged, look(read), strict=True):
                own[name] = value
        return [(own,) for own in merged]

    whole = combined_reward("weighted_sum", total, fetch, rewards)
    return replace(whole, together=together) if joint else whole


def weighted_sum_check(*, weights: dict[str, FiniteNumber], settings: dict[str, dict[str, Any]] = {}) -> TruthCheck:  # noqa: B006
    """The faults that any of the summed rewards finds in a task."""
    return _AllChecks(tuple(check for name in weights if (check := truth_check(name, settings.get(name, {})))))


def by_source(
    *,
    rewards: dict[str, str],
    settings: dict[str, dict[str, Any]] = {},  # noqa: B006
    field: str = SOURCE,
) -> Reward:
    """The reward that belongs to the source of a task.

    Args:
        rewards: source (`data_source` of the row) -> reward, a name or an import path. `*` stands for any other source.
        settings: source -> settings of its reward, for those that have any.
        field: another field of the row that chooses: `extra_info.reward_type`.

    Raises ConfigError for no rewards, an unknown one, settings of a source without reward and another kind of field;
    the reward raises DataError for a task of a source that is not named.
    """
    _require("by_source", "rewards", rewards, settings)
    _require_field(field)
    built = {source: build_reward(name, settings.get(source, {})) for source, name in rewards.items()}

    async def fetch(session: Session, answer: Any, task: Task) -> tuple[Any, ...]:
        chosen = built.get(_field_of(task, field), built.get(ANY_SOURCE))
        if chosen is None or chosen.fetch is None:
            return ()
        return (await chosen.fetch(session, chosen.read(answer), task),)

    def of_source(answer: Answer | str, task: Task, fetched: tuple[Any, ...] = ()) -> Score:
        chosen = built.get(_field_of(task, field), built.get(ANY_SOURCE))
        if chosen is None:
            raise DataError(f"{task.where}, field {field}: {_no_reward(_field_of(task, field), built)}")
        return chosen.score(answer, task, *fetched)

    return combined_reward("by_source", of_source, fetch, built)


def by_source_check(
    *,
    rewards: dict[str, str],
    settings: dict[str, dict[str, Any]] = {},  # noqa: B006
    field: str = SOURCE,
) -> TruthCheck:
    """The faults that the reward of a task's source finds in it; a source without reward is a fault."""
    checks = {source: truth_check(name, settings.get(source, {})) for source, name in rewards.items()}
    return _SourceCheck(checks, field)


def _require_field(field: str) -> None:
    if field != SOURCE and not field.startswith(_EXTRA):
        raise ConfigError(f"reward by_source, setting field: {field!r} is neither {SOURCE} nor {_EXTRA}NAME")


def _field_of(task: Task, field: str) -> str:
    """The value of the field that chooses; "" where the row has none."""
    return task.source if field == SOURCE else str(task.meta.get(field.removeprefix(_EXTRA), ""))


def combined_reward(
    name: str,
    function: Callable[..., Score],
    fetch: Callable[[Session, Any, Task], Awaitable[Any]],
    rewards: Mapping[str, Reward],
) -> Reward:
    """A reward of rewards, which reads and fetches what any of them needs."""
    reads_text = all(reward.reads_text for reward in rewards.values())
    return Reward(name, function, reads_text, fetch if any(reward.fetch for reward in rewards.values()) else None)


# Checks are objects and not closures, so that they can be sent to the processes that look at rows.


@dataclass(frozen=True, slots=True)
class _AllChecks:
    checks: tuple[TruthCheck, ...]

    def __call__(self, task: Task) -> list[tuple[str, str]]:
        return list(dict.fromkeys(fault for check in self.checks for fault in check(task)))


@dataclass(frozen=True, slots=True)
class _SourceCheck:
    checks: Mapping[str, TruthCheck | None]
    field: str = SOURCE

    def __call__(self, task: Task) -> Sequence[tuple[str, str]]:
        source = _field_of(task, self.field)
        if source not in self.checks and ANY_SOURCE not in self.checks:
            return [(self.field, _no_reward(source, self.checks))]
        chosen = self.checks.get(source, self.checks.get(ANY_SOURCE))
        return chosen(task) if chosen else []


def unread_sources(check: TruthCheck | None, names: Sequence[str]) -> list[str]:
    """A warning for each source that `by_source` names and no row has; `names` are those of the rows."""
    parts = check.checks if isinstance(check, _AllChecks) else (check,)
    known = dict.fromkeys(names)
    return [
        f"reward by_source names {name!r}, and no row has this source{suggestion(name, known, then='there')} are "
        f"{', '.join(known)}"
        for part in parts
        if isinstance(part, _SourceCheck) and part.field == SOURCE
        for name in part.checks
        if name not in known and name != ANY_SOURCE
    ]


def frame_doubts(check: TruthCheck | None, tasks: Iterable[Task]) -> list[str]:
    """A warning for each source whose boxes count as thousandths of the sides although all of them, twenty at least,
    also lie inside their images as pixels: by chance they would not. `check` is that of the reward."""
    if not any(map(_wants_thousandths, _checks_of(check, None))):
        return []
    fits: dict[str, list[bool]] = {}
    for task in tasks:
        if any(_wants_thousandths(one) for one in _checks_of(check, task)) and (fit := also_pixels(task)) is not None:
            fits.setdefault(task.source, []).append(fit)
    return [
        f"source {name!r}: the boxes of the ground truth count as thousandths of the sides, but all {len(found)} that "
        "were looked at also fit as pixels; if they are pixels, `foveate prepare grounding` converts them, or set "
        "truth_frame: pixels in the settings of the reward"
        for name, found in fits.items()
        if len(found) >= _TELLING_ROWS and all(found)
    ]


def _checks_of(check: TruthCheck | None, task: Task | None) -> list[TruthCheck | None]:
    """The checks, of single rewards, that a check of several ones holds for a task, or for any."""
    if isinstance(check, _SourceCheck) and task is None:
        return [one for part in check.checks.values() for one in _checks_of(part, None)]
    if isinstance(check, _SourceCheck) and task is not None:
        return _checks_of(check.checks.get(_field_of(task, check.field), check.checks.get(ANY_SOURCE)), task)
    if isinstance(check, _AllChecks):
        return [one for part in check.checks for one in _checks_of(part, task)]
    return [check]


def _wants_thousandths(check: TruthCheck | None) -> bool:
    read = check.check if isinstance(check, NeedsTruth) and check.name in _PLACED else None
    return isinstance(read, partial) and read.keywords.get("truth_frame", "thousandths") == "thousandths"


def _no_reward(source: str, known: Mapping[str, Any]) -> str:
    return (
        f"no reward for source {source!r}{suggestion(source, known, then='known')}: {', '.join(known)}; "
        f"add it under `rewards`, or '{ANY_SOURCE}' for any other source"
    )


def _require(name: str, field: str, chosen: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if not chosen:
        raise ConfigError(f"reward {name}: {field} must have at least 1 entry")
    for key in settings:
        if key not in chosen:
            raise ConfigError(
                f"reward {name}: settings for {key!r}, which is not in {field}{suggestion(key, chosen, then='there')} "
                f"are {', '.join(chosen)}"
            )
