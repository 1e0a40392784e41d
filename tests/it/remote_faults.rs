//! What a remote role does when its endpoints fail, each failure forced.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, future::join_all};
use rdpo::engine::SamplingParams;
use rdpo::error::{Code, Error};
use rdpo::rdpo::{PromptInput, Sample, SynthesisOptions, behaviors, synthesize};
use rdpo::roles::{Backend, HttpRewardOptions, JudgeOptions, RewardOptions, RoleOptions, Roles, Rubric, Score, Start};
use rdpo::text::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::binary::{Server, command, settings_of};
use super::hot_swap::{fixture, options, rules};
use super::remote::metric;

/// An answer of a [`Fake`].
#[derive(Clone)]
struct Say {
    wait: Duration,
    status: u16,
    header: &'static str,
    body: String,
}

fn say(status: u16, body: Value) -> Say {
    Say { wait: Duration::ZERO, status, header: "", body: body.to_string() }
}

fn hello() -> Say {
    let choice = json!({"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"});
    say(200, json!({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}))
}

/// An endpoint that does as it is told.
struct Fake {
    url: String,
    /// Whether its health probe succeeds.
    well: AtomicBool,
    asked: AtomicUsize,
    running: AtomicUsize,
    /// Most requests at once.
    peak: AtomicUsize,
    /// Requests as they came.
    seen: Mutex<Vec<String>>,
    script: Box<dyn Fn(usize) -> Say + Send + Sync>,
}

impl Fake {
    /// `script` has the answer to each request, by its number.
    async fn start(script: impl Fn(usize) -> Say + Send + Sync + 'static) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Arc::new(Fake {
            url: format!("http://{}/v1", listener.local_addr().unwrap()),
            well: AtomicBool::new(true),
            asked: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            seen: Mutex::default(),
            script: Box::new(script),
        });
        let serving = fake.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serving.clone().answer(stream));
            }
        });
        fake
    }

    async fn answer(self: Arc<Self>, mut stream: TcpStream) {
        let mut request = Vec::new();
        let (mut piece, mut whole) = ([0; 4096], usize::MAX);
        while request.len() < whole {
            let read = stream.read(&mut piece).await.unwrap();
            request.extend_from_slice(&piece[..read]);
            let text = String::from_utf8_lossy(&request);
            if let Some(end) = text.find("\r\n\r\n") {
                let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
                whole = end + 4 + length.map_or(0, |length| length.parse::<usize>().unwrap());
            }
        }
        let text = String::from_utf8(request).unwrap();
        let answer = if text.starts_with("GET /v1/models") {
            say(if self.well.load(Ordering::SeqCst) { 200 } else { 500 }, json!({}))
        } else {
            assert!(text.starts_with("POST /v1/chat/completions"), "{text}");
            self.seen.lock().unwrap().push(text);
            let answer = (self.script)(self.asked.fetch_add(1, Ordering::SeqCst));
            self.peak.fetch_max(self.running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(answer.wait).await;
            self.running.fetch_sub(1, Ordering::SeqCst);
            answer
        };
        let Say { status, header, body, .. } = answer;
        let head =
            format!("HTTP/1.1 {status} X\r\nconnection: close\r\n{header}content-length: {}\r\n\r\n", body.len());
        // Whoever gave up has closed the connection.
        let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn remote(fakes: &[&Arc<Fake>]) -> RoleOptions {
    RoleOptions {
        backend: Backend::Remote,
        urls: fakes.iter().map(|fake| fake.url.clone()).collect(),
        ..RoleOptions::native("big")
    }
}

fn load(teacher: RoleOptions) -> Result<Arc<Roles>, Error> {
    let data = tempfile::tempdir().unwrap();
    Roles::load(rdpo::roles::RolesOptions { teacher, ..options(data.path(), rules()) })
}

async fn ask(roles: &Roles) -> Result<String, Error> {
    let params = SamplingParams { max_tokens: Some(4), seed: Some(u64::MAX), ..SamplingParams::default() };
    roles.teacher()?.answer(&[Message::new("user", "Hi")], params).await.map(|answer| answer.text)
}

#[tokio::test]
async fn a_failing_endpoint_is_left_and_taken_again() {
    let well = Arc::new(AtomicBool::new(false));
    let now = well.clone();
    let bad = Fake::start(move |_| if now.load(Ordering::SeqCst) { hello() } else { say(500, json!({})) }).await;
    let good = Fake::start(|_| hello()).await;
    bad.well.store(false, Ordering::SeqCst);
    let roles = load(remote(&[&bad, &good])).unwrap();
    for _ in 0..6 {
        assert_eq!(ask(&roles).await.unwrap(), "Hello");
    }
    assert_eq!((bad.asked(), good.asked()), (3, 6), "three failures in a row put it out");
    // Still unwell: its probes keep it out.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    ask(&roles).await.unwrap();
    assert_eq!(bad.asked(), 3);
    well.store(true, Ordering::SeqCst);
    bad.well.store(true, Ordering::SeqCst);
    let since = Instant::now();
    while bad.asked() == 3 {
        assert!(since.elapsed() < Duration::from_secs(20), "it is never asked again");
        tokio::time::sleep(Duration::from_millis(50)).await;
        ask(&roles).await.unwrap();
    }
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let busy = |number| match number {
        0 => Say { header: "retry-after: 1\r\n", ..say(429, json!({"error": {"message": "slow down"}})) },
        _ => hello(),
    };
    let one = Fake::start(busy).await;
    let roles = load(remote(&[&one])).unwrap();
    let since = Instant::now();
    assert_eq!(ask(&roles).await.unwrap(), "Hello");
    assert!(since.elapsed() >= Duration::from_secs(1) && one.asked() == 2);
    // Where another endpoint has room nobody waits.
    let (one, other) = (Fake::start(busy).await, Fake::start(|_| hello()).await);
    let roles = load(remote(&[&one, &other])).unwrap();
    let since = Instant::now();
    ask(&roles).await.unwrap();
    ask(&roles).await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(1));
    assert_eq!((one.asked(), other.asked()), (1, 2));
    // An hour is not waited for.
    let closed = Fake::start(|_| Say { header: "retry-after: 3600\r\n", ..say(429, json!({})) }).await;
    let error = ask(&load(remote(&[&closed])).unwrap()).await.unwrap_err();
    assert_eq!((error.code, closed.asked()), (Code::Unreachable, 1), "{error}");
}

#[tokio::test]
async fn refusals_are_passed_on_and_not_repeated() {
    for (status, body, code, param) in [
        (400, json!({"error": {"message": "no such thing", "param": "top_p"}}), Code::InvalidValue, Some("top_p")),
        (422, json!({"detail": "no such thing"}), Code::Refused, None),
        (
            400,
            json!({"error": {"message": "no such thing", "param": "messages", "code": "content_filter"}}),
            Code::Refused,
            None,
        ),
        (
            422,
            json!({"error": "no such thing: `inputs` tokens + `max_new_tokens` must be <= 9"}),
            Code::ContextLengthExceeded,
            Some("messages"),
        ),
        (
            400,
            json!({"message": "no such thing: the maximum context length is 9"}),
            Code::ContextLengthExceeded,
            Some("messages"),
        ),
        (401, json!({"error": "no such thing"}), Code::Internal, None),
        (404, json!({"error": {"message": "no such thing"}}), Code::Internal, None),
    ] {
        let fake = Fake::start(move |_| say(status, body.clone())).await;
        // Some variable that is there, with a value that nothing else says.
        let key = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").unwrap()).display().to_string();
        let roles = load(RoleOptions { api_key_env: Some("CARGO_MANIFEST_DIR".into()), ..remote(&[&fake]) }).unwrap();
        let error = ask(&roles).await.unwrap_err();
        assert_eq!((error.code, error.param.as_deref(), fake.asked()), (code, param, 1), "{error}");
        assert!(error.message.contains("no such thing") && !error.message.contains(&key), "{error}");
        let seen = fake.seen.lock().unwrap();
        assert!(seen[0].to_lowercase().contains(&format!("authorization: bearer {}", key.to_lowercase())), "{seen:?}");
        let body: Value = serde_json::from_str(seen[0].split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!((&body["model"], &body["messages"][0]["content"]), (&json!("big"), &json!("Hi")));
        assert_eq!(body["seed"], json!(i32::MAX), "within what every server takes");
    }
}

#[tokio::test]
async fn a_refused_conversation_leaves_the_others_alone() {
    // One at a time, so the fifth request is the critique of the second prompt's answer.
    let refuse = |number| match number {
        4 => say(400, json!({"error": {"message": "not about that", "code": "content_filter"}})),
        _ => hello(),
    };
    let fake = Fake::start(refuse).await;
    let roles = load(RoleOptions { max_concurrency: Some(1), ..remote(&[&fake]) }).unwrap();
    let behavior = behaviors().unwrap().remove(0);
    let prompts = ["a", "b", "c"].map(|text| PromptInput::Text(text.into())).into_iter().enumerate();
    let options = SynthesisOptions { respond_with: "teacher".into(), ..SynthesisOptions::default() };
    let mut refused = Vec::new();
    let mut on_sample = |sample: Sample| {
        refused.push((sample.prompt_index, sample.refused.is_some_and(|why| why.contains("not about that"))));
        Ok(())
    };
    let prompts = prompts.collect::<Vec<_>>();
    synthesize(&roles, &behavior, &prompts, &options, 0, &mut on_sample).await.unwrap();
    assert_eq!(refused, [(0, false), (1, true), (2, false)]);
}

#[tokio::test]
async fn a_slow_endpoint_is_given_up() {
    let slow = Fake::start(|_| Say { wait: Duration::from_secs(5), ..hello() }).await;
    let fast = Fake::start(|_| hello()).await;
    let roles = load(RoleOptions { timeout_seconds: Some(0.3), ..remote(&[&slow, &fast]) }).unwrap();
    let since = Instant::now();
    assert_eq!(ask(&roles).await.unwrap(), "Hello");
    assert!(since.elapsed() < Duration::from_secs(3));
    assert_eq!((slow.asked(), fast.asked()), (1, 1));
}

#[tokio::test]
async fn work_is_spread_and_bounded() {
    let wait = |_| Say { wait: Duration::from_millis(100), ..hello() };
    let (one, two) = (Fake::start(wait).await, Fake::start(wait).await);
    let roles = load(RoleOptions { max_concurrency: Some(2), ..remote(&[&one, &two]) }).unwrap();
    let teacher = roles.teacher().unwrap();
    assert_eq!(roles.max_in_flight([&teacher]), 4);
    let wide = load(RoleOptions { max_concurrency: Some(500), ..remote(&[&one]) }).unwrap();
    let (far, here) = (wide.teacher().unwrap(), wide.student_base().unwrap());
    assert_eq!(wide.max_in_flight([&far]), 500);
    assert_eq!(wide.max_in_flight([&far, &here]), wide.max_in_flight([&here]), "no more than the engine here runs");
    for answer in join_all((0..12).map(|_| ask(&roles))).await {
        assert_eq!(answer.unwrap(), "Hello");
    }
    for fake in [&one, &two] {
        assert_eq!((fake.asked(), fake.peak.load(Ordering::SeqCst)), (6, 2));
    }
}

#[tokio::test]
async fn tries_end_and_the_last_reason_is_said() {
    let fake = Fake::start(|_| say(503, json!({"error": {"message": "out of memory"}}))).await;
    let roles = load(RoleOptions { max_retries: Some(1), ..remote(&[&fake]) }).unwrap();
    let error = ask(&roles).await.unwrap_err();
    assert_eq!((error.code, fake.asked()), (Code::Unreachable, 2));
    assert!(error.message.contains("2 tries") && error.message.contains("out of memory"), "{error}");
    // What is no answer is a failure, whatever its status.
    let fake = Fake::start(|number| if number == 0 { say(200, json!("<html>")) } else { hello() }).await;
    assert_eq!(ask(&load(remote(&[&fake])).unwrap()).await.unwrap(), "Hello");
}

/// A piece of a streamed answer.
fn chunk(reason: Value) -> String {
    let choice = json!({"index": 0, "delta": {"content": "Hel"}, "finish_reason": reason});
    format!(": a comment\r\ndata:{}\n\n", json!({"choices": [choice], "error": null}))
}

fn whole_stream() -> Say {
    let body = format!("{}{}data: [DONE]\n\n", chunk(Value::Null), chunk(json!("stop")));
    Say { body, ..hello() }
}

/// What comes of each of these streams, asked for in turn at one endpoint.
async fn streamed(bodies: Vec<String>) -> (Arc<Fake>, Vec<Vec<Result<Value, Error>>>) {
    let count = bodies.len();
    let fake = Fake::start(move |number| Say { body: bodies[number].clone(), ..hello() }).await;
    let roles = load(remote(&[&fake])).unwrap();
    let teacher = roles.teacher().unwrap();
    let mut streams = Vec::new();
    for _ in 0..count {
        let body = json!({"messages": [{"role": "user", "content": "Hi"}]}).as_object().unwrap().clone();
        streams.push(teacher.remote().unwrap().stream(Start::Chat, body).await.unwrap().collect().await);
    }
    (fake, streams)
}

#[tokio::test]
async fn a_stream_that_breaks_off_says_so() {
    let cut = chunk(Value::Null);
    let middle = format!("{cut}data:{{\"choices\": [");
    let failed = format!("{cut}data: {}\n\n", json!({"error": {"message": "out of luck"}}));
    let empty = "data: [DONE]\n\n".to_owned();
    let (fake, streams) = streamed(vec![whole_stream().body, cut, middle, whole_stream().body, failed, empty]).await;
    for whole in [&streams[0], &streams[3]] {
        assert!(whole.len() == 2 && whole.iter().all(Result::is_ok), "{whole:?}");
    }
    for (number, why) in [(1, "connection was closed"), (2, "connection was closed"), (4, "out of luck")] {
        let cut = &streams[number];
        assert_eq!(cut[0].as_ref().unwrap()["choices"][0]["delta"]["content"], "Hel");
        let error = cut[1].as_ref().unwrap_err();
        assert!(error.message.contains("middle of an answer") && error.message.contains(why), "{error}");
        assert_eq!(cut.len(), 2);
    }
    assert!(streams[5].len() == 1 && streams[5][0].is_err(), "an answer without a choice: {:?}", streams[5]);
    assert!(fake.seen.lock().unwrap()[0].contains("\"include_usage\":true"), "the counts are always asked for");
}

#[tokio::test]
async fn a_stream_may_end_as_the_endpoint_likes() {
    let unsaid = format!("{}data: [DONE]", chunk(Value::Null));
    let bare = format!("{}{}", chunk(Value::Null), chunk(json!("length")).trim_end());
    // More of them than failures put an endpoint out.
    let (_, streams) = streamed(vec![unsaid.clone(), unsaid.clone(), unsaid.clone(), unsaid, bare]).await;
    for (number, stream) in streams.iter().enumerate() {
        let chunks: Vec<&Value> = stream.iter().map(|chunk| chunk.as_ref().unwrap()).collect();
        let reason = if number == 4 { "length" } else { "stop" };
        assert_eq!(chunks.len(), 2, "{chunks:?}");
        assert_eq!(chunks[0]["choices"][0]["finish_reason"], Value::Null);
        assert_eq!(chunks[1]["choices"][0]["finish_reason"], reason);
        assert_eq!(chunks[1]["choices"][0]["index"], 0);
    }
}

/// The settings of a reward behind this endpoint.
fn scorer(fake: &Fake) -> HttpRewardOptions {
    // The only path that a `Fake` knows.
    let url = format!("{}/chat/completions", fake.url);
    HttpRewardOptions { url, timeout_seconds: None, max_retries: Some(2), concurrency: None, api_key_env: None }
}

#[tokio::test]
async fn a_scorer_that_is_busy_is_asked_again() {
    for (status, tries) in [(408, 2), (429, 2), (503, 2), (404, 1)] {
        let answer = move |number| if number == 0 { say(status, json!({})) } else { say(200, json!({"score": 0.5})) };
        let fake = Fake::start(answer).await;
        let data = tempfile::tempdir().unwrap();
        let roles = Roles::load(options(data.path(), RewardOptions::Http(scorer(&fake)))).unwrap();
        let turns = [Message::new("user", "Hi"), Message::new("assistant", "Hello")];
        let score = roles.reward().unwrap().score(&turns, None).await;
        assert_eq!(
            (score.map(|score| score.value).ok(), fake.asked()),
            ((tries == 2).then_some(0.5), tries),
            "{status}"
        );
    }
}

/// The release server between fakes: with a key that has blanks around it, and more time for a request than a clock counts.
#[test]
fn a_server_waits_for_its_endpoints_and_trims_their_keys() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let busy = Say { header: "retry-after: 3\r\n", ..say(429, json!({})) };
    let answer = move |number| if number == 0 { busy.clone() } else { whole_stream() };
    let teacher = runtime.block_on(Fake::start(answer));
    let reward = runtime.block_on(Fake::start(|_| say(200, json!({"score": 0.5}))));
    let folder = tempfile::tempdir().unwrap();
    let key = "api_key_env = \"ENDPOINTS_KEY\"";
    let settings = settings_of(
        folder.path(),
        &fixture("tiny-llama"),
        &format!("{{backend = \"remote\", model = \"big\", url = {:?}, {key}}}", teacher.url),
        &format!("{{kind = \"http\", url = {:?}, {key}}}", scorer(&reward).url),
    );
    let text = std::fs::read_to_string(&settings).unwrap();
    let text = text.replace("port = 0\n", &format!("port = 0\nrequest_timeout = {}\n", i64::MAX));
    std::fs::write(&settings, text).unwrap();
    let mut command = command(&settings);
    command.env("ENDPOINTS_KEY", " sesame\n");
    let server = Server::spawn(command);
    let ask = |model: &str, stream: bool| {
        let turns = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]);
        let body = json!({"model": model, "messages": turns, "stream": stream});
        let sent = reqwest::Client::new().post(format!("{}/v1/chat/completions", server.url)).json(&body).send();
        runtime.spawn(async { sent.await.unwrap().text().await.unwrap() })
    };
    let (asked, since) = (ask("teacher", true), Instant::now());
    let count = |state: &str| metric(&server, &format!("rdpo_requests_{state}{{role=\"teacher\"}}"));
    // While it waits for another try, it waits and does nothing else.
    while teacher.asked() == 0 || (count("waiting"), count("running")) != (1.0, 0.0) {
        assert!(teacher.asked() < 2 && since.elapsed() < Duration::from_secs(20), "it never only waits");
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = runtime.block_on(asked).unwrap();
    assert!(said.contains("\"finish_reason\":\"stop\"") && said.ends_with("data: [DONE]\n\n"), "{said}");
    assert_eq!((count("waiting"), count("running")), (0.0, 0.0));
    let said = runtime.block_on(ask("reward", false)).unwrap();
    assert!(said.contains("\"reward\":0.5"), "{said}");
    for fake in [&teacher, &reward] {
        let seen = fake.seen.lock().unwrap();
        assert!(seen[0].to_lowercase().contains("authorization: bearer sesame\r\n"), "{seen:?}");
    }
}

async fn judged(answer: Value, rubric: Value) -> Result<Score, Error> {
    judged_by(say(200, json!({"choices": [answer]})), rubric).await
}

async fn judged_by(answer: Say, rubric: Value) -> Result<Score, Error> {
    let fake = Fake::start(move |_| answer.clone()).await;
    let data = tempfile::tempdir().unwrap();
    let judge = RewardOptions::Judge(JudgeOptions { role: remote(&[&fake]), rubric: None });
    let roles = Roles::load(options(data.path(), judge)).unwrap();
    let mut rubric = rubric;
    rubric["prompt"] = json!("Grade. {prompt} / {response}");
    let rubric: Rubric = serde_json::from_value(rubric).unwrap();
    let turns = [Message::new("user", "Hi"), Message::new("assistant", "Hello")];
    roles.reward().unwrap().score(&turns, Some(&rubric)).await
}

#[tokio::test]
async fn a_remote_judge_is_read_from_its_likeliest_tokens() {
    let entry = |token: &str, p: f64| json!({"token": token, "logprob": p.ln()});
    let top = json!([entry(" 3", 0.4), entry("7", 0.3), entry("1", 0.2), entry("x", 0.1)]);
    let answer = json!({"message": {"content": " 3"}, "logprobs": {"content": [{"top_logprobs": top}]}});
    let score = judged(answer.clone(), json!({"min": 1, "max": 5})).await.unwrap();
    assert!((score.value - (0.4 * 3.0 + 0.2) / 0.6).abs() < 1e-9, "{score:?}");
    // None of the allowed values is among them: no number is made up.
    assert_eq!(judged(answer.clone(), json!({"min": 8, "max": 9})).await.unwrap_err().code, Code::Unprocessable);
    // What one token cannot tell is not asked of it.
    let error = judged(answer, json!({"min": 1, "max": 10})).await.unwrap_err();
    assert_eq!((error.status(), error.param.as_deref()), (400, Some("judge.max")));
    let bare = json!({"message": {"content": "I think. Score: 4"}, "logprobs": null});
    let error = judged(bare.clone(), json!({"min": 1, "max": 5})).await.unwrap_err();
    assert_eq!((error.status(), error.param.as_deref()), (400, Some("judge.mode")));
    assert!(error.message.contains("generate"), "{error}");
    for status in [400, 500] {
        let refused = say(status, json!({"error": {"message": "logprobs is not supported here"}}));
        let error = judged_by(refused, json!({"min": 1, "max": 5})).await.unwrap_err();
        assert_eq!((error.status(), error.param.as_deref()), (400, Some("judge.mode")));
        assert!(error.message.contains("not supported here") && error.message.contains("generate"), "{error}");
    }
    let score = judged(bare, json!({"min": 1, "max": 10, "mode": "generate"})).await.unwrap();
    assert_eq!(score.value, 4.0);
}

#[test]
fn settings_that_cannot_work_are_named() {
    let with = |change: fn(&mut RoleOptions)| {
        let mut teacher =
            RoleOptions { backend: Backend::Remote, url: Some("http://a/v1".into()), ..RoleOptions::native("big") };
        change(&mut teacher);
        load(teacher).err().unwrap()
    };
    let scored_at = |url: &str, key: Option<&str>| {
        let http = json!({"kind": "http", "url": url, "api_key_env": key});
        let data = tempfile::tempdir().unwrap();
        Roles::load(options(data.path(), serde_json::from_value(http).unwrap())).err().unwrap()
    };
    for (error, param) in [
        (with(|role| role.api_key_env = Some("RDPO_NO_SUCH_VARIABLE".into())), "roles.teacher.api_key_env"),
        (with(|role| role.max_concurrency = Some(0)), "roles.teacher.max_concurrency"),
        (with(|role| role.timeout_seconds = Some(-1.0)), "roles.teacher.timeout_seconds"),
        (with(|role| role.patience_seconds = Some(f64::NAN)), "roles.teacher.patience_seconds"),
        (with(|role| role.url = Some("ftp://a".into())), "roles.teacher.urls"),
        (with(|role| role.url = Some("a".into())), "roles.teacher.urls"),
        (with(|role| role.url = Some("http://me:sesame@a/v1".into())), "roles.teacher.urls"),
        (with(|role| role.url = Some("http://a/v1?key=sesame".into())), "roles.teacher.urls"),
        (scored_at("ftp://me:sesame@a", None), "roles.reward.url"),
        (scored_at("a", None), "roles.reward.url"),
        (scored_at("http://a", Some("RDPO_NO_SUCH_VARIABLE")), "roles.reward.api_key_env"),
    ] {
        assert_eq!(error.param.as_deref(), Some(param), "{error}");
        assert!(!error.message.contains("sesame"), "{error}");
    }
}
