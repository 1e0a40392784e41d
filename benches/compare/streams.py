"""Streaming clients of an OpenAI-compatible server, light enough to share the machine with it: sockets and lines, no SDK."""

import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request

WORDS = "the river carried small boats past green fields while people on both banks talked about rain bread music and old roads".split()
STREAMS, TOKENS, ROUNDS = (1, 8, 32), 96, 3


async def ask(port, chance):
    """One answer of `TOKENS` tokens; seconds to its first piece."""
    prompt = " ".join(chance.choice(WORDS) for _ in range(24))
    body = json.dumps({
        "model": "teacher", "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0, "stream": True,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    })
    begun, first, usage = time.perf_counter(), None, None
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        assert line, "the stream broke off"
        if not line.startswith(b"data: "):
            continue
        if first is None:
            choices = json.loads(line[6:])["choices"]
            first = time.perf_counter() - begun if choices and choices[0]["delta"].get("content") else None
        elif b'"prompt_tokens"' in line:
            usage = json.loads(line[6:])["usage"]
    writer.close()
    assert usage["completion_tokens"] == TOKENS, usage
    return first


async def rounds(port, streams):
    """Each client asks again as soon as it has its answer. Tokens a second of all, and the median wait for a first piece, ms."""
    async def client(number):
        chance = random.Random(f"{streams}/{number}")
        return [await ask(port, chance) for _ in range(ROUNDS)]

    begun = time.perf_counter()
    waits = [wait for one in await asyncio.gather(*map(client, range(streams))) for wait in one]
    seconds = time.perf_counter() - begun
    return streams * ROUNDS * TOKENS / seconds, 1000 * statistics.median(waits)


def measure(port):
    asyncio.run(ask(port, random.Random("to begin with")))
    found = {}
    for streams in STREAMS:
        speed, wait = asyncio.run(rounds(port, streams))
        found |= {f"{streams} at once, tokens/s": speed, f"{streams} at once, first piece, ms": wait}
    return found


@contextlib.contextmanager
def serving(command):
    """Starts a server on a free port, `command` with that put in for `PORT`, and stops it in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([str(word).replace("PORT", str(port)) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, f"{command[0]} has ended"
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()
