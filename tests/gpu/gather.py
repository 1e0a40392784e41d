"""Copies the executables that cargo names on standard input (`--message-format=json`) into a folder, under names of their own."""

import json
import pathlib
import shutil
import sys

NAMES = {("rdpo", "bin"): "rdpo", ("rdpo", "lib"): "unit", ("it", "test"): "it", ("bench", "bench"): "bench"}
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for line in sys.stdin:
    message = json.loads(line)
    executable = message.get("executable")
    name = executable and NAMES.get((message["target"]["name"], message["target"]["kind"][0]))
    # `cargo test` builds the binary's own tests too, which are none.
    if name and (name != "rdpo" or not message["profile"]["test"]):
        shutil.copy(executable, folder / name)
        print(folder / name)
