//! The real binary: killed in every stage of a job, started beside another, given broken files.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::hot_swap::fixture;

const PATIENCE: Duration = Duration::from_secs(240);

/// A server of the tiny model in a folder of its own.
pub(super) struct Server {
    pub(super) child: Child,
    pub(super) url: String,
    runtime: Runtime,
}

pub(super) fn settings(folder: &Path, model: &Path) -> PathBuf {
    settings_of(folder, model, "{model = \"tiny\"}", "{kind = \"judge\", model = \"tiny\"}")
}

pub(super) fn settings_of(folder: &Path, model: &Path, teacher: &str, reward: &str) -> PathBuf {
    let text = format!(
        "[server]\nport = 0\n[kv_cache]\nmemory = \"8MiB\"\nblock_size = 4\nmax_sequences = 4\n\
         [models.tiny]\npath = {model:?}\ndtype = \"f32\"\n\
         [models.classifier]\npath = {classifier:?}\ndtype = \"f32\"\n\
         [roles]\nteacher = {teacher}\nstudent = {{model = \"tiny\"}}\nreward = {reward}\n\
         [store]\npath = {store:?}\n[adapters]\npath = {adapters:?}\n",
        classifier = fixture("tiny-classifier"),
        store = folder.join("jobs.sqlite"),
        adapters = folder.join("adapters"),
    );
    let path = folder.join("rdpo.toml");
    fs::write(&path, text).unwrap();
    path
}

pub(super) fn command(settings: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rdpo"));
    command.arg("serve").arg("--config").arg(settings).env("RUST_LOG", "warn");
    command
}

impl Server {
    fn start(folder: &Path) -> Self {
        Server::spawn(command(&settings(folder, &fixture("tiny-llama"))))
    }

    pub(super) fn spawn(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let line = BufReader::new(child.stdout.take().unwrap()).lines().next().expect("the server says its address");
        let url = line.unwrap().split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Server { child, url, runtime }
    }

    pub(super) fn get(&self, path: &str) -> Value {
        self.runtime
            .block_on(async { reqwest::get(format!("{}{path}", self.url)).await.unwrap().json().await.unwrap() })
    }

    pub(super) fn text(&self, path: &str) -> String {
        self.runtime
            .block_on(async { reqwest::get(format!("{}{path}", self.url)).await.unwrap().text().await.unwrap() })
    }

    pub(super) fn post(&self, path: &str) {
        let sent = reqwest::Client::new().post(format!("{}{path}", self.url)).send();
        self.runtime.block_on(async { sent.await.unwrap().error_for_status().unwrap() });
    }

    /// Status and body of the answer to a job.
    pub(super) fn try_submit(&self, request: &Value) -> (u16, Value) {
        let client = reqwest::Client::new();
        let sent = client.post(format!("{}/v1/rdpo/train", self.url)).json(request).send();
        self.runtime.block_on(async {
            let answer = sent.await.unwrap();
            (answer.status().as_u16(), answer.json().await.unwrap())
        })
    }

    pub(super) fn submit(&self, request: &Value) -> String {
        let (_, job) = self.try_submit(request);
        job["id"].as_str().unwrap_or_else(|| panic!("no job: {job}")).to_owned()
    }

    /// Reads the job's events until one satisfies `reached`.
    pub(super) fn reach(&self, id: &str, after: &mut i64, reached: impl Fn(&Value) -> bool) {
        let since = Instant::now();
        loop {
            assert!(
                since.elapsed() < PATIENCE,
                "the job never came so far: {}",
                self.get(&format!("/v1/rdpo/train/{id}"))
            );
            let page = self.get(&format!("/v1/rdpo/train/{id}/events?after={after}&limit=1000"));
            for event in page["data"].as_array().unwrap() {
                *after = event["id"].as_i64().unwrap();
                if reached(event) {
                    return;
                }
            }
        }
    }

    /// Kills the process at once when the job has come so far.
    fn kill_when(mut self, id: &str, after: &mut i64, reached: impl Fn(&Value) -> bool) {
        self.reach(id, after, reached);
        self.kill();
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(super) fn wait(&self, id: &str) -> Value {
        let since = Instant::now();
        loop {
            let job = self.get(&format!("/v1/rdpo/train/{id}"));
            match job["status"].as_str().unwrap() {
                "succeeded" => return job,
                "failed" | "cancelled" | "paused" => panic!("the job ended otherwise: {job}"),
                _ => assert!(since.elapsed() < PATIENCE, "the job does not end: {job}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn request() -> Value {
    let prompts: Vec<String> = (0..24).map(|number| format!("Tell me about the number {number}.")).collect();
    let eval: Vec<String> = (0..12).map(|number| format!("What is {number} and one?")).collect();
    json!({
        "behavior": {
            "name": "short", "principle": "Be kind.", "critique": "Wrong? {principle}", "revision": "Again.",
            "judge": {"prompt": "Grade 1 to 5. {prompt} / {response}", "min": 1, "max": 5},
        },
        "prompts": prompts, "eval_prompts": eval,
        "synthesis": {"max_tokens": 16, "temperature": 1.0},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "training": {"epochs": 3, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_steps": 4,
            "eval_steps": 3, "load_best_model_at_end": true, "metric_for_best_model": "eval_loss"},
        "seed": 5,
    })
}

pub(super) fn adapter(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    let at = folder.join("adapters/student/1");
    assert!(!folder.join("adapters/student/2").exists(), "one job makes one version, however often it is killed");
    let read = |name: &str| fs::read(at.join(name)).unwrap();
    (read("adapter_model.safetensors"), read("adapter_config.json"))
}

#[test]
fn killed_in_every_stage_a_job_ends_with_the_same_adapter_bytes() {
    let straight = tempfile::tempdir().unwrap();
    let expected = {
        let server = Server::start(straight.path());
        let id = server.submit(&request());
        server.wait(&id);
        adapter(straight.path())
    };

    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(folder.path());
    let id = server.submit(&request());
    let mut after = 0;
    let stages = ["synthesizing", "scoring", "training", "evaluating", "publishing"];
    for stage in stages {
        server.kill_when(&id, &mut after, |event| match stage {
            // Short, and without progress of its own.
            "publishing" => event["data"]["status"] == stage,
            _ => event["data"]["stage"] == stage && event["data"]["done"].as_u64() > Some(1),
        });
        server = Server::start(folder.path());
    }
    let job = server.wait(&id);
    assert_eq!(job["adapter_version"], 1);
    let events = server.get(&format!("/v1/rdpo/train/{id}/events?limit=1000"));
    let events = events["data"].as_array().unwrap();
    let after = events.last().unwrap()["id"].as_i64().unwrap();
    let said: Vec<&str> = events.iter().map(|event| event["message"].as_str().unwrap()).collect();
    for stage in stages {
        let what = if stage == "publishing" { "taken up" } else { "queued" };
        let restart = format!("{what} again: the server stopped while {stage}");
        assert!(said.contains(&restart.as_str()), "the kill fell into {stage}: {said:#?}");
    }
    assert!(adapter(folder.path()) == expected, "the same bytes as without the kills");

    // As if killed behind its last word, before the word that it has ended: nothing is done again.
    server.kill();
    let store = rusqlite::Connection::open(folder.path().join("jobs.sqlite")).unwrap();
    assert_eq!(store.execute("update jobs set status = 'publishing'", []).unwrap(), 1);
    drop(store);
    let server = Server::start(folder.path());
    server.wait(&id);
    let again = server.get(&format!("/v1/rdpo/train/{id}/events?after={after}&limit=1000"));
    let again: Vec<&Value> = again["data"].as_array().unwrap().iter().map(|event| &event["type"]).collect();
    assert_eq!(again, ["status", "status"], "taken up, and succeeded");
    assert!(adapter(folder.path()) == expected && !folder.path().join("adapters/.jobs").join(&id).exists());
}

/// Starts a server that must not start; its words on standard error.
fn refused(settings: &Path) -> String {
    let output = command(settings).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn what_a_server_cannot_start_with_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let path = settings(folder.path(), &fixture("tiny-llama"));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("port = 0", &format!("port = {}", taken.local_addr().unwrap().port()))).unwrap();
    let said = refused(&path);
    assert!(said.contains("server.port") && said.contains("another program has the port"), "{said}");

    let said = refused(&settings(folder.path(), Path::new("models/none")));
    assert!(said.contains("models.tiny.path") && said.contains("models/fetch.sh none"), "{said}");

    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    for file in fs::read_dir(fixture("tiny-llama")).unwrap().map(Result::unwrap).filter(|file| file.path().is_file()) {
        fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let weights = model.join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let said = refused(&settings(folder.path(), &model));
    assert!(said.contains("model.safetensors"), "{said}");

    let settings = settings(folder.path(), &fixture("tiny-llama"));
    let _first = Server::start(folder.path());
    let said = refused(&settings);
    assert!(said.contains("store.path") && said.contains("another process has the file open"), "{said}");
}
