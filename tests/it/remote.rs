//! Whole jobs whose teacher is another process: the release server, once, twice, killed and started again.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::binary::{Server, adapter, command, request, settings_of};
use super::hot_swap::fixture;

/// A server of the tiny model that another one asks.
struct Endpoint {
    folder: TempDir,
    server: Server,
}

impl Endpoint {
    fn command(folder: &Path, port: &str) -> Command {
        let rules = "{kind = \"rules\", terms = [{check = \"length\", weight = 1.0, per = 10.0}]}";
        let mut command = command(&settings_of(folder, &fixture("tiny-llama"), "{model = \"tiny\"}", rules));
        command.arg("--port").arg(port);
        command
    }

    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::spawn(Endpoint::command(folder.path(), "0"));
        Endpoint { folder, server }
    }

    /// On the port it had.
    fn start_again(&mut self) {
        let port = self.server.url.rsplit(':').next().unwrap().to_owned();
        self.server = Server::spawn(Endpoint::command(self.folder.path(), &port));
    }
}

/// Teacher remote, reward a classifier, student native.
fn house(folder: &Path, endpoints: &[&Endpoint], patience: u32) -> Server {
    let urls: Vec<String> = endpoints.iter().map(|one| format!("{}/v1", one.server.url)).collect();
    let teacher = format!(
        "{{backend = \"remote\", model = \"teacher\", urls = {urls:?}, max_retries = 2, max_concurrency = 2, \
         patience_seconds = {patience}}}"
    );
    let reward = "{kind = \"classifier\", model = \"classifier\"}";
    Server::spawn(command(&settings_of(folder, &fixture("tiny-llama"), &teacher, reward)))
}

/// Conversations of the job: 24 prompts to learn from, 12 to evaluate on.
const ROWS: u64 = 36;

fn job() -> Value {
    let mut request = request();
    request["synthesis"]["max_tokens"] = json!(32);
    request["training"]["epochs"] = json!(1);
    request
}

/// In the middle of synthesis.
fn middle(event: &Value) -> bool {
    event["data"]["stage"] == "synthesizing" && event["data"]["done"].as_u64() > Some(2)
}

fn metric(server: &Server, line: &str) -> f64 {
    let text = server.text("/metrics");
    let found = text.lines().find_map(|one| one.strip_prefix(line));
    found.unwrap_or_else(|| panic!("no {line} in {text}")).trim().parse().unwrap()
}

#[test]
fn a_job_outlives_its_endpoints_and_loses_no_row() {
    let (mut one, mut two) = (Endpoint::start(), Endpoint::start());
    // Nothing happens.
    let folder = tempfile::tempdir().unwrap();
    let server = house(folder.path(), &[&one, &two], 600);
    let id = server.submit(&job());
    let done = server.wait(&id);
    assert_eq!(done["progress"]["synthesizing"], json!({"done": ROWS, "total": ROWS}));
    let expected = adapter(folder.path());
    // Conversations of three turns went to the teacher; none to an engine of this process.
    let answered =
        |server: &Server| metric(server, "rdpo_request_success_total{finish_reason=\"length\",role=\"teacher\"}");
    let asked = [&one.server, &two.server].map(answered);
    assert!(asked[0] > 20.0 && asked[1] > 20.0, "both did their share: {asked:?}");
    assert!(asked[0] + asked[1] <= 3.0 * ROWS as f64);
    assert!(metric(&server, "rdpo_generation_tokens_total{role=\"teacher\"}") > 3.0 * ROWS as f64);
    drop(server);

    // One endpoint dies in the middle of the job.
    let folder = tempfile::tempdir().unwrap();
    let server = house(folder.path(), &[&one, &two], 600);
    let (id, mut after) = (server.submit(&job()), 0);
    server.reach(&id, &mut after, middle);
    one.server.kill();
    let done = server.wait(&id);
    assert_eq!(done["progress"]["waiting"], Value::Null);
    assert_eq!(metric(&server, "rdpo_remote_endpoint_up{endpoint=\"0\",role=\"teacher\"}"), 0.0);
    assert_eq!(metric(&server, "rdpo_remote_endpoint_up{endpoint=\"1\",role=\"teacher\"}"), 1.0);
    assert!(adapter(folder.path()) == expected, "the same bytes as without the death");
    drop(server);

    // Both are dead; the job says so, and goes on when one is back.
    let folder = tempfile::tempdir().unwrap();
    let server = house(folder.path(), &[&two, &one], 600);
    let (id, mut after) = (server.submit(&job()), 0);
    server.reach(&id, &mut after, middle);
    two.server.kill();
    server.reach(&id, &mut after, |event| event["data"]["waiting"] == true);
    let waiting = server.get(&format!("/v1/rdpo/train/{id}"));
    assert_eq!(waiting["status"], "synthesizing");
    assert!(waiting["progress"]["waiting"]["reason"].as_str().unwrap().contains("teacher"), "{waiting}");
    one.start_again();
    server.reach(&id, &mut after, |event| event["data"]["waiting"] == false);
    let done = server.wait(&id);
    assert_eq!((&done["progress"]["waiting"], &done["progress"]["synthesizing"]["done"]), (&Value::Null, &json!(ROWS)));
    assert!(adapter(folder.path()) == expected, "the same bytes as without the deaths");
    drop(server);

    // Nobody is back before patience ends: the job is paused with the reason, and resumes from its rows.
    let folder = tempfile::tempdir().unwrap();
    let server = house(folder.path(), &[&one], 2);
    let (id, mut after) = (server.submit(&job()), 0);
    server.reach(&id, &mut after, middle);
    one.server.kill();
    server.reach(&id, &mut after, |event| event["data"]["status"] == "paused");
    let paused = server.get(&format!("/v1/rdpo/train/{id}"));
    assert_eq!((&paused["status"], &paused["error"]["code"]), (&json!("paused"), &json!("endpoint_unreachable")));
    let kept = paused["progress"]["synthesizing"]["done"].as_u64().unwrap();
    assert!((3..ROWS).contains(&kept), "{paused}");
    one.start_again();
    server.post(&format!("/v1/rdpo/train/{id}/resume"));
    let done = server.wait(&id);
    assert_eq!((&done["error"], &done["progress"]["synthesizing"]["done"]), (&Value::Null, &json!(ROWS)));
    assert!(adapter(folder.path()) == expected, "the same bytes as without the pause");
    // The rows from before the pause were not written again: only the rest went to the endpoint that was started since.
    assert!(answered(&one.server) <= 3.0 * (ROWS - kept) as f64);
}
