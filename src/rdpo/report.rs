//! The report: base against new adapter on held-out prompts.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::synthesize::mixed;
use super::{Behavior, PromptInput, SynthesisOptions};
use crate::engine::request::{SamplingParams, TokenLogprob};
use crate::error::{Code, Result};
use crate::roles::{Reward, Target};
use crate::text::{Message, RenderOptions};

/// Standard normal quantile of a two-sided 95 % interval.
const Z95: f64 = 1.959_963_984_540_054;

/// Both answers to one held-out prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Comparison {
    /// The last user turn.
    pub prompt: String,
    /// Answer with the adapter off.
    pub base: String,
    /// Answer with the new adapter.
    pub aligned: String,
    /// Score of `base`; `None` if unreadable.
    pub score_base: Option<f64>,
    /// Score of `aligned`; `None` if unreadable.
    pub score_aligned: Option<f64>,
    /// Tokens of `base`.
    pub tokens_base: usize,
    /// Tokens of `aligned`.
    pub tokens_aligned: usize,
    /// Estimate of KL(π ‖ base) summed over the tokens of `aligned`, nats: e^−d − 1 + d with d = log π − log base of each token, which has
    /// less spread than d itself and is never negative (Schulman 2020, "Approximating KL divergence", k3).
    pub kl: f64,
}

/// Base against new adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// Held-out prompts answered.
    pub prompts: usize,
    /// Of those, with both answers scored.
    pub scored: usize,
    /// Mean score of the base.
    pub mean_reward_base: Option<f64>,
    /// Mean score of the new adapter.
    pub mean_reward_aligned: Option<f64>,
    /// Share of prompts the new adapter wins; a tie is half a win.
    pub win_rate: Option<f64>,
    /// Wilson's 95 % interval of the win rate.
    pub win_rate_interval: Option<(f64, f64)>,
    /// Mean tokens of the base's answers.
    pub mean_tokens_base: f64,
    /// Mean tokens of the new adapter's answers.
    pub mean_tokens_aligned: f64,
    /// Estimate of KL(π ‖ base) per token, nats, over answers sampled from the new adapter.
    pub kl_per_token: f64,
    /// Answers side by side.
    pub samples: Vec<Comparison>,
}

impl Report {
    /// Sums up comparisons.
    pub fn of(samples: Vec<Comparison>) -> Self {
        let scored: Vec<(f64, f64)> =
            samples.iter().filter_map(|one| Some((one.score_base?, one.score_aligned?))).collect();
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        let some = |value: f64| (!scored.is_empty()).then_some(value);
        let wins: f64 = scored
            .iter()
            .map(|(base, aligned)| match aligned.total_cmp(base) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            })
            .sum();
        let tokens: usize = samples.iter().map(|one| one.tokens_aligned).sum();
        let kl: f64 = samples.iter().map(|one| one.kl).sum();
        let per_prompt = samples.len().max(1) as f64;
        Report {
            prompts: samples.len(),
            scored: scored.len(),
            mean_reward_base: some(mean(scored.iter().map(|pair| pair.0).collect())),
            mean_reward_aligned: some(mean(scored.iter().map(|pair| pair.1).collect())),
            win_rate: some(wins / scored.len() as f64),
            win_rate_interval: (!scored.is_empty()).then(|| wilson(wins, scored.len() as f64)),
            mean_tokens_base: samples.iter().map(|one| one.tokens_base).sum::<usize>() as f64 / per_prompt,
            mean_tokens_aligned: tokens as f64 / per_prompt,
            kl_per_token: if tokens == 0 { 0.0 } else { kl / tokens as f64 },
            samples,
        }
    }
}

/// Wilson's score interval of a share (Wilson 1927), 95 %.
pub(super) fn wilson(wins: f64, n: f64) -> (f64, f64) {
    let (p, z2) = (wins / n, Z95 * Z95);
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

/// What is compared and how.
pub(super) struct Contest<'a> {
    pub(super) base: &'a Target,
    pub(super) aligned: &'a Target,
    pub(super) reward: &'a Reward,
    pub(super) behavior: &'a Behavior,
    pub(super) options: &'a SynthesisOptions,
    pub(super) seed: u64,
}

/// Answers one held-out prompt with both and scores both, at the same seed and temperature.
pub(super) async fn compare(contest: &Contest<'_>, prompt: &PromptInput, index: usize) -> Result<Comparison> {
    let Contest { base, aligned, reward, behavior, options, seed } = *contest;
    let context = behavior.context.as_deref().filter(|_| behavior.train_with_context);
    let messages = prompt.under(context);
    let params = SamplingParams {
        temperature: options.temperature as f32,
        top_p: options.top_p as f32,
        max_tokens: Some(options.max_tokens),
        seed: Some(mixed(seed, &[u64::MAX, index as u64])),
        logprobs: Some(0),
        ..SamplingParams::default()
    };
    let (old, new) = tokio::try_join!(base.answer(&messages, params.clone()), aligned.answer(&messages, params))?;
    let asked = base.tokenizer()?.encode_chat(&messages, &RenderOptions::default())?;
    // What the sampler says of its own tokens is π; the base has not seen them.
    let under_base = match new.ids.is_empty() {
        true => Vec::new(),
        false => base.logprobs_of(&asked, &new.ids).await?,
    };
    let gap = |(new, base): (&TokenLogprob, &f32)| f64::from(new.logprob) - f64::from(*base);
    let kl = new.logprobs.iter().zip(&under_base).map(gap).map(kl_of).sum();
    let plain = prompt.messages();
    let score = async |answer: &str| -> Result<Option<f64>> {
        let mut messages = plain.clone();
        messages.push(Message::new("assistant", answer.trim()));
        match reward.score(&messages, Some(&behavior.judge)).await {
            Ok(score) => Ok(Some(score.value)),
            Err(error) if error.code == Code::Unprocessable || error.is_of_one_conversation() => Ok(None),
            Err(error) => Err(error),
        }
    };
    Ok(Comparison {
        prompt: prompt.last_turn(),
        score_base: score(&old.text).await?,
        score_aligned: score(&new.text).await?,
        base: old.text.trim().to_owned(),
        aligned: new.text.trim().to_owned(),
        tokens_base: old.ids.len(),
        tokens_aligned: new.ids.len(),
        kl,
    })
}

/// What a token drawn from π with log π − log base = `d` says of KL(π ‖ base).
fn kl_of(d: f64) -> f64 {
    (-d).exp_m1() + d
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn comparison(base: Option<f64>, aligned: Option<f64>) -> Comparison {
        Comparison {
            prompt: "x".into(),
            base: "b".into(),
            aligned: "a".into(),
            score_base: base,
            score_aligned: aligned,
            tokens_base: 2,
            tokens_aligned: 4,
            kl: 0.4,
        }
    }

    #[test]
    fn sums() {
        let report = Report::of(vec![
            comparison(Some(1.0), Some(3.0)),
            comparison(Some(2.0), Some(2.0)),
            comparison(Some(2.0), Some(1.0)),
            comparison(None, Some(9.0)),
        ]);
        assert_eq!((report.prompts, report.scored, report.win_rate), (4, 3, Some(0.5)));
        assert_eq!(report.mean_reward_aligned, Some(2.0));
        assert!((report.kl_per_token - 0.1).abs() < 1e-12);
        assert_eq!(Report::of(vec![]).win_rate, None);
    }

    #[test]
    fn the_divergence_is_its_samples_mean_and_never_negative() {
        // π = (0.5, 0.5), base = (0.25, 0.75).
        let of = |base: f64| kl_of((0.5 / base).ln());
        let exact = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((0.5 * of(0.25) + 0.5 * of(0.75) - exact).abs() < 1e-12);
        assert!(of(0.25) > 0.0 && of(0.75) > 0.0 && kl_of(0.0) == 0.0);
    }

    #[test]
    fn wilsons_interval() {
        // 8 of 10: 0.4902 to 0.9433 (Newcombe 1998's formula without continuity correction).
        let (low, high) = wilson(8.0, 10.0);
        assert!((low - 0.4902).abs() < 1e-4 && (high - 0.9433).abs() < 1e-4, "{low} {high}");
        assert_eq!(wilson(0.0, 5.0).0, 0.0);
        assert!((wilson(5.0, 5.0).1 - 1.0).abs() < 1e-12);
    }
}
