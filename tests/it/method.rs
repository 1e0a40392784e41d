//! Whole jobs on the tiny Llama.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdpo::jobs::{Body, Job, Jobs, Status, Store};
use rdpo::roles::{JudgeOptions, RewardOptions, RoleOptions, Roles, RolesOptions};
use rdpo::text::Message;
use serde_json::{Value, json};

use super::hot_swap::{options, rules};

pub(super) struct House {
    pub(super) roles: Arc<Roles>,
    pub(super) jobs: Jobs,
    _runtime: tokio::runtime::Runtime,
}

fn house(data: &Path, reward: RewardOptions) -> House {
    house_of(data, options(data, reward))
}

pub(super) fn house_of(data: &Path, options: RolesOptions) -> House {
    let roles = Roles::load(options).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (inside, handle) = (roles.clone(), runtime.handle().clone());
    let body: Body = Arc::new(move |context| rdpo::rdpo::run(context, &inside, &handle));
    let jobs = Jobs::start(Store::open(&data.join("rdpo.sqlite")).unwrap(), body).unwrap();
    House { roles, jobs, _runtime: runtime }
}

impl House {
    pub(super) fn wait(&self, id: &str, until: impl Fn(&Job) -> bool) -> Job {
        let since = Instant::now();
        loop {
            let job = self.jobs.store().get(id).unwrap();
            if until(&job) {
                return job;
            }
            assert!(since.elapsed() < Duration::from_secs(300), "still {:?}: {}", job.status, job.progress);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn run(&self, request: &Value) -> Job {
        let job = self.jobs.submit(request).unwrap();
        self.wait(&job.id, |job| job.status.is_final())
    }
}

fn request() -> Value {
    json!({
        "behavior": {
            "name": "short", "principle": "Be kind.", "critique": "Wrong? {principle}", "revision": "Again.",
            "judge": {"prompt": "Grade 8 to 11. {prompt} / {response}", "min": 8, "max": 11},
        },
        "prompts": ["Hi", "What is up?", "Why?", "Tell me more", "And then?", "No", "Yes", "Maybe"],
        "synthesis": {"max_tokens": 12, "temperature": 1.0},
        "loss": {"type": "rdpo"},
        "lora": {"r": 4, "alpha": 8},
        "training": {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "eval_fraction": 0.25, "checkpoint_steps": 2},
        "seed": 11,
    })
}

pub(super) fn succeeded(job: &Job) {
    assert_eq!(job.status, Status::Succeeded, "{:?}", job.error);
}

#[test]
fn a_job_with_a_rules_reward_goes_the_whole_road() {
    let data = tempfile::tempdir().unwrap();
    let house = house(data.path(), rules());
    let job = house.run(&request());
    succeeded(&job);
    let store = house.jobs.store();
    assert_eq!(store.rows(&job.id, "sample").unwrap().len(), 6, "two of eight prompts are held out");
    let pairs = store.rows(&job.id, "pair").unwrap();
    let dropped: u64 = job.result["pairs"]["dropped"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(pairs.len() as u64 + dropped, 6);
    for (_, pair) in &pairs {
        // The rules reward is a tenth of the characters: the stored score must be this answer's.
        let length = pair["chosen"].as_str().unwrap().chars().count() as f64;
        assert!((pair["score_chosen"].as_f64().unwrap() - length / 10.0).abs() < 1e-9);
    }
    let report = &job.result["report"];
    assert_eq!((report["prompts"].as_u64(), report["scored"].as_u64()), (Some(2), Some(2)));
    let gap = job.result["adapter"]["train_serve_logprob_gap"].as_f64().unwrap();
    assert!(gap < 1e-4, "trainer and server differ by {gap} nats a token");
    let mean = job.result["adapter"]["train_serve_logprob_gap_mean"].as_f64().unwrap();
    assert!(0.0 <= mean && mean <= gap, "a mean of {mean}, the largest is {gap}");
    let live = house.roles.resolve("student").unwrap().lease.unwrap();
    assert_eq!(Some(live.adapter.generation.as_str()), job.result["adapter"]["generation"].as_str());
    let steps = job.result["training"]["steps"].as_u64().unwrap();
    let metrics = store.events(&job.id, 0, 1000).unwrap().into_iter().filter(|event| event.kind == "metrics").count();
    assert_eq!(metrics as u64, steps);
}

/// The teacher is the student's base: what it said of its tokens is the reference, to the last bit, or the first loss would not be ln 2.
#[test]
fn the_reference_of_an_answer_the_students_base_wrote_is_its_samplers() {
    let data = tempfile::tempdir().unwrap();
    let house = house(data.path(), rules());
    let mut request = request();
    request["loss"] = json!({"type": "dpo"});
    request["synthesis"]["samples_per_prompt"] = json!(3);
    request["training"]["batch_size"] = json!(64);
    let job = house.run(&request);
    succeeded(&job);
    let pairs = &job.result["pairs"];
    assert!(pairs["kept"].as_u64().unwrap() > 10, "{pairs}");
    // The tiny model's noise is often encoded in other tokens than it was written in.
    assert!(pairs["sampled_references"].as_u64().unwrap() > 3, "{pairs}");
    let events = house.jobs.store().events(&job.id, 0, 1000).unwrap();
    let first = events.into_iter().find(|event| event.kind == "metrics").unwrap();
    assert_eq!(first.data["loss"], json!(std::f64::consts::LN_2), "{}", first.data);
}

#[test]
fn the_same_request_makes_the_same_adapter() {
    let generation = |request: &Value| {
        let data = tempfile::tempdir().unwrap();
        let job = house(data.path(), rules()).run(request);
        succeeded(&job);
        job.result["adapter"]["generation"].as_str().unwrap().to_owned()
    };
    let first = generation(&request());
    assert_eq!(generation(&request()), first);
    let mut other = request();
    other["seed"] = json!(12);
    assert_ne!(generation(&other), first);
}

#[test]
fn a_job_paused_in_the_middle_ends_with_the_same_adapter() {
    let data = tempfile::tempdir().unwrap();
    let mut request = request();
    request["synthesis"]["samples_per_prompt"] = json!(8);
    request["training"]["epochs"] = json!(3);
    let straight = house(data.path(), rules()).run(&request);
    succeeded(&straight);
    let data = tempfile::tempdir().unwrap();
    let house = house(data.path(), rules());
    let job = house.jobs.submit(&request).unwrap();
    let mut paused_in = Vec::new();
    for stage in ["synthesizing", "training"] {
        let done = |job: &Job| job.progress[stage]["done"].as_u64().unwrap_or(0) > 0;
        house.wait(&job.id, |job| done(job) || job.status.is_final());
        if house.jobs.pause(&job.id).is_ok() {
            let now = house.wait(&job.id, |job| job.status.is_final());
            if now.status == Status::Paused {
                let progress = &now.progress[stage];
                if progress["done"].as_u64() < progress["total"].as_u64() {
                    paused_in.push(stage);
                }
                house.jobs.resume(&job.id).unwrap();
            }
        }
    }
    assert_eq!(paused_in, ["synthesizing", "training"], "each pause falls into the middle of its stage");
    let job = house.wait(&job.id, |job| job.status == Status::Succeeded || job.status == Status::Failed);
    succeeded(&job);
    assert_eq!(job.result["adapter"]["generation"], straight.result["adapter"]["generation"]);
}

#[test]
fn a_judge_scores_and_the_prefix_cache_sees_the_conversation_grow() {
    let data = tempfile::tempdir().unwrap();
    let judge = RewardOptions::Judge(JudgeOptions { role: RoleOptions::native("tiny"), rubric: None });
    let house = house(data.path(), judge);
    let job = house.run(&request());
    succeeded(&job);
    let rows = house.jobs.store().rows(&job.id, "score").unwrap();
    let mut read = 0;
    for (_, row) in &rows {
        for side in ["chosen", "rejected"] {
            if let Some(score) = row[side].as_f64() {
                read += 1;
                assert!(score > 8.0 && score < 11.0, "an expected value lies inside its range, not at {score}");
            }
        }
    }
    assert!(read >= rows.len(), "the judge was read {read} times for {} pairs", rows.len());
    let samples = house.jobs.store().rows(&job.id, "sample").unwrap();
    assert!(samples.iter().all(|(_, sample)| sample["cached_tokens"].as_u64().unwrap() > 0));
}

#[test]
fn the_classifier_reward_is_what_transformers_computes() {
    let data = tempfile::tempdir().unwrap();
    let classifier = RewardOptions::Classifier(RoleOptions::native("classifier"));
    let roles = Roles::load(options(data.path(), classifier)).unwrap();
    let text = std::fs::read(super::hot_swap::fixture("tiny-classifier/expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&text).unwrap();
    let target = roles.resolve("reward").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let sequences: Vec<Vec<u32>> = serde_json::from_value(expected["sequences"].clone()).unwrap();
    let scores: Vec<f32> = serde_json::from_value(expected["scores"].clone()).unwrap();
    assert!(!scores.is_empty() && scores.len() == sequences.len());
    for (ids, score) in sequences.into_iter().zip(scores) {
        let mut request = target.request(ids, rdpo::engine::SamplingParams::default());
        request.task = rdpo::engine::Task::Score;
        let found = runtime.block_on(target.ask(request)).unwrap().score.unwrap();
        assert!((found - score).abs() < 1e-4, "{found} is not {score}");
    }
    let turns = [Message::new("user", "Hi"), Message::new("assistant", "Hello")];
    assert!(runtime.block_on(roles.reward().unwrap().score(&turns, None)).unwrap().value.is_finite());
    assert_eq!(runtime.block_on(roles.reward().unwrap().score(&turns[..1], None)).unwrap_err().status(), 400);
}

#[test]
fn ready_pairs_skip_what_they_do_not_need() {
    let data = tempfile::tempdir().unwrap();
    let house = house(data.path(), rules());
    let pair = |n: usize| {
        json!({"prompt": format!("Question {n}"), "chosen": format!("good {n}"), "rejected": "bad",
        "score_chosen": 2.0, "score_rejected": 1.0 - n as f64})
    };
    let mut request = request();
    request.as_object_mut().unwrap().remove("prompts");
    request["pairs"] = (0..6).map(pair).collect();
    request["publish"] = json!({"when": "never"});
    let job = house.run(&request);
    succeeded(&job);
    let said = house.jobs.store().events(&job.id, 0, 1000).unwrap();
    assert!(!said.iter().any(|event| event.data["status"] == "synthesizing" || event.data["status"] == "scoring"));
    assert_eq!(job.result["adapter"]["published"], json!(false));
    assert!(house.roles.resolve("student").unwrap().lease.is_none());
}

/// What goes live is the adapter of the best evaluation, byte for byte that of a job which ended with that step.
#[test]
fn the_best_evaluations_adapter_is_what_goes_live() {
    let pair = |n: usize| json!({"prompt": format!("Question {n}"), "chosen": format!("good {n}"), "rejected": format!("bad {n}")});
    let mut request = request();
    request.as_object_mut().unwrap().remove("prompts");
    request["pairs"] = (0..8).map(pair).collect();
    request["loss"] = json!({"type": "dpo"});
    request["training"] = json!({
        "epochs": 2, "batch_size": 2, "learning_rate": 0.3, "scheduler": "constant", "warmup_ratio": 0, "eval_fraction": 0.25,
        "eval_steps": 1, "load_best_model_at_end": true, "metric_for_best_model": "eval_loss",
    });
    let run = |request: &Value| {
        let data = tempfile::tempdir().unwrap();
        let house = house(data.path(), rules());
        let job = house.run(request);
        succeeded(&job);
        (job.result["training"].clone(), house.roles.adapters().file("student").unwrap())
    };
    let (of_all, best) = run(&request);
    let losses: Vec<f64> =
        of_all["evaluations"].as_array().unwrap().iter().map(|one| one["eval_loss"].as_f64().unwrap()).collect();
    let step = 1 + (0..losses.len()).min_by(|a, b| losses[*a].total_cmp(&losses[*b])).unwrap();
    assert!(step < losses.len() && losses.len() == 6, "so large a rate does harm in the end: {losses:?}");
    assert_eq!(of_all["adapter_step"], json!(step));
    request["training"]["max_steps"] = json!(step);
    request["training"]["load_best_model_at_end"] = json!(false);
    let (of_some, last) = run(&request);
    assert_eq!((of_some["steps"].as_u64(), of_some["adapter_step"].as_u64()), (Some(step as u64), Some(step as u64)));
    assert_eq!(best.generation().unwrap(), last.generation().unwrap());
}

#[test]
fn a_job_without_usable_pairs_fails_with_its_counts() {
    let data = tempfile::tempdir().unwrap();
    let house = house(data.path(), rules());
    let mut request = request();
    request["scoring"] = json!({"min_gap": 1e6});
    let job = house.run(&request);
    assert_eq!(job.status, Status::Failed);
    assert!(job.error.unwrap()["message"].as_str().unwrap().contains("min_gap"));
    assert_eq!(house.jobs.store().rows(&job.id, "sample").unwrap().len(), 6, "the rows stay");
}

/// 8 to 11: two values of one token and two that share their first. The reward is compared with the sum written out by hand.
#[test]
fn the_expected_score_is_the_sum_over_the_values() {
    let data = tempfile::tempdir().unwrap();
    let judge = RewardOptions::Judge(JudgeOptions { role: RoleOptions::native("tiny"), rubric: None });
    let roles = Roles::load(options(data.path(), judge)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rubric: rdpo::roles::Rubric =
        serde_json::from_value(json!({"prompt": "Grade. {prompt} / {response}", "min": 8, "max": 11})).unwrap();
    let turns = [Message::new("user", "Hi"), Message::new("assistant", "Hello")];
    let found = runtime.block_on(roles.reward().unwrap().score(&turns, Some(&rubric))).unwrap().value;

    let target = roles.resolve("reward").unwrap();
    let tokenizer = target.tokenizer().unwrap();
    let asked = [Message::new("user", "Grade. Hi / Hello")];
    let prompt = tokenizer.encode_chat(&asked, &rdpo::text::RenderOptions::default()).unwrap();
    let p = |text: &str| {
        let ids = tokenizer.encode(text, false).unwrap();
        let logprobs = runtime.block_on(target.logprobs_of(&prompt, &ids)).unwrap();
        logprobs.iter().map(|one| f64::from(*one)).sum::<f64>().exp()
    };
    assert_eq!(tokenizer.encode("10", false).unwrap().len(), 2);
    let values = [(8.0, p("8")), (9.0, p("9")), (10.0, p("10")), (11.0, p("11"))];
    let mass: f64 = values.iter().map(|(_, p)| p).sum();
    let expected = values.iter().map(|(value, p)| value * p).sum::<f64>() / mass;
    assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
}
