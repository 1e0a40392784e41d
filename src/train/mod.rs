//! Preference training on LoRA variables: pack, loss, step, checkpoint. Knows no engine and no HTTP; the caller passes
//! [`Pace`], which is called between layers.
//!
//! Four verbs, kept apart so that they can be exposed one day: [`Trainer::forward_backward`], [`Trainer::optim_step`],
//! [`Trainer::sample_logprobs`], [`Trainer::save_state`].

mod checkpoint;
mod eval;
mod loss;
mod metrics;
mod optim;
mod options;
mod pack;
mod pass;
mod run;
mod trainer;

pub use eval::EvalMetrics;
pub use loss::{LossMetrics, PairLogps, preference_loss, score_scale};
pub use metrics::StepMetrics;
pub use options::{BestMetric, LoraOptions, LossKind, LossOptions, Scheduler, ScoreScale, TrainingOptions};
pub use pack::TokenPair;
pub use pass::{adapter_logprobs, token_logprobs_of};
pub use run::{Hooks, Outcome, train};
pub use trainer::{Pace, TrainJob, Trainer};
