"""Answers in a form that was asked for: `response_format`, `structured_outputs`, the SDK's `parse`, on the real model."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

import openai
import pytest
from pydantic import BaseModel

ASK = [{"role": "user", "content": "Invent a person who lives in a city."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"type": "string", "enum": ["cat", "dog"]}, "maxItems": 2},
        "home": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"], "additionalProperties": False},
    },
    "required": ["name", "age", "pets", "home"],
    "additionalProperties": False,
}
GRAMMAR = 'start: "(" word ("," word)~0..2 ")"\nword: /[a-z]{1,8}/'


def ask(client, **fields):
    fields = {"model": "student", "messages": ASK, "max_tokens": 200, "seed": 1, **fields}
    return client.chat.completions.create(**fields)


def schema(schema, **named):
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **named}}


def structured(**constraint):
    return {"extra_body": {"structured_outputs": constraint}}


def is_person(text):
    person = json.loads(text)
    assert set(person) == {"name", "age", "pets", "home"} and set(person["home"]) == {"city"}
    assert 0 <= person["age"] <= 120 and len(person["pets"]) <= 2 and set(person["pets"]) <= {"cat", "dog"}
    assert len(person["name"]) <= 20 and len(person["home"]["city"]) <= 20


FORMS = {
    "schema": ({"response_format": schema(SCHEMA)}, is_person),
    "strict": ({"response_format": schema(SCHEMA, strict=True)}, is_person),
    "lenient": ({"response_format": schema(SCHEMA, strict=False)}, is_person),
    "json": (structured(json=SCHEMA), is_person),
    "json as text": (structured(json=json.dumps(SCHEMA)), is_person),
    "regex": (structured(regex=r"\d{3}-\d{4}"), lambda text: re.fullmatch(r"\d{3}-\d{4}", text)[0]),
    "choice": (structured(choice=["Berlin", "New York", "Zürich 東京"]), ["Berlin", "New York", "Zürich 東京"].index),
    "grammar": (structured(grammar=GRAMMAR), lambda text: re.fullmatch(r"\([a-z]{1,8}(,[a-z]{1,8}){0,2}\)", text)[0]),
}


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("form", FORMS)
def test_the_answer_has_the_form(real, form, temperature):
    fields, check = FORMS[form]
    reply = ask(real, temperature=temperature, **fields)
    assert reply.choices[0].finish_reason == "stop", reply
    check(reply.choices[0].message.content)


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_has_the_form(real, form):
    fields, check = FORMS[form]
    chunks = list(ask(real, stream=True, temperature=1, **fields))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(real, temperature=1, **fields).choices[0].message.content
    check(text)
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("form", ["schema", "regex", "choice", "grammar"])
def test_a_completion_has_the_form(real, form):
    fields, check = FORMS[form]
    body = dict(fields.get("extra_body", {}), **{key: value for key, value in fields.items() if key != "extra_body"})
    reply = real.completions.create(model="student", prompt="A person:", max_tokens=200, seed=1, extra_body=body)
    assert reply.choices[0].finish_reason == "stop"
    check(reply.choices[0].text)


@pytest.mark.parametrize("fields", [{"response_format": {"type": "json_object"}}, structured(json_object=True)])
def test_any_object(real, fields):
    for seed in range(3):
        reply = ask(real, messages=[{"role": "user", "content": "Answer in JSON: the capital of France, as {\"city\": …}."}], seed=seed, **fields)
        text = reply.choices[0].message.content
        if reply.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert reply.choices[0].finish_reason == "length" and text.startswith("{")
        assert not re.search(r"\s{25}", text), "no endless white space"


class Colour(str, Enum):
    red = "red"
    blue = "blue"


class Wheel(BaseModel):
    inches: int
    colour: Colour


class Car(BaseModel):
    wheels: list[Wheel]
    electric: bool
    owner: Wheel | None


def test_the_sdk_parses_into_models(real):
    messages = [{"role": "user", "content": "Describe a car with two wheels."}]
    for seed in range(2):
        try:
            reply = real.chat.completions.parse(model="student", messages=messages, response_format=Car, max_tokens=400, seed=seed, temperature=0.7)
        except openai.LengthFinishReasonError:
            continue
        assert isinstance(reply.choices[0].message.parsed, Car)
        return
    pytest.fail("every answer was cut")


def test_the_sdk_streams_into_models(real):
    messages = [{"role": "user", "content": "Describe a wheel."}]
    with real.chat.completions.stream(model="student", messages=messages, response_format=Wheel, max_tokens=200, seed=3) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Wheel)


def test_a_cut_answer_says_so(real):
    with pytest.raises(openai.LengthFinishReasonError):
        real.chat.completions.parse(model="student", messages=ASK, response_format=Car, max_tokens=4)
    assert ask(real, response_format=schema(SCHEMA), max_tokens=5).choices[0].finish_reason == "length"


def test_the_same_seed_gives_the_same_text_in_any_company(real):
    fields, _ = FORMS["schema"]
    alone = ask(real, temperature=1, **fields).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(ask, real, temperature=1, **(FORMS[form][0] if at else fields)) for at, form in enumerate([*FORMS] * 2)]
        replies = [job.result() for job in jobs]
    assert replies[0].choices[0].message.content == alone
    for reply, form in list(zip(replies, [*FORMS] * 2))[1:]:
        FORMS[form][1](reply.choices[0].message.content)


def test_each_of_n_answers_has_the_form(real):
    reply = ask(real, n=4, temperature=1.2, response_format=schema(SCHEMA))
    texts = [choice.message.content for choice in reply.choices]
    assert len(set(texts)) > 1
    for text in texts:
        is_person(text)


def test_logprobs_are_the_models_own(real):
    """As vLLM's default: of the distribution before the grammar, so the likeliest token may be one that was not allowed."""
    reply = ask(real, temperature=0, logprobs=True, top_logprobs=1, **structured(choice=["xylophone"]))
    tokens = reply.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == "xylophone"
    assert tokens[0].logprob < -3 and tokens[0].top_logprobs[0].token != tokens[0].token


@pytest.mark.parametrize("fields, param, word", [
    ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    ({"response_format": "json"}, "response_format", "object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "missing"),
    ({"response_format": schema({"type": "object", "if": {}, "then": {}})}, "response_format.json_schema.schema", "if"),
    ({"response_format": schema({"type": "strin"})}, "response_format.json_schema.schema", "strin"),
    ({"response_format": schema({"$ref": "http://localhost/x"})}, "response_format.json_schema.schema", "localhost"),
    ({"response_format": {**schema([1]), "type": "text"}}, "response_format.json_schema.schema", "object"),
    ({"response_format": schema([1])}, "response_format.json_schema.schema", "object"),
    (structured(json={"type": "nothing"}), "structured_outputs.json", "nothing"),
    (structured(json="{"), "structured_outputs.json", "JSON"),
    (structured(regex="(a"), "structured_outputs.regex", "unclosed"),
    (structured(regex="a(?!b)"), "structured_outputs.regex", "look-around"),
    (structured(regex=["a"]), "structured_outputs.regex", "string"),
    (structured(choice=[]), "structured_outputs.choice", "at least one"),
    (structured(choice="yes"), "structured_outputs.choice", "sequence"),
    (structured(grammar="start: nothing"), "structured_outputs.grammar", "nothing"),
    (structured(grammar='root ::= "a"'), "structured_outputs.grammar", "Lark"),
    (structured(structural_tag={}), "structured_outputs.structural_tag", "not supported"),
    (structured(regex="a", choice=["b"]), "structured_outputs.choice", "second"),
    ({"response_format": {"type": "json_object"}, **structured(regex="a")}, "structured_outputs", "response_format"),
    ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "structured_outputs"),
])
def test_what_cannot_be_enforced_is_a_400_that_names_it(real, fields, param, word):
    for stream in [False, True]:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(real, stream=stream, **fields)
        assert refused.value.param == param and word in refused.value.message, refused.value


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"extra_body": {"structured_outputs": None}}, structured()])
def test_nothing_asked_is_plain_text(real, fields):
    assert not ask(real, temperature=0, **fields).choices[0].message.content.startswith("{")
