"""A served model as OpenAI's client sees it, over a real server process."""

from __future__ import annotations

import base64
import io
import signal

import openai
import PIL.Image
import pytest
from serving import served


@pytest.fixture(scope="module")
def server(tiny_folder):
    options = ("--port", 0, "--threads", 1, "--name", "org/tiny", "--max-tokens", 300)
    with (
        served(tiny_folder, *options) as (url, key, _),
        openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client,
    ):
        yield client


def ask(server, content="what is this?", **fields):
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    settings = {"max_tokens": 24, "seed": 3, "temperature": 1.0, **fields}
    return server.chat.completions.create(model="org/tiny", messages=messages, **settings)


def say(server, *arguments, **fields):
    return ask(server, *arguments, **fields).choices[0].message.content


def test_a_stop_text_ends_the_answer_before_it(server):
    whole = say(server)
    stop = whole[5:8]
    stopped = ask(server, stop=["never, ever", stop])
    assert stopped.choices[0].message.content == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens <= ask(server).usage.completion_tokens
    assert say(server, stop=stop) == whole[: whole.index(stop)]
    assert say(server, stop=[]) == whole


@pytest.mark.parametrize("more", [{}, {"stop": ["nowhere to be found"]}, {"n": 2}, {"logprobs": True}])
def test_a_stream_comes_in_pieces_and_says_the_same(server, more):
    whole = ask(server, **more)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}, **more))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for expected in whole.choices:
        own = [choice for choice in choices if choice.index == expected.index]
        assert "".join(choice.delta.content or "" for choice in own) == expected.message.content
        assert own[0].delta.role == "assistant"
        assert own[-1].finish_reason == expected.finish_reason
        assert len(own) > 6
        if more.get("logprobs"):
            said = [entry.token for choice in own if choice.logprobs for entry in choice.logprobs.content]
            assert said == [entry.token for entry in expected.logprobs.content]
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_has_no_usage_unless_asked_for(server):
    assert all(chunk.usage is None and chunk.choices for chunk in ask(server, stream=True))


def test_fields_that_ask_for_nothing_change_nothing(server):
    neutral = {
        "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1, "ignore_eos": False, "stop_token_ids": [],
        "bad_words": [], "chat_template_kwargs": {}, "regex": None, "min_tokens": 0, "separate_reasoning": True,
    }  # fmt: skip
    said = say(
        server, response_format={"type": "text"}, tool_choice="none", frequency_penalty=0.0, presence_penalty=0,
        logit_bias={}, top_logprobs=None, parallel_tool_calls=False, service_tier="auto", user="u", extra_body=neutral,
    )  # fmt: skip
    assert said == say(server)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("min_p", 0.1),
        ("repetition_penalty", 1.2),
        ("guided_choice", ["a"]),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(server, field, value):
    with pytest.raises(openai.BadRequestError, match=f"{field} is not supported") as refused:
        ask(server, extra_body={field: value})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", field)


def test_roles_and_empty_contents_of_a_conversation_are_read(server):
    turns = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "add 2 and "}, {"type": "text", "text": "3"}],
            "name": "x",
        },
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "5", "tool_call_id": "call_1"},
        {"role": "user", "content": "and?"},
    ]
    first = ask(server, messages=turns)
    as_developer = ask(server, messages=[{"role": "developer", "content": "be brief"}, *turns[1:]])
    assert as_developer.choices[0].message.content == first.choices[0].message.content
    again = [*turns, first.choices[0].message, {"role": "user", "content": "more"}]
    assert ask(server, messages=again).usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("words", ["what is <image>?", "<image>", "<image>\n<image>"])
def test_the_mark_of_an_image_in_a_text_is_text(server, words):
    plain, marked = ask(server, "what is ?"), ask(server, words)
    assert marked.usage.prompt_tokens < plain.usage.prompt_tokens + 20
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    both = ask(server, [picture, {"type": "text", "text": words}])
    alone = ask(server, [picture, {"type": "text", "text": ""}])
    assert both.usage.prompt_tokens - alone.usage.prompt_tokens in range(1, 20)


def png(color="red"):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (70, 40), color).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(prefix="data:image/png;base64,"):
    return prefix + base64.b64encode(png()).decode()


def test_an_image_is_the_same_however_its_data_are_written(server):
    text = base64.b64encode(png()).decode()
    lines = base64.encodebytes(png()).decode()
    forms = [
        data_url(), data_url("data:;base64,"), data_url("data:image/png;charset=utf-8;base64,"), text,
        data_url("DATA:image/jpeg;BASE64,"), data_url().rstrip("="), data_url("data:image/png;name=a b.png; base64,"),
        "data:image/png;base64," + lines, "data:image/png;base64," + base64.urlsafe_b64encode(png()).decode(),
        "data:image/png;base64," + text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ]  # fmt: skip
    words = {"type": "text", "text": "what?"}
    said = {say(server, [{"type": "image_url", "image_url": {"url": form}}, words]) for form in forms}
    said.add(say(server, [{"type": "image_url", "image_url": data_url()}, words]))
    said.add(say(server, [{"type": "image_url", "image_url": {"url": data_url(), "detail": "high"}}, words]))
    assert len(said) == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://host/a.png", "not from https:"),
        ("ftp://host/a.png", "not from ftp:"),
        ("file:///etc/passwd", "not from file:"),
        ("data:image/svg+xml,<svg/>", "must hold base64"),
        ("data:image/png;base64", "has a comma before its data"),
        ("data:image/png;base64,****", "not base64"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_an_image_that_cannot_be_had_is_refused_with_its_place(server, url, reason):
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        ask(server, [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}])
    assert refused.value.param == "messages[0].content[1].image_url"


def test_models_are_listed_and_found_by_name(server):
    assert [model.id for model in server.models.list()] == ["org/tiny"]
    assert server.models.retrieve("org/tiny").id == "org/tiny"
    with pytest.raises(openai.NotFoundError) as missing:
        server.models.retrieve("other")
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")


def test_errors_are_those_of_openai(server):
    for fields, error, code, param in [
        ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"max_tokens": "many"}, openai.BadRequestError, "invalid_type", "max_tokens"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "invalid_value", "max_tokens"),
        ({"extra_body": {"tempreature": 1}}, openai.BadRequestError, "unknown_parameter", "tempreature"),
        ({"messages": [{"content": "a"}]}, openai.BadRequestError, "missing_required_parameter", "messages[0].role"),
        ({"messages": [{"role": "cook", "content": "a"}]}, openai.BadRequestError, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "invalid_type", "messages[0].content"),
        ({"content": "red " * 9000}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"extra_body": {"model": "gpt"}}, openai.NotFoundError, "model_not_found", "model"),
    ]:
        with pytest.raises(error) as refused:
            ask(server, **fields)
        assert (refused.value.code, refused.value.param) == (code, param), str(refused.value)
        assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError) as refused:
        ask(server.with_options(api_key="wrong"))
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        server.embeddings.create(model="org/tiny", input="a")


def test_negative_seeds_are_seeds(server):
    assert say(server, seed=-5) == say(server, seed=-5)
    assert say(server, seed=-5) != say(server, seed=5)


def test_special_tokens_leave_the_text_on_request(server):
    plain = [say(server, seed=seed, max_tokens=200) for seed in range(4)]
    skipped = [say(server, seed=seed, max_tokens=200, extra_body={"skip_special_tokens": True}) for seed in range(4)]
    assert all(len(one) <= len(other) for one, other in zip(skipped, plain, strict=True))
    assert skipped != plain


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_answers_with_an_error_first(tiny_folder):
    with served(tiny_folder, "--port", 0, "--threads", 1) as (url, key, process):
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            name = next(iter(client.models.list())).id
            long = {
                "model": name,
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 4000,
                "n": 8,
                "seed": 1,
            }
            pieces = client.chat.completions.create(**long, stream=True)
            next(pieces)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="the server is stopping"):
                list(pieces)
        assert process.wait(60) == 0
        assert process.stdout.read() == "stopped\n"
