#!/usr/bin/env python3
"""Many streaming clients at once, some of which go away in the middle; prints a Markdown table and fails if anything went wrong.

    python load.py --binary target/release/rdpo            starts a server with the small model, 64 clients, 5 minutes
    python load.py --url http://127.0.0.1:8080 --minutes 1  loads one that runs and has nothing else to do

Needs the `openai` package (tests/sdk/requirements.txt). Every client asks again as soon as it has its answer. Prompts and answers have
mixed lengths, and answers go on to theirs (`ignore_eos`), so each has a known number of tokens. Exit code 1 on any error, on KV blocks
that are held when all is over, or if memory grows by more than 5 % in the second half: until then the pages of the KV pool are
touched for the first time.
"""

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
import urllib.request

import openai

WORDS = "the river carried small boats past green fields while people on both banks talked about rain bread music and old roads".split()
PROMPT_WORDS, ANSWER_TOKENS = (8, 40, 120, 400), (8, 32, 96, 192)
MOST_GROWTH = 0.05


class Metrics:
    """What `/metrics` says."""

    def __init__(self, url):
        self.url = url + "/metrics"

    def read(self):
        """Every metric, summed over its labels."""
        values = {}
        for line in urllib.request.urlopen(self.url, timeout=30).read().decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values


class Tally:
    """What the clients saw."""

    def __init__(self):
        self.whole = self.left = self.tokens = 0
        self.errors, self.first, self.between = [], [], []


async def ask(client, chance, tally, models):
    words, tokens = chance.choice(PROMPT_WORDS), chance.choice(ANSWER_TOKENS)
    leaves_after = chance.randrange(1, tokens // 2) if chance.random() < 0.1 else None
    prompt = " ".join(chance.choice(WORDS) for _ in range(words))
    begun = last = time.perf_counter()
    pieces, finish, usage = 0, None, None
    stream = await client.chat.completions.create(
        model=chance.choice(models), messages=[{"role": "user", "content": prompt}], max_tokens=tokens, seed=chance.randrange(1 << 30),
        stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )
    async with stream:
        async for chunk in stream:
            usage = chunk.usage or usage
            if not chunk.choices:
                continue
            finish = chunk.choices[0].finish_reason or finish
            if chunk.choices[0].delta.content:
                now = time.perf_counter()
                (tally.between if pieces else tally.first).append(now - last)
                last, pieces = now, pieces + 1
                if pieces == leaves_after:
                    tally.left += 1
                    tally.tokens += pieces
                    return
    if finish != "length" or usage is None or usage.completion_tokens != tokens:
        raise RuntimeError(f"cut off after {time.perf_counter() - begun:.1f} s and {pieces} pieces of {tokens}: {finish}, {usage}")
    tally.whole += 1
    tally.tokens += tokens


async def client_of(url, number, until, tally, models, key):
    chance = random.Random(number)
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=300) as client:
        while time.perf_counter() < until:
            try:
                await ask(client, chance, tally, models)
            except Exception as error:  # noqa: BLE001  whatever it is, it counts
                tally.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)


async def watch(metrics, begun, until, memory):
    """Resident memory every two seconds: (seconds since the start, bytes)."""
    while time.perf_counter() < until:
        values = await asyncio.to_thread(metrics.read)
        memory.append((time.perf_counter() - begun, values["process_resident_memory_bytes"]))
        await asyncio.sleep(2)


async def load(options, url):
    metrics, tally, memory = Metrics(url), Tally(), []
    before = metrics.read()
    begun = time.perf_counter()
    until = begun + 60 * options.minutes
    clients = [client_of(url, number, until, tally, options.models, options.key) for number in range(options.clients)]
    await asyncio.gather(watch(metrics, begun, until, memory), *clients)
    seconds = time.perf_counter() - begun
    for _ in range(100):
        after = metrics.read()
        if after["rdpo_requests_running"] == after["rdpo_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    return tally, memory, seconds, before, after


def percentiles(values):
    ranked = sorted(values) or [float("nan")]
    return [ranked[min(len(ranked) - 1, int(len(ranked) * part))] for part in (0.5, 0.95, 0.99)]


def report(options, tally, memory, seconds, before, after):
    """Prints the table; the complaints."""
    held, running = after["rdpo_kv_cache_usage_ratio"], after["rdpo_requests_running"] + after["rdpo_requests_waiting"]
    settled = [size for at, size in memory if at >= 30 * options.minutes]
    sizes = [size for _, size in memory]
    growth = max(settled[-3:]) / settled[0] - 1 if len(settled) > 3 else None
    counted = {name: int(after[name] - before[name]) for name in ("rdpo_client_disconnects_total", "rdpo_preemptions_total")}
    ms = lambda values: " / ".join(f"{1000 * value:.0f}" for value in percentiles(values))
    mb = lambda size: f"{size / 1e6:.0f}"
    rows = [
        ("clients, seconds", f"{options.clients}, {seconds:.0f}"),
        ("requests answered", tally.whole),
        ("left in the middle (counted by the server)", f"{tally.left} ({counted['rdpo_client_disconnects_total']})"),
        ("errors", len(tally.errors)),
        ("tokens/s received", f"{tally.tokens / seconds:.0f}"),
        ("time to first token, ms, p50 / p95 / p99", ms(tally.first)),
        ("between tokens, ms, p50 / p95 / p99", ms(tally.between)),
        ("preemptions", counted["rdpo_preemptions_total"]),
        ("resident memory, MB, start / middle / end", " / ".join(mb(size) for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))),
        ("growth in the second half", "too short to say" if growth is None else f"{100 * growth:.1f} %"),
        ("share of KV blocks held when idle", f"{held:g}"),
    ]
    print("| | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows))
    complaints = [f"error: {error}" for error in tally.errors[:5]]
    if not tally.whole:
        complaints.append("nothing was answered")
    if held or running:
        complaints.append(f"{held:.2%} of the KV blocks and {running:.0f} requests are still held")
    if growth is not None and growth > MOST_GROWTH:
        complaints.append(f"memory grew by {growth:.1%} in the second half")
    return complaints


def start(options, folder):
    """A server of its own; process and address."""
    with open(f"{folder}/rdpo.toml", "w", encoding="utf-8") as settings:
        settings.write(
            f'[models.one]\npath = "{options.model}"\n[roles]\nteacher = {{ model = "one" }}\nstudent = {{ model = "one" }}\n'
            f'reward = {{ kind = "judge", model = "one" }}\n[store]\npath = "{folder}/rdpo.sqlite"\n[adapters]\npath = "{folder}/adapters"\n'
        )
    server = subprocess.Popen([options.binary, "serve", "--config", f"{folder}/rdpo.toml", "--port", "0"], stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().split()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument("--binary", help="or the program that is to be started")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="its model")
    parser.add_argument("--key", default="none")
    parser.add_argument("--models", nargs="+", default=["student", "teacher"], help="names to ask for")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    options = parser.parse_args()
    if bool(options.url) == bool(options.binary):
        parser.error("give one of --url and --binary")
    with tempfile.TemporaryDirectory() as folder:
        server, url = start(options, folder) if options.binary else (None, options.url)
        try:
            complaints = report(options, *asyncio.run(load(options, url)))
        finally:
            if server:
                server.terminate()
        if server and server.wait(timeout=60) != 0:
            complaints.append(f"the server ended with {server.returncode}")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
