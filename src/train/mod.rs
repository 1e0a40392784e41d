//! Preference training on LoRA variables: pack, loss, step, checkpoint. Knows no engine and no HTTP; the caller passes
//! [`Pace`], which is called between layers.
//!
//! Four verbs, kept apart so that they can be exposed one day: [`Trainer::forward_backward`], [`Trainer::optim_step`],
//! [`Trainer::sample_logprobs`], [`Trainer::save_state`].

mod loss;
mod optim;
mod options;
mod pack;
mod trainer;

pub use loss::{LossMetrics, PairLogps, preference_loss, score_scale};
pub use options::{LoraOptions, LossKind, LossOptions, Scheduler, ScoreScale, TrainingOptions};
pub use trainer::{Hooks, Outcome, Pace, StepMetrics, TokenPair, TrainJob, Trainer, train};
