"""Checks rdpo on a GPU and measures it there beside what people use instead; writes one report. Under 8 minutes.

    make gpu-build                      where Rust and nvcc are: the executables, into build/gpu
    make gpu-check                      where the GPU is: Python with torch, transformers and peft (and trl), no Rust
    tests/gpu/check.py --device cpu --shape tiny        tries the script where there is no GPU; the report says so

Each section has a time budget, and one that fails does not take the others with it. Exit code 0: all passed; 1: something failed, or missed
a target on the card the targets are for; 2: there is no GPU, or something to run is missing.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback

import sections
from harness import ROOT, Bench, Failed, Row

# The card that the targets are for.
TARGET_CARD = "H100"


def facts(device):
    """What the report says about the machine."""
    version = lambda name: next((f"{name} {importlib.metadata.version(name)}" for _ in [0] if installed(name)), f"no {name}")
    found = {"device": f"CPU ({platform.machine()} with {os.cpu_count()} threads)", "driver": "none"}
    if device != "cpu":
        query = ["nvidia-smi", "-i", device.split(":")[1], "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        name, memory, driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip().split(", ")
        found = {"device": f"{name}, {memory}", "driver": driver}
    import torch

    found["peers"] = ", ".join([*map(version, ("torch", "transformers", "peft", "trl")), f"CUDA {torch.version.cuda}"])
    return found


def installed(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def why_not(arguments):
    """What keeps the script from running, if anything does."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; `make gpu-check PYTHON=…` takes another Python"
    if arguments.device != "cpu" and not (torch.cuda.is_available() and shutil.which("nvidia-smi")):
        return "there is no GPU here (torch finds no CUDA device); `--device cpu --shape tiny` tries the script without one"
    lacking = [name for name in ("transformers", "peft") if not installed(name)]
    if lacking:
        return f"{sys.executable} lacks {' and '.join(lacking)}"
    missing = [name for name in ("rdpo", "it", "unit", "bench") if not (arguments.binaries / name).is_file()]
    if missing:
        return f"there is no {' and no '.join(missing)} in {arguments.binaries}: `make gpu-build` makes them"
    return None


def run_sections(bench, chosen):
    """Rows of every section; a section's failure is in its rows and in `bench.notes`."""
    rows = []
    for name, section, seconds, wanted in sections.ALL:
        own = [Row(*row) for row in wanted]
        rows += own
        if chosen and name not in chosen:
            continue
        print(f"{name} …", flush=True)
        since = time.monotonic()
        try:
            if since >= bench.end and not bench.on_cpu:
                raise Failed("no time was left")
            section(bench, bench.budget(seconds), own)
        except Exception as error:
            text = str(error) if isinstance(error, Failed) else traceback.format_exc()
            bench.notes.append(f"**{name}**\n\n```\n{text.strip()}\n```")
            print(text, flush=True)
            for row in own:
                if row.result == "not run":
                    row.result, row.passed = f"failed: {text.strip().splitlines()[0 if isinstance(error, Failed) else -1]}", False
        print(f"{name}: {time.monotonic() - since:.0f} s", flush=True)
    return rows


def report(bench, rows, judged, seconds):
    """The report as Markdown."""
    facts = bench.facts
    lines = ["# rdpo on a GPU", ""]
    if bench.on_cpu:
        lines += ["**A trial of the script on a CPU: no figure here says anything about a GPU.**", ""]
    lines += [f"- device: {facts['device']}", f"- driver: {facts['driver']}", f"- peers: {facts['peers']}",
              f"- rdpo: {facts['rdpo']}", f"- shape: {bench.shape}, random weights in bf16", f"- took {seconds:.0f} s", ""]
    lines += ["| check | target | device | result |", "|---|---|---|---|"]
    device = facts["device"].split(",")[0]
    for row in rows:
        mark = {True: "", False: " **(missed)**" if judged and not row.result.startswith("failed") else "", None: ""}[row.passed]
        lines.append(f"| {row.check} | {row.target} | {device} | {row.result.replace('|', '/')}{mark} |")
    if bench.notes:
        lines += ["", "## Notes", "", "\n\n".join(bench.notes)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=pathlib.Path, default=ROOT / "build/gpu", help="folder with rdpo, it, unit and bench")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for a trial")
    parser.add_argument("--shape", choices=["llama3-8b", "tiny"], default="llama3-8b")
    parser.add_argument("--report", type=pathlib.Path, default=pathlib.Path("gpu-report.md"))
    parser.add_argument("--only", nargs="*", default=[], help="sections to run, by name")
    arguments = parser.parse_args()
    if reason := why_not(arguments):
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    since = time.monotonic()
    # Weights of this size are read five times: in memory where there is room.
    memory = pathlib.Path("/dev/shm")
    room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 40 << 30
    with tempfile.TemporaryDirectory(dir=memory if room else None) as folder:
        bench = Bench(arguments, pathlib.Path(folder))
        bench.facts = facts(arguments.device)
        bench.facts["rdpo"] = bench.run([bench.binaries / "rdpo", "--version"], time.monotonic() + 60)[0].strip()
        rows = run_sections(bench, arguments.only)
    judged = arguments.shape == "llama3-8b" and TARGET_CARD in bench.facts["device"]
    text = report(bench, rows, judged, time.monotonic() - since)
    arguments.report.write_text(text)
    print(f"\n{text}\nwritten: {arguments.report}")
    failed = [row for row in rows if row.passed is False and (judged or row.result.startswith("failed"))]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
