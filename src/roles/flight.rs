//! One request to an endpoint: its events as they come, and how it is counted.

use std::collections::BTreeMap;
use std::time::Instant;

use reqwest::Response;
use serde_json::Value;

use super::pool::Counted;
use crate::engine::Usage;
use crate::telemetry::metrics;

/// Most bytes of one event of a stream.
const MOST_LINE: usize = 16 << 20;

/// The counts in an endpoint's answer.
pub fn usage(reply: &Value) -> Usage {
    let usage = &reply["usage"];
    let count = |value: &Value| value.as_u64().unwrap_or(0) as usize;
    Usage {
        prompt_tokens: count(&usage["prompt_tokens"]),
        cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]),
        completion_tokens: count(&usage["completion_tokens"]),
    }
}

/// Why there was no answer, without the address.
pub(super) fn why(error: reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".into();
    }
    if error.is_connect() {
        return "it cannot be reached".into();
    }
    error.without_url().to_string()
}

/// What comes next in a stream.
pub(super) enum Line {
    /// An event.
    Event(Value),
    /// `[DONE]`.
    Done,
    /// The end of the connection.
    Closed,
}

/// The `data:` events of a response.
pub(super) struct Lines {
    response: Response,
    buffer: Vec<u8>,
    closed: bool,
}

impl Lines {
    pub(super) fn new(response: Response) -> Self {
        Lines { response, buffer: Vec::new(), closed: false }
    }

    /// The next event, or how the stream ended.
    pub(super) async fn next(&mut self) -> std::result::Result<Line, String> {
        let mut seen = 0;
        loop {
            let end = self.buffer[seen..].iter().position(|byte| *byte == b'\n');
            let line: Vec<u8> = match end {
                Some(at) => self.buffer.drain(..=seen + at).collect(),
                None if self.buffer.is_empty() && self.closed => return Ok(Line::Closed),
                // The last line may end with the connection.
                None if self.closed => std::mem::take(&mut self.buffer),
                None => {
                    seen = self.buffer.len();
                    if seen > MOST_LINE {
                        return Err("an event is too long".into());
                    }
                    match self.response.chunk().await.map_err(why)? {
                        Some(bytes) => self.buffer.extend_from_slice(&bytes),
                        None => self.closed = true,
                    }
                    continue;
                }
            };
            seen = 0;
            // Everything else is a comment, an event's name or the empty line between two.
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            return match data.trim_ascii() {
                b"[DONE]" => Ok(Line::Done),
                data => match serde_json::from_slice(data) {
                    Ok(event) => Ok(Line::Event(event)),
                    // It was cut off.
                    Err(_) if end.is_none() => Ok(Line::Closed),
                    Err(_) => Err("an event is no JSON".into()),
                },
            };
        }
    }
}

/// A request from its arrival to its end, counted as the engine counts its own.
pub(super) struct Flight {
    role: &'static str,
    arrived: Instant,
    /// As waiting or as running.
    counted: Counted,
    talked: bool,
    usage: Usage,
    reason: Option<&'static str>,
    /// The choices that have begun, and whether each has ended.
    choices: BTreeMap<u64, bool>,
}

impl Flight {
    pub(super) fn new(role: &'static str) -> Self {
        Flight {
            role,
            arrived: Instant::now(),
            counted: Counted::new(&metrics().requests_waiting, role),
            talked: false,
            usage: Usage::default(),
            reason: None,
            choices: BTreeMap::new(),
        }
    }

    /// It has a place.
    pub(super) fn begin(&mut self) {
        self.counted = Counted::new(&metrics().requests_running, self.role);
    }

    /// It has given its place back and needs another.
    pub(super) fn wait(&mut self) {
        self.counted = Counted::new(&metrics().requests_waiting, self.role);
    }

    /// Its end is known.
    pub(super) fn has_ended(&self) -> bool {
        self.reason.is_some()
    }

    /// Ends the choices that the endpoint has not: which they are.
    pub(super) fn end(&mut self) -> Vec<u64> {
        let open = |(index, ended): (&u64, &mut bool)| (!std::mem::replace(ended, true)).then_some(*index);
        let open: Vec<u64> = self.choices.iter_mut().filter_map(open).collect();
        if !open.is_empty() {
            self.reason.get_or_insert("stop");
        }
        open
    }

    /// Something of the answer is here.
    pub(super) fn first(&mut self) {
        if !std::mem::replace(&mut self.talked, true) {
            let waited = self.arrived.elapsed().as_secs_f64();
            metrics().time_to_first_token_seconds.with_label_values(&[self.role]).observe(waited);
        }
    }

    pub(super) fn failed(&mut self) {
        self.reason = Some("error");
    }

    /// Takes counts and reasons out of an answer or a chunk.
    pub(super) fn read(&mut self, reply: &Value) {
        if reply["usage"].is_object() {
            self.usage = usage(reply);
        }
        for choice in reply["choices"].as_array().into_iter().flatten() {
            let ended = self.choices.entry(choice["index"].as_u64().unwrap_or(0)).or_default();
            *ended |= choice["finish_reason"].is_string();
            self.reason = match choice["finish_reason"].as_str() {
                None => self.reason,
                Some("length") => Some("length"),
                Some(_) => Some("stop"),
            };
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let (metrics, role) = (metrics(), [self.role]);
        metrics.prompt_tokens_total.with_label_values(&role).inc_by(self.usage.prompt_tokens as u64);
        metrics.prompt_tokens_cached_total.with_label_values(&role).inc_by(self.usage.cached_tokens as u64);
        metrics.generation_tokens_total.with_label_values(&role).inc_by(self.usage.completion_tokens as u64);
        metrics.request_success_total.with_label_values(&[self.role, self.reason.unwrap_or("abort")]).inc();
        metrics.e2e_request_latency_seconds.with_label_values(&role).observe(self.arrived.elapsed().as_secs_f64());
    }
}
