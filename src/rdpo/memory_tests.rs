//! A device that runs out of memory in the middle of a step: the step's requests or its job fail, the server goes on.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::engine::{Event, EventStream, SamplingParams};
use crate::error::{Code, Error};
use crate::jobs::{Body, Job, Jobs, Status, Store};
use crate::roles::{
    AdapterOptions, DeviceOptions, KvCacheOptions, ModelOptions, RewardOptions, RoleOptions, Roles, RolesOptions,
    RuleOptions,
};

/// Two layers, so four residual blocks a pass.
const MODEL: &str = "tests/fixtures/tiny-llama";
const BLOCKS: usize = 4;

fn roles(data: &Path) -> Arc<Roles> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL);
    let model = ModelOptions { path, dtype: "f32".into(), max_model_len: None };
    Roles::load(RolesOptions {
        device: DeviceOptions { kind: "cpu".into(), ..DeviceOptions::default() },
        kv_cache: KvCacheOptions { block_size: 4, memory: "1MiB".into(), ..KvCacheOptions::default() },
        speculative_config: Default::default(),
        models: [("tiny".to_owned(), model)].into(),
        teacher: RoleOptions::native("tiny"),
        student: RoleOptions::native("tiny"),
        reward: RewardOptions::Rules { terms: vec![RuleOptions::Length { weight: 1.0, per: 10.0 }] },
        adapters: AdapterOptions { path: data.join("adapters"), max_resident: 2, max_rank: 8 },
        training_share: 0.5,
    })
    .unwrap()
}

fn read(mut stream: EventStream) -> Result<Vec<u32>, Error> {
    let mut ids = Vec::new();
    loop {
        match stream.blocking_recv().expect("an answer ends with an event") {
            Event::Token { id, .. } => ids.push(id),
            Event::Done { .. } => return Ok(ids),
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
}

#[test]
fn requests_of_a_step_without_memory_fail_and_the_next_ones_are_answered() {
    let data = tempfile::tempdir().unwrap();
    let roles = roles(data.path());
    let target = roles.student_base().unwrap();
    let engine = target.engine().unwrap();
    let ask = || {
        let params = SamplingParams { temperature: 0.0, max_tokens: Some(24), ignore_eos: true, ..Default::default() };
        target.generate((20..50).collect(), params).unwrap()
    };
    let undisturbed = read(ask()).unwrap();
    assert_eq!(undisturbed.len(), 24);
    // In the middle of a step while the answer is written: the prompt took one step.
    engine.model().fault.order(3 * BLOCKS + 2);
    let (one, other) = (ask(), ask());
    let answers = [read(one), read(other)];
    assert!(!engine.model().fault.is_ordered(), "the failure never came");
    let failed: Vec<&Error> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    assert!(!failed.is_empty(), "a failure nobody heard of");
    for error in failed {
        assert_eq!((error.code, error.status()), (Code::OutOfMemory, 503));
        assert!(error.message.contains("kv_cache.max_batch_tokens"), "{error}");
    }
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting), (0, 0));
    assert_eq!(stats.free_blocks + stats.cached_blocks, stats.total_blocks, "blocks are lost: {stats:?}");
    assert!(engine.is_alive());
    assert_eq!(read(ask()).unwrap(), undisturbed, "what the failed step left shows in a later answer");
}

fn jobs(data: &Path, roles: &Arc<Roles>) -> (Jobs, tokio::runtime::Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (roles, handle) = (roles.clone(), runtime.handle().clone());
    let body: Body = Arc::new(move |context| super::run(context, &roles, &handle));
    (Jobs::start(Store::open(&data.join("rdpo.sqlite")).unwrap(), body).unwrap(), runtime)
}

fn ended(jobs: &Jobs, id: &str) -> Job {
    let since = Instant::now();
    loop {
        let job = jobs.store().get(id).unwrap();
        if job.status.is_final() {
            return job;
        }
        assert!(since.elapsed() < Duration::from_secs(120), "still {:?}", job.status);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ready pairs with their scores: training is all that uses the device until the report. Nothing is kept between forward and
/// backward, so a step runs every block twice.
fn request() -> Value {
    let pair = |index: usize| {
        json!({"prompt": format!("Number {index}?"), "chosen": "Yes, it is.", "rejected": "No.",
            "score_chosen": 2.0, "score_rejected": 1.0})
    };
    json!({
        "pairs": (0..3).map(pair).collect::<Vec<_>>(), "lora": {"r": 4}, "seed": 5,
        "training": {"epochs": 3, "batch_size": 3, "eval_fraction": 0.0, "learning_rate": 1e-2, "activation_memory": "0"},
    })
}

#[test]
fn a_job_in_a_step_without_memory_fails_and_can_be_resumed() {
    let straight = {
        let data = tempfile::tempdir().unwrap();
        let roles = roles(data.path());
        let (jobs, _runtime) = jobs(data.path(), &roles);
        ended(&jobs, &jobs.submit(&request()).unwrap().id)
    };
    assert_eq!(straight.status, Status::Succeeded, "{:?}", straight.error);

    let data = tempfile::tempdir().unwrap();
    let roles = roles(data.path());
    let target = roles.student_base().unwrap();
    // The reference and the first step are whole; in the second one the backward fails.
    target.engine().unwrap().model().fault.order(BLOCKS + 2 * BLOCKS + BLOCKS + 1);
    let (jobs, _runtime) = jobs(data.path(), &roles);
    let id = jobs.submit(&request()).unwrap().id;
    let failed = ended(&jobs, &id);
    assert_eq!(failed.status, Status::Failed);
    let error = failed.error.unwrap();
    assert_eq!((&error["code"], &error["type"]), (&json!("out_of_memory"), &json!("server_error")));
    let said = error["message"].as_str().unwrap();
    assert!(said.contains("training.activation_memory") && said.contains("resume"), "{said}");
    assert_eq!(failed.progress["training"]["done"], 1, "the step before the failure is kept: {}", failed.progress);

    let params = SamplingParams { max_tokens: Some(4), ignore_eos: true, ..Default::default() };
    assert_eq!(read(target.generate(vec![20, 21], params).unwrap()).unwrap().len(), 4, "serving goes on");
    jobs.resume(&id).unwrap();
    let resumed = ended(&jobs, &id);
    assert_eq!(resumed.status, Status::Succeeded, "{:?}", resumed.error);
    assert_eq!(resumed.result["adapter"]["generation"], straight.result["adapter"]["generation"]);
}
