//! The owner thread: take commands, schedule, run one flat step, sample, send events. Nobody else touches the pool.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use tokio::sync::mpsc::UnboundedSender;

use super::request::{Event, FinishReason, Request, Task, TokenLogprob, Usage};
use super::sampler::{self, Draw};
use super::scheduler::{Scheduled, Scheduler, Sequence};
use super::{EngineStats, GateGuard, Shared};
use crate::error::{Code, Error, Result};
use crate::model::{Attend, Decoder, KvPool, LoraRows, PagedBatch, PagedSequence, RowGroup};
use crate::telemetry::metrics;
use crate::text::{Matcher, StreamDecoder};

/// Rows of logits held at once while a prompt's log-probabilities are read.
const LOGIT_ROWS: usize = 64;

/// A request on its way in.
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) events: UnboundedSender<Event>,
    pub(super) arrived: Instant,
}

/// What the thread knows of a live request besides its sequence.
struct Live {
    request: Request,
    events: UnboundedSender<Event>,
    decoder: StreamDecoder,
    /// Where the answer stands in its grammar; locked by the one thread that samples it.
    matcher: Option<Mutex<Matcher>>,
    seed: u64,
    arrived: Instant,
    started: bool,
    last_token: Option<Instant>,
    prompt_logprobs: Vec<Option<TokenLogprob>>,
}

pub(super) struct Owner {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: KvPool,
    pub(super) scheduler: Scheduler,
    live: HashMap<u64, Live>,
    next_id: u64,
}

/// What the step's logits said about one sequence.
enum Outcome {
    Token(u32, Option<TokenLogprob>),
    NextToken(Vec<f32>),
    Score(f32),
    PromptRead,
    /// The text is whole and no further token is allowed.
    Complete,
    Failed(Error),
}

impl Owner {
    pub(super) fn new(shared: Arc<Shared>, pool: KvPool, scheduler: Scheduler) -> Self {
        Owner { shared, pool, scheduler, live: HashMap::new(), next_id: 0 }
    }

    /// Runs until every handle is gone.
    pub(super) fn run(mut self, commands: &Receiver<Submission>) {
        loop {
            if self.scheduler.is_idle() {
                self.publish_stats();
                match commands.recv() {
                    Ok(submission) => self.admit(submission),
                    Err(_) => return,
                }
            }
            // With the last handle gone, what was accepted is still answered.
            while let Ok(submission) = commands.try_recv() {
                self.admit(submission);
            }
            self.drop_cancelled();
            let step = self.scheduler.schedule();
            self.publish_stats();
            if step.is_empty() {
                continue;
            }
            self.note_started(&step);
            let outcomes = catch_unwind(AssertUnwindSafe(|| self.forward(&step)))
                .unwrap_or_else(|_| Err(Error::internal("the engine's step panicked. This is a bug.")));
            match outcomes {
                Ok(outcomes) => {
                    self.scheduler.complete(&step);
                    outcomes.into_iter().for_each(|(id, outcome)| self.settle(id, outcome));
                }
                Err(error) => {
                    tracing::error!(%error, sequences = step.len(), "engine step failed");
                    step.iter().for_each(|scheduled| self.end(scheduled.id, Event::Failed(error.clone()), "error"));
                }
            }
        }
    }

    fn admit(&mut self, submission: Submission) {
        let Submission { request, events, arrived } = submission;
        let id = self.next_id;
        self.next_id += 1;
        let generation = request.adapter.as_ref().map(|adapter| adapter.generation.clone());
        // Log-probabilities of the prompt need every row computed.
        let reuse = request.params.prompt_logprobs.is_none();
        let params = &request.params;
        let mut sequence = Sequence::new(id, request.prompt.clone(), generation, reuse);
        (sequence.priority, sequence.role) = (params.priority, request.role);
        if let Some(salt) = &params.cache_salt {
            sequence.salt(salt);
        }
        let decoder = StreamDecoder::new(
            self.shared.tokenizer.clone(),
            params.stop.clone(),
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        );
        let matcher = params.grammar.as_ref().map(|grammar| Mutex::new(grammar.matcher()));
        let seed = params.seed.unwrap_or_else(rand::random);
        let prompt_logprobs = if reuse { Vec::new() } else { vec![None; request.prompt.len()] };
        self.live.insert(
            id,
            Live {
                request,
                events,
                decoder,
                matcher,
                seed,
                arrived,
                started: false,
                last_token: None,
                prompt_logprobs,
            },
        );
        self.scheduler.add(sequence);
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<u64> = self.live.iter().filter(|(_, live)| live.events.is_closed()).map(|(id, _)| *id).collect();
        gone.into_iter().for_each(|id| self.finish(id, "abort"));
    }

    /// Queue time and prefix-cache counts, once a request.
    fn note_started(&mut self, step: &[Scheduled]) {
        for scheduled in step {
            let (Some(live), Some(sequence)) = (self.live.get_mut(&scheduled.id), self.scheduler.get(scheduled.id))
            else {
                continue;
            };
            if std::mem::replace(&mut live.started, true) {
                continue;
            }
            self.shared.leave_queue(live.request.role);
            let (metrics, role) = (metrics(), [live.request.role]);
            metrics.request_queue_time_seconds.with_label_values(&role).observe(live.arrived.elapsed().as_secs_f64());
            metrics.prompt_tokens_total.with_label_values(&role).inc_by(sequence.prompt_len as u64);
            metrics.prompt_tokens_cached_total.with_label_values(&role).inc_by(sequence.cached as u64);
            metrics.prefix_cache_queries_total.with_label_values(&role).inc_by(sequence.prompt_len as u64);
            metrics.prefix_cache_hits_total.with_label_values(&role).inc_by(sequence.cached as u64);
        }
    }

    /// One flat step; an outcome for every sequence whose last token was computed.
    fn forward(&mut self, step: &[Scheduled]) -> Result<Vec<(u64, Outcome)>> {
        let shared = self.shared.clone();
        let device = shared.gate.serve();
        // On a thread of the pool, which hands an operation's parts to the others without going to sleep meanwhile.
        rayon::scope(|_| self.compute(step, &shared.model, device))
    }

    fn compute(&mut self, step: &[Scheduled], model: &Decoder, device: GateGuard<'_>) -> Result<Vec<(u64, Outcome)>> {
        let (ids, positions, batch, groups) = self.batch(step);
        let attend = Attend::Paged { pool: &self.pool, batch: &batch };
        let lora =
            if groups.iter().all(|group| group.adapter.is_none()) { LoraRows::Base } else { LoraRows::Served(&groups) };
        let hidden = model.forward(&ids, &positions, attend, lora)?; // (N, C)

        let (mut rows, mut wanting) = (Vec::new(), Vec::new());
        for (scheduled, paged) in step.iter().zip(&batch.sequences) {
            self.read_prompt(scheduled, paged, &hidden)?;
            let sequence = self.sequence(scheduled.id);
            if paged.context == sequence.tokens.len() {
                rows.push((paged.start + paged.len - 1) as u32);
                wanting.push(scheduled.id);
            }
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let last = hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?;
        if wanting.iter().all(|id| self.live[id].request.task == Task::Score) {
            let scores = model.scores(&last)?;
            return Ok(wanting.into_iter().zip(scores).map(|(id, score)| (id, Outcome::Score(score))).collect());
        }
        let logits = model.logits(&last)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        drop(device);
        Ok(wanting.into_par_iter().zip(logits).map(|(id, mut row)| (id, self.outcome(id, &mut row))).collect())
    }

    fn sequence(&self, id: u64) -> &Sequence {
        self.scheduler.get(id).expect("a scheduled sequence runs. This is a bug.")
    }

    /// Ids, positions, cache targets and adapter groups of the step's rows.
    fn batch(&self, step: &[Scheduled]) -> (Vec<u32>, Vec<u32>, PagedBatch, Vec<RowGroup>) {
        let block_size = self.pool.block_size;
        let (mut ids, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let (mut sequences, mut groups): (Vec<PagedSequence>, Vec<RowGroup>) = (Vec::new(), Vec::new());
        for scheduled in step {
            let sequence = self.sequence(scheduled.id);
            let (start, context) = (ids.len(), sequence.computed + scheduled.len);
            for position in sequence.computed..context {
                ids.push(sequence.tokens[position]);
                positions.push(position as u32);
                slots.push(sequence.blocks[position / block_size] * block_size as u32 + (position % block_size) as u32);
            }
            let blocks = sequence.blocks[..context.div_ceil(block_size)].to_vec();
            sequences.push(PagedSequence { start, len: scheduled.len, context, blocks });
            let adapter = self.live[&scheduled.id].request.adapter.clone();
            let name = |adapter: &Option<Arc<crate::model::Adapter>>| {
                adapter.as_ref().map(|adapter| adapter.generation.clone())
            };
            match groups.last_mut() {
                Some(group) if name(&group.adapter) == name(&adapter) => group.len += scheduled.len,
                _ => groups.push(RowGroup { start, len: scheduled.len, adapter }),
            }
        }
        (ids, positions, PagedBatch { block_size, slots, sequences }, groups)
    }

    /// Log-probabilities of the prompt tokens that this chunk's rows predict.
    fn read_prompt(&mut self, scheduled: &Scheduled, paged: &PagedSequence, hidden: &Tensor) -> Result<()> {
        let live = &self.live[&scheduled.id];
        let Some(top) = live.request.params.prompt_logprobs else { return Ok(()) };
        // They were sent with the first token: a preempted sequence reads its prompt again without them.
        if live.prompt_logprobs.is_empty() {
            return Ok(());
        }
        let sequence = self.sequence(scheduled.id);
        let first = sequence.computed;
        let last = paged.context.min(sequence.prompt_len.saturating_sub(1));
        let targets: Vec<u32> = (first..last).map(|position| sequence.tokens[position + 1]).collect();
        for (chunk, targets) in targets.chunks(LOGIT_ROWS).enumerate() {
            let rows = hidden.narrow(0, paged.start + chunk * LOGIT_ROWS, targets.len())?;
            let logits = self.shared.model.logits(&rows)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
            let found: Vec<TokenLogprob> =
                logits.par_iter().zip(targets).map(|(row, target)| sampler::logprob_of(row, *target, top)).collect();
            let live = self.live.get_mut(&scheduled.id).expect("a scheduled sequence is live. This is a bug.");
            for (offset, logprob) in found.into_iter().enumerate() {
                live.prompt_logprobs[first + chunk * LOGIT_ROWS + offset + 1] = Some(logprob);
            }
        }
        Ok(())
    }

    fn outcome(&self, id: u64, logits: &mut [f32]) -> Outcome {
        let (live, sequence) = (&self.live[&id], self.sequence(id));
        let params = &live.request.params;
        if !logits.iter().all(|logit| logit.is_finite()) {
            let text = "the model's logits are not finite: its weights or the adapter are broken";
            return Outcome::Failed(Error::internal(text));
        }
        match &live.request.task {
            Task::NextToken(ids) => {
                let total = sampler::log_sum_exp(logits);
                Outcome::NextToken(ids.iter().map(|id| (f64::from(logits[*id as usize]) - total) as f32).collect())
            }
            Task::Score | Task::Generate if params.max_tokens == Some(0) => Outcome::PromptRead,
            Task::Score | Task::Generate => {
                let (prompt, output) = sequence.tokens.split_at(sequence.prompt_len);
                self.draw(live, prompt, output, logits).unwrap_or_else(Outcome::Failed)
            }
        }
    }

    /// One token, by the request's parameters and grammar.
    fn draw(&self, live: &Live, prompt: &[u32], output: &[u32], logits: &mut [f32]) -> Result<Outcome> {
        let params = &live.request.params;
        let mut banned: Vec<u32> = sampler::ends_of(&params.bad_words, output).collect();
        if output.len() < params.min_tokens {
            banned.extend(self.shared.tokenizer.eos_token_ids().iter().chain(&params.stop_token_ids));
        }
        let mut matcher = live.matcher.as_ref().map(|matcher| matcher.lock().unwrap_or_else(PoisonError::into_inner));
        let mask = matcher.as_mut().map(|matcher| matcher.mask()).transpose()?;
        let draw = Draw { params, prompt, output, seed: live.seed, banned: &banned, mask: mask.as_ref() };
        let (id, logprob) = sampler::sample(logits, &draw);
        if logits[id as usize] > f32::NEG_INFINITY {
            return Ok(Outcome::Token(id, logprob));
        }
        if matcher.is_some_and(|mut matcher| matcher.is_accepting()) {
            return Ok(Outcome::Complete);
        }
        let text = "No token is left that the format, `allowed_token_ids`, `bad_words` and `min_tokens` all allow.";
        Err(Error::new(Code::InvalidValue, text))
    }

    fn settle(&mut self, id: u64, outcome: Outcome) {
        let Some(live) = self.live.get_mut(&id) else { return };
        let first = live.last_token.is_none();
        let now = Instant::now();
        let before = live.last_token.replace(now);
        if first && !live.prompt_logprobs.is_empty() {
            let _ = live.events.send(Event::Prompt(std::mem::take(&mut live.prompt_logprobs)));
        }
        let (token, logprob) = match outcome {
            Outcome::Token(token, logprob) => (token, logprob),
            Outcome::NextToken(values) => {
                let usage = self.usage(id);
                return self.end(id, Event::NextToken(values, usage), "stop");
            }
            Outcome::Score(score) => {
                let usage = self.usage(id);
                return self.end(id, Event::Score(score, usage), "stop");
            }
            Outcome::Failed(error) => return self.end(id, Event::Failed(error), "error"),
            Outcome::Complete => {
                let text = live.decoder.finish();
                return self.done(id, text, FinishReason::Stop { text: None, token: None });
            }
            Outcome::PromptRead => return self.done(id, String::new(), FinishReason::Length),
        };
        let role = [live.request.role];
        match before {
            None => metrics()
                .time_to_first_token_seconds
                .with_label_values(&role)
                .observe((now - live.arrived).as_secs_f64()),
            Some(before) => {
                metrics().inter_token_latency_seconds.with_label_values(&role).observe((now - before).as_secs_f64())
            }
        }
        metrics().generation_tokens_total.with_label_values(&role).inc();
        self.scheduler.push_token(id, token);
        let matcher = live.matcher.as_mut().map(|matcher| matcher.get_mut().unwrap_or_else(PoisonError::into_inner));
        let complete = match matcher {
            None => false,
            Some(matcher) => match matcher.commit(token) {
                Ok(()) => matcher.is_complete(),
                Err(error) => return self.end(id, Event::Failed(error), "error"),
            },
        };
        let params = &live.request.params;
        let ends = complete || !params.ignore_eos;
        let is_eos = ends && self.shared.tokenizer.eos_token_ids().contains(&token);
        let asked = params.stop_token_ids.contains(&token);
        if is_eos || asked {
            let _ = live.events.send(Event::Token { id: token, text: String::new(), logprob });
            let text = live.decoder.finish();
            return self.done(id, text, FinishReason::Stop { text: None, token: asked.then_some(token) });
        }
        let max_tokens = params.max_tokens;
        let (text, stop) = live.decoder.push(token);
        let _ = live.events.send(Event::Token { id: token, text, logprob });
        if let Some(stop) = stop {
            return self.done(id, String::new(), FinishReason::Stop { text: Some(stop), token: None });
        }
        if complete {
            let text = live.decoder.finish();
            return self.done(id, text, FinishReason::Stop { text: None, token: None });
        }
        let (total, prompt) = (self.sequence(id).tokens.len(), self.sequence(id).prompt_len);
        if max_tokens.is_some_and(|max| total - prompt >= max) || total >= self.shared.max_model_len {
            let text = self.live.get_mut(&id).map(|live| live.decoder.finish()).unwrap_or_default();
            self.done(id, text, FinishReason::Length);
        }
    }

    fn usage(&self, id: u64) -> Usage {
        let sequence = self.sequence(id);
        Usage {
            prompt_tokens: sequence.prompt_len,
            cached_tokens: sequence.cached,
            completion_tokens: sequence.tokens.len() - sequence.prompt_len,
        }
    }

    fn done(&mut self, id: u64, text: String, reason: FinishReason) {
        let label = if reason == FinishReason::Length { "length" } else { "stop" };
        let usage = self.usage(id);
        self.end(id, Event::Done { text, reason, usage }, label);
    }

    /// Sends the last event and forgets the request; its cache is already back when the client hears of it.
    fn end(&mut self, id: u64, event: Event, reason: &str) {
        let events = self.live.get(&id).map(|live| live.events.clone());
        self.finish(id, reason);
        self.publish_stats();
        if let Some(events) = events {
            let _ = events.send(event);
        }
    }

    fn finish(&mut self, id: u64, reason: &str) {
        self.scheduler.remove(id);
        let Some(live) = self.live.remove(&id) else { return };
        if !live.started {
            self.shared.leave_queue(live.request.role);
        }
        let role = live.request.role;
        metrics().request_success_total.with_label_values(&[role, reason]).inc();
        metrics().e2e_request_latency_seconds.with_label_values(&[role]).observe(live.arrived.elapsed().as_secs_f64());
    }

    fn publish_stats(&mut self) {
        let blocks = &self.scheduler.blocks;
        let (total, free, cached) = (blocks.total(), blocks.num_free(), blocks.num_cached());
        let running = self.scheduler.running().len();
        let stats = EngineStats {
            running,
            waiting: self.shared.waiting(),
            total_blocks: total,
            free_blocks: free,
            cached_blocks: cached,
        };
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        metrics()
            .kv_cache_usage_ratio
            .with_label_values(&[&self.shared.name])
            .set((total - free - cached) as f64 / total.max(1) as f64);
        metrics().preemptions_total.inc_by(std::mem::take(&mut self.scheduler.preemptions) as u64);
        for role in ["teacher", "reward", "student"] {
            let of_role = self.live.values().filter(|live| live.request.role == role);
            let (started, waiting): (Vec<_>, Vec<_>) = of_role.partition(|live| live.started);
            self.shared.count(role, started.len() as i64, waiting.len() as i64);
        }
    }
}
