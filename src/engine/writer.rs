//! One request's answer as it is made: what a row of logits says, what of it is sent, and when it ends. It knows no scheduler and
//! no pool, so that an engine of another make can be made to answer as this one does.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::pick;
use super::request::{Event, FinishReason, Request, Task, TokenLogprob, Usage};
use super::sampler::{self, Draw};
use crate::error::{Code, Error, Result};
use crate::model::{RowLogprobs, SampleRow, Sampled};
use crate::telemetry::metrics;
use crate::text::{Matcher, StreamDecoder, TokenMask, Tokenizer};

/// Few tokens have more bytes.
const MOST_TOKEN_BYTES: usize = 16;

/// A request and all that its answer needs besides its tokens.
pub struct Writer {
    /// What was asked.
    pub request: Request,
    /// When.
    pub arrived: Instant,
    /// Gathered until the first token is there.
    pub(super) prompt_logprobs: Vec<Option<TokenLogprob>>,
    events: UnboundedSender<Event>,
    tokenizer: Arc<Tokenizer>,
    max_model_len: usize,
    decoder: StreamDecoder,
    /// Where the answer stands in its grammar; locked by the one thread that samples it.
    matcher: Option<Mutex<Matcher>>,
    seed: u64,
    last_token: Option<Instant>,
    ended: bool,
}

/// What a row of logits says.
#[derive(Debug)]
pub enum Outcome {
    /// The next token.
    Token(Drawn),
    /// Answer to [`Task::NextToken`].
    NextToken(Vec<f32>),
    /// Answer to [`Task::Score`].
    Score(f32),
    /// Nothing but the prompt was to be read.
    PromptRead,
    /// The text is whole and no further token is allowed.
    Complete,
    /// The request fails.
    Failed(Error),
}

impl Outcome {
    /// The token, where it is one.
    pub fn token(&self) -> Option<u32> {
        match self {
            Outcome::Token(drawn) => Some(drawn.id),
            _ => None,
        }
    }
}

/// A sampled token.
#[derive(Debug)]
pub struct Drawn {
    id: u32,
    logprob: Option<TokenLogprob>,
    /// The grammar lets nothing follow.
    complete: bool,
}

/// How an answer ends.
#[derive(Debug)]
pub enum Ending {
    /// With text that was held back.
    Done(String, FinishReason),
    /// With the answer to [`Task::NextToken`].
    NextToken(Vec<f32>),
    /// With the answer to [`Task::Score`].
    Score(f32),
    /// Without one.
    Failed(Error),
}

impl Ending {
    /// The reason in the metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Ending::Done(_, FinishReason::Length) => "length",
            Ending::Done(..) | Ending::NextToken(_) | Ending::Score(_) => "stop",
            Ending::Failed(_) => "error",
        }
    }

    fn event(self, usage: Usage) -> Event {
        match self {
            Ending::Done(text, reason) => Event::Done { text, reason, usage },
            Ending::NextToken(values) => Event::NextToken(values, usage),
            Ending::Score(score) => Event::Score(score, usage),
            Ending::Failed(error) => Event::Failed(error),
        }
    }
}

impl Writer {
    /// A request that arrived now. `max_model_len` counts prompt and answer.
    pub fn new(
        request: Request,
        events: UnboundedSender<Event>,
        tokenizer: Arc<Tokenizer>,
        max_model_len: usize,
    ) -> Self {
        let params = &request.params;
        let decoder = StreamDecoder::new(
            tokenizer.clone(),
            &request.prompt,
            params.stop.clone(),
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        );
        let read = params.prompt_logprobs.map_or(0, |_| request.prompt.len());
        Writer {
            prompt_logprobs: vec![None; read],
            matcher: params.grammar.as_ref().map(|grammar| Mutex::new(grammar.matcher())),
            seed: params.seed.unwrap_or_else(rand::random),
            arrived: Instant::now(),
            last_token: None,
            ended: false,
            decoder,
            request,
            events,
            tokenizer,
            max_model_len,
        }
    }

    /// Nobody listens any more.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Until nobody listens any more.
    pub async fn abandoned(&self) {
        self.events.closed().await;
    }

    /// Most tokens of the answer.
    pub fn room(&self) -> usize {
        let context = self.max_model_len.saturating_sub(self.request.prompt.len());
        self.request.params.max_tokens.map_or(context, |most| most.min(context))
    }

    /// Whether each further row must wait for the token before it.
    pub(super) fn has_grammar(&self) -> bool {
        self.matcher.is_some()
    }

    /// The tokens that usually write what the grammar leaves no choice about. The last may run into what follows: it is left out.
    pub(super) fn forced(&self, output: &[u32], most: usize) -> Option<Vec<u32>> {
        let mut forced = self.matcher()?.forced(self.request.params.grammar.as_ref()?, output);
        // Enough for that many: reading all of a long text at every step would hold up everybody.
        forced.truncate(MOST_TOKEN_BYTES * (most + 1));
        let text = match std::str::from_utf8(&forced) {
            Ok(text) => text,
            Err(cut) => std::str::from_utf8(&forced[..cut.valid_up_to()]).ok()?,
        };
        let mut tokens = self.tokenizer.encode(text, false).ok()?;
        tokens.pop();
        tokens.truncate(most);
        (!tokens.is_empty()).then_some(tokens)
    }

    /// What the logits after `prompt` and `output` say; a grammar moves on by the token that is drawn. logits: V values, changed in place.
    pub fn read(&self, prompt: &[u32], output: &[u32], logits: &mut [f32]) -> Outcome {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return not_finite();
        }
        match &self.request.task {
            Task::NextToken(ids) => {
                let row = RowLogprobs::new(logits);
                Outcome::NextToken(ids.iter().map(|id| row.of(logits[*id as usize])).collect())
            }
            Task::Score | Task::Generate if self.reads_only() => Outcome::PromptRead,
            Task::Score | Task::Generate => self.draw(prompt, output, logits).unwrap_or_else(Outcome::Failed),
        }
    }

    fn reads_only(&self) -> bool {
        self.request.params.max_tokens == Some(0)
    }

    /// One token, by the request's parameters and grammar.
    fn draw(&self, prompt: &[u32], output: &[u32], logits: &mut [f32]) -> Result<Outcome> {
        let mask = self.matcher().map(|mut matcher| matcher.mask()).transpose()?;
        let (id, logprob) = self.with_draw(prompt, output, mask.as_ref(), |draw| sampler::sample(logits, draw));
        self.drawn(id, logits[id as usize] > f32::NEG_INFINITY, logprob)
    }

    /// Where the answer stands in its grammar, if it has one.
    pub(super) fn matcher(&self) -> Option<MutexGuard<'_, Matcher>> {
        self.matcher.as_ref().map(|matcher| matcher.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the next token depends on besides the logits.
    fn with_draw<R>(
        &self,
        prompt: &[u32],
        output: &[u32],
        mask: Option<&TokenMask>,
        then: impl FnOnce(&Draw<'_>) -> R,
    ) -> R {
        let params = &self.request.params;
        let mut banned: Vec<u32> = sampler::ends_of(&params.bad_words, output).collect();
        if output.len() < params.min_tokens {
            banned.extend(self.tokenizer.eos_token_ids().iter().chain(&params.stop_token_ids));
        }
        then(&Draw { params, prompt, output, seed: self.seed, banned: &banned, mask })
    }

    /// What a GPU is asked of a row of `v` logits so that [`Writer::answer`] says what [`Writer::read`] would. mask: the grammar's after
    /// `output`.
    pub(super) fn question(&self, prompt: &[u32], output: &[u32], mask: Option<&TokenMask>, v: usize) -> SampleRow {
        match &self.request.task {
            Task::NextToken(ids) => SampleRow { asked: ids.clone(), ..SampleRow::default() },
            Task::Score | Task::Generate if self.reads_only() => SampleRow::default(),
            Task::Score | Task::Generate => self.with_draw(prompt, output, mask, |draw| pick::row(draw, v)),
        }
    }

    /// What a GPU's reply to [`Writer::question`] says; a grammar moves on by the token that was drawn.
    pub(super) fn answer(&self, sampled: Sampled) -> Outcome {
        if !sampled.finite {
            return not_finite();
        }
        match &self.request.task {
            Task::NextToken(_) => Outcome::NextToken(sampled.asked.into_iter().map(|(_, logprob)| logprob).collect()),
            Task::Score | Task::Generate if self.reads_only() => Outcome::PromptRead,
            Task::Score | Task::Generate => {
                let Sampled { id, logprob, top, .. } = sampled;
                let logprob = self.request.params.logprobs.map(|_| TokenLogprob { id, logprob, top, rank: None });
                self.drawn(id, sampled.possible, logprob).unwrap_or_else(Outcome::Failed)
            }
        }
    }

    /// What follows from a draw; `possible` is false where no token may come.
    fn drawn(&self, id: u32, possible: bool, logprob: Option<TokenLogprob>) -> Result<Outcome> {
        let mut matcher = self.matcher();
        if possible {
            matcher.as_mut().map(|matcher| matcher.commit(id)).transpose()?;
            let complete = matcher.is_some_and(|matcher| matcher.is_complete());
            return Ok(Outcome::Token(Drawn { id, logprob, complete }));
        }
        if matcher.is_some_and(|mut matcher| matcher.is_accepting()) {
            return Ok(Outcome::Complete);
        }
        let text = "No token is left that the format, `allowed_token_ids`, `bad_words` and `min_tokens` all allow.";
        Err(Error::new(Code::InvalidValue, text))
    }

    /// Sends what the outcome brings; how the answer ends, where it does. `answered` counts its tokens, this one too.
    pub fn write(&mut self, outcome: Outcome, answered: usize) -> Option<Ending> {
        if !self.prompt_logprobs.is_empty() {
            let _ = self.events.send(Event::Prompt(std::mem::take(&mut self.prompt_logprobs)));
        }
        let Drawn { id, logprob, complete } = match outcome {
            Outcome::Token(drawn) => drawn,
            Outcome::NextToken(values) => return Some(Ending::NextToken(values)),
            Outcome::Score(score) => return Some(Ending::Score(score)),
            Outcome::Failed(error) => return Some(Ending::Failed(error)),
            Outcome::Complete => return Some(self.finish(FinishReason::Stop { text: None, token: None }, answered)),
            Outcome::PromptRead => return Some(Ending::Done(String::new(), FinishReason::Length)),
        };
        self.observe();
        let params = &self.request.params;
        let is_eos = (complete || !params.ignore_eos) && self.tokenizer.eos_token_ids().contains(&id);
        let asked = params.stop_token_ids.contains(&id);
        let may_stop = answered > params.min_tokens;
        let shown = params.include_stop_str_in_output || !(is_eos || asked);
        let (text, stop) = if shown { self.decoder.push(id, may_stop) } else { Default::default() };
        let _ = self.events.send(Event::Token { id, text, logprob });
        match stop {
            Some(stop) => Some(Ending::Done(String::new(), FinishReason::Stop { text: Some(stop), token: None })),
            None if is_eos || asked || complete => {
                let token = asked.then_some(id);
                Some(self.finish(FinishReason::Stop { text: None, token }, answered))
            }
            None => (answered >= self.room()).then(|| self.finish(FinishReason::Length, answered)),
        }
    }

    /// Counts a token and the time it took.
    fn observe(&mut self) {
        let (metrics, role, now) = (metrics(), [self.request.role], Instant::now());
        let (times, since) = match self.last_token.replace(now) {
            None => (&metrics.time_to_first_token_seconds, self.arrived),
            Some(before) => (&metrics.inter_token_latency_seconds, before),
        };
        times.with_label_values(&role).observe((now - since).as_secs_f64());
        metrics.generation_tokens_total.with_label_values(&role).inc();
    }

    /// The end for this reason, unless what was held back has a stop string.
    fn finish(&mut self, reason: FinishReason, answered: usize) -> Ending {
        let (text, stop) = self.decoder.finish(answered > self.request.params.min_tokens);
        Ending::Done(text, stop.map_or(reason, |stop| FinishReason::Stop { text: Some(stop), token: None }))
    }

    /// Sends the end.
    pub fn end(&mut self, ending: Ending, usage: Usage) {
        self.ended = true;
        let _ = self.events.send(ending.event(usage));
    }

    /// Counts the request as ended, for a reason as [`Ending::label`] gives it or `abort`.
    pub fn count(&self, reason: &str) {
        let role = self.request.role;
        metrics().request_success_total.with_label_values(&[role, reason]).inc();
        metrics().e2e_request_latency_seconds.with_label_values(&[role]).observe(self.arrived.elapsed().as_secs_f64());
    }
}

/// Whoever listens hears of an end, also where the engine goes away before there is one.
impl Drop for Writer {
    fn drop(&mut self) {
        if !self.ended {
            let error = Error::internal("the engine stopped in the middle of an answer");
            self.end(Ending::Failed(error), Usage::default());
        }
    }
}

fn not_finite() -> Outcome {
    let text = "the model's logits are not finite: its weights or the adapter are broken";
    Outcome::Failed(Error::internal(text))
}
