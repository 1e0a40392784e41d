//! The serving engine on the tiny models: against a plain causal forward, and against itself under every schedule.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use rdpo::engine::{
    Engine, EngineOptions, Event, EventStream, FinishReason, Gate, Request, SamplingParams, SpeculativeOptions, Task,
    TokenLogprob, Usage,
};
use rdpo::error::Code;
use rdpo::model::{Adapter, Attend, Decoder, LoadOptions, LoraRows, RowGroup, WeightFormat};
use rdpo::ops::{CausalMask, Segment};
use rdpo::text::Tokenizer;
use rdpo::weights::{AdapterFile, Checkpoint};

const ARCHITECTURES: [&str; 4] = ["llama", "qwen2", "qwen3", "gemma3"];
/// Folders of classifiers, the first Qwen 3's.
pub(super) const CLASSIFIERS: [&str; 4] = ["classifier", "classifier-llama", "classifier-qwen2", "classifier-gemma3"];
/// Between the paged and the plain attention, which add in different orders.
const TOLERANCE: f32 = 1e-4;
pub(super) const EOS: u32 = 2;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format!("tiny-{name}"))
}

pub(super) fn options() -> EngineOptions {
    EngineOptions {
        name: "tiny".into(),
        block_size: 4,
        kv_memory_bytes: 1 << 20,
        max_batch_tokens: 64,
        max_sequences: 8,
        max_waiting: 64,
        max_model_len: None,
        prefix_caching: true,
        speculative: SpeculativeOptions::default(),
    }
}

pub(super) fn start(name: &str, options: EngineOptions) -> Engine {
    let checkpoint = Checkpoint::open(&folder(name)).unwrap();
    let load = LoadOptions { device: Device::Cpu, weights: WeightFormat::Float(DType::F32) };
    let model = Arc::new(Decoder::load(&checkpoint, &load).unwrap());
    let tokenizer = Tokenizer::new(checkpoint.tokenizer().unwrap());
    Engine::start(model, Arc::new(tokenizer.unwrap()), Arc::new(Gate::new(0.5)), options).unwrap()
}

/// A pool of so many blocks of the tiny Llama, f32: 2 layers · (k, v) · 4 tokens · 2 heads · 8 values.
pub(super) fn pool_of(blocks: usize) -> usize {
    blocks * 2 * 2 * 4 * 2 * 8 * 4
}

pub(super) fn adapter(engine: &Engine) -> Arc<Adapter> {
    let file = AdapterFile::read(&folder("llama").join("adapter")).unwrap();
    Arc::new(Adapter::from_file(&file, engine.model()).unwrap())
}

fn sequences(name: &str) -> Vec<Vec<u32>> {
    let text = std::fs::read(folder(name).join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_slice(&text).unwrap();
    serde_json::from_value(expected["sequences"].clone()).unwrap()
}

pub(super) fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        logprobs: Some(3),
        ..SamplingParams::default()
    }
}

pub(super) fn sampled(max_tokens: usize, seed: u64) -> SamplingParams {
    SamplingParams { temperature: 0.9, top_p: 0.95, seed: Some(seed), ..greedy(max_tokens) }
}

pub(super) fn request(prompt: &[u32], params: SamplingParams) -> Request {
    Request { prompt: prompt.to_vec(), params, adapter: None, task: Task::Generate, role: "student" }
}

#[derive(Debug, Default, PartialEq)]
pub(super) struct Answer {
    pub(super) ids: Vec<u32>,
    pub(super) text: String,
    logprobs: Vec<TokenLogprob>,
    prompt: Vec<Option<TokenLogprob>>,
    pub(super) reason: Option<FinishReason>,
    pub(super) usage: Usage,
}

impl Answer {
    /// Everything but what the cache had, with the exact bits of the log-probs.
    fn bits(&self) -> (Vec<u32>, String, Vec<u32>, Vec<u32>) {
        let of = |logprob: &TokenLogprob| {
            let mut bits = vec![logprob.logprob.to_bits()];
            bits.extend(logprob.top.iter().flat_map(|(id, logprob)| [*id, logprob.to_bits()]));
            bits
        };
        let prompt = self.prompt.iter().flatten().flat_map(of).collect();
        (self.ids.clone(), self.text.clone(), self.logprobs.iter().flat_map(of).collect(), prompt)
    }
}

pub(super) fn answer(mut stream: EventStream) -> Answer {
    let mut answer = Answer::default();
    loop {
        match stream.blocking_recv().expect("a stream ends with an event") {
            Event::Prompt(logprobs) => answer.prompt = logprobs,
            Event::Token { id, text, logprob } => {
                answer.ids.push(id);
                answer.text.push_str(&text);
                answer.logprobs.extend(logprob);
            }
            Event::Done { text, reason, usage } => {
                answer.text.push_str(&text);
                (answer.reason, answer.usage) = (Some(reason), usage);
                return answer;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

pub(super) fn run(engine: &Engine, request: Request) -> Answer {
    answer(engine.submit(request).unwrap())
}

/// Log-softmax after each token of `ids`, by one causal forward without a cache.
fn plain(model: &Decoder, ids: &[u32], adapter: Option<&Arc<Adapter>>) -> Vec<Vec<f32>> {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    let mask = CausalMask::new(vec![Segment { start: 0, len: ids.len(), prefix: 0..0 }], positions.clone());
    let groups = [RowGroup { start: 0, len: ids.len(), adapter: adapter.cloned() }];
    let lora = if adapter.is_some() { LoraRows::Served(&groups) } else { LoraRows::Base };
    let hidden = model.forward(ids, &positions, Attend::Causal(&mask), lora).unwrap();
    let rows: Vec<Vec<f32>> = model.logits(&hidden).unwrap().to_vec2().unwrap();
    rows.into_iter()
        .map(|row| {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let total = row.iter().map(|logit| f64::from(logit - max).exp()).sum::<f64>().ln() as f32 + max;
            row.iter().map(|logit| logit - total).collect()
        })
        .collect()
}

fn check_greedy(engine: &Engine, prompt: &[u32], adapter: Option<&Arc<Adapter>>) -> Vec<u32> {
    let request = Request { adapter: adapter.cloned(), ..request(prompt, greedy(12)) };
    let got = run(engine, request);
    assert_eq!((got.ids.len(), got.reason.as_ref()), (12, Some(&FinishReason::Length)));
    let all: Vec<u32> = prompt.iter().chain(&got.ids).copied().collect();
    let expected = plain(engine.model(), &all, adapter);
    for (index, logprob) in got.logprobs.iter().enumerate() {
        let row = &expected[prompt.len() - 1 + index];
        let best = row.iter().copied().fold(f32::MIN, f32::max);
        assert!(row[got.ids[index] as usize] > best - TOLERANCE, "token {index} is not the most likely one");
        assert!((row[got.ids[index] as usize] - logprob.logprob).abs() < TOLERANCE);
        assert_eq!((logprob.id, logprob.top.len()), (got.ids[index], 3));
        assert!(logprob.top.iter().all(|(id, logprob)| (row[*id as usize] - logprob).abs() < TOLERANCE));
        assert!(logprob.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
    got.ids
}

#[test]
fn paged_greedy_is_the_plain_forward() {
    for name in ARCHITECTURES {
        let engine = start(name, options());
        for prompt in sequences(name) {
            check_greedy(&engine, &prompt, None);
        }
    }
}

#[test]
fn an_adapter_answers_with_its_own_weights_and_its_own_cache() {
    let engine = start("llama", options());
    let adapter = adapter(&engine);
    let prompt = &sequences("llama")[1];
    let base = check_greedy(&engine, prompt, None);
    let first = run(&engine, Request { adapter: Some(adapter.clone()), ..request(prompt, greedy(12)) });
    assert_eq!(first.usage.cached_tokens, 0, "the base's keys and values are not the adapter's");
    assert_eq!(check_greedy(&engine, prompt, Some(&adapter)), first.ids);
    assert_ne!(first.logprobs, run(&engine, request(prompt, greedy(12))).logprobs);
    assert_eq!(check_greedy(&engine, prompt, None), base);
}

/// Three requests of different lengths, seeds and adapters.
fn mixed(engine: &Engine, max_tokens: usize) -> Vec<Request> {
    let adapter = adapter(engine);
    let of = |(index, prompt): (usize, &Vec<u32>)| {
        let params = SamplingParams { repetition_penalty: 1.1, ..sampled(max_tokens, 11 + index as u64) };
        Request { adapter: (index == 1).then(|| adapter.clone()), ..request(prompt, params) }
    };
    sequences("llama").iter().enumerate().map(of).collect()
}

fn alone(options: EngineOptions, max_tokens: usize) -> Vec<Answer> {
    let engine = start("llama", options);
    mixed(&engine, max_tokens).into_iter().map(|request| run(&engine, request)).collect()
}

/// Submits while the device is taken, so that all of them are there for the second step.
pub(super) fn together(engine: &Engine, requests: Vec<Request>) -> Vec<Answer> {
    let gate = engine.gate();
    let device = gate.serve();
    let streams: Vec<_> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    drop(device);
    streams.into_iter().map(answer).collect()
}

pub(super) fn assert_same(got: &[Answer], expected: &[Answer]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!(got.bits(), expected.bits());
        assert_eq!(got.reason, expected.reason);
    }
}

#[test]
fn a_batch_of_three_is_three_batches_of_one_to_the_bit() {
    let engine = start("llama", options());
    let got = together(&engine, mixed(&engine, 16));
    assert_same(&got, &alone(options(), 16));
    // Another seed, another text: the comparison is not of constants.
    let other = run(&engine, request(&sequences("llama")[0], sampled(16, 99)));
    assert_ne!(other.ids, got[0].ids);
}

#[test]
fn prompts_in_chunks_are_whole_prompts_to_the_bit() {
    let engine = start("llama", EngineOptions { max_batch_tokens: 3, ..options() });
    assert_same(&together(&engine, mixed(&engine, 10)), &alone(options(), 10));
}

#[test]
fn the_prefix_cache_changes_nothing_but_the_work() {
    let uncached = EngineOptions { prefix_caching: false, ..options() };
    let expected = alone(uncached, 10);
    let engine = start("llama", options());
    for round in 0..2 {
        let got: Vec<Answer> = mixed(&engine, 10).into_iter().map(|request| run(&engine, request)).collect();
        assert_same(&got, &expected);
        // Full blocks of 4 tokens, and the last token of the prompt is always computed.
        let cached: Vec<usize> = got.iter().map(|answer| answer.usage.cached_tokens).collect();
        assert_eq!(cached, if round == 0 { [0, 0, 0] } else { [4, 16, 8] });
    }
    assert!(expected.iter().all(|answer| answer.usage.cached_tokens == 0));
}

#[test]
fn preempted_sequences_end_as_if_they_had_not_been() {
    // 40 tokens of cache for answers that take 21 + 28 + 35.
    let small = EngineOptions { kv_memory_bytes: pool_of(10), ..options() };
    let engine = start("llama", small);
    assert_eq!((engine.stats().total_blocks, engine.max_model_len()), (10, 40));
    let before = rdpo::telemetry::metrics().preemptions_total.get();
    let with_prompt = |mut requests: Vec<Request>| {
        requests.iter_mut().for_each(|request| request.params.prompt_logprobs = Some(1));
        requests
    };
    let got = together(&engine, with_prompt(mixed(&engine, 16)));
    assert!(rdpo::telemetry::metrics().preemptions_total.get() > before, "the pool was large enough");
    let large = start("llama", options());
    let expected: Vec<Answer> =
        with_prompt(mixed(&large, 16)).into_iter().map(|request| run(&large, request)).collect();
    assert_same(&got, &expected);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.free_blocks + stats.cached_blocks), (0, 10));
}

#[test]
fn prompt_logprobs_are_those_of_the_plain_forward() {
    let engine = start("llama", EngineOptions { max_batch_tokens: 7, ..options() });
    let prompt = &sequences("llama")[1];
    let rows = plain(engine.model(), prompt, None);
    for _ in 0..2 {
        let params = SamplingParams { prompt_logprobs: Some(2), ..greedy(0) };
        let got = run(&engine, request(prompt, params));
        assert_eq!((got.ids.len(), got.reason, got.usage.cached_tokens), (0, Some(FinishReason::Length), 0));
        assert_eq!((got.prompt.len(), got.prompt[0].is_none()), (prompt.len(), true));
        for (index, logprob) in got.prompt.iter().enumerate().skip(1) {
            let logprob = logprob.as_ref().unwrap();
            assert_eq!((logprob.id, logprob.top.len()), (prompt[index], 2));
            assert!((logprob.logprob - rows[index - 1][prompt[index] as usize]).abs() < TOLERANCE);
        }
    }
}

#[test]
fn next_token_reads_any_token_and_score_the_score_head() {
    let engine = start("llama", options());
    let prompt = &sequences("llama")[2];
    let row = plain(engine.model(), prompt, None).pop().unwrap();
    let task = Task::NextToken(vec![7, 200, 0]);
    let mut stream = engine.submit(Request { task, ..request(prompt, SamplingParams::default()) }).unwrap();
    let Some(Event::NextToken(values, usage)) = stream.blocking_recv() else { panic!("no answer") };
    for (value, id) in values.iter().zip([7, 200, 0]) {
        assert!((value - row[id]).abs() < TOLERANCE);
    }
    assert_eq!((values.len(), usage.prompt_tokens, usage.completion_tokens), (3, prompt.len(), 0));

    for name in CLASSIFIERS {
        let text = std::fs::read(folder(name).join("expected.json")).unwrap();
        let expected: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let classifier = start(name, options());
        let ask = |ids: &Vec<u32>| {
            let score = Request { task: Task::Score, role: "reward", ..request(ids, SamplingParams::default()) };
            classifier.submit(score).unwrap()
        };
        // All at once: one batch.
        let asked: Vec<_> = sequences(name).iter().map(ask).collect();
        for (index, mut stream) in asked.into_iter().enumerate() {
            let Some(Event::Score(score, _)) = stream.blocking_recv() else { panic!("no score") };
            let wanted = expected["scores"][index].as_f64().unwrap();
            assert!((f64::from(score) - wanted).abs() < f64::from(TOLERANCE), "{name}: {score} is not {wanted}");
        }
    }
    let classifier = start("classifier", options());
    let wrong = [
        engine.submit(Request { task: Task::Score, ..request(prompt, SamplingParams::default()) }),
        classifier.submit(request(prompt, greedy(1))),
    ];
    for result in wrong {
        let error = result.unwrap_err();
        assert_eq!((error.status(), error.param.as_deref()), (400, Some("model")));
    }
}

#[test]
fn a_prompt_that_fills_the_context_is_read() {
    let engine = start("llama", EngineOptions { kv_memory_bytes: pool_of(10), ..options() });
    let prompt = vec![9; 40];
    let got = run(&engine, request(&prompt, greedy(0)));
    assert_eq!((got.usage.prompt_tokens, got.reason), (40, Some(FinishReason::Length)));
    let error = engine.submit(request(&prompt, greedy(1))).unwrap_err();
    assert_eq!((error.code, error.status()), (Code::ContextLengthExceeded, 400));
    let open = run(&engine, request(&prompt[..30], SamplingParams { max_tokens: None, ..greedy(1) }));
    assert_eq!((open.ids.len(), open.reason), (10, Some(FinishReason::Length)), "it goes to the context's end");
}

/// Greedy, with these tokens far ahead of all others.
fn biased(ids: &[(u32, f32)], max_tokens: usize) -> SamplingParams {
    SamplingParams { logit_bias: ids.iter().copied().collect(), ignore_eos: false, ..greedy(max_tokens) }
}

#[test]
fn answers_end_where_they_should() {
    let engine = start("llama", options());
    let prompt = &sequences("llama")[0];
    let ids = engine.tokenizer().encode("a", false).unwrap();
    let [letter] = ids[..] else { panic!("one token") };
    let stops = SamplingParams { stop: vec!["aaa".into()], ..biased(&[(letter, 100.0)], 9) };
    let got = run(&engine, request(prompt, stops.clone()));
    assert_eq!((got.text.as_str(), got.ids.len()), ("", 3));
    assert_eq!(got.reason, Some(FinishReason::Stop { text: Some("aaa".into()), token: None }));
    let kept = run(&engine, request(prompt, SamplingParams { include_stop_str_in_output: true, ..stops }));
    assert_eq!(kept.text, "aaa");
    let held = SamplingParams { stop: vec!["aaab".into()], ..biased(&[(letter, 100.0)], 5) };
    let got = run(&engine, request(prompt, held));
    assert_eq!((got.text.as_str(), got.reason), ("aaaaa", Some(FinishReason::Length)), "held text comes at the end");

    let end = biased(&[(EOS, 100.0), (letter, 90.0)], 9);
    let got = run(&engine, request(prompt, end.clone()));
    assert_eq!((got.text.as_str(), got.ids.as_slice()), ("", [EOS].as_slice()));
    assert_eq!(got.reason, Some(FinishReason::Stop { text: None, token: None }));
    let later = run(&engine, request(prompt, SamplingParams { min_tokens: 4, ..end.clone() }));
    assert_eq!((later.text.as_str(), later.ids.len()), ("aaaa", 5));
    let never = run(&engine, request(prompt, SamplingParams { ignore_eos: true, ..end }));
    assert_eq!((never.ids.len(), never.reason), (9, Some(FinishReason::Length)));
    let by_id = SamplingParams { stop_token_ids: vec![letter], ..biased(&[(letter, 100.0)], 9) };
    let got = run(&engine, request(prompt, by_id));
    assert_eq!(got.reason, Some(FinishReason::Stop { text: None, token: Some(letter) }));
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_dropped_stream_gives_its_blocks_back() {
    let engine = start("llama", options());
    let mut stream = engine.submit(request(&sequences("llama")[1], greedy(900))).unwrap();
    assert!(matches!(stream.blocking_recv(), Some(Event::Token { .. })));
    drop(stream);
    wait_until("cancelled", || {
        let stats = engine.stats();
        stats.running == 0 && stats.free_blocks + stats.cached_blocks == stats.total_blocks
    });
}

/// A client goes away in the middle of a long prompt: the rest of it is not read, and the next client is served at once.
#[test]
fn a_client_that_leaves_in_its_prompt_is_gone_by_the_next_step() {
    let engine = start("llama", EngineOptions { max_batch_tokens: 4, ..options() });
    let gate = engine.gate();
    let prompt: Vec<u32> = (0..400).map(|at| at * 7 % 90 + 3).collect();
    let mut stream = engine.submit(request(&prompt, greedy(1))).unwrap();
    wait_until("a chunk was read", || engine.stats().free_blocks < engine.stats().total_blocks);
    let device = gate.serve();
    assert!(stream.try_recv().is_err(), "a hundred steps of four tokens were over at once");
    drop(stream);
    let mut probe = engine.submit(request(&[5, 6, 7], greedy(1))).unwrap();
    drop(device);
    assert!(matches!(probe.blocking_recv(), Some(Event::Token { .. })));
    wait_until("both are gone", || engine.stats().running == 0);
    let stats = engine.stats();
    assert_eq!((stats.waiting, stats.free_blocks + stats.cached_blocks), (0, stats.total_blocks));
    assert!(stats.cached_blocks < prompt.len() / 4, "all of the prompt was read: {stats:?}");
}

/// Many clients go away while a step computes: the next step is without them, and all their blocks are back.
#[test]
fn clients_that_leave_are_gone_by_the_next_step() {
    let engine = start("llama", options());
    let gate = engine.gate();
    let mut streams: Vec<_> = (0..12u32)
        .map(|at| engine.submit(request(&(at * 20..at * 20 + 15).collect::<Vec<_>>(), sampled(60, 1))).unwrap())
        .collect();
    // Eight run, four wait.
    assert!(matches!(streams[0].blocking_recv(), Some(Event::Token { .. })));
    let device = gate.serve();
    let stays = streams.remove(3);
    drop(streams);
    let mut probe = engine.submit(request(&[5, 6, 7], greedy(1))).unwrap();
    drop(device);
    // Its first token is of the first step that it could be in.
    assert!(matches!(probe.blocking_recv(), Some(Event::Token { .. })));
    assert!(engine.stats().running <= 2 && engine.stats().waiting == 0, "{:?}", engine.stats());
    assert_eq!(answer(stays).ids.len(), 60);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.free_blocks + stats.cached_blocks), (0, stats.total_blocks));
}

/// A job's questions fill their queue and all places; the clients of another role are still let in, and served at once.
#[test]
fn a_full_queue_of_one_role_is_not_anothers() {
    let engine = start("llama", EngineOptions { max_sequences: 2, max_waiting: 3, ..options() });
    let of = |role, max_tokens| Request { role, ..request(&sequences("llama")[0], greedy(max_tokens)) };
    let gate = engine.gate();
    let device = gate.serve();
    let mut flood = Vec::new();
    while let Ok(stream) = engine.submit(of("teacher", 600)) {
        flood.push(stream);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(flood.len() >= 3);
    let quiet = engine.submit(of("student", 3)).unwrap();
    drop(device);
    assert_eq!(answer(quiet).ids.len(), 3);
    let ended = flood.iter_mut().filter_map(|stream| std::iter::from_fn(|| stream.try_recv().ok()).last());
    let ended = ended.filter(|event| matches!(event, Event::Done { .. })).count();
    assert_eq!(ended, 0, "the student did not wait for the end of any");
}

#[test]
fn a_full_queue_is_refused_and_recovers() {
    let engine = start("llama", EngineOptions { max_sequences: 1, max_waiting: 2, ..options() });
    let prompt = &sequences("llama")[0];
    let gate = engine.gate();
    let device = gate.serve();
    let mut streams = vec![engine.submit(request(prompt, greedy(3))).unwrap()];
    wait_until("the first one runs", || engine.stats().waiting == 0);
    streams.extend((0..2).map(|_| engine.submit(request(prompt, greedy(3))).unwrap()));
    let error = engine.submit(request(prompt, greedy(3))).unwrap_err();
    assert_eq!((error.code, error.status()), (Code::RateLimited, 429));
    drop(device);
    assert!(streams.into_iter().map(answer).all(|answer| answer.ids.len() == 3));
    assert_eq!(run(&engine, request(prompt, greedy(3))).ids.len(), 3);
}

#[test]
fn what_was_accepted_is_answered_after_the_last_handle_is_gone() {
    let engine = start("llama", options());
    let stream = engine.submit(request(&sequences("llama")[0], greedy(20))).unwrap();
    drop(engine);
    assert_eq!(answer(stream).ids.len(), 20);
}

#[test]
fn bad_parameters_are_named() {
    let engine = start("llama", options());
    let fails = |field: &str, change: &dyn Fn(&mut Request)| {
        let mut request = request(&[5, 6], SamplingParams::default());
        change(&mut request);
        let error = engine.submit(request).expect_err(field);
        assert_eq!((error.status(), error.param.as_deref()), (400, Some(field)), "{error}");
        assert!(error.message.to_lowercase().contains(field), "{error}");
    };
    for bad in [-0.1, 2.1, f32::NAN] {
        fails("temperature", &|request| request.params.temperature = bad);
        fails("min_p", &|request| request.params.min_p = bad);
    }
    fails("top_p", &|request| request.params.top_p = 0.0);
    fails("top_p", &|request| request.params.top_p = 1.5);
    fails("presence_penalty", &|request| request.params.presence_penalty = -2.5);
    fails("frequency_penalty", &|request| request.params.frequency_penalty = 3.0);
    fails("repetition_penalty", &|request| request.params.repetition_penalty = 0.0);
    fails("logit_bias", &|request| request.params.logit_bias = [(288, 1.0)].into());
    fails("logit_bias", &|request| request.params.logit_bias = [(1, 101.0)].into());
    fails("logprobs", &|request| request.params.logprobs = Some(21));
    fails("prompt_logprobs", &|request| request.params.prompt_logprobs = Some(21));
    fails("stop", &|request| request.params.stop = vec![String::new()]);
    fails("stop", &|request| request.params.stop = vec!["x".into(); 17]);
    fails("stop_token_ids", &|request| request.params.stop_token_ids = vec![288]);
    fails("prompt", &|request| request.prompt.clear());
    fails("prompt", &|request| request.prompt.push(288));
    fails("min_tokens", &|request| (request.params.min_tokens, request.params.max_tokens) = (5, Some(4)));
}

/// With one place: of the two that wait, the one that came later and matters more is answered first.
#[test]
fn lower_priority_goes_first() {
    let engine = start("llama", EngineOptions { max_sequences: 1, ..options() });
    let submit = |priority, max_tokens| {
        let params = SamplingParams { priority, ..greedy(max_tokens) };
        engine.submit(request(&[5, 6, 7], params)).unwrap()
    };
    let (now, mut later, sooner) = (submit(0, 120), submit(5, 120), submit(-1, 3));
    assert_eq!(answer(sooner).ids.len(), 3);
    let before = std::iter::from_fn(|| later.try_recv().ok()).count();
    assert!(before < 120, "the one of higher number was answered before");
    assert_eq!((answer(now).ids.len(), before + answer(later).ids.len()), (120, 120));
}

/// Several answers to one prompt: the blocks that are full are computed by one of them.
#[test]
fn answers_to_one_prompt_share_it() {
    let engine = start("llama", options());
    let prompt: Vec<u32> = (10..40).collect();
    let alone = run(&engine, request(&(50..80).collect::<Vec<_>>(), greedy(4)));
    assert_eq!(alone.usage.cached_tokens, 0);
    let streams: Vec<_> = (0..4).map(|seed| engine.submit(request(&prompt, sampled(6, seed))).unwrap()).collect();
    let mut cached: Vec<usize> = streams.into_iter().map(|stream| answer(stream).usage.cached_tokens).collect();
    cached.sort_unstable();
    assert_eq!(cached, [0, 28, 28, 28], "30 tokens in blocks of 4");
}
