"""Copies the executables that cargo names on standard input (`--message-format=json`) into a folder, under names of their own and without
what debuggers read, which is most of them. Names after the folder's, if any, are those that are wanted."""

import json
import pathlib
import shutil
import subprocess
import sys

NAMES = {("rdpo", "bin"): "rdpo", ("rdpo", "lib"): "unit", ("it", "test"): "it", ("bench", "bench"): "bench"}
folder, wanted = pathlib.Path(sys.argv[1]), sys.argv[2:] or list(NAMES.values())
folder.mkdir(parents=True, exist_ok=True)
for line in sys.stdin:
    message = json.loads(line)
    executable = message.get("executable")
    name = executable and NAMES.get((message["target"]["name"], message["target"]["kind"][0]))
    # `cargo test` builds the binary's own tests too, which are none.
    if name in wanted and (name != "rdpo" or not message["profile"]["test"]):
        shutil.copy(executable, folder / name)
        if strip := shutil.which("strip"):
            subprocess.run([strip, folder / name], check=True)
        print(folder / name, f"{(folder / name).stat().st_size >> 20} MiB")
