//! The stages of a job, each of which goes on from the rows it left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::pacing::Pacing;
use super::pairs::{Candidate, count, keep};
use super::report::{Comparison, Contest, Report, compare};
use super::synthesize::{Sample, Work, drive, mixed, synthesize_work};
use super::{Behavior, JobRequest, PromptInput};
use crate::error::{Code, Error, Result};
use crate::jobs::{Context, Status};
use crate::roles::{Reward, Roles, Target};
use crate::telemetry::metrics;
use crate::text::Message;
use crate::train::{Outcome, TokenPair, TrainJob, train};

/// Pairs stored in one transaction; a stop is heard between two of them.
const BATCH: usize = 256;

/// One job being run.
pub(super) struct Run<'a> {
    pub(super) context: &'a Context,
    pub(super) roles: &'a Arc<Roles>,
    pub(super) runtime: &'a Handle,
    pub(super) request: JobRequest,
    pub(super) behavior: Behavior,
    /// To learn from, then those given for the report.
    prompts: Vec<PromptInput>,
    /// Indices of prompts kept for the report.
    held_out: BTreeSet<usize>,
}

/// The pairs of a job as tokens.
pub(super) struct Pairs {
    /// To learn from.
    pub(super) training: Vec<TokenPair>,
    /// Of held-out prompts, where the job evaluates while it trains.
    held_out: Vec<TokenPair>,
}

impl<'a> Run<'a> {
    /// Reads the request; the prompts are stored at the first run, so that a file that changes later changes nothing.
    pub(super) fn open(context: &'a Context, roles: &'a Arc<Roles>, runtime: &'a Handle) -> Result<Self> {
        let mut request = JobRequest::parse(&context.job.request)?;
        if !context.job.progress["waiting"].is_null() {
            // It was killed while it waited.
            context.store.set_progress(&context.job.id, &json!({ "waiting": null }))?;
        }
        // Files, recipes and live adapters may change while a job is paused: what it began with is kept.
        let behavior = kept(context, "behavior", || request.recipe(roles))?;
        let prompts: Vec<PromptInput> = kept(context, "prompts", || {
            let mut prompts = request.all_prompts(roles)?;
            prompts.extend(request.eval_prompts.iter().cloned());
            Ok(prompts)
        })?;
        let init = request.lora.init_from.take();
        request.lora.init_from =
            kept(context, "init_from", || Ok(init.as_deref().map(|name| roles.adapters().pinned(name))))?;
        let asked = roles.adapters().pinned(&request.synthesis.respond_with);
        request.synthesis.respond_with = kept(context, "respond_with", || Ok(asked))?;
        let held_out = match request.eval_prompts.is_empty() {
            true => held_out(&prompts, request.training.eval_fraction, request.seed),
            false => (prompts.len() - request.eval_prompts.len()..prompts.len()).collect(),
        };
        Ok(Run { context, roles, runtime, request, behavior, prompts, held_out })
    }

    /// What was sampled and computed so far is of the student that there is. A 409 where its weights are others now.
    pub(super) fn check_student(&self) -> Result<()> {
        let base = self.roles.student_base()?;
        let identity = base.engine()?.model().identity();
        if kept(self.context, "student", || Ok(identity.to_owned()))? == identity {
            return Ok(());
        }
        let text = "the student's weights, `dtype` or device are not those this job began with: bring them back, or start a new job";
        Err(Error::conflict(text))
    }

    /// Stages 1 to 3: the teacher answers, criticizes, revises.
    pub(super) fn synthesize(&self) -> Result<()> {
        if !self.request.pairs.is_empty() {
            return Ok(());
        }
        // Who answered may be gone by the time the job is resumed; it matters only to what is left.
        let (left, total) = self.unsampled()?;
        if left.is_empty() {
            return self.context.progress(Status::Synthesizing, total, total);
        }
        self.context.stage(Status::Synthesizing)?;
        let asked = [self.roles.teacher()?, self.roles.resolve(&self.request.synthesis.respond_with)?];
        self.patiently("sample", &asked, || self.synthesize_rest())
    }

    /// The conversations still to be held, and how many there are in all.
    fn unsampled(&self) -> Result<(Vec<Work>, usize)> {
        let samples = self.request.synthesis.samples_per_prompt;
        let done: BTreeSet<usize> = self.rows("sample")?.into_iter().map(|(index, _)| index).collect();
        let wanted = (0..self.prompts.len()).filter(|index| self.makes_pairs(*index));
        let all: Vec<(usize, usize)> = wanted.flat_map(|index| (0..samples).map(move |one| (index, one))).collect();
        let left = all.iter().filter(|(index, one)| !done.contains(&(index * samples + one)));
        let left =
            left.map(|(index, one)| Work { prompt_index: *index, sample: *one, prompt: self.prompts[*index].clone() });
        Ok((left.collect(), all.len()))
    }

    fn synthesize_rest(&self) -> Result<()> {
        let samples = self.request.synthesis.samples_per_prompt;
        let (work, total) = self.unsampled()?;
        let mut finished = total - work.len();
        self.context.progress(Status::Synthesizing, finished, total)?;
        let mut on_sample = |sample: Sample| {
            if let Some(reason) = sample.too_long.as_ref().or(sample.refused.as_ref()) {
                let message = format!("prompt {} is dropped: {reason}", sample.prompt_index);
                self.context.event("warn", "message", &message, &json!({"prompt_index": sample.prompt_index}))?;
            }
            let row = sample.prompt_index * samples + sample.sample;
            // Before the row that says the conversation is done.
            if let Some(sampled) = &sample.sampled {
                self.put_row("sampled", row, &serde_json::to_value(sampled)?)?;
            }
            self.put_row("sample", row, &serde_json::to_value(&sample)?)?;
            finished += 1;
            self.context.progress(Status::Synthesizing, finished, total)
        };
        let check = || self.context.check();
        let options = &self.request.synthesis;
        self.runtime.block_on(synthesize_work(
            self.roles,
            &self.behavior,
            work,
            options,
            self.request.seed,
            &check,
            &mut on_sample,
        ))
    }

    /// Stage 4: the reward role scores both answers. A score that cannot be read is a row that says so.
    pub(super) fn score(&self) -> Result<()> {
        let unscored: Vec<(usize, Vec<Message>, String, String)> = self
            .candidates_without_scores()?
            .into_iter()
            .filter(|(_, one)| one.unanswered.is_none() && one.scores.is_none())
            .map(|(index, one)| {
                let plain = self.plain_prompt(one.prompt_index);
                (index, plain, one.chosen, one.rejected)
            })
            .collect();
        if unscored.is_empty() {
            return Ok(());
        }
        self.context.stage(Status::Scoring)?;
        self.patiently("score", self.roles.reward()?.target().cloned().as_slice(), || self.score_rest(&unscored))
    }

    fn score_rest(&self, unscored: &[(usize, Vec<Message>, String, String)]) -> Result<()> {
        let done: BTreeSet<usize> = self.rows("score")?.into_iter().map(|(index, _)| index).collect();
        let total = unscored.len();
        let left: Vec<_> = unscored.iter().filter(|(index, ..)| !done.contains(index)).cloned().collect();
        let mut finished = total - left.len();
        self.context.progress(Status::Scoring, finished, total)?;
        let reward = self.roles.reward()?;
        let rubric = &self.behavior.judge;
        let scores = left.into_iter().map(|(index, plain, chosen, rejected)| {
            let reward = &reward;
            async move {
                let one = async |answer: String| -> Result<Option<f64>> {
                    if answer.trim().is_empty() {
                        return Ok(None);
                    }
                    let mut turns = plain.clone();
                    turns.push(Message::new("assistant", answer));
                    match reward.score(&turns, Some(rubric)).await {
                        Ok(score) => Ok(Some(score.value)),
                        Err(error) if error.code == Code::Unprocessable || error.is_of_one_conversation() => {
                            tracing::warn!(row = index, %error, "no score");
                            Ok(None)
                        }
                        Err(error) => Err(error),
                    }
                };
                Ok::<_, Error>((index, one(chosen).await?, one(rejected).await?))
            }
        });
        let on_scored = |scored: Result<(usize, Option<f64>, Option<f64>)>| {
            let (index, chosen, rejected) = scored?;
            self.put_row("score", index, &json!({"chosen": chosen, "rejected": rejected}))?;
            finished += 1;
            self.context.progress(Status::Scoring, finished, total)
        };
        let width = self.roles.max_in_flight(reward.target());
        self.runtime.block_on(drive(scores, width, || self.context.check(), on_scored))
    }

    /// Filters the scored answers; always the same pairs in the same order for the same rows.
    pub(super) fn pairs(&self) -> Result<Pairs> {
        let scores: BTreeMap<usize, Value> = self.rows("score")?.into_iter().collect();
        let mut candidates = Vec::new();
        for (index, mut one) in self.candidates_without_scores()? {
            if let Some(row) = scores.get(&index) {
                one.scores = row["chosen"].as_f64().zip(row["rejected"].as_f64());
            }
            candidates.push(one);
        }
        let base = self.roles.student_base()?;
        let longest = self.request.training.max_length.min(base.engine()?.max_model_len());
        let stored = self.rows("pair")?.len();
        let (held_out, training): (Vec<_>, Vec<_>) =
            candidates.into_iter().partition(|one| self.held_out.contains(&one.prompt_index));
        let check = || self.context.check();
        let keep = |candidates| keep(candidates, &self.request.scoring, base.tokenizer()?, longest, check);
        let (kept, held_out) = (keep(training)?, keep(held_out)?.tokens);
        let won = kept.pairs.iter().filter(|pair| pair.score_chosen > pair.score_rejected).count();
        let ratio = won as f64 / kept.pairs.len().max(1) as f64;
        metrics().revised_win_ratio.set(ratio);
        if stored == 0 {
            count(&kept);
        }
        // Those of an earlier run are the first ones.
        let left: Vec<_> = kept.pairs.iter().enumerate().skip(stored).collect();
        for batch in left.chunks(BATCH) {
            let rows = batch.iter().map(|(index, pair)| Ok((*index, serde_json::to_value(pair)?)));
            self.context.store.put_rows(&self.context.job.id, "pair", &rows.collect::<Result<Vec<_>>>()?)?;
            check()?;
        }
        let known = kept.tokens.iter().filter(|pair| pair.reference_rejected.is_some()).count();
        let summary = json!({
            "kept": kept.pairs.len(), "sampled_references": known, "held_out": held_out.len(), "dropped": kept.dropped, "revised_win_ratio": ratio,
        });
        self.set_result(&json!({ "pairs": summary }))?;
        let message = format!("{} pairs kept, dropped: {}", kept.pairs.len(), json!(kept.dropped));
        self.context.event("info", "message", &message, &summary)?;
        if kept.pairs.is_empty() {
            return Err(Error::unprocessable("pairs", format!("{message}; there is nothing to train on")));
        }
        if self.request.training.eval_steps.is_some() && held_out.is_empty() {
            let message = "no pair of a held-out prompt was kept: training goes on without evaluations";
            self.context.event("warn", "message", message, &json!({}))?;
        }
        Ok(Pairs { training: kept.tokens, held_out })
    }

    /// Stage 5: trains between the steps of serving.
    pub(super) fn train(&self, pairs: &Pairs) -> Result<Outcome> {
        self.context.stage(Status::Training)?;
        let base = self.roles.student_base()?;
        let engine = base.engine()?;
        let gate = engine.gate();
        let job = self.train_job(&base, pairs)?;
        // It was asked when the job came, but the server may have been started anew with less.
        self.roles.fits(job.init.as_ref().map_or(&job.lora, |file| &file.config), &job.options)?;
        let outcome = gate.training(|| train(&job, &mut Pacing::new(self, &gate))).map_err(|error| match error.code {
            Code::OutOfMemory => Error::new(
                Code::OutOfMemory,
                format!(
                    "{} of training: resume the job when there is more room, or start one with a lower training.activation_memory, \
                     training.max_length or lora.r",
                    error.message
                ),
            ),
            _ => error,
        })?;
        let last = outcome.last.as_ref().map(serde_json::to_value).transpose()?;
        self.set_result(&json!({"training": {
            "steps": outcome.steps, "adapter_step": outcome.adapter_step, "last": last,
            "evaluations": outcome.evaluations, "dropped_too_long": outcome.dropped_too_long, "nonfinite_steps": outcome.nonfinite_steps,
        }}))?;
        Ok(outcome)
    }

    fn train_job<'t>(&self, base: &'t Target, pairs: &'t Pairs) -> Result<TrainJob<'t>> {
        let request = &self.request;
        let init = request.lora.init_from.as_deref().map(|name| self.roles.adapters().file(name)).transpose()?;
        Ok(TrainJob {
            model: base.engine()?.model(),
            lora: request.lora.config(Some(self.roles.student_model())),
            init,
            pairs: &pairs.training,
            eval_pairs: &pairs.held_out,
            loss: request.loss.clone(),
            options: request.training.clone(),
            seed: request.seed,
            folder: self.roles.adapters().job_folder(&self.context.job.id),
        })
    }

    /// The report on held-out prompts, before anything goes live.
    pub(super) fn evaluate(&self, outcome: &Outcome) -> Result<Report> {
        self.context.stage(Status::Evaluating)?;
        let asked = self.roles.reward()?.target().cloned();
        let report = self.patiently("eval", asked.as_slice(), || self.evaluate_rest(outcome))?;
        metrics().train_kl.set(report.kl_per_token);
        self.set_result(&json!({ "report": report }))?;
        Ok(report)
    }

    fn evaluate_rest(&self, outcome: &Outcome) -> Result<Report> {
        let prompts: Vec<&PromptInput> = self.held_out.iter().map(|index| &self.prompts[*index]).collect();
        let mut done: BTreeMap<usize, Comparison> = BTreeMap::new();
        for (index, row) in self.rows("eval")? {
            done.insert(index, serde_json::from_value(row)?);
        }
        let base = self.roles.student_base()?;
        let staged = self.roles.adapters().stage(&self.request.publish.alias, &outcome.adapter)?;
        let aligned = Target { lease: Some(staged), ..base.clone() };
        let reward: Arc<Reward> = self.roles.reward()?;
        let (total, left) = (prompts.len(), (0..prompts.len()).filter(|index| !done.contains_key(index)));
        let left: Vec<usize> = left.collect();
        self.context.progress(Status::Evaluating, done.len(), total)?;
        let contest = Contest {
            base: &base,
            aligned: &aligned,
            reward: &reward,
            behavior: &self.behavior,
            options: &self.request.synthesis,
            seed: self.request.seed,
        };
        let comparisons = left.into_iter().map(|index| {
            let (contest, prompt) = (&contest, prompts[index]);
            async move { (index, compare(contest, prompt, index).await) }
        });
        let on_compared = |(index, compared): (usize, Result<Comparison>)| match compared {
            Ok(one) => {
                self.put_row("eval", index, &serde_json::to_value(&one)?)?;
                done.insert(index, one);
                self.context.progress(Status::Evaluating, done.len(), total)
            }
            Err(error) if error.is_of_one_conversation() => {
                let message = format!("held-out prompt {index} is left out of the report: {}", error.message);
                self.context.event("warn", "message", &message, &json!({ "index": index }))
            }
            Err(error) => Err(error),
        };
        let width = self.roles.max_in_flight(std::iter::once(&base).chain(reward.target()));
        self.runtime.block_on(drive(comparisons, width, || self.context.check(), on_compared))?;
        Ok(Report::of(done.into_values().collect()))
    }

    /// Pairs of the request, or what the teacher wrote, by row; only ready scores are filled in.
    fn candidates_without_scores(&self) -> Result<Vec<(usize, Candidate)>> {
        let context = self.behavior.context.as_deref().filter(|_| self.behavior.train_with_context);
        if !self.request.pairs.is_empty() {
            let given = self.request.pairs.iter().enumerate();
            // The prompts of ready pairs are in their order in `self.prompts`.
            return Ok(given
                .filter(|(index, _)| self.makes_pairs(*index))
                .map(|(index, pair)| {
                    let one = Candidate {
                        prompt_index: index,
                        prompt: pair.prompt.messages(),
                        chosen: pair.chosen.clone(),
                        rejected: pair.rejected.clone(),
                        sampled: None,
                        scores: pair.score_chosen.zip(pair.score_rejected),
                        unanswered: None,
                    };
                    (index, one)
                })
                .collect());
        }
        let mut sampled: BTreeMap<usize, Value> = self.rows("sampled")?.into_iter().collect();
        self.rows("sample")?
            .into_iter()
            .map(|(index, row)| {
                let sample: Sample = serde_json::from_value(row)?;
                let prompt = self
                    .prompts
                    .get(sample.prompt_index)
                    .ok_or_else(|| Error::internal("a stored conversation has no prompt. This is a bug."))?;
                let unanswered = [("too_long", &sample.too_long), ("refused", &sample.refused)];
                let one = Candidate {
                    prompt_index: sample.prompt_index,
                    prompt: prompt.under(context),
                    unanswered: unanswered.into_iter().find_map(|(reason, why)| why.as_ref().map(|_| reason)),
                    chosen: sample.revised,
                    rejected: sample.response,
                    sampled: sampled.remove(&index).map(serde_json::from_value).transpose()?,
                    scores: None,
                };
                Ok((index, one))
            })
            .collect()
    }

    /// Held-out prompts become pairs only where the job evaluates while it trains.
    fn makes_pairs(&self, index: usize) -> bool {
        self.request.training.eval_steps.is_some() || !self.held_out.contains(&index)
    }

    fn plain_prompt(&self, index: usize) -> Vec<Message> {
        self.prompts.get(index).map(PromptInput::messages).unwrap_or_default()
    }

    fn rows(&self, kind: &str) -> Result<Vec<(usize, Value)>> {
        self.context.store.rows(&self.context.job.id, kind)
    }

    fn put_row(&self, kind: &str, index: usize, value: &Value) -> Result<()> {
        self.context.store.put_row(&self.context.job.id, kind, index, value)
    }

    pub(super) fn set_result(&self, patch: &Value) -> Result<()> {
        self.context.store.set_result(&self.context.job.id, patch)
    }

    /// Adds the seconds a stage took to those of earlier runs of the job.
    pub(super) fn timed<T>(&self, stage: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let since = Instant::now();
        let outcome = work();
        let job = self.context.store.get(&self.context.job.id)?;
        let mut seconds = job.result["seconds"].as_object().cloned().unwrap_or_default();
        let before = seconds.get(stage).and_then(Value::as_f64).unwrap_or(0.0);
        seconds.insert(stage.to_owned(), json!(before + since.elapsed().as_secs_f64()));
        self.set_result(&json!({ "seconds": seconds }))?;
        outcome
    }
}

/// What the first run of a job made, read back by the later ones.
fn kept<T: Serialize + DeserializeOwned>(context: &Context, kind: &str, make: impl FnOnce() -> Result<T>) -> Result<T> {
    match context.store.rows(&context.job.id, kind)?.pop() {
        Some((_, stored)) => Ok(serde_json::from_value(stored)?),
        None => {
            let made = make()?;
            context.store.put_row(&context.job.id, kind, 0, &serde_json::to_value(&made)?)?;
            Ok(made)
        }
    }
}

/// Prompts kept for the report: a share of the distinct ones, drawn by the seed; equal prompts stay on one side.
fn held_out(prompts: &[PromptInput], fraction: f64, seed: u64) -> BTreeSet<usize> {
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let turns: Vec<String> =
            prompt.messages().iter().map(|turn| format!("{}\u{0}{}", turn.role, turn.content)).collect();
        groups.entry(turns.join("\u{1}")).or_default().push(index);
    }
    let mut groups: Vec<Vec<usize>> = groups.into_values().collect();
    groups.shuffle(&mut ChaCha8Rng::seed_from_u64(mixed(seed, &[0x6865_6c64])));
    let wanted = fraction * groups.len() as f64;
    let least = usize::from(fraction > 0.0 && groups.len() > 1);
    let number = (wanted.round() as usize).max(least).min(groups.len().saturating_sub(1));
    groups.into_iter().take(number).flatten().collect()
}
