"""What the sections of check.py share: rows of the report, where things are, and processes that end."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The whole, seconds.
WHOLE = 470


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
        self.end = time.monotonic() + WHOLE
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

    def budget(self, seconds):
        """Until when a section may run; slower on a CPU, which has no limit as a whole."""
        return time.monotonic() + 6 * seconds if self.on_cpu else min(time.monotonic() + seconds, self.end)

    def run(self, command, until, **environment):
        """Standard output and error of a process, which has to succeed in time."""
        process = self.start(command, subprocess.PIPE, subprocess.PIPE, **environment)
        try:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise Failed(f"`{short(command)}` was not done in its time") from None
        finally:
            stop(process)
        if process.returncode != 0:
            raise Failed(f"`{short(command)}` ended with {process.returncode}:\n{tail(out)}\n{tail(err)}")
        return out, err

    def start(self, command, out, err, **environment):
        command = [str(word) for word in command]
        return subprocess.Popen(command, cwd=ROOT, env=self.environment() | environment, stdout=out, stderr=err, text=True, start_new_session=True)

    @contextlib.contextmanager
    def memory_watch(self):
        """A list whose only number will be the most that was in use on the device over what was before, bytes; none on a CPU."""
        found, process = [], None
        if not self.on_cpu:
            query = ["nvidia-smi", "-i", self.ordinal, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            before = int(subprocess.run(query, check=True, capture_output=True, text=True).stdout)
            process = subprocess.Popen([*query, "-lms", "50"], stdout=subprocess.PIPE, text=True)
        try:
            yield found
        finally:
            if process:
                process.terminate()
                seen = [int(line) for line in process.communicate()[0].split() if line.isdigit()]
                found.append(max(0, max(seen, default=before) - before) << 20)


def stop(process):
    """Ends a process and what it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def short(command):
    return " ".join(pathlib.Path(str(word)).name if "/" in str(word) else str(word) for word in command)[:120]


def tail(text, lines=15):
    return "\n".join(text.strip().splitlines()[-lines:])


def gib(size):
    return f"{size / 2**30:.2f} GiB"
