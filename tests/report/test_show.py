"""`foveate data`: rows as a person reads them, and every problem listed."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.data.table import open_tasks
from foveate.datasets.zoom import prepare_zoom
from foveate.errors import ConfigError, DataError
from foveate.report.show import row_text, true_boxes, write_page

PHOTOS = Path(__file__).parent.parent / "data" / "refphotos"


def run(*arguments):
    """The output of a verb; its error is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).output


def test_a_row_is_shown_with_question_picture_and_answer():
    text = row_text(open_tasks(PHOTOS / "refphotos.jsonl"), 0)
    assert "refphotos.jsonl, row 0 (line 1)" in text
    assert "astronaut.jpg (512 x 512)" in text
    assert "user: <image>\nPlease provide the bounding box" in text
    assert "answer: [351.562, 117.188, 511.719, 361.328]" in text


def test_a_page_holds_the_pictures_with_the_true_boxes_on_them(tmp_path):
    PIL.Image.new("RGB", (200, 100), "black").save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "sent": "<script>alert(1)</script>", "bbox": [50, 25, 150, 75]},
        {"image": "gone.png", "sent": "x", "bbox": [1, 2, 3, 4]},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_page(tmp_path / "page.html", open_tasks(tmp_path / "x.jsonl"), range(2))
    page = (tmp_path / "page.html").read_text()
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    green = np.argwhere((pixels[..., 1] > 100) & (pixels[..., 0] < 90))
    assert pixels.shape == (100, 200, 3)
    np.testing.assert_allclose(green.min(0), [25, 50], atol=3)
    np.testing.assert_allclose(green.max(0), [75, 150], atol=3)
    assert "<script>" not in page
    assert "no such file: gone.png" in page


def test_a_trace_is_shown_as_a_conversation_with_its_pictures_where_they_were_seen(tmp_path):
    prepare_zoom(tmp_path, {"traces": 12}, side=112, tile=56, search=0.5)
    table = open_tasks(tmp_path / "traces.parquet")
    number = next(i for i in range(12) if len(table[i].images) == 2)
    write_page(tmp_path / "page.html", table, [number])
    page = (tmp_path / "page.html").read_text()
    talk = page[page.index('<ol class="talk">') : page.index("</ol>")]
    assert re.findall(r"<b>([^<]+)</b>", talk) == ["user", "assistant", "tool", "assistant, response"]
    assert [found.start() for found in re.finditer("<img", page)] == [
        found.start() + page.index(talk) for found in re.finditer("<img", talk)
    ]
    assert talk.index("user") < talk.index('alt="image 1"') < talk.index("Which digit") < talk.index("tool_call")
    assert talk.index("tool_call") < talk.index('alt="image 2"') < talk.index("Image 2") < talk.index("response")
    assert f"<p>{table[number].answer}</p>" in talk
    assert "tool: <image>\nImage 2" in row_text(table, number)


def test_one_box_several_boxes_and_other_answers_are_told_apart(make_task):
    def boxes(answer):
        return true_boxes(dataclasses.replace(make_task("?"), answer=answer))

    assert boxes([1, 2, 3, 4.5]) == ((1, 2, 3, 4.5),)
    assert boxes([[1, 2, 3, 4], [5, 6, 7, 8]]) == ((1, 2, 3, 4), (5, 6, 7, 8))
    for other in ("42", 7, [], None, [1, 2, 3], [1, 2, 3, 2000], ["a", "b", "c", "d"], [[]]):
        assert boxes(other) == ()


def test_the_verbs_show_and_check_rows(tmp_path):
    output = run("data", "show", PHOTOS / "refphotos.jsonl", "--first", 7, "--rows", 5, "--html", tmp_path / "p.html")
    assert "rows 7..8 of 9" in output
    assert (tmp_path / "p.html").stat().st_size > 10_000
    with pytest.raises(DataError, match=r"--first 9: .* has 9 rows"):
        run("data", "show", PHOTOS / "refphotos.jsonl", "--first", 9)
    assert "9 rows, no problem" in run("data", "check", PHOTOS / "refphotos.jsonl", "--reward", "grounding")


def test_check_lists_every_problem_and_fails(tmp_path, tiny_folder):
    rows = [{"q": "hi?", "a": "x"}, {"q": "", "a": "x"}, {"q": "w" * 400, "a": "x"}, {"q": "y", "a": None}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["data", "check", tmp_path / "x.jsonl", "--column", "prompt=q", "--column", "answer=a"]
    model = ["--model", tiny_folder, "--max-prompt-tokens", "100"]
    result = CliRunner().invoke(app, [str(argument) for argument in [*arguments, *model]])
    assert isinstance(result.exception, DataError)
    assert str(result.exception) == "3 problems in 3 of 4 rows"
    assert "rows: 1 of 4 can be used; 3 cannot (prompt" in result.output
    said = [line for line in result.output.splitlines() if ", row " in line]
    assert [re.search(r"row (\d)", line)[1] for line in said] == ["1", "2", "3"]  # pyright: ignore[reportOptionalSubscript]
    assert "tokens with its images, the limit is 100" in said[1]
    with pytest.raises(ConfigError, match="--column prompt: must be TARGET=COLUMN"):
        run(*arguments[:3], "--column", "prompt")
    with pytest.raises(ConfigError, match="--column prompt=a: prompt is q already"):
        run(*arguments, "--column", "prompt=a")


@pytest.mark.parametrize(
    ("reward", "what"),
    [("groundign", "unknown reward 'groundign'; did you mean 'grounding'"), ("weighted_sum", "'weights' is missing")],
)
def test_check_refuses_a_reward_that_it_cannot_check_for(reward, what):
    with pytest.raises(ConfigError, match=what):
        run("data", "check", PHOTOS / "refphotos.jsonl", "--reward", reward)


def test_the_verbs_of_prepare_work_together_from_rows_to_pairs(tmp_path):
    rows = [{"q": f"Q{i}?", "a": "yes", "id": f"r{i}"} for i in range(4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["--column", "prompt=q", "--column", "answer=a", "--column", "id=id", "--column", "source==toy"]
    assert "4 train rows" in run("prepare", "rows", tmp_path / "x.jsonl", "--out", tmp_path / "d", *own)
    answers = [
        {"text": text, "tokens": 1, "score": score, "parts": {}, "finish": "stop", "note": ""}
        for text, score in (("yes", 1), ("no", 0))
    ]
    asked = {"source": "toy", "where": "", "question": "?", "prompt": [], "images": [], "ground_truth": "yes"}
    lines = [{"id": f"r{i}", **asked, "answers": answers[: 1 + i % 2]} for i in range(4)]
    (tmp_path / "step_000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data, rollouts = tmp_path / "d" / "train.parquet", ["--rollouts", tmp_path / "step_000001.jsonl"]
    said = run("prepare", "filter", data, "--out", tmp_path / "f", *rollouts, "--accuracy", "0.2:0.8")
    assert "2 train rows" in said
    assert "too easy: 2" in said
    assert "2 pairs rows" in run("prepare", "pairs", data, "--out", tmp_path / "p", *rollouts)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--variant", "hard"], "--variant hard and --iou-key belong together"),
        (["--iou-key", "iou"], "belong together"),
        (["--variant", "hard", "--iou-key", "iou", "--buckets", "0.5:x"], "--buckets 0.5:x: must be"),
        (["--variant", "hard", "--iou-key", "iou", "--val-fraction", "0.1"], "--val-fraction makes validation files"),
    ],
)
def test_options_of_grounding_that_do_not_go_together_are_refused(tmp_path, options, what):
    with pytest.raises(ConfigError, match=re.escape(what)):
        run("prepare", "grounding", PHOTOS / "refphotos.jsonl", "--out", tmp_path, *options)
