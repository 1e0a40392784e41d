"""A teacher and a judge on mistralrs, beside the same model on the native engine. It is slow on a CPU: few tokens."""

import json

import openai
import pytest
from conftest import metric, until
from test_chat import ask, text
from test_jobs import BEHAVIOR, JOB, ended, post

RATE = BEHAVIOR | {"judge": {"prompt": "Rate the answer from 1 to 5.\n{prompt}\n{response}\nRating:", "min": 1, "max": 5}}

SHORT = {"model": "teacher", "temperature": 0, "max_tokens": 6}
# mistral.rs rounds activations to 8 bits on their way into quantized weights.
TOLERANCE = 0.4


def test_a_chat_its_counts_and_its_logprobs(real, mistral):
    before = metric("mistral", "rdpo_generation_tokens_total")
    there = ask(mistral, **SHORT, logprobs=True, top_logprobs=5)
    here = ask(real, **SHORT, logprobs=True, top_logprobs=5)
    assert (there.model, there.choices[0].finish_reason, there.adapter_version) == ("teacher", "length", 0)
    # What was in the cache is the native engine's to say.
    assert there.usage.prompt_tokens == here.usage.prompt_tokens and there.usage.completion_tokens == 6
    assert metric("mistral", "rdpo_generation_tokens_total") == before + 6
    first, other = ({one.token: one.logprob for one in reply.choices[0].logprobs.content[0].top_logprobs} for reply in (there, here))
    both = first.keys() & other.keys()
    assert len(both) >= 3 and all(abs(first[token] - other[token]) < TOLERANCE for token in both)


def test_a_stream_is_the_whole_answer(mistral):
    chunks = list(ask(mistral, **SHORT, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 6 and len(chunks) > 5
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert joined == text(ask(mistral, **SHORT))


def test_seeds_choices_stops_and_formats_are_this_servers(mistral):
    drawn = {"model": "teacher", "max_tokens": 6, "seed": 5, "temperature": 1.5}
    pair = ask(mistral, **drawn, n=2)
    assert pair.choices[0].message.content != pair.choices[1].message.content
    assert text(ask(mistral, **drawn)) == pair.choices[0].message.content
    stop = text(ask(mistral, **SHORT))[3:5]
    cut = ask(mistral, **SHORT, stop=[stop])
    assert cut.choices[0].finish_reason == "stop" and stop not in text(cut)
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = ask(mistral, **(SHORT | {"max_tokens": 30}), response_format=form)
    assert json.loads(text(answer))["colour"] in ("red", "blue") and answer.choices[0].finish_reason == "stop"
    reply = mistral.completions.create(model="teacher", prompt=[[5, 6, 7], [8, 9]], max_tokens=2)
    assert len(reply.choices) == 2 and reply.usage.prompt_tokens == 5


def test_a_client_that_leaves_ends_its_answer(mistral):
    before = metric("mistral", "rdpo_client_disconnects_total")
    stream = ask(mistral, model="teacher", temperature=0, max_tokens=1500, stream=True, extra_body={"min_tokens": 1400})
    for _ in range(3):
        next(stream)
    assert metric("mistral", "rdpo_requests_running") == 1
    stream.close()
    until("the answer has ended", lambda: metric("mistral", "rdpo_requests_running") == 0, seconds=5)
    assert metric("mistral", "rdpo_client_disconnects_total") == before + 1


@pytest.mark.parametrize("field, value", [("ignore_eos", True), ("prompt_logprobs", 1), ("priority", 2), ("cache_salt", "x")])
def test_what_it_cannot_do(mistral, field, value):
    with pytest.raises(openai.BadRequestError) as error:
        ask(mistral, **SHORT, extra_body={field: value})
    assert error.value.param == field and "`teacher` runs on mistralrs" in error.value.message


def test_the_list_and_the_tokenizer(real, mistral):
    there = mistral.models.retrieve("teacher")
    assert (there.root, there.max_model_len) == (real.models.retrieve("teacher").root, 8192)
    body = {"model": "teacher", "messages": [{"role": "user", "content": "Hi, déjà vu"}]}
    assert post(mistral, "/../tokenize", body)["tokens"] == post(real, "/../tokenize", body)["tokens"]


def test_its_judge_reads_what_the_native_one_does(real, mistral):
    body = {"prompt": "What is the capital of France?", "response": "Paris.", "behavior": RATE}
    there, here = (post(client, "/score", body)["data"][0]["score"] for client in (mistral, real))
    assert 1 <= there <= 5 and there == pytest.approx(here, abs=TOLERANCE)


def test_a_job_with_its_teacher_there_and_its_student_here(mistral):
    body = JOB | {"behavior": RATE, "prompts": ["Hi", "Why?"], "synthesis": {"max_tokens": 6, "temperature": 1.0}}
    before = metric("mistral", "rdpo_prompt_tokens_total")
    job = ended(mistral, post(mistral, "/rdpo/train", body), seconds=240)
    assert job["status"] == "succeeded" and job["adapter_version"] == 1, job
    assert metric("mistral", "rdpo_prompt_tokens_total") > before + 100
    assert mistral.completions.create(model="pupil", prompt="Hi", max_tokens=2).adapter_version == 1
