//! What chat and text completions share in their answers: who made them, the counts, the log-probabilities, several choices at
//! once.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::header::{HeaderName, HeaderValue};
use futures_util::stream::{SelectAll, Stream, StreamExt, poll_fn, select_all};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::limits::{timed_out, within};
use crate::engine::request::{Event, FinishReason, SamplingParams, TokenLogprob, Usage};
use crate::error::{Error, Result};
use crate::roles::{Score, Target};
use crate::text::{Message, Tokenizer};

/// Lowest log-probability in JSON, which has no infinity.
const FLOOR: f32 = -9999.0;

/// Head of every body and chunk.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) adapter_version: u64,
    pub(super) adapter_generation: Option<String>,
}

impl Head {
    pub(super) fn new(prefix: &str, object: &'static str, target: &Target) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Head {
            id: format!("{prefix}{}", uuid::Uuid::new_v4().simple()),
            object,
            created: now.map_or(0, |now| now.as_secs()),
            model: target.model.clone(),
            adapter_version: target.lease.as_ref().map_or(0, |lease| lease.version),
            adapter_generation: target.lease.as_ref().map(|lease| lease.adapter.generation.clone()),
        }
    }

    /// The body with these fields after the head's.
    pub(super) fn body(&self, fields: Value) -> Value {
        let mut body = json!({"id": self.id, "object": self.object, "created": self.created, "model": self.model});
        if let (Value::Object(body), Value::Object(fields)) = (&mut body, fields) {
            body.extend(self.maker());
            body.extend(fields);
        }
        body
    }

    /// Which adapter answers.
    pub(super) fn maker(&self) -> Map<String, Value> {
        let generation = self.adapter_generation.as_deref().unwrap_or("base");
        let fields = [
            ("system_fingerprint", json!(format!("rdpo-{}", &generation[..generation.len().min(12)]))),
            ("adapter_version", json!(self.adapter_version)),
            ("adapter_generation", json!(self.adapter_generation)),
        ];
        fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// The same facts as headers.
    pub(super) fn headers(&self, mut response: HttpResponse) -> HttpResponse {
        let version = self.adapter_version.to_string();
        let mut add = |name: &'static str, value: &str| {
            if let Ok(value) = HeaderValue::from_str(value) {
                response.headers_mut().insert(HeaderName::from_static(name), value);
            }
        };
        add("x-adapter-version", &version);
        if let Some(generation) = &self.adapter_generation {
            add("x-adapter-generation", generation);
        }
        response
    }
}

/// OpenAI's counts; the prompt counts once however many choices there are, and what they found of each other's is not cached.
pub(super) fn usage_json(usages: &[Usage]) -> Value {
    let prompt = usages.iter().map(|usage| usage.prompt_tokens).max().unwrap_or(0);
    let cached = usages.iter().map(|usage| usage.cached_tokens).min().unwrap_or(0);
    counted(prompt, cached, usages.iter().map(|usage| usage.completion_tokens).sum())
}

pub(super) fn counted(prompt: usize, cached: usize, completion: usize) -> Value {
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    })
}

/// `calls`: how many were made.
pub(super) fn finish_reason(reason: &FinishReason, calls: usize) -> &'static str {
    match reason {
        FinishReason::Stop { .. } if calls > 0 => "tool_calls",
        FinishReason::Stop { .. } => "stop",
        FinishReason::Length => "length",
    }
}

/// vLLM's `stop_reason`: the stop string or token id that was found.
pub(super) fn stop_reason(reason: &FinishReason) -> Value {
    match reason {
        FinishReason::Stop { text: Some(text), .. } => json!(text),
        FinishReason::Stop { token: Some(token), .. } => json!(token),
        _ => Value::Null,
    }
}

pub(super) fn floor(logprob: f32) -> f32 {
    if logprob.is_nan() { FLOOR } else { logprob.max(FLOOR) }
}

/// One entry of chat's `logprobs.content`.
pub(super) fn chat_logprob(tokenizer: &Tokenizer, logprob: &TokenLogprob) -> Value {
    let entry = |id: u32, logprob: f32| json!({"token": tokenizer.token_text(id), "logprob": floor(logprob), "bytes": tokenizer.token_bytes(id)});
    let mut own = entry(logprob.id, logprob.logprob);
    own["top_logprobs"] = logprob.top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
    own
}

/// vLLM's `prompt_logprobs`: for each prompt token its alternatives by id.
/// The `most` likeliest, and the token itself.
pub(super) fn prompt_logprobs_json(tokenizer: &Tokenizer, prompt: &[Option<TokenLogprob>], most: usize) -> Value {
    let one = |token: &TokenLogprob| {
        let mut map = Map::new();
        let top = token.top.iter().take(most).enumerate().map(|(at, (id, logprob))| (*id, *logprob, Some(at + 1)));
        for (id, logprob, rank) in top.chain([(token.id, token.logprob, token.rank)]) {
            map.entry(id.to_string()).or_insert_with(
                || json!({"logprob": floor(logprob), "rank": rank, "decoded_token": tokenizer.token_text(id)}),
            );
        }
        Value::Object(map)
    };
    prompt.iter().map(|token| token.as_ref().map_or(Value::Null, one)).collect()
}

/// The engine's `prompt` is this `field` of the route.
pub(super) fn about(field: &'static str) -> impl Fn(Error) -> Error {
    move |error| if error.param.as_deref() == Some("prompt") { error.at(field) } else { error }
}

/// What the reward role answers: `reward:<float>`, and the score once more as one entry of log-probabilities (the convention of
/// hosted reward models).
pub(super) struct Scored {
    pub(super) text: String,
    pub(super) logprobs: Vec<Value>,
    pub(super) score: Score,
}

/// Lets the reward role score the last assistant turn; `field` is where the turns were given.
pub(super) async fn score(
    target: &Target,
    turns: &[Message],
    limit: Option<Duration>,
    field: &'static str,
) -> Result<Scored> {
    if turns.last().is_none_or(|turn| turn.role != "assistant") {
        let text = "the reward model scores the last assistant message; the conversation ends with another turn";
        return Err(Error::invalid(field, text));
    }
    let reward = target.reward.as_ref().ok_or_else(|| Error::no_model(&target.model))?;
    let score = within(limit, reward.score(turns, None)).await.map_err(about(field))?;
    let entry = json!({"token": "reward", "logprob": score.value, "bytes": null, "top_logprobs": []});
    Ok(Scored { text: format!("reward:{}", score.value), logprobs: vec![entry], score })
}

type Indexed = Pin<Box<dyn Stream<Item = (usize, Event)> + Send>>;

/// Events of several choices as they come. Dropping it cancels those that have not ended, and so does the end of its time.
pub(super) struct Choices {
    events: SelectAll<Indexed>,
    expires: Option<(Duration, Pin<Box<tokio::time::Sleep>>)>,
}

impl Choices {
    /// Queues `n` choices of each prompt; choice `i` of a seeded request has seed + i. All of them end within `limit`.
    pub(super) fn submit(
        target: &Target,
        prompts: &[Vec<u32>],
        params: &SamplingParams,
        n: usize,
        limit: Option<Duration>,
    ) -> Result<Self> {
        let (wanted, room) = (prompts.len().saturating_mul(n), target.max_waiting()?);
        if wanted > room {
            let message =
                format!("{n} answers to each of {} prompts are more than the {room} that may wait", prompts.len());
            return Err(Error::invalid(if n > 1 { "n" } else { "prompt" }, message));
        }
        let mut streams: Vec<Indexed> = Vec::with_capacity(wanted);
        for (at, prompt) in prompts.iter().enumerate() {
            for choice in 0..n {
                let seed = params.seed.map(|seed| seed.wrapping_add(choice as u64));
                // One reads the prompt's log-probabilities for all; the others then find the prompt in the cache.
                let prompt_logprobs = params.prompt_logprobs.filter(|_| choice == 0);
                let params = SamplingParams { seed, prompt_logprobs, ..params.clone() };
                let mut events = target.generate(prompt.clone(), params)?;
                let index = at * n + choice;
                let events = poll_fn(move |context| events.poll_recv(context));
                streams.push(Box::pin(events.map(move |event| (index, event))));
            }
        }
        let expires = limit.map(|limit| (limit, Box::pin(tokio::time::sleep(limit))));
        Ok(Choices { events: select_all(streams), expires })
    }
}

impl Stream for Choices {
    type Item = (usize, Event);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some((limit, sleep)) = &mut self.expires
            && sleep.as_mut().poll(context).is_ready()
        {
            let error = timed_out(*limit);
            (self.events, self.expires) = (SelectAll::new(), None);
            return Poll::Ready(Some((0, Event::Failed(error))));
        }
        self.events.poll_next_unpin(context)
    }
}

/// A choice put together from its events.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Collected {
    pub(super) text: String,
    pub(super) ids: Vec<u32>,
    #[serde(skip)]
    pub(super) logprobs: Vec<TokenLogprob>,
    /// Characters of the text that were there before each token.
    #[serde(skip)]
    pub(super) offsets: Vec<usize>,
    #[serde(skip)]
    pub(super) prompt: Vec<Option<TokenLogprob>>,
    #[serde(skip)]
    pub(super) reason: Option<FinishReason>,
    #[serde(skip)]
    pub(super) usage: Usage,
}

/// Of each `best_of` choices the `n` with the highest log-probability per token, best first. The first keeps what was read of
/// the prompt.
pub(super) fn best(all: Vec<Collected>, best_of: usize, n: usize) -> Vec<Collected> {
    if n == best_of {
        return all;
    }
    let mean = |choice: &Collected| {
        let logprobs = choice.logprobs.iter().map(|token| f64::from(floor(token.logprob)));
        logprobs.sum::<f64>() / choice.logprobs.len().max(1) as f64
    };
    let mut kept = Vec::with_capacity(all.len() / best_of * n);
    for group in all.chunks(best_of) {
        let mut ranked: Vec<Collected> = group.to_vec();
        let prompt = std::mem::take(&mut ranked[0].prompt);
        ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        ranked.truncate(n);
        ranked[0].prompt = prompt;
        kept.append(&mut ranked);
    }
    kept
}

/// Waits for all choices.
pub(super) async fn collect(mut choices: Choices, count: usize) -> Result<Vec<Collected>> {
    let mut all = vec![Collected::default(); count];
    let mut lengths = vec![0; count];
    while let Some((index, event)) = choices.next().await {
        let choice = &mut all[index];
        match event {
            Event::Prompt(logprobs) => choice.prompt = logprobs,
            Event::Token { id, text, logprob } => {
                choice.ids.push(id);
                choice.offsets.push(lengths[index]);
                lengths[index] += text.chars().count();
                choice.text.push_str(&text);
                choice.logprobs.extend(logprob);
            }
            Event::Done { text, reason, usage } => {
                choice.text.push_str(&text);
                (choice.reason, choice.usage) = (Some(reason), usage);
            }
            Event::Failed(error) => return Err(error),
            Event::NextToken(..) | Event::Score(..) => {}
        }
    }
    Ok(all)
}
