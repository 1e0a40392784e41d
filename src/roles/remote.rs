//! A model behind OpenAI-compatible endpoints: chats and texts are sent there, failed tries repeated, answers counted.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use serde_json::{Map, Value, json};

use super::flight::{Flight, Line, Lines, usage, why};
use super::pool::{Place, Pool};
use super::{Answer, Role, RoleOptions};
use crate::engine::{FinishReason, SamplingParams};
use crate::error::{Code, Error, Result};
use crate::text::Message;

/// Pause before the second try; doubles with each, and is drawn between a half and all of it.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// A role's model at one endpoint or several.
pub struct Remote {
    role: &'static str,
    model: String,
    pool: Arc<Pool>,
    timeout: Duration,
    retries: usize,
    patience: Duration,
}

/// What an endpoint is asked to go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A conversation.
    Chat,
    /// A text.
    Text,
}

impl Start {
    fn path(self) -> &'static str {
        match self {
            Start::Chat => "chat/completions",
            Start::Text => "completions",
        }
    }

    /// Where a request says it.
    fn field(self) -> &'static str {
        match self {
            Start::Chat => "messages",
            Start::Text => "prompt",
        }
    }

    /// The chunk that ends these choices, for an endpoint that does not.
    fn ending(self, open: &[u64]) -> Value {
        let end = |index: &u64| match self {
            Start::Chat => json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": "stop"}),
            Start::Text => json!({"index": index, "text": "", "logprobs": null, "finish_reason": "stop"}),
        };
        json!({"choices": open.iter().map(end).collect::<Vec<_>>()})
    }
}

/// The chunks of a streamed answer, as the endpoint sent them. Dropping it ends the request at the endpoint too.
pub type Chunks = Pin<Box<dyn Stream<Item = Result<Value>> + Send>>;

/// A try's answer.
enum Reply {
    Whole(Value),
    Stream(Response),
}

/// Why a try has none.
enum Trouble {
    /// The request is at fault, or the key: another try would end alike.
    Refused(Error),
    /// The endpoint has no room; perhaps it says for how long.
    Busy { why: String, rest: Option<Duration> },
    /// The endpoint is at fault.
    Failed { why: String, rest: Option<Duration> },
}

impl Remote {
    pub(super) fn new(role: Role, options: &RoleOptions) -> Result<Arc<Self>> {
        let role = role.name();
        options.check(role)?;
        let seconds = |key: &str, given: Option<f64>, usual: f64| {
            let time = Duration::try_from_secs_f64(given.unwrap_or(usual)).ok().filter(|time| !time.is_zero());
            time.ok_or_else(|| Error::invalid(format!("roles.{role}.{key}"), "must be a number of seconds above 0"))
        };
        let timeout = seconds("timeout_seconds", options.timeout_seconds, 300.0)?;
        Ok(Arc::new(Remote {
            role,
            model: options.model.clone(),
            pool: Pool::new(role, options, timeout)?,
            timeout,
            retries: options.max_retries.unwrap_or(4),
            patience: seconds("patience_seconds", options.patience_seconds, 600.0)?,
        }))
    }

    /// The model's name at the endpoints.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Requests worth having in flight: what all endpoints take at once.
    pub fn capacity(&self) -> usize {
        self.pool.capacity()
    }

    /// Whether an endpoint can be asked now or soon; those that are out are probed at once.
    pub async fn is_reachable(&self) -> bool {
        self.pool.is_reachable().await
    }

    /// How long a job waits without finishing a row.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// The whole answer to a chat, its text and its counts. Of the parameters, those that jobs set are sent.
    pub async fn answer(&self, messages: &[Message], params: &SamplingParams) -> Result<Answer> {
        let mut body = Remote::question(messages)?;
        body.insert("temperature".into(), number(params.temperature));
        body.insert("top_p".into(), number(params.top_p));
        if let Some(most) = params.max_tokens {
            body.insert("max_tokens".into(), json!(most));
        }
        if let Some(seed) = params.seed {
            // What the narrowest server takes.
            body.insert("seed".into(), json!(seed & 0x7fff_ffff));
        }
        let reply = self.complete(Start::Chat, body).await?;
        let choice = &reply["choices"][0];
        let reason = match choice["finish_reason"].as_str() {
            Some("length") => FinishReason::Length,
            _ => FinishReason::Stop { text: None, token: None },
        };
        let text = choice["message"]["content"].as_str().unwrap_or_default().to_owned();
        Ok(Answer { text, reason, usage: usage(&reply), ..Answer::default() })
    }

    /// The body that asks about these turns. Templates take the arguments of calls as objects, endpoints as text.
    pub fn question(messages: &[Message]) -> Result<Map<String, Value>> {
        let mut turns = serde_json::to_value(messages)?;
        let calls = turns.as_array_mut().into_iter().flatten().filter_map(|turn| turn.get_mut("tool_calls"));
        for call in calls.filter_map(Value::as_array_mut).flatten() {
            let arguments = &mut call["function"]["arguments"];
            if !arguments.is_string() {
                *arguments = arguments.to_string().into();
            }
        }
        Ok(Map::from_iter([("messages".to_owned(), turns)]))
    }

    /// Sends a completion's body under the endpoint's name of the model; the whole answer, as the endpoint gave it.
    pub async fn complete(&self, start: Start, mut body: Map<String, Value>) -> Result<Value> {
        body.insert("stream".into(), false.into());
        let mut flight = Flight::new(self.role);
        match self.send(start, body, &mut flight).await? {
            (Reply::Whole(reply), _) => {
                flight.read(&reply);
                Ok(reply)
            }
            (Reply::Stream(_), _) => {
                Err(Error::internal("an answer that was not asked for as a stream came as one. This is a bug."))
            }
        }
    }

    /// The same as a stream. The counts are always asked for: the last chunk has them, and no choices.
    pub async fn stream(&self, start: Start, mut body: Map<String, Value>) -> Result<Chunks> {
        body.insert("stream".into(), true.into());
        let options = body.entry("stream_options").or_insert_with(|| json!({}));
        options["include_usage"] = true.into();
        let mut flight = Flight::new(self.role);
        let (reply, place) = self.send(start, body, &mut flight).await?;
        let Reply::Stream(response) = reply else {
            return Err(Error::internal("a stream that was asked for did not come as one. This is a bug."));
        };
        let role = self.role;
        Ok(Box::pin(async_stream::stream! {
            let mut lines = Lines::new(response);
            loop {
                let line = lines.next().await;
                if matches!(line, Ok(Line::Done)) {
                    let open = flight.end();
                    if !open.is_empty() {
                        yield Ok(start.ending(&open));
                    }
                }
                match line {
                    Ok(Line::Event(chunk)) => {
                        if let Some(error) = chunk.get("error").filter(|error| !error.is_null()) {
                            flight.failed();
                            yield Err(Error::new(Code::Unreachable, format!("`{role}`'s endpoint failed in the middle of an answer: {}", said(error))));
                            return;
                        }
                        flight.first();
                        flight.read(&chunk);
                        yield Ok(chunk);
                    }
                    Ok(Line::Done | Line::Closed) if flight.has_ended() => {
                        place.worked();
                        return;
                    }
                    end => {
                        let why = match end {
                            Err(why) => why,
                            Ok(Line::Done) => "it ended without a choice".into(),
                            Ok(_) => "the connection was closed".into(),
                        };
                        place.failed(&why);
                        flight.failed();
                        yield Err(Error::new(Code::Unreachable, format!("`{role}`'s endpoint stopped in the middle of an answer: {why}")));
                        return;
                    }
                }
            }
        }))
    }

    /// Tries until an endpoint answers, the request is refused, or the tries are used up.
    async fn send(&self, start: Start, mut body: Map<String, Value>, flight: &mut Flight) -> Result<(Reply, Place)> {
        body.insert("model".into(), self.model.clone().into());
        let body = Value::Object(body);
        let mut pause = FIRST_PAUSE;
        let (mut last, mut failed) = (String::new(), None);
        for attempt in 0..=self.retries {
            let place = self.pool.place(failed).await.inspect_err(|_| flight.failed())?;
            flight.begin();
            match self.once(start, &place, &body).await {
                Ok(reply) => {
                    if let Reply::Whole(_) = reply {
                        place.worked();
                    }
                    return Ok((reply, place));
                }
                Err(Trouble::Refused(error)) => {
                    place.worked();
                    flight.failed();
                    return Err(error);
                }
                Err(Trouble::Busy { why, rest }) => {
                    place.rest(rest.unwrap_or_default());
                    last = why;
                }
                Err(Trouble::Failed { why, rest }) => {
                    place.rest(rest.unwrap_or_default());
                    place.failed(&why);
                    last = why;
                }
            }
            let index = place.index();
            failed = Some(index);
            drop(place);
            flight.wait();
            if attempt < self.retries && !self.pool.has_another(index) {
                tokio::time::sleep(pause.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        flight.failed();
        let tries = self.retries + 1;
        Err(Error::new(
            Code::Unreachable,
            format!("`{}` is remote: {tries} tries failed, the last one with: {last}", self.role),
        ))
    }

    async fn once(&self, start: Start, place: &Place, body: &Value) -> Result<Reply, Trouble> {
        let streams = body["stream"] == true;
        let mut request = place.post(start.path()).json(body);
        if !streams {
            request = request.timeout(self.timeout);
        }
        let failed = |why: String| Trouble::Failed { why, rest: None };
        let response = request.send().await.map_err(|error| failed(why(error)))?;
        let status = response.status();
        if !status.is_success() {
            let rest = retry_after(response.headers());
            let text = response.bytes().await.unwrap_or_default();
            return Err(self.refusal(start, status, rest, &text));
        }
        if streams {
            return Ok(Reply::Stream(response));
        }
        let bytes = response.bytes().await.map_err(|error| failed(why(error)))?;
        match serde_json::from_slice::<Value>(&bytes) {
            Ok(reply) if reply["choices"].as_array().is_some_and(|choices| !choices.is_empty()) => {
                Ok(Reply::Whole(reply))
            }
            _ => Err(failed("its answer is no completion".into())),
        }
    }

    fn refusal(&self, start: Start, status: StatusCode, rest: Option<Duration>, text: &[u8]) -> Trouble {
        let body: Value = serde_json::from_slice(text).unwrap_or_default();
        let (role, number, error) = (self.role, status.as_u16(), &body["error"]);
        let message = said(if error.is_null() { &body } else { error });
        let why = format!("status {number}: {message}");
        let lower = message.to_lowercase();
        match number {
            408 | 429 => return Trouble::Busy { why, rest },
            // llama-cpp-python says so with a 500; no other try will end otherwise.
            500.. if !lower.contains("logprobs is not supported") => return Trouble::Failed { why, rest },
            _ => {}
        }
        let text = format!("`{role}`'s endpoint refused with {why}");
        // TGI says it the last way.
        let phrases = ["context length", "context window", "context size", "`max_new_tokens` must be <="];
        let too_long = error["code"] == "context_length_exceeded" || phrases.iter().any(|words| lower.contains(words));
        // A parameter at fault is so for every conversation.
        let param = error["param"].as_str().filter(|param| !param.starts_with(start.field()));
        Trouble::Refused(match number {
            // Whoever asks cannot mend the key or the name of the model.
            401 | 403 | 404 => Error::internal(text),
            _ if too_long => Error::new(Code::ContextLengthExceeded, text).at(start.field()),
            _ => match param {
                Some(param) => Error::invalid(param, text),
                None => Error::new(Code::Refused, text),
            },
        })
    }
}

/// As the decimal that was meant: 0.7, not 0.699999988.
fn number(value: f32) -> Value {
    json!((f64::from(value) * 1e6).round() / 1e6)
}

/// What an error body says: OpenAI's `message`, FastAPI's `detail`, or all of it.
fn said(error: &Value) -> String {
    let text = [&error["message"], &error["detail"], error].into_iter().find_map(Value::as_str).map(str::to_owned);
    let text = text.unwrap_or_else(|| if error.is_null() { "no message".into() } else { error.to_string() });
    text.chars().take(1000).collect()
}

/// Seconds only: of servers of models none sends a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}
