"""Adapters over HTTP: load, list, pin, publish, roll back, unload, and what is refused."""

import os
import pathlib
import shutil

import openai
import pytest

FIXTURES = pathlib.Path(os.environ["RDPO_TEST_FIXTURES"])
ROOT = pathlib.Path(os.environ["RDPO_TEST_WORK"]) / "tiny" / "adapters"


@pytest.fixture(autouse=True, scope="module")
def folders():
    """Two adapters that fit, one of another model, one with a key that cannot be honoured."""
    shutil.copytree(FIXTURES / "tiny-llama/adapter", ROOT / "incoming/first")
    second = shutil.copytree(FIXTURES / "tiny-llama/adapter", ROOT / "incoming/second")
    config = second / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 4'))
    shutil.copytree(FIXTURES / "tiny-gemma3/adapter", ROOT / "incoming/other")
    dora = shutil.copytree(FIXTURES / "tiny-llama/adapter", ROOT / "incoming/dora")
    config = dora / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    (ROOT / "incoming/empty").mkdir()


def post(client, route, /, **body):
    return client.post(route, body=body, cast_to=object)


def plain(client, route, /, **body):
    """The text/plain answer of vLLM's two routes."""
    return client.post(route, body=body, cast_to=str)


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_every_reply_says_which_adapter_made_it(tiny, route):
    if "heads" not in {model.id for model in tiny.models.list()}:
        plain(tiny, "/load_lora_adapter", lora_name="heads", lora_path="incoming/first")
    ask = {"chat": {"messages": [{"role": "user", "content": "Hi"}]}, "completions": {"prompt": "Hi"}}[route]
    resource = {"chat": tiny.chat.completions, "completions": tiny.completions}[route]
    for model, version in [("heads", 1), ("student:base", 0)]:
        fields = {"model": model, "max_tokens": 3, "temperature": 0, **ask}
        raw = resource.with_raw_response.create(**fields)
        whole = raw.parse()
        assert whole.adapter_version == version and bool(whole.adapter_generation) == bool(version)
        assert raw.headers["x-adapter-version"] == str(version)
        assert raw.headers.get("x-adapter-generation") == whole.adapter_generation
        with resource.with_streaming_response.create(**fields, stream=True, stream_options={"include_usage": True}) as raw:
            assert raw.headers["x-adapter-version"] == str(version)
            assert raw.headers.get("x-adapter-generation") == whole.adapter_generation
            chunks = list(raw.parse())
        assert len(chunks) >= 2
        said = {(chunk.adapter_version, chunk.adapter_generation, chunk.system_fingerprint) for chunk in chunks}
        assert said == {(version, whole.adapter_generation, whole.system_fingerprint)}


def test_every_response_says_it_too(tiny):
    if "heads" not in {model.id for model in tiny.models.list()}:
        plain(tiny, "/load_lora_adapter", lora_name="heads", lora_path="incoming/first")
    fields = {"model": "heads", "input": "Hi", "max_output_tokens": 3, "temperature": 0}
    raw = tiny.responses.with_raw_response.create(**fields)
    whole = raw.parse()
    assert whole.adapter_version == 1 and whole.adapter_generation
    maker = {"x-adapter-version": "1", "x-adapter-generation": whole.adapter_generation}
    assert maker.items() <= dict(raw.headers).items()
    with tiny.responses.with_streaming_response.create(**fields, stream=True) as raw:
        assert maker.items() <= dict(raw.headers).items()
        carried = [event.response for event in raw.parse() if hasattr(event, "response")]
    assert len(carried) == 3 and all((one.adapter_version, one.adapter_generation) == (1, whole.adapter_generation) for one in carried)
    stored = tiny.responses.retrieve(whole.id)
    assert (stored.adapter_version, stored.adapter_generation) == (1, whole.adapter_generation)


def text(client, model):
    reply = client.completions.create(model=model, prompt="Hello there", max_tokens=12, temperature=0)
    return reply.choices[0].text, reply.adapter_version, reply.adapter_generation


def test_the_life_of_an_adapter(tiny):
    base = text(tiny, "student:base")
    assert base[1:] == (0, None)
    with pytest.raises(openai.NotFoundError):
        text(tiny, "life")
    assert plain(tiny, "/load_lora_adapter", lora_name="life", lora_path="incoming/first") == "Success: LoRA adapter 'life' added successfully."
    first = text(tiny, "life")
    assert first[1] == 1 and first[0] != base[0]
    with pytest.raises(openai.ConflictError) as there:
        plain(tiny, "/load_lora_adapter", lora_name="life", lora_path="incoming/second")
    assert there.value.param == "lora_name" and there.value.response.headers["x-should-retry"] == "false"

    generation = first[2]
    with pytest.raises(openai.ConflictError) as moved:
        post(tiny, "/lora_adapters/life/publish", path="incoming/second", expected_generation="0" * 64)
    assert moved.value.param == "expected_generation" and generation in moved.value.message
    second = post(tiny, "/lora_adapters/life/publish", path="incoming/second", expected_generation=generation)
    assert second["version"] == 2 and second["live"] and second["id"] == "life" and second["generation"] != generation
    assert text(tiny, "life")[1:] == (2, second["generation"])
    assert text(tiny, "life@1") == first

    cards = {model.id: model for model in tiny.models.list() if model.id.startswith("life")}
    assert set(cards) == {"life", "life@1", "life@2"} and cards["life"].parent == "student:base"
    assert cards["life"].adapter_generation == second["generation"]
    assert tiny.models.retrieve("life@1").adapter_version == 1
    listed = tiny.get("/lora_adapters", cast_to=object)
    mine = [card for card in listed["data"] if card["alias"] == "life"]
    assert [(card["id"], card["live"]) for card in mine] == [("life@1", False), ("life", True)]
    assert {one["generation"]: one["aliases"] for one in listed["generations"]}[second["generation"]] == ["life"]
    assert listed["resident_bytes"] > 0 and listed["max_adapters"] == 16

    assert post(tiny, "/lora_adapters/life/rollback")["version"] == 1
    assert text(tiny, "life") == first
    assert tiny.post("/lora_adapters/life/publish", body={"version": 2}, cast_to=object)["generation"] == second["generation"]
    with pytest.raises(openai.ConflictError):
        plain(tiny, "/unload_lora_adapter", lora_name="life", expected_generation=generation)
    assert plain(tiny, "/unload_lora_adapter", lora_name="life") == "Success: LoRA adapter 'life' removed successfully."
    for gone in ["life", "life@1"]:
        with pytest.raises(openai.NotFoundError):
            text(tiny, gone)
    with pytest.raises(openai.NotFoundError):
        plain(tiny, "/unload_lora_adapter", lora_name="life")


def test_one_made_for_another_model_is_taken_with_a_warning(tiny):
    other = shutil.copytree(FIXTURES / "tiny-llama/adapter", ROOT / "incoming/stranger")
    config = other / "adapter_config.json"
    config.write_text(config.read_text().replace('"tiny-llama"', '"HuggingFaceTB/SmolLM2-135M"'))
    said = plain(tiny, "/load_lora_adapter", lora_name="stranger", lora_path="incoming/stranger")
    assert said.startswith("Success: LoRA adapter 'stranger' added successfully. Warning: ") and "`HuggingFaceTB/SmolLM2-135M`" in said
    assert "SmolLM2-135M" in post(tiny, "/lora_adapters/stranger/publish", version=1)["warning"]
    # The folder's name, whoever owns it.
    config.write_text(config.read_text().replace("HuggingFaceTB/SmolLM2-135M", "someone/Tiny-Llama"))
    plain(tiny, "/unload_lora_adapter", lora_name="stranger")
    assert "warning" not in post(tiny, "/lora_adapters/stranger/publish", path="incoming/stranger")
    plain(tiny, "/unload_lora_adapter", lora_name="stranger")


def test_what_does_not_fit_names_the_tensor(tiny):
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        plain(tiny, "/load_lora_adapter", lora_name="wrong", lora_path="incoming/other")
    assert "lora_" in wrong.value.param and wrong.value.code == "unprocessable"
    with pytest.raises(openai.UnprocessableEntityError) as dora:
        plain(tiny, "/load_lora_adapter", lora_name="wrong", lora_path="incoming/dora")
    assert dora.value.param == "use_dora"
    with pytest.raises(openai.NotFoundError):
        tiny.models.retrieve("wrong")


@pytest.mark.parametrize("path, kind", [
    ("/etc", openai.PermissionDeniedError),
    ("../../tiny", openai.PermissionDeniedError),
    ("incoming/../../rdpo.sqlite", openai.PermissionDeniedError),
    ("incoming/none", openai.NotFoundError),
    ("incoming/empty", openai.APIStatusError),
    ("incoming/first/adapter_config.json", openai.APIStatusError),
])
def test_paths_stay_under_the_root(tiny, path, kind):
    with pytest.raises(kind) as refused:
        plain(tiny, "/load_lora_adapter", lora_name="outside", lora_path=path)
    assert refused.value.status_code < 500, refused.value
    with pytest.raises(kind) as refused:
        post(tiny, "/lora_adapters/outside/publish", path=path)
    assert refused.value.status_code < 500


@pytest.mark.parametrize("route, body, status, param", [
    ("load_lora_adapter", {}, 400, "lora_name"),
    ("load_lora_adapter", {"lora_name": "a"}, 400, "lora_path"),
    ("load_lora_adapter", {"lora_name": "", "lora_path": "incoming/first"}, 400, "lora_name"),
    ("load_lora_adapter", {"lora_name": "a/b", "lora_path": "incoming/first"}, 400, "lora_name"),
    ("load_lora_adapter", {"lora_name": "teacher", "lora_path": "incoming/first"}, 400, "lora_name"),
    ("load_lora_adapter", {"lora_name": "a", "lora_path": "incoming/first", "extra": 1}, 400, "extra"),
    ("load_lora_adapter", {"lora_name": "a", "lora_path": "incoming/first", "model": "teacher"}, 400, "model"),
    ("load_lora_adapter", {"lora_name": 3, "lora_path": "x"}, 400, "lora_name"),
    ("unload_lora_adapter", {"lora_name": "none"}, 404, "model"),
    ("lora_adapters/x/publish", {}, 400, "path"),
    ("lora_adapters/x/publish", {"path": "incoming/first", "version": 1}, 400, "path"),
    ("lora_adapters/x/publish", {"version": 7}, 404, "version"),
    ("lora_adapters/x/publish", [], 400, None),
    ("lora_adapters/x/rollback", [], 400, None),
    ("lora_adapters/x/rollback", {}, 404, "model"),
    ("lora_adapters/x/rollback", {"version": -1}, 400, "version"),
])
def test_bad_bodies(tiny, route, body, status, param):
    with pytest.raises(openai.APIStatusError) as refused:
        tiny.post("/" + route, body=body, cast_to=object)
    assert (refused.value.status_code, refused.value.param) == (status, param), refused.value
