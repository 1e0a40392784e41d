//! A resolved model name and what can be asked of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Lease, Mistral, Remote, Reward, Role};
use crate::engine::{Engine, Event, EventStream, FinishReason, Request, SamplingParams, Task, TokenLogprob, Usage};
use crate::error::{Code, Error, Result};
use crate::telemetry::metrics;
use crate::text::{Message, RenderOptions, Tokenizer};
use crate::weights::GenerationDefaults;

/// How long [`Target::ask`] waits for a place in a full queue.
const QUEUE_PATIENCE: Duration = Duration::from_secs(300);

/// Where a role's model runs.
#[derive(Clone)]
pub enum Seat {
    /// In this process: it has tokens, log-probabilities, adapters.
    Native(Engine),
    /// In this process, by mistral.rs: it has tokens and log-probabilities.
    Mistral(Arc<Mistral>),
    /// At endpoints: it goes on from chats and texts.
    Remote(Arc<Remote>),
    /// Nowhere: a reward without a model.
    Empty,
}

/// A resolved model name: everything a request needs, pinned until dropped.
#[derive(Clone)]
pub struct Target {
    /// The name as asked.
    pub model: String,
    /// Its role.
    pub role: Role,
    /// Where its model runs (for a reward without one, see [`Target::reward`]).
    pub seat: Seat,
    /// The adapter pinned for this request; `None` for a base.
    pub lease: Option<Lease>,
    /// Set when the name is the reward role.
    pub reward: Option<Arc<Reward>>,
    /// The checkpoint's sampling defaults.
    pub defaults: GenerationDefaults,
}

/// A request's events put together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// The whole text.
    pub text: String,
    /// Generated token ids.
    pub ids: Vec<u32>,
    /// Log-probability of each, where `logprobs` was asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// With `prompt_logprobs`.
    pub prompt_logprobs: Vec<Option<TokenLogprob>>,
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens counted.
    pub usage: Usage,
    /// Answer to [`Task::NextToken`].
    pub next_token: Vec<f32>,
    /// Answer to [`Task::Score`].
    pub score: Option<f32>,
}

impl Target {
    /// The engine; a 400 naming `model` for a role that runs elsewhere and for a reward role that generates nothing.
    pub fn engine(&self) -> Result<&Engine> {
        match &self.seat {
            Seat::Native(engine) => Ok(engine),
            Seat::Mistral(_) => {
                Err(Error::invalid("model", format!("`{}` runs on mistralrs: its model is out of reach", self.model)))
            }
            Seat::Remote(_) | Seat::Empty => Err(self.has_no_tokens()),
        }
    }

    fn has_no_tokens(&self) -> Error {
        let why = match &self.seat {
            Seat::Remote(_) => {
                format!("`{}` is remote: it goes on from chats and texts, its tokens are at its endpoint", self.model)
            }
            _ => {
                let kind = self.reward.as_ref().map_or("reward", |reward| reward.kind());
                format!("`{}` is a `{kind}` reward: it scores texts, it has no tokens", self.model)
            }
        };
        Error::invalid("model", why)
    }

    /// The endpoints of a remote role.
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        match &self.seat {
            Seat::Remote(remote) => Some(remote),
            Seat::Native(_) | Seat::Mistral(_) | Seat::Empty => None,
        }
    }

    /// A 400 naming `model` for a role that cannot answer a chat.
    pub fn must_talk(&self) -> Result<()> {
        if self.remote().is_some() { Ok(()) } else { self.tokenizer().map(drop) }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        match &self.seat {
            Seat::Native(engine) => Ok(engine.tokenizer()),
            Seat::Mistral(mistral) => Ok(mistral.tokenizer()),
            Seat::Remote(_) | Seat::Empty => Err(self.has_no_tokens()),
        }
    }

    /// Longest prompt + answer, tokens.
    pub fn max_model_len(&self) -> Result<usize> {
        match &self.seat {
            Seat::Native(engine) => Ok(engine.max_model_len()),
            Seat::Mistral(mistral) => Ok(mistral.max_model_len()),
            Seat::Remote(_) | Seat::Empty => Err(self.has_no_tokens()),
        }
    }

    /// Most requests of the role that may wait.
    pub fn max_waiting(&self) -> Result<usize> {
        match &self.seat {
            Seat::Native(engine) => Ok(engine.max_waiting()),
            Seat::Mistral(mistral) => Ok(mistral.max_waiting()),
            Seat::Remote(_) | Seat::Empty => Err(self.has_no_tokens()),
        }
    }

    /// Queues generation from token ids under the pinned adapter.
    pub fn generate(&self, prompt: Vec<u32>, params: SamplingParams) -> Result<EventStream> {
        self.submit(self.request(prompt, params))
    }

    /// Renders the chat and queues generation.
    pub fn chat(&self, messages: &[Message], render: &RenderOptions, params: SamplingParams) -> Result<EventStream> {
        let prompt = self.tokenizer()?.encode_chat(messages, render)?;
        self.generate(prompt, params)
    }

    /// A bare request under the pinned adapter, for other tasks.
    pub fn request(&self, prompt: Vec<u32>, params: SamplingParams) -> Request {
        let adapter = self.lease.as_ref().map(|lease| lease.adapter.clone());
        Request { prompt, params, adapter, task: Task::Generate, role: self.role.name() }
    }

    /// Queues a request and waits for its end. A full queue is waited for: the callers are jobs and scores, not sessions.
    pub async fn ask(&self, request: Request) -> Result<Answer> {
        let since = Instant::now();
        let mut pause = Duration::from_millis(20);
        let stream = loop {
            match self.submit(request.clone()) {
                Err(error) if error.code == Code::RateLimited && since.elapsed() < QUEUE_PATIENCE => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                other => break other?,
            }
        };
        collect(stream).await
    }

    /// Renders the chat, generates, and waits for the end. A remote role's answer has text and counts, no tokens.
    pub async fn answer(&self, messages: &[Message], params: SamplingParams) -> Result<Answer> {
        if let Some(remote) = self.remote() {
            return remote.answer(messages, &params).await;
        }
        let prompt = self.tokenizer()?.encode_chat(messages, &RenderOptions::default())?;
        self.ask(self.request(prompt, params)).await
    }

    /// Log-probabilities of `response` after `prompt` under the pinned adapter, natural log, one per response token. What of the
    /// prompt is in the prefix cache is not read again.
    pub async fn logprobs_of(&self, prompt: &[u32], response: &[u32]) -> Result<Vec<f32>> {
        let params = SamplingParams {
            max_tokens: Some(0),
            prompt_logprobs: Some(0),
            prompt_logprobs_start: prompt.len(),
            ..SamplingParams::default()
        };
        let answer = self.ask(self.request([prompt, response].concat(), params)).await?;
        let read = answer.prompt_logprobs.get(prompt.len()..).unwrap_or_default();
        let logprobs: Option<Vec<f32>> = read.iter().map(|entry| entry.as_ref().map(|token| token.logprob)).collect();
        logprobs
            .filter(|logprobs| logprobs.len() == response.len())
            .ok_or_else(|| Error::internal("the engine left out log-probabilities of the prompt. This is a bug."))
    }

    fn submit(&self, request: Request) -> Result<EventStream> {
        let stream = match &self.seat {
            Seat::Mistral(mistral) => mistral.submit(request)?,
            _ => self.engine()?.submit(request)?,
        };
        if let Some(lease) = &self.lease {
            metrics().adapter_requests_total.with_label_values(&[&lease.alias]).inc();
        }
        Ok(stream)
    }
}

async fn collect(mut stream: EventStream) -> Result<Answer> {
    let mut answer = Answer::default();
    while let Some(event) = stream.recv().await {
        match event {
            Event::Prompt(logprobs) => answer.prompt_logprobs = logprobs,
            Event::Token { id, text, logprob } => {
                answer.ids.push(id);
                answer.text.push_str(&text);
                answer.logprobs.extend(logprob);
            }
            Event::Done { text, reason, usage } => {
                answer.text.push_str(&text);
                return Ok(Answer { reason, usage, ..answer });
            }
            Event::NextToken(next_token, usage) => return Ok(Answer { next_token, usage, ..answer }),
            Event::Score(score, usage) => return Ok(Answer { score: Some(score), usage, ..answer }),
            Event::Failed(error) => return Err(error),
        }
    }
    Err(Error::internal("a request's events ended without its last one. This is a bug."))
}
