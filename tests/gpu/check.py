"""Checks rdpo on a GPU and measures it there beside what people use instead; writes one report. Under 8 minutes.

    make gpu-build                      where Rust and nvcc are: the executables, into build/gpu
    make gpu-check                      where the GPU is: Python with torch, transformers and peft (and trl), no Rust
    tests/gpu/check.py --device cpu --shape tiny        tries the script where there is no GPU; the report says so
    tests/gpu/check.py --without job residence          leaves sections out

Each section has a time budget, to which comes what earlier ones saved, and one that fails does not take the others with it. The report is
written after each. Exit code 0: all passed; 1: something failed, or missed
a target on the card the targets are for; 2: there is no GPU, or something to run is missing.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import sections
from harness import ASKED, ROOT, WHOLE, Bench, Failed, Row

# The card that the targets are for.
TARGET_CARD = "H100"


def facts(bench, device):
    """What the report says about the machine; what cannot be found out does not stop the rest."""
    found = {"device": f"CPU ({platform.machine()} with {os.cpu_count()} threads)", "driver": "none"}

    def fact(find, *names):
        try:
            found.update(zip(names, find()))
        except Exception as error:
            found.update((name, f"not found out ({error})".replace("\n", " ")) for name in names)

    def card():
        query = ["nvidia-smi", "-i", device.split(":")[1], "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        name, memory, driver = subprocess.run(query, check=True, capture_output=True, text=True, timeout=ASKED).stdout.strip().rsplit(", ", 2)
        return f"{name}, {memory}", driver

    def peers():
        import torch

        version = lambda name: f"{name} {importlib.metadata.version(name)}" if installed(name) else f"no {name}"
        return [", ".join([*map(version, ("torch", "transformers", "peft", "trl")), f"CUDA {torch.version.cuda}"])]

    if device != "cpu":
        fact(card, "device", "driver")
    fact(peers, "peers")
    fact(lambda: [bench.run([bench.binaries / "rdpo", "--version"], time.monotonic() + ASKED)[0].strip()], "rdpo")
    return found


def installed(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def why_not(arguments, chosen):
    """What keeps the script from running, if anything does."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; `make gpu-check PYTHON=…` takes another Python"
    if arguments.device != "cpu" and not (torch.cuda.is_available() and shutil.which("nvidia-smi")):
        return "there is no GPU here (torch finds no CUDA device); `--device cpu --shape tiny` tries the script without one"
    beside = {"decode", "training"} & {name for name, *_ in chosen}
    lacking = [name for name in ("transformers", "peft") if beside and not installed(name)]
    if lacking:
        return f"{sys.executable} lacks {' and '.join(lacking)}"
    needed = sorted({binary for _, _, _, binaries, _ in chosen for binary in binaries})
    missing = [name for name in needed if not (arguments.binaries / name).is_file()]
    if missing:
        return f"there is no {' and no '.join(missing)} in {arguments.binaries}: `make gpu-build` makes them"
    return None


def run_sections(bench, chosen, rows, write):
    """Fills in the rows of the sections, by name; a section's failure is in its rows and in `bench.notes`. `write` is told what comes next, so
    that a hang or a kill loses nothing that was there before."""
    for index, (name, section, seconds, *_) in enumerate(chosen):
        print(f"{name} …", flush=True)
        write(name)
        since = time.monotonic()
        try:
            later = sum(seconds for _, _, seconds, *_ in chosen[index + 1 :])
            section(bench, bench.budget(seconds, later), rows[name])
        except Exception as error:
            text = str(error) if isinstance(error, Failed) else traceback.format_exc()
            bench.notes.append(f"**{name}**\n\n```\n{text.strip()}\n```")
            print(text, flush=True)
            reason = text.strip().splitlines()[0 if isinstance(error, Failed) else -1]
            # What was not there yet, or only one side of it.
            for row in rows[name]:
                if row.passed is None and row.result.endswith("not run"):
                    found = row.result.removesuffix("not run").rstrip()
                    row.result, row.passed = f"failed: {reason}{f' ({found} not run)' if found else ''}", False
        print(f"{name}: {time.monotonic() - since:.0f} s", flush=True)


def report(bench, rows, judged, seconds, under_way=None):
    """The report as Markdown. `under_way`: the section that comes next, where it is not the last word."""
    facts = bench.facts
    lines = ["# rdpo on a GPU", ""]
    if bench.on_cpu:
        lines += ["**A trial of the script on a CPU: no figure here says anything about a GPU.**", ""]
    lines += [f"- device: {facts['device']}", f"- driver: {facts['driver']}", f"- peers: {facts['peers']}",
              f"- rdpo: {facts['rdpo']}", f"- shape: {bench.shape}, random weights in bf16",
              f"- took {seconds:.0f} s" if under_way is None else f"- {seconds:.0f} s so far: {under_way} is under way, or was when the script ended", ""]
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
    parser.add_argument("--seconds", type=float, default=WHOLE, help="for all of it, on a GPU")
    names = [name for name, *_ in sections.ALL]
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="SECTION", help=f"sections to run, of {', '.join(names)}")
    parser.add_argument("--without", nargs="*", default=[], choices=names, metavar="SECTION", help="sections to leave out")
    arguments = parser.parse_args()
    chosen = [section for section in sections.ALL if section[0] in arguments.only and section[0] not in arguments.without]
    if reason := why_not(arguments, chosen):
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    # What the sections have started ends with the script.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    since = time.monotonic()
    # Weights of this size are read five times: in memory where there is room.
    memory = pathlib.Path("/dev/shm")
    room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 40 << 30
    with tempfile.TemporaryDirectory(dir=memory if room else None) as folder:
        bench = Bench(arguments, pathlib.Path(folder))
        bench.facts = facts(bench, arguments.device)
        judged = arguments.shape == "llama3-8b" and TARGET_CARD in bench.facts["device"]
        rows = {name: [Row(*row) for row in wanted] for name, *_, wanted in sections.ALL}
        every = [row for own in rows.values() for row in own]

        def write(under_way=None):
            text = report(bench, every, judged, time.monotonic() - since, under_way)
            part = arguments.report.with_name(arguments.report.name + ".part")
            part.write_text(text)
            part.replace(arguments.report)
            return text

        run_sections(bench, chosen, rows, write)
        text = write()
    print(f"\n{text}\nwritten: {arguments.report}")
    failed = [row for row in every if row.passed is False and (judged or row.result.startswith("failed"))]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
