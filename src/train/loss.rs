//! The generalized DPO loss as pure functions of summed log-probabilities and scores.

use super::LossOptions;

/// Log-probs of one pair, summed over response tokens, and what the losses need besides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairLogps {
    /// log π(y_w|x).
    pub policy_chosen: f64,
    /// log π(y_l|x).
    pub policy_rejected: f64,
    /// log ref(y_w|x).
    pub reference_chosen: f64,
    /// log ref(y_l|x).
    pub reference_rejected: f64,
    /// Response tokens of y_w.
    pub chosen_tokens: usize,
    /// Response tokens of y_l.
    pub rejected_tokens: usize,
    /// s_w − s_l divided by the scale, before the clip.
    pub scaled_gap: f64,
}

/// One pair's loss, its derivatives and TRL's metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossMetrics {
    /// The loss.
    pub loss: f64,
    /// ∂loss/∂log π(y_w|x).
    pub d_chosen: f64,
    /// ∂loss/∂log π(y_l|x).
    pub d_rejected: f64,
    /// β·(log π − log ref) of y_w.
    pub reward_chosen: f64,
    /// β·(log π − log ref) of y_l.
    pub reward_rejected: f64,
}

/// Loss and exact derivatives of one pair.
pub fn preference_loss(_logps: &PairLogps, _options: &LossOptions) -> LossMetrics {
    todo!()
}
