"""A chat template is a program that came with a model: it ends, within bounds, or the folder is refused."""

from __future__ import annotations

import base64
import json
import math
import resource
import shutil
import sys
import time

import pytest

from foveate.encoding import chat
from foveate.errors import DataError
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.checkpoint.small_files import bounded

LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
TEMPLATES = {
    "nested loops": (LOOP, "takes more than 0.3 s"),
    "a string of 3 GB": ("{{ 'x' * 3000000000 }}", "a text of 3,000,000,000 characters"),
    "doubled": (
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "a text of 16,777,216 characters",
    ),
    "a long format": ("{{ '%3000000000d' % 1 }}", ""),
    "a power": ("{% set x = 9 ** (9 ** 9) %}", "more than 4,096 bits"),
    "a large range": ("{% for i in range(10 ** 12) %}{% endfor %}", ""),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "unknown": ("{{ messages.nothing.at.all }}", "nothing"),
    "a wrong type": ("{{ messages + 1 }}", ""),
    "no end": ("{% if messages %}", ""),
    "deep": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", ""),
    "its own error": ("{{ raise_exception('no\nsuch role') }}", "no such role"),
    "out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ""),
    "a file": ("{% include '/etc/passwd' %}", ""),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_end_or_bounds_is_refused_in_one_line(tmp_path, tiny_folder, monkeypatch, name):
    template, said = TEMPLATES[name]
    monkeypatch.setattr(chat, "TEMPLATE_S", 0.3 if template == LOOP else 5.0)
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    limits, begin = resource.getrlimit(resource.RLIMIT_DATA), time.monotonic()
    with pytest.raises(DataError, match="the chat template cannot be used") as caught:
        inspect_model_folder(str(folder))
    assert time.monotonic() - begin < 30
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


ON_SOME_ROWS = {
    "a loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.1 s"),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "a type": ("{{ 'a' + 1 }}", "can only concatenate"),
    "its own error": ("{{ raise_exception('no\nsuch row') }}", "no such row"),
}


@pytest.mark.parametrize("name", ON_SOME_ROWS)
def test_a_template_that_misbehaves_on_some_rows_is_told_by_the_row(encode, make_task, monkeypatch, name):
    template, said = ON_SOME_ROWS[name]
    template = f"{{% for m in messages %}}{{% if 'bad' in m.content %}}{template}{{% endif %}}{{{{ m.content }}}}"
    monkeypatch.setattr(encode.tokenizer, "chat_template", template + "{% endfor %}")
    assert encode.length(make_task("good")) > 0
    if name == "a loop":
        monkeypatch.setattr(chat, "TEMPLATE_S", 0.1)
        monkeypatch.setattr(chat, "_LOOK_S", 0.05)
    with pytest.raises(DataError, match="field prompt: the model's chat template refuses it: ") as caught:
        encode.length(make_task("bad"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(chat, "TEMPLATE_S", 10.0)
    assert encode.length(make_task("good")) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the clock counts here")
def test_a_template_that_waits_for_others_has_its_time(monkeypatch):
    monkeypatch.setattr(chat, "_LOOK_S", 0.01)
    with chat._time_limit(0.2):
        time.sleep(0.6)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 50_000, '{"model_type": ' + "9" * 5000 + "}", "", "\x00", '"' + "x" * 100_000, "[]"],
)
def test_small_files_that_are_none_are_refused_in_one_line(tmp_path, tiny_folder, name, text):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / name).write_text(text)
    with pytest.raises(DataError) as caught:
        inspect_model_folder(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [10**9, 10**300, -1, "many", [1], True])
def test_numbers_of_tiles_that_no_image_has_are_refused(tmp_path, tiny_folder, value):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_patches": value}))
    with pytest.raises(DataError, match="max_patches"):
        inspect_model_folder(str(folder))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-6, 10.0, "1e-06", [1e-6]])
def test_numbers_that_no_norm_has_are_refused(tmp_path, tiny_folder, value):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rms_norm_eps"] = value
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config.json: (rms_norm_eps is .*; it must be a small|.*NaN is no number)"):
        inspect_model_folder(str(folder))


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 2000}
EMPTY = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "x"}
LONG_MAP = base64.b64encode(bytes(4) + b"a" * 9000).decode()
TOKENIZERS = {
    "normalizers that multiply": (
        {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 4}},
        "tokenizer.json: its normalizer makes a text 16,000,000,000,000 times as long",
    ),
    "one long text for a letter": ({"normalizer": {**REPLACE, "content": "b" * 100_000}}, "100,000 times as long"),
    "a pattern that finds nothing": ({"normalizer": {**REPLACE, "pattern": {"Regex": ""}}}, "2,001 times as long"),
    "many that find nothing": ({"normalizer": {"type": "Sequence", "normalizers": [EMPTY] * 7}}, "128 times as long"),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "b" * 10**6}}, "times as long"),
    "a decoder": ({"decoder": {"type": "Sequence", "decoders": [REPLACE] * 2}}, "its decoder makes"),
    "very many": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}}, "inf times"),
    "a map of long texts": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG_MAP}},
        "1,125 times",
    ),
    "padding": (
        {"padding": {"strategy": {"Fixed": 500_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "a"}},
        "padding to 500000000 tokens",
    ),
    "a panic": ({"model": {"continuing_subword_prefix": "Qwen2Tokenizer"}}, "cannot be loaded"),
    "other kinds": ({"normalizer": {"type": "Sequence", "normalizers": 7}}, "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_makes_much_of_little_or_panics_is_refused_in_one_line(tmp_path, tiny_folder, name):
    change, said = TOKENIZERS[name]
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if key == "model" else value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        inspect_model_folder(str(folder))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_replaces_letters_by_letters_is_read(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, *[spaces] * 20]}
    path.write_text(json.dumps(content))
    assert inspect_model_folder(str(folder)).tokenizer.encode("a  b")


def test_a_tokenizer_that_panics_on_a_row_is_told_by_the_row(encode, make_task, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*_):
        raise PanicException("range end index\n18446744073709551604")

    monkeypatch.setattr(type(encode), "_ids", panic)
    with pytest.raises(DataError, match=r"field prompt: the model's tokenizer refuses it: .*range end index 184"):
        encode.length(make_task("good"))


def test_memory_that_a_process_keeps_for_its_next_step_is_none_beyond_the_limit_of_templates(tiny_policy):
    assert tiny_policy.device.type == "cpu"  # loaded, so that memory is kept from here on
    buffers = [bytearray(2**24) for _ in range(30)]
    del buffers
    with bounded(2**28), pytest.raises(MemoryError):
        bytearray(2**29)


@pytest.mark.parametrize("soft", [4 * 2**30, resource.RLIM_INFINITY])
def test_templates_have_their_limit_of_memory_whatever_that_of_the_process(soft):
    former = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, former[1]))
        with bounded(2**28):
            with pytest.raises(MemoryError):
                bytearray(2**29)
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] < 4 * 2**30
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == soft
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, former)
