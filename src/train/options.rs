//! What a job may say about loss, LoRA and training; every field has a default and unknown fields are errors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::{Error, Result};
use crate::model::SITES;
use crate::size::bytes;
use crate::weights::{LoraConfig, check_pattern};

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
    pub dropout: f64,
    /// Linears that get an adapter.
    pub target_modules: Vec<String>,
    /// Scale by `alpha / √r`.
    pub use_rslora: bool,
    /// Other ranks for some modules, as PEFT has it: the end of a module's path → its rank.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other `alpha`s for some modules.
    pub alpha_pattern: BTreeMap<String, f64>,
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

/// What decides which evaluation was the best.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum BestMetric {
    /// Share of held-out pairs whose chosen answer has the higher implicit reward; more is better.
    #[default]
    #[serde(rename = "eval_rewards/accuracies")]
    Accuracy,
    /// Loss on the held-out pairs; less is better.
    #[serde(rename = "eval_loss")]
    Loss,
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
    /// Optimizer steps between two evaluations on pairs of the held-out prompts; none without it.
    pub eval_steps: Option<usize>,
    /// Evaluations in a row without a better one after which the run ends.
    pub early_stopping_patience: Option<usize>,
    /// Give the adapter of the best evaluation instead of the last step's.
    pub load_best_model_at_end: bool,
    /// What makes an evaluation the best.
    pub metric_for_best_model: BestMetric,
    /// LoRA+ (arXiv 2402.12354): B learns at so many times the learning rate of A.
    pub loraplus_lr_ratio: Option<f64>,
    /// Memory for layer graphs kept between forward and backward, e.g. `1GiB`. Layers that do not fit are computed again in the
    /// backward, with the same result. On a GPU it also bounds how many tokens one flat step holds: on a CPU these are 512.
    pub activation_memory: String,
}

impl LossOptions {
    /// Range checks; `prefix` is put before field names (`loss.beta`).
    pub fn validate(&self, prefix: &str) -> Result<()> {
        positive(self.beta, prefix, "beta")?;
        at_least_zero(self.score_weight, prefix, "score_weight")?;
        if let ScoreScale::Fixed(scale) = self.score_scale {
            positive(scale, prefix, "score_scale")?;
        }
        positive(self.score_clip, prefix, "score_clip")?;
        positive(self.temperature, prefix, "temperature")?;
        check(
            (0.0..0.5).contains(&self.label_smoothing),
            prefix,
            "label_smoothing",
            "must be in [0, 0.5)",
            self.label_smoothing,
        )?;
        let smooths = matches!(self.kind, LossKind::Rdpo | LossKind::Cdpo | LossKind::Robust);
        if self.label_smoothing > 0.0 && !smooths {
            return Err(Error::invalid(
                field(prefix, "label_smoothing"),
                "only the losses `rdpo`, `cdpo` and `robust` use label smoothing; leave it at 0 for this one.",
            ));
        }
        Ok(())
    }
}

impl LoraOptions {
    /// Range checks; `prefix` is put before field names (`lora.r`).
    pub fn validate(&self, prefix: &str) -> Result<()> {
        check((1..=256).contains(&self.r), prefix, "r", "must be in 1..=256", self.r)?;
        positive(self.alpha, prefix, "alpha")?;
        check((0.0..1.0).contains(&self.dropout), prefix, "dropout", "must be in [0, 1)", self.dropout)?;
        for (name, key) in self
            .rank_pattern
            .keys()
            .map(|key| ("rank_pattern", key))
            .chain(self.alpha_pattern.keys().map(|key| ("alpha_pattern", key)))
        {
            check_pattern(key).map_err(|why| Error::invalid(field(prefix, name), why))?;
        }
        for (key, rank) in &self.rank_pattern {
            check((1..=256).contains(rank), prefix, &format!("rank_pattern.{key}"), "must be in 1..=256", rank)?;
        }
        for (key, alpha) in &self.alpha_pattern {
            positive(*alpha, prefix, &format!("alpha_pattern.{key}"))?;
        }
        if self.target_modules.is_empty() {
            return Err(Error::invalid(
                field(prefix, "target_modules"),
                format!("name at least one of {}.", SITES.join(", ")),
            ));
        }
        for (index, name) in self.target_modules.iter().enumerate() {
            let at = || field(prefix, &format!("target_modules[{index}]"));
            if !SITES.contains(&name.as_str()) {
                return Err(Error::invalid(at(), format!("`{name}` is not one of {}.", SITES.join(", "))));
            }
            if self.target_modules[..index].contains(name) {
                return Err(Error::invalid(at(), format!("`{name}` is named twice.")));
            }
        }
        Ok(())
    }

    /// The PEFT configuration these options mean; `base` is the base model's name, for the reader of the file.
    pub fn config(&self, base: Option<&str>) -> LoraConfig {
        LoraConfig {
            r: self.r,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            target_modules: self.target_modules.clone(),
            use_rslora: self.use_rslora,
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            base_model_name_or_path: base.map(str::to_string),
        }
    }
}

impl TrainingOptions {
    /// Range checks; `prefix` is put before field names (`training.batch_size`).
    pub fn validate(&self, prefix: &str) -> Result<()> {
        positive(self.epochs, prefix, "epochs")?;
        check(self.epochs <= 10_000.0, prefix, "epochs", "must be at most 10000", self.epochs)?;
        check(self.max_steps != Some(0), prefix, "max_steps", "must be at least 1", 0)?;
        check((1..=4096).contains(&self.batch_size), prefix, "batch_size", "must be in 1..=4096", self.batch_size)?;
        let accumulation = self.gradient_accumulation_steps;
        check(
            (1..=4096).contains(&accumulation),
            prefix,
            "gradient_accumulation_steps",
            "must be in 1..=4096",
            accumulation,
        )?;
        positive(self.learning_rate, prefix, "learning_rate")?;
        check((0.0..1.0).contains(&self.warmup_ratio), prefix, "warmup_ratio", "must be in [0, 1)", self.warmup_ratio)?;
        at_least_zero(self.weight_decay, prefix, "weight_decay")?;
        at_least_zero(self.max_grad_norm, prefix, "max_grad_norm")?;
        check(self.max_length >= 2, prefix, "max_length", "must be at least 2", self.max_length)?;
        check(self.checkpoint_steps >= 1, prefix, "checkpoint_steps", "must be at least 1", self.checkpoint_steps)?;
        check(
            (0.0..=0.5).contains(&self.eval_fraction),
            prefix,
            "eval_fraction",
            "must be in [0, 0.5]",
            self.eval_fraction,
        )?;
        check(self.eval_steps != Some(0), prefix, "eval_steps", "must be at least 1", 0)?;
        check(self.early_stopping_patience != Some(0), prefix, "early_stopping_patience", "must be at least 1", 0)?;
        for (name, wanted) in [
            ("early_stopping_patience", self.early_stopping_patience.is_some()),
            ("load_best_model_at_end", self.load_best_model_at_end),
        ] {
            check(!wanted || self.eval_steps.is_some(), prefix, name, "needs `eval_steps`", "none")?;
        }
        if let Some(ratio) = self.loraplus_lr_ratio {
            positive(ratio, prefix, "loraplus_lr_ratio")?;
        }
        self.activation_bytes().map_err(|error| error.at(field(prefix, "activation_memory")))?;
        Ok(())
    }

    /// `activation_memory` in bytes.
    pub fn activation_bytes(&self) -> Result<usize> {
        bytes(&self.activation_memory, "activation_memory")
    }
}

fn field(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// An error naming the field unless `holds`. NaN fails every comparison, so it fails here too.
fn check(holds: bool, prefix: &str, name: &str, rule: &str, value: impl std::fmt::Display) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid(field(prefix, name), format!("{rule}, got {value}."))) }
}

fn positive(value: f64, prefix: &str, name: &str) -> Result<()> {
    check(value > 0.0 && value.is_finite(), prefix, name, "must be a number above 0", value)
}

fn at_least_zero(value: f64, prefix: &str, name: &str) -> Result<()> {
    check(value >= 0.0 && value.is_finite(), prefix, name, "must be a number of at least 0", value)
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
            target_modules: SITES.iter().map(ToString::to_string).collect(),
            use_rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
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
            eval_steps: None,
            early_stopping_patience: None,
            load_best_model_at_end: false,
            metric_for_best_model: BestMetric::default(),
            loraplus_lr_ratio: None,
            activation_memory: "1GiB".into(),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn param(result: Result<()>) -> String {
        result.unwrap_err().param.unwrap()
    }

    #[test]
    fn defaults_are_valid_and_survive_json() {
        let (loss, lora, training) = (LossOptions::default(), LoraOptions::default(), TrainingOptions::default());
        loss.validate("loss").unwrap();
        lora.validate("lora").unwrap();
        training.validate("training").unwrap();
        assert_eq!(serde_json::from_str::<LossOptions>("{}").unwrap(), loss);
        assert_eq!(serde_json::from_value::<LoraOptions>(serde_json::to_value(&lora).unwrap()).unwrap(), lora);
        assert_eq!(
            serde_json::from_value::<TrainingOptions>(serde_json::to_value(&training).unwrap()).unwrap(),
            training
        );
        let scaled: LossOptions = serde_json::from_str(r#"{"type":"rdpo_soft","score_scale":2.5}"#).unwrap();
        assert_eq!((scaled.kind, scaled.score_scale), (LossKind::RdpoSoft, ScoreScale::Fixed(2.5)));
        assert!(serde_json::from_str::<LossOptions>(r#"{"betta":1}"#).unwrap_err().to_string().contains("betta"));
    }

    #[test]
    fn bad_numbers_name_their_field() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(param(LossOptions { beta: bad, ..Default::default() }.validate("loss")), "loss.beta");
            assert_eq!(param(LoraOptions { alpha: bad, ..Default::default() }.validate("lora")), "lora.alpha");
            let training = TrainingOptions { learning_rate: bad, ..Default::default() };
            assert_eq!(param(training.validate("training")), "training.learning_rate");
            let scale = LossOptions { score_scale: ScoreScale::Fixed(bad), ..Default::default() };
            assert_eq!(param(scale.validate("loss")), "loss.score_scale");
        }
        assert_eq!(param(LoraOptions { r: 0, ..Default::default() }.validate("lora")), "lora.r");
        assert_eq!(
            param(TrainingOptions { batch_size: 0, ..Default::default() }.validate("training")),
            "training.batch_size"
        );
        assert_eq!(
            param(TrainingOptions { max_steps: Some(0), ..Default::default() }.validate("training")),
            "training.max_steps"
        );
        for (training, field) in [
            (TrainingOptions { eval_steps: Some(0), ..Default::default() }, "training.eval_steps"),
            (TrainingOptions { load_best_model_at_end: true, ..Default::default() }, "training.load_best_model_at_end"),
            (
                TrainingOptions { early_stopping_patience: Some(1), ..Default::default() },
                "training.early_stopping_patience",
            ),
            (TrainingOptions { loraplus_lr_ratio: Some(0.0), ..Default::default() }, "training.loraplus_lr_ratio"),
        ] {
            assert_eq!(param(training.validate("training")), field);
        }
        let ranks = BTreeMap::from([("q_proj".to_string(), 0)]);
        assert_eq!(
            param(LoraOptions { rank_pattern: ranks, ..Default::default() }.validate("lora")),
            "lora.rank_pattern.q_proj"
        );
        let smooth = LossOptions { label_smoothing: 0.5, kind: LossKind::Robust, ..Default::default() };
        assert_eq!(param(smooth.validate("loss")), "loss.label_smoothing");
        let memory = TrainingOptions { activation_memory: "much".into(), ..Default::default() };
        assert_eq!(param(memory.validate("training")), "training.activation_memory");
        let unused = LossOptions { label_smoothing: 0.1, kind: LossKind::Dpo, ..Default::default() };
        assert_eq!(param(unused.validate("loss")), "loss.label_smoothing");
    }

    #[test]
    fn targets_must_be_sites() {
        let lora = LoraOptions { target_modules: vec!["q_proj".into(), "lm_head".into()], ..Default::default() };
        let error = lora.validate("lora").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("lora.target_modules[1]"));
        assert!(error.message.contains("lm_head"));
        assert!(LoraOptions { target_modules: vec![], ..Default::default() }.validate("lora").is_err());
        let twice = LoraOptions { target_modules: vec!["q_proj".into(), "q_proj".into()], ..Default::default() };
        assert!(twice.validate("lora").is_err());
    }
}
