//! A run's state and its four verbs: forward-backward, optimizer step, log-probs under the current adapter, save.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{Tensor, Var};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::checkpoint::{self, SavedState};
use super::metrics::{self, StepMetrics, Sums};
use super::optim::{AdamW, Gradients, schedule, warmup_steps};
use super::pack::{Pack, PackedPair, TokenPair, check_pairs, packed_tokens, plan, trl_tokens, truncate};
use super::pass::{Pass, logprobs, token_logprobs_of};
use super::{LossOptions, PairLogps, TrainingOptions, preference_loss, score_scale};
use crate::error::{Code, Error, Result};
use crate::model::{Decoder, LoraParams, LoraRows, flat_step_rows};
use crate::seed::{STEP, mixed};
use crate::telemetry;
use crate::weights::{AdapterFile, LoraConfig};

/// Steps in a row that may fail to be finite before the run is given up.
const NONFINITE_LIMIT: usize = 5;

/// Called between layers: waits for the device, or stops the run with an error (cancel, pause).
pub type Pace<'a> = dyn FnMut() -> Result<()> + 'a;

/// Everything one run needs.
pub struct TrainJob<'a> {
    /// The base.
    pub model: &'a Decoder,
    /// Shape of the adapter.
    pub lora: LoraConfig,
    /// Adapter to go on from.
    pub init: Option<AdapterFile>,
    /// Training pairs.
    pub pairs: &'a [TokenPair],
    /// Held-out pairs for evaluations during the run; may be empty.
    pub eval_pairs: &'a [TokenPair],
    /// Loss.
    pub loss: LossOptions,
    /// Schedule and sizes.
    pub options: TrainingOptions,
    /// Seed of init, shuffling and dropout.
    pub seed: u64,
    /// Where checkpoints go; resumed from when one is there.
    pub folder: PathBuf,
}

/// State of a run: variables, moments, cursor.
pub struct Trainer<'a> {
    pub(super) model: &'a Decoder,
    pub(super) params: LoraParams,
    variables: Vec<(String, Var)>,
    training: PairSet,
    pub(super) held_out: PairSet,
    dropped_too_long: usize,
    pub(super) loss: LossOptions,
    pub(super) options: TrainingOptions,
    seed: u64,
    pub(super) folder: PathBuf,
    keep_bytes: usize,
    pub(super) pack_rows: usize,
    optimizer: AdamW,
    gradients: Gradients,
    sums: Sums,
    flat_steps: usize,
    kept_blocks: usize,
    started: Option<Instant>,
    saved_step: Option<usize>,
    pub(super) state: SavedState,
}

/// Pairs cut to length, with their score gaps over the job's scale.
pub(super) struct PairSet {
    pub(super) pairs: Vec<TokenPair>,
    pub(super) scaled_gaps: Vec<f64>,
}

impl PairSet {
    fn new(pairs: Vec<TokenPair>, scale: f64) -> Self {
        let scaled_gaps = gaps(&pairs).into_iter().map(|gap| gap / scale).collect();
        PairSet { pairs, scaled_gaps }
    }
}

fn gaps(pairs: &[TokenPair]) -> Vec<f64> {
    pairs.iter().map(|pair| pair.score_chosen - pair.score_rejected).collect()
}

impl<'a> Trainer<'a> {
    /// A fresh state, or the one its folder's newest checkpoint holds. A checkpoint of another job is a 409.
    pub fn open(job: &TrainJob<'a>) -> Result<Self> {
        job.loss.validate("loss")?;
        job.options.validate("training")?;
        if job.pairs.is_empty() {
            return Err(Error::invalid("pairs", "there are no pairs to train on."));
        }
        check_pairs("pairs", job.pairs, job.model.config())?;
        check_pairs("eval_pairs", job.eval_pairs, job.model.config())?;
        let max_length = job.options.max_length.min(job.model.config().max_position_embeddings);
        let (pairs, dropped_too_long) = truncate(job.pairs, max_length);
        if pairs.is_empty() {
            let message = format!(
                "none of the {} pairs has a prompt shorter than {max_length} tokens, so there is nothing to train on.",
                job.pairs.len()
            );
            return Err(Error::invalid("training.max_length", message));
        }
        let scale = score_scale(job.loss.score_scale, &gaps(&pairs));
        let training = PairSet::new(pairs, scale);
        let held_out = PairSet::new(truncate(job.eval_pairs, max_length).0, scale);

        let fingerprint = checkpoint::fingerprint(job)?;
        let saved = checkpoint::newest(&job.folder, &fingerprint)?;
        let params = match (&saved, &job.init) {
            (Some(saved), _) => LoraParams::from_file(&saved.adapter, job.model)?,
            (None, Some(init)) => LoraParams::from_file(init, job.model)?,
            (None, None) => LoraParams::new(&job.lora, job.model, job.seed)?,
        };
        let variables = params.named();
        let mut optimizer = AdamW::new(&variables, job.options.weight_decay)?;
        let keep_bytes = job.options.activation_bytes()?;
        let mut state = SavedState::new(fingerprint, training.pairs.len(), held_out.pairs.len());
        let mut saved_step = None;
        if let Some(saved) = saved {
            optimizer.import(&variables, &saved.moments, saved.state.updates)?;
            saved_step = Some(saved.state.step);
            state = saved.state;
        }
        // Both moments, the gradients and the variables themselves.
        metrics::memory("optimizer", optimizer.bytes() * 2);
        Ok(Trainer {
            model: job.model,
            gradients: Gradients::new(variables.len()),
            params,
            variables,
            training,
            held_out,
            dropped_too_long,
            loss: job.loss.clone(),
            options: job.options.clone(),
            seed: job.seed,
            folder: job.folder.clone(),
            keep_bytes,
            pack_rows: flat_step_rows(job.model, keep_bytes),
            optimizer,
            sums: Sums::default(),
            flat_steps: 0,
            kept_blocks: 0,
            started: None,
            saved_step,
            state,
        })
    }

    /// Loss and gradients of some pairs (indices into the pairs kept), added to what is accumulated. On an error everything
    /// accumulated since the last optimizer step is forgotten.
    pub fn forward_backward(&mut self, pairs: &[usize], pace: &mut Pace<'_>) -> Result<StepMetrics> {
        let result = self.forward_backward_inner(pairs, pace);
        if result.is_err() {
            self.forget();
        }
        result
    }

    fn forward_backward_inner(&mut self, pairs: &[usize], pace: &mut Pace<'_>) -> Result<StepMetrics> {
        let all = &self.training.pairs;
        if let Some(index) = pairs.iter().find(|&&index| index >= all.len()) {
            return Err(Error::invalid("pairs", format!("there is no pair {index}; there are {}.", all.len())));
        }
        self.started.get_or_insert_with(Instant::now);
        let mut sums = Sums::default();
        let mean_chosen_tokens = mean_chosen_tokens(all, pairs);
        for indices in plan(all, pairs, self.pack_rows) {
            reference_logprobs(self.model, all, &indices, &mut self.state.reference, pace)?;
            let pack = Pack::new(indices.iter().map(|&index| (index, &all[index])));
            let dropout_seed = (self.params.config.lora_dropout > 0.0)
                .then(|| mix(mix(self.seed, self.state.step as u64), self.flat_steps as u64));
            self.flat_steps += 1;
            let (loss, reference, gaps) = (&self.loss, &self.state.reference, &self.training.scaled_gaps);
            let mut upstream = |values: &[f32]| {
                let mut scalars = vec![0f32; values.len()];
                for pair in &pack.pairs {
                    let logps = pair_logps(pair, values, reference, gaps, mean_chosen_tokens);
                    let result = preference_loss(&logps, loss);
                    scalars[pair.chosen.clone()].fill(result.d_chosen as f32);
                    scalars[pair.rejected.clone()].fill(result.d_rejected as f32);
                    sums.pair(&logps, &result);
                }
                Ok(scalars)
            };
            let pass = Pass { model: self.model, params: &self.params, dropout_seed, keep_bytes: self.keep_bytes };
            let stats = pass.forward_backward(&pack, &mut upstream, &mut self.gradients, pace)?;
            self.kept_blocks = stats.kept_blocks;
            metrics::memory("activation", stats.activation_bytes);
            for &index in &indices {
                let counted = trl_tokens(&all[index]);
                sums.tokens += counted;
                sums.saved += counted - packed_tokens(&all[index]);
            }
        }
        let mut means = sums.means();
        self.describe(&mut means);
        self.sums.add(&sums);
        Ok(means)
    }

    /// Clips, steps AdamW, advances the schedule, clears the gradients. The gradient is the mean over all pairs seen since the last
    /// step. A step whose loss or gradient is not finite changes nothing but the counters; five in a row are an error. An error of
    /// `pace` comes back after the step is whole.
    pub fn optim_step(&mut self, pace: &mut Pace<'_>) -> Result<()> {
        let mut stopped = Ok(());
        let outcome = self.optim_step_inner(&mut || {
            if stopped.is_ok() {
                stopped = pace();
            }
        });
        outcome.and(stopped)
    }

    fn optim_step_inner(&mut self, pace: &mut dyn FnMut()) -> Result<()> {
        if self.sums.pairs == 0 {
            return Err(Error::internal("optim_step without a forward_backward before it. This is a bug."));
        }
        let mean = 1.0 / self.sums.pairs as f64;
        let norm = self.gradients.norm(mean)?;
        let rate = self.learning_rate();
        let finite = norm.is_finite() && self.sums.loss.is_finite();
        if finite {
            let limit = self.options.max_grad_norm;
            let clip = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
            let faster = self.options.loraplus_lr_ratio.unwrap_or(1.0);
            let rate_of = |name: &str| if name.ends_with(".lora_B.weight") { faster * rate } else { rate };
            self.optimizer.step(&self.variables, &self.gradients, mean * clip, rate_of, pace)?;
            self.state.nonfinite_in_a_row = 0;
        } else {
            self.state.nonfinite_in_a_row += 1;
            self.state.nonfinite_steps += 1;
            telemetry::metrics().train_nonfinite_steps_total.inc();
            tracing::warn!(step = self.state.step + 1, loss = self.sums.loss * mean, norm, "step skipped: not finite");
        }
        self.state.num_tokens += self.sums.tokens;
        self.state.tokens_saved += self.sums.saved;
        let mut metrics = self.sums.means();
        self.describe(&mut metrics);
        metrics.grad_norm = norm;
        metrics.seconds = self.started.map_or(0.0, |started| started.elapsed().as_secs_f64());
        self.state.step += 1;
        self.state.updates = self.optimizer.updates();
        metrics::publish(&metrics, &self.sums);
        self.state.history.push(metrics);
        self.forget();
        self.check_finite()
    }

    /// An error where the last steps were not finite: five in a row, or all of a shorter run.
    pub(super) fn check_finite(&self) -> Result<()> {
        let limit = NONFINITE_LIMIT.min(self.total_steps());
        if self.state.nonfinite_in_a_row < limit {
            return Ok(());
        }
        let message = format!(
            "loss or gradient was not finite for {limit} steps in a row, up to step {}; lower the learning rate or check the pairs.",
            self.state.step
        );
        Err(Error::new(Code::Unprocessable, message).at("training.learning_rate"))
    }

    /// Log-probs of a response under the current adapter (or the base), token by token.
    pub fn sample_logprobs(&self, prompt: &[u32], response: &[u32], adapter: bool) -> Result<Vec<f32>> {
        let lora = if adapter { LoraRows::Train { params: &self.params, dropout_seed: None } } else { LoraRows::Base };
        token_logprobs_of(self.model, prompt, response, lora, &mut || Ok(()))
    }

    /// Writes adapter, moments, cursor and counters aside, then renames; gives the adapter written.
    pub fn save_state(&mut self) -> Result<AdapterFile> {
        let adapter = self.adapter()?;
        checkpoint::save(&self.folder, &adapter, &self.optimizer.export(&self.variables), &self.state)?;
        self.saved_step = Some(self.state.step);
        self.forget_former_bests()?;
        Ok(adapter)
    }

    /// A deep copy of the adapter as it is now.
    pub fn adapter(&self) -> Result<AdapterFile> {
        self.params.to_file()
    }

    /// Gradients accumulated since the last optimizer step, mean over the pairs seen, by PEFT's tensor names.
    pub fn gradients(&self) -> Result<Vec<(String, Tensor)>> {
        let mean = 1.0 / self.sums.pairs.max(1) as f64;
        let named = self.variables.iter().zip(self.gradients.sums());
        named
            .filter_map(|((name, _), sum)| Some((name, sum.as_ref()?)))
            .map(|(name, sum)| Ok((name.clone(), (sum * mean)?)))
            .collect()
    }

    /// Optimizer steps done.
    pub fn step(&self) -> usize {
        self.state.step
    }

    /// The step of the newest checkpoint, if there is one.
    pub fn saved_step(&self) -> Option<usize> {
        self.saved_step
    }

    /// Optimizer steps of the whole run: `ceil(epochs · steps per epoch)`, at most `max_steps`.
    pub fn total_steps(&self) -> usize {
        let steps = (self.options.epochs * self.steps_per_epoch() as f64).ceil().max(1.0) as usize;
        steps.min(self.options.max_steps.unwrap_or(usize::MAX))
    }

    /// Residual blocks whose graph the last flat step kept; the others were computed again.
    pub fn kept_blocks(&self) -> usize {
        self.kept_blocks
    }

    /// Metrics of every step so far.
    pub fn history(&self) -> &[StepMetrics] {
        &self.state.history
    }

    /// Steps that were skipped because loss or gradient was not finite.
    pub fn nonfinite_steps(&self) -> usize {
        self.state.nonfinite_steps
    }

    /// Pairs dropped because their prompt alone is too long.
    pub fn dropped_too_long(&self) -> usize {
        self.dropped_too_long
    }

    /// The batches of the next optimizer step: a function of seed, step and sizes only, so a resumed run sees the same ones. The
    /// last step of an epoch takes what is left.
    pub fn next_batches(&self) -> Vec<Vec<usize>> {
        let epoch = self.state.step / self.steps_per_epoch();
        let within = self.state.step % self.steps_per_epoch();
        let mut order: Vec<usize> = (0..self.training.pairs.len()).collect();
        if self.options.shuffle {
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(mix(self.seed, epoch as u64)));
        }
        let start = within * self.pairs_per_step();
        let end = order.len().min(start + self.pairs_per_step());
        order[start..end].chunks(self.options.batch_size).map(<[usize]>::to_vec).collect()
    }

    fn pairs_per_step(&self) -> usize {
        self.options.batch_size * self.options.gradient_accumulation_steps
    }

    pub(super) fn steps_per_epoch(&self) -> usize {
        self.training.pairs.len().div_ceil(self.pairs_per_step())
    }

    /// Learning rate of the next step.
    fn learning_rate(&self) -> f64 {
        let total = self.total_steps();
        let warmup = warmup_steps(total, self.options.warmup_ratio);
        self.options.learning_rate * schedule(self.options.scheduler, self.state.step, total, warmup)
    }

    /// Fills in where the step under way stands.
    fn describe(&self, metrics: &mut StepMetrics) {
        metrics.step = self.state.step + 1;
        metrics.total_steps = self.total_steps();
        metrics.epoch = metrics.step as f64 / self.steps_per_epoch() as f64;
        metrics.learning_rate = self.learning_rate();
        metrics.num_tokens = self.state.num_tokens;
        metrics.tokens_saved = self.state.tokens_saved;
    }

    fn forget(&mut self) {
        self.gradients.clear();
        self.sums = Sums::default();
        self.flat_steps = 0;
        self.started = None;
    }
}

fn sum_of(values: &[f32], range: &std::ops::Range<usize>) -> f64 {
    values[range.clone()].iter().map(|&value| f64::from(value)).sum()
}

/// Makes sure the adapter-off log-probs of these pairs are `known`: one pass per pair and run, over what its sampler did not leave.
pub(super) fn reference_logprobs(
    model: &Decoder,
    pairs: &[TokenPair],
    indices: &[usize],
    known: &mut [Option<[f64; 2]>],
    pace: &mut Pace<'_>,
) -> Result<()> {
    let missing = indices.iter().filter(|&&index| known[index].is_none());
    let pack = Pack::of_unknown(missing.map(|&index| (index, &pairs[index])));
    if pack.pairs.is_empty() {
        return Ok(());
    }
    let values = logprobs(model, &pack, LoraRows::Base, pace)?;
    for pair in &pack.pairs {
        let rejected = match &pairs[pair.index].reference_rejected {
            Some(sampled) => sum_of(sampled, &(0..sampled.len())),
            None => sum_of(&values, &pair.rejected),
        };
        known[pair.index] = Some([sum_of(&values, &pair.chosen), rejected]);
    }
    Ok(())
}

/// Mean length of some pairs' chosen answers.
pub(super) fn mean_chosen_tokens(pairs: &[TokenPair], indices: &[usize]) -> f64 {
    indices.iter().map(|&index| pairs[index].chosen.len()).sum::<usize>() as f64 / indices.len().max(1) as f64
}

/// What the loss needs of one pair of a pack whose targets have the log-probs `values`, (T).
pub(super) fn pair_logps(
    pair: &PackedPair,
    values: &[f32],
    reference: &[Option<[f64; 2]>],
    scaled_gaps: &[f64],
    mean_chosen_tokens: f64,
) -> PairLogps {
    let known = reference[pair.index].expect("the reference pass ran for this pair. This is a bug.");
    PairLogps {
        policy_chosen: sum_of(values, &pair.chosen),
        policy_rejected: sum_of(values, &pair.rejected),
        reference_chosen: known[0],
        reference_rejected: known[1],
        chosen_tokens: pair.chosen.len(),
        rejected_tokens: pair.rejected.len(),
        mean_chosen_tokens,
        scaled_gap: scaled_gaps[pair.index],
    }
}

impl Drop for Trainer<'_> {
    fn drop(&mut self) {
        metrics::memory("optimizer", 0);
        metrics::memory("activation", 0);
    }
}

/// A seed out of two numbers.
fn mix(a: u64, b: u64) -> u64 {
    mixed(a ^ b.wrapping_add(STEP).wrapping_mul(0xbf58_476d_1ce4_e5b9))
}
