//! What a job may say about loss, LoRA and training; every field has a default and unknown fields are errors.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::Result;

/// Instances of the generalized loss; see the README for the formula.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// Margin form: the score gap is an offset of the implicit reward gap.
    #[default]
    Rdpo,
    /// Soft labels from the score gap.
    RdpoSoft,
    /// DPO (arXiv 2305.18290).
    Dpo,
    /// Conservative DPO with label smoothing.
    Cdpo,
    /// Robust DPO (arXiv 2403.00409), also called rDPO elsewhere.
    Robust,
    /// IPO (arXiv 2310.12036), per-token averages as TRL has it.
    Ipo,
    /// Hinge on the implicit reward gap.
    Hinge,
    /// Cross-entropy on the chosen answer.
    Sft,
}

/// Divisor of the external score gap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScoreScale {
    /// Standard deviation of the job's own score gaps (1 if they are all equal).
    Auto,
    /// A positive number.
    Fixed(f64),
}

/// `loss` of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LossOptions {
    /// Which instance.
    #[serde(rename = "type")]
    pub kind: LossKind,
    /// Strength of the pull to the reference, > 0.
    pub beta: f64,
    /// Weight of the external gap in the margin form, ≥ 0.
    pub score_weight: f64,
    /// `"auto"` or a positive number.
    #[schema(value_type = String)]
    pub score_scale: ScoreScale,
    /// Clip of the scaled gap, > 0.
    pub score_clip: f64,
    /// ε in [0, 0.5).
    pub label_smoothing: f64,
    /// τ of the soft labels, > 0.
    pub temperature: f64,
}

/// `lora` of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoraOptions {
    /// Rank, 1..=256.
    pub r: usize,
    /// Numerator of the scale, > 0.
    pub alpha: f64,
    /// Dropout on the adapter's input, [0, 1).
    pub dropout: f32,
    /// Linears that get an adapter.
    pub target_modules: Vec<String>,
    /// Scale by `alpha / √r`.
    pub use_rslora: bool,
    /// Adapter to go on from: a name, or a folder under the adapter root.
    pub init_from: Option<String>,
}

/// Learning-rate schedule after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// Down to 0 in a line.
    #[default]
    Linear,
    /// Down to 0 in half a cosine.
    Cosine,
    /// As it is.
    Constant,
}

/// `training` of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingOptions {
    /// Passes over the pairs, > 0; may be fractional.
    pub epochs: f64,
    /// Optimizer steps at most.
    pub max_steps: Option<usize>,
    /// Pairs per forward-backward.
    pub batch_size: usize,
    /// Batches per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Schedule after warm-up.
    pub scheduler: Scheduler,
    /// Share of the steps spent warming up, [0, 1).
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradient norm clip; 0 turns it off.
    pub max_grad_norm: f64,
    /// Most tokens of prompt + answer; longer answers are cut, pairs whose prompt alone is longer are dropped and counted.
    pub max_length: usize,
    /// Shuffle every epoch.
    pub shuffle: bool,
    /// Optimizer steps between durable checkpoints.
    pub checkpoint_steps: usize,
    /// Share of the prompts held out for the report, [0, 0.5].
    pub eval_fraction: f64,
}

impl LossOptions {
    /// Range checks; `prefix` is put before field names (`loss.beta`).
    pub fn validate(&self, _prefix: &str) -> Result<()> {
        todo!()
    }
}

impl Default for LossOptions {
    fn default() -> Self {
        LossOptions {
            kind: LossKind::Rdpo,
            beta: 0.1,
            score_weight: 1.0,
            score_scale: ScoreScale::Auto,
            score_clip: 3.0,
            label_smoothing: 0.0,
            temperature: 1.0,
        }
    }
}

impl Default for LoraOptions {
    fn default() -> Self {
        LoraOptions {
            r: 16,
            alpha: 32.0,
            dropout: 0.0,
            target_modules: crate::model::SITES.iter().map(ToString::to_string).collect(),
            use_rslora: false,
            init_from: None,
        }
    }
}

impl Default for TrainingOptions {
    fn default() -> Self {
        TrainingOptions {
            epochs: 1.0,
            max_steps: None,
            batch_size: 8,
            gradient_accumulation_steps: 1,
            learning_rate: 1e-4,
            scheduler: Scheduler::Linear,
            warmup_ratio: 0.1,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            max_length: 1024,
            shuffle: true,
            checkpoint_steps: 50,
            eval_fraction: 0.1,
        }
    }
}

/// Wire form of [`ScoreScale`]: a number or `"auto"`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum ScoreScaleWire {
    Number(f64),
    Word(String),
}

impl Serialize for ScoreScale {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            ScoreScale::Auto => serializer.serialize_str("auto"),
            ScoreScale::Fixed(value) => serializer.serialize_f64(*value),
        }
    }
}

impl<'de> Deserialize<'de> for ScoreScale {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match ScoreScaleWire::deserialize(deserializer)? {
            ScoreScaleWire::Number(value) => Ok(ScoreScale::Fixed(value)),
            ScoreScaleWire::Word(word) if word == "auto" => Ok(ScoreScale::Auto),
            ScoreScaleWire::Word(word) => {
                Err(serde::de::Error::custom(format!("expected a number or \"auto\", got \"{word}\"")))
            }
        }
    }
}
