"""The report page: a run folder made up, whole, unfinished, damaged and hostile."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import a_miss, a_row, an_answer, make_run
from pages import Page, rendered
from PIL import Image

from foveate.errors import DataError, DiskError
from foveate.evaluate.draw import save_thumbnail
from foveate.evaluate.predictions import (
    thumbnail_path,
    write_evaluation,
    write_gallery,
    write_skipped,
)
from foveate.report.charts import format_value
from foveate.report.live import ReportServer
from foveate.report.page import write_report
from foveate.report.summary import _round_values

# ------------------------------------------------------------------------------------------------------ the page


def scored_run(folder: Path, *scores: float) -> str:
    own = {"answer": "7", "text": "7", "width": 0, "box": None, "iou": None, "hit": None}
    for step in (0, 10):
        rows = [a_row(str(number), **own, score=score + step / 100) for number, score in enumerate(scores)]
        write_evaluation(folder, step, rows)
    return Page(write_report(folder)).text


def test_a_reward_without_right_and_wrong_is_told_by_the_scores_that_answers_reach(tmp_path: Path) -> None:
    text = scored_run(tmp_path, 0.1, 0.4, 0.65, 0.9)
    assert "Share of greedy answers by score" in text
    assert re.search(r"at least 0\.5\s+4\s+50\.0 %\s+75\.0 %", text), text
    assert re.search(r"at least 0\.75\s+4\s+25\.0 %\s+50\.0 %", text)


@pytest.mark.parametrize(("low", "high", "values"), [(-2.0, 6.0, 8), (-0.5, 0.0, 5), (-300.0, 900.0, 6), (0, 1, 4)])
def test_scores_of_any_size_have_round_values_between_them(low, high, values):
    found = _round_values(low, high)
    assert len(found) == values
    assert all(low < value <= high for value in found)


def test_a_run_becomes_one_page_that_asks_for_nothing_else(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")))
    loaded = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset")
    ]
    assert loaded
    assert all(value and value.startswith(("data:image/jpeg;base64,", "#")) for value in loaded)
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert not page.attributes("link")


def test_the_only_script_that_may_run_is_the_reports_own(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", rows=4)))
    policy = next(meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta)
    scripts = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    assert len(scripts) == 1
    assert policy is not None
    assert base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy


def test_the_headline_says_the_result_in_plain_words(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, [a_row(str(index)) if index < 41 else a_miss(str(index)) for index in range(100)])
    write_evaluation(tmp_path, 100, [a_row(str(index)) if index < 67 else a_miss(str(index)) for index in range(100)])
    text = Page(write_report(tmp_path)).text
    assert "Greedy accuracy at IoU 0.5 rose from 41.0 % to 67.0 % on 100 held-out questions after 100 steps." in text
    assert "26 turned from wrong to right, 0 from right to wrong" in text


def test_tables_and_cards_leave_out_what_all_rows_share(tmp_path: Path) -> None:
    sizes = ("5 to 20 %", "5 to 20 %", "under 1 %", "1 to 5 %")
    rows = [a_row(str(i), tags={"kind": "pair", "box size": size}) for i, size in enumerate(sizes)]
    write_evaluation(tmp_path, 0, rows)
    write_gallery(tmp_path, [row.id for row in rows])
    text = Page(write_report(tmp_path)).text
    assert "kind" not in text
    assert "kind" not in rendered(tmp_path)
    table = text[text.index("By box size") : text.index("Held-out answers")]
    assert table.index("under 1 %") < table.index("1 to 5 %") < table.index("5 to 20 %")
    assert "0 · box size 5 to 20 %" in text


def test_without_scripts_the_last_values_stand_in_the_page(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", steps=30, rows=3)))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    table = page.text[page.text.index("Last values") :]
    for name, value in last.items():
        shown = format_value(value).replace("\u202f", " ")
        assert name == "step" or f"{name} 30 {shown}" in table


def test_text_of_models_and_data_is_never_markup(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'</style>"
    folder = tmp_path / "run"
    row = a_row(f"id{attack}", question=attack, text=attack, tags={attack: attack}, sampled=(an_answer(attack, 1.0),))
    other = a_row("other", tags={attack: "other"})
    write_evaluation(folder, 0, [row, other])
    write_evaluation(
        folder, 1, [replace(row, ground_truth=attack, answers=(an_answer(attack, 1.0, greedy=True),)), other]
    )
    write_gallery(folder, [row.id])
    write_skipped(folder, [attack])
    for name in ("config.yaml", "notes.txt"):
        (folder / name).write_text(attack)
    (folder / "versions.json").write_text(json.dumps({"foveate": attack, attack: attack}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, attack: step}) + "\n" for step in range(3)))
    page = Page(write_report(folder))
    clean = Page(write_report(make_run(tmp_path / "clean", rows=1)))
    assert attack in page.text
    assert "<script>alert" not in page.source
    assert page.charts[attack] == [(attack, [[step, step] for step in range(3)])]
    assert not page.attributes("img")
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert attack in rendered(folder)


def test_square_brackets_in_names_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    write_evaluation(
        tmp_path, 0, [a_row("a", tags={"relation": "[bold]left[/nothing]"}), a_row("b", tags={"relation": "x"})]
    )
    assert "relation: [bold]left[/nothing]" in rendered(tmp_path)


def test_every_picture_is_embedded_once_and_steps_differ_only_in_boxes(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", rows=12)))
    pictures = [image["src"] for image in page.attributes("img")]
    assert len(pictures) == len(set(pictures)) == 12
    assert [radio["value"] for radio in page.attributes("input") if radio.get("name") == "step"] == ["0", "1", "2", "3"]
    assert all(len(shot["data-outcomes"] or "") == 4 for shot in page.attributes("li") if "data-outcomes" in shot)


def test_boxes_lie_on_photographs_in_thousandths_of_each_side(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_evaluation(folder, 0, [a_row(box=(500, 900, 250, 100))])
    save_thumbnail(Image.new("RGB", (640, 427)), thumbnail_path(folder, "a"))
    write_gallery(folder, ["a"])
    page = Page(write_report(folder))
    overlay = next(svg for svg in page.attributes("svg") if svg.get("preserveaspectratio") == "none")
    assert overlay["viewbox"] == "0 0 1000 1000"
    assert "aspect-ratio: 400 / 267" in page.source
    drawn = {
        rect["class"]: [rect[side] for side in ("x", "y", "width", "height")] for rect in page.attributes("rect")[2:]
    }
    assert drawn["true"] == ["100", "200", "200", "200"]
    assert drawn["guess"] == ["250", "100", "250", "800"]


def test_answers_that_are_no_boxes_are_shown_with_what_was_expected(tmp_path: Path) -> None:
    rows = [a_row("m", answer="x = 7", text="It is 8.", box=None, iou=None, hit=False, score=0.0, width=0, height=0)]
    write_evaluation(tmp_path, 0, rows)
    write_gallery(tmp_path, ["m"])
    text = Page(write_report(tmp_path)).text
    assert "expected: x = 7" in text
    assert "It is 8." in text
    assert "IoU" not in text.split("How to read this page")[0]


def test_five_hundred_photographs_stay_under_five_megabytes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    noise = Image.effect_noise((400, 300), 90).convert("RGB")
    rows = [a_row(f"photo/{index}") for index in range(500)]
    for step in range(0, 60, 5):
        write_evaluation(folder, step, rows)
    save_thumbnail(noise, thumbnail_path(folder, rows[0].id))
    encoded = thumbnail_path(folder, rows[0].id).read_bytes()
    for row in rows[1:]:
        thumbnail_path(folder, row.id).write_bytes(encoded)
    write_gallery(folder, [row.id for row in rows])
    path = write_report(folder)
    assert path.stat().st_size < 5_000_000
    assert path.read_text().count("data:image/jpeg") == 500


def test_the_terminal_shows_before_and_after(tmp_path: Path) -> None:
    text = rendered(make_run(tmp_path / "r", rows=30))
    assert "relation: left (greedy)" in text
    assert "step 0" in text
    assert "step 60" in text


# ---------------------------------------------------------------------------------- unfinished and broken runs


@pytest.mark.parametrize("kept", ["metrics.jsonl", "evals", "config.yaml", "versions.json", "notes.txt", "skipped.txt"])
def test_whatever_a_crashed_run_left_is_reported(tmp_path: Path, kept: str) -> None:
    whole, rest = make_run(tmp_path / "whole", steps=3, rows=3), tmp_path / "rest"
    rest.mkdir()
    (whole / kept).rename(rest / kept)
    page = Page(write_report(rest))
    headline = {"evals": "held-out questions after 3 steps", "metrics.jsonl": "Reward rose from"}
    assert headline.get(kept, "No step has been taken yet.") in page.text
    assert "rest" in page.text
    assert rendered(rest)


def test_a_page_that_is_served_follows_the_warnings(tmp_path: Path) -> None:
    folder, text = make_run(tmp_path / "run", steps=3, rows=3), "every answer has the reward 0"
    with ReportServer(folder, 0) as server:
        assert text not in server.page().decode()
        (folder / "warnings.jsonl").write_text(json.dumps({"step": 3, "name": "constant_reward", "text": text}) + "\n")
        assert text in server.page().decode()


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "empty"
    if exists:
        folder.mkdir()
    with pytest.raises(DataError, match=r"empty is not a run folder: .*metrics\.jsonl.*foveate rl") as refused:
        write_report(folder)
    assert "\n" not in str(refused.value)
    assert not (folder / "report.html").exists()


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 0.1}\n{"step": 2, "a": 0.3}\n{"step": 3, "a')
    assert Page(write_report(tmp_path)).charts == {"a": [("a", [[1, 0.1], [2, 0.3]])]}


@pytest.mark.parametrize(
    ("name", "content"), [("versions.json", "{"), ("versions.json", "[]"), ("gallery.json", '{"a": 1}')]
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        write_report(tmp_path)


def test_a_failed_write_leaves_the_old_report_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(make_run(tmp_path / "run", steps=3, rows=2))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=r"report\.html: No space left"):
        write_report(tmp_path / "run")
    assert path.read_bytes() == before
    assert not [entry for entry in (tmp_path / "run").iterdir() if "tmp" in entry.name]
