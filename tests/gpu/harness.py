"""What the sections of check.py share: rows of the report, where things are, and processes that end."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The whole, seconds.
WHOLE = 470
# Least time to begin a section in, and most for a question to the driver.
LEAST, ASKED = 5, 30


@dataclasses.dataclass
class Row:
    """A line of the table of docs/gpu.md."""

    check: str
    target: str
    result: str = "not run"
    # Of a check; of a target that is only measured, whether it was met.
    passed: bool | None = None


class Failed(Exception):
    """A check that did not pass; the text is for the report."""


class Bench:
    """What the sections share: where things are, and processes with an end."""

    def __init__(self, arguments, folder):
        self.device, self.shape, self.folder = arguments.device, arguments.shape, folder
        self.binaries, self.python = arguments.binaries.resolve(), sys.executable
        self.on_cpu = self.device == "cpu"
        self.ordinal = "0" if self.on_cpu else self.device.split(":")[1]
        self.end = time.monotonic() + arguments.seconds
        self.facts = {}
        self.notes = []

    def environment(self):
        libraries = [str(path) for name in ("nvidia", "torch") for path in self.site_packages(name)]
        known = os.environ.get("LD_LIBRARY_PATH", "")
        # The CUDA libraries beside torch do for the executables too.
        return os.environ | {"RDPO_TEST_ROOT": str(ROOT), "RDPO_TEST_DEVICE": self.device, "LD_LIBRARY_PATH": ":".join(filter(None, [known, *libraries])),
                             "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "TOKENIZERS_PARALLELISM": "false"}

    @staticmethod
    def site_packages(name):
        found = (pathlib.Path(entry) / name for entry in sys.path if entry)
        return sorted({library.parent for root in found if root.is_dir() for library in root.glob("**/lib/lib*.so*")})

    def budget(self, seconds, later):
        """Until when a section may run: what earlier ones saved is its own too, and the seconds of `later` ones are theirs. Slower on a CPU,
        which has no limit as a whole."""
        now = time.monotonic()
        until = now + 6 * seconds if self.on_cpu else self.end - later
        if until < now + LEAST:
            raise Failed("no time was left")
        return until

    def run(self, command, until, **environment):
        """Standard output and error of a process, which has to succeed in time."""
        process = self.start(command, subprocess.PIPE, subprocess.PIPE, **environment)
        late = False
        try:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            late = True
            stop(process)
            out, err = rest(process)
        finally:
            stop(process)
        if late or process.returncode != 0:
            ended = "was not done in its time" if late else f"ended with {process.returncode}"
            raise Failed(f"`{short(command)}` {ended}:\n{tail(out)}\n{tail(err)}")
        return out, err

    def start(self, command, out, err, **environment):
        command = [str(word) for word in command]
        return subprocess.Popen(command, cwd=ROOT, env=self.environment() | environment, stdout=out, stderr=err, text=True, start_new_session=True)

    def memory_query(self, what):
        return ["nvidia-smi", "-i", self.ordinal, f"--query-gpu=memory.{what}", "--format=csv,noheader,nounits"]

    def memory(self, what):
        """MiB of the GPU's memory that are `used` or `free`."""
        return int(subprocess.run(self.memory_query(what), check=True, capture_output=True, text=True, timeout=ASKED).stdout)

    @contextlib.contextmanager
    def memory_watch(self):
        """A list whose only number will be the most that was in use on the device over what was before, bytes; none on a CPU."""
        found, process = [], None
        if not self.on_cpu:
            query, before = self.memory_query("used"), self.memory("used")
            process = subprocess.Popen([*query, "-lms", "50"], stdout=subprocess.PIPE, text=True)
        try:
            yield found
        finally:
            if process:
                process.terminate()
                seen = [int(line) for line in rest(process)[0].split() if line.isdigit()]
                found.append(max(0, max(seen, default=before) - before) << 20)


def stop(process):
    """Ends a process and what it started."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        # A process that hangs in the driver may not end at all.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def rest(process):
    """What a process that was stopped has said."""
    try:
        out, err = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = "", ""
    return out or "", err or ""


def first_line(process, until):
    """The first line of standard output; nothing where there is none in time."""
    found = []
    reader = threading.Thread(target=lambda: found.append(process.stdout.readline()), daemon=True)
    reader.start()
    reader.join(max(until - time.monotonic(), 0.1))
    return found[0] if found else ""


def short(command):
    return " ".join(pathlib.Path(str(word)).name if "/" in str(word) else str(word) for word in command)[:120]


def tail(text, lines=15):
    return "\n".join(text.strip().splitlines()[-lines:])


def gib(size):
    return f"{size / 2**30:.2f} GiB"
