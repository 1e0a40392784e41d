"""The peers' side of a measurement, each in a process of its own so that its memory is its own; prints one JSON line.

    peers.py bandwidth DEVICE                                     bytes a second of copying device memory, read and written both counted
    peers.py generate DEVICE MODEL BATCHES NEW_TOKENS PREFILL     transformers: greedy decoding, and one prompt
    peers.py train DEVICE MODEL TEXT PAIRS BATCH PROMPT ANSWER MAX_LENGTH    TRL + PEFT: seconds of each optimizer step
"""

import gc
import json
import pathlib
import resource
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benches/compare"))


def clock_of(device):
    """The time once the device has done what it was asked."""
    import torch

    def clock():
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def peak(device):
    """Most bytes that the process held: what torch had in tensors on a GPU, resident memory on the CPU."""
    import torch

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 if device == "cpu" else torch.cuda.max_memory_allocated()


def bandwidth(device):
    import torch

    size, times = (256 << 20 if device == "cpu" else 4 << 30), []
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, clock = torch.ones_like(source), clock_of(device)
    target.copy_(source)
    for _ in range(10):
        start = clock()
        target.copy_(source)
        times.append(clock() - start)
    return {"bytes_per_s": 2 * size / statistics.median(times)}


def load(device, path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)


def generate(device, path, batches, new_tokens, prefill):
    import compare

    model, clock = load(device, path).eval(), clock_of(device)
    compare.generate(model, (1,), 8, 64, clock)
    return {**compare.generate(model, [int(one) for one in batches.split(",")], int(new_tokens), int(prefill), clock), "peak": peak(device)}


def train(device, path, text, pairs, batch, prompt, answer, max_length):
    import compare
    from transformers import AutoTokenizer

    pairs, batch, max_length = int(pairs), int(batch), int(max_length)
    rows = compare.pairs_of(pathlib.Path(text).read_text(), pairs, int(prompt), int(answer))
    tokenizer = AutoTokenizer.from_pretrained(path)
    clock = clock_of(device)
    try:
        import trl
    except ImportError:
        seconds = plain_steps(load(device, path), tokenizer, rows, batch, max_length, clock)
        return {"peer": "PEFT + torch, 1 pair at a time", "steps": seconds, "peak": peak(device)}
    # Fewer pairs at a time where all of a step do not fit, which the peer's memory then shows.
    for at_once in (batch, batch // 2, batch // 4, 1):
        try:
            seconds = trl_steps(load(device, path), tokenizer, rows, batch, at_once, max_length, device, clock)
            return {"peer": f"TRL {trl.__version__} + PEFT, {at_once} pairs at a time", "steps": seconds, "peak": peak(device)}
        except Exception as error:
            if "out of memory" not in str(error).lower() or at_once == 1:
                raise
            print(f"{at_once} pairs at a time do not fit", file=sys.stderr)
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def trl_steps(model, tokenizer, rows, batch, at_once, max_length, device, clock):
    """Gradient checkpointing, and the reference asked in every step, as rdpo asks it in its first epoch."""
    import compare
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        steps = []

        def on_step_begin(self, *_, **__):
            self.begun = clock()

        def on_step_end(self, *_, **__):
            self.steps.append(clock() - self.begun)

    watch = Watch()
    compare.trl_train(
        model, rows, 1, precompute=False, checkpointing=True, tokenizer=tokenizer, callbacks=[watch], max_length=max_length,
        per_device_train_batch_size=at_once, gradient_accumulation_steps=batch // at_once, use_cpu=device == "cpu",
    )
    return watch.steps


def plain_steps(model, tokenizer, rows, batch, max_length, clock):
    """The same step written out, where TRL is not installed."""
    import compare
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import logsigmoid

    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=compare.LINEARS, task_type="CAUSAL_LM"))
    # A loaded model is in evaluation mode, in which transformers checkpoints nothing.
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    encode = lambda turns, **more: tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **more)["input_ids"]

    def logprob(row, side):
        start = len(encode(row["prompt"], add_generation_prompt=True))
        ids = torch.tensor([encode(row["prompt"] + row[side])[:max_length]], device=model.device)
        logits = model(ids, use_cache=False).logits[0, start - 1 : -1].float()
        return torch.log_softmax(logits, -1).gather(1, ids[0, start:, None]).sum()

    seconds = []
    for first in range(0, len(rows), batch):
        start = clock()
        for row in rows[first : first + batch]:
            with torch.no_grad(), model.disable_adapter():
                reference = logprob(row, "chosen") - logprob(row, "rejected")
            policy = logprob(row, "chosen") - logprob(row, "rejected")
            (-logsigmoid(0.1 * (policy - reference)) / batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - start)
    return seconds


if __name__ == "__main__":
    print(json.dumps({"bandwidth": bandwidth, "generate": generate, "train": train}[sys.argv[1]](*sys.argv[2:])))
