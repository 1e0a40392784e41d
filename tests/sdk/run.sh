#!/usr/bin/env bash
# Starts servers with the release binary and lets clients loose on them: the OpenAI SDK, the command line, schemathesis, promtool.
#   tests/sdk/run.sh                 everything
#   tests/sdk/run.sh test_chat.py    only this (arguments go to pytest; schemathesis then rests)
# Needs Python 3 with venv, the release binary and the small model (`make build model`).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
binary=${CARGO_TARGET_DIR:-$root/target}/release/rdpo
venv=${RDPO_SDK_VENV:-$HOME/.cache/rdpo-sdk-venv}
work=$(mktemp -d)
pids=()

stop() {
    status=$?
    trap - EXIT
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    if [ "$status" -ne 0 ]; then
        for log in "$work"/*.log; do echo "--- $log"; tail -n 30 "$log"; done
    fi
    rm -rf "$work"
    exit "$status"
}
trap stop EXIT

[ -x "$binary" ] || { echo "no $binary: run \`make build\`" >&2; exit 1; }
if ! "$venv/bin/python" -c '' 2>/dev/null; then python3 -m venv "$venv"; fi
if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/installed.txt"
fi

# start NAME: serves $work/NAME.toml on a free port; the address is in $url.
start() {
    : >"$work/$1.out"
    (cd "$root" && exec "$binary" serve --config "$work/$1.toml" --port 0) >"$work/$1.out" 2>"$work/$1.log" &
    pids+=($!)
    for _ in $(seq 600); do
        url=$(sed -n 's/.* listening on //p' "$work/$1.out")
        [ -n "$url" ] && return
        kill -0 "${pids[-1]}" 2>/dev/null || break
        sleep 0.1
    done
    echo "the server \`$1\` did not start" >&2
    exit 1
}

settings() { # NAME MODEL_PATH REWARD
    cat <<TOML
[models.one]
path = "$2"
[roles]
teacher = { model = "one" }
student = { model = "one" }
reward = $3
[store]
path = "$work/$1/rdpo.sqlite"
[adapters]
path = "$work/$1/adapters"
TOML
}

tiny=$root/tests/fixtures/tiny-llama
rules='{ kind = "rules", terms = [{ check = "length", weight = 1.0, per = 10.0 }] }'
{ settings real "$root/models/smollm2-135m-instruct" '{ kind = "judge", model = "one" }'; printf '[server]\ntrust_request_chat_template = true\n[kv_cache]\nmemory = "256MiB"\n'; } >"$work/real.toml"
{ settings tiny "$tiny" "$rules"; printf '[server]\ntrust_request_chat_template = true\n[kv_cache]\nmemory = "16MiB"\nmax_sequences = 16\n'; } >"$work/tiny.toml"
{ settings fuzz "$tiny" "$rules"; printf '[server]\napi_keys = ["sesame"]\n[kv_cache]\nmemory = "16MiB"\n'; } >"$work/fuzz.toml"
{ settings locked "$tiny" "$rules"; printf '[server]\napi_keys = ["sesame"]\nmax_body_bytes = 20000\n[kv_cache]\nmemory = "4MiB"\n'; } >"$work/locked.toml"
start real; export RDPO_TEST_REAL=$url
start tiny; export RDPO_TEST_TINY=$url
start locked; export RDPO_TEST_LOCKED=$url
# Its teacher and its judge are the real server's.
far="backend = \"remote\", model = \"teacher\", url = \"$RDPO_TEST_REAL/v1\""
{ settings remote "$tiny" "{ kind = \"judge\", $far }" | sed "s|^teacher = .*|teacher = { $far }|"; printf '[kv_cache]\nmemory = "16MiB"\n'; } >"$work/remote.toml"
start remote; export RDPO_TEST_REMOTE=$url
# Its teacher and its judge are the small real model on mistralrs.
there='backend = "mistralrs", model = "small"'
{ settings mistral "$tiny" "{ kind = \"judge\", $there }" | sed "s|^teacher = .*|teacher = { $there }|"
  printf '[models.small]\npath = "%s"\n[kv_cache]\nmemory = "16MiB"\n' "$root/models/smollm2-135m-instruct"; } >"$work/mistral.toml"
start mistral; export RDPO_TEST_MISTRAL=$url
export RDPO_TEST_BINARY=$binary RDPO_TEST_WORK=$work RDPO_TEST_FIXTURES=$root/tests/fixtures

cd "$here"
export PYTHONDONTWRITEBYTECODE=1
"$venv/bin/python" -m pytest -p no:cacheprovider -q --durations=5 "$@"
[ $# -eq 0 ] || exit 0

if command -v promtool >/dev/null; then
    for server in "$RDPO_TEST_REAL" "$RDPO_TEST_TINY"; do
        "$venv/bin/python" -c 'import sys, urllib.request; sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1]).read())' "$server/metrics" \
            | promtool check metrics
    done
    echo "promtool check metrics: passed"
elif [ -n "${CI:-}" ]; then
    echo "promtool is not installed: .ci/run installs it" >&2
    exit 1
else
    echo "promtool check metrics: skipped, promtool (Debian package prometheus) is not installed"
fi

# What hooks.py lets the adapter routes load.
mkdir -p "$work/fuzz/adapters/incoming"
cp -r "$tiny/adapter" "$work/fuzz/adapters/incoming/first"
start fuzz
# Not asked: that whatever the description allows is done (it cannot say that one of two fields must be there, or which ids a
# vocabulary has), and that a job has its report at once.
SCHEMATHESIS_HOOKS=hooks "$venv/bin/schemathesis" --config-file "$here/schemathesis.toml" run "$root/openapi.yaml" \
    --url "$url" --header "Authorization: Bearer sesame" --checks all \
    --exclude-checks positive_data_acceptance,ensure_resource_availability --max-response-time 60 --warnings off
