//! The training loop over token pairs.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{LossOptions, TrainingOptions};
use crate::error::Result;
use crate::model::{Decoder, LoraParams};
use crate::weights::{AdapterFile, LoraConfig};

/// A pair as token ids.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenPair {
    /// The rendered prompt with its generation prompt.
    pub prompt: Vec<u32>,
    /// Response tokens of y_w, end of turn included.
    pub chosen: Vec<u32>,
    /// Response tokens of y_l, end of turn included.
    pub rejected: Vec<u32>,
    /// External score of y_w.
    pub score_chosen: f64,
    /// External score of y_l.
    pub score_rejected: f64,
}

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
    /// Loss.
    pub loss: LossOptions,
    /// Schedule and sizes.
    pub options: TrainingOptions,
    /// Seed of init, shuffling and dropout.
    pub seed: u64,
    /// Where checkpoints go; resumed from when one is there.
    pub folder: PathBuf,
}

/// Metrics of one optimizer step, under TRL's names when logged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer step, from 1.
    pub step: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Epochs done.
    pub epoch: f64,
    /// Mean loss.
    pub loss: f64,
    /// Gradient norm before the clip.
    pub grad_norm: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// β·(log π − log ref) of chosen answers, mean.
    #[serde(rename = "rewards/chosen")]
    pub rewards_chosen: f64,
    /// The same of rejected answers.
    #[serde(rename = "rewards/rejected")]
    pub rewards_rejected: f64,
    /// Share of pairs with chosen over rejected (strictly).
    #[serde(rename = "rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// Chosen minus rejected, mean.
    #[serde(rename = "rewards/margins")]
    pub rewards_margins: f64,
    /// Summed log-prob of chosen answers, mean.
    #[serde(rename = "logps/chosen")]
    pub logps_chosen: f64,
    /// Summed log-prob of rejected answers, mean.
    #[serde(rename = "logps/rejected")]
    pub logps_rejected: f64,
    /// Tokens of prompts and answers trained on so far (prompt counted for each answer, as TRL counts).
    pub num_tokens: usize,
    /// Seconds the step took.
    pub seconds: f64,
}

/// What the caller hears from a run.
pub trait Hooks {
    /// Between layers.
    fn pace(&mut self) -> Result<()>;
    /// After every optimizer step.
    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()>;
    /// After every durable checkpoint.
    fn on_checkpoint(&mut self, step: usize, adapter: &AdapterFile) -> Result<()>;
}

/// What a run leaves.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The trained adapter.
    pub adapter: AdapterFile,
    /// Optimizer steps done.
    pub steps: usize,
    /// Metrics of the last step.
    pub last: Option<StepMetrics>,
    /// Pairs dropped for length.
    pub dropped_too_long: usize,
}

/// State of a run: variables, moments, cursor.
pub struct Trainer<'a> {
    _model: &'a Decoder,
    _params: LoraParams,
}

/// Runs or resumes a job to its end.
pub fn train(_job: &TrainJob<'_>, _hooks: &mut dyn Hooks) -> Result<Outcome> {
    todo!()
}

impl<'a> Trainer<'a> {
    /// A fresh state, or the one its folder's newest checkpoint holds.
    pub fn open(_job: &TrainJob<'a>) -> Result<Self> {
        todo!()
    }

    /// Loss and gradients of some pairs (indices into the job's), added to what is accumulated.
    pub fn forward_backward(&mut self, _pairs: &[usize], _pace: &mut Pace<'_>) -> Result<StepMetrics> {
        todo!()
    }

    /// Clips, steps AdamW, advances the schedule, clears the gradients.
    pub fn optim_step(&mut self) -> Result<()> {
        todo!()
    }

    /// Log-probs of a response under the current adapter (or the base), token by token.
    pub fn sample_logprobs(&self, _prompt: &[u32], _response: &[u32], _adapter: bool) -> Result<Vec<f32>> {
        todo!()
    }

    /// Writes adapter, moments, cursor and seeds aside, then renames.
    pub fn save_state(&self) -> Result<()> {
        todo!()
    }
}
