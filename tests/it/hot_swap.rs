//! Adapters swapped under running requests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use candle_core::{Device, Tensor};
use rdpo::engine::{Event, SamplingParams};
use rdpo::model::LoraParams;
use rdpo::roles::{
    AdapterOptions, DeviceOptions, JudgeOptions, KvCacheOptions, ModelOptions, PublishMode, RewardOptions, RoleOptions,
    Roles, RolesOptions, RuleOptions,
};
use rdpo::telemetry::metrics;
use rdpo::train::LoraOptions;
use rdpo::weights::AdapterFile;
use serde_json::json;

use super::{method, real_model};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Three roles on the tiny Llama, adapters under `data`.
pub(crate) fn options(data: &Path, reward: RewardOptions) -> RolesOptions {
    let model = |path: PathBuf| ModelOptions { path, dtype: "f32".into(), max_model_len: None };
    let models = [("tiny", "tiny-llama"), ("again", "tiny-llama/."), ("classifier", "tiny-classifier")];
    RolesOptions {
        device: DeviceOptions { kind: "cpu".into(), ..DeviceOptions::default() },
        kv_cache: KvCacheOptions {
            block_size: 4,
            memory: "8MiB".into(),
            max_sequences: 8,
            ..KvCacheOptions::default()
        },
        speculative_config: Default::default(),
        models: models.into_iter().map(|(name, path)| (name.to_owned(), model(fixture(path)))).collect(),
        teacher: RoleOptions::native("tiny"),
        student: RoleOptions::native("again"),
        reward,
        adapters: AdapterOptions { path: data.join("adapters"), max_resident: 4, max_rank: 64 },
        training_share: 0.5,
    }
}

pub(crate) fn rules() -> RewardOptions {
    RewardOptions::Rules { terms: vec![RuleOptions::Length { weight: 1.0, per: 10.0 }] }
}

/// The fixture's adapter with all weights times `factor`.
fn adapter(factor: f64) -> AdapterFile {
    let mut file = AdapterFile::read(&fixture("tiny-llama/adapter")).unwrap();
    for tensor in file.tensors.values_mut() {
        *tensor = (&*tensor * factor).unwrap();
    }
    file
}

fn params(max_tokens: usize, seed: u64) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ignore_eos: true, seed: Some(seed), ..SamplingParams::default() }
}

#[test]
fn names_resolve_or_are_404() {
    let data = tempfile::tempdir().unwrap();
    let roles = Roles::load(options(data.path(), rules())).unwrap();
    let status = |name: &str| roles.resolve(name).map(|_| 200).unwrap_or_else(|error| error.status());
    for (name, expected) in [
        ("teacher", 200),
        ("reward", 200),
        ("student", 200),
        ("student:base", 200),
        ("student@1", 404),
        ("student@x", 404),
        ("nobody", 404),
        ("teacher@1", 404),
        ("", 404),
    ] {
        assert_eq!(status(name), expected, "{name}");
    }
    assert!(roles.resolve("student").unwrap().lease.is_none());
    let pinned = |name: &str| roles.adapters().pinned(name);
    assert_eq!((pinned("student"), pinned("teacher")), ("student:base".into(), "teacher".into()));
    assert!(roles.resolve("reward").unwrap().engine().is_err());
    roles.adapters().publish("student", &adapter(1.0), PublishMode::Create).unwrap();
    roles.adapters().publish("polite", &adapter(2.0), PublishMode::Create).unwrap();
    assert_eq!(roles.resolve("student").unwrap().lease.unwrap().version, 1);
    assert_eq!((pinned("student"), pinned("polite")), ("student@1".into(), "polite@1".into()));
    assert!(roles.resolve("student:base").unwrap().lease.is_none());
    assert_eq!((status("student@1"), status("polite"), status("polite@1"), status("polite@2")), (200, 200, 200, 404));
    roles.adapters().unload("polite", None).unwrap();
    assert_eq!((status("polite"), status("polite@1")), (404, 404));
}

#[test]
fn versions_survive_and_are_never_used_again() {
    let data = tempfile::tempdir().unwrap();
    let generation = |factor: f64| adapter(factor).generation().unwrap();
    {
        let roles = Roles::load(options(data.path(), rules())).unwrap();
        let adapters = roles.adapters();
        for version in 1..=6 {
            let lease = adapters.publish("student", &adapter(version as f64), PublishMode::Upsert).unwrap();
            assert_eq!(lease.version, version);
        }
        let cards = adapters.list();
        assert_eq!(cards.len(), 6);
        assert!(cards.iter().filter(|card| card.bytes > 0).count() <= 4, "at most max_resident in memory");
        assert_eq!(
            adapters.at("student", 1).unwrap().adapter.generation,
            generation(1.0),
            "loaded from disk on demand"
        );
        assert_eq!(adapters.rollback("student", None).unwrap().version, 5);
        assert_eq!(adapters.rollback("student", Some(2)).unwrap().version, 2);
        assert_eq!(adapters.rollback("student", Some(9)).err().unwrap().status(), 404);

        let stale = PublishMode::CompareAndSwap(generation(5.0));
        assert_eq!(adapters.publish("student", &adapter(7.0), stale).err().unwrap().status(), 409);
        assert_eq!(adapters.live("student").unwrap().version, 2, "a refused publication changes nothing");
        let fresh = PublishMode::CompareAndSwap(generation(2.0));
        assert_eq!(adapters.publish("student", &adapter(7.0), fresh).unwrap().version, 7);
        let again = adapters.publish("student", &adapter(7.0), PublishMode::Upsert).unwrap();
        assert_eq!(again.version, 7, "the same weights are no new version");
        assert_eq!(adapters.publish("student", &adapter(8.0), PublishMode::Create).err().unwrap().status(), 409);
        assert_eq!(adapters.publish("teacher", &adapter(8.0), PublishMode::Create).err().unwrap().status(), 400);
        assert_eq!(adapters.publish("a/b", &adapter(8.0), PublishMode::Create).err().unwrap().status(), 400);
    }
    let roles = Roles::load(options(data.path(), rules())).unwrap();
    let live = roles.adapters().live("student").unwrap();
    assert_eq!((live.version, live.adapter.generation.clone()), (7, generation(7.0)), "a restart serves what was live");
    roles.adapters().unload("student", None).unwrap();
    assert!(roles.resolve("student").unwrap().lease.is_none());
    let next = roles.adapters().publish("student", &adapter(1.0), PublishMode::Create).unwrap();
    assert_eq!(next.version, 8);
}

#[test]
fn folders_outside_the_root_are_refused() {
    let data = tempfile::tempdir().unwrap();
    let roles = Roles::load(options(data.path(), rules())).unwrap();
    let adapters = roles.adapters();
    adapter(1.0).write(&adapters.root().join("incoming")).unwrap();
    let outside = fixture("tiny-llama/adapter");
    std::os::unix::fs::symlink(&outside, adapters.root().join("link")).unwrap();
    let status = |path: &str| adapters.load("new", path, PublishMode::Upsert).err().map(|error| error.status());
    assert_eq!(status(outside.to_str().unwrap()), Some(403));
    assert_eq!(status("link"), Some(403));
    assert_eq!(status("../adapters/../../x"), Some(403));
    assert_eq!(status("missing"), Some(404));
    assert_eq!(status("incoming"), None);
    assert_eq!(adapters.live("new").unwrap().adapter.generation, adapter(1.0).generation().unwrap());
}

#[test]
fn a_stream_keeps_its_generation_across_a_swap() {
    let data = tempfile::tempdir().unwrap();
    let roles = Roles::load(options(data.path(), rules())).unwrap();
    let (old, new) = (adapter(1.0), adapter(-3.0));
    roles.adapters().publish("student", &old, PublishMode::Upsert).unwrap();
    let prompt: Vec<u32> = (10..40).collect();
    let read = |mut stream: rdpo::engine::EventStream, mut swap: Option<&mut dyn FnMut()>| {
        let mut ids = Vec::new();
        while let Some(event) = stream.blocking_recv() {
            match event {
                Event::Token { id, .. } => ids.push(id),
                Event::Done { .. } => return ids,
                other => panic!("{other:?}"),
            }
            if ids.len() == 5
                && let Some(swap) = swap.take()
            {
                swap();
            }
        }
        panic!("the stream ended early")
    };
    let target = || roles.resolve("student").unwrap();
    let alone = read(target().generate(prompt.clone(), params(120, 7)).unwrap(), None);
    let pinned = target();
    let stream = pinned.generate(prompt.clone(), params(120, 7)).unwrap();
    let mut swap = || {
        roles.adapters().publish("student", &new, PublishMode::Upsert).unwrap();
    };
    assert_eq!(read(stream, Some(&mut swap)), alone, "the swap shows in a stream that began before it");
    let after = target();
    assert_eq!(after.lease.as_ref().unwrap().adapter.generation, new.generation().unwrap());
    assert_ne!(
        read(after.generate(prompt.clone(), params(120, 7)).unwrap(), None),
        alone,
        "the next request has the new one"
    );
    let pinned = roles.resolve("student@1").unwrap();
    assert_eq!(read(pinned.generate(prompt, params(120, 7)).unwrap(), None), alone);
}

#[test]
fn a_hundred_swaps_fail_no_request() {
    let data = tempfile::tempdir().unwrap();
    let roles = Roles::load(options(data.path(), rules())).unwrap();
    let files = [adapter(1.0), adapter(-1.0), adapter(0.5)];
    roles.adapters().publish("student", &files[0], PublishMode::Upsert).unwrap();
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4u64)
            .map(|worker| {
                let (roles, stop, answered, runtime) = (&roles, &stop, &answered, &runtime);
                scope.spawn(move || {
                    let mut turn = 0;
                    while !stop.load(Ordering::Acquire) {
                        let target = roles.resolve("student").unwrap();
                        let request = target.request(vec![20 + worker as u32, 30, 40], params(8, turn));
                        let answer = runtime.block_on(target.ask(request)).unwrap();
                        assert_eq!(answer.ids.len(), 8);
                        answered.fetch_add(1, Ordering::AcqRel);
                        turn += 1;
                    }
                })
            })
            .collect();
        for swap in 1..=100 {
            roles.adapters().publish("student", &files[swap % files.len()], PublishMode::Upsert).unwrap();
        }
        let at_last_swap = answered.load(Ordering::Acquire);
        while answered.load(Ordering::Acquire) < at_last_swap + 8 && workers.iter().all(|one| !one.is_finished()) {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Release);
    });
    assert_eq!(roles.adapters().live("student").unwrap().version, 101);
    let resident = roles.adapters().list().iter().filter(|card| card.bytes > 0).count();
    assert!(resident <= 4 + 4, "old generations are dropped when their last lease ends, {resident} are held");
    assert!(answered.load(Ordering::Acquire) > 8);
}

/// While a job trains on the real model its student answers, under one adapter after the other: every answer comes, and is to the
/// token what its adapter says alone.
#[test]
fn swaps_while_the_real_model_trains_lose_nothing() {
    let data = tempfile::tempdir().unwrap();
    let mut options = options(data.path(), rules());
    options.kv_cache.memory = "64MiB".into();
    for model in options.models.values_mut() {
        *model = ModelOptions { path: real_model::path(), dtype: "auto".into(), max_model_len: None };
    }
    let house = method::house_of(data.path(), options);
    let adapters = house.roles.adapters();
    let config = LoraOptions { r: 4, ..LoraOptions::default() }.config(None);
    let files = [1.0, -1.0].map(|sign| {
        let engines = house.roles.engines();
        let mut file = LoraParams::new(&config, engines[0].1.model(), 1).unwrap().to_file().unwrap();
        let of_b = file.tensors.iter_mut().filter(|(name, _)| name.ends_with("lora_B.weight"));
        for (_, b) in of_b {
            let numbers = (0..b.elem_count()).map(|at| sign * ((at * 7919 % 997) as f32 - 498.0) / 20_000.0);
            *b = Tensor::from_vec(numbers.collect(), b.shape(), &Device::Cpu).unwrap();
        }
        file
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let ask = |prompt: u32| {
        let target = house.roles.resolve("student").unwrap();
        let greedy = SamplingParams { temperature: 0.0, ..params(12, 0) };
        let answer = runtime.block_on(target.ask(target.request(vec![prompt, 300, 400], greedy))).unwrap();
        (target.lease.unwrap().adapter.generation.clone(), answer.ids)
    };
    let alone: BTreeMap<(String, u32), Vec<u32>> = files
        .iter()
        .flat_map(|file| {
            adapters.publish("student", file, PublishMode::Upsert).unwrap();
            (1000..1003).map(|prompt| (prompt, ask(prompt))).collect::<Vec<_>>()
        })
        .map(|(prompt, (generation, ids))| ((generation, prompt), ids))
        .collect();
    assert!(alone.values().collect::<BTreeSet<_>>().len() > 3, "the adapters answer alike");
    let pair =
        |n: usize| json!({"prompt": format!("What is {n} plus {n}?"), "chosen": "Why, it is ten.", "rejected": "No."});
    let job = house.jobs.submit(&json!({
        "behavior": "safety", "pairs": (0..8).map(pair).collect::<Vec<_>>(), "loss": {"type": "dpo"}, "publish": {"alias": "trained"},
        "training": {"epochs": 4, "batch_size": 2, "eval_fraction": 0},
    }));
    let id = job.unwrap().id;
    let steps = || house.jobs.store().get(&id).unwrap().progress["training"]["done"].as_u64().unwrap_or(0);
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for prompt in 1000..1003 {
            let (ask, alone, stop, answered) = (&ask, &alone, &stop, &answered);
            scope.spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    let (generation, ids) = ask(prompt);
                    assert_eq!(ids, alone[&(generation, prompt)]);
                    answered.fetch_add(1, Ordering::AcqRel);
                }
            });
        }
        house.wait(&id, |job| steps() > 0 || job.status.is_final());
        let mut swaps = 0;
        let before = answered.load(Ordering::Acquire);
        while steps() < 8 && !house.jobs.store().get(&id).unwrap().status.is_final() {
            adapters.publish("student", &files[swaps % 2], PublishMode::Upsert).unwrap();
            swaps += 1;
            std::thread::sleep(Duration::from_millis(50));
        }
        let meanwhile = answered.load(Ordering::Acquire) - before;
        stop.store(true, Ordering::Release);
        assert!(swaps > 10 && meanwhile > 10, "{swaps} swaps and {meanwhile} answers while it trained");
    });
    method::succeeded(&house.wait(&id, |job| job.status.is_final()));
    assert_eq!(adapters.live("trained").unwrap().version, 1);
}

/// Runs alone in a process of its own, where no other test moves the gauge.
#[test]
fn two_roles_share_one_copy_of_the_weights() {
    let name = "hot_swap::two_roles_share_one_copy_of_the_weights";
    if std::env::var_os("RDPO_TEST_ALONE").is_none() {
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        let output = alone.args([name, "--exact", "--nocapture"]).env("RDPO_TEST_ALONE", "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    let weights = || metrics().gpu_memory_bytes.with_label_values(&["weights"]).get();
    let data = tempfile::tempdir().unwrap();
    // Teacher, student (by another name and path) and judge are one checkpoint.
    let judge = RewardOptions::Judge(JudgeOptions { role: RoleOptions::native("tiny"), rubric: None });
    let roles = Roles::load(options(data.path(), judge)).unwrap();
    assert_eq!(roles.engines().len(), 1);
    let one = roles.engines()[0].1.model().bytes() as i64;
    assert!(one > 0);
    assert_eq!(weights(), one);
    drop(roles);
    assert_eq!(weights(), 0, "dropping the roles gives the weights back");
    // A classifier is a second checkpoint.
    let classifier = RewardOptions::Classifier(RoleOptions::native("classifier"));
    let roles = Roles::load(options(data.path(), classifier)).unwrap();
    assert_eq!(roles.engines().len(), 2);
    assert!(weights() > one);
    drop(Arc::clone(&roles));
}
