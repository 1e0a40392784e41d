//! The owner thread: take commands, schedule, run one flat step, sample, send events. Nobody else touches the pool.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};

use candle_core::Tensor;
use rayon::prelude::*;

use super::batch::Batch;
use super::live::{Live, Questions};
use super::lookup::{self, SpeculativeMethod, SpeculativeOptions};
use super::request::{Task, TokenLogprob, Usage};
use super::sampler;
use super::scheduler::{Scheduled, Scheduler, Sequence};
use super::writer::{Ending, Outcome, Writer};
use super::{EngineStats, GateGuard, Shared};
use crate::error::{Code, Error, Result};
use crate::model::{Attend, Decoder, KvPool, PagedSequence, SampleRow, Sampled, sample};
use crate::telemetry::metrics;

/// Rows of logits held at once while a prompt's log-probabilities are read.
const LOGIT_ROWS: usize = 64;

pub(super) struct Owner {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: KvPool,
    pub(super) scheduler: Scheduler,
    speculative: SpeculativeOptions,
    live: HashMap<u64, Live>,
    next_id: u64,
}

impl Owner {
    pub(super) fn new(
        shared: Arc<Shared>,
        pool: KvPool,
        scheduler: Scheduler,
        speculative: SpeculativeOptions,
    ) -> Self {
        Owner { shared, pool, scheduler, speculative, live: HashMap::new(), next_id: 0 }
    }

    /// Runs until every handle is gone.
    pub(super) fn run(mut self, commands: &Receiver<Writer>) {
        loop {
            if self.scheduler.is_idle() {
                self.publish_stats();
                match commands.recv() {
                    Ok(writer) => self.admit(writer),
                    Err(_) => return,
                }
            }
            // With the last handle gone, what was accepted is still answered.
            while let Ok(writer) = commands.try_recv() {
                self.admit(writer);
            }
            self.drop_cancelled();
            let mut step = self.scheduler.schedule();
            self.publish_stats();
            if step.is_empty() {
                continue;
            }
            self.note_started(&step);
            self.draft(&mut step);
            let outcomes = catch_unwind(AssertUnwindSafe(|| self.forward(&step)))
                .unwrap_or_else(|_| Err(Error::internal("the engine's step panicked. This is a bug.")));
            match outcomes {
                Ok(outcomes) => {
                    self.scheduler.complete(&step);
                    for (id, outcomes) in outcomes {
                        let role = [self.live[&id].role()];
                        let right = metrics().spec_decode_num_accepted_tokens_total.with_label_values(&role);
                        right.inc_by(outcomes.len() as u64 - 1);
                        outcomes.into_iter().for_each(|outcome| self.settle(id, outcome));
                    }
                }
                Err(mut error) => {
                    tracing::error!(%error, sequences = step.len(), "engine step failed");
                    if error.code == Code::OutOfMemory {
                        error.message += ": ask again, or lower kv_cache.max_sequences, kv_cache.max_batch_tokens or kv_cache.memory";
                    }
                    step.iter().for_each(|scheduled| self.end(scheduled.id, Ending::Failed(error.clone())));
                }
            }
        }
    }

    fn admit(&mut self, writer: Writer) {
        let live = Live::new(writer);
        self.scheduler.add(live.sequence(self.next_id));
        self.live.insert(self.next_id, live);
        self.next_id += 1;
    }

    fn drop_cancelled(&mut self) {
        let gone = self.live.iter().filter(|(_, live)| live.writer.is_abandoned());
        for id in gone.map(|(id, _)| *id).collect::<Vec<u64>>() {
            self.finish(id, "abort");
        }
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
            self.shared.queue.leave(live.role());
            let (metrics, role) = (metrics(), [live.role()]);
            metrics
                .request_queue_time_seconds
                .with_label_values(&role)
                .observe(live.writer.arrived.elapsed().as_secs_f64());
            metrics.prompt_tokens_total.with_label_values(&role).inc_by(sequence.prompt_len as u64);
            metrics.prompt_tokens_cached_total.with_label_values(&role).inc_by(sequence.cached as u64);
            metrics.prefix_cache_queries_total.with_label_values(&role).inc_by(sequence.prompt_len as u64);
            metrics.prefix_cache_hits_total.with_label_values(&role).inc_by(sequence.cached as u64);
        }
    }

    /// Adds drafts to the sequences that decode, as far as they are worth it and the step has room.
    fn draft(&mut self, step: &mut [Scheduled]) {
        if self.speculative.method == SpeculativeMethod::None {
            return;
        }
        let eos = self.shared.tokenizer.eos_token_ids();
        let (mut answers, mut found, mut drafts) = (0, Vec::new(), Vec::new());
        for (at, scheduled) in step.iter().enumerate() {
            let (live, sequence) = (&self.live[&scheduled.id], self.sequence(scheduled.id));
            if sequence.pending() > 1 || sequence.tokens.len() == sequence.prompt_len {
                continue;
            }
            answers += 1;
            let room = live.room(sequence);
            let forced = || live.forced(sequence, room.min(self.speculative.num_speculative_tokens));
            if let Some(mut draft) = forced().or_else(|| self.speculative.find(&sequence.tokens, room)) {
                let end = draft.tokens.iter().position(|token| eos.contains(token));
                draft.tokens.truncate(end.unwrap_or(usize::MAX));
                found.push(at);
                drafts.push(draft);
            }
        }
        let rows: usize = step.iter().map(|scheduled| scheduled.len).sum();
        let lens = lookup::plan(&drafts, answers, self.scheduler.limits.max_batch_tokens - rows);
        for ((at, draft), len) in found.into_iter().zip(drafts).zip(lens) {
            let len = self.scheduler.draft(step[at].id, &draft.tokens[..len]);
            step[at].len += len;
            if len > 0 {
                let role = [self.live[&step[at].id].role()];
                metrics().spec_decode_num_drafts_total.with_label_values(&role).inc();
                metrics().spec_decode_num_draft_tokens_total.with_label_values(&role).inc_by(len as u64);
            }
        }
    }

    /// One flat step; the outcomes of every sequence whose last token was computed, at least one each.
    fn forward(&mut self, step: &[Scheduled]) -> Result<Vec<(u64, Vec<Outcome>)>> {
        let mut batch = Batch::new(self.pool.block_size);
        for scheduled in step {
            let adapter = self.live[&scheduled.id].writer.request.adapter.as_ref();
            batch.push(self.sequence(scheduled.id), scheduled.len, adapter);
        }
        let shared = self.shared.clone();
        let device = shared.gate.serve();
        device.run(|device| self.compute(step, &batch, &shared.model, device))
    }

    fn compute(
        &mut self,
        step: &[Scheduled],
        batch: &Batch,
        model: &Decoder,
        device: GateGuard<'_>,
    ) -> Result<Vec<(u64, Vec<Outcome>)>> {
        let attend = Attend::Paged { pool: &self.pool, batch: &batch.paged };
        let hidden = model.forward(&batch.ids, &batch.positions, attend, batch.lora())?; // (N, C)
        let (mut rows, mut wanting) = (Vec::new(), Vec::new());
        for (scheduled, paged) in step.iter().zip(&batch.paged.sequences) {
            self.read_prompt(scheduled, paged, &hidden)?;
            let sequence = self.sequence(scheduled.id);
            if paged.context == sequence.tokens.len() {
                // The last token's and those of the draft behind it.
                let first = paged.start + sequence.settled() - 1 - sequence.computed;
                rows.extend((first..paged.start + paged.len).map(|row| row as u32));
                wanting.push((scheduled.id, paged.start + paged.len - first));
            }
        }
        if rows.is_empty() {
            // Nothing is read back, which would wait for a GPU: without this the gate counts launches as the whole step.
            hidden.device().synchronize()?;
            return Ok(Vec::new());
        }
        let last = hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?;
        if wanting.iter().all(|(id, _)| self.live[id].writer.request.task == Task::Score) {
            let scores = model.scores(&last)?;
            return Ok(wanting.iter().zip(scores).map(|((id, _), score)| (*id, vec![Outcome::Score(score)])).collect());
        }
        let logits = model.logits(&last)?;
        if logits.device().is_cuda() {
            return self.sample_there(&wanting, &logits, device);
        }
        let mut logits = logits.to_vec2::<f32>()?.into_iter();
        drop(device);
        let rows: Vec<(u64, Vec<Vec<f32>>)> =
            wanting.into_iter().map(|(id, count)| (id, logits.by_ref().take(count).collect())).collect();
        let outcomes = |(id, rows): (u64, Vec<Vec<f32>>)| (id, self.live[&id].outcomes(self.sequence(id), rows));
        Ok(rows.into_par_iter().map(outcomes).collect())
    }

    /// The outcomes of sequences with so many rows of logits each, (rows, V), on a GPU: only tokens come back from there.
    fn sample_there(
        &self,
        wanting: &[(u64, usize)],
        logits: &Tensor,
        device: GateGuard<'_>,
    ) -> Result<Vec<(u64, Vec<Outcome>)>> {
        let v = logits.dim(1)?;
        // While the device is still at work on the step.
        let mut asked: Vec<Questions> =
            wanting.par_iter().map(|(id, count)| self.live[id].questions(self.sequence(*id), *count, v)).collect();
        let rows: Vec<SampleRow> = asked.iter_mut().flat_map(|asked| std::mem::take(&mut asked.rows)).collect();
        let mut replies = sample(logits, &rows)?.into_iter();
        drop(device);
        let answered = wanting.iter().zip(asked).map(|((id, count), asked)| {
            let replies = replies.by_ref().take(*count).collect();
            (*id, self.live[id].answers(self.sequence(*id), &asked, replies))
        });
        Ok(answered.collect())
    }

    fn sequence(&self, id: u64) -> &Sequence {
        self.scheduler.get(id).expect("a scheduled sequence runs. This is a bug.")
    }

    /// Log-probabilities of the prompt tokens that this chunk's rows predict.
    fn read_prompt(&mut self, scheduled: &Scheduled, paged: &PagedSequence, hidden: &Tensor) -> Result<()> {
        let live = &self.live[&scheduled.id];
        let Some(top) = live.writer.request.params.prompt_logprobs else { return Ok(()) };
        // They were sent with the first token: a preempted sequence reads its prompt again without them.
        if live.writer.prompt_logprobs.is_empty() {
            return Ok(());
        }
        let sequence = self.sequence(scheduled.id);
        let first = sequence.computed.max(live.writer.request.params.prompt_logprobs_start.saturating_sub(1));
        let last = paged.context.min(sequence.prompt_len.saturating_sub(1));
        let start = paged.start + first - sequence.computed;
        let targets: Vec<u32> = (first..last).map(|position| sequence.tokens[position + 1]).collect();
        for (chunk, targets) in targets.chunks(LOGIT_ROWS).enumerate() {
            let rows = hidden.narrow(0, start + chunk * LOGIT_ROWS, targets.len())?;
            let found = logprobs(&self.shared.model.logits(&rows)?, targets, top)?;
            let live = self.live.get_mut(&scheduled.id).expect("a scheduled sequence is live. This is a bug.");
            for (offset, logprob) in found.into_iter().enumerate() {
                live.writer.prompt_logprobs[first + chunk * LOGIT_ROWS + offset + 1] = Some(logprob);
            }
        }
        Ok(())
    }

    /// Tells the client, and ends what is at its end.
    fn settle(&mut self, id: u64, outcome: Outcome) {
        let Some(live) = self.live.get_mut(&id) else { return };
        if let Some(token) = outcome.token() {
            self.scheduler.push_token(id, token);
        }
        let answered = answered(self.scheduler.get(id));
        if let Some(ending) = live.writer.write(outcome, answered) {
            self.end(id, ending);
        }
    }

    /// None where a step failed in which the sequence was put back.
    fn usage(&self, id: u64) -> Usage {
        let sequence = self.scheduler.get(id);
        Usage {
            prompt_tokens: sequence.map_or(0, |sequence| sequence.prompt_len),
            cached_tokens: sequence.map_or(0, |sequence| sequence.cached),
            completion_tokens: answered(sequence),
        }
    }

    /// Sends the last event and forgets the request; its cache is already back when the client hears of it.
    fn end(&mut self, id: u64, ending: Ending) {
        let usage = self.usage(id);
        let live = self.finish(id, ending.label());
        self.publish_stats();
        if let Some(mut live) = live {
            live.writer.end(ending, usage);
        }
    }

    fn finish(&mut self, id: u64, reason: &str) -> Option<Live> {
        self.scheduler.remove(id);
        let live = self.live.remove(&id)?;
        if !live.started {
            self.shared.queue.leave(live.role());
        }
        live.writer.count(reason);
        Some(live)
    }

    fn publish_stats(&mut self) {
        let blocks = &self.scheduler.blocks;
        let (total, free, cached) = (blocks.total(), blocks.num_free(), blocks.num_cached());
        let running = self.scheduler.running().len();
        let stats = EngineStats {
            running,
            waiting: self.shared.queue.waiting(),
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
            let of_role = self.live.values().filter(|live| live.role() == role);
            let (started, waiting): (Vec<_>, Vec<_>) = of_role.partition(|live| live.started);
            self.shared.count(role, started.len() as i64, waiting.len() as i64);
        }
    }
}

/// Log-probabilities of `targets`, with the `top` most likely tokens. logits: (targets, V).
fn logprobs(logits: &Tensor, targets: &[u32], top: usize) -> Result<Vec<TokenLogprob>> {
    if logits.device().is_cuda() {
        let row = |target: &u32| SampleRow { top, asked: vec![*target], ..SampleRow::default() };
        let found = sample(logits, &targets.iter().map(row).collect::<Vec<_>>())?.into_iter().zip(targets);
        let one = |(row, id): (Sampled, &u32)| {
            let (rank, logprob) = row.asked[0];
            TokenLogprob { id: *id, logprob, top: row.top, rank: Some(rank as usize) }
        };
        return Ok(found.map(one).collect());
    }
    let rows = logits.to_vec2::<f32>()?;
    Ok(rows.par_iter().zip(targets).map(|(row, target)| sampler::logprob_of(row, *target, top)).collect())
}

/// Tokens of the answer so far.
fn answered(sequence: Option<&Sequence>) -> usize {
    sequence.map_or(0, |sequence| sequence.settled() - sequence.prompt_len)
}
