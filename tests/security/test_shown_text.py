"""Text of rows, models and graders is shown and not obeyed, is bounded, and holds no secrets."""

from __future__ import annotations

import io
import json
import logging

import pytest
import yaml
from toy import rl_settings

from foveate import log
from foveate.errors import ConfigError, printable
from foveate.files import atomic_write_text
from foveate.log import MetricsWriter, is_secret, masked, print_result, read_metrics, setup_logging
from foveate.records import Score
from foveate.run_folder import open_run

EVIL = "a\x1b[2J\x1b]0;title\x07b\x9b31m\r\x08c\u202ed\x00\x7f"
SHOWN = r"a\x1b[2J\x1b]0;title\x07b\x9b31m\r\x08c\u202ed\x00\x7f"


def test_control_characters_are_written_as_escapes():
    assert printable(EVIL) == SHOWN
    assert printable("x\ud800y\udfff\u2066") == r"x\ud800y\udfff\u2066"
    plain = "tabs\tand\nlines, é 中文 👩\u200d🚀 \\x1b"
    assert printable(plain) == plain


@pytest.mark.parametrize("terminal", [True, False])
def test_results_and_log_lines_send_no_escapes_of_the_data(monkeypatch, terminal):
    from rich.table import Table

    for sink in ("console", "_results"):
        fake = log._SafeConsole(file=io.StringIO(), force_terminal=terminal, width=100)
        monkeypatch.setattr(log, sink, fake)
    table = Table("name")
    table.add_row(f"row {EVIL}")
    print_result(f"text {EVIL}")
    print_result(table)
    before = logging.getLogger("foveate").handlers[:]
    try:
        monkeypatch.setattr("sys.stderr", log.console.file)
        setup_logging()
        logging.getLogger("foveate.test").warning("row %s and %s", EVIL, "x" * 100_000)
    finally:
        logging.getLogger("foveate").handlers[:] = before
    for sink in (log.console, log._results):
        written = sink.file.getvalue()
        assert r"\x1b" in written
        assert not any(bad in written for bad in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\x00", "\x08"))
    assert len(log.console.file.getvalue()) < 40_000


def test_a_note_is_cut_and_printable():
    assert Score(1.0, note="short").note == "short"
    assert Score(0.0, note="x" * 10_000_000).note == "x" * 2_000
    assert Score(0.0, note=EVIL).note == SHOWN
    assert len(Score(0.0, note="\x1b" * 5000).note) == 2_000
    Score(0.0, note="\ud800 half").note.encode()


def test_halves_of_surrogates_end_no_file(tmp_path):
    atomic_write_text(tmp_path / "a.json", json.dumps({"a": "x\ud83d"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"a": "x\ud83d"}
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"reward/\udc00": 1.0, "said": "\ud800"})
    assert read_metrics(writer.path) == [{"step": 1, "reward/\udc00": 1.0, "said": "\ud800"}]


# ------------------------------------------------------------------------------------------------------------ secrets

KEY = "sk-abcdefghijklmnopqrstuvwx1234"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("api_key", True), ("apikey", True), ("OPENAI_API_KEY", True), ("HF_TOKEN", True), ("token", True),
        ("password", True), ("client_secret", True), ("Authorization", True), ("aws_secret_key", True),
        ("max_tokens", False), ("tokens_per_micro_batch", False), ("api_key_variable", False), ("key", False),
        ("template_tokens", False), ("keep_checkpoints", False),
    ],
)  # fmt: skip
def test_secrets_are_told_by_the_name_of_their_setting(name, secret):
    assert is_secret(name) == secret


def test_secrets_in_log_lines_are_masked(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_TOKEN", "correct horse battery")
    said = masked(f"http://me:pass@host/v1?key=abc with {KEY}, correct horse battery, Bearer abcdefgh.ij")
    assert said == "http://***@host/v1?key=*** with ***, ***, Bearer ***"
    plain = "hf_internvl3_5_8b_model, skeleton_detection_with_long_names, http://host:8000/a@b, max_tokens=5"
    assert masked(plain) == plain


def secret_settings(path, key):
    settings = {"weights": {"exact": 1.0}, "api_key": key, "urls": ["https://u:p@host"], "deep": {"token": key}}
    return rl_settings(path, "demo", path, reward={"name": "judge", "settings": settings})


def test_a_run_folder_holds_no_secrets_and_continues_with_another_key(tmp_path):
    with open_run(tmp_path / "run", secret_settings(tmp_path / "run", KEY)) as run:
        run.metrics.write_text('{"step": 1}\n')
    text = run.config.read_text()
    assert KEY not in text
    assert "u:p" not in text
    written = yaml.safe_load(text)["reward"]["settings"]
    assert written == {
        "weights": {"exact": 1.0}, "api_key": "***", "urls": ["https://***@host"], "deep": {"token": "***"},
    }  # fmt: skip
    with open_run(tmp_path / "run", secret_settings(tmp_path / "run", "another-key")):
        pass


def test_a_masked_key_is_no_key(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"reward.settings.api_key is '\*\*\*': a key that was masked"),
        open_run(tmp_path / "run", secret_settings(tmp_path / "run", "***")),
    ):
        pass
