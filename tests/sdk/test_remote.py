"""Chats, texts and responses of a remote teacher and scores of a remote judge, beside the same asked of their endpoint directly."""

import math

import openai
import pytest
from conftest import metric, until
from test_chat import ask, text
from test_completions import go_on
from test_responses import respond


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
        ({"extra_body": {"suffix": "x"}}, "suffix", "endpoint refused with status 400"),
    ],
)
def test_what_a_remote_chat_cannot_do(remote, fields, param, words):
    with pytest.raises(openai.BadRequestError) as error:
        ask(remote, model="teacher", **fields)
    assert error.value.param == param and words in error.value.message


def test_what_needs_tokens_is_a_400_naming_the_model(remote):
    with pytest.raises(openai.BadRequestError) as error:
        remote.post("/../tokenize", body={"model": "teacher", "prompt": "Hi"}, cast_to=object)
    assert error.value.param == "model" and "`teacher` is remote" in error.value.message


def test_a_text_is_gone_on_with_at_the_endpoint(real, remote):
    fields = {"model": "teacher", "prompt": ["The capital of France is", "Two and two is"], "max_tokens": 12, "logprobs": 1}
    there, here = go_on(real, **fields), go_on(remote, **fields)
    assert here.choices == there.choices and here.usage == there.usage
    assert (here.model, here.object) == ("teacher", "text_completion") and here.id.startswith("cmpl-") and here.id != there.id
    chunks = list(go_on(remote, **fields, stream=True))
    for index, choice in enumerate(there.choices):
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index) == choice.text
    assert len(chunks) > 10 and all(chunk.usage is None for chunk in chunks)
    with pytest.raises(openai.BadRequestError) as error:
        go_on(remote, model="teacher", prompt="Hi " * 9000)
    assert error.value.param == "prompt" and error.value.code == "context_length_exceeded"


def test_a_response_goes_on_from_another(real, remote):
    asked = {"model": "teacher", "max_output_tokens": 16}
    for streamed in (False, True):
        made = []
        for client in (remote, real):
            first = whole(respond(client, **asked, instructions="Be brief.", stream=streamed))
            second = whole(respond(client, **asked, input="And of Germany?", previous_response_id=first.id, stream=streamed))
            made.append([first, second])
        for here, there in zip(*made):
            assert (here.output_text, here.status, counts(here)) == (there.output_text, there.status, counts(there))
            assert here.id != there.id and here.model == "teacher" and here.output[0].type == "message"
        assert remote.responses.retrieve(made[0][1].id).previous_response_id == made[0][0].id


def counts(response):
    return response.usage.input_tokens, response.usage.output_tokens


def whole(response):
    """The response that a stream ends with, its events counted."""
    if isinstance(response, openai.Stream):
        events = list(response)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert sum(event.type == "response.output_text.delta" for event in events) > 3
        return events[-1].response
    return response


def test_a_response_can_be_made_to_call(real, remote):
    tool = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
    fields = {"model": "teacher", "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 40}
    for stream in (False, True):
        here, there = (respond(client, **fields, stream=stream) for client in (remote, real))
        if stream:
            here, there = list(here)[-1].response, list(there)[-1].response
        answers = []
        for client, response in ((remote, here), (real, there)):
            call = response.output[-1]
            assert (call.type, call.name) == ("function_call", "look")
            told = [{"type": "function_call_output", "call_id": call.call_id, "output": "a cat"}]
            answers.append(respond(client, model="teacher", input=told, previous_response_id=response.id, max_output_tokens=8))
        assert here.output[-1].arguments == there.output[-1].arguments
        assert answers[0].output_text == answers[1].output_text and counts(answers[0]) == counts(answers[1])


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"truncation": "auto"}, "truncation", "`teacher` is remote"),
        ({"input": "Hi " * 9000}, "input", "endpoint refused with status 400"),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs", "a response has no place for them"),
    ],
)
def test_what_a_remote_response_cannot_be(remote, fields, param, words):
    with pytest.raises(openai.BadRequestError) as error:
        respond(remote, **{"model": "teacher", **fields})
    assert error.value.param == param and words in error.value.message


def test_a_client_that_leaves_a_response_ends_the_work_at_the_endpoint(remote):
    stream = respond(remote, model="teacher", max_output_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    for _ in range(6):
        next(stream)
    assert metric("real", "rdpo_requests_running") == 1
    stream.close()
    until("the endpoint has nothing to do", lambda: metric("real", "rdpo_requests_running") == 0, seconds=5)


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
