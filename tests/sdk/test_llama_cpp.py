"""Teacher and judge on llama.cpp's own server, the student here: what rdpo makes of an endpoint that it did not write.

Skipped without `RDPO_TEST_LLAMA_CPP`, a Python that has `llama-cpp-python[server]` (`make parity` sets it).
"""

import os
import pathlib
import socket
import subprocess
import urllib.request

import pytest
from conftest import until
from openai import OpenAI

PYTHON = os.environ.get("RDPO_TEST_LLAMA_CPP")
BINARY = os.environ["RDPO_TEST_BINARY"]
WORK = pathlib.Path(os.environ["RDPO_TEST_WORK"])
FIXTURES = pathlib.Path(os.environ["RDPO_TEST_FIXTURES"])
pytestmark = pytest.mark.skipif(not PYTHON, reason="RDPO_TEST_LLAMA_CPP is not set")
RATE = {
    "name": "rate", "principle": "Be correct.", "critique": "What is wrong with it? {principle}", "revision": "Write it again.",
    "judge": {"prompt": "Rate the answer from 1 to 5.\n{prompt}\n{response}\nRating:", "min": 1, "max": 5},
}


def start(command, name, port):
    log = open(WORK / f"{name}.log", "w")
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)

    def answers():
        assert process.poll() is None, (WORK / f"{name}.log").read_text()[-2000:]
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").status == 200
        except OSError:
            return False

    until(f"{name} answers", answers, seconds=60)
    return process


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def servers():
    """A client of llama.cpp's server, and one of the rdpo server whose teacher and judge are there."""
    there, here = free_port(), free_port()
    [gguf] = (FIXTURES.parent.parent / "models/smollm2-135m-instruct").glob("*.gguf")
    # All log-probs, or it refuses to give any.
    command = [PYTHON, "-m", "llama_cpp.server", "--model", gguf, "--port", there, "--n_ctx", 2048, "--logits_all", "true"]
    processes = [start(command, "llama-cpp", there)]
    far = f'backend = "remote", model = "small", url = "http://127.0.0.1:{there}/v1", max_concurrency = 1'
    (WORK / "far.toml").write_text(f"""
[models.one]
path = "{FIXTURES / "tiny-llama"}"
[roles]
teacher = {{ {far} }}
student = {{ model = "one" }}
reward = {{ kind = "judge", {far} }}
[kv_cache]
memory = "16MiB"
[store]
path = "{WORK / "far/rdpo.sqlite"}"
[adapters]
path = "{WORK / "far/adapters"}"
""")
    try:
        processes.append(start([BINARY, "serve", "--config", WORK / "far.toml", "--port", here], "far", here))
        yield tuple(OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120) for port in (there, here))
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)


def ask(client, model, **fields):
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    return client.chat.completions.create(model=model, messages=turns, max_tokens=12, temperature=0, **fields)


def test_its_answer_comes_under_our_name(servers):
    there, here = servers
    whole, ours = ask(there, "small"), ask(here, "teacher")
    assert ours.choices[0].message.content == whole.choices[0].message.content and ours.model == "teacher"
    assert ours.usage.completion_tokens == whole.usage.completion_tokens > 3
    chunks = list(ask(here, "teacher", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {"teacher"} and chunks[-1].choices[0].finish_reason


def test_it_judges_by_its_likeliest_tokens(servers):
    body = {"prompt": "What is the capital of France?", "responses": ["Paris.", "Paris.", "Bananas."], "behavior": RATE}
    same, again, other = (one["score"] for one in servers[1].post("/score", body=body, cast_to=object)["data"])
    assert 1 <= other <= 5 and 1 <= same <= 5 and same == pytest.approx(again, abs=1e-3) and same != other


def test_a_job_is_taught_and_judged_there(servers):
    client = servers[1]
    get = lambda: client.get(f"/rdpo/train/{job['id']}", cast_to=object)
    job = client.post("/rdpo/train", cast_to=object, body={
        "behavior": RATE, "prompts": [f"What is {n} and {n}?" for n in range(6)], "synthesis": {"max_tokens": 24}, "lora": {"r": 2},
        "training": {"max_steps": 2, "batch_size": 2}, "seed": 1,
    })
    until("the job is over", lambda: get()["status"] in ("succeeded", "failed", "cancelled"), seconds=240)
    job = get()
    assert job["status"] == "succeeded", job
    assert job["result"]["training"]["steps"] == 2 and client.models.retrieve("student@1")
