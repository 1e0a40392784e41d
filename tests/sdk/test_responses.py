"""`/v1/responses` through the OpenAI SDK: whole, streamed with its strict accumulator, async, gone on from, fetched, forgotten."""

import asyncio

import openai
import pytest
from conftest import URLS, metric, until
from test_errors import fails, raw

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def respond(client, **fields):
    return client.responses.create(**{"model": "student", "input": QUESTION, "temperature": 0, "max_output_tokens": 32, **fields})


def test_the_model_answers(real):
    reply = respond(real, metadata={"k": "v"}, instructions=None)
    assert reply.output_text == ANSWER and reply.status == "completed" and reply.object == "response"
    assert reply.id.startswith("resp_") and reply.created_at > 1e9 and reply.model == "student"
    [message] = reply.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply.usage.input_tokens_details.cached_tokens >= 0 and reply.usage.output_tokens_details.reasoning_tokens == 0
    assert reply.metadata == {"k": "v"} and reply.error is None and reply.incomplete_details is None
    assert (reply.temperature, reply.max_output_tokens, reply.truncation) == (0, 32, "disabled")
    warm = respond(real, temperature=0.7, top_p=0.9, max_output_tokens=1)
    assert (warm.temperature, warm.top_p) == (0.7, 0.9)
    assert (reply.tools, reply.tool_choice, reply.parallel_tool_calls) == ([], "auto", True)
    assert reply.adapter_version == 0 and reply.adapter_generation is None
    raw = real.responses.with_raw_response.create(model="student:base", input="Hi", max_output_tokens=1)
    assert raw.headers["x-adapter-version"] == "0" and raw.parse().status == "incomplete"


def test_it_answers_as_a_chat_does(real):
    turns = [{"role": "user", "content": "Name a colour."}]
    options = {"model": "teacher", "temperature": 0, "extra_body": {"repetition_penalty": 1.1, "stop": ["."], "top_k": 3, "seed": 1}}
    chat = real.chat.completions.create(messages=[{"role": "system", "content": "Be brief."}, *turns], max_tokens=16, **options)
    for form in [{"instructions": "Be brief.", "input": turns},
                 {"input": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "input_text", "text": "Name a colour."}]}]}]:
        reply = real.responses.create(max_output_tokens=16, **options, **form)
        assert reply.output_text == chat.choices[0].message.content and reply.usage.input_tokens == chat.usage.prompt_tokens


def test_what_the_template_gets_changes_nothing_where_it_is_not_read(real):
    reply = respond(real, reasoning={"effort": "low"}, extra_body={"chat_template_kwargs": {"mood": "glad"}})
    assert reply.reasoning.effort == "low" and reply.output_text == ANSWER


def test_a_cut_answer_is_incomplete(real):
    reply = respond(real, max_output_tokens=3)
    assert reply.status == "incomplete" and reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output[0].status == "incomplete" and reply.usage.output_tokens == 3
    assert ANSWER.startswith(reply.output_text)


def test_the_events_of_a_stream(real):
    events = list(respond(real, stream=True, include=["message.output_text.logprobs"], top_logprobs=2))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 5 and kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(piece.delta for piece in pieces) == ANSWER
    assert all(len(piece.logprobs[0].top_logprobs) == 2 for piece in pieces)
    response = events[-1].response
    assert events[0].response.status == "in_progress" and events[0].response.id == response.id
    tokens = response.output[0].content[0].logprobs
    assert "".join(token.token for token in tokens) == ANSWER and all(token.logprob <= 0 for token in tokens)
    cut = list(respond(real, stream=True, max_output_tokens=2))
    assert cut[-1].type == "response.incomplete" and cut[-1].response.incomplete_details.reason == "max_output_tokens"


def test_the_strict_accumulator(real):
    with real.responses.stream(model="student", input=QUESTION, temperature=0, max_output_tokens=32) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == ANSWER
    assert real.responses.retrieve(final.id).output_text == ANSWER


def test_async_and_many_at_once():
    async def go():
        async with openai.AsyncOpenAI(base_url=URLS["real"] + "/v1", api_key="none", max_retries=0) as client:
            whole = await asyncio.gather(*(respond(client) for _ in range(4)))
            async with client.responses.stream(model="student", input=QUESTION, temperature=0, max_output_tokens=32) as stream:
                streamed = await stream.get_final_response()
        return {reply.output_text for reply in whole} | {streamed.output_text}, {reply.id for reply in whole}

    texts, ids = asyncio.run(go())
    assert texts == {ANSWER} and len(ids) == 4


def test_going_on_from_a_response(real):
    first = respond(real, instructions="You are a geographer.")
    second = respond(real, input="What is the capital of Germany?", previous_response_id=first.id, max_output_tokens=16)
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first.output_text},
             {"role": "user", "content": "What is the capital of Germany?"}]
    by_hand = respond(real, input=turns, max_output_tokens=16)
    # Instructions are not carried on.
    assert second.output_text == by_hand.output_text and second.usage.input_tokens == by_hand.usage.input_tokens
    assert second.previous_response_id == first.id
    assert by_hand.usage.input_tokens_details.cached_tokens > 0
    third = respond(real, input="Thanks.", previous_response_id=second.id, max_output_tokens=4)
    assert third.usage.input_tokens > second.usage.input_tokens + 10
    # A client may also send back what a response had.
    again = respond(real, input=[turns[0], *[item.to_dict() for item in first.output], turns[2]], max_output_tokens=16)
    assert again.output_text == second.output_text


def test_what_is_stored_can_be_fetched_and_forgotten(real):
    reply = respond(real, input=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}])
    assert real.responses.retrieve(reply.id).to_dict() == reply.to_dict()
    items = real.responses.input_items.list(reply.id, order="asc", limit=2)
    assert [item.content[0].text for item in items.data] == ["a", "b"] and items.has_more
    assert [item.content[0].text for item in items] == ["a", "b", "c"], "the SDK asks for the next page itself"
    newest = real.responses.input_items.list(reply.id, limit=1).data
    assert newest[0].content[0].text == "c" and newest[0].role == "user"
    with pytest.raises(openai.BadRequestError):
        real.responses.cancel(reply.id)
    real.responses.delete(reply.id)
    for gone in [lambda: real.responses.retrieve(reply.id), lambda: real.responses.delete(reply.id),
                 lambda: real.responses.cancel(reply.id), lambda: real.responses.input_items.list(reply.id)]:
        with pytest.raises(openai.NotFoundError):
            gone()
    with pytest.raises(openai.NotFoundError) as missing:
        respond(real, previous_response_id=reply.id)
    assert missing.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        real.responses.retrieve(respond(real, store=False, max_output_tokens=1).id)


def test_too_long_a_conversation(tiny):
    turns = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "yes"}] * 40
    turns += [{"role": "user", "content": "last"}]
    with pytest.raises(openai.BadRequestError) as long:
        respond(tiny, input=turns, max_output_tokens=4)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    cut = respond(tiny, input=turns, max_output_tokens=4, truncation="auto")
    assert cut.truncation == "auto" and cut.usage.output_tokens > 0
    room = next(model.max_model_len for model in tiny.models.list() if model.id == "student")
    assert room // 2 < cut.usage.input_tokens <= room - 4, "the oldest turns go, and no more than must"
    with pytest.raises(openai.BadRequestError) as still:
        respond(tiny, input="word " * 3000, truncation="auto")
    assert still.value.code == "context_length_exceeded"


def test_the_reward_role_scores_the_last_turn(tiny, real):
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "x" * 25}]
    reply = respond(tiny, model="reward", input=turns)
    assert reply.reward == 2.5 and reply.output_text == "reward:2.5"
    [entry] = reply.output[0].content[0].logprobs
    assert (entry.token, entry.logprob) == ("reward", 2.5)
    with tiny.responses.stream(model="reward", input=turns) as stream:
        assert stream.get_final_response().output_text == "reward:2.5"
    judged = respond(real, model="reward", input=turns)
    assert judged.usage.input_tokens > 20 and float(judged.output_text.removeprefix("reward:")) == judged.reward
    with pytest.raises(openai.BadRequestError) as refused:
        respond(tiny, model="reward")
    assert refused.value.param == "input"


@pytest.mark.parametrize("fields, param", [
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input[0].arguments"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"n": 2}, "n"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"truncation": "sometimes"}, "truncation"),
    ({"text": {"format": {"type": "poem"}}}, "text.format"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}], "tool_choice": "required"}, "tools[0]"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "poem"}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "text", "schema": []}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ({"best_of": 2}, "best_of"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"stream_options": {}}, "stream_options"),
])
def test_a_bad_field_is_a_400_that_names_it(fields, param):
    error = fails("tiny", "POST", "/v1/responses", {"model": "student", "input": "Hello", "max_output_tokens": 4, **fields})
    assert error["param"] == param, error


def test_other_errors():
    body = {"model": "gpt-4o", "input": "x"}
    assert fails("tiny", "POST", "/v1/responses", body, status=404)["code"] == "model_not_found"
    assert fails("tiny", "GET", "/v1/responses/resp_1", status=404)["code"] == "not_found"
    assert fails("locked", "POST", "/v1/responses", body, status=401)["code"] == "invalid_api_key"
    assert fails("tiny", "PUT", "/v1/responses/resp_1", status=405)["code"] == "method_not_allowed"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream):
    body = {"model": "student", "input": "Hello", "max_output_tokens": 4000, "ignore_eos": True, "stream": stream}
    connection = raw("real", body, "/v1/responses")
    until("it runs", lambda: metric("real", "rdpo_requests_running") == 1)
    connection.close()
    until("its place is free", lambda: metric("real", "rdpo_requests_running") == 0)
