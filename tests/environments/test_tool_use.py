from __future__ import annotations

import asyncio
import json
from functools import partial
from io import BytesIO
from typing import Literal

import pytest
from PIL import ExifTags, Image

from foveate.data.images import load_image, read_image
from foveate.environments.calculator import calculator
from foveate.environments.calls import MalformedCall, ToolCall, hermes_call, parse_calls
from foveate.environments.observe import encoded
from foveate.environments.pool import Environments
from foveate.environments.tool_use import ToolUse
from foveate.environments.tools import CallError, Tool, build_tool
from foveate.errors import ConfigError, DataError
from foveate.records import Message, Task


def task(width=200, height=100, **meta):
    picture = Image.new("RGB", (width, height), "white")
    picture.paste((255, 0, 0), (100, 50, 120, 60))
    return Task("t", "s", (Message("user", "<image>\nWhat is red?"),), (encoded(picture),), None, meta)


def begun(given=("zoom",), about=None, **settings):
    environment = ToolUse(tools=[*given], **settings)
    environment.reset(about or task(), 0)
    return environment


# ---------------------------------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call>',
        '<think>I call <tool_call>{}</tool_call></think>{"a":<tool_call>{"name":"f","arguments":{"a":1,"b":"x"}}'
        "</tool_call> and done",
        '<tool_call>{"name": "f", "parameters": {"a": 1, "b": "x"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1, \\"b\\": \\"x\\"}"}</tool_call>',
    ],
)
def test_a_call_of_hermes_is_read(text):
    assert parse_calls(text) == [ToolCall("f", {"a": 1, "b": "x"})]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>x</arg_value>\n"
        "</tool_call>",
    ],
)
def test_calls_of_other_families_are_read(text):
    assert parse_calls(text) == [ToolCall("f", {"a": "1", "b": "x"}, as_text=True)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "f"', "is not closed"),
        ("<tool_call>f(1)</tool_call>", "is no"),
        ("<tool_call>[1]</tool_call>", "is no JSON object"),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "name must be a text"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "arguments an object"),
        ("<tool_call><function=f>what</function></tool_call>", "'what' is no argument"),
        (r'<tool_call>{"name": "f", "arguments": {"a": ["\ud800"]}}</tool_call>', "is not valid Unicode"),
        (r'<tool_call>{"name": "\udfff", "arguments": {}}</tool_call>', "is not valid Unicode"),
        ("<tool_call>{" + '"a":[' * 9_999 + "</tool_call>", "is no JSON object"),
        ('<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5_000 + "}}</tool_call>", "is no JSON object"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(text, reason):
    (call,) = parse_calls(text)
    assert isinstance(call, MalformedCall)
    assert reason in call.reason


def test_what_is_written_is_what_is_read():
    call = {"image": 1, "text": 'ä "quoted" </br>'}
    assert parse_calls(hermes_call("f", call)) == [ToolCall("f", call)]
    assert parse_calls("no call") == []


# ---------------------------------------------------------------------------------------------------------- the tools


def test_a_box_is_read_in_the_frame_of_the_family_and_looked_up_in_pixels():
    for frame, box, meta in (
        ("model", [500, 500, 600, 600], {}),
        ("model", [70, 35, 84, 42], {"box_frame": (140, 70)}),
        ("thousandths", [500, 500, 600, 600], {"box_frame": (140, 70)}),
        ("pixels", [100, 50, 120, 60], {}),
    ):
        environment = begun([{"name": "zoom", "settings": {"min_side": 8}}], task(**meta), frame=frame)
        step = environment.step(hermes_call("zoom", {"image": 1, "box": box}))
        assert step.info == {"calls": [{"name": "zoom", "error": False, "image": 1, "box": [500, 500, 600, 600]}]}
        (message,) = step.messages
        assert (message.role, message.content) == ("tool", "<image>\nImage 2")
        shown = load_image(message.images[0])
        assert shown.size == (448, 224)
        assert shown.getpixel((224, 112)) == (255, 0, 0)


def test_a_crop_is_an_image_that_can_be_looked_at_again():
    environment = begun()
    environment.step(hermes_call("zoom", {"image": 1, "box": [500, 500, 600, 600]}))
    step = environment.step(hermes_call("zoom", {"image": 2, "box": [0, 0, 500, 1000]}))
    assert step.messages[0].content == "<image>\nImage 3"
    assert step.info["calls"][0]["image"] == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"image": 2, "box": [0, 0, 9, 9]}, "image must be the number of an image, from 1 to 1; found 2"),
        ({"image": True, "box": [0, 0, 9]}, "box "),
        ({"image": 1}, "zoom needs the argument box; its arguments: image, box"),
        ({"image": 1, "box": [9, 0, 0, 9]}, "with left < right and top < bottom"),
        ({"image": 1, "box": [1000, 0, 1200, 9]}, "lies outside of the image"),
        ({"image": 1, "boxes": [0, 0, 9, 9]}, "zoom has no argument 'boxes'; did you mean 'box'?"),
        ({"image": "first", "box": [0, 0, 9, 9]}, "image "),
        ({"image": 1, "box": [0, 0, float("nan"), 9]}, "with left < right"),
        ({"image": 1, "box": [0, 0, 1, 1], "tile": 9_999_999}, "no argument 'tile'"),
    ],
)
def test_a_wrong_call_is_told_to_the_model(arguments, error):
    step = begun().step(hermes_call("zoom", arguments))
    assert not step.done
    assert step.messages[0].content.startswith("Error: ")
    assert error in step.messages[0].content
    assert step.info["calls"] == [{"name": "zoom", "error": True}]


def test_names_of_no_tool_and_malformed_calls_are_errors_without_a_name():
    environment = begun(max_calls=2)
    step = environment.step("<tool_call>{}</tool_call>" + hermes_call("zom", {}) + hermes_call("zoom", {}))
    first, second, third = (message.content for message in step.messages)
    assert "cannot be read" in first
    assert "there is no tool 'zom'; did you mean 'zoom'?" in second
    assert "at most 2 calls" in third
    assert step.info["calls"] == [{"name": "", "error": True}] * 2


def test_an_answer_without_a_call_is_the_last_one():
    step = begun().step("<think>I could use <tool_call></think>It is red.")
    assert (step.done, step.reward, step.messages) == (True, None, ())


def test_tools_turn_and_mark_images():
    environment = begun(["rotate", "mark"])
    turned = environment.step(hermes_call("rotate", {"image": 1, "degrees": 90})).messages[0].images[0]
    assert (turned.width, turned.height) == (100, 200)
    assert load_image(turned).getpixel((45, 110)) == (255, 0, 0)
    marked = environment.step(hermes_call("mark", {"image": 1, "box": [0, 0, 500, 500]})).messages[0].images[0]
    assert load_image(marked).getpixel((0, 20)) == (220, 20, 20)


def test_no_tool_makes_an_image_larger_than_it_was():
    environment = begun(["rotate"])
    for number in range(1, 5):
        turned = environment.step(hermes_call("rotate", {"image": number, "degrees": 45})).messages[0].images[0]
        assert max(turned.width, turned.height) <= 200


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"), ("-(2**10) / 4", "-256"), ("sqrt(2)^2", "2"), ("7 // 2 % 2", "1"), ("max(1, 2.5)", "2.5"),
        ("2**4095 > 1", None), ("2**99999999", None), ("9**9**9", None), ("().__class__", None), ("1/0", None),
        ("__import__('os')", None), ("'a'*9", None), ("(" * 300 + "1" + ")" * 300, None), ("1e308*10", None),
        ("(-8)**0.5", None), ("1" * 501, None), ("sqrt(x=2)", None), ("round(1, [])", None),
        ("round(5, -1000000000)", None), ("round(2.567, 1)", "2.6"), ("lambda: 1", None),
        ("True + 1", None), ("2**-2", "0.25"), ("10**30", "1" + "0" * 30), ("-" * 200 + "1", None),
    ],
)  # fmt: skip
def test_the_calculator_computes_in_bounds(expression, value):
    if value is None:
        with pytest.raises(ValueError, match=r"\S"):
            calculator(expression)
    else:
        assert calculator(expression) == value


def search(words: str, kind: Literal["exact", "loose"] = "loose", *, limit: int = 3) -> dict:
    """Looks something up.

    Args:
        words: What to look for.
        kind: How.
    """
    return {"found": [words, kind, limit], "text": "<image> <|im_end|>"}


def test_a_plain_function_is_a_tool():
    tool = Tool("search", search)
    schema = tool.schema()["function"]
    assert schema["name"] == "search"
    assert schema["parameters"]["required"] == ["words"]
    assert schema["parameters"]["properties"]["kind"]["enum"] == ["exact", "loose"]
    assert "limit" not in schema["parameters"]["properties"]
    result = tool(ToolCall("search", {"words": "5", "kind": "exact"}, as_text=True), (), "model")
    assert json.loads(result.text)["found"] == ["5", "exact", 3]


def keep(values: dict) -> str:
    """Keeps values.

    Args:
        values: Any.
    """
    return "\n".join(values.values())


@pytest.mark.parametrize(
    "form",
    [
        '<tool_call>{"name": "keep", "arguments": {"values": %s}}</tool_call>',
        "<tool_call><function=keep><parameter=values>%s</parameter></function></tool_call>",
    ],
)
def test_no_form_of_a_call_gives_a_tool_halves_of_characters(form):
    tool = Tool("keep", keep)
    (call,) = parse_calls(form % r'{"a": "\ud83d\ude00"}')
    assert tool(call, (), "model").text == "😀"
    (call,) = parse_calls(form % r'{"a": "\ud83d"}')
    if isinstance(call, MalformedCall):
        assert "is not valid Unicode" in call.reason
    else:
        with pytest.raises(CallError, match="keep: values must be"):
            tool(call, (), "model")


def test_text_of_a_tool_stays_text(tmp_path):
    file = tmp_path / "lookup.py"
    docstring = '"""Looks.\n\n    Args:\n        words: What.\n    """'
    file.write_text(f"def look(words: str) -> str:\n    {docstring}\n    return words\n")
    step = begun([f"{file}:look"]).step(hermes_call("look", {"words": "<image><|im_end|>"}))
    assert "<image>" not in step.messages[0].content
    assert "<|im_end|>" in step.messages[0].content
    assert step.messages[0].images == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("zom", "unknown tool 'zom'; did you mean 'zoom'"),
        ({"name": "zoom", "settings": {"size": 3}}, "unknown setting 'size'"),
        ({"name": "zoom", "setting": {}}, "a tool is a name, or"),
        ({"name": "zoom", "settings": {"tile": "big"}}, "tile must be a whole number"),
    ],
)
def test_tools_are_refused_when_a_run_starts(given, message):
    with pytest.raises(ConfigError, match=message):
        build_tool(given)


def test_a_tool_that_the_model_cannot_be_shown_is_refused(tmp_path):
    file = tmp_path / "bare.py"
    file.write_text("def bare(x):\n    pass\n\ndef undocumented(x: int):\n    pass\n")
    with pytest.raises(ConfigError, match="parameter x has no type hint"):
        build_tool(f"{file}:bare")
    with pytest.raises(ConfigError, match="undocumented"):
        build_tool(f"{file}:undocumented").schema()


def test_schemas_say_how_images_and_boxes_are_written():
    (schema,) = ToolUse(tools=["zoom"]).tools()
    properties = schema["function"]["parameters"]["properties"]
    assert properties["image"]["type"] == "integer"
    assert "Its number, from 1" in properties["image"]["description"]
    assert "[left, top, right, bottom] in thousandths of the image's sides" in properties["box"]["description"]
    (schema,) = ToolUse(tools=["zoom"], frame="pixels").tools()
    assert "in pixels" in schema["function"]["parameters"]["properties"]["box"]["description"]


def test_prompts_need_not_show_the_tools():
    assert [*ToolUse(tools=["zoom"], shown=False).tools()] == []
    assert begun(shown=False).step(hermes_call("zoom", {"image": 1, "box": [0, 0, 9, 9]})).messages[0].images


def test_tools_run_in_worker_processes():
    with Environments("tools", {"tools": ["zoom", "calculator"], "max_turns": 3}, workers=1) as pool:
        assert [schema["function"]["name"] for schema in pool.tools] == ["zoom", "calculator"]
        opened = pool.open(task(), 0, "a").result(60)
        assert opened.messages[0].content == "<image>\nWhat is red?"
        step = pool.step("a", hermes_call("zoom", {"image": 1, "box": [0, 0, 500, 500]})).result(60)
        assert step.messages[0].images[0].width == 448
        assert pool.step("a", hermes_call("calculator", {"expression": "6*7"})).result(60).messages[0].content == "42"
        last = pool.step("a", hermes_call("calculator", {"expression": "6*"})).result(60)
        assert last.done
        assert "is no arithmetic expression" in last.messages[0].content


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two tools are called 'zoom'"):
        ToolUse(tools=["zoom", {"name": "zoom", "settings": {"tile": 112}}])


@pytest.mark.parametrize(("side", "pixels"), [("tile", 0), ("tile", -5), ("tile", 10**6), ("min_side", 100_000)])
def test_sides_that_no_part_of_an_image_has_are_refused(side, pixels):
    with pytest.raises(ConfigError, match=side):
        ToolUse(tools=[{"name": "zoom", "settings": {side: pixels}}])


def test_an_argument_that_nests_without_end_is_an_observation(make_task, make_image):
    environment = ToolUse(tools=["zoom"])
    environment.reset(make_task("<image>", make_image(56, 56)), 0)
    box = "[" * 100_000
    step = environment.step(f"<tool_call><function=zoom><parameter=box>{box}</parameter></function></tool_call>")
    assert [info["error"] for info in step.info["calls"]] == [True]


RETURNED = """
import pathlib
import numpy as np
from PIL import Image

PICTURE = Image.new("RGB", (4, 4))
VALUES = {
    "mixed": ["one", PICTURE, "two", PICTURE], "tuple": (PICTURE, "text"), "number": np.float32(0.5),
    "count": {"n": np.int64(3)}, "plain": [1, "a", None],
    "parts": [{"type": "text", "text": "t"}, {"type": "image", "image": PICTURE}],
    "data": {"type": "text", "length": 3}, "kind": {"type": "image", "width": 4},
    "in_dict": {"picture": PICTURE}, "generator": (i for i in range(3)), "bytes": b"PNG",
    "array": np.zeros((4, 4, 3), np.uint8),
    "path": pathlib.Path("a.png"), "url": [{"type": "image_url", "image_url": {"url": "http://x"}}],
    "file": [{"type": "image", "image": "a.png"}], "set": {1, 2},
}

def give(what: str, /, more: int = 1):
    \"\"\"Gives something.

    Args:
        what: What.
        more: How much of it.
    \"\"\"
    return VALUES[what]
"""


@pytest.fixture
def giving(tmp_path):
    (tmp_path / "giving.py").write_text(RETURNED)
    return f"{tmp_path / 'giving.py'}:give"


@pytest.mark.parametrize(
    ("what", "text", "images"),
    [
        ("mixed", "one\ntwo", 2), ("tuple", "text", 1), ("number", "0.5", 0), ("count", '{"n": 3}', 0),
        ("plain", '[1, "a", null]', 0), ("parts", "t", 1), ("data", '{"type": "text", "length": 3}', 0),
        ("kind", '{"type": "image", "width": 4}', 0),
    ],
)  # fmt: skip
def test_what_can_be_meant_in_one_way_is_taken_from_a_tool(giving, what, text, images):
    [message] = begun([giving]).step(hermes_call("give", {"what": what})).messages
    assert message.content.endswith(text)
    assert len(message.images) == images


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("in_dict", "a dict with a PIL.Image.Image in it; allowed: a text, a number, a PIL image"),
        ("generator", "a generator;"), ("bytes", "a bytes;"), ("array", "a numpy.ndarray;"), ("path", "PosixPath;"),
        ("url", "a part of type 'image_url' without a PIL image"),
        ("file", "a part of type 'image' without a PIL image"),
        ("set", "a set;"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_another_type_that_a_tool_returns_ends_the_run_by_name(giving, what, found, workers):
    if workers and what != "generator":
        return
    with Environments("tools", {"tools": [giving]}, workers=workers) as pool:
        for key in "ab":
            pool.open(task(), 0, key).result(60)
        with pytest.raises(DataError, match="environment tools: tool give returned ") as caught:
            pool.step("a", hermes_call("give", {"what": what})).result(60)
        assert found in str(caught.value)
        with pytest.raises(DataError, match="tool give returned"):
            pool.step("b", "done").result(60)


def test_parameters_by_position_alone_are_filled_in(giving):
    tool = build_tool(giving)
    assert tool.schema()["function"]["parameters"]["required"] == ["what"]
    assert tool(ToolCall("give", {"more": 2, "what": "number"}), (), "model").text == "0.5"


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [("tools", {"tools": ["calculator", "zoom"]}, "tool zoom"), ("gui", {}, "its screen")],
)
def test_images_that_no_step_may_show_are_refused_when_a_run_starts(name, settings, what):
    with pytest.raises(ConfigError, match=f"environment {name}: max_images is 0, but {what} shows images"):
        Environments(name, {**settings, "max_images": 0}, workers=0)
    Environments("tools", {"tools": ["calculator"], "max_images": 0}, workers=0).shutdown()


def test_an_argument_of_the_wrong_type_is_told_with_its_place():
    step = begun().step(hermes_call("zoom", {"image": 1, "box": [1, 2, 3]}))
    assert step.messages[0].content == (
        "Error: zoom: box must be four numbers, [left, top, right, bottom]; found [1, 2, 3]"
    )
    tool = Tool("add", add)
    with pytest.raises(CallError, match="add: numbers entry 2 must be a whole number"):
        tool(ToolCall("add", {"numbers": [1, "x"]}), (), "model")


def add(numbers: list[int]) -> int:
    """Adds.

    Args:
        numbers: What.
    """
    return sum(numbers)


PICTURES = """
import numpy as np
from PIL import Image, ImageOps

def made(kind: str) -> Image.Image:
    \"\"\"Makes a picture.

    Args:
        kind: Which.
    \"\"\"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    return {
        "float": lambda: Image.fromarray(values / 6),
        "depth": lambda: Image.fromarray((values * 4000).astype(np.uint16)),
        "negative": lambda: Image.fromarray((values - 3).astype(np.int32)),
        "small": lambda: Image.fromarray((values * 40).astype(np.uint16)),
        "empty": lambda: Image.new("RGB", (0, 5)),
    }[kind]()

def upright(image: Image.Image) -> Image.Image:
    \"\"\"Turns a picture upright, as careful code does.

    Args:
        image: Which.
    \"\"\"
    return ImageOps.exif_transpose(image)

def maybe(image: Image.Image | None = None, *, unused: int = 0) -> str:
    \"\"\"Says what it was given.

    Args:
        image: Which.
    \"\"\"
    return "nothing" if image is None else f"{image.width} x {image.height}"

def several(images: list[Image.Image]) -> str:
    \"\"\"Takes several.

    Args:
        images: Which.
    \"\"\"
    return ""

def unknown(words: "Nothing") -> str:
    \"\"\"Takes what nobody knows.

    Args:
        words: Which.
    \"\"\"
    return words

async def later(words: str) -> str:
    \"\"\"Says it back.

    Args:
        words: What.
    \"\"\"
    return words
"""


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures.py").write_text(PICTURES)
    return str(tmp_path / "pictures.py")


@pytest.mark.parametrize(("kind", "mode"), [("float", "F"), ("depth", "I;16"), ("negative", "I")])
def test_pixels_that_8_bits_do_not_hold_end_the_run_by_name(pictures, kind, mode):
    with pytest.raises(DataError, match=f"tool made: an image has pixels of Pillow's mode {mode} beyond 0 to 255"):
        begun([f"{pictures}:made"]).step(hermes_call("made", {"kind": kind}))


def test_wide_pixels_within_8_bits_are_shown_as_they_are(pictures):
    step = begun([f"{pictures}:made"]).step(hermes_call("made", {"kind": "small"}))
    assert load_image(step.messages[0].images[0]).getpixel((2, 1)) == (200, 200, 200)


def test_an_image_without_pixels_is_told_to_the_model(pictures):
    step = begun([f"{pictures}:made"]).step(hermes_call("made", {"kind": "empty"}))
    assert step.messages[0].content == "Error: made: the result is an image without pixels"
    assert step.info["calls"] == [{"name": "made", "error": True}]


def with_orientation(turned):
    """A picture of 6 x 4 pixels whose file says that it is to be shown turned."""
    exif, buffer = Image.Exif(), BytesIO()
    exif[ExifTags.Base.Orientation] = turned
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_a_picture_is_turned_upright_once_whoever_does_it(pictures):
    row = read_image({"bytes": with_orientation(6)}, ())
    about = Task("t", "s", (Message("user", "<image>"),), (row,), None, {})
    step = begun([f"{pictures}:upright"], about).step(hermes_call("upright", {"image": 1}))
    assert [(one.width, one.height) for one in (row, *step.messages[0].images)] == [(4, 6)] * 2
    opened = encoded(Image.open(BytesIO(with_orientation(6))))
    assert (opened.width, opened.height) == load_image(opened).size == (4, 6)


def test_an_image_may_be_left_out_where_its_type_says_so(pictures):
    environment = begun([f"{pictures}:maybe"])
    (schema,) = environment.tools()
    assert schema["function"]["parameters"]["properties"]["image"]["type"] == "integer"
    for arguments, text in (({}, "nothing"), ({"image": None}, "nothing"), ({"image": 1}, "200 x 100")):
        assert environment.step(hermes_call("maybe", arguments)).messages[0].content == text


def test_types_that_no_call_can_give_are_refused_when_a_run_starts(pictures):
    with pytest.raises(ConfigError, match=r"tool several: parameter images has the type list\[.*Image\]; allowed: PIL"):
        build_tool(f"{pictures}:several")
    with pytest.raises(ConfigError, match=r"tool unknown: its type hints cannot be read .*'Nothing'"):
        build_tool(f"{pictures}:unknown")


def test_an_async_tool_is_called_beside_a_loop_that_runs(pictures):
    async def in_a_notebook():
        return begun([f"{pictures}:later"]).step(hermes_call("later", {"words": "w"}))

    assert asyncio.run(in_a_notebook()).messages[0].content == "w"


@pytest.mark.parametrize(("limits", "shown"), [({"max_images": 2}, 2), ({}, 3)])
def test_a_turn_of_more_results_than_it_may_show_says_so_and_loses_no_answer(limits, shown):
    look = hermes_call("zoom", {"image": 1, "box": [0, 0, 500, 500]})
    with Environments("tools", {"tools": ["zoom"], **limits}, workers=0) as pool:
        pool.open(task(), 0, "a")
        step = pool.step("a", look * 3).result()
        assert [one["error"] for one in step.info["calls"]] == [False] * shown + [True] * (3 - shown)
        assert [one.content for one in step.messages[:shown]] == [f"<image>\nImage {2 + one}" for one in range(shown)]
        for message in step.messages[shown:]:
            assert message.content == "Error: the result has no room in this turn."
        assert pool.step("a", look).result().messages[0].content == f"<image>\nImage {2 + shown}"


def test_a_turn_of_more_text_than_it_may_show_says_so_and_loses_no_answer(pictures):
    said = hermes_call("later", {"words": "w" * 90})
    with Environments("tools", {"tools": [f"{pictures}:later"], "max_text": 200}, workers=0) as pool:
        pool.open(task(), 0, "a")
        contents = [one.content for one in pool.step("a", said * 3).result().messages]
    assert contents == ["w" * 90, *["Error: the result has no room in this turn."] * 2]


def test_a_parameter_that_no_call_fills_in_is_refused_by_name():
    def many(*numbers: int) -> str:
        """Add numbers.

        Args:
            numbers: What to add.
        """
        return str(sum(numbers))

    def loose(one: int, **rest: int) -> str:
        """Add numbers.

        Args:
            one: The first.
        """
        return str(one + sum(rest.values()))

    def needs(one: int, *, factor: int) -> str:
        """Multiply.

        Args:
            one: A number.
        """
        return str(one * factor)

    for function, said in ((many, "numbers"), (loose, "rest"), (needs, "factor")):
        with pytest.raises(ConfigError, match=f"no call fills in its parameter .*{said}"):
            Tool(function.__name__, function)
    assert Tool("needs", partial(needs, factor=3)).parameters.keys() == {"one"}
