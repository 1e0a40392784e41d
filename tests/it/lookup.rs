//! Prompt lookup: with drafts or without, alone or in company, in a pool too small or large enough, an answer has the same bits.

use std::sync::Arc;

use rdpo::engine::{
    Engine, EngineOptions, FinishReason, Request, SamplingParams, SpeculativeMethod, SpeculativeOptions,
};
use rdpo::telemetry::metrics;
use rdpo::text::{Constraint, Grammar};
use serde_json::json;

use super::engine::{
    Answer, EOS, adapter, assert_same, greedy, options, pool_of, request, run, sampled, start, together,
};

fn off() -> EngineOptions {
    let speculative = SpeculativeOptions { method: SpeculativeMethod::None, ..SpeculativeOptions::default() };
    EngineOptions { speculative, ..options() }
}

fn letters(engine: &Engine) -> [u32; 3] {
    ["a", "b", "c"].map(|letter| engine.tokenizer().encode(letter, false).unwrap()[0])
}

/// Answers that repeat themselves, exactly or nearly, each ending in a way of its own; `role` is what their drafts are counted under.
fn requests(engine: &Engine, role: &'static str) -> Vec<Request> {
    let [a, b, c] = letters(engine);
    let prompt = [a, b, c, b, a, c].repeat(3);
    let few = |seed| SamplingParams { allowed_token_ids: Some(vec![a, b, c]), ..sampled(40, seed) };
    let sure = |max_tokens| SamplingParams { logit_bias: [(a, 100.0)].into(), ..greedy(max_tokens) };
    let form = |constraint, seed| {
        let grammar = Arc::new(Grammar::compile(engine.tokenizer(), constraint).unwrap());
        SamplingParams { grammar: Some(grammar), ignore_eos: false, ..sampled(60, seed) }
    };
    let end =
        SamplingParams { allowed_token_ids: Some(vec![EOS, a]), min_tokens: 9, ignore_eos: false, ..sampled(40, 5) };
    let all = [
        greedy(40),
        few(1),
        SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.4, presence_penalty: 0.2, ..few(2) },
        SamplingParams { bad_words: vec![vec![a, b], vec![c, c]], ..few(3) },
        SamplingParams { stop: vec!["cab".into()], ..few(4) },
        SamplingParams { stop: vec!["aaaaaaa".into()], include_stop_str_in_output: true, ..sure(40) },
        SamplingParams { stop_token_ids: vec![c], min_tokens: 12, ..few(6) },
        SamplingParams { min_p: 0.2, top_k: 2, logprobs: None, ..few(7) },
        sure(13),
        end,
        form(Constraint::Regex("(abc?){5,12}".into()), 8),
        // A special token that is forced, and more than the parser looks ahead.
        form(Constraint::Lark("start: \"ab\" <[1]> \"cd\"".into()), 9),
        form(Constraint::Regex("a{100000}".into()), 10),
    ];
    let adapter = adapter(engine);
    let of = |(index, params)| {
        let adapter = (index % 3 == 1).then(|| adapter.clone());
        Request { adapter, role, ..request(&prompt, params) }
    };
    all.into_iter().enumerate().map(of).collect()
}

fn expected() -> Vec<Answer> {
    let engine = start("llama", off());
    requests(&engine, "undrafted").into_iter().map(|request| run(&engine, request)).collect()
}

fn check(got: &[Answer], expected: &[Answer]) {
    assert_same(got, expected);
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!(got.usage.completion_tokens, expected.usage.completion_tokens);
    }
}

/// Drafts, their tokens, and those of them that were right.
fn counted(role: &str) -> [u64; 3] {
    let metrics = metrics();
    [
        &metrics.spec_decode_num_drafts_total,
        &metrics.spec_decode_num_draft_tokens_total,
        &metrics.spec_decode_num_accepted_tokens_total,
    ]
    .map(|counter| counter.with_label_values(&[role]).get())
}

fn all_blocks_are_back(engine: &Engine) {
    let stats = engine.stats();
    assert_eq!((stats.running, stats.free_blocks + stats.cached_blocks), (0, stats.total_blocks));
}

#[test]
fn drafts_change_no_bit_of_an_answer() {
    let expected = expected();
    assert_eq!(counted("undrafted"), [0; 3]);
    let reasons = expected.iter().filter(|answer| matches!(answer.reason, Some(FinishReason::Stop { .. }))).count();
    assert!((4..10).contains(&reasons), "some end early and some do not: {reasons}");

    let engine = start("llama", options());
    let alone: Vec<Answer> = requests(&engine, "drafted").into_iter().map(|request| run(&engine, request)).collect();
    check(&alone, &expected);
    let [drafts, drafted, right] = counted("drafted");
    assert!(drafts > 20 && drafted > drafts && right > 20 && drafted > right, "{drafts} {drafted} {right}");
    all_blocks_are_back(&engine);

    check(&together(&engine, requests(&engine, "company")), &expected);
    assert!(counted("company")[2] > 0);
    all_blocks_are_back(&engine);
}

#[test]
fn drafts_fit_small_steps_and_small_pools() {
    let expected = expected();
    let preempted = || metrics().preemptions_total.get();
    let before = preempted();
    for (blocks, max_batch_tokens) in [(22, 64), (64, 5), (22, 3)] {
        let options = EngineOptions { kv_memory_bytes: pool_of(blocks), max_batch_tokens, ..options() };
        let engine = start("llama", options);
        check(&together(&engine, requests(&engine, "small")), &expected);
        all_blocks_are_back(&engine);
    }
    assert!(preempted() > before && counted("small")[2] > 0);
}

/// The keys of an object are not chosen: they are drafted, though the text had none before.
#[test]
fn what_a_grammar_forces_is_drafted() {
    let schema = json!({"type": "object", "properties": {"considered": {"type": "boolean"}, "recommended": {"type": "boolean"}},
        "required": ["considered", "recommended"], "additionalProperties": false});
    let ask = |engine: &Engine, role| -> Vec<Answer> {
        let params = |seed| {
            let grammar = Grammar::compile(engine.tokenizer(), Constraint::JsonSchema(schema.clone())).unwrap();
            SamplingParams { grammar: Some(Arc::new(grammar)), ignore_eos: false, ..sampled(200, seed) }
        };
        (0..4).map(|seed| run(engine, Request { role, ..request(&[3, 4, 5], params(seed)) })).collect()
    };
    check(&ask(&start("llama", options()), "forced"), &ask(&start("llama", off()), "unforced"));
    let [drafts, drafted, right] = counted("forced");
    assert!(right > 4 * 15, "{drafts} {drafted} {right}");
}

/// What was drafted and thrown away is in no block that a later prompt finds.
#[test]
fn a_further_turn_finds_only_what_was_written() {
    let (with, without) = (start("llama", options()), start("llama", off()));
    let second = |engine: &Engine| -> Vec<Answer> {
        let requests = requests(engine, "turns");
        let again = |request: Request| {
            let first = run(engine, request.clone());
            let prompt = [&request.prompt[..], &first.ids].concat();
            run(engine, Request { prompt, ..request })
        };
        requests.into_iter().map(again).collect()
    };
    let (got, expected) = (second(&with), second(&without));
    check(&got, &expected);
    assert!(got.iter().all(|answer| answer.usage.cached_tokens > 16));
}

#[test]
fn a_draft_must_have_a_length() {
    for (min, max, most) in [(0, 4, 3), (5, 4, 3), (2, 4, 0), (2, 65, 3)] {
        let options = SpeculativeOptions {
            prompt_lookup_min: min,
            prompt_lookup_max: max,
            num_speculative_tokens: most,
            ..Default::default()
        };
        let error = options.check().unwrap_err();
        assert!(error.param.unwrap().starts_with("speculative_config."));
    }
}
