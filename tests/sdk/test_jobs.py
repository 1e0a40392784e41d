"""Jobs and their parts over HTTP, on the tiny model."""

import json
import time
import urllib.request

import openai
import pytest
from conftest import URLS, metric

BEHAVIOR = {
    "name": "short", "principle": "Be kind.", "critique": "Wrong? {principle}", "revision": "Again.",
    "judge": {"prompt": "Grade 8 to 11. {prompt} / {response}", "min": 8, "max": 11},
}
JOB = {
    "behavior": BEHAVIOR,
    "prompts": ["Hi", "What is up?", "Why?", {"messages": [{"role": "user", "content": "Tell me more"}]}],
    "eval_prompts": ["And then?"],
    "synthesis": {"max_tokens": 12, "temperature": 1.0},
    "lora": {"r": 4, "alpha": 8},
    "training": {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_steps": 2},
    "publish": {"alias": "pupil"},
    "seed": 11,
    "metadata": {"note": "mine"},
}


def post(client, path, body=None):
    return client.post(path, body=body, cast_to=object)


def get(client, path):
    return client.get(path, cast_to=object)


def ended(client, job, seconds=120):
    end = time.monotonic() + seconds
    while (job := get(client, f"/rdpo/train/{job['id']}"))["status"] not in ("succeeded", "failed", "cancelled", "paused"):
        assert time.monotonic() < end, job
        time.sleep(0.05)
    return job


def stream_of(job, **headers):
    """The server-sent events of a job, to their end."""
    request = urllib.request.Request(f"{URLS['tiny']}/v1/rdpo/train/{job['id']}/events", headers={"accept": "text/event-stream", **headers})
    with urllib.request.urlopen(request, timeout=120) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        return reply.read().decode()


@pytest.fixture(scope="module")
def done():
    """A job that went the whole road, followed from its start."""
    client = openai.OpenAI(base_url=URLS["tiny"] + "/v1", api_key="none", max_retries=0)
    job = post(client, "/rdpo/train", JOB)
    assert job["object"] == "rdpo.job" and job["id"].startswith("rdpo-") and job["request"]["loss"]["type"] == "rdpo"
    stream = stream_of(job)
    job = ended(client, job)
    assert job["status"] == "succeeded", job
    return job, stream


def test_a_job_goes_the_whole_road(tiny, done):
    job, _ = done
    assert job["adapter_version"] == 1 and job["request"]["metadata"] == {"note": "mine"}
    assert job["started_at"] >= job["created_at"] and job["finished_at"] >= job["started_at"]
    reply = tiny.completions.create(model="pupil", prompt="Hi", max_tokens=3)
    assert reply.adapter_version == 1
    assert tiny.models.retrieve("pupil@1").adapter_generation == reply.adapter_generation


def test_its_events_are_a_list_and_a_stream(tiny, done):
    job, stream = done
    listed = get(tiny, f"/rdpo/train/{job['id']}/events?limit=1000")
    assert not listed["has_more"]
    blocks = [block for block in stream.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    ids = [int(block.split("\n")[0].removeprefix("id: ")) for block in blocks]
    streamed = [json.loads(block.split("\n")[1].removeprefix("data: ")) for block in blocks]
    assert [event["id"] for event in streamed] == ids == sorted(ids)
    assert streamed == listed["data"]
    stages = [event["data"]["status"] for event in streamed if event["type"] == "status"]
    assert stages == ["queued", "synthesizing", "scoring", "training", "evaluating", "publishing", "succeeded"]
    page = get(tiny, f"/rdpo/train/{job['id']}/events?limit=2&after={ids[0]}")
    assert page["has_more"] and [event["id"] for event in page["data"]] == ids[1:3]
    assert stream_of(job, **{"last-event-id": str(ids[-1])}) == "data: [DONE]\n\n"
    asked = urllib.request.urlopen(f"{URLS['tiny']}/v1/rdpo/train/{job['id']}/events?stream=true").read().decode()
    assert asked == stream


def test_its_pairs_and_report(tiny, done):
    job, _ = done
    pairs = get(tiny, f"/rdpo/train/{job['id']}/pairs")
    assert pairs["data"] and not pairs["has_more"]
    for pair in pairs["data"]:
        # The reward of this server is a tenth of the characters.
        assert pair["score_chosen"] == pytest.approx(len(pair["chosen"]) / 10)
        assert pair["prompt"][-1]["role"] == "user" and pair["chosen"] != pair["rejected"]
    last = pairs["data"][-1]["index"]
    assert get(tiny, f"/rdpo/train/{job['id']}/pairs?after={last}")["data"] == []
    report = get(tiny, f"/rdpo/train/{job['id']}/report")
    assert report["prompts"] == 1 and report["samples"][0]["prompt"] == "And then?"
    assert report == job["result"]["report"]


def test_it_is_listed_without_its_long_parts(tiny, done):
    job, _ = done
    page = get(tiny, "/rdpo/train?limit=100")
    [listed] = [one for one in page["data"] if one["id"] == job["id"]]
    assert "prompts" not in listed["request"] and "samples" not in listed["result"]["report"]
    assert page["first_id"] == page["data"][0]["id"] and page["last_id"] == page["data"][-1]["id"]
    assert get(tiny, f"/rdpo/train?after={page['last_id']}")["data"] == []


def test_ready_pairs_pause_resume_cancel(tiny):
    pairs = [{"prompt": f"Question {n}", "chosen": f"Yes {n}!", "rejected": f"No {n}.", "score_chosen": 2, "score_rejected": 1} for n in range(8)]
    long = {"pairs": pairs, "loss": {"type": "dpo"}, "lora": {"r": 2, "alpha": 4}, "publish": {"when": "never"},
            "training": {"epochs": 2000, "batch_size": 2, "checkpoint_steps": 50, "eval_fraction": 0}}
    job = post(tiny, "/rdpo/train", long)
    assert post(tiny, f"/rdpo/train/{job['id']}/pause")["status"] == "paused"
    with pytest.raises(openai.ConflictError) as again:
        post(tiny, f"/rdpo/train/{job['id']}/pause")
    assert again.value.response.headers["x-should-retry"] == "false"
    assert post(tiny, f"/rdpo/train/{job['id']}/resume", {})["status"] == "queued"
    assert post(tiny, f"/rdpo/train/{job['id']}/cancel")["status"] == "cancelled"
    for verb in ["cancel", "pause", "resume"]:
        with pytest.raises(openai.ConflictError):
            post(tiny, f"/rdpo/train/{job['id']}/{verb}")
    with pytest.raises(openai.NotFoundError) as none:
        get(tiny, f"/rdpo/train/{job['id']}/report")
    assert "cancelled" in none.value.message


@pytest.mark.parametrize("path", ["", "/events", "/events?stream=true", "/pairs", "/report"])
def test_no_such_job(tiny, path):
    with pytest.raises(openai.NotFoundError) as missing:
        get(tiny, "/rdpo/train/rdpo-none" + path)
    assert "rdpo-none" in missing.value.message
    for verb in ["cancel", "pause", "resume"]:
        with pytest.raises(openai.NotFoundError):
            post(tiny, f"/rdpo/train/rdpo-none/{verb}")


@pytest.mark.parametrize("query, param", [
    ("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("after=none", "after"), ("page=2", "page"),
])
def test_bad_queries(tiny, query, param):
    with pytest.raises(openai.BadRequestError) as bad:
        get(tiny, "/rdpo/train?" + query)
    assert bad.value.param == param and query.split("=")[0] in bad.value.message


@pytest.mark.parametrize("change, param", [
    ({"promts": []}, "promts"),
    ({"prompts": []}, "prompts"),
    ({"prompts": "Hi"}, "prompts"),
    ({"prompts": ["Hi", ""]}, "prompts[1]"),
    ({"prompts": ["Hi", 3]}, "prompts[1]"),
    ({"prompts": [{"messages": [{"role": "assistant", "content": "x"}]}]}, "prompts[0].messages[0]"),
    ({"pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}, "prompts"),
    ({"prompts_file": "../secret"}, "prompts"),
    ({"behavior": "kindness"}, "behavior"),
    ({"behavior": {**BEHAVIOR, "critique": ""}}, "behavior.critique"),
    ({"behavior": {**BEHAVIOR, "judge": {"prompt": "x", "min": 1, "max": 2}}}, "behavior.judge.prompt"),
    ({"synthesis": {"rounds": 0}}, "synthesis.rounds"),
    ({"synthesis": {"respond_with": "nobody"}}, "synthesis.respond_with"),
    ({"loss": {"type": "ppo"}}, "loss.type"),
    ({"loss": {"beta": -1}}, "loss.beta"),
    ({"lora": {"r": 0}}, "lora.r"),
    ({"lora": {"target_modules": ["lm_head"]}}, "lora.target_modules[0]"),
    ({"lora": {"init_from": "nothing"}}, "lora.init_from"),
    ({"training": {"epochs": "2"}}, "training.epochs"),
    ({"training": {"activation_memory": "lots"}}, "training.activation_memory"),
    ({"publish": {"alias": "teacher"}}, "publish.alias"),
    ({"publish": {"when": "sometimes"}}, "publish.when"),
    ({"seed": -1}, "seed"),
    ({"metadata": 3}, "metadata"),
])
def test_bad_jobs_name_the_field_and_are_not_stored(tiny, change, param):
    before = get(tiny, "/rdpo/train?limit=1")["first_id"]
    with pytest.raises(openai.APIStatusError) as bad:
        post(tiny, "/rdpo/train", {**JOB, **change})
    assert bad.value.param == param and bad.value.status_code in (400, 404), bad.value
    assert get(tiny, "/rdpo/train?limit=1")["first_id"] == before


def test_a_prompts_file_outside_the_root(tiny):
    with pytest.raises(openai.PermissionDeniedError) as refused:
        post(tiny, "/rdpo/train", {"prompts_file": "../../etc/passwd"})
    assert refused.value.param == "prompts_file"


def test_synthesis_alone(tiny):
    body = {"behavior": BEHAVIOR, "prompts": ["Hi", "Why?"], "synthesis": {"max_tokens": 8, "samples_per_prompt": 2}, "seed": 3}
    reply = post(tiny, "/rdpo/synthesize", body)
    assert [(one["prompt_index"], one["sample"]) for one in reply["data"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert reply["usage"]["completion_tokens"] == sum(one["completion_tokens"] for one in reply["data"]) > 0
    assert post(tiny, "/rdpo/synthesize", body)["data"][0]["revised"] == reply["data"][0]["revised"], "the seed decides"
    for change, param in [({"loss": {}}, "loss"), ({"prompts": []}, "prompts"), ({"synthesis": {"max_tokens": 0}}, "synthesis.max_tokens"), ({"behavior": "x"}, "behavior")]:
        with pytest.raises(openai.BadRequestError) as bad:
            post(tiny, "/rdpo/synthesize", {**body, **change})
        assert bad.value.param == param
    long = post(tiny, "/rdpo/synthesize", {**body, "prompts": ["word " * 2000]})
    assert long["data"][0]["too_long"] and not long["data"][0]["revised"]


def test_behaviors(tiny):
    known = {one["name"]: one for one in get(tiny, "/rdpo/behaviors")["data"]}
    assert {"safety", "role_play_robustness", "sycophancy"} <= set(known)
    assert all("{prompt}" in one["judge"]["prompt"] for one in known.values())


def test_scores_in_every_shape(tiny):
    def score(**body):
        reply = post(tiny, "/score", body)
        assert reply["object"] == "list" and reply["id"].startswith("score-") and reply["model"] == "reward"
        assert [one["index"] for one in reply["data"]] == list(range(len(reply["data"])))
        return [one["score"] for one in reply["data"]]

    turns = [{"role": "user", "content": "Q"}]
    assert score(prompt="Q", response="x" * 30) == [3.0]
    assert score(prompt="Q", responses=["x" * 10, "x" * 20]) == [1.0, 2.0]
    assert score(messages=turns, response="x" * 10) == [1.0]
    assert score(messages=[*turns, {"role": "assistant", "content": "x" * 40}]) == [4.0]
    assert score(text_1="Q", text_2=["x" * 10, "x" * 20]) == [1.0, 2.0]
    assert score(text_1=["Q", "R"], text_2=["x" * 10, "x" * 20]) == [1.0, 2.0]
    assert score(queries="Q", documents="x" * 10) == [1.0]
    assert score(model="reward", prompt="Q", response="x", behavior="safety") == [0.1]
    assert tiny.post(URLS["tiny"] + "/score", body={"prompt": "Q", "response": "x"}, cast_to=object)["data"][0]["score"] == 0.1


def test_a_judge_finds_its_rubric_and_the_question_in_the_cache(real):
    counts = lambda: [metric("real", f"rdpo_prefix_cache_{of}_total") for of in ("hits", "queries")]
    judge = lambda answer: post(real, "/score", {"prompt": "What is the capital of Peru?", "response": answer, "behavior": "safety"})
    judge("Lima.")
    before = counts()
    judge("It is Lima, on the coast of the Pacific.")
    found, tokens = (now - then for now, then in zip(counts(), before))
    # The answer stands in the middle: what the rubric says before it is there already.
    assert tokens / 2 < found < tokens, (found, tokens)


def test_a_judge_prefers_the_better_answer(real):
    body = {"prompt": "What is the capital of France?", "responses": ["Paris.", "Paris.", "I will hurt you."], "behavior": "safety"}
    same, again, bad = (one["score"] for one in post(real, "/score", body)["data"])
    assert same == pytest.approx(again, abs=1e-4) and same > bad


@pytest.mark.parametrize("body, param", [
    ({}, "prompt"),
    ({"prompt": "Q"}, "response"),
    ({"prompt": "Q", "responses": []}, "responses"),
    ({"prompt": "Q", "response": "a", "responses": ["b"]}, "responses"),
    ({"prompt": "Q", "response": 3}, "response"),
    ({"prompt": "Q", "respons": "a"}, "respons"),
    ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
    ({"prompt": "Q", "response": "a", "model": "student"}, "model"),
    ({"prompt": "Q", "response": "a", "behavior": "x"}, "behavior"),
    ({"messages": [{"role": "user", "content": "Q"}]}, "response"),
    ({"prompt": "Q", "responses": ["a"] * 1025}, "responses"),
])
def test_bad_scores(tiny, body, param):
    with pytest.raises(openai.BadRequestError) as bad:
        post(tiny, "/score", body)
    assert bad.value.param == param, bad.value


@pytest.mark.parametrize("when", ["end", "every_checkpoint"])
def test_an_adapter_that_cannot_answer_never_goes_live(tiny, when):
    ready = [{"prompt": f"Question {n}", "chosen": f"Yes {n}!", "rejected": f"No {n}.", "score_chosen": 2, "score_rejected": 1} for n in range(4)]
    body = {"pairs": ready, "publish": {"alias": "broken", "when": when}, "lora": {"r": 2}, "seed": 3,
            "training": {"learning_rate": 1e30, "warmup_ratio": 0, "epochs": 3, "batch_size": 2, "checkpoint_steps": 1, "eval_fraction": 0}}
    job = ended(tiny, post(tiny, "/rdpo/train", body))
    assert job["status"] == "failed" and job["adapter_version"] is None and "finite" in job["error"]["message"], job
    assert "broken" not in {model.id for model in tiny.models.list()}
