"""What goes wrong reaches SDK users as the right exception, with the field, a request id, and in OpenAI's form."""

import gzip
import http.client
import json
import re
import socket
import urllib.parse

import openai
import pytest
from conftest import URLS, client_of, metric, until

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def send(server, method, path, body=None, headers=()):
    """Status, headers and body of a raw request."""
    where = urllib.parse.urlsplit(URLS[server])
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    if isinstance(body, (dict, list)):
        body = json.dumps(body)
    connection.request(method, path, body=body, headers={"content-type": "application/json", **dict(headers)})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, reply.headers, content


def fails(server, method, path, body=None, status=400, **headers):
    """The error object of a request that must fail."""
    got, head, content = send(server, method, path, body, [(name.replace("_", "-"), value) for name, value in headers.items()])
    assert got == status, content
    assert head["content-type"].startswith("application/json") and head["x-request-id"]
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize("fields, param", [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"+5": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 4097}, "stop"),
    ({"bad_words": ["a"] * 1001}, "bad_words"),
    ({"bad_words": ["a" * 4097]}, "bad_words"),
    ({"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
    ({"allowed_token_ids": [1] * 100_000}, "allowed_token_ids"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"messages": []}, "messages"),
    ({"messages": [["user", "hi", None, None, None]]}, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*HELLO, {"content": "Hello"}]}, "messages[1].role"),
    ({"response_format": {}}, "response_format.type"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    ({"max_tokens": 10**12}, "messages"),
    ({"max_tokens": 2**64 - 1}, "messages"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": 3}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{at}"}} for at in range(1025)]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g", "parameters": {"type": "array"}}}],
      "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tools[1]"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]}]},
     "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[1].tool_calls[0].function"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"min_p": 2}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"chat_template": "{% oops %}"}, "chat_template"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_a_400_that_names_it(fields, param, stream):
    body = {"model": "student", "messages": HELLO, "max_tokens": 4, "stream": stream, **fields}
    if "stream_options" in fields and "stream" not in fields:
        body["stream"] = False
    error = fails("tiny", "POST", CHAT, body)
    assert error["param"] == param, error


@pytest.mark.parametrize("path, body, param", [
    (CHAT, {}, "model"),
    (CHAT, {"model": "student"}, "messages"),
    ("/v1/completions", {"model": "student"}, "prompt"),
    ("/v1/responses", {"model": "student"}, "input"),
    ("/detokenize", {}, "tokens"),
])
def test_a_missing_field_is_named(path, body, param):
    assert fails("tiny", "POST", path, body)["param"] == param


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_a_template_is_taken_only_where_clients_are_trusted(path):
    body = {"model": "student", "messages": HELLO, "max_tokens": 1, "chat_template": "x"}
    error = fails("locked", "POST", path, body, authorization="Bearer sesame")
    assert (error["param"], error["code"]) == ("chat_template", "unsupported_parameter")


def test_an_open_server_takes_nothing_from_other_sites():
    body = {"model": "student", "messages": HELLO, "max_tokens": 1}
    here = URLS["tiny"]
    host = here.partition("://")[2]
    local = "localhost:" + host.rpartition(":")[2]
    # A form's body is sent without the browser asking first.
    form = ("content-type", "text/plain")
    for other in [[("origin", "https://evil.example")], [("origin", "null")], [("origin", "http://127.0.0.1:1")], [("sec-fetch-site", "cross-site")],
                  [("origin", "http://" + local), ("sec-fetch-site", "same-site")]]:
        for path in [CHAT, "/v1/rdpo/train", "/v1/lora_adapters/x/publish", "/v1/load_lora_adapter"]:
            status, _, content = send("tiny", "POST", path, body, [form, *other])
            error = json.loads(content)["error"]
            assert (status, error["code"]) == (403, "forbidden") and "server.api_keys" in error["message"], other
        assert send("tiny", "DELETE", "/v1/responses/none", headers=other)[0] == 403
        assert send("tiny", "GET", "/v1/models", headers=other)[0] == 200, "what is only read cannot be read by other pages"
    for own in [[], [("origin", here)], [("origin", here), ("sec-fetch-site", "same-origin")], [("host", local), ("origin", "http://" + local)]]:
        assert send("tiny", "POST", CHAT, body, own)[0] == 200, own
    # A key is nothing that a browser adds by itself.
    key = [("authorization", "Bearer sesame"), ("origin", "https://evil.example")]
    assert send("locked", "POST", CHAT, body, key)[0] == 200


def test_the_sdk_sees_each_kind(tiny):
    def chat(client=tiny, **fields):
        return client.chat.completions.create(**{"model": "student", "messages": HELLO, "max_tokens": 2, **fields})

    with pytest.raises(openai.BadRequestError) as bad:
        chat(temperature=5)
    assert bad.value.param == "temperature" and bad.value.request_id and bad.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError) as long:
        chat(messages=[{"role": "user", "content": "word " * 2000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        chat(model="gpt-4o")
    assert missing.value.param == "model" and missing.value.code == "model_not_found"
    for model in ["student@99", "student@x", "", "student:other"]:
        with pytest.raises(openai.NotFoundError):
            chat(model=model)
    with pytest.raises(openai.AuthenticationError) as key:
        chat(client_of("locked", key="wrong"))
    assert key.value.code == "invalid_api_key"
    assert chat(client_of("locked", key="sesame")).choices


def test_the_key_guards_all_but_what_is_open():
    for path in ["/v1/models", "/v1/models/x", "/%761/models", "/v1%2Fmodels", "//v1/models", "/v1/score", "/score", "/%73core",
                 "/tokenize", "/detokenize", "/v1/rdpo/train", "/v1/lora_adapters", "/nothing"]:
        assert fails("locked", "GET", path, status=401)["code"] == "invalid_api_key"
        assert send("locked", "GET", path, headers=[("authorization", "Bearer sesame")])[0] != 401
    for wrong in ["sesame", "Bearer", "Bearer ", "Bearer sesam", "Basic sesame", "Bearer: sesame", "Bearer sesame sesame"]:
        fails("locked", "GET", "/v1/models", status=401, authorization=wrong)
    assert send("locked", "GET", "/v1/models", headers=[("authorization", "bearer sesame")])[0] == 200
    assert send("locked", "GET", "/v1/models")[1]["www-authenticate"] == "Bearer"
    for path in ["/", "/health", "/ready", "/ping", "/version", "/metrics", "/openapi.yaml"]:
        assert send("locked", "GET", path)[0] == 200


def test_errors_no_handler_made_have_the_same_form():
    key = {"authorization": "Bearer sesame"}
    body = {"model": "student", "messages": [{"role": "user", "content": "x" * 30000}]}
    error = fails("locked", "POST", CHAT, body, status=413, **key)
    assert error["code"] == "request_too_large" and "20000" in error["message"]
    assert fails("tiny", "GET", "/nothing", status=404)["code"] == "not_found"
    assert fails("tiny", "GET", "/v1/models/%ff", status=404)
    assert fails("tiny", "POST", "/v1/models", status=405)["code"] == "method_not_allowed"
    for path, allowed in [("/health", "GET, HEAD"), ("/metrics", "GET, HEAD"), ("/", "GET, HEAD"), (CHAT, "POST"), ("/v1/rdpo/train", "GET, HEAD, POST")]:
        status, head, _ = send("tiny", "DELETE", path)
        assert (status, head["allow"]) == (405, allowed), path
    assert fails("tiny", "GET", "/v1/models", status=406, accept_encoding="identity;q=0, br")["param"] == "accept-encoding"
    for text in ["", "{", "[]", "3", "null", "{} {}", '{"model": "student", "messages": [}', "\x00"]:
        assert fails("tiny", "POST", CHAT, text)["type"] == "invalid_request_error"
    assert fails("tiny", "POST", CHAT, gzip.compress(b"{")[:-4], status=400, content_encoding="gzip")


def test_what_can_be_got_can_be_asked_for_its_head():
    for path in ["/health", "/", "/openapi.yaml", "/v1/models", "/v1/rdpo/train", "/v1/models/none", "/v1/responses/none"]:
        status, got, content = send("tiny", "GET", path)
        asked, head, nothing = send("tiny", "HEAD", path)
        assert (asked, nothing) == (status, b""), path
        assert (head["content-type"], head["content-length"]) == (got["content-type"], str(len(content))), path
    # A compressed body's length is not known before it is made.
    assert send("tiny", "HEAD", "/metrics", headers=[("accept-encoding", "gzip")])[::2] == (200, b"")
    assert send("tiny", "HEAD", CHAT)[0] == 405


def test_a_compressed_body_is_read():
    body = gzip.compress(json.dumps({"model": "student", "messages": HELLO, "max_tokens": 2}).encode())
    assert send("tiny", "POST", CHAT, body, [("content-encoding", "gzip")])[0] == 200


def test_request_ids():
    _, head, _ = send("tiny", "GET", "/health")
    assert head["x-request-id"].startswith("req-")
    assert send("tiny", "GET", "/health", headers=[("x-request-id", "mine")])[1]["x-request-id"] == "mine"
    assert send("tiny", "GET", "/v1/models/none", headers=[("x-request-id", "mine")])[1]["x-request-id"] == "mine"
    assert send("tiny", "GET", "/health", headers=[("x-request-id", "x" * 200)])[1]["x-request-id"].startswith("req-")


def test_streams_are_not_compressed_and_the_rest_is():
    body = {"model": "student", "messages": HELLO, "max_tokens": 3, "stream": True}
    status, head, content = send("tiny", "POST", CHAT, body, [("accept-encoding", "gzip")])
    assert status == 200 and head["content-encoding"] is None and content.endswith(b"data: [DONE]\n\n")
    assert head["content-type"].startswith("text/event-stream") and head["cache-control"] == "no-cache"
    assert head["x-accel-buffering"] == "no" and head["x-adapter-version"]
    _, head, content = send("tiny", "GET", "/metrics", headers=[("accept-encoding", "gzip")])
    assert head["content-encoding"] == "gzip"
    assert re.search(rb'rdpo_build_info{backend="\w+",git_sha="\w+",version="[\d.]+"} 1', gzip.decompress(content))


def raw(server, body, path=CHAT):
    """A connection with a request on it."""
    where = urllib.parse.urlsplit(URLS[server])
    connection = socket.create_connection((where.hostname, where.port))
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    connection.sendall(head.encode() + text)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream):
    body = {"model": "student", "messages": HELLO, "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    left = metric("real", "rdpo_client_disconnects_total")
    # The question itself is in flight too, and one that was just answered may still be.
    in_flight = lambda wanted: lambda: metric("real", "rdpo_http_requests_in_flight") == 1 + wanted
    until("nothing else is in flight", in_flight(0))
    connection = raw("real", body)
    until("it runs", lambda: metric("real", "rdpo_requests_running") == 1)
    until("it alone is in flight", in_flight(1))
    if stream:
        assert b"200 OK" in connection.recv(1000)
    connection.close()
    until("its place is free", lambda: metric("real", "rdpo_requests_running") == 0)
    until("it is counted", lambda: metric("real", "rdpo_client_disconnects_total") == left + 1)
    until("nothing is in flight", in_flight(0))


def test_the_sdk_can_leave_a_stream(real):
    left = metric("real", "rdpo_client_disconnects_total")
    with real.chat.completions.create(model="student", messages=HELLO, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}) as stream:
        for _ in zip(range(5), stream):
            pass
    until("its place is free", lambda: metric("real", "rdpo_requests_running") == 0)
    until("it is counted", lambda: metric("real", "rdpo_client_disconnects_total") == left + 1)


def test_a_whole_answer_is_no_disconnect(real):
    left = metric("real", "rdpo_client_disconnects_total")
    list(real.chat.completions.create(model="student", messages=HELLO, max_tokens=3, stream=True))
    real.chat.completions.create(model="student", messages=HELLO, max_tokens=3)
    assert metric("real", "rdpo_client_disconnects_total") == left


def test_metrics_count_by_route_and_never_by_what_a_client_makes_up():
    for method, path in [("BREW", "/nothing/at/all"), ("GET", "/v1/models/some-name")]:
        send("tiny", method, path)
    text = send("tiny", "GET", "/metrics")[2].decode()
    assert 'endpoint="/v1/models/{id:.+}"' in text and 'method="other"' in text
    assert "some-name" not in text and "BREW" not in text and "nothing" not in text
