"""What a chat template has opened for the answer: it counts for rewards, and is not taught twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from light_rewards import PLACE
from toy import make_data, rl_settings, sft_settings

from foveate.encoding.chat import continued, opened_by
from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.models.policy import load_policy
from foveate.records import Answer, Task
from foveate.rewards.pool import Graders
from foveate.tools.model_facts import model_facts

OPEN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"


def with_ending(folder, target, ending):
    """A copy of a model folder whose template writes `ending` behind the generation prompt."""
    shutil.copytree(folder, target)
    template = target / "chat_template.jinja"
    text = template.read_text()
    head, tail = text.rsplit("assistant\n", 1)
    template.write_text(f"{head}assistant\n{ending}{tail}")
    return target


@pytest.fixture(scope="module")
def thinking(tmp_path_factory, tiny_folder):
    return with_ending(tiny_folder, tmp_path_factory.mktemp("opened") / "thinking", OPEN)


@pytest.fixture(scope="module")
def encoder(thinking):
    policy = load_policy(str(thinking))
    return Encoder(policy.tokenizer, policy.family, 6, 512)


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|Assistant|><think>", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("assistant\n<reasoning>", "<reasoning>"),
        ("<think>done</think> assistant\n", ""),
        ("<|start|>assistant<|channel|>", ""),
    ],
)
def test_a_tag_at_the_end_of_the_prompt_is_opened(prompt, opened):
    assert opened_by(prompt) == opened


@pytest.mark.parametrize(
    ("opened", "response", "rest"),
    [
        ("", "<think>\na\n</think>\nb", "<think>\na\n</think>\nb"),
        (OPEN, "<think>\na\n</think>\nb", "a\n</think>\nb"),
        (OPEN, "<think>a</think>b", "a</think>b"),
        (OPEN, "a\n</think>\nb", "a\n</think>\nb"),
        (OPEN, "\n<think>\n\na</think>", "\na</think>"),
        ("<think>", "<think>\na</think>", "\na</think>"),
        (CLOSED, "b", "b"),
        (CLOSED, "<think>\n\n</think>\n\nb", "b"),
        ("<reasoning>", "<think>a</think>", "<think>a</think>"),
    ],
)
def test_a_demonstration_goes_on_where_the_prompt_ends(opened, response, rest):
    assert continued(response, opened) == rest


def test_thoughts_behind_closed_ones_are_refused():
    with pytest.raises(ValueError, match="begins with <think>, which the chat template has closed"):
        continued("<think>\na\n</think>\nb", CLOSED)


SWITCH = (
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- else %}{{- '<think>\n' }}{%- endif %}{%- endif %}"
)
"""The end of the chat template of Qwen3.5."""


def test_a_template_with_a_switch_thinks_unless_it_is_set_at_its_head(tmp_path, tiny_folder, make_task):
    for head, opened in (("", OPEN), ("{%- set enable_thinking = false %}", CLOSED)):
        folder = shutil.copytree(tiny_folder, tmp_path / f"model{len(head)}")
        template = folder / "chat_template.jinja"
        turns, _ = template.read_text().split("{% if add_generation_prompt %}")
        template.write_text(head + turns + SWITCH)
        policy = load_policy(str(folder))
        encoder = Encoder(policy.tokenizer, policy.family, 6, 512)
        assert encoder.opened == opened
        assert encoder.decode(encoder(make_task("?")).token_ids).endswith(f"assistant\n{opened}")


def test_a_demonstration_is_taught_with_one_tag(encoder, make_task):
    prompt = encoder(make_task("What is 2 + 2?"))
    taught = encoder.decode((*prompt.token_ids, *encoder.answer_ids("<think>\n2 and 2\n</think>\nSo \\boxed{4}")))
    assert taught.endswith("assistant\n<think>\n2 and 2\n</think>\nSo \\boxed{4}")
    assert taught.count("<think>") == 1


@pytest.mark.parametrize("name", ["format_tags", "geo3k"])
def test_the_form_of_an_answer_counts_what_the_prompt_has_opened(encoder, make_task, name):
    task = replace(make_task("What is 2 + 2?"), answer="4")
    text = "2 and 2\n</think>\n<answer>\\boxed{4}</answer>"
    with Graders(name, {}, workers=0) as graders:
        [without] = graders.grade_many([(text, task)])
        [opened] = graders.grade_many([(text, encoder.for_graders(task))])
        [whole] = graders.grade_many([(OPEN + text, task)])
    assert (without.parts["format"], opened.parts["format"]) == (0.0, 1.0)
    assert opened == whole


def with_record(answer: Answer, task: Task) -> float:  # noqa: ARG001
    return float(answer.text.startswith("<think>"))


def test_a_reward_that_reads_the_record_sees_it_too(encoder, make_task):
    answer = Answer.sampled((1, 2), (-0.5, -0.5), "text", "stop", 0)
    with Graders(f"{__file__}:with_record", {}, workers=0) as graders:
        assert graders(answer, encoder.for_graders(make_task("?"))).value == 1.0
        assert graders(answer, make_task("?")).value == 0.0
    assert answer.text == "text"


def test_answers_that_were_generated_before_are_graded_with_what_was_opened(tmp_path, thinking):
    from foveate.evaluate.evaluate_models import EvalRequest, run_eval
    from foveate.evaluate.generate import GenerateRequest, RowsRequest, run_generate
    from foveate.records import SamplingParams

    data = (str(make_data(tmp_path / "shapes") / "test.parquet"),)
    run_generate(GenerateRequest(RowsRequest(data), tmp_path / "out", SamplingParams(max_tokens=4), str(thinking)))
    run_eval(EvalRequest((), (), tmp_path / "eval", f"{PLACE}:form_only", generated=(tmp_path / "out",)))
    [model] = json.loads((tmp_path / "eval" / "summary.json").read_text())["models"].values()
    assert model["score"] == 1.0


def test_an_ordinary_template_opens_nothing(encode, make_task):
    assert encode.opened == ""
    assert encode.for_graders(make_task("?")) == make_task("?")


def test_doctor_says_what_is_opened(thinking, tiny_policy):
    facts = model_facts(load_policy(str(thinking)))
    assert facts["  before an answer"] == repr("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert facts["  opened for the answer"].startswith("'<think>\\n'")
    assert model_facts(tiny_policy)["  opened for the answer"] == "nothing"


def test_doctor_says_what_stands_before_a_question(tiny_policy):
    facts = model_facts(tiny_policy)
    assert facts["  before a question"] == "'<|im_start|>user\\n', with data.system=none"
    assert facts["  its family's system message"].startswith("'你是书生")


def test_a_run_grades_with_what_is_opened(tmp_path, thinking):
    from foveate.log import read_metrics
    from foveate.train.rl import run_rl

    data = make_data(tmp_path / "shapes")
    reward = {"name": f"{PLACE}:form_only"}
    run = run_rl(rl_settings(tmp_path / "run", thinking, data, reward=reward, train={"steps": 1}))
    assert read_metrics(run.metrics)[0]["reward/mean"] == 1.0
    summary = (run.path / "evals" / "step_000000.summary.json").read_text()
    assert '"score": 1.0' in summary


def test_sft_refuses_a_row_that_thinks_again_before_the_run(tmp_path, tiny_folder):
    from foveate.train.sft import run_sft

    folder = with_ending(tiny_folder, tmp_path / "closed", CLOSED)
    row = {
        "prompt": [{"role": "user", "content": "?"}],
        "data_source": "s",
        "extra_info": {"id": "1", "response": "<think>a</think>b"},
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = {"train": [str(tmp_path / "train.jsonl")]}
    settings = sft_settings(tmp_path / "run", folder, tmp_path, data=data, train={"samples_per_step": 1})
    with pytest.raises(DataError, match=r"field extra_info\.response: begins with <think>"):
        run_sft(settings)
