"""Clients of the servers that `run.sh` started."""

import os
import time
import urllib.request

import openai
import pytest

URLS = {name: os.environ["RDPO_TEST_" + name.upper()] for name in ("real", "tiny", "locked", "remote", "mistral")}


def client_of(name, key="none", **options):
    return openai.OpenAI(base_url=URLS[name] + "/v1", api_key=key, max_retries=0, timeout=120, **options)


@pytest.fixture
def real():
    """The small real model in all three roles; the reward is a judge."""
    return client_of("real")


@pytest.fixture
def tiny():
    """A model of random weights in all three roles; the reward is a tenth of the answer's characters."""
    return client_of("tiny")


@pytest.fixture
def remote():
    """Teacher and judge are the real server's teacher; the student is the model of random weights."""
    return client_of("remote")


@pytest.fixture
def mistral():
    """Teacher and judge are the small real model on mistralrs; the student is the model of random weights."""
    return client_of("mistral")


def metric(server, name):
    """The sum of a metric over its labels."""
    text = urllib.request.urlopen(URLS[server] + "/metrics").read().decode()
    lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
    assert lines, f"no metric {name}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def until(what, holds, seconds=20):
    """Waits until `holds` is true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"still waiting until {what}"
        time.sleep(0.05)
