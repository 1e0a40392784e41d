"""Chats with a remote teacher and scores of a remote judge, beside the same asked of their endpoint directly."""

import math

import openai
import pytest
from conftest import metric, until
from test_chat import ask, text


def test_the_answer_is_the_endpoints_under_our_name(real, remote):
    there = ask(real, model="teacher", temperature=0, logprobs=True, top_logprobs=2)
    before = metric("remote", "rdpo_generation_tokens_total")
    here = ask(remote, model="teacher", temperature=0, logprobs=True, top_logprobs=2)
    assert text(here) == text(there) and here.choices[0].logprobs == there.choices[0].logprobs
    assert (here.model, here.object, here.adapter_version) == ("teacher", "chat.completion", 0)
    assert here.id.startswith("chatcmpl-") and here.id != there.id
    assert here.usage.total_tokens == there.usage.total_tokens
    assert metric("remote", "rdpo_generation_tokens_total") == before + here.usage.completion_tokens


def test_a_stream_comes_through(real, remote):
    whole = text(ask(real, model="teacher", temperature=0))
    chunks = list(ask(remote, model="teacher", temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert len(chunks) > 5 and {chunk.model for chunk in chunks} == {"teacher"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason and all(chunk.usage is None for chunk in chunks)
    counted = list(ask(remote, model="teacher", temperature=0, stream=True, stream_options={"include_usage": True}))
    assert counted[-1].choices == [] and counted[-1].usage.completion_tokens > 5


def test_a_client_that_leaves_ends_the_work_at_the_endpoint(remote):
    before = metric("real", "rdpo_client_disconnects_total")
    stream = ask(remote, model="teacher", temperature=0, max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    for _ in range(3):
        next(stream)
    assert metric("real", "rdpo_requests_running") == 1 and metric("remote", "rdpo_requests_running") == 1
    stream.close()
    until("the endpoint has nothing to do", lambda: metric("real", "rdpo_requests_running") == 0, seconds=5)
    assert metric("real", "rdpo_client_disconnects_total") == before + 1
    until("the place is given back", lambda: metric("remote", "rdpo_requests_running") == 0, seconds=5)


def test_tools_are_the_endpoints_business(real, remote):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    fields = {"model": "teacher", "temperature": 0, "tools": [tool], "tool_choice": "required", "max_tokens": 40}
    call = ask(remote, **fields).choices[0].message.tool_calls[0].function
    assert call == ask(real, **fields).choices[0].message.tool_calls[0].function


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs", "`teacher` is remote"),
        ({"extra_body": {"return_token_ids": True}}, "return_token_ids", "`teacher` is remote"),
        ({"temperature": 3}, "temperature", "between"),
        ({"extra_body": {"bad_words": [""]}}, "bad_words", "endpoint refused with status 400"),
    ],
)
def test_what_a_remote_chat_cannot_do(remote, fields, param, words):
    with pytest.raises(openai.BadRequestError) as error:
        ask(remote, model="teacher", **fields)
    assert error.value.param == param and words in error.value.message


def test_what_needs_tokens_is_a_400_naming_the_model(remote):
    for call in (
        lambda: remote.post("/../tokenize", body={"model": "teacher", "prompt": "Hi"}, cast_to=object),
        lambda: remote.completions.create(model="teacher", prompt="Hi"),
        lambda: remote.responses.create(model="teacher", input="Hi"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            call()
        assert error.value.param == "model" and "`teacher` is remote" in error.value.message


def test_the_list_names_the_model_at_the_endpoint(remote):
    teacher = remote.models.retrieve("teacher")
    assert (teacher.root, teacher.max_model_len) == ("teacher", 0)
    assert metric("remote", "rdpo_remote_endpoint_up") == 2, "one endpoint of the teacher, one of the judge"


def test_a_remote_judge_is_the_mean_over_the_likeliest_tokens(real, remote):
    judge = {"prompt": "Rate the answer from 1 to 5.\n{prompt}\n{response}\nRating:", "min": 1, "max": 5}
    recipe = {"name": "rate", "principle": "x", "critique": "x", "revision": "x", "judge": judge}
    question = "What is the capital of France?"
    for answer in ["Paris.", "I do not know, bananas perhaps."]:
        body = {"prompt": question, "response": answer, "behavior": recipe}
        here, there = (client.post("/score", body=body, cast_to=object)["data"][0]["score"] for client in (remote, real))
        filled = judge["prompt"].replace("{prompt}", question).replace("{response}", answer)
        told = ask(real, model="teacher", temperature=0, max_tokens=1, logprobs=True, top_logprobs=20,
                   messages=[{"role": "user", "content": filled}]).choices[0].logprobs.content[0].top_logprobs
        found = [(int(one.token), math.exp(one.logprob)) for one in told if one.token.strip() in list("12345")]
        mass = sum(p for _, p in found)
        assert here == pytest.approx(sum(value * p for value, p in found) / mass, abs=1e-5)
        # The judge that runs here reads all five; those that are not among the twenty are less likely than the twentieth.
        missing = 5 - len({value for value, _ in found})
        assert abs(here - there) <= 4 * missing * math.exp(told[-1].logprob) / mass + 0.05


def test_a_range_that_one_token_cannot_tell_is_refused_with_the_job(remote):
    judge = {"prompt": "{prompt} {response}", "min": 1, "max": 10}
    recipe = {"name": "rate", "principle": "x", "critique": "x", "revision": "x", "judge": judge}
    with pytest.raises(openai.BadRequestError) as error:
        remote.post("/rdpo/train", body={"prompts": ["Hi"], "behavior": recipe}, cast_to=object)
    assert error.value.param == "behavior.judge" and "generate" in error.value.message
