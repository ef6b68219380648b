"""A drawn screen of widgets that is clicked, typed into and scrolled, with tasks that a program checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WidgetKind = Literal["toggle", "slider", "field", "list"]
WIDGET_KINDS: tuple[WidgetKind, ...] = ("toggle", "slider", "field", "list")
LABELS = ("VOLUME", "LIGHT", "SPEED", "SIZE", "WIDTH", "SOUND", "WIFI", "NIGHT", "MAIL", "NAME", "CITY", "CODE")
WORDS = ("cat", "dog", "sun", "tree", "fish", "star", "milk", "bird", "lamp", "rose", "ship", "corn")
STEP = 10
"""Between the values 0 to 100 of a slider."""
VISIBLE, OPTIONS = 3, 6
"""Rows of a list that are shown, of all that it has."""
ROWS = 6
"""Rows of widgets on a screen, of which the last one holds the buttons."""
BUTTONS = ("CANCEL", "OK")
LONGEST_TEXT = 20

_TRACK, _BOX = (0.42, 0.8), (0.42, 0.97)
"""Where the track of a slider and the box of a field begin and end, as shares of the width."""
_INK, _PAPER, _BLUE = (25, 25, 25), (250, 250, 250), (40, 90, 200)


@dataclass(frozen=True, slots=True)
class Widget:
    """One widget. value: whether a toggle is on, the number of a slider, the text of a field, the chosen option of a
    list; top: the first option that a list shows."""

    kind: WidgetKind
    label: str
    value: Any
    options: tuple[str, ...] = ()
    top: int = 0

    @property
    def rows(self) -> int:
        return VISIBLE if self.kind == "list" else 1


@dataclass(frozen=True, slots=True)
class Screen:
    """Widgets from top to bottom, the one that is typed into (-1 for none), and the button that ended it, or ""."""

    widgets: tuple[Widget, ...]
    focus: int = -1
    pressed: str = ""

    def at(self, y: float) -> tuple[int, float]:
        """The widget at a height in 0..1, and how deep in it, in rows; the number of widgets for the buttons."""
        row = y * ROWS
        for index, widget in enumerate(self.widgets):
            if row < widget.rows:
                return index, row
            row -= widget.rows
        return (len(self.widgets) if y * ROWS >= ROWS - 1 else -1), row

    def with_widget(self, index: int, **changes: Any) -> Screen:
        changed = replace(self.widgets[index], **changes)
        return replace(self, widgets=(*self.widgets[:index], changed, *self.widgets[index + 1 :]))

    def values(self) -> dict[str, Any]:
        return {widget.label: widget.value for widget in self.widgets}


@dataclass(frozen=True, slots=True)
class ScreenTask:
    """A screen, a sentence that says what to do, and the values by label that it must have when OK is pressed."""

    screen: Screen
    sentence: str
    goal: Mapping[str, Any]
    kind: WidgetKind
    target: int

    def is_done(self, screen: Screen) -> bool:
        return screen.pressed == "OK" and screen.values() == dict(self.goal)


# ------------------------------------------------------------------------------------------------------------- actions


def click(screen: Screen, x: float, y: float) -> Screen:
    """A click at a place in 0..1 of the sides."""
    index, row = screen.at(y)
    if index == len(screen.widgets):
        return replace(screen, pressed=BUTTONS[x >= 0.5])
    if index < 0:
        return replace(screen, focus=-1)
    widget, screen = screen.widgets[index], replace(screen, focus=-1)
    match widget.kind:
        case "toggle":
            return screen.with_widget(index, value=not widget.value)
        case "slider" if _TRACK[0] - 0.03 <= x <= _TRACK[1] + 0.03:
            share = min(max((x - _TRACK[0]) / (_TRACK[1] - _TRACK[0]), 0.0), 1.0)
            return screen.with_widget(index, value=round(share * 100 / STEP) * STEP)
        case "field":
            return replace(screen, focus=index)
        case "list":
            return screen.with_widget(index, value=widget.options[widget.top + min(int(row), VISIBLE - 1)])
    return screen


def type_text(screen: Screen, text: str) -> Screen:
    """Typing: it replaces the text of the field that was clicked last, and nothing where none was."""
    if screen.focus < 0:
        return screen
    return screen.with_widget(screen.focus, value=text[:LONGEST_TEXT])


def scroll(screen: Screen, x: float, y: float, rows: int) -> Screen:  # noqa: ARG001 - lists are as wide as the screen
    """Turning the wheel over a place: a list moves by some rows, down where that is positive."""
    index, _ = screen.at(y)
    if not 0 <= index < len(screen.widgets) or screen.widgets[index].kind != "list":
        return screen
    widget = screen.widgets[index]
    return screen.with_widget(index, top=min(max(widget.top + rows, 0), len(widget.options) - VISIBLE))


# ------------------------------------------------------------------------------------------------------------- drawing


def draw_text(
    image: Image.Image, place: tuple[float, float], text: str, height: float, colour: tuple[int, int, int]
) -> None:
    """Text in Pillow's own bitmap font, at whole multiples of its 11 pixels, from the left and the middle."""
    font = ImageFont.load_default_imagefont()
    width = int(font.getlength(text))
    if not width:
        return
    mask = Image.new("L", (width, 11), 0)
    ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font)
    scale = max(round(height / 11), 1)
    mask = mask.resize((width * scale, 11 * scale), Image.Resampling.NEAREST)
    image.paste(colour, (round(place[0]), round(place[1] - mask.height / 2)), mask)


def draw_screen(screen: Screen, side: int) -> Image.Image:
    """The screen as an RGB picture of `side` x `side` pixels."""
    image = Image.new("RGB", (side, side), _PAPER)
    unit, top = side / ROWS, 0.0
    for index, widget in enumerate(screen.widgets):
        _DRAWN[widget.kind](image, widget, top, unit, index == screen.focus)
        top += widget.rows * unit
    for place, label in enumerate(BUTTONS):
        left, low = (0.04 + 0.48 * place) * side, side - 0.9 * unit
        box = (left, low, left + 0.44 * side, low + 0.75 * unit)
        ImageDraw.Draw(image).rectangle(box, fill=(205, 205, 205), outline=_INK)
        _centred(image, box, label, unit)
    return image


def _centred(image: Image.Image, box: tuple[float, float, float, float], text: str, unit: float) -> None:
    scale = max(round(0.5 * unit / 11), 1)
    width = ImageFont.load_default_imagefont().getlength(text) * scale
    draw_text(image, ((box[0] + box[2] - width) / 2, (box[1] + box[3]) / 2), text, 0.5 * unit, _INK)


def _toggle(image: Image.Image, widget: Widget, top: float, unit: float, _: bool) -> None:
    side, middle, half = image.width, top + unit / 2, unit / 4
    box = (0.04 * side, middle - half, 0.04 * side + 2 * half, middle + half)
    ImageDraw.Draw(image).rectangle(box, fill=_BLUE if widget.value else _PAPER, outline=_INK)
    draw_text(image, (0.2 * side, middle), widget.label, unit / 2, _INK)


def _slider(image: Image.Image, widget: Widget, top: float, unit: float, _: bool) -> None:
    side, middle = image.width, top + unit / 2
    left, right = (share * side for share in _TRACK)
    draw = ImageDraw.Draw(image)
    draw_text(image, (0.04 * side, middle), widget.label, unit / 2, _INK)
    draw.line((left, middle, right, middle), fill=_INK, width=max(round(side / 112), 1))
    knob, half = left + (right - left) * widget.value / 100, unit / 5
    draw.rectangle((knob - half / 2, middle - half, knob + half / 2, middle + half), fill=_BLUE)
    draw_text(image, (0.85 * side, middle), str(widget.value), unit / 2, _INK)


def _field(image: Image.Image, widget: Widget, top: float, unit: float, has_focus: bool) -> None:
    side, middle = image.width, top + unit / 2
    box = (_BOX[0] * side, middle - 0.38 * unit, _BOX[1] * side, middle + 0.38 * unit)
    draw_text(image, (0.04 * side, middle), widget.label, unit / 2, _INK)
    ImageDraw.Draw(image).rectangle(box, fill=(255, 255, 255), outline=_BLUE if has_focus else _INK)
    draw_text(image, (box[0] + 0.02 * side, middle), widget.value, unit / 2, _INK)


def _list(image: Image.Image, widget: Widget, top: float, unit: float, _: bool) -> None:
    side, draw = image.width, ImageDraw.Draw(image)
    draw.rectangle((0.04 * side, top + 1, 0.97 * side, top + VISIBLE * unit - 2), fill=(255, 255, 255), outline=_INK)
    for row, option in enumerate(widget.options[widget.top : widget.top + VISIBLE]):
        middle, chosen = top + (row + 0.5) * unit, option == widget.value
        if chosen:
            box = (0.05 * side, middle - 0.4 * unit, 0.88 * side, middle + 0.4 * unit)
            draw.rectangle(box, fill=_BLUE)
        draw_text(image, (0.07 * side, middle), option, unit / 2, (255, 255, 255) if chosen else _INK)
    share = VISIBLE * unit / len(widget.options)
    bar = top + widget.top * share
    draw.rectangle((0.91 * side, bar + 2, 0.95 * side, bar + VISIBLE * share - 3), fill=(150, 150, 150))


_DRAWN: dict[WidgetKind, Callable[[Image.Image, Widget, float, float, bool], None]] = {
    "toggle": _toggle,
    "slider": _slider,
    "field": _field,
    "list": _list,
}

# --------------------------------------------------------------------------------------------------------------- tasks


def make_screen_task(rng: np.random.Generator, kind: WidgetKind) -> ScreenTask:
    """A random screen with a task for a widget of one kind, which is not fulfilled yet."""
    kinds: list[WidgetKind] = [kind]
    for place in rng.permutation(len(WIDGET_KINDS)):
        more = WIDGET_KINDS[int(place)]
        if more not in kinds and sum(VISIBLE if one == "list" else 1 for one in (more, *kinds)) < ROWS:
            kinds.append(more)
    order = [int(place) for place in rng.permutation(len(kinds))]
    labels = [str(label) for label in rng.choice(LABELS, len(kinds), replace=False)]
    widgets = [_widget(rng, one, label) for one, label in zip(kinds, labels, strict=True)]
    wanted, sentence = _wanted(rng, widgets[0])
    screen = Screen(tuple(widgets[place] for place in order))
    goal = {**screen.values(), widgets[0].label: wanted}
    return ScreenTask(screen, sentence, goal, kind, order.index(0))


def _widget(rng: np.random.Generator, kind: WidgetKind, label: str) -> Widget:
    match kind:
        case "toggle":
            return Widget(kind, label, bool(rng.integers(2)))
        case "slider":
            return Widget(kind, label, int(rng.integers(100 // STEP + 1)) * STEP)
        case "field":
            return Widget(kind, label, "")
    options = tuple(str(word) for word in rng.choice(WORDS, OPTIONS, replace=False))
    return Widget(kind, label, options[int(rng.integers(OPTIONS))], options)


def _wanted(rng: np.random.Generator, widget: Widget) -> tuple[Any, str]:
    """Another value than the widget has, and the sentence that asks for it."""
    match widget.kind:
        case "toggle":
            return not widget.value, f"Turn {widget.label} {'off' if widget.value else 'on'} and press OK."
        case "slider":
            others = [value for value in range(0, 101, STEP) if value != widget.value]
            value = others[int(rng.integers(len(others)))]
            return value, f"Set {widget.label} to {value} and press OK."
        case "field":
            word = WORDS[int(rng.integers(len(WORDS)))]
            return word, f"Type {word} into {widget.label} and press OK."
    others = [option for option in widget.options if option != widget.value]
    option = others[int(rng.integers(len(others)))]
    return option, f"Choose {option} in the list and press OK."


def solution(task: ScreenTask) -> list[tuple[str, dict[str, Any]]]:
    """The shortest calls that fulfil a task, as (tool, arguments), with places in thousandths of the sides."""
    widget, wanted = task.screen.widgets[task.target], task.goal[task.screen.widgets[task.target].label]
    row = sum(one.rows for one in task.screen.widgets[: task.target])
    calls: list[tuple[str, dict[str, Any]]] = []
    match widget.kind:
        case "toggle":
            calls.append(_click(0.1, row + 0.5))
        case "slider":
            calls.append(_click(_TRACK[0] + (_TRACK[1] - _TRACK[0]) * wanted / 100, row + 0.5))
        case "field":
            calls += [_click(sum(_BOX) / 2, row + 0.5), ("type", {"text": wanted})]
        case "list":
            place = widget.options.index(wanted)
            if place >= VISIBLE:
                calls.append(("scroll", {**_click(0.5, row + VISIBLE / 2)[1], "rows": VISIBLE}))
            calls.append(_click(0.5, row + place % VISIBLE + 0.5))
    return [*calls, _click(0.74, ROWS - 0.5)]


def _click(x: float, row: float) -> tuple[str, dict[str, Any]]:
    return "click", {"x": round(1000 * x), "y": round(1000 * row / ROWS)}
