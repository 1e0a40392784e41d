"""Tools: offered to a model whose template knows none, called, answered; and an agent framework that does all of it."""

import asyncio
import json
from typing import Literal

import openai
import pytest
from conftest import URLS
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.capabilities import PrepareOutputTools
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Berlin"]}}, "required": ["city"],
        "additionalProperties": False}
WEATHER = {"name": "get_weather", "description": "The weather in a city", "parameters": CITY}
CLOCK = {"name": "get_time", "description": "The time in a city", "parameters": CITY}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]
FLAT = [{"type": "function", **WEATHER}, {"type": "function", **CLOCK}]
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
ONE = {"type": "function", "function": {"name": "get_weather"}}


def ask(client, **fields):
    fields = {"model": "student", "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 80, **fields}
    return client.chat.completions.create(**fields)


def said(text, **fields):
    """Lets the model say this and nothing else, to read it as the answer of any model would be read."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}, **fields}


def arguments(call):
    return json.loads(call.function.arguments)


@pytest.mark.parametrize("choice, names", [
    ("required", {"get_weather", "get_time"}),
    (ONE, {"get_weather"}),
    ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [ONE]}}, {"get_weather"}),
])
@pytest.mark.parametrize("temperature", [0, 1.8])
def test_a_required_call_is_always_one(real, choice, names, temperature):
    reply = ask(real, tool_choice=choice, parallel_tool_calls=False, temperature=temperature, seed=5).choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.content is None
    [call] = reply.message.tool_calls
    assert call.id.startswith("call_") and call.type == "function"
    assert call.function.name in names and arguments(call)["city"] in ("Paris", "Berlin")


def test_several_calls_in_one_turn(real):
    reply = ask(real, tool_choice="required", max_tokens=400, seed=1).choices[0]
    assert 1 <= len(reply.message.tool_calls) <= 8
    assert len({call.id for call in reply.message.tool_calls}) == len(reply.message.tool_calls)
    two = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>{"name": "get_time"}</tool_call>'
    calls = ask(real, **said(two)).choices[0].message.tool_calls
    assert [(call.function.name, arguments(call)) for call in calls] == [("get_weather", {"city": "Paris"}), ("get_time", {})]
    assert len(ask(real, parallel_tool_calls=False, **said(two)).choices[0].message.tool_calls) == 1


def test_text_before_a_call_stays_text(real):
    reply = ask(real, **said('Let me look.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Berlin"}}</tool_call>')).choices[0]
    assert reply.message.content == "Let me look." and reply.finish_reason == "tool_calls"
    assert arguments(reply.message.tool_calls[0]) == {"city": "Berlin"}


@pytest.mark.parametrize("text", ["It rains.", '<tool_call>{"name": get_weather}</tool_call>', "<tool_call>", 'a <tool_call>{"name": "f", "arguments": 3}</tool_call>'])
def test_what_is_no_call_is_text(real, text):
    reply = ask(real, **said(text)).choices[0]
    assert (reply.message.content, reply.message.tool_calls, reply.finish_reason) == (text, None, "stop")
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(real, stream=True, **said(text))]
    assert "".join(pieces) == text


def test_no_tools_no_calls(real):
    call = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    for fields in [{"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}]:
        reply = ask(real, **said(call), **fields)
        assert reply.choices[0].message.content == call and reply.choices[0].message.tool_calls is None
    offered, none = (ask(real, tool_choice=choice, max_tokens=1).usage.prompt_tokens for choice in ("auto", "none"))
    assert offered > none + 50, "the model was told of the tools"


def test_a_strict_function_is_called_right_or_not_at_all(real):
    def call(city):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        return {"role": "assistant", "content": None, "tool_calls": [{"id": city, "type": "function", "function": function}]}

    def cities(strict):
        [called] = ask(real, messages=turns, tools=[{"type": "function", "function": {**WEATHER, "strict": strict}}]).choices[0].message.tool_calls
        return arguments(called)["city"]

    turns = [{"role": "user", "content": "Paris"}, call("Paris"), {"role": "user", "content": "Berlin"}, call("Berlin"), {"role": "user", "content": "Rome"}]
    assert cities(strict=False) == "Rome", "what the model would say"
    assert cities(strict=True) in CITY["properties"]["city"]["enum"]
    # Where it does not call, it says what it would say anyway.
    free, bound = (ask(real, tools=[{"type": "function", "function": {**WEATHER, "strict": strict}}]).choices[0].message for strict in (False, True))
    assert free.content and free == bound
    [flat] = real.responses.create(model="student", input=[
        *({"role": turn["role"], "content": turn["content"]} if turn["content"] else
          {"type": "function_call", "call_id": "1", **turn["tool_calls"][0]["function"]} for turn in turns)],
        tools=[{"type": "function", **WEATHER, "strict": True}], temperature=0, max_output_tokens=80).output
    assert json.loads(flat.arguments)["city"] in CITY["properties"]["city"]["enum"]


def test_a_call_in_a_stream(real):
    whole = ask(real, tool_choice=ONE, parallel_tool_calls=False)
    chunks = list(ask(real, tool_choice=ONE, parallel_tool_calls=False, stream=True, logprobs=True, stream_options={"include_usage": True}))
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert deltas[0].id.startswith("call_") and deltas[0].type == "function"
    assert (deltas[0].function.name, deltas[0].function.arguments) == ("get_weather", "")
    assert all(delta.index == 0 and delta.id is None and delta.function.name is None for delta in deltas[1:])
    joined = "".join(delta.function.arguments for delta in deltas)
    assert joined == whole.choices[0].message.tool_calls[0].function.arguments
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "tool_calls"
    assert not any(choice.delta.content for chunk in chunks for choice in chunk.choices)
    with real.chat.completions.stream(model="student", messages=QUESTION, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=300) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name in ("get_weather", "get_time")


def test_a_round_trip(real):
    call = ask(real, tool_choice=ONE, parallel_tool_calls=False).choices[0].message
    turns = [*QUESTION, call.to_dict(), {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "It is snowing in Paris."}]
    after = ask(real, messages=turns, tool_choice="none").choices[0]
    assert after.message.content and after.message.tool_calls is None
    told = real.post("/../tokenize", body={"model": "student", "messages": turns, "tools": TOOLS, "return_token_strs": True}, cast_to=object)
    text = "".join(told["token_strs"])
    for part in ["<tools>\n[{\"type\": \"function\"", "<tool_call>\n{\"name\": \"get_weather\"", "<tool_response>\nIt is snowing in Paris.\n</tool_response>"]:
        assert part in text


@pytest.mark.parametrize("mark, text", [
    ("<tool_call>", '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'),
    ("<|python_tag|>", '{"name": "get_weather", "parameters": {"city": "Paris"}}'),
    ("[TOOL_CALLS]", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]'),
])
def test_a_template_that_knows_tools(real, mark, text):
    """It gets them as they are, and says how calls are written."""
    template = "{{ tools | tojson }}|{% for m in messages %}{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}|{% endfor %}{# " + mark + " #}"
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Berlin"}'}}
    turns = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "snow"}]
    body = {"chat_template": template, "return_token_ids": True, "structured_outputs": {"choice": [text]}}
    reply = ask(real, messages=turns, tools=TOOLS[:1], extra_body=body)
    prompt = real.post("/../detokenize", body={"tokens": reply.prompt_token_ids}, cast_to=object)["prompt"]
    assert prompt == json.dumps(TOOLS[:1]) + "|user What is the weather in Paris?|assistant Berlin|tool snow|"
    [called] = reply.choices[0].message.tool_calls
    assert (called.function.name, arguments(called)) == ("get_weather", {"city": "Paris"})
    body = {"chat_template": template}
    forced = ask(real, messages=turns, tool_choice="required", parallel_tool_calls=False, extra_body=body).choices[0]
    assert forced.message.tool_calls[0].function.name in ("get_weather", "get_time") and forced.message.content is None


class Sum(BaseModel):
    """Adds two digits."""

    left: Literal[1, 2, 3]
    right: Literal[4, 5, 6]


def test_parse_reads_calls(real):
    tool = openai.pydantic_function_tool(Sum)
    reply = real.chat.completions.parse(model="student", messages=[{"role": "user", "content": "Add 2 and 5."}], tools=[tool],
                                        tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=60)
    parsed = reply.choices[0].message.tool_calls[0].function.parsed_arguments
    assert isinstance(parsed, Sum) and parsed.left + parsed.right > 4


def test_tools_beside_a_response_format(real):
    """The answer is a call or what the schema asks for."""
    reply = real.chat.completions.parse(model="student", messages=QUESTION, tools=[openai.pydantic_function_tool(Sum)],
                                        response_format=Sum, parallel_tool_calls=False, temperature=0, max_tokens=80)
    message = reply.choices[0].message
    assert isinstance(message.parsed or message.tool_calls[0].function.parsed_arguments, Sum)


def test_responses_call_functions(real):
    options = {"model": "student", "tools": FLAT, "temperature": 0, "max_output_tokens": 80, "parallel_tool_calls": False}
    first = real.responses.create(input="What is the weather in Paris?", tool_choice={"type": "function", "name": "get_weather"}, **options)
    [call] = first.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert call.id.startswith("fc_") and call.call_id.startswith("call_") and json.loads(call.arguments)["city"] in ("Paris", "Berlin")
    assert first.tools[0].name == "get_weather" and first.tool_choice.name == "get_weather" and first.output_text == ""
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is snowing."}
    stored = real.responses.create(input=[result], previous_response_id=first.id, tool_choice="none", **options)
    by_hand = real.responses.create(input=[{"role": "user", "content": "What is the weather in Paris?"}, call.to_dict(), result], tool_choice="none", **options)
    assert stored.output_text == by_hand.output_text != "" and stored.usage.input_tokens == by_hand.usage.input_tokens


def test_responses_stream_calls(real):
    with real.responses.stream(model="student", input="What is the weather in Paris?", tools=FLAT, tool_choice="required",
                               parallel_tool_calls=False, temperature=0, max_output_tokens=80) as stream:
        kinds = [event.type.removeprefix("response.") for event in stream]
        final = stream.get_final_response()
    assert kinds == ["created", "in_progress", "output_item.added", "function_call_arguments.delta",
                     "function_call_arguments.done", "output_item.done", "completed"]
    assert final.output[0].type == "function_call" and json.loads(final.output[0].arguments)["city"]
    text = 'Wait. <tool_call>{"name": "get_time", "arguments": {"city": "Paris"}}</tool_call> Done.'
    mixed = real.responses.create(model="student", input="x", tools=FLAT, **said(text))
    assert [item.type for item in mixed.output] == ["message", "function_call", "message"] and mixed.output_text == "Wait. Done."


def test_responses_parse(real):
    reply = real.responses.parse(model="student", input="Give me two digits.", text_format=Sum, temperature=0, max_output_tokens=60)
    assert isinstance(reply.output_parsed, Sum)
    with real.responses.stream(model="student", input="Give me two digits.", text_format=Sum, temperature=0, max_output_tokens=60) as stream:
        assert stream.get_final_response().output_parsed == reply.output_parsed
    flat = {"type": "function", **openai.pydantic_function_tool(Sum)["function"]}
    called = real.responses.parse(model="student", input="Add 2 and 5.", tools=[flat],
        tool_choice="required", parallel_tool_calls=False, temperature=0, max_output_tokens=60)
    assert json.loads(called.output[0].arguments)["left"] in (1, 2, 3)
    free = real.responses.create(model="student", input="A JSON object.", text={"format": {"type": "json_object"}}, temperature=0, max_output_tokens=100)
    assert free.status == "incomplete" or isinstance(json.loads(free.output_text), dict)


class Verdict(BaseModel):
    """The final answer."""

    winner: Literal["Anne", "Bob"]


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
@pytest.mark.parametrize("streams", [False, True])
def test_an_agent_runs_unmodified(kind, streams):
    """pydantic-ai: the first turn can only roll, every later one can only answer, and both are required calls."""
    rolled = []

    async def until_rolled(ctx, tool):
        return None if rolled else tool

    async def once_rolled(ctx, tools):
        return tools if rolled else []

    provider = OpenAIProvider(base_url=URLS["real"] + "/v1", api_key="none")
    settings = {"temperature": 0, "max_tokens": 120, "parallel_tool_calls": False}
    agent = Agent(kind("student", provider=provider), output_type=Verdict, model_settings=settings,
                  instructions="Roll the die, then say who won.", capabilities=[PrepareOutputTools(once_rolled)])

    @agent.tool_plain(prepare=until_rolled)
    def roll_die(player: Literal["Anne", "Bob"]) -> str:
        """Roll a six-sided die for a player."""
        rolled.append(player)
        return f"{player} rolled a six and wins."

    async def stream():
        async with agent.run_stream("Anne and Bob play. Who wins?") as run:
            return await run.get_output(), run.usage

    if streams:
        output, usage = asyncio.run(stream())
    else:
        run = agent.run_sync("Anne and Bob play. Who wins?")
        output, usage = run.output, run.usage
    assert len(rolled) == 1 and output.winner in ("Anne", "Bob")
    assert usage.requests == 2 and usage.tool_calls == 1 and usage.output_tokens > 10
