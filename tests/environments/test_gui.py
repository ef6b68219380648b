from __future__ import annotations

import json

import pytest

from foveate.data.images import load_image
from foveate.environments.calls import hermes_call
from foveate.environments.gui import Gui, screen_task
from foveate.environments.pool import Environments
from foveate.environments.screen import BUTTONS, ROWS, WIDGET_KINDS, click, draw_screen, scroll, solution, type_text
from foveate.errors import ConfigError
from foveate.records import Message, Task

TASK = Task("t", "gui", (Message("user", "?"),), (), None, {"scene": 4, "kind": "list"}, "row 1")


def played(scene, kind):
    environment = Gui(side=112)
    environment.reset(Task("t", "gui", (Message("user", "?"),), (), None, {"scene": scene, "kind": kind}), 0)
    return environment


@pytest.mark.parametrize("kind", WIDGET_KINDS)
def test_the_solution_of_every_task_has_the_reward(kind):
    for scene in range(15):
        environment, calls = played(scene, kind), solution(screen_task(scene, kind))
        for name, arguments in calls[:-1]:
            step = environment.step(hermes_call(name, arguments))
            assert (step.done, step.reward) == (False, 0.0)
            assert step.info["calls"] == [{"name": name, "error": False}]
        last = environment.step(hermes_call(*calls[-1]))
        assert (last.done, last.reward) == (True, 1.0), (scene, kind)


@pytest.mark.parametrize("kind", WIDGET_KINDS)
def test_pressing_a_button_too_early_ends_a_task_without_a_reward(kind):
    for place in (260, 740):
        step = played(1, kind).step(hermes_call("click", {"x": place, "y": 950}))
        assert (step.done, step.reward) == (True, 0.0)
    step = played(1, kind).step("I press OK.")
    assert (step.done, step.reward) == (True, 0.0)


def test_a_change_of_another_widget_costs_the_reward():
    task = screen_task(4, "toggle")
    other = next(i for i, widget in enumerate(task.screen.widgets) if i != task.target and widget.kind == "slider")
    row = sum(widget.rows for widget in task.screen.widgets[:other])
    value = task.screen.widgets[other].value
    environment = played(4, "toggle")
    calls = [("click", {"x": 420 if value else 800, "y": 1000 * (row + 0.5) / ROWS}), *solution(task)]
    for call in calls:
        step = environment.step(hermes_call(*call))
    assert (step.done, step.reward) == (True, 0.0)


def test_a_group_sees_one_screen_and_seeds_differ():
    first, again = played(3, "slider"), Gui(side=112)
    prompt = again.reset(Task("t", "gui", (Message("user", "?"),), (), None, {}), 3)
    assert first.reset(Task("t", "gui", (Message("user", "?"),), (), None, {}), 3) == prompt
    assert prompt[0].content.startswith("<image>\n")
    assert load_image(prompt[0].images[0]).size == (112, 112)
    plain = Task("t", "gui", (Message("user", "?"),), (), None, {})
    prompts = {tuple(again.reset(plain, seed)) for seed in range(30)}
    assert len(prompts) > 25


def test_what_is_seen_is_what_is_done():
    """Every state of a solution looks different from the one before."""
    for kind in WIDGET_KINDS:
        task = screen_task(5, kind)
        screen, seen = task.screen, {draw_screen(task.screen, 112).tobytes()}
        calls = solution(task)[:-1]
        for name, arguments in calls:
            place = arguments.get("x", 0) / 1000, arguments.get("y", 0) / 1000
            screen = {
                "click": lambda old, at=place: click(old, *at),
                "type": lambda old, given=arguments: type_text(old, given["text"]),
                "scroll": lambda old, at=place, given=arguments: scroll(old, *at, given.get("rows", 0)),
            }[name](screen)
            seen.add(draw_screen(screen, 112).tobytes())
        assert len(seen) == len(calls) + 1


@pytest.mark.parametrize("frame", ["thousandths", "pixels", "model"])
def test_places_are_read_in_the_frame_of_the_model(frame):
    task = Task("t", "gui", (Message("user", "?"),), (), None, {"box_frame": (112, 112)})
    environment = Gui(side=112, frame=frame)
    environment.reset(task, 0)
    x, y = (740, 917) if frame == "thousandths" else (83, 103)
    wrong = environment.step(hermes_call("click", {"x": 5_000, "y": 0}))
    assert "x and y must be from 0 to" in wrong.messages[0].content
    assert environment.step(hermes_call("click", {"x": x, "y": y})).done


def test_an_interrupted_screen_goes_on_from_its_state():
    calls = solution(screen_task(4, "list"))
    with Environments("gui", {"side": 112}, workers=0) as pool:
        pool.open(TASK, 0, "a").result()
        for name, arguments in calls[:-1]:
            pool.step("a", hermes_call(name, arguments)).result()
        record = pool.state("a")
        assert json.loads(json.dumps(record.state)) == record.state
        pool.restore(TASK, record, "b").result()
        assert pool.step("b", hermes_call(*calls[-1])).result().reward == 1.0


def test_clicks_beside_everything_change_nothing():
    for kind in WIDGET_KINDS:
        screen = screen_task(0, kind).screen
        assert type_text(screen, "text") == screen
        assert scroll(screen, 0.5, 0.99, 1) == screen
        for label, x in zip(BUTTONS, (0.2, 0.8), strict=True):
            assert click(screen, x, 0.97).pressed == label


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"side": 20}, "side must be from 84"), ({"kinds": ["knob"]}, "kinds must be"), ({"max_calls": 0}, "at least 1")],
)
def test_settings_of_a_screen_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Environments("gui", settings, workers=0)


def test_a_row_that_is_no_screen_is_said():
    with Environments("gui", {"side": 112}, workers=0) as pool:
        failure = pool.open(Task("t", "gui", (), (), None, {"scene": "x"}, "row 7"), 0, "a").result()
        assert "row 7: scene 'x' of kind" in failure.note
