//! The generalized DPO loss as pure functions of summed log-probabilities and scores.
//!
//! Everything is in f64: a batch has few numbers and the derivative of a well separated pair is tiny.

use super::{LossKind, LossOptions, ScoreScale};

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
    /// Mean of `chosen_tokens` over the batch: `sft` weighs tokens alike, not answers.
    pub mean_chosen_tokens: f64,
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
///
/// With `a = log π(y_w|x) − log ref(y_w|x)`, `b` the same of `y_l`, `Δ = a − b`, `m = clip(scaled_gap, ±score_clip)` `n` the
/// response tokens and `h = β·Δ − w·m`, most of the family is one binary cross-entropy, `L = −[p·log σ(h) + (1 − p)·log σ(−h)]`, whose derivative by
/// `h` is `σ(h) − p`:
///
/// | loss        | w              | p               | source |
/// |---|---|---|---|
/// | `rdpo`      | `score_weight` | 1 − ε           | refined DPO, arXiv 2402.08005; the offset form is that of arXiv 2402.10571 |
/// | `rdpo_soft` | 0              | σ(m/τ)          | soft labels from the external reward model |
/// | `dpo`       | 0              | 1               | arXiv 2305.18290 |
/// | `cdpo`      | 0              | 1 − ε           | conservative DPO |
/// | `robust`    | 0              | `[−(1−ε)·log σ(h) + ε·log σ(−h)] / (1 − 2ε)` | arXiv 2403.00409 |
/// | `hinge`     | 0              | `max(0, 1 − h)` | SLiC, arXiv 2305.10425 |
/// | `ipo`       |                | `(a/n_w − b/n_l − 1/(2β))²` | arXiv 2310.12036, averaged over tokens as TRL does |
/// | `sft`       |                | `−log π(y_w given x) / n̄` | cross-entropy over the batch's chosen tokens (n̄ a pair, as TRL averages) |
pub fn preference_loss(logps: &PairLogps, options: &LossOptions) -> LossMetrics {
    let beta = options.beta;
    let epsilon = options.label_smoothing;
    let a = logps.policy_chosen - logps.reference_chosen;
    let b = logps.policy_rejected - logps.reference_rejected;
    let m = logps.scaled_gap.clamp(-options.score_clip, options.score_clip);
    let (chosen_tokens, rejected_tokens) = (logps.chosen_tokens as f64, logps.rejected_tokens as f64);

    let h = beta * (a - b);
    let by_margin = |(loss, d_h): (f64, f64)| (loss, beta * d_h, -beta * d_h);
    let (loss, d_chosen, d_rejected) = match options.kind {
        LossKind::Rdpo => by_margin(cross_entropy(h - options.score_weight * m, 1.0 - epsilon)),
        LossKind::RdpoSoft => by_margin(cross_entropy(h, sigmoid(m / options.temperature))),
        LossKind::Dpo => by_margin(cross_entropy(h, 1.0)),
        LossKind::Cdpo => by_margin(cross_entropy(h, 1.0 - epsilon)),
        LossKind::Robust => {
            let scale = 1.0 / (1.0 - 2.0 * epsilon);
            let loss = -(1.0 - epsilon) * log_sigmoid(h) + epsilon * log_sigmoid(-h);
            let d_h = -(1.0 - epsilon) * sigmoid(-h) - epsilon * sigmoid(h);
            by_margin((scale * loss, scale * d_h))
        }
        LossKind::Hinge => by_margin(if h < 1.0 { (1.0 - h, -1.0) } else { (0.0, 0.0) }),
        LossKind::Ipo => {
            let distance = a / chosen_tokens - b / rejected_tokens - 0.5 / beta;
            (distance * distance, 2.0 * distance / chosen_tokens, -2.0 * distance / rejected_tokens)
        }
        LossKind::Sft => (-logps.policy_chosen / logps.mean_chosen_tokens, -1.0 / logps.mean_chosen_tokens, 0.0),
    };
    LossMetrics { loss, d_chosen, d_rejected, reward_chosen: beta * a, reward_rejected: beta * b }
}

/// What the external score gaps of a job are divided by: the number given, or the population standard deviation of the gaps
/// themselves (1 when they are all equal but for rounding, or when there are none).
pub fn score_scale(option: ScoreScale, gaps: &[f64]) -> f64 {
    match option {
        ScoreScale::Fixed(scale) => scale,
        ScoreScale::Auto => {
            let count = gaps.len().max(1) as f64;
            let mean = gaps.iter().sum::<f64>() / count;
            let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count).sqrt();
            let largest = gaps.iter().fold(0.0, |largest: f64, gap| largest.max(gap.abs()));
            // What is less is the rounding of the scores' own differences.
            if deviation > 1e-9 * largest { deviation } else { 1.0 }
        }
    }
}

/// `−[p·log σ(h) + (1 − p)·log σ(−h)]` and its derivative by `h`. Terms of weight 0 are left out, so that `p = 1` gives no `0·∞`.
fn cross_entropy(h: f64, p: f64) -> (f64, f64) {
    let mut loss = 0.0;
    if p > 0.0 {
        loss -= p * log_sigmoid(h);
    }
    if p < 1.0 {
        loss -= (1.0 - p) * log_sigmoid(-h);
    }
    // σ(h) − p cancels where σ(h) is close to p = 1; written by both tails it does not.
    let d_h = (1.0 - p) * sigmoid(h) - p * sigmoid(-h);
    (loss, d_h)
}

/// log σ(x) without overflow or cancellation.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// σ(x) without overflow.
fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::f64::consts::LN_2;

    use super::*;

    const KINDS: [LossKind; 8] = [
        LossKind::Rdpo,
        LossKind::RdpoSoft,
        LossKind::Dpo,
        LossKind::Cdpo,
        LossKind::Robust,
        LossKind::Ipo,
        LossKind::Hinge,
        LossKind::Sft,
    ];

    fn options(kind: LossKind) -> LossOptions {
        LossOptions { kind, ..LossOptions::default() }
    }

    fn at_start(gap: f64) -> PairLogps {
        PairLogps {
            policy_chosen: -31.5,
            policy_rejected: -24.25,
            reference_chosen: -31.5,
            reference_rejected: -24.25,
            chosen_tokens: 21,
            mean_chosen_tokens: 28.0,
            rejected_tokens: 17,
            scaled_gap: gap,
        }
    }

    fn moved(chosen: f64, rejected: f64, gap: f64) -> PairLogps {
        let start = at_start(gap);
        PairLogps {
            policy_chosen: start.policy_chosen + chosen,
            policy_rejected: start.policy_rejected + rejected,
            ..start
        }
    }

    fn loss(kind: LossKind, logps: &PairLogps) -> f64 {
        preference_loss(logps, &options(kind)).loss
    }

    #[test]
    fn anchors_at_the_reference() {
        let start = at_start(0.7);
        assert_eq!(loss(LossKind::Dpo, &start), LN_2);
        let smoothed = LossOptions { label_smoothing: 0.1, ..options(LossKind::Cdpo) };
        assert!((preference_loss(&start, &smoothed).loss - LN_2).abs() < 1e-15);
        assert_eq!(loss(LossKind::Hinge, &start), 1.0);
        assert!((loss(LossKind::Ipo, &start) - 25.0).abs() < 1e-12, "1/(4β²) at β = 0.1");
        assert_eq!(loss(LossKind::Sft, &start), 31.5 / 28.0);
        // Robust at h = 0: [(1−ε) − ε]·ln 2 / (1 − 2ε) = ln 2.
        let robust = LossOptions { label_smoothing: 0.2, ..options(LossKind::Robust) };
        assert!((preference_loss(&start, &robust).loss - LN_2).abs() < 1e-15);
        // The margin form asks for the gap: at Δ = 0 its loss is log(1 + e^m).
        assert!((loss(LossKind::Rdpo, &start) - 0.7f64.exp().ln_1p()).abs() < 1e-15);
        for kind in KINDS {
            let metrics = preference_loss(&start, &options(kind));
            assert_eq!((metrics.reward_chosen, metrics.reward_rejected), (0.0, 0.0), "{kind:?}");
        }
    }

    #[test]
    fn derivatives_equal_finite_differences() {
        let step = 1e-5;
        for kind in KINDS {
            for (chosen, rejected, gap) in
                [(0.0, 0.0, 0.0), (3.0, -2.0, 1.3), (-8.0, 4.0, -2.2), (40.0, -35.0, 9.0), (1.0, 30.0, -9.0)]
            {
                let options = LossOptions {
                    label_smoothing: if matches!(kind, LossKind::Cdpo | LossKind::Robust | LossKind::Rdpo) {
                        0.15
                    } else {
                        0.0
                    },
                    score_weight: 0.8,
                    temperature: 0.7,
                    ..options(kind)
                };
                let at = |chosen, rejected| preference_loss(&moved(chosen, rejected, gap), &options);
                let metrics = at(chosen, rejected);
                let by_chosen = (at(chosen + step, rejected).loss - at(chosen - step, rejected).loss) / (2.0 * step);
                let by_rejected = (at(chosen, rejected + step).loss - at(chosen, rejected - step).loss) / (2.0 * step);
                assert!(
                    (metrics.d_chosen - by_chosen).abs() < 1e-7,
                    "{kind:?} {chosen}: {} {by_chosen}",
                    metrics.d_chosen
                );
                assert!(
                    (metrics.d_rejected - by_rejected).abs() < 1e-7,
                    "{kind:?} {rejected}: {} {by_rejected}",
                    metrics.d_rejected
                );
            }
        }
    }

    #[test]
    fn limits_of_the_family() {
        let pair = moved(3.0, -2.0, 1.3);
        let weightless = LossOptions { score_weight: 0.0, ..options(LossKind::Rdpo) };
        assert_eq!(preference_loss(&pair, &weightless), preference_loss(&pair, &options(LossKind::Dpo)));
        let cdpo = options(LossKind::Cdpo);
        assert_eq!(preference_loss(&pair, &cdpo), preference_loss(&pair, &options(LossKind::Dpo)));

        // Sure soft labels: the pair as given, or the pair turned round.
        let sure = LossOptions { score_clip: 1e3, ..options(LossKind::RdpoSoft) };
        let dpo = options(LossKind::Dpo);
        let for_it = preference_loss(&moved(3.0, -2.0, 900.0), &sure);
        assert!((for_it.loss - preference_loss(&pair, &dpo).loss).abs() < 1e-12);
        let against = preference_loss(&moved(3.0, -2.0, -900.0), &sure);
        let turned = preference_loss(&moved(-2.0, 3.0, 0.0), &dpo);
        assert!((against.loss - turned.loss).abs() < 1e-12);
        assert!((against.d_chosen - turned.d_rejected).abs() < 1e-12);
    }

    #[test]
    fn the_clip_bounds_the_margin() {
        let clipped = LossOptions { score_clip: 2.0, ..options(LossKind::Rdpo) };
        assert_eq!(preference_loss(&at_start(50.0), &clipped), preference_loss(&at_start(2.0), &clipped));
        assert_eq!(preference_loss(&at_start(-50.0), &clipped), preference_loss(&at_start(-2.0), &clipped));
        // A pair the reward model dislikes pulls less than one it likes.
        let pull = |gap| preference_loss(&at_start(gap), &clipped).d_chosen.abs();
        assert!(pull(-1.0) < pull(0.0) && pull(0.0) < pull(1.0));
    }

    #[test]
    fn robust_is_the_unbiased_form() {
        // E over flips with probability ε of the robust loss is the plain DPO loss: (1−ε)·L(h) + ε·L(−h) = −log σ(h).
        let robust = LossOptions { label_smoothing: 0.3, ..options(LossKind::Robust) };
        let (kept, flipped) = (moved(5.0, -3.0, 0.0), moved(-3.0, 5.0, 0.0));
        let mean = 0.7 * preference_loss(&kept, &robust).loss + 0.3 * preference_loss(&flipped, &robust).loss;
        assert!((mean - loss(LossKind::Dpo, &kept)).abs() < 1e-12);
    }

    #[test]
    fn extreme_log_probs_stay_finite() {
        for kind in KINDS {
            for (chosen, rejected) in [(1e6, -1e6), (-1e6, 1e6)] {
                let metrics = preference_loss(&moved(chosen, rejected, 3.0), &options(kind));
                assert!(
                    metrics.loss.is_finite() && metrics.d_chosen.is_finite() && metrics.d_rejected.is_finite(),
                    "{kind:?}"
                );
            }
        }
        // The last bits of a well separated pair survive: σ(h) − 1 would round to 0.
        assert!(preference_loss(&moved(500.0, -500.0, 0.0), &options(LossKind::Dpo)).d_chosen < 0.0);
    }

    #[test]
    fn automatic_scale_is_the_spread_of_the_gaps() {
        assert_eq!(score_scale(ScoreScale::Auto, &[1.0, 3.0, 1.0, 3.0]), 1.0);
        assert_eq!(score_scale(ScoreScale::Auto, &[0.0, 4.0]), 2.0);
        assert_eq!(score_scale(ScoreScale::Auto, &[0.1, 0.1, 0.1]), 1.0);
        assert_eq!(score_scale(ScoreScale::Auto, &[]), 1.0);
        assert_eq!(score_scale(ScoreScale::Auto, &[3.1 - 2.1, 4.1 - 3.1]), 1.0, "equal but for rounding");
        assert_eq!(score_scale(ScoreScale::Fixed(2.5), &[0.0, 4.0]), 2.5);
    }
}
