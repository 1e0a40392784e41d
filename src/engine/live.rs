//! One request that runs: its rows of logits to tokens, its tokens to text and to an end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rayon::prelude::*;
use tokio::sync::mpsc::UnboundedSender;

use super::lookup::Draft;
use super::request::{Event, FinishReason, Request, Task, TokenLogprob};
use super::sampler::{self, Draw};
use super::scheduler::Sequence;
use crate::error::{Code, Error, Result};
use crate::telemetry::metrics;
use crate::text::{Matcher, StreamDecoder, Tokenizer};

/// A request on its way in.
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) events: UnboundedSender<Event>,
    pub(super) arrived: Instant,
}

/// What the owner thread knows of a request besides its sequence.
pub(super) struct Live {
    pub(super) request: Request,
    pub(super) events: UnboundedSender<Event>,
    pub(super) arrived: Instant,
    pub(super) started: bool,
    /// Sent with the first token, and empty from then on.
    pub(super) prompt_logprobs: Vec<Option<TokenLogprob>>,
    tokenizer: Arc<Tokenizer>,
    decoder: StreamDecoder,
    /// Where the answer stands in its grammar; locked by the one thread that samples it.
    matcher: Option<Mutex<Matcher>>,
    seed: u64,
    last_token: Option<Instant>,
}

/// What the step's logits said about one sequence.
pub(super) enum Outcome {
    Token(Drawn),
    NextToken(Vec<f32>),
    Score(f32),
    PromptRead,
    /// The text is whole and no further token is allowed.
    Complete,
    Failed(Error),
}

/// A sampled token.
pub(super) struct Drawn {
    pub(super) id: u32,
    logprob: Option<TokenLogprob>,
    /// The grammar lets nothing follow.
    complete: bool,
}

impl Live {
    pub(super) fn new(submission: Submission, tokenizer: Arc<Tokenizer>) -> Self {
        let Submission { request, events, arrived } = submission;
        let params = &request.params;
        let decoder = StreamDecoder::new(
            tokenizer.clone(),
            params.stop.clone(),
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        );
        Live {
            matcher: params.grammar.as_ref().map(|grammar| Mutex::new(grammar.matcher())),
            seed: params.seed.unwrap_or_else(rand::random),
            prompt_logprobs: if reuses(&request) { Vec::new() } else { vec![None; request.prompt.len()] },
            tokenizer,
            decoder,
            request,
            events,
            arrived,
            started: false,
            last_token: None,
        }
    }

    /// Its sequence, not begun.
    pub(super) fn sequence(&self, id: u64) -> Sequence {
        let (request, params) = (&self.request, &self.request.params);
        let generation = request.adapter.as_ref().map(|adapter| adapter.generation.clone());
        let mut sequence = Sequence::new(id, request.prompt.clone(), generation, reuses(request));
        (sequence.priority, sequence.role) = (params.priority, request.role);
        if let Some(salt) = &params.cache_salt {
            sequence.salt(salt);
        }
        sequence
    }

    /// How long a draft may be: the last token that has room follows it, and nothing follows an end.
    pub(super) fn room(&self, sequence: &Sequence, max_model_len: usize) -> usize {
        let end =
            self.request.params.max_tokens.map_or(max_model_len, |most| max_model_len.min(sequence.prompt_len + most));
        end.saturating_sub(sequence.settled() + 1)
    }

    /// The tokens that usually write what the grammar leaves no choice about. The last may run into what follows: it is left out.
    pub(super) fn forced(&self, most: usize) -> Option<Draft> {
        let mut matcher = self.matcher.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tokens = self.tokenizer.encode(std::str::from_utf8(&matcher.forced()).ok()?, false).ok()?;
        tokens.pop();
        tokens.truncate(most);
        (!tokens.is_empty()).then(|| Draft::forced(tokens))
    }

    /// What the logits after the sequence's last token say, and those after each token of its draft up to the first that is
    /// another than drafted.
    pub(super) fn outcomes(&self, sequence: &Sequence, rows: Vec<Vec<f32>>) -> Vec<Outcome> {
        let draft = &sequence.tokens[sequence.settled()..];
        let right =
            |at: usize, outcome: &Outcome| matches!(outcome, Outcome::Token(drawn) if draft.get(at) == Some(&drawn.id));
        let outcome = |(at, mut row): (usize, Vec<f32>)| self.outcome(sequence, sequence.settled() + at, &mut row);
        if self.matcher.is_none() {
            let mut outcomes: Vec<Outcome> = rows.into_par_iter().enumerate().map(outcome).collect();
            let wrong = outcomes.iter().enumerate().position(|(at, outcome)| !right(at, outcome));
            outcomes.truncate(wrong.map_or(usize::MAX, |at| at + 1));
            return outcomes;
        }
        // A grammar's state moves with each token.
        let mut outcomes = Vec::new();
        for (at, row) in rows.into_iter().enumerate() {
            outcomes.push(outcome((at, row)));
            if !right(at, &outcomes[at]) {
                break;
            }
        }
        outcomes
    }

    /// What the logits after the first `len` tokens say.
    fn outcome(&self, sequence: &Sequence, len: usize, logits: &mut [f32]) -> Outcome {
        if !logits.iter().all(|logit| logit.is_finite()) {
            let text = "the model's logits are not finite: its weights or the adapter are broken";
            return Outcome::Failed(Error::internal(text));
        }
        match &self.request.task {
            Task::NextToken(ids) => {
                let total = sampler::log_sum_exp(logits);
                Outcome::NextToken(ids.iter().map(|id| (f64::from(logits[*id as usize]) - total) as f32).collect())
            }
            Task::Score | Task::Generate if self.request.params.max_tokens == Some(0) => Outcome::PromptRead,
            Task::Score | Task::Generate => {
                let (prompt, output) = sequence.tokens[..len].split_at(sequence.prompt_len);
                self.draw(prompt, output, logits).unwrap_or_else(Outcome::Failed)
            }
        }
    }

    /// One token, by the request's parameters and grammar.
    fn draw(&self, prompt: &[u32], output: &[u32], logits: &mut [f32]) -> Result<Outcome> {
        let params = &self.request.params;
        let mut banned: Vec<u32> = sampler::ends_of(&params.bad_words, output).collect();
        if output.len() < params.min_tokens {
            banned.extend(self.tokenizer.eos_token_ids().iter().chain(&params.stop_token_ids));
        }
        let mut matcher = self.matcher.as_ref().map(|matcher| matcher.lock().unwrap_or_else(PoisonError::into_inner));
        let mask = matcher.as_mut().map(|matcher| matcher.mask()).transpose()?;
        let draw = Draw { params, prompt, output, seed: self.seed, banned: &banned, mask: mask.as_ref() };
        let (id, logprob) = sampler::sample(logits, &draw);
        if logits[id as usize] > f32::NEG_INFINITY {
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

    /// Sends a token and the text that is certain with it; the rest of the text and the reason where it ends. `is_last`: there is
    /// room for no other.
    pub(super) fn take(&mut self, drawn: Drawn, is_last: bool) -> Option<(String, FinishReason)> {
        self.observe();
        let Drawn { id, logprob, complete } = drawn;
        let params = &self.request.params;
        let is_eos = (complete || !params.ignore_eos) && self.tokenizer.eos_token_ids().contains(&id);
        let asked = params.stop_token_ids.contains(&id);
        let (text, stop) = if is_eos || asked { Default::default() } else { self.decoder.push(id) };
        let _ = self.events.send(Event::Token { id, text, logprob });
        match stop {
            Some(stop) => Some((String::new(), FinishReason::Stop { text: Some(stop), token: None })),
            None if is_eos || asked || complete => {
                Some((self.decoder.finish(), FinishReason::Stop { text: None, token: asked.then_some(id) }))
            }
            None => is_last.then(|| (self.decoder.finish(), FinishReason::Length)),
        }
    }

    /// Text that was held back, of an answer that ends without a further token.
    pub(super) fn rest(&mut self) -> String {
        self.decoder.finish()
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
}

/// Log-probabilities of the prompt need every row computed.
fn reuses(request: &Request) -> bool {
    request.params.prompt_logprobs.is_none()
}
