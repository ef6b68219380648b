"""`foveate generate`: every row is answered once, whatever servers and the process itself go through."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from faulty_server import answer_to, faulty
from slow_cases import slow_but
from toy import make_data

from foveate.data.table import open_tasks
from foveate.errors import ConfigError, DataError, UserError
from foveate.evaluate.client import ClientSettings, messages_of
from foveate.evaluate.generate import GenerateRequest, RowsRequest, run_generate
from foveate.evaluate.shards import read_generated, shard_paths
from foveate.records import SamplingParams

ROWS = 60


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of 60 questions without pictures."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"data_source": "words", "prompt": [{"role": "user", "content": f"question {i}"}],
         "reward_model": {"ground_truth": "yes"}, "extra_info": {"id": f"q{i}"}}
        for i in range(ROWS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def ask(rows, tmp_path):
    """ask(server, ..., **settings) -> the summary of answers of these servers in tmp_path/out."""

    def run(*servers, samples=1, **settings):
        known = {"concurrency": 8, "retries": 6, "timeout": 1.0, "first_rest": 0.02}
        client = ClientSettings(tuple(one.url for one in servers), **known | settings)
        sampling = SamplingParams(samples, 16, 0.0 if samples == 1 else 1.0)
        request = GenerateRequest(RowsRequest((str(rows),)), tmp_path / "out", sampling, client=client, shard_rows=25)
        return run_generate(request)

    return run


def texts(folder: Path) -> dict[int, str]:
    """The first answer of each row; no row stands there twice."""
    found = list(read_generated(folder))
    assert len({row.index for row in found}) == len(found)
    return {row.index: row.answers[0].text for row in found}


EXPECTED = {i: answer_to([{"role": "user", "content": f"question {i}"}]) + " 0" for i in range(ROWS)}

FAULTS = {
    "hang": lambda n: "hang" if n % 20 == 3 else None,
    "slow": lambda _: None,
    "500": lambda n: "500" if n % 3 == 0 and n < 60 else None,
    "429": lambda n: "429" if n % 4 == 0 else None,
    "cut": lambda n: "cut" if n % 5 == 1 else None,
    "half": lambda n: "half" if n % 5 == 2 else None,
    "malformed": lambda n: "malformed" if n % 4 == 1 else None,
    "html": lambda n: "html" if n % 4 == 1 else None,
    "empty": lambda n: "empty" if n % 4 == 2 else None,
    "null": lambda n: "null" if n % 4 == 2 else None,
    "abort": lambda n: "abort" if n % 4 == 3 else None,
    "other": lambda n: "other" if n % 4 == 3 else None,
}


@pytest.mark.parametrize("name", slow_but(["hang", "500", "other"], FAULTS))
def test_a_server_with_faults_costs_tries_and_no_row(tmp_path, ask, name):
    with faulty(FAULTS[name], delay=0.05 if name == "slow" else 0.0) as server:
        summary = ask(server)
    assert texts(tmp_path / "out") == EXPECTED
    assert (summary["answered"], summary["failed"], summary["not_asked"]) == (ROWS, 0, 0)
    assert (summary["tried_again"] > 0) == (name != "slow")


def test_a_server_that_goes_away_and_comes_back_is_waited_for(tmp_path, ask):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    stack = ExitStack()
    first = stack.enter_context(faulty(port=port, delay=0.01))
    again = []

    def outage():
        while first.seen < 20:
            time.sleep(0.005)
        stack.close()
        time.sleep(0.5)
        again.append(stack.enter_context(faulty(port=port)))

    thread = threading.Thread(target=outage)
    thread.start()
    summary = ask(first, retries=8, first_rest=0.1)
    thread.join()
    stack.close()
    assert texts(tmp_path / "out") == EXPECTED
    assert again[0].seen > 0
    assert summary["failed"] == 0


def test_a_dead_server_leaves_the_work_to_the_others(tmp_path, ask):
    with faulty() as good, faulty(lambda _: "cut") as bad:
        ask(good, bad)
    assert texts(tmp_path / "out") == EXPECTED
    assert good.seen >= ROWS


def test_rows_without_an_answer_are_listed_and_asked_again(tmp_path, ask):
    with faulty(lambda n: "400" if n % 10 == 0 else None) as server, pytest.raises(UserError, match="6 of 60 rows"):
        ask(server, concurrency=1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    listed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert (summary["answered"], summary["refused"], summary["failed"]) == (54, 6, 0)
    assert [one["index"] for one in listed] == [0, 10, 20, 30, 40, 50]
    assert all("told to say 400" in one["reason"] and one["tries"] == 1 for one in listed)
    with faulty() as server:
        assert ask(server)["answered"] == ROWS
        assert server.seen == 6
    assert texts(tmp_path / "out") == EXPECTED
    assert (tmp_path / "out" / "failed.jsonl").read_text() == ""


def test_a_server_that_never_answers_ends_the_work_with_what_is_done(tmp_path, ask):
    with (
        faulty(lambda n: None if n < 10 else "500") as server,
        pytest.raises(ConfigError, match="rows in a row failed"),
    ):
        ask(server, concurrency=2, retries=1, first_rest=1e-5)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["answered"] == 10
    assert summary["failed"] >= 20
    assert summary["answered"] + summary["failed"] + summary["not_asked"] == ROWS
    assert any("told to say 500" in reason for reason in summary["reasons"])


def test_a_wrong_key_or_model_is_told_at_once(ask):
    with faulty(lambda _: "401") as server, pytest.raises(ConfigError, match="OPENAI_API_KEY right"):
        ask(server)
    with faulty() as server:
        with pytest.raises(ConfigError, match=r"no model 'gpt'; it has m"):
            ask(server, model="gpt")
        assert server.seen == 0
    with pytest.raises(ConfigError, match="does not answer"):
        ask(server)


def test_several_answers_are_asked_for_in_one_request_each_row(tmp_path, ask):
    with faulty() as server:
        summary = ask(server, samples=3)
        seeds = {body["seed"] for body in server.bodies}
    assert (summary["answers"], server.seen, len(seeds)) == (3 * ROWS, ROWS, ROWS)
    assert {len(row.answers) for row in read_generated(tmp_path / "out")} == {3}
    assert [len(path.read_text().splitlines()) for path in shard_paths(tmp_path / "out")] == [25, 25, 10]


def test_another_request_does_not_go_on_in_the_folder(ask, tmp_path):
    with faulty() as server:
        ask(server)
        with pytest.raises(ConfigError, match="belongs to another request: sampling"):
            ask(server, samples=2)
        (tmp_path / "out" / "generate.json").unlink()
        with pytest.raises(ConfigError, match=r"holds answers and no generate\.json"):
            ask(server)


def test_half_a_line_is_cut_off_and_a_broken_one_is_told(tmp_path, ask):
    with faulty() as server:
        ask(server)
        last = shard_paths(tmp_path / "out")[-1]
        content = last.read_bytes()
        last.write_bytes(content[:-30])
        assert ask(server)["last_start"]["rows"] == 1
        assert texts(tmp_path / "out") == EXPECTED
        last.write_bytes(b"{}\n")
        with pytest.raises(DataError, match=r"answers_00002\.jsonl, row 1, field id: no GeneratedRow"):
            ask(server)


def ask_slowly(url, rows, out):
    """What a process of its own does until it is killed."""
    client = ClientSettings((url,), concurrency=4)
    run_generate(GenerateRequest(RowsRequest((rows,)), out, SamplingParams(1, 16, 0.0), client=client))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_each_row_once(tmp_path, rows):
    context = multiprocessing.get_context("forkserver")
    rng = random.Random(5)
    with faulty(delay=0.02) as server:
        ends = []
        for moment in (*(rng.randint(2, 9) for _ in range(5)), ROWS + 1):
            process = context.Process(target=ask_slowly, args=(server.url, str(rows), tmp_path / "out"))
            process.start()
            seen = server.seen
            while server.seen < seen + moment and process.is_alive():
                time.sleep(0.002)
            if moment <= ROWS:
                time.sleep(rng.random() * 0.03)
                process.kill()
            process.join()
            ends.append(process.exitcode)
        assert server.seen > ROWS
    assert ends == [-signal.SIGKILL] * 5 + [0]
    assert texts(tmp_path / "out") == EXPECTED


def test_a_picture_travels_as_it_is_stored_with_the_template_of_the_server_in_mind(make_task, make_image):
    task = make_task("<image>\nwhat? <image>so", make_image(30, 20, 1), make_image(20, 30, 2))
    [turn] = messages_of(task, None, verbatim=False)
    assert [part.get("text", "picture") for part in turn["content"]] == ["picture", "what? ", "picture", "so"]
    [system, turn] = messages_of(task, "be brief", verbatim=True)
    assert system == {"role": "system", "content": "be brief"}
    assert [part.get("text", "picture") for part in turn["content"]] == ["picture", "\nwhat? ", "picture", "so"]
    assert turn["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_in_process_answers_resume_too(tmp_path, tiny_folder):
    data = make_data(tmp_path / "shapes")
    source = (str(data / "test.parquet"),)

    def run(out, rows=None):
        sampling = SamplingParams(2, 8, 1.0)
        run_generate(GenerateRequest(RowsRequest(source, rows), out, sampling, model=str(tiny_folder), logprobs=True))
        return {row.index: row.answers for row in read_generated(out)}

    whole = run(tmp_path / "whole")
    assert len(whole) == len(open_tasks(source))
    lines = shard_paths(tmp_path / "whole")[0].read_bytes().splitlines(keepends=True)
    shard_paths(tmp_path / "whole")[0].write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert run(tmp_path / "whole") == whole
    assert all(len(answer.logprobs) == answer.tokens for answers in whole.values() for answer in answers)
