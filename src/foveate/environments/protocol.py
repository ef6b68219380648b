"""The seam of environments: a task opens one, answers go in, observations come out, until it is done.

An environment is written by subclassing `Environment`: one instance for each answer. A run talks to an
`EnvironmentPool`, which keeps the instances in worker processes and never lets one of them hold up another.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from foveate.errors import DataError
from foveate.records import Image, Message, Task


@dataclass(frozen=True, slots=True)
class Observation:
    """One message of an environment. `<image>` in the content marks where each of its images stands, in order.

    role: "system", "user", or "tool" for the result of a call."""

    role: str
    content: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """The reply of an environment to an answer.

    messages: what the policy reads next; of a last step they are not read. reward: of this step, or None where the
    environment gives none (a reward function then scores the answer). done: no answer is taken after this one. info:
    facts for metrics and report that JSON can hold. Known names: "calls", a list of {name, error: bool, image, box}
    with the number of the image that was looked at and the box in thousandths of its sides, where a tool has them;
    "turn_limit": true where the limit on turns ended it."""

    messages: tuple[Observation, ...] = ()
    reward: float | None = None
    done: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment:
    """The base of environments. An instance lives for one answer, in a worker process of its pool.

    The keyword-only arguments of its `__init__` are the schema of its settings, which are bound, and refused, when a
    run starts. What a method raises ends the answer, which is then not graded."""

    shows_images = ""
    """A part of it by which images are always shown, for the message where `max_images` is 0."""
    step_limits: EnvironmentLimits | None = None
    """What one step may show, told by the run that makes it."""

    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of functions that every prompt shows to the model, in the form of
        `transformers.utils.get_json_schema`. They follow from the settings: a run asks once."""
        return ()

    def reset(self, task: Task, seed: int) -> Sequence[Observation]:
        """Begin a task: the messages of the prompt. All answers of a group have the same task and seed, and must be
        given the same messages, because they share the prompt."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a task begins")

    def step(self, answer: str) -> Step:
        """Take the text that the policy wrote in this turn."""
        raise NotImplementedError(f"{type(self).__name__} does not say what an answer does")

    def last_reward(self) -> float | None:
        """The reward for an answer that a limit of turns, tokens or time has ended before the environment was done: it
        is asked for once, and added to that of the last turn. None: the rewards of the steps are all."""
        return None

    def close(self) -> None:
        """Let go of what it holds. Called once, also after a failure."""

    def state(self) -> Any:
        """All that changed since `reset`, as a value that JSON can hold and that is not None. None: it is rebuilt by
        replaying its answers."""
        return None

    def restore(self, state: Any) -> None:
        """Go back to a `state`, right after a `reset` with the task and seed of that time."""
        raise NotImplementedError(f"{type(self).__name__} has a state and does not say how it is restored")


class EnvironmentFault(DataError):
    """The code of an environment is at fault for every answer: it ends the run."""


OF_ENVIRONMENT = "environment: "
"""How the note of an answer begins that its environment leaves ungraded."""
FailureKind = Literal["raised", "timed_out", "died", "limit", "invalid", "start_again", "fault"]


@dataclass(frozen=True, slots=True)
class EnvironmentFailure:
    """In the place of a result: the environment of this answer is gone, and the answer is left out of baseline and loss
    with `note` (one line). kind "start_again": a rebuilt environment did not show what the first one had shown, so that
    the answer must be sampled anew from its prompt; all others end the answer. kind "fault" is an `EnvironmentFault`:
    the pool raises DataError in its place.

    The kinds: it raised; took too long; lost two processes; broke `EnvironmentLimits`; returned what is no reply."""

    kind: FailureKind
    note: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """An environment that waits for its first answer: the prompt, and a hash of all that the model sees of it."""

    messages: tuple[Observation, ...]
    digest: str


def with_opening(task: Task, opened: Sequence[Opened]) -> Task:
    """The task of a group with the prompt that its environments have opened with: their messages and images in the
    place of its own. Raises DataError where they differ, because a group shares its prompt."""
    first = opened[0]
    if any(one.digest != first.digest for one in opened):
        raise DataError(
            f"{task.where or task.id}: the environment began with different messages for answers of one group, which "
            "share their prompt; let reset depend on the task and the seed alone"
        )
    messages = tuple(Message(message.role, message.content) for message in first.messages)
    return replace(task, messages=messages, images=tuple(image for one in first.messages for image in one.images))


@dataclass(frozen=True, slots=True)
class EnvironmentRecord:
    """All that rebuilds an environment in another process, as values that JSON can hold: the seed, the answers that it
    was given, hashes of its observations (of the prompt first), and its own `state`, or None."""

    seed: int
    answers: tuple[str, ...]
    digests: tuple[str, ...]
    state: Any = None


@dataclass(frozen=True, slots=True)
class EnvironmentLimits:
    """Bounds on every environment of a pool; each is also a setting of that name beside the environment's own.

    max_turns: answers of the policy until the environment counts as done. max_text: characters of the messages of a
    step. max_images: images of a step. max_pixels: pixels of an image. A step beyond the last three is a failure."""

    max_turns: int = 8
    max_text: int = 20_000
    max_images: int = 4
    max_pixels: int = 4_194_304


class EnvironmentPool(Protocol):
    """The environments of a run, by keys that the caller chooses. No call waits: futures get their results, or an
    `EnvironmentFailure`, from a thread of the pool, whose callbacks must be short. They raise DataError only where the
    environment is wrong for every answer. A key is free again after `close`, and after a failure."""

    tools: tuple[Mapping[str, Any], ...]
    """Schemas of the tools of every environment; empty for none."""
    max_turns: int
    has_last_reward: bool
    """Whether an environment has more to say of an answer that a limit has ended than the rewards of its steps."""

    def open(self, task: Task, seed: int, key: Hashable) -> Future[Opened | EnvironmentFailure]:
        """Make the environment of one answer, and reset it."""
        ...

    def step(self, key: Hashable, answer: str) -> Future[Step | EnvironmentFailure]:
        """Give an environment the text of a turn."""
        ...

    def last_reward(self, key: Hashable) -> Future[Step | EnvironmentFailure]:
        """The reward for an answer that a limit has ended, as a step without messages."""
        ...

    def close(self, key: Hashable) -> None:
        """End an environment, also one that is busy: a future that waits for it is cancelled."""
        ...

    def state(self, key: Hashable) -> EnvironmentRecord:
        """All that `restore` needs of an open environment: it stands behind its last step that has a result."""
        ...

    def restore(self, task: Task, record: EnvironmentRecord, key: Hashable) -> Future[Opened | EnvironmentFailure]:
        """Rebuild an environment as it was, from its state or by replaying its answers. Where it does not show again
        what it had shown, the failure is "start_again"."""
        ...
