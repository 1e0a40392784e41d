"""The turns of self-critique asked of a running server: answer, critique, revision of each prompt, as a job of the demo asks them."""

import concurrent.futures
import json
import time
import urllib.request

TURNS = ("responses", "critiques", "revisions")


def ask(port, messages, seed, salt):
    body = {"model": "teacher", "messages": messages, "max_tokens": 96, "temperature": 0.3, "seed": seed, "cache_salt": salt, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]


def measure(port, prompts, requests, at_once):
    """Tokens a second of each turn and of all, `at_once` prompts at a time, each turn after the one before; and every token."""
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    speeds, tokens, seconds = {}, [], []
    for turn, name in enumerate(TURNS):
        if turn:
            for talk, request in zip(talks, requests[turn - 1]):
                talk.append({"role": "user", "content": request})
        begun = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
            answers = list(threads.map(lambda at: ask(port, talks[at], 1000 * turn + at, f"{at_once}"), range(len(prompts))))
        seconds.append(time.perf_counter() - begun)
        ids = [answer["token_ids"] for answer in answers]
        speeds[f"{name}, {at_once} at once"] = sum(map(len, ids)) / seconds[-1]
        tokens.append(ids)
        for talk, answer in zip(talks, answers):
            talk.append({"role": "assistant", "content": answer["message"]["content"]})
    speeds[f"all turns, {at_once} at once"] = sum(len(ids) for turn in tokens for ids in turn) / sum(seconds)
    return speeds, tokens
