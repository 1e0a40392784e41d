"""vLLM's sampling fields and several answers at once, on the real model."""

import uuid

import openai
import pytest
from conftest import metric

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = "The following is a long introduction to the history of France. " * 12


def ask(client, messages=QUESTION, **fields):
    known = {"model": "student", "messages": messages, "max_tokens": 12, "temperature": 0}
    extra = {key: fields.pop(key) for key in list(fields) if key in EXTRA}
    return client.chat.completions.create(**{**known, **fields}, extra_body=extra)


EXTRA = {"bad_words", "allowed_token_ids", "truncate_prompt_tokens", "priority", "best_of", "ignore_eos", "min_tokens", "stop_token_ids", "echo",
         "continue_final_message", "add_generation_prompt", "return_token_ids", "prompt_logprobs", "cache_salt", "documents", "chat_template",
         "reasoning_effort", "add_special_tokens", "skip_special_tokens", "chat_template_kwargs", "truncation_side", "include_stop_str_in_output"}


def unseen():
    """A long conversation that shares no block with any before it."""
    return [{"role": "system", "content": uuid.uuid4().hex}, {"role": "user", "content": LONG}]


def text(reply):
    return reply.choices[0].message.content


def tokens(client, text):
    return client.post("/../tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=object)["tokens"]


def test_n_answers_compute_the_prompt_once(real):
    def computed():
        return metric("real", "rdpo_prompt_tokens_total") - metric("real", "rdpo_prompt_tokens_cached_total")

    messages = unseen()
    before = computed()
    reply = ask(real, messages, n=8, temperature=1, seed=1)
    prompt, spent = reply.usage.prompt_tokens, computed() - before
    # What is left of the last block is computed by each.
    assert prompt > 150 and prompt <= spent <= prompt + 7 * 16, (prompt, spent)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0, "what they found of each other's is not cached"
    assert reply.usage.completion_tokens > 8
    again = ask(real, messages, n=2, temperature=1, seed=1)
    assert again.usage.prompt_tokens_details.cached_tokens >= prompt - 16
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in reply.choices[:2]]


def test_a_salt_keeps_the_cache_apart(real):
    messages = unseen()
    cached = lambda **fields: ask(real, messages, **fields).usage.prompt_tokens_details.cached_tokens
    assert cached(cache_salt="a") == 0 and cached(cache_salt="a") > 150
    assert cached(cache_salt="b") == 0 and cached() == 0 and cached() > 150


def test_the_best_of_several_is_the_likeliest(real):
    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    fields = {"model": "student", "prompt": "My favourite animal is", "max_tokens": 8, "temperature": 1.5, "seed": 5, "logprobs": 0}
    every = real.completions.create(n=6, **fields)
    best = real.completions.create(n=2, best_of=6, **fields)
    ranked = sorted(every.choices, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage.completion_tokens == every.usage.completion_tokens, "all that was generated is counted"
    plain = real.completions.create(best_of=6, **{**fields, "logprobs": None})
    assert plain.choices[0].text == ranked[0].text and plain.choices[0].logprobs is None
    chat = ask(real, best_of=3, temperature=1.5, seed=5)
    assert len(chat.choices) == 1 and chat.choices[0].logprobs is None
    for wrong in [{"best_of": 1, "n": 2}, {"best_of": 129}, {"best_of": 3, "stream": True}]:
        with pytest.raises(openai.BadRequestError) as refused:
            real.completions.create(**{**fields, **wrong})
        assert refused.value.param == "best_of"


def test_two_prompts_with_best_of_and_echo(real):
    reply = real.completions.create(model="student", prompt=["One two", "Three four five"], n=2, best_of=3, max_tokens=3, temperature=1,
                                    seed=1, echo=True, logprobs=1)
    assert [choice.text.startswith(start) for choice, start in zip(reply.choices, ["One two"] * 2 + ["Three four five"] * 2)] == [True] * 4
    for choice in reply.choices:
        assert choice.logprobs.token_logprobs[0] is None and all(value is not None for value in choice.logprobs.token_logprobs[1:])


def test_bad_words_do_not_come(real):
    assert "Paris" in text(ask(real))
    for words in [["Paris"], [" Paris", "capital"]]:
        without = text(ask(real, bad_words=words, max_tokens=40))
        assert all(word.strip() not in without for word in words), without
    # Of several tokens only the run is forbidden.
    assert "capital" in text(ask(real, bad_words=["capital of Germany"]))
    for wrong in [[""], ["  "]]:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(real, bad_words=wrong)
        assert refused.value.param == "bad_words"


def test_only_allowed_tokens_come(real):
    ids = tokens(real, " yes no maybe")
    reply = ask(real, allowed_token_ids=ids, temperature=1, return_token_ids=True)
    assert set(reply.choices[0].token_ids) <= set(ids) and reply.choices[0].finish_reason == "length"
    for wrong in [[], [10**6]]:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(real, allowed_token_ids=wrong)
        assert refused.value.param == "allowed_token_ids"


def test_the_prompts_end_is_kept(real, tiny):
    whole = ask(real, return_token_ids=True)
    kept = ask(real, truncate_prompt_tokens=5, return_token_ids=True)
    assert kept.prompt_token_ids == whole.prompt_token_ids[-5:] and kept.usage.prompt_tokens == 5
    assert ask(real, truncate_prompt_tokens=4000).usage.prompt_tokens == whole.usage.prompt_tokens
    most = tiny.models.retrieve("student").max_model_len
    too_long = [{"role": "user", "content": "word " * (most + 10)}]
    cut = ask(tiny, too_long, truncate_prompt_tokens=-1, max_tokens=2)
    assert cut.usage.prompt_tokens == most - 2
    done = real.completions.create(model="student", prompt=[1, 2, 3, 4], max_tokens=1, extra_body={"truncate_prompt_tokens": 2, "return_token_ids": True})
    assert done.choices[0].prompt_token_ids == [3, 4]
    first = ask(real, truncate_prompt_tokens=5, truncation_side="right", return_token_ids=True)
    assert first.prompt_token_ids == whole.prompt_token_ids[:5]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(real, truncate_prompt_tokens=5, truncation_side="middle")
    assert "truncation_side" in refused.value.message
    for wrong in [0, -2, 10**6]:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(real, truncate_prompt_tokens=wrong)
        assert refused.value.param == "truncate_prompt_tokens"


def test_min_tokens_and_ignore_eos(real):
    short = ask(real, max_tokens=40)
    assert short.choices[0].finish_reason == "stop" and short.usage.completion_tokens < 15
    assert ask(real, max_tokens=40, min_tokens=20).usage.completion_tokens >= 20
    on = ask(real, max_tokens=40, ignore_eos=True)
    assert on.usage.completion_tokens == 40 and on.choices[0].finish_reason == "length"
    # A stop string that ends among the first tokens is text like any other.
    stopped = ask(real, max_tokens=40, stop=["capital"])
    assert text(stopped) == "The " and stopped.choices[0].stop_reason == "capital"
    later = ask(real, max_tokens=40, stop=["capital"], min_tokens=4)
    assert text(later).startswith("The capital of France") and later.usage.completion_tokens >= 4


def test_stop_tokens(real):
    [paris] = tokens(real, " Paris")
    reply = ask(real, stop_token_ids=[paris], return_token_ids=True)
    assert reply.choices[0].stop_reason == paris and reply.choices[0].token_ids[-1] == paris and text(reply) == "The capital of France is"
    with_it = ask(real, stop_token_ids=[paris], include_stop_str_in_output=True)
    assert with_it.choices[0].stop_reason == paris and text(with_it) == "The capital of France is Paris"
    whole = ask(real, include_stop_str_in_output=True, skip_special_tokens=False)
    assert text(whole).endswith("<|im_end|>") and text(ask(real, include_stop_str_in_output=True)) == text(ask(real))


def test_going_on_with_the_last_message(real):
    messages = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert text(ask(real, messages, **fields)).startswith(" Paris")
    assert text(ask(real, messages, echo=True, **fields)).startswith("The capital of France is Paris")
    chunks = list(ask(real, messages, echo=True, stream=True, **fields))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text(ask(real, messages, echo=True, **fields))
    assert text(ask(real, echo=True)) == text(ask(real)), "the user's turn is not the assistant's"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(real, messages, continue_final_message=True, add_generation_prompt=True)
    assert refused.value.param == "continue_final_message"


def test_what_the_template_can_read(real):
    show = "{{ mood }}{{ documents | length if documents }}{{ reasoning_effort }}{{ enable_thinking }} {{ messages[0].content }}"
    prompt = lambda **fields: ask(real, chat_template=show, return_token_ids=True, max_tokens=1, **fields).prompt_token_ids
    ids = prompt(documents=[{"text": "x"}], reasoning_effort="high", chat_template_kwargs={"mood": "glad"})
    assert real.post("/../detokenize", body={"tokens": ids}, cast_to=object)["prompt"].startswith("glad1highTrue ")


def test_special_tokens_before_the_prompt(tiny):
    """The model's own BOS is put there where it has one; the tiny one has none, so both are the same."""
    both = [ask(tiny, add_special_tokens=add, return_token_ids=True).prompt_token_ids for add in [True, False]]
    assert both[0][-len(both[1]):] == both[1]


def test_token_ids_in_a_stream(real):
    whole = ask(real, return_token_ids=True)
    chunks = list(ask(real, return_token_ids=True, stream=True))
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    ids = [id for chunk in chunks for choice in chunk.choices for id in (choice.model_extra.get("token_ids") or [])]
    assert ids == whole.choices[0].token_ids
    fields = {"model": "student", "prompt": "One two three", "max_tokens": 4, "temperature": 0}
    chunks = list(real.completions.create(**fields, echo=True, stream=True, extra_body={"return_token_ids": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == real.completions.create(**fields, echo=True).choices[0].text
    assert chunks[0].choices[0].prompt_token_ids == tokens(real, "One two three")


def test_the_prompts_logprobs(real):
    reply = ask(real, n=2, temperature=1, prompt_logprobs=2, seed=1)
    assert len(reply.prompt_logprobs) == reply.usage.prompt_tokens and reply.prompt_logprobs[0] is None
    assert all(2 <= len(entry) <= 3 for entry in reply.prompt_logprobs[1:])
    # The token itself has its place in the vocabulary, however far down.
    assert max(one["rank"] for entry in reply.prompt_logprobs[1:] for one in entry.values()) > 3
    both = real.completions.create(model="student", prompt=["One two", "Three"], n=2, max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert [len(choice.prompt_logprobs) for choice in both.choices] == [len(tokens(real, text)) for text in ["One two"] * 2 + ["Three"] * 2]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(real, prompt_logprobs=1, stream=True)
    assert refused.value.param == "prompt_logprobs"


def test_special_tokens_in_the_text(real):
    shown, hidden = (text(ask(real, max_tokens=20, ignore_eos=True, skip_special_tokens=skip)) for skip in [False, True])
    assert "<|im_end|>" in shown and "<|im_end|>" not in hidden and hidden.startswith("The capital of France is Paris.")


def test_priorities_are_whole_numbers(real):
    """That lower ones go first is tested where the order of steps can be seen, in `tests/it/engine.rs`."""
    assert {text(ask(real, priority=priority)) for priority in [-(2**63), 0, 7]} == {text(ask(real))}
    for wrong in ["high", 1.5, 2**64]:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(real, priority=wrong)
        assert refused.value.param == "priority"
