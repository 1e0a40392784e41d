"""The command line against a running server: output and exit codes."""

import json
import os
import pathlib
import re
import subprocess

import pytest
from conftest import URLS

BINARY = os.environ["RDPO_TEST_BINARY"]
WORK = pathlib.Path(os.environ["RDPO_TEST_WORK"])
JOB = {
    "pairs": [{"prompt": f"Question {n}", "chosen": f"Yes {n}!", "rejected": f"No {n}.", "score_chosen": 2, "score_rejected": 1} for n in range(4)],
    "eval_prompts": ["Why?"], "synthesis": {"max_tokens": 8}, "lora": {"r": 2, "alpha": 4},
    "training": {"max_steps": 2, "batch_size": 2},
}


def rdpo(*arguments, server="tiny", code=0, **options):
    """Runs a command; gives its standard output, or its error output where it must fail."""
    environment = {**os.environ, "RDPO_URL": URLS[server], **options.pop("env", {})}
    done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment, cwd=WORK, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def open_closed():
    """The writing end of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_models():
    lines = rdpo("models").splitlines()
    assert {"teacher", "reward", "student:base"} <= {line.split()[0] for line in lines}


def test_chat():
    said = rdpo("chat", "What is the capital of France?", "--temperature", 0, server="real")
    assert said.strip() == "The capital of France is Paris."
    assert "gpt-4" in rdpo("chat", "--model", "gpt-4", "Hi", code=1)


def test_score():
    lines = rdpo("score", "--prompt", "Q", "x" * 10, "x" * 20).splitlines()
    assert [line.split()[0] for line in lines] == ["1.0000", "2.0000"]
    assert "required" in rdpo("score", "--prompt", "Q", code=2)
    assert "student" in rdpo("score", "--model", "student", "--prompt", "Q", "x", code=1)


def test_synthesize():
    out = rdpo("synthesize", "Hi", "--max-tokens", 6, "--seed", 1, "--json")
    sample = json.loads(out)
    assert sample["prompt"] == "Hi" and {"response", "critique", "revised"} <= set(sample)
    assert "── critique ──" in rdpo("synthesize", "Hi", "--max-tokens", 6)
    assert "kindness" in rdpo("synthesize", "Hi", "--behavior", "kindness", code=1)
    assert "prompts" in rdpo("synthesize", code=1)


@pytest.fixture(scope="module")
def job():
    """A job run to its end with `rdpo train`."""
    request = WORK / "job.json"
    request.write_text(json.dumps(JOB))
    out = rdpo("train", "--request", request, "--alias", "typed", "--loss", "dpo", "--seed", 5)
    assert "reward" in out
    return re.search(r"job (rdpo-\w+)", out)[1]


def test_train_and_jobs(job):
    assert re.search(rf"{job}\s+succeeded", rdpo("jobs"))
    shown = json.loads(rdpo("jobs", "show", job))
    assert shown["status"] == "succeeded" and shown["request"]["loss"]["type"] == "dpo" and shown["request"]["seed"] == 5
    assert "training" in rdpo("jobs", "events", job)
    assert rdpo("jobs", "report", job) in rdpo("jobs", "follow", job)
    assert "ended" in rdpo("jobs", "cancel", job, code=1)
    assert "rdpo-none" in rdpo("jobs", "show", "rdpo-none", code=1)


def test_detach_pause_resume_cancel(tmp_path):
    request = tmp_path / "long.json"
    request.write_text(json.dumps({**JOB, "training": {"max_steps": 100000, "epochs": 10000, "batch_size": 2}}))
    job = rdpo("train", "--request", request, "--detach").strip()
    assert rdpo("jobs", "pause", job) == f"{job} paused\n"
    assert rdpo("jobs", "resume", job) == f"{job} queued\n"
    assert rdpo("jobs", "cancel", job) == f"{job} cancelled\n"
    assert "cancelled" in rdpo("jobs", "follow", job, code=1)


def test_export(job, tmp_path):
    out = rdpo("export", "typed", "--out", tmp_path / "peft")
    assert "PEFT" in out and (tmp_path / "peft/adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["r"] == 2
    assert "exists" in rdpo("export", "typed", "--out", tmp_path / "peft", code=1)
    assert "none@3" in rdpo("export", "none@3", "--out", tmp_path / "other", code=1)


def test_config():
    shown = rdpo("config", env={"RDPO_SERVER__API_KEYS": '["hush"]', "RDPO_SERVER__PORT": "1234"})
    assert "port = 1234" in shown and "hush" not in shown
    assert "prot" in rdpo("config", env={"RDPO_SERVER__PROT": "1"}, code=1)
    assert "none.toml" in rdpo("config", "--config", "none.toml", code=1)
    assert "RDPO_SERVER__PORT" in rdpo("config", env={"RDPO_SERVER_PORT": "1"}, code=1)


def test_what_is_not_text_or_not_read_any_more_is_no_panic():
    assert "port = " in subprocess.run([BINARY, "config"], env=os.environb | {b"OTHERS": b"\xff"}, cwd=WORK, capture_output=True, text=True, check=True).stdout
    closed = subprocess.run(f"'{BINARY}' config; echo $? >&2", shell=True, cwd=WORK, stdout=open_closed(), stderr=subprocess.PIPE, text=True)
    assert closed.stderr.strip() == "0"


def test_keys_and_addresses():
    assert "API key" in rdpo("models", server="locked", code=1)
    assert "teacher" in rdpo("models", "--api-key", "sesame", server="locked")
    assert "teacher" in rdpo("models", server="locked", env={"RDPO_API_KEY": "sesame"})
    assert "rdpo serve" in rdpo("models", "--url", "http://127.0.0.1:9", code=3)
    assert "http://" in rdpo("models", "--url", "nowhere", code=1)
    rdpo("no-such-command", code=2)


def test_a_taken_port_says_so():
    port = URLS["tiny"].rsplit(":", 1)[1]
    settings = WORK / "second.toml"
    settings.write_text((WORK / "tiny.toml").read_text().replace(str(WORK / "tiny"), str(WORK / "second")))
    assert "another program has the port" in rdpo("serve", "--config", settings, "--port", port, code=1)
