"""`/v1/chat/completions` through the OpenAI SDK: sync, async, streaming, every field that is understood."""

import asyncio

import openai
import pytest
from conftest import URLS

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client, **fields):
    fields = {"model": "student", "messages": QUESTION, "max_tokens": 12, **fields}
    return client.chat.completions.create(**fields)


def text(reply):
    return reply.choices[0].message.content


def test_the_model_answers(real):
    reply = ask(real, temperature=0, max_tokens=32)
    assert text(reply) == "The capital of France is Paris."
    assert reply.choices[0].finish_reason == "stop"
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.adapter_version == 0 and reply.adapter_generation is None
    assert reply.system_fingerprint == "rdpo-base"


@pytest.mark.parametrize("model", ["teacher", "student", "student:base"])
def test_every_role_that_talks_talks(real, model):
    assert "Paris" in text(ask(real, model=model, temperature=0)) and ask(real, model=model).model == model


def test_a_stream_is_the_answer_in_pieces(real):
    whole = ask(real, temperature=0, max_tokens=32)
    stream = ask(real, temperature=0, max_tokens=32, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and {chunk.created for chunk in chunks} == {chunks[0].created}
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == text(whole) and len(pieces) > 5
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert all(choice.finish_reason is None for chunk in chunks[:-2] for choice in chunk.choices)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_with_every_piece(real):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(real, temperature=0, stream=True, stream_options=options))
    assert all(chunk.usage for chunk in chunks)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 0
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {chunks[-1].usage.prompt_tokens}


def test_async_and_many_at_once():
    async def go():
        async with openai.AsyncOpenAI(base_url=URLS["real"] + "/v1", api_key="none", max_retries=0) as client:
            whole = await asyncio.gather(*(ask(client, temperature=0) for _ in range(6)))
            stream = await ask(client, temperature=0, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return {text(reply) for reply in whole}, "".join(pieces)

    whole, streamed = asyncio.run(go())
    assert whole == {streamed}


def test_n_answers(real):
    reply = ask(real, n=3, temperature=1.5, seed=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) > 1
    assert reply.usage.prompt_tokens == ask(real).usage.prompt_tokens
    chunks = list(ask(real, n=2, temperature=1.5, seed=3, stream=True))
    streamed = ["", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in reply.choices[:2]]


def test_the_same_seed_gives_the_same_text(real):
    hot = {"temperature": 1.5, "max_tokens": 24}
    assert text(ask(real, seed=7, **hot)) == text(ask(real, seed=7, **hot))
    assert len({text(ask(real, seed=seed, **hot)) for seed in range(4)}) > 1


def test_narrow_sampling_is_greedy(real):
    greedy = text(ask(real, temperature=0))
    assert text(ask(real, temperature=2, top_p=1e-6)) == greedy
    assert text(ask(real, temperature=2, extra_body={"top_k": 1})) == greedy
    assert text(ask(real, temperature=2, extra_body={"min_p": 1})) == greedy


def test_stop_is_not_in_the_text(real):
    for stop in ["Paris", ["never", "Paris"]]:
        reply = ask(real, temperature=0, stop=stop)
        assert text(reply) == "The capital of France is "
        assert reply.choices[0].finish_reason == "stop" and reply.choices[0].stop_reason == "Paris"
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(real, temperature=0, stop="Paris", stream=True)]
    assert "".join(pieces) == "The capital of France is "
    kept = ask(real, temperature=0, stop="Paris", extra_body={"include_stop_str_in_output": True})
    assert text(kept).endswith("Paris")


def test_both_names_of_the_limit(real):
    for limit in [{"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}]:
        reply = ask(real, temperature=0, **{"max_tokens": openai.NOT_GIVEN, **limit})
        assert reply.usage.completion_tokens == 3 and reply.choices[0].finish_reason == "length"


def test_penalties_and_bias_change_the_text(real):
    plain = ask(real, temperature=0, logprobs=True)
    first = real.post("/../tokenize", body={"prompt": "The"}, cast_to=object)["tokens"][0]
    assert text(ask(real, temperature=0, logit_bias={str(first): -100})) != text(plain)
    forced = ask(real, temperature=0, max_tokens=4, logit_bias={str(first): 100}, stop=None)
    assert text(forced).startswith("TheThe")
    calmed = ask(real, temperature=0, max_tokens=4, logit_bias={str(first): 100}, presence_penalty=2, frequency_penalty=2)
    assert calmed.choices[0].finish_reason == "length"
    loop = [{"role": "user", "content": "Repeat the word yes many times."}]
    free = ask(real, messages=loop, temperature=0, max_tokens=40)
    held = ask(real, messages=loop, temperature=0, max_tokens=40, frequency_penalty=2, presence_penalty=2)
    assert text(free) != text(held)
    assert text(ask(real, messages=loop, temperature=0, max_tokens=40, extra_body={"repetition_penalty": 1.8})) != text(free)


def test_logprobs(real):
    reply = ask(real, temperature=0, logprobs=True, top_logprobs=3)
    tokens = reply.choices[0].logprobs.content
    assert "".join(token.token for token in tokens if not token.token.startswith("<|")) == text(reply)
    assert len(tokens) in (reply.usage.completion_tokens, reply.usage.completion_tokens - 1)
    for token in tokens:
        assert token.logprob <= 0 and bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token, "greedy takes the likeliest"
    chunks = list(ask(real, temperature=0, logprobs=True, stream=True))
    streamed = [token.token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == [token.token for token in tokens]
    assert ask(real).choices[0].logprobs is None


def test_token_ids_and_prompt_logprobs(real):
    reply = ask(real, temperature=0, extra_body={"return_token_ids": True, "prompt_logprobs": 1})
    assert len(reply.prompt_token_ids) == reply.usage.prompt_tokens == len(reply.prompt_logprobs)
    assert reply.prompt_logprobs[0] is None and reply.prompt_logprobs[1]
    assert real.post("/../detokenize", body={"tokens": reply.choices[0].token_ids}, cast_to=object)["prompt"].startswith(text(reply))


def test_messages_in_every_form(real):
    forms = [
        [{"role": "system", "content": "Be brief."}, *QUESTION],
        [{"role": "developer", "content": "Be brief."}, *QUESTION],
        [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}],
        [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
         {"role": "tool", "tool_call_id": "1", "content": "Paris"}],
    ]
    same = [ask(real, messages=form, temperature=0) for form in forms]
    assert text(same[0]) == text(same[1]) and all(reply.usage.completion_tokens for reply in same)
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot say."}]}
    assert ask(real, messages=[*QUESTION, refusal, *QUESTION], temperature=0).usage.completion_tokens
    going_on = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    assert text(ask(real, messages=going_on, temperature=0, extra_body=body)).strip().startswith("Paris")


def test_unused_fields_are_taken(real):
    reply = ask(real, temperature=0, user="me", store=True, metadata={"k": "v"}, service_tier="auto",
                response_format={"type": "text"}, extra_body={"something_new": 1})
    assert reply.metadata == {"k": "v"}


def test_the_reward_role_scores_the_last_turn(real, tiny):
    turns = [*QUESTION, {"role": "assistant", "content": "x" * 25}]
    reply = ask(tiny, model="reward", messages=turns)
    assert reply.reward == 2.5 and text(reply) == "reward:2.5"
    [entry] = reply.choices[0].logprobs.content
    assert (entry.token, entry.logprob, entry.top_logprobs) == ("reward", 2.5, [])
    chunks = list(ask(tiny, model="reward", messages=turns, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.content == "reward:2.5" and chunks[0].reward == 2.5 and chunks[-1].usage
    judged = ask(real, model="reward", messages=turns)
    assert judged.usage.prompt_tokens > 20 and float(text(judged).removeprefix("reward:")) == judged.reward
    for stream in [False, True]:
        with pytest.raises(openai.BadRequestError) as several:
            ask(tiny, model="reward", messages=turns, n=3, stream=stream)
        assert several.value.param == "n"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(real, model="reward")
    assert refused.value.param == "messages"
