"""`gui`: a screen of widgets that a model operates by clicks, keys and the wheel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from foveate.environments.observe import observation
from foveate.environments.protocol import Observation, Step
from foveate.environments.screen import (
    WIDGET_KINDS,
    Screen,
    ScreenTask,
    Widget,
    WidgetKind,
    click,
    draw_screen,
    make_screen_task,
    scroll,
    type_text,
)
from foveate.environments.tool_use import Calling
from foveate.environments.tools import CallError, Frame, method_tool
from foveate.errors import ConfigError, DataError
from foveate.records import Task

SCENE, KIND = "scene", "kind"
"""Fields of a task's meta: the number that a screen is drawn from, and the kind of its task."""


def screen_task(scene: int, kind: WidgetKind) -> ScreenTask:
    """The task that a number stands for."""
    return make_screen_task(np.random.default_rng([scene, WIDGET_KINDS.index(kind)]), kind)


class Gui(Calling):
    """A drawn screen with widgets: an answer clicks, types and scrolls; the reward is 1 where OK is pressed and every
    widget is as the task says, else 0. A row whose extra_info has scene and kind (`foveate prepare gui`) is that
    screen; for others the seed of the group draws one of `kinds`. side: of the screen in pixels; frame, max_calls,
    shown: as in `tools`."""

    def __init__(
        self,
        *,
        side: int = 448,
        kinds: list[WidgetKind] | None = None,
        frame: Frame = "model",
        max_calls: int = 1,
        shown: bool = True,
    ) -> None:
        if not 84 <= side <= 2_048:
            raise ConfigError(f"environment gui: side must be from 84 to 2,048 pixels, found {side}")
        self._side, self._kinds = side, kinds or [*WIDGET_KINDS]
        methods = {"click": self._click, "type": self._type, "scroll": self._scroll}
        super().__init__([method_tool(name, method) for name, method in methods.items()], frame, max_calls, shown)
        self.shows_images = "its screen"
        self._task: ScreenTask
        self._screen: Screen

    def opening(self, task: Task, seed: int) -> Sequence[Observation]:
        kind = task.meta.get(KIND, self._kinds[seed % len(self._kinds)])
        scene = task.meta.get(SCENE, seed)
        if kind not in WIDGET_KINDS or not isinstance(scene, int) or scene < 0:
            raise DataError(f"{task.where}: scene {scene!r:.30} of kind {kind!r:.30} is none of a screen")
        self._task = screen_task(scene, kind)
        self._screen = self._task.screen
        system = [message for message in task.messages if message.role == "system"]
        return [
            *(observation(message.role, message.content) for message in system),
            observation("user", self._task.sentence, draw_screen(self._screen, self._side)),
        ]

    def answered(self, answer: str) -> Step:  # noqa: ARG002
        return Step(reward=0.0, done=True)

    def called(self, messages: list[Observation], info: Mapping[str, Any]) -> Step:
        if self._screen.pressed:
            return Step(reward=float(self._task.is_done(self._screen)), done=True, info=info)
        failed = [message for message, call in zip(messages, info["calls"], strict=False) if call["error"]]
        return Step((*failed, observation("tool", "", draw_screen(self._screen, self._side))), 0.0, info=info)

    def state(self) -> Any:
        return asdict(self._screen)

    def restore(self, state: Any) -> None:
        widgets = (Widget(**{**one, "options": tuple(one["options"])}) for one in state["widgets"])
        self._screen = Screen(tuple(widgets), state["focus"], state["pressed"])

    def _click(self, x: float, y: float) -> None:
        """Clicks on the screen.

        Args:
            x: How far from the left, in thousandths of the width.
            y: How far from the top, in thousandths of the height.
        """
        self._screen = click(self._screen, *self._place(x, y))

    def _type(self, text: str) -> None:
        """Types into the field that was clicked last, in the place of what it holds.

        Args:
            text: What to type.
        """
        self._screen = type_text(self._screen, text)

    def _scroll(self, x: float, y: float, rows: int) -> None:
        """Scrolls a list.

        Args:
            x: How far from the left, in thousandths of the width.
            y: How far from the top, in thousandths of the height.
            rows: By how many rows; down where positive.
        """
        self._screen = scroll(self._screen, *self._place(x, y), rows)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        """A place as the model writes it, in 0..1."""
        own = {"thousandths": (1000.0, 1000.0), "pixels": (float(self._side),) * 2}
        right, bottom = own.get(self._frame, self._first_frame)
        if not (0 <= x <= right and 0 <= y <= bottom):
            raise CallError(f"x and y must be from 0 to {right:g} and {bottom:g}, found {x:g} and {y:g}")
        return x / right, y / bottom
