"""A server under load, at the end of its patience, and at its own end."""

import contextlib
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import openai
import pytest
from conftest import URLS, metric, until

ROOT = pathlib.Path(__file__).resolve().parents[2]
HELLO = [{"role": "user", "content": "Hello"}]
ENDLESS = {"model": "student", "messages": HELLO, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
PAIRS = [{"prompt": f"Question {n}", "chosen": f"Yes {n}!", "rejected": f"No {n}.", "score_chosen": 2, "score_rejected": 1} for n in range(8)]


class Server:
    """One of the test's own, in a folder that outlives it."""

    def __init__(self, folder, model, settings="", teacher='{ model = "one" }', cache=""):
        config = folder / "rdpo.toml"
        config.write_text(
            f'{settings}\n[models.one]\npath = "{model}"\n[roles]\nteacher = {teacher}\nstudent = {{ model = "one" }}\n'
            f'reward = {{ kind = "judge", model = "one" }}\n[kv_cache]\nmemory = "256MiB"\n{cache}\n[store]\npath = "{folder}/rdpo.sqlite"\n'
            f'[adapters]\npath = "{folder}/adapters"\n'
        )
        self.process = subprocess.Popen(
            [os.environ["RDPO_TEST_BINARY"], "serve", "--config", config, "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        self.url = self.process.stdout.readline().split()[-1]
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=120)

    def send(self, method, path, body=None):
        """Status, headers and body of a request on a connection of its own."""
        where = urllib.parse.urlsplit(self.url)
        with contextlib.closing(http.client.HTTPConnection(where.hostname, where.port, timeout=60)) as connection:
            connection.request(method, path, json.dumps(body) if body else None, {"content-type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()

    def get(self, path):
        return json.loads(self.send("GET", path)[2])

    def value(self, name):
        lines = self.send("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def ends(self, seconds=60):
        """Exit code."""
        return self.process.wait(timeout=seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


REAL, TINY = ROOT / "models/smollm2-135m-instruct", ROOT / "tests/fixtures/tiny-llama"


def test_sixteen_clients_and_some_that_leave():
    command = [sys.executable, ROOT / "tests/load/load.py", "--url", URLS["real"], "--clients", "16", "--minutes", "0.15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| errors | 0 |" in done.stdout and "| share of KV blocks held when idle | 0 |" in done.stdout


def test_who_leaves_holds_no_block(real):
    for leaves_after in (1, 3, 20):
        with real.chat.completions.create(stream=True, n=3, **ENDLESS) as stream:
            for _ in zip(range(leaves_after), stream):
                pass
            assert metric("real", "rdpo_kv_cache_usage_ratio") > 0
        until("all blocks are back", lambda: metric("real", "rdpo_kv_cache_usage_ratio") == 0, seconds=5)
    assert metric("real", "rdpo_requests_running") == 0


def test_a_full_queue_is_a_429_that_says_when_to_come_back(tmp_path):
    with Server(tmp_path, REAL, cache="max_sequences = 1\nmax_waiting = 1") as server:
        with contextlib.ExitStack() as open_streams:
            begin = lambda: open_streams.enter_context(server.client.chat.completions.create(stream=True, **ENDLESS))
            threads = [threading.Thread(target=begin) for _ in range(2)]
            threads[0].start()
            until("one is answered", lambda: server.value("rdpo_requests_running") == 1)
            threads[1].start()
            until("one waits", lambda: server.value("rdpo_requests_waiting") == 1)
            for path, body in [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "Hello"}), ("/v1/responses", {"input": "Hello"})]:
                for stream in (False, True):
                    status, head, said = server.send("POST", path, {"model": "student", "stream": stream, **body})
                    error = json.loads(said)["error"]
                    assert (status, head["retry-after"], error["code"]) == (429, "1", "rate_limit_exceeded"), said
            with pytest.raises(openai.RateLimitError):
                server.client.chat.completions.create(model="student", messages=HELLO)
            # One more answer than may ever wait is a wrong request, not a busy server.
            status, _, said = server.send("POST", "/v1/completions", {"model": "student", "prompt": ["a", "b"], "max_tokens": 1})
            assert (status, json.loads(said)["error"]["param"]) == (400, "prompt")
            for thread in threads:
                thread.join(30)
        until("both have left", lambda: server.value("rdpo_requests_running") == server.value("rdpo_requests_waiting") == 0)
        assert server.client.chat.completions.create(model="student", messages=HELLO, max_tokens=3).choices


def test_an_answer_that_takes_too_long_ends_and_frees_its_blocks(tmp_path):
    with Server(tmp_path, REAL, "[server]\nrequest_timeout = 1") as server:
        begun = time.monotonic()
        with pytest.raises(openai.InternalServerError) as late:
            server.client.chat.completions.create(**ENDLESS)
        assert 1 <= time.monotonic() - begun < 5
        assert late.value.status_code == 504 and late.value.code == "request_timeout" and "server.request_timeout" in str(late.value)
        # The SDK would have it all done twice more.
        assert late.value.response.headers["x-should-retry"] == "false"
        idle = lambda: server.value("rdpo_kv_cache_usage_ratio") == server.value("rdpo_requests_running") == 0
        until("its blocks are free", idle, seconds=2)

        pieces = []
        with pytest.raises(openai.APIError) as late:
            for chunk in server.client.chat.completions.create(stream=True, **ENDLESS):
                pieces.append(chunk)
        assert len(pieces) > 5 and late.value.code == "request_timeout"
        until("its blocks are free", idle, seconds=2)

        events = list(server.client.responses.create(model="student", input="Hello", stream=True, extra_body={"ignore_eos": True}))
        assert events[-1].type == "response.failed" and "request_timeout" in events[-1].response.error.message

        # What is quick is not touched.
        assert server.client.chat.completions.create(model="student", messages=HELLO, max_tokens=3).choices


def test_an_endpoint_that_takes_too_long_is_given_up_too(tmp_path):
    there = f'{{ backend = "remote", model = "teacher", url = "{os.environ["RDPO_TEST_REAL"]}/v1" }}'
    with Server(tmp_path, REAL, "[server]\nrequest_timeout = 1", teacher=there) as server:
        endless = {**ENDLESS, "model": "teacher"}
        with pytest.raises(openai.InternalServerError) as late:
            server.client.chat.completions.create(**endless)
        assert late.value.status_code == 504 and late.value.code == "request_timeout"
        with pytest.raises(openai.APIError) as late:
            list(server.client.chat.completions.create(stream=True, **endless))
        assert late.value.code == "request_timeout"
        events = list(server.client.responses.create(model="teacher", input="Hello", stream=True, extra_body={"ignore_eos": True}))
        assert events[-1].type == "response.failed" and "request_timeout" in events[-1].response.error.message
    until("the endpoint has stopped too", lambda: metric("real", "rdpo_requests_running") == 0, seconds=10)


def test_on_sigterm_a_stream_goes_on_to_its_end_and_nothing_new_begins(tmp_path):
    with Server(tmp_path, REAL) as server:
        stream = iter(server.client.chat.completions.create(
            model="student", messages=HELLO, max_tokens=120, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
        ))
        for _ in zip(range(5), stream):
            pass
        assert server.send("GET", "/ready")[0] == 200
        server.process.send_signal(signal.SIGTERM)
        until("it says so", lambda: server.send("GET", "/ready")[0] == 503, seconds=2)
        status, head, body = server.send("POST", "/v1/chat/completions", {"model": "student", "messages": HELLO})
        assert status == 503 and int(head["retry-after"]) > 0 and json.loads(body)["error"]["code"] == "overloaded"
        assert server.send("GET", "/v1/models")[0] == 503
        assert server.send("GET", "/health")[0] == 200, "it is alive"
        assert server.value("rdpo_requests_running") == 1
        chunks = list(stream)
        assert chunks[-1].usage.completion_tokens == 120
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
        assert server.ends(10) == 0


def test_patience_with_streams_has_an_end(tmp_path):
    with Server(tmp_path, REAL, "[server]\ndrain_seconds = 1") as server:
        stream = iter(server.client.chat.completions.create(stream=True, **ENDLESS))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert server.ends(10) == 0
        assert time.monotonic() - begun > 1
        with pytest.raises(openai.APIConnectionError):
            list(stream)


def test_on_sigterm_a_job_is_kept_and_goes_on_after_a_restart(tmp_path):
    job = {"pairs": PAIRS, "eval_prompts": ["Why?"], "synthesis": {"max_tokens": 8}, "lora": {"r": 2, "alpha": 4},
           "training": {"epochs": 200, "batch_size": 2, "checkpoint_steps": 100000}}
    with Server(tmp_path, TINY) as server:
        job = server.client.post("/rdpo/train", body=job, cast_to=object)
        # Who follows it does not keep the server up.
        followed = []
        path = f"/v1/rdpo/train/{job['id']}/events?stream=true"
        follower = threading.Thread(target=lambda: followed.append(server.send("GET", path)))
        follower.start()
        until("it trains", lambda: server.value("rdpo_train_step") >= 5)
        server.process.send_signal(signal.SIGTERM)
        assert server.ends(15) == 0
        follower.join(10)
        assert followed and b"data: [DONE]" not in followed[0][2]
    with Server(tmp_path, TINY) as server:
        until("it is over", lambda: server.get(f"/v1/rdpo/train/{job['id']}")["status"] == "succeeded", seconds=90)
        events, more = [], True
        while more:
            after = events[-1]["id"] if events else 0
            page = server.get(f"/v1/rdpo/train/{job['id']}/events?limit=1000&after={after}")
            events, more = events + page["data"], page["has_more"]
        said = [event["message"] for event in events]
        assert any(line.startswith("queued again: the server stopped while training") for line in said), said
        # The steps were saved on the way out, though no checkpoint was due: none is done twice.
        steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
        assert len(steps) == len(set(steps)), "a step was done twice"
