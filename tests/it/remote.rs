//! Whole jobs whose teacher or judge is another process: the release server, once, twice, killed and started again.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::binary::{Server, adapter, command, request, settings_of};
use super::hot_swap::fixture;
use super::real_model;

/// A server that another one asks.
struct Endpoint {
    folder: TempDir,
    model: PathBuf,
    server: Server,
}

impl Endpoint {
    fn command(folder: &Path, model: &Path, port: &str) -> Command {
        let rules = "{kind = \"rules\", terms = [{check = \"length\", weight = 1.0, per = 10.0}]}";
        let settings = settings_of(folder, model, "{model = \"tiny\"}", rules);
        // Room for a prompt of the real model.
        std::fs::write(&settings, std::fs::read_to_string(&settings).unwrap().replace("8MiB", "64MiB")).unwrap();
        let mut command = command(&settings);
        command.arg("--port").arg(port);
        command
    }

    fn start() -> Self {
        Endpoint::of(fixture("tiny-llama"))
    }

    fn of(model: PathBuf) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::spawn(Endpoint::command(folder.path(), &model, "0"));
        Endpoint { folder, model, server }
    }

    /// On the port it had.
    fn start_again(&mut self) {
        let port = self.server.url.rsplit(':').next().unwrap().to_owned();
        self.server = Server::spawn(Endpoint::command(self.folder.path(), &self.model, &port));
    }
}

/// The settings of a role behind these endpoints.
fn behind(endpoints: &[&Endpoint], patience: u32) -> String {
    let urls: Vec<String> = endpoints.iter().map(|one| format!("{}/v1", one.server.url)).collect();
    format!(
        "backend = \"remote\", model = \"teacher\", urls = {urls:?}, max_retries = 2, max_concurrency = 2, \
         patience_seconds = {patience}"
    )
}

/// Teacher remote, reward a classifier, student native.
fn house(folder: &Path, endpoints: &[&Endpoint], patience: u32) -> Server {
    let reward = "{kind = \"classifier\", model = \"classifier\"}";
    let teacher = format!("{{{}}}", behind(endpoints, patience));
    Server::spawn(command(&settings_of(folder, &fixture("tiny-llama"), &teacher, reward)))
}

/// Teacher and student native, the judge remote.
fn court(folder: &Path, judge: &Endpoint, patience: u32) -> Server {
    let judge = format!("{{kind = \"judge\", {}}}", behind(&[judge], patience));
    Server::spawn(command(&settings_of(folder, &fixture("tiny-llama"), "{model = \"tiny\"}", &judge)))
}

/// Conversations of the job: 24 prompts to learn from, 12 to evaluate on.
const ROWS: u64 = 36;

fn job() -> Value {
    let mut request = request();
    request["synthesis"]["max_tokens"] = json!(32);
    request["training"]["epochs"] = json!(1);
    request
}

/// In the middle of a stage.
fn middle_of(stage: &str) -> impl Fn(&Value) -> bool {
    move |event| event["data"]["stage"] == stage && event["data"]["done"].as_u64() > Some(2)
}

/// Waits until the job is paused because nobody answers; the rows of the stage that are kept.
fn paused_in(server: &Server, id: &str, after: &mut i64, stage: &str) -> u64 {
    server.reach(id, after, |event| event["data"]["status"] == "paused");
    let paused = server.get(&format!("/v1/rdpo/train/{id}"));
    assert_eq!((&paused["status"], &paused["error"]["code"]), (&json!("paused"), &json!("endpoint_unreachable")));
    let progress = &paused["progress"][stage];
    let kept = progress["done"].as_u64().unwrap();
    assert!((3..progress["total"].as_u64().unwrap()).contains(&kept), "{paused}");
    kept
}

pub(super) fn metric(server: &Server, line: &str) -> f64 {
    let text = server.text("/metrics");
    let found = text.lines().find_map(|one| one.strip_prefix(line));
    found.unwrap_or_else(|| panic!("no {line} in {text}")).trim().parse().unwrap()
}

/// Requests that an endpoint answered.
fn answered(server: &Server) -> f64 {
    metric(server, "rdpo_request_success_total{finish_reason=\"length\",role=\"teacher\"}")
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
    let asked = [&one.server, &two.server].map(answered);
    assert!(asked[0] > 20.0 && asked[1] > 20.0, "both did their share: {asked:?}");
    assert!(asked[0] + asked[1] <= 3.0 * ROWS as f64);
    assert!(metric(&server, "rdpo_generation_tokens_total{role=\"teacher\"}") > 3.0 * ROWS as f64);
    drop(server);

    // One endpoint dies in the middle of the job.
    let folder = tempfile::tempdir().unwrap();
    let server = house(folder.path(), &[&one, &two], 600);
    let (id, mut after) = (server.submit(&job()), 0);
    server.reach(&id, &mut after, middle_of("synthesizing"));
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
    server.reach(&id, &mut after, middle_of("synthesizing"));
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
    server.reach(&id, &mut after, middle_of("synthesizing"));
    one.server.kill();
    let kept = paused_in(&server, &id, &mut after, "synthesizing");
    one.start_again();
    server.post(&format!("/v1/rdpo/train/{id}/resume"));
    let done = server.wait(&id);
    assert_eq!((&done["error"], &done["progress"]["synthesizing"]["done"]), (&Value::Null, &json!(ROWS)));
    assert!(adapter(folder.path()) == expected, "the same bytes as without the pause");
    // The rows from before the pause were not written again: only the rest went to the endpoint that was started since.
    assert!(answered(&one.server) <= 3.0 * (ROWS - kept) as f64);
}

#[test]
fn a_job_outlives_its_judge_while_it_scores_and_while_it_evaluates() {
    // Only a real model keeps to numbers.
    let mut judge = Endpoint::of(real_model::path());
    let folder = tempfile::tempdir().unwrap();
    let server = court(folder.path(), &judge, 600);
    let id = server.submit(&job());
    let straight = server.wait(&id);
    let expected = adapter(folder.path());
    let report = &straight["result"]["report"];
    assert_eq!((&report["prompts"], &report["scored"]), (&json!(12), &json!(12)), "{straight}");
    drop(server);

    let folder = tempfile::tempdir().unwrap();
    let server = court(folder.path(), &judge, 2);
    let (id, mut after) = (server.submit(&job()), 0);
    for stage in ["scoring", "evaluating"] {
        server.reach(&id, &mut after, middle_of(stage));
        judge.server.kill();
        let kept = paused_in(&server, &id, &mut after, stage);
        judge.start_again();
        server.post(&format!("/v1/rdpo/train/{id}/resume"));
        let all = straight["progress"][stage]["total"].as_u64().unwrap();
        server.reach(&id, &mut after, |event| event["data"]["stage"] == stage && event["data"]["done"] == all);
        // Each row is two answers, and only those that were missing were asked about.
        assert!(answered(&judge.server) <= 2.0 * (all - kept) as f64, "{kept} of {all} were kept");
    }
    let done = server.wait(&id);
    assert_eq!(done["result"]["pairs"], straight["result"]["pairs"]);
    assert_eq!(&done["result"]["report"], report, "the same report as without the deaths");
    assert!(adapter(folder.path()) == expected, "the same bytes as without the deaths");
}
