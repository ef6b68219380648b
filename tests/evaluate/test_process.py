"""Process rewards: steps, their scores against plain forwards, their labels, and what chooses by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from foveate.data.answers import ScoredAnswer, ScoredRow, prompt_fields, write_answers
from foveate.data.table import open_tasks, write_rows
from foveate.datasets.prepared import infer_schema, task_row
from foveate.encoding.encode import Encoder
from foveate.encoding.steps import FIRST_STEP, judged_steps, split_steps
from foveate.encoding.turns import Turns, encode_trace
from foveate.errors import ConfigError, DataError
from foveate.evaluate.evaluate_models import EvalRequest, run_eval
from foveate.evaluate.predictions import read_evaluations
from foveate.evaluate.process import ProcessModel, process
from foveate.evaluate.steps import StepOptions, prepare_steps, step_prefixes
from foveate.records import Message
from foveate.rewards import REWARDS, KnownReward
from foveate.rewards.pool import Graders

ANSWERS = ("two and two\nfour, and <image> too\nso 4", "one\n\n two", "4", "")


def ends_in_a_vowel(text, ground_truth):  # noqa: ARG001
    return float(text[-1:] in "aeiou")


@pytest.fixture(autouse=True)
def vowel(monkeypatch):
    """The reward `vowel`, without processes of its own."""
    monkeypatch.setitem(REWARDS, "vowel", KnownReward(f"{__file__}:ends_in_a_vowel", quick=True))


def test_steps_are_paragraphs_or_lines_and_join_to_the_text():
    for text, steps in {
        "": [""],
        "a": ["a"],
        "\na\nb\n": ["\na\n", "b\n"],
        "a\n\nb\nc\n \n\nd": ["a\n\n", "b\nc\n \n\n", "d"],
    }.items():
        assert [*split_steps(text)] == steps
    merged = split_steps("".join(f"{number}\n" for number in range(30)), most=4)
    assert [step.count("\n") for step in merged] == [7, 8, 7, 8]


def plain_scores(model, tokenizer, text, pixels):
    """The scores of the steps, each by a forward of transformers of its own over the conversation up to it."""
    steps, found = [step.strip() for step in split_steps(text)], []
    question = FIRST_STEP.format(images="<image>\n", question="How many?", step=steps[0])
    turns = [{"role": "user", "content": question}]
    plus, minus = (tokenizer.encode(sign, add_special_tokens=False)[0] for sign in "+-")
    for step in [*steps[1:], None]:
        written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head, tail = written.split("<image>", 1)
        ids = tokenizer.encode(f"{head}<img>{'<IMG_CONTEXT>' * 4 * len(pixels)}</img>{tail}", add_special_tokens=False)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
        found.append(logits[[plus, minus]].softmax(0)[0].item())
        turns += [{"role": "assistant", "content": "+"}, {"role": "user", "content": step}]
    return tuple(found)


def test_scores_from_one_tree_are_those_of_plain_forwards(tiny_folder, tiny_policy, encode, make_task, make_image):
    task = make_task("<image>\nHow many?", make_image(100, 60))
    judge = ProcessModel(tiny_policy, encode)
    found = judge.step_scores([(text, task) for text in ANSWERS])
    model = InternVLForConditionalGeneration.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    pixels = encode(task).pixels
    for text, scores in zip(ANSWERS, found, strict=True):
        assert scores == pytest.approx(plain_scores(model, tiny_policy.tokenizer, text, pixels), abs=1e-5)
    group = judge.conversations(task, ANSWERS)
    assert sum(slot.count for slot in group.prompt.slots) == 4 * len(pixels)  # images once, and the question
    assert "How many?" in tiny_policy.tokenizer.decode(list(group.prompt.token_ids))


def test_what_is_trained_is_what_is_scored(encode, make_task):
    task = make_task("What is 2 + 2?")
    steps = split_steps(ANSWERS[0])
    row = judged_steps(replace(task, messages=(Message("system", "Think."), *task.messages)), steps, "+-")
    prompt, answer = encode_trace(Turns(encode), row, "-")
    trained = [encode.decode(tuple(one.token_ids.tolist())) for one in answer.segments if one.trained]
    assert trained == ["+", "-", "-"]
    assert "Think." not in encode.tokenizer.decode(list(prompt.token_ids))


def test_prefixes_are_beginnings_of_the_answer(encode):
    steps = split_steps("two boxes\nthe 3rd: 4\n\nfour")
    ids = encode.answer_ids("".join(steps))
    for number, own in enumerate(step_prefixes(encode, steps), start=1):
        assert own == ids[: len(own)]
        assert encode.decode(own) == "".join(steps[:number])


def answered(folder, tasks, texts):
    """Rows of data, and scored answers to them as `foveate eval` leaves them."""
    rows = [task_row(task, images=False) for task in tasks]
    write_rows(folder / "rows.parquet", rows, infer_schema(rows))
    made = [
        ScoredAnswer(text, "stop", 3, score=1.0, parts={"accuracy": float(text[-1] in "aeiou")}, note="")
        for text in texts
    ]
    write_answers(folder / "answers.jsonl", [ScoredRow(**prompt_fields(task), answers=tuple(made)) for task in tasks])
    return folder / "rows.parquet"


@pytest.mark.slow
def test_steps_are_labelled_by_continuations_that_share_the_tree(tmp_path, tiny_folder, encode, make_task):
    tasks = [replace(make_task(f"What is {n} and {n}? Say it in words. " * 6), id=str(n), answer="a") for n in range(3)]
    texts = ("so it is a\nand b\nthus a", "it is b\n\nor c", "a", "a")
    data = answered(tmp_path, tasks, texts)
    options = StepOptions(continuations=6, max_tokens=40, seed=1, all_steps=True)
    given = {"model": str(tiny_folder), "rollouts": [tmp_path / "answers.jsonl"], "options": options}
    made = prepare_steps([data], tmp_path / "steps", reward="vowel", **given)
    rows = [*open_tasks([str(tmp_path / "steps/steps.parquet")])]
    assert len(rows) == made.rows["steps"] == 3 * 3
    assert made.counts["tokens computed"] <= made.counts["tokens of separate continuations"] / 3
    values = [row.meta["step_values"] for row in rows]
    assert [len(own) for own in values] == [3, 2, 1] * 3
    assert [own[-1] for own in values] == [1.0, 0.0, 1.0] * 3
    assert any(0 < value < 1 for own in values for value in own)
    for row, own in zip(rows, values, strict=True):
        said = [one.content for one in row.messages if one.role == "assistant"]
        assert [*said, row.meta["response"]] == ["+" if value > 0 else "-" for value in own]
        encode_trace(Turns(encode), row, row.meta["response"])
    given["options"] = replace(options, all_steps=False)
    again = prepare_steps([data], tmp_path / "again", reward="vowel", **given)
    assert again.counts == made.counts
    short = [row.meta["step_values"] for row in open_tasks([str(tmp_path / "again/steps.parquet")])]
    assert short == [own[: own.index(0.0) + 1] if 0.0 in own else own for own in values]
    with pytest.raises(DataError, match="could be labelled"):
        prepare_steps(
            [data], tmp_path / "none", reward="vowel", **{**given, "options": replace(options, max_tokens=2, answers=1)}
        )


def test_best_of_n_goes_by_the_process_reward_of_a_folder(tmp_path, tiny_folder, make_task):
    tasks = [replace(make_task(f"What is {n}?"), id=str(n), answer="a") for n in range(3)]
    data = answered(tmp_path, tasks, ("a",))
    asked = {"models": (str(tiny_folder),), "data": (str(data),), "reward": "vowel", "max_tokens": 6}
    critic = f"prm:{tiny_folder}"
    with pytest.raises(ConfigError, match="--samples 8"):
        run_eval(EvalRequest(out=tmp_path / "none", critic=critic, **asked))
    run_eval(EvalRequest(out=tmp_path / "out", samples=4, critic=critic, critic_settings={"score": "min"}, **asked))
    [found] = read_evaluations(tmp_path / "out")
    with Graders("process", {"model": str(tiny_folder)}) as graders:
        for task, row in zip(tasks, found.predictions, strict=True):
            scores = graders.grade_many([(one.text, task) for one in row.sampled])
            assert [one.rank for one in row.sampled] == pytest.approx([one.parts["min"] for one in scores], abs=1e-5)


@pytest.mark.parametrize(
    ("critic", "settings", "said"),
    [
        ("prm:", {}, "--critic prm: names no model; give prm:FOLDER"),
        ("prm:one", {"model": "other"}, "--critic prm:one names its model; leave --critic-setting model out"),
    ],
)
def test_a_process_critic_has_one_model(critic, settings, said, tmp_path):
    request = EvalRequest(("m",), ("d",), tmp_path / "out", samples=4, critic=critic, critic_settings=settings)
    with pytest.raises(ConfigError, match=said):
        run_eval(request)


def test_labels_that_are_all_alike_are_told_and_a_limit_that_no_share_is_above_is_refused(
    tmp_path, tiny_folder, make_task
):
    data = answered(tmp_path, [replace(make_task("What?"), id="0", answer="a")], ("xyz",))
    given = {"model": str(tiny_folder), "rollouts": [tmp_path / "answers.jsonl"], "reward": "vowel"}
    made = prepare_steps([data], tmp_path / "steps", options=StepOptions(continuations=1), **given)
    assert "every step is wrong: a model that is trained on these rows alone judges all steps -" in made.notes
    with pytest.raises(DataError, match="setting above: must be at least 0 and less than 1, not 1"):
        prepare_steps([data], tmp_path / "none", options=StepOptions(above=1.0), **given)


def test_a_sum_with_a_process_reward_scores_all_answers_together(tiny_folder, make_task, monkeypatch):
    calls = []
    plain = ProcessModel.step_scores
    monkeypatch.setattr(ProcessModel, "step_scores", lambda own, asked: calls.append(len(asked)) or plain(own, asked))
    task = replace(make_task("What is 2 and 2?"), answer="4")
    settings = {"weights": {"exact": 1.0, "process": 0.5}, "settings": {"process": {"model": str(tiny_folder)}}}
    with Graders("weighted_sum", settings, workers=0) as both, Graders("process", {"model": str(tiny_folder)}) as alone:
        scores = both.grade_many([(text, task) for text in ("4", "2\n4")])
        own = [alone(text, task) for text in ("4", "2\n4")]
    assert calls == [2, 1, 1]
    expected = [1.0 + own[0].value / 2, own[1].value / 2]
    assert [one.value for one in scores] == pytest.approx(expected, abs=1e-5)
    assert set(own[1].parts) == {"mean", "min", "last", "steps"}


def test_what_cannot_judge_is_refused(tmp_path, tiny_folder, encode, tiny_policy, make_task):
    with pytest.raises(ConfigError, match="score"):
        Graders("process", {"model": str(tiny_folder), "score": "most"})
    with pytest.raises(DataError):
        process(model=str(tmp_path))
    judge = ProcessModel(tiny_policy, Encoder(encode.tokenizer, encode.family, 6, 30))
    [scores] = judge.step_scores([("a", make_task("so many words that no prompt is as long " * 3))])
    assert "the limit is 30" in scores
    talk = replace(make_task("?"), messages=(Message("user", "a?"), Message("assistant", "b"), Message("user", "c?")))
    assert "turns of the assistant" in judge.step_scores([("a", talk)])[0]
