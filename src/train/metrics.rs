//! What a step reports: TRL's names, sums over pairs, and the process's gauges.

use serde::{Deserialize, Serialize};

use super::LossMetrics;
use super::loss::PairLogps;
use crate::telemetry::metrics;

/// Metrics of one optimizer step, under TRL's names when logged. A value that is not finite is `null` in JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer step, from 1.
    pub step: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Epochs done.
    pub epoch: f64,
    /// Mean loss.
    #[serde(with = "finite")]
    pub loss: f64,
    /// Gradient norm before the clip.
    #[serde(with = "finite")]
    pub grad_norm: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// β·(log π − log ref) of chosen answers, mean.
    #[serde(rename = "rewards/chosen", with = "finite")]
    pub rewards_chosen: f64,
    /// The same of rejected answers.
    #[serde(rename = "rewards/rejected", with = "finite")]
    pub rewards_rejected: f64,
    /// Share of pairs with chosen over rejected (strictly).
    #[serde(rename = "rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// Chosen minus rejected, mean.
    #[serde(rename = "rewards/margins", with = "finite")]
    pub rewards_margins: f64,
    /// Summed log-prob of chosen answers, mean.
    #[serde(rename = "logps/chosen", with = "finite")]
    pub logps_chosen: f64,
    /// Summed log-prob of rejected answers, mean.
    #[serde(rename = "logps/rejected", with = "finite")]
    pub logps_rejected: f64,
    /// Tokens of prompts and answers trained on so far (prompt counted for each answer, as TRL counts).
    pub num_tokens: usize,
    /// Of those, tokens that were not computed: the prompt the second time, and the last of each answer, which nothing follows.
    #[serde(default)]
    pub tokens_saved: usize,
    /// Seconds the step took.
    pub seconds: f64,
}

/// A number that may be NaN or infinite: `null` in JSON, NaN when read back.
pub(super) mod finite {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::train) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { serializer.serialize_f64(*value) } else { serializer.serialize_none() }
    }

    pub(in crate::train) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

/// Sums over the pairs seen since the last optimizer step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sums {
    /// Pairs seen.
    pub(crate) pairs: usize,
    /// Tokens as TRL counts them.
    pub(crate) tokens: usize,
    /// Tokens not computed thanks to shared prompts.
    pub(crate) saved: usize,
    /// Sum of losses.
    pub(crate) loss: f64,
    reward_chosen: f64,
    reward_rejected: f64,
    ahead: usize,
    logps_chosen: f64,
    logps_rejected: f64,
}

impl Sums {
    /// Counts one pair.
    pub(crate) fn pair(&mut self, logps: &PairLogps, result: &LossMetrics) {
        self.pairs += 1;
        self.loss += result.loss;
        self.reward_chosen += result.reward_chosen;
        self.reward_rejected += result.reward_rejected;
        self.ahead += usize::from(result.reward_chosen > result.reward_rejected);
        self.logps_chosen += logps.policy_chosen;
        self.logps_rejected += logps.policy_rejected;
    }

    /// Adds what another call counted.
    pub(crate) fn add(&mut self, other: &Sums) {
        self.pairs += other.pairs;
        self.tokens += other.tokens;
        self.saved += other.saved;
        self.loss += other.loss;
        self.reward_chosen += other.reward_chosen;
        self.reward_rejected += other.reward_rejected;
        self.ahead += other.ahead;
        self.logps_chosen += other.logps_chosen;
        self.logps_rejected += other.logps_rejected;
    }

    /// Means over the pairs; step, rate, norm and counters are the caller's to fill in.
    pub(crate) fn means(&self) -> StepMetrics {
        let n = self.pairs.max(1) as f64;
        StepMetrics {
            loss: self.loss / n,
            rewards_chosen: self.reward_chosen / n,
            rewards_rejected: self.reward_rejected / n,
            rewards_accuracies: self.ahead as f64 / n,
            rewards_margins: (self.reward_chosen - self.reward_rejected) / n,
            logps_chosen: self.logps_chosen / n,
            logps_rejected: self.logps_rejected / n,
            ..StepMetrics::default()
        }
    }
}

/// Sets the process's gauges to a step's values.
pub(crate) fn publish(step: &StepMetrics, sums: &Sums) {
    let metrics = metrics();
    metrics.train_step.set(step.step as i64);
    metrics.train_epoch.set(step.epoch);
    metrics.train_loss.set(step.loss);
    metrics.train_rewards_chosen.set(step.rewards_chosen);
    metrics.train_rewards_rejected.set(step.rewards_rejected);
    metrics.train_rewards_margin.set(step.rewards_margins);
    metrics.train_rewards_accuracy.set(step.rewards_accuracies);
    metrics.train_logps_chosen.set(step.logps_chosen);
    metrics.train_logps_rejected.set(step.logps_rejected);
    metrics.train_grad_norm.set(step.grad_norm);
    metrics.train_learning_rate.set(step.learning_rate);
    metrics.train_step_duration_seconds.observe(step.seconds);
    metrics.train_tokens_total.inc_by(sums.tokens as u64);
    metrics.train_pairs_total.inc_by(sums.pairs as u64);
}

/// Sets the memory gauge of one use of the device's memory.
pub(crate) fn memory(kind: &str, bytes: usize) {
    metrics().gpu_memory_bytes.with_label_values(&[kind]).set(bytes as i64);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_is_not_finite_survives_json() {
        let step = StepMetrics { step: 3, loss: f64::NAN, grad_norm: f64::INFINITY, ..StepMetrics::default() };
        let text = serde_json::to_string(&step).unwrap();
        assert!(text.contains(r#""loss":null"#) && text.contains(r#""rewards/margins":0.0"#), "{text}");
        let back: StepMetrics = serde_json::from_str(&text).unwrap();
        assert!(back.step == 3 && back.loss.is_nan());
    }

    #[test]
    fn accuracy_is_strict() {
        let logps = PairLogps {
            policy_chosen: -4.0,
            policy_rejected: -6.0,
            reference_chosen: -4.0,
            reference_rejected: -6.0,
            chosen_tokens: 2,
            mean_chosen_tokens: 2.0,
            rejected_tokens: 3,
            scaled_gap: 0.0,
        };
        let mut sums = Sums::default();
        sums.pair(&logps, &LossMetrics { loss: 1.0, ..LossMetrics::default() });
        sums.pair(
            &logps,
            &LossMetrics { loss: 2.0, reward_chosen: 0.5, reward_rejected: -0.5, ..LossMetrics::default() },
        );
        let means = sums.means();
        assert_eq!((means.loss, means.rewards_accuracies, means.rewards_margins), (1.5, 0.5, 0.5));
        assert_eq!((means.logps_chosen, means.logps_rejected), (-4.0, -6.0));
    }
}
