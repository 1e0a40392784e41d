"""`/v1/completions`, `/v1/models`, tokens."""

import json
import time
import urllib.parse
import urllib.request

import openai
import pytest
from conftest import URLS

START = "The capital of France is"


def go_on(client, **fields):
    return client.completions.create(**{"model": "student", "prompt": START, "temperature": 0, "max_tokens": 6, **fields})


def test_text_texts_and_ids_give_the_same(real):
    one = go_on(real)
    assert one.object == "text_completion" and one.id.startswith("cmpl-")
    assert one.usage.completion_tokens == 6 and one.choices[0].finish_reason == "length"
    ids = real.post("/../tokenize", body={"prompt": START}, cast_to=object)["tokens"]
    assert go_on(real, prompt=ids).choices[0].text == one.choices[0].text
    many = go_on(real, prompt=[START, "Two plus two is"])
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == one.choices[0].text
    assert many.usage.prompt_tokens > one.usage.prompt_tokens
    lists = go_on(real, prompt=[ids, ids], n=2)
    assert len(lists.choices) == 4 and {choice.text for choice in lists.choices} == {one.choices[0].text}
    assert lists.usage.prompt_tokens == 2 * len(ids)


def test_sixteen_tokens_unless_said_otherwise(real):
    assert go_on(real, max_tokens=openai.NOT_GIVEN, extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_a_given_text_is_weighed(real):
    whole = START + " Paris."
    reply = go_on(real, prompt=whole, echo=True, logprobs=1, max_tokens=0)
    choice = reply.choices[0]
    assert choice.text == whole and reply.usage.completion_tokens == 0
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == whole
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert [whole[at:].startswith(token) for at, token in zip(logprobs.text_offset, logprobs.tokens)] == [True] * len(logprobs.tokens)
    assert all(len(top) >= 1 for top in logprobs.top_logprobs[1:])
    wrong = go_on(real, prompt=START + " Rome.", echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    assert sum(logprobs.token_logprobs[1:]) > sum(wrong.token_logprobs[1:])


def test_the_drawn_token_is_among_its_alternatives(real):
    for many in (0, 1):
        logprobs = go_on(real, logprobs=many, temperature=2, seed=3).choices[0].logprobs
        for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
            assert top[token] == value and len(top) <= many + 1
    both = go_on(real, echo=True, logprobs=1, max_tokens=1, extra_body={"prompt_logprobs": 5}).choices[0]
    assert max(len(top) for top in both.logprobs.top_logprobs[1:]) <= 2 and len(both.prompt_logprobs[1]) >= 5


def test_echo_before_the_answer(real):
    reply = go_on(real, echo=True, logprobs=0)
    assert reply.choices[0].text == START + go_on(real).choices[0].text
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.total_tokens


def test_a_stream(real):
    chunks = list(go_on(real, stream=True, logprobs=2, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == go_on(real).choices[0].text
    assert chunks[-1].usage.completion_tokens == 6 and chunks[-1].choices == []
    tokens = [chunk.choices[0].logprobs.tokens for chunk in chunks if chunk.choices and chunk.choices[0].logprobs]
    assert sum(map(len, tokens)) == 6
    whole = go_on(real, logprobs=2)
    streamed = [chunk.choices[0].logprobs.text_offset[0] for chunk in chunks if chunk.choices and chunk.choices[0].logprobs]
    assert streamed == whole.choices[0].logprobs.text_offset and streamed[0] == 0 and streamed[-1] > 0
    both = list(go_on(real, prompt=[START, "Two and two is"], stream=True, stream_options={"include_usage": True}))
    assert both[-1].usage.prompt_tokens == go_on(real, prompt=[START, "Two and two is"]).usage.prompt_tokens


def test_models(real):
    models = {model.id: model for model in real.models.list()}
    assert {"teacher", "reward", "student", "student:base"} <= set(models)
    for name, model in models.items():
        assert model.object == "model" and model.owned_by == "rdpo" and model.created > 1_600_000_000
        assert model.max_model_len > 1000
        assert real.models.retrieve(name) == model
    with pytest.raises(openai.NotFoundError) as missing:
        real.models.retrieve("org/none@5:x")
    assert missing.value.param == "model" and "org/none@5:x" in missing.value.message
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("written", ["student:base", "student%3Abase", "%73tudent:base"])
def test_names_are_decoded(written):
    with urllib.request.urlopen(f"{URLS['real']}/v1/models/{written}") as reply:
        assert json.load(reply)["id"] == "student:base"


@pytest.mark.parametrize("name", ["a/b", "a@1", "a:b", "org/m@5:x", "a b", "ü", "a%2Fb"])
def test_any_name_is_a_404_that_says_it(name):
    for written in {urllib.parse.quote(name, safe=""), urllib.parse.quote(name, safe="/@:")}:
        with pytest.raises(urllib.error.HTTPError) as missing:
            urllib.request.urlopen(f"{URLS['real']}/v1/models/{written}")
        body = json.load(missing.value)
        assert missing.value.code == 404 and f"`{name}`" in body["error"]["message"], body


def test_tokens_there_and_back(real):
    body = real.post("/../tokenize", body={"prompt": "Grüße, 世界!", "return_token_strs": True}, cast_to=object)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) and body["max_model_len"] > 1000
    assert real.post("/../detokenize", body={"tokens": body["tokens"]}, cast_to=object) == {"prompt": "Grüße, 世界!"}
    chat = real.post("/../tokenize", body={"messages": [{"role": "user", "content": "Hi"}]}, cast_to=object)
    assert chat["count"] > 5 and chat["token_strs"] is None


def test_a_conversation_has_the_tokens_of_the_chats_prompt(real):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I"}]
    for fields in [{}, {"add_generation_prompt": False}, {"continue_final_message": True}, {"add_special_tokens": True},
                   {"chat_template": "{{ messages[0].content }} {{ x }}", "chat_template_kwargs": {"x": "y"}}]:
        chat = real.chat.completions.create(model="student", messages=messages, max_tokens=1, extra_body={**fields, "return_token_ids": True})
        assert real.post("/../tokenize", body={"messages": messages, **fields}, cast_to=object)["tokens"] == chat.prompt_token_ids, fields
    with pytest.raises(openai.BadRequestError) as both:
        real.post("/../tokenize", body={"messages": messages, "continue_final_message": True, "add_generation_prompt": True}, cast_to=object)
    assert both.value.param == "continue_final_message"


def test_many_tokens_are_quickly_read(real):
    ids = real.post("/../tokenize", body={"prompt": "word " * 20_000}, cast_to=object)["tokens"]
    begun = time.monotonic()
    assert real.post("/../detokenize", body={"tokens": ids}, cast_to=object)["prompt"] == "word " * 20_000
    assert time.monotonic() - begun < 2
    with pytest.raises(openai.BadRequestError) as outside:
        real.post("/../detokenize", body={"tokens": [1, 10**6]}, cast_to=object)
    assert outside.value.param == "tokens" and str(10**6) in outside.value.message
