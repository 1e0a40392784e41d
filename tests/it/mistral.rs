//! The `mistralrs` backend beside the native engine, on the same weights: it is another's forward pass under this server's
//! sampling, so everything but the last digits has to agree.

use std::sync::Arc;

use rdpo::engine::{SamplingParams, Task, Usage};
use rdpo::error::Code;
use rdpo::roles::{
    Answer, Backend, JudgeOptions, ModelOptions, RewardOptions, RoleOptions, Roles, RolesOptions, Seat, Target,
};

use super::hot_swap::{fixture, options, rules};

/// Between two implementations in f32.
const TOLERANCE: f32 = 1e-4;

fn on_mistralrs(model: &str) -> RoleOptions {
    RoleOptions { backend: Backend::Mistralrs, ..RoleOptions::native(model) }
}

/// Teacher and judge on mistralrs, the student here, all of one checkpoint.
fn settings(folder: &tempfile::TempDir) -> RolesOptions {
    let judge = RewardOptions::Judge(JudgeOptions { role: on_mistralrs("again"), rubric: None });
    RolesOptions { teacher: on_mistralrs("tiny"), ..options(folder.path(), judge) }
}

fn ask(target: &Target, prompt: &[u32], params: &SamplingParams) -> Answer {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(target.ask(target.request(prompt.to_vec(), params.clone()))).unwrap()
}

fn agree(here: &Answer, there: &Answer) {
    assert_eq!((&here.text, &here.ids, &here.reason), (&there.text, &there.ids, &there.reason));
    // mistral.rs does not tell what it found in its cache.
    assert_eq!(here.usage, Usage { cached_tokens: 0, ..there.usage });
    assert_eq!(here.logprobs.len(), there.logprobs.len());
    for (here, there) in here.logprobs.iter().zip(&there.logprobs) {
        assert_eq!((here.id, here.top.len()), (there.id, there.top.len()));
        assert!((here.logprob - there.logprob).abs() < TOLERANCE, "{here:?} {there:?}");
        let gap = here.top.iter().zip(&there.top).map(|(a, b)| (a.1 - b.1).abs()).fold(0.0, f32::max);
        assert!(gap < TOLERANCE, "{here:?} {there:?}");
    }
}

#[test]
fn it_answers_as_the_native_engine_does() {
    let folder = tempfile::tempdir().unwrap();
    let roles = Roles::load(settings(&folder)).unwrap();
    let (there, here) = (roles.teacher().unwrap(), roles.student_base().unwrap());
    assert_eq!(there.max_model_len().unwrap(), here.max_model_len().unwrap());
    let (judge, Seat::Mistral(teacher)) = (roles.resolve("reward").unwrap(), &there.seat) else { panic!("not there") };
    assert!(matches!(&judge.seat, Seat::Mistral(judge) if Arc::ptr_eq(judge, teacher)), "one copy of the weights");

    let plain = SamplingParams { max_tokens: Some(12), seed: Some(7), logprobs: Some(3), ..SamplingParams::default() };
    let prompt = [5, 9, 20, 33, 8];
    let mut ends = Vec::new();
    for params in [
        plain.clone(),
        SamplingParams { temperature: 0.0, ..plain.clone() },
        SamplingParams { top_p: 0.9, top_k: 20, min_p: 0.01, temperature: 0.7, ..plain.clone() },
        SamplingParams { frequency_penalty: 1.0, repetition_penalty: 1.3, presence_penalty: 0.5, ..plain.clone() },
        SamplingParams { logit_bias: [(11, 50.0)].into(), stop_token_ids: vec![11], ..plain.clone() },
        SamplingParams { logit_bias: [(2, 50.0)].into(), ..plain.clone() },
        SamplingParams { logit_bias: [(2, 50.0)].into(), min_tokens: 4, ..plain.clone() },
        SamplingParams { max_tokens: Some(0), logprobs: None, ..plain.clone() },
        SamplingParams { max_tokens: None, ..plain.clone() },
    ] {
        let answer = ask(&here, &prompt, &params);
        agree(&ask(&there, &prompt, &params), &answer);
        ends.push(answer.ids.len());
    }
    assert_eq!((ends[4], ends[5], ends[6], ends[7]), (1, 1, 5, 0), "the cases are what they are meant to be");

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let next = |target: &Target| {
        let mut request = target.request(prompt.to_vec(), SamplingParams::default());
        request.task = Task::NextToken(vec![3, 40]);
        runtime.block_on(target.ask(request)).unwrap().next_token
    };
    let gap = next(&here).iter().zip(next(&there)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(gap < TOLERANCE, "{gap}");
    assert_eq!(
        roles.list().iter().find(|card| card.id == "teacher").unwrap().max_model_len,
        here.max_model_len().unwrap()
    );
}

#[test]
fn requests_at_once_are_answered_as_they_are_alone() {
    let folder = tempfile::tempdir().unwrap();
    let roles = Roles::load(settings(&folder)).unwrap();
    let teacher = roles.teacher().unwrap();
    let params = SamplingParams { temperature: 0.0, max_tokens: Some(20), ..SamplingParams::default() };
    // Of one length, so that they could be computed together.
    let prompts: Vec<Vec<u32>> = (0..6).map(|at| vec![5 + at, 30 - at, 7]).collect();
    let alone: Vec<Answer> = prompts.iter().map(|prompt| ask(&teacher, prompt, &params)).collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let asked = prompts.iter().map(|prompt| teacher.ask(teacher.request(prompt.clone(), params.clone())));
    let together = runtime.block_on(futures_util::future::try_join_all(asked)).unwrap();
    assert_eq!(alone, together);
}

#[test]
fn an_abandoned_answer_gives_its_place_back() {
    let folder = tempfile::tempdir().unwrap();
    let roles = Roles::load(settings(&folder)).unwrap();
    let teacher = roles.teacher().unwrap();
    let long = SamplingParams { logit_bias: [(2, -100.0)].into(), ..SamplingParams::default() };
    let mut streams: Vec<_> = (0..3).map(|_| teacher.generate(vec![5, 9], long.clone()).unwrap()).collect();
    assert!(streams[0].blocking_recv().is_some(), "it runs");
    // One that runs and two that wait for it.
    streams.clear();
    let short = SamplingParams { max_tokens: Some(2), ..SamplingParams::default() };
    assert_eq!(ask(&teacher, &[5, 9], &short).usage.completion_tokens, 2);
}

#[test]
fn what_it_cannot_do_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let roles = Roles::load(settings(&folder)).unwrap();
    let teacher = roles.teacher().unwrap();
    let plain = SamplingParams::default;
    for (field, params) in [
        ("prompt_logprobs", SamplingParams { prompt_logprobs: Some(1), ..plain() }),
        ("ignore_eos", SamplingParams { ignore_eos: true, ..plain() }),
        ("priority", SamplingParams { priority: 1, ..plain() }),
        ("cache_salt", SamplingParams { cache_salt: Some("x".into()), ..plain() }),
    ] {
        let error = teacher.generate(vec![5], params).unwrap_err();
        assert_eq!((error.code, error.param.as_deref()), (Code::UnsupportedParameter, Some(field)));
        assert!(error.message.contains("`teacher` runs on mistralrs"), "{error}");
    }
    let long = teacher.generate(vec![5; teacher.max_model_len().unwrap()], plain()).unwrap_err();
    assert_eq!(long.code, Code::ContextLengthExceeded);
    assert_eq!(teacher.generate(vec![1 << 20], plain()).unwrap_err().param.as_deref(), Some("prompt"));
    assert_eq!(teacher.engine().map(drop).unwrap_err().param.as_deref(), Some("model"));
}

#[test]
fn settings_it_cannot_follow_name_their_key() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |options: RolesOptions| Roles::load(options).map(drop).unwrap_err();
    let quantized = |path: std::path::PathBuf, dtype: &str| {
        let mut options = settings(&folder);
        options.models.insert("tiny".into(), ModelOptions { path, dtype: dtype.into(), max_model_len: None });
        options
    };
    let error = refused(quantized(fixture("tiny-llama"), "q9_9"));
    assert_eq!(error.param.as_deref(), Some("models.tiny.dtype"));
    let error = refused(RolesOptions { student: on_mistralrs("tiny"), ..options(folder.path(), rules()) });
    assert_eq!(error.param.as_deref(), Some("roles.student.backend"));
    let classifier = RewardOptions::Classifier(on_mistralrs("classifier"));
    assert_eq!(refused(options(folder.path(), classifier)).param.as_deref(), Some("roles.reward.backend"));
    let mut pool = RoleOptions { url: Some("http://a/v1".into()), ..on_mistralrs("tiny") };
    assert_eq!(pool.check("teacher").unwrap_err().param.as_deref(), Some("roles.teacher.url"));
    pool.url = None;
    pool.check("teacher").unwrap();
}
