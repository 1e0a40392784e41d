"""The table of `docs/api.md` is true: every parameter is sent and does what its row says, and no parameter is missing."""

import inspect
import json
import os
import re
from pathlib import Path

import openai
import pytest
import yaml

ROOT = Path(os.environ["RDPO_TEST_FIXTURES"]).parent.parent
HERE = Path(__file__).parent
BODIES = {
    "chat": {"model": "student", "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 6, "temperature": 0},
    "completions": {"model": "student", "prompt": "Hello, my name", "max_tokens": 6, "temperature": 0},
}
# What an example needs beside it.
WITH = {"top_logprobs": {"logprobs": True}, "stream_options": {"stream": True}, "continue_final_message": {"add_generation_prompt": False}}


def rows():
    table = (ROOT / "docs/api.md").read_text().partition("\n## ")[0]
    for line in table.splitlines():
        if line.startswith("| `"):
            name, chat, completions, example, _, test = [cell.strip() for cell in line.strip("|").split(" | ")]
            yield name.strip("`"), {"chat": chat, "completions": completions}, json.loads(example.strip("`")), test.strip("` |")


ROWS = list(rows())


def send(client, route, fields):
    create = client.chat.completions.create if route == "chat" else client.completions.create
    body = {**BODIES[route], **fields}
    # `extra_body` sends any field as it is.
    own = {key: body.pop(key) for key in list(body) if key in ("model", "messages", "prompt", "stream")}
    reply = create(**own, extra_body=body)
    return list(reply) if own.get("stream") else reply


def text(route, reply):
    return reply.choices[0].message.content if route == "chat" else reply.choices[0].text


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("name, says, example, test", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_is_true(real, route, name, says, example, test):
    if says[route] == "—":
        return
    if name == "logprobs" and route == "chat":
        example = True
    fields = {**WITH.get(name, {}), name: example}
    if says[route] == "refused":
        with pytest.raises(openai.BadRequestError) as refused:
            send(real, route, fields)
        assert refused.value.param == name and name in refused.value.message
        assert text(route, send(real, route, {name: None})) == text(route, send(real, route, {}))
        return
    reply = send(real, route, fields)
    assert reply
    if says[route] == "ignored":
        assert text(route, reply) == text(route, send(real, route, {})), "the answer is the same"
    else:
        assert says[route] == "honoured"
        file, _, function = test.partition("::")
        source = (HERE / f"{file}.py").read_text()
        body = re.search(rf"def {function or 'test_a_row_is_true'}\(.*?(?=\n(?:def |@|class )|\Z)", source, re.DOTALL)
        assert body, f"{test} is not there"


def responses_rows():
    table = (ROOT / "docs/api.md").read_text().partition("\n## `/v1/responses`")[2].partition("\n`GET ")[0]
    for line in table.splitlines():
        if line.startswith("| `"):
            names, _, test = [cell.strip() for cell in line.strip("|").split(" | ")]
            yield re.findall(r"`([a-z_]+)[^`]*`", names), test.strip("` |")


def test_the_table_of_responses_is_complete_and_its_tests_are_there(real):
    rows = list(responses_rows())
    named = {name for names, _ in rows for name in names}
    wanted = set(inspect.signature(real.responses.create).parameters) - {"extra_headers", "extra_query", "extra_body", "timeout"}
    assert wanted - named == set()
    for _, test in rows:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (HERE / f"{file}.py").read_text(), test


def test_responses_ignore_the_rest(real):
    ask = lambda **fields: real.responses.create(model="student", input="Hi", max_output_tokens=4, temperature=0, extra_body=fields).output_text
    rest = {"user": "me", "service_tier": "auto", "safety_identifier": "me", "prompt_cache_key": "k", "prompt_cache_options": {}, "max_tool_calls": 1}
    assert ask(**rest, prompt_cache_retention="24h", context_management=[], moderation={}, access_programs=[], background_options={}, image={}, no_such_field=1) == ask()


def test_the_table_is_complete(real):
    named = {route: {name for name, says, _, _ in ROWS if says[route] != "—"} for route in BODIES}
    transport = {"extra_headers", "extra_query", "extra_body", "timeout"}
    for route, create in [("chat", real.chat.completions.create), ("completions", real.completions.create)]:
        assert set(inspect.signature(create).parameters) - transport - named[route] == set()
    schemas = yaml.safe_load((ROOT / "openapi.yaml").read_text())["components"]["schemas"]
    for route, schema in [("chat", "ChatRequest"), ("completions", "CompletionRequest")]:
        assert set(schemas[schema]["properties"]) - named[route] == set()
    assert len(ROWS) == len({row[0] for row in ROWS}), "a parameter has two rows"
