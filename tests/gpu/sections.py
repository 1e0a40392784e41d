"""The sections of check.py: each gets the bench, the time it has to end by, and its rows of the table to fill in."""

import concurrent.futures
import contextlib
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

import shape
from harness import ROOT, Failed, first_line, gib, stop, tail

sys.path.insert(0, str(ROOT / "benches/compare"))
import compare  # noqa: E402

PEERS = pathlib.Path(__file__).with_name("peers.py")
# Tests that compute on the device, by module, and whether they depend on the dtype: the twins of the kernels run both in any case.
DEVICE_TESTS = [("it", ["device::", "parity::"], True), ("unit", ["kernels::cuda::", "engine::pick::"], False)]
# Most seconds that a failed test has by itself.
ALONE = 30
# Trainer against server after a job, the mean in nats a token, in bf16 on a GPU. The largest of some hundred tokens is no measure: a logit of
# 8 to 16 that is rounded the other way is off by 0.06.
MOST_GAP = 0.05
NEW_TOKENS, BATCH, PREFILL = 128, 64, 2048
# The build with mistral.rs on a GPU, which no build with `cuda` can be; and answers at once of it.
MISTRALRS, AT_ONCE = "mistralrs/rdpo", 32
PAIRS, LENGTH, STEPS = 8, 1024, 3
TEXT = ROOT / "LICENSE"
# Of the peer's memory beside the weights, which both hold; what a training run takes beside weights and kept activations, and the least for
# those, bytes.
SHARE, BESIDE, LEAST_MEMORY = 0.6, 5 << 30, 1 << 30


def tests(bench, until, rows):
    """The twins of the kernels and the fixtures of Hugging Face, in each dtype."""
    # The first process finds libraries on a cold disk (cuBLAS is large), and has the driver compile the kernels: not in the time of a test.
    test_process(bench, "unit", ["kernels::cuda::tests::rows", "kernels::cuda::tests::product"], "f32", until)
    todo = []
    for row, dtype in zip(rows, ("bf16", "f32", "f16")):
        if bench.on_cpu and dtype != "f32":
            row.result = "not run: activations on a CPU are f32"
        else:
            todo.append((row, dtype))
    for index, (row, dtype) in enumerate(todo):
        # One that hangs leaves the others their part.
        end = time.monotonic() + (until - time.monotonic()) / (len(todo) - index)
        passed, bad = 0, []
        for binary, names, depends in DEVICE_TESTS:
            if depends or index == 0:
                good, found = run_tests(bench, binary, names, dtype, end)
                passed, bad = passed + good, bad + found
        if not passed and not bad:
            raise Failed(f"no test ran in {dtype}")
        row.passed = not bad
        row.result = f"{passed} passed" if not bad else f"failed: {len(bad)} of {passed + len(bad)}: {', '.join(bad)}"


def run_tests(bench, binary, names, dtype, until):
    """How many passed, and the names of the others with how each ends in a process of its own: after an error that stays with a GPU's context
    everything behind it fails too."""
    listed, _ = bench.run([bench.binaries / binary, *names, "--list", "--format", "terse"], until)
    listed = re.findall(r"^(\S+): test$", listed, re.M)
    # What is left is for those that fail.
    now = time.monotonic()
    ended, said = test_process(bench, binary, names, dtype, now + (until - now) * 2 / 3)
    if not ended:
        raise Failed(f"{binary} in {dtype} ran no test:\n{tail(said)}")
    bad = [name for name in listed if ended.get(name) not in ("ok", "ignored")]
    if bad:
        bench.notes.append(f"**{binary} in {dtype}**\n\n```\n{tail(said, 60)}\n```")
    found = []
    for name in bad:
        how = {None: "did not run", "": "did not end"}.get(ended.get(name), "fails")
        if time.monotonic() >= until:
            found.append(f"{name} ({how}; no time to run it alone)")
            continue
        alone, said = test_process(bench, binary, [name, "--exact"], dtype, min(until, time.monotonic() + ALONE))
        found.append(f"{name} ({how}, {'passes' if alone.get(name) == 'ok' else 'fails too'} alone)")
        if alone.get(name) != "ok":
            bench.notes.append(f"**{name} alone, in {dtype}**\n\n```\n{tail(said, 30)}\n```")
    return sum(result == "ok" for result in ended.values()), found


def test_process(bench, binary, names, dtype, until):
    """How each test ended, by name, and all that was said; what a process had said counts also when it crashes or hangs."""
    file = bench.folder / f"{binary}.log"
    with file.open("w") as out:
        # One at a time: a GPU is one device, and a failure is then its own.
        process = bench.start([bench.binaries / binary, *names, "--test-threads=1"], out, subprocess.STDOUT, RDPO_TEST_DTYPE=dtype)
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            out.write("\nstopped: its time was over\n")
        finally:
            stop(process)
    said = file.read_text(errors="replace")
    # The name is written first, and how it ended when it has.
    return dict(re.findall(r"^test (\S+)(?: - should panic)? \.\.\. (\w*)", said, re.M)), said


@contextlib.contextmanager
def serving(bench, until, name, text, binary="rdpo", kind=None):
    """A server on these settings; `ask(path, body)` gives the reply, or raises with it."""
    folder = bench.folder / name
    folder.mkdir()
    (folder / "rdpo.toml").write_text(
        f'[server]\nport = 0\n[device]\nkind = "{kind or bench.device}"\n[store]\npath = "{folder}/jobs.sqlite"\n'
        f'[adapters]\npath = "{folder}/adapters"\n{text}')
    log = folder / "log"
    with log.open("w") as file:
        process = bench.start([bench.binaries / binary, "serve", "--config", folder / "rdpo.toml"], subprocess.PIPE, file)
    try:
        # A server that does not start says why and ends.
        line = first_line(process, until)
        if "http://" not in line:
            raise Failed(f"the server did not start:\n{tail(log.read_text())}")
        url = line.split()[-1]

        def ask(path, body=None):
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=max(until - time.monotonic(), 0.1)) as answer:
                    text = answer.read().decode()
            except urllib.error.HTTPError as error:
                raise Failed(f"{path}: {error.code} {error.read().decode()}\n{tail(log.read_text())}") from None
            except (TimeoutError, urllib.error.URLError) as error:
                raise Failed(f"{path}: {error}\n{tail(log.read_text())}") from None
            return text if path == "/metrics" else json.loads(text)

        yield ask, log
    finally:
        stop(process)


def chat(ask, model, text="What is the capital of France?"):
    return ask("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0})


def small_model(bench):
    """The folder of the small real model, or of one of its shape, and what to say of that."""
    model = ROOT / "models/smollm2-135m-instruct"
    if list(model.glob("*.gguf")):
        return model, ""
    model = bench.folder / "small"
    if not model.exists():
        shape.write("smollm2-135m", model, ROOT / "tests/fixtures/tiny-llama", "cpu")
    return model, "random weights of its shape (`models/fetch.sh smollm2-135m-instruct` was not run): "


def job(bench, until, rows):
    """A whole job of the small real model over HTTP: synthesis, scores, training, report, swap. Without the model's file, of one of its shape
    with random weights and the fixtures' vocabulary."""
    (row,) = rows
    model, which = small_model(bench)
    _, prompts, _ = compare.demo_work()
    body = {"behavior": "sycophancy", "prompts": prompts[:12], "eval_prompts": prompts[12:14], "synthesis": {"max_tokens": 64, "temperature": 0.3},
            "training": {"epochs": 2, "batch_size": 4, "max_length": 512}}
    with serving(bench, until, "job", f'[models.smollm2]\npath = "{model}"\n[kv_cache]\nmemory = "1GiB"\n') as (ask, log):
        before = chat(ask, "student:base")["choices"][0]["message"]["content"]
        id = ask("/v1/rdpo/train", body)["id"]
        while (found := ask(f"/v1/rdpo/train/{id}"))["status"] not in ("succeeded", "failed", "cancelled", "paused"):
            if time.monotonic() > until:
                raise Failed(f"the job was not done in its time: {found['status']} {found['progress']}")
            time.sleep(0.2)
        if found["status"] != "succeeded":
            raise Failed(f"the job {found['status']}: {found['error']}\n{tail(log.read_text())}")
        adapter, seconds = found["result"]["adapter"], found["result"]["seconds"]
        served = chat(ask, "student")
        if found["adapter_version"] != 1 or not served["choices"][0]["message"]["content"]:
            raise Failed(f"the adapter is not live: {adapter}, {served}")
    mean, largest = adapter["train_serve_logprob_gap_mean"], adapter["train_serve_logprob_gap"]
    # None where a number is not finite.
    row.passed = mean is not None and mean <= MOST_GAP
    row.result = f"{'' if row.passed else 'failed: '}{which}mean gap {mean} nats a token, largest {largest}; " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    bench.notes.append(f"**job**: the base answers: {before!r}; the aligned student: {served['choices'][0]['message']['content']!r}")


def weights(bench, until, _rows):
    """The random checkpoint, once for all that follows. No row of its own."""
    device = "cpu" if bench.on_cpu else bench.device
    shape.write(bench.shape, bench.folder / "model", ROOT / "tests/fixtures/tiny-llama", device)
    if not bench.on_cpu:
        import torch

        torch.cuda.empty_cache()
    if time.monotonic() > until:
        bench.notes.append("**weights** took longer than planned")


def model_of(bench):
    folder = bench.folder / "model"
    if not (folder / "model.safetensors.index.json").is_file():
        raise Failed("the random weights were not written")
    return folder


def peer(bench, until, *words):
    out, _ = bench.run([bench.python, PEERS, words[0], bench.device, *words[1:]], until)
    return json.loads(out.splitlines()[-1])


def decode(bench, until, rows):
    """Decoding against the memory's bandwidth, and beside transformers."""
    bandwidth_row, one_row, batch_row, prefill_row = rows
    folder = model_of(bench)
    rate = peer(bench, until, "bandwidth")["bytes_per_s"]
    bandwidth_row.result = f"{rate / 1e9:.0f} GB/s"
    out, _ = bench.run([bench.binaries / "bench", "engine-run", folder, NEW_TOKENS, "bf16", f"1,{BATCH}", bench.device, PREFILL], until)
    own = compare.read_rates(out)
    _, per_token = shape.size(shape.SHAPES[bench.shape])
    share = own["decode 1"] * per_token / rate
    one_row.passed, one_row.result = share >= 0.7, f"{own['decode 1']:.1f} tok/s, {100 * share:.0f} % ({gib(per_token)} a token)"
    names = [(batch_row, f"decode {BATCH}"), (prefill_row, f"prefill {PREFILL}")]
    for row, name in names:
        row.result = f"{own[name]:.0f} tok/s; transformers not run"
    theirs = peer(bench, until, "generate", folder, f"{BATCH}", NEW_TOKENS, PREFILL)
    for row, name in names:
        row.result, row.passed = f"{own[name]:.0f} tok/s, transformers {theirs[name]:.0f}: {own[name] / theirs[name]:.2f} times", own[name] >= theirs[name]


def training(bench, until, rows):
    """Steps of 8 pairs of 1k tokens a sequence, the reference asked in each, beside TRL + PEFT with gradient checkpointing."""
    time_row, memory_row = rows
    folder, pairs = model_of(bench), PAIRS * STEPS
    # The fixture's tokenizer makes several tokens of a word: the answers are longer than the rest of a sequence, and cut to it.
    words = {"prompt": 30, "answer": 500}
    theirs, said = None, ""
    with bench.memory_watch() as watched:
        try:
            # Half of the time is this project's.
            half = time.monotonic() + (until - time.monotonic()) / 2
            theirs = peer(bench, half, "train", folder, TEXT, pairs, PAIRS, words["prompt"], words["answer"], LENGTH)
        except Failed as error:
            said = str(error)
    # As for this project: what the device shows.
    their_peak = theirs and (watched[0] if watched else theirs["peak"])
    command = [bench.binaries / "bench", "train-run", f"model={folder}", f"device={bench.device}", "dtype=bf16", f"text={TEXT}", f"pairs={pairs}",
               f"batch={PAIRS}", "epochs=2", f"max_length={LENGTH}", *(f"{name}={value}" for name, value in words.items())]
    whole, _ = shape.size(shape.SHAPES[bench.shape])
    if not bench.on_cpu:
        # For kept activations what the target leaves beside optimizer, head and driver; the default is for small machines.
        left = SHARE * (their_peak - whole) - BESIDE if theirs else 0
        command.append(f"memory={max(int(left), LEAST_MEMORY) >> 20}MiB")
    with bench.memory_watch() as watched:
        out, err = bench.run(command, until)
    own_steps = [float(one) for one in re.findall(r"^step \d+/\d+: .* ([\d.]+) s$", err, re.M)]
    ran = json.loads(out.splitlines()[-1])
    # The first step warms up on both sides; from the second epoch on the reference is known.
    (own, later), tokens = map(statistics.median, (own_steps[1:STEPS], own_steps[STEPS:])), ran["tokens"] // len(own_steps)
    own_peak = watched[0] if watched else ran["peak_mb"] << 20
    time_row.result = f"{own:.2f} s ({tokens / own:.0f} tok/s), {later:.2f} s from the second epoch on"
    memory_row.result = gib(own_peak)
    if not theirs:
        time_row.result += "; TRL not run"
        memory_row.result += "; TRL not run"
        raise Failed(said)
    their, share = statistics.median(theirs["steps"][1:]), own_peak / their_peak
    time_row.passed = their >= 2 * own
    time_row.result += f"; {theirs['peer']} {their:.2f} s: {their / own:.2f} and {their / later:.2f} times"
    beside = (own_peak - whole) / (their_peak - whole)
    memory_row.passed = beside <= SHARE
    memory_row.result += (f"; {theirs['peer']} {gib(their_peak)}, of which in tensors {gib(theirs['peak'])}: {100 * share:.0f} %, "
                          f"beside the weights {100 * beside:.0f} %")


def residence(bench, until, rows):
    """Teacher, judge and student of that shape in one server: one copy of the weights, and each answers."""
    (row,) = rows
    whole, _ = shape.size(shape.SHAPES[bench.shape])
    settings = (f'[models.big]\npath = "{model_of(bench)}"\ndtype = "bf16"\n[roles]\nteacher = {{ model = "big" }}\nstudent = {{ model = "big" }}\n'
                'reward = { kind = "judge", model = "big" }\n')
    with serving(bench, until, "residence", settings) as (ask, log):
        for role in ("teacher", "student"):
            chat(ask, role)
        try:
            ask("/v1/chat/completions", {"model": "reward", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]})
        except Failed as error:
            # Random weights read the rubric and give no number; that the judge says so is its answer.
            if "of its probability" not in str(error):
                raise
        metrics = dict(re.findall(r'^rdpo_gpu_memory_bytes\{kind="(\w+)"\} (\d+)$', ask("/metrics"), re.M))
        plan = [line for line in log.read_text().splitlines() if "rdpo::roles::plan" in line]
    held = int(metrics["weights"])
    row.passed = held <= 1.05 * whole
    row.result = f"{'' if row.passed else 'failed: '}{gib(held)} of weights for three roles, one copy is {gib(whole)}; " + ", ".join(
        f"{kind} {gib(int(metrics[kind]))}" for kind in ("kv", "free", "total"))
    bench.notes.append("**residence**, the memory plan\n\n```\n" + "\n".join(line.split("rdpo::roles::plan: ")[-1] for line in plan) + "\n```")


def mistralrs(bench, until, rows):
    """A teacher on mistral.rs: answers of several lengths at once, of which each has its tokens, and a prompt that comes again, of a length that
    ends its prefix cache before the last token."""
    (row,) = rows
    if not (bench.binaries / MISTRALRS).is_file():
        row.result = f"not run: there is no {MISTRALRS} (`make gpu-build GPU_FEATURES=mistralrs-cuda GPU_DIR={bench.binaries}/mistralrs GPU_PARTS=rdpo`)"
        return
    model, which = small_model(bench)
    settings = f'[models.small]\npath = "{model}"\n[roles]\nteacher = {{ backend = "mistralrs", model = "small" }}\nstudent = {{ model = "small" }}\n[kv_cache]\nmemory = "1GiB"\n'
    tokens = 4 if bench.on_cpu else NEW_TOKENS
    # A build with mistral.rs on a GPU has no other use of it.
    with serving(bench, until, "mistralrs", settings, MISTRALRS, "cpu" if bench.on_cpu else "auto") as (ask, _):

        def answer(length):
            body = {"model": "teacher", "prompt": [20 + one % 40 for one in range(length)], "temperature": 0, "max_tokens": tokens, "min_tokens": tokens}
            reply = ask("/v1/completions", body)
            if reply["usage"]["completion_tokens"] != tokens:
                raise Failed(f"{length} tokens were answered with {reply}")
            return reply["choices"][0]["text"]

        again = {answer(161) for _ in range(3)}
        rates = []
        for at_once in (1, 8, AT_ONCE):
            since = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
                list(pool.map(answer, range(30, 30 + at_once)))
            rates.append(f"{at_once * tokens / (time.monotonic() - since):.0f}")
        again.add(answer(161))
    row.passed = len(again) == 1
    row.result = which + (f"{', '.join(rates)} tok/s" if row.passed else f"failed: one prompt has {len(again)} greedy answers: {sorted(again)}")


def tolerances():
    """As the tests name them."""
    text = (ROOT / "tests/it/parity.rs").read_text()
    found = dict(re.findall(r"const (\w+): f32 = ([\d.e-]+);", text))
    return {name: found[name] for name in ("LOGIT_TOLERANCE", "GRADIENT_TOLERANCE", "LOGIT_TOLERANCE_BF16", "GRADIENT_TOLERANCE_BF16")}


LIMITS = tolerances()
# Name, function, seconds, the executables it runs, and its rows: check and target.
ALL = [
    ("tests", tests, 140, ["it", "unit"], [
        ("kernels beside their twins, and the Hugging Face fixtures, bf16",
         f"root mean square of what is off: {LIMITS['LOGIT_TOLERANCE_BF16']} of that of the logits, {LIMITS['GRADIENT_TOLERANCE_BF16']} of the gradients"),
        ("the fixtures in f32", f"logits within {LIMITS['LOGIT_TOLERANCE']}, gradients within {LIMITS['GRADIENT_TOLERANCE']} of the largest"),
        ("the fixtures in f16, on candle's operations", "an eighth of bf16's")]),
    ("job", job, 45, ["rdpo"], [("a job of SmolLM2-135M over HTTP, mean train–serve log-prob gap", f"at most {MOST_GAP} nats a token")]),
    ("weights", weights, 35, [], []),
    ("decode", decode, 85, ["bench"], [
        ("bandwidth of device memory, a copy by torch", ""),
        ("decode, batch 1", "70 % of the bandwidth"),
        (f"decode, batch {BATCH}", "no slower than transformers"),
        (f"prefill, {PREFILL} tokens", "no slower than transformers")]),
    ("training", training, 95, ["bench"], [
        (f"LoRA rDPO step, {PAIRS} pairs × {LENGTH} tokens, time", "half of TRL + PEFT with gradient checkpointing"),
        ("its peak memory", "60 % of TRL + PEFT, beside the weights that both hold")]),
    ("residence", residence, 30, ["rdpo"], [("teacher, judge and student resident together", "one copy of the weights")]),
    ("mistralrs", mistralrs, 35, [], [(f"a teacher on mistral.rs, 1, 8 and {AT_ONCE} answers of {NEW_TOKENS} tokens at once", "all of their tokens; a prompt's answer again")]),
]
