from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, Literal

import pytest

from foveate.errors import ConfigError
from foveate.registry import FILE_MODULES, bind, name_of, pickled, resolve

if TYPE_CHECKING:
    from torch import Tensor

TABLE = {"gsm": "json:dumps", "iou": "math:sqrt"}


def reward(
    text: Tensor, *, kind: Literal["mix", "iou"], alpha: float = 0.5, times: int = 1, strict: bool = True, tag: str = ""
) -> tuple[Any, ...]:
    return text, kind, alpha, times, strict, tag


def optional(*, limit: int | None = None, weights: list[float] | None = None) -> tuple[Any, ...]:
    return limit, weights


def no_settings(text: str) -> str:
    return text


def problem(settings: dict[str, Any], function: Any = reward) -> str:
    with pytest.raises(ConfigError) as caught:
        bind(function, settings, "reward mine")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_known_name_is_the_object_of_its_import_path():
    assert resolve(TABLE, "iou", "reward")(9) == 3


def test_a_row_that_is_an_object_stands_for_itself():
    row = object()
    assert resolve({"gspo": row}, "gspo", "algorithm") is row


def test_an_import_path_needs_no_row():
    assert resolve(TABLE, "math:floor", "reward")(2.5) == 2


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown reward 'gsn'; did you mean 'gsm'\? Known: gsm, iou; your own code is named"
    ):
        resolve(TABLE, "gsn", "reward")


def test_a_missing_module_says_how_to_name_a_file():
    with pytest.raises(ConfigError, match=r"reward 'nowhere.at_all:f': cannot import nowhere.at_all .*path/to/file.py"):
        resolve(TABLE, "nowhere.at_all:f", "reward")


def test_a_file_that_exits_at_import_does_not_end_the_command_without_a_word(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(3)\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"mine\.py ends the program when it is imported \(exit code 3\)"):
            resolve(TABLE, f"{tmp_path / 'mine.py'}:f", "reward")


def test_a_missing_object_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"math has no 'sqr'; did you mean 'sqrt'\?"):
        resolve(TABLE, "math:sqr", "reward")


def test_a_function_in_a_file_is_found_by_its_path_and_the_file_runs_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from __future__ import annotations\nruns = []\ndef f(text: str, *, a: int = 1): return a\n")
    before = set(sys.modules)
    function = resolve(TABLE, f"{file}:f", "reward")
    assert bind(function, {"a": 3}, "reward")("x") == 3
    assert resolve(TABLE, f"{file}:runs", "reward") is resolve(TABLE, f"{file}:runs", "reward")
    assert len([name for name in set(sys.modules) - before if name.startswith(FILE_MODULES)]) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file .*gone\.py"):
        resolve(TABLE, f"{tmp_path}/gone.py:f", "reward")


def test_an_error_inside_an_own_file_keeps_its_own_traceback_and_leaves_no_module(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        resolve(TABLE, f"{file}:f", "reward")
    assert set(sys.modules) == before


def test_settings_are_filled_in_and_the_rest_keeps_its_defaults():
    assert bind(reward, {"kind": "mix", "alpha": 1}, "reward mine")("t") == ("t", "mix", 1.0, 1, True, "")


def test_a_whole_number_is_a_float_where_one_is_asked_for():
    assert isinstance(bind(reward, {"kind": "mix", "alpha": 1}, "reward")("t")[2], float)


def test_null_and_lists_are_taken_where_the_annotation_has_them():
    assert bind(optional, {"limit": None, "weights": [1, 0.5]}, "reward")() == (None, [1.0, 0.5])
    assert bind(optional, {"limit": 3}, "reward")() == (3, None)


def test_an_unknown_setting_names_the_nearest_and_all():
    assert problem({"kind": "mix", "alfa": 1}) == (
        "reward mine: unknown setting 'alfa'; did you mean 'alpha'? Its settings: kind, alpha, times, strict, tag"
    )
    assert problem({"x": 1}, no_settings) == "reward mine: unknown setting 'x'; it has no settings"


def test_data_arguments_are_not_settings():
    assert "unknown setting 'text'" in problem({"kind": "mix", "text": "t"})


def test_a_missing_setting_without_default_is_named():
    assert problem({}).startswith("reward mine: setting 'kind' is missing and has no default; its settings: kind,")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("alpha", "0.5", "alpha must be a number, found '0.5'"),
        ("alpha", True, "alpha must be a number, found true"),
        ("times", 1.5, "times must be a whole number, found 1.5"),
        ("times", None, "times must be a whole number, found null"),
        ("strict", 1, "strict must be true or false, found 1"),
        ("tag", 3, "tag must be a string, found 3"),
        ("kind", "max", "kind must be 'mix' or 'iou', found 'max'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value, said):
    assert problem({"kind": "mix", key: value}) == f"reward mine: {said}"


def test_what_is_no_function_cannot_take_settings():
    assert problem({}, 3.5) == "reward mine must be a function, found 3.5"


@pytest.mark.parametrize("group", ["reward", "environment"])
def test_a_function_that_cannot_be_sent_is_told_with_the_setting_that_keeps_it_here(group):
    held = threading.Lock()

    def locked(text: str) -> float:
        return float(held.locked() and bool(text))

    name = name_of(locked)
    with pytest.raises(
        ConfigError, match=rf"^locked: cannot be sent to worker .*; set {group}\.workers=0 to run it here"
    ):
        pickled("by_source", {"rewards": {"a": name}}, group)
    assert pickled("by_source", {}, group) == b""


def test_a_package_of_an_extra_that_is_missing_is_named_with_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgspec", None)
    monkeypatch.delitem(sys.modules, "foveate.rollout.server.weights", raising=False)
    for name in [name for name in sys.modules if name.startswith("foveate.rollout.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"needs msgspec, which is not installed: pip install 'foveate\[engines\]'"):
        resolve({"vllm": "foveate.rollout.vllm.engine:VLLMEngine"}, "VLLM", "engine")
