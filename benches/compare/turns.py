"""The turns of self-critique asked of a running server: answer, critique, revision of each prompt, as a job of the demo asks them."""

import concurrent.futures
import json
import time
import urllib.request

TURNS = ("responses", "critiques", "revisions")


def post(port, path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def ask(port, messages, seed, salt):
    body = {"model": "teacher", "messages": messages, "max_tokens": 96, "temperature": 0.3, "seed": seed, "cache_salt": salt, "return_token_ids": True}
    return post(port, "/v1/chat/completions", body)["choices"][0]


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


def stages(port, prompts):
    """A job's self-critique of all prompts and the judge's scores of both answers: tokens and scores a second, how many prompt tokens
    the prefix cache had, of how many; and the conversations."""
    begun = time.perf_counter()
    samples = post(port, "/v1/rdpo/synthesize", {"behavior": "sycophancy", "prompts": prompts, "synthesis": {"max_tokens": 96}, "seed": 42})["data"]
    written = time.perf_counter()
    pairs = [(sample["prompt"], sample[answer]) for sample in samples for answer in ("response", "revised")]
    asked, answers = zip(*pairs)
    scores = post(port, "/v1/score", {"text_1": asked, "text_2": answers, "behavior": "sycophancy"})["data"]
    speeds = {
        "synthesis, tokens/s": sum(sample["completion_tokens"] for sample in samples) / (written - begun),
        "judge, scores/s": len(scores) / (time.perf_counter() - written),
    }
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as said:
        counted = dict(line.rsplit(" ", 1) for line in said.read().decode().splitlines() if not line.startswith("#"))
    count = lambda what, role: int(counted[f'rdpo_prefix_cache_{what}_total{{role="{role}"}}'])
    cached = {role: (count("hits", role), count("queries", role)) for role in ("teacher", "reward")}
    return speeds, cached, samples
