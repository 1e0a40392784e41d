//! One row of logits to one token. A pure function of logits, parameters, history, seed and position: what else is in the batch
//! does not matter.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::request::{SamplingParams, TokenLogprob};
use crate::model::{PIECE, RowLogprobs, softmax_row, sum_row};
use crate::text::TokenMask;

/// A temperature below this takes the most likely token.
pub(super) const GREEDY: f32 = 1e-5;
/// Tokens sorted at first when looking for a nucleus.
const NUCLEUS: usize = 256;

/// What a draw depends on besides the logits.
pub struct Draw<'a> {
    /// How to sample.
    pub params: &'a SamplingParams,
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens generated so far.
    pub output: &'a [u32],
    /// Seed of the request; each position draws from its own stream.
    pub seed: u64,
    /// Ids that may not come now (`min_tokens`, `bad_words`).
    pub banned: &'a [u32],
    /// What the grammar allows.
    pub mask: Option<&'a TokenMask>,
}

/// Draws the next token. logits: V values, changed in place; where no token may come, that of the returned id is minus infinity.
pub fn sample(logits: &mut [f32], draw: &Draw<'_>) -> (u32, Option<TokenLogprob>) {
    let params = draw.params;
    let raw = params.logprobs.map(|top| (RowLogprobs::new(logits), top_of(logits, top), logits.to_vec()));
    penalize(logits, draw);
    for (id, bias) in &params.logit_bias {
        logits[*id as usize] += bias;
    }
    restrict(logits, draw);
    let id = if params.temperature < GREEDY { argmax(logits) } else { draw_from(logits, draw) };
    let logprob = raw.map(|(row, top, raw)| describe(&raw, id, &row, &top));
    (id, logprob)
}

/// Log-probability and rank of `id` in the distribution of raw logits, with the `top` most likely tokens.
pub(super) fn logprob_of(logits: &[f32], id: u32, top: usize) -> TokenLogprob {
    let larger = logits.iter().filter(|logit| **logit > logits[id as usize]).count();
    TokenLogprob { rank: Some(1 + larger), ..describe(logits, id, &RowLogprobs::new(logits), &top_of(logits, top)) }
}

fn describe(logits: &[f32], id: u32, row: &RowLogprobs, top: &[u32]) -> TokenLogprob {
    let logprob = |id: u32| row.of(logits[id as usize]);
    TokenLogprob { id, logprob: logprob(id), top: top.iter().map(|id| (*id, logprob(*id))).collect(), rank: None }
}

/// The `count` largest, largest first, equal ones by id.
fn top_of(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if count < ids.len() {
        ids.select_nth_unstable_by(count - 1, order);
        ids.truncate(count);
    }
    ids.sort_unstable_by(order);
    ids
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// Repetition (prompt and output, multiplicative), frequency and presence (output, additive).
fn penalize(logits: &mut [f32], draw: &Draw<'_>) {
    let params = draw.params;
    if params.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = draw.prompt.iter().chain(draw.output).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        }
    }
    for (id, penalty) in frequencies(draw) {
        logits[id as usize] -= penalty;
    }
}

/// What frequency and presence take from the logits of tokens in the output.
pub(super) fn frequencies(draw: &Draw<'_>) -> Vec<(u32, f32)> {
    let params = draw.params;
    if params.frequency_penalty == 0.0 && params.presence_penalty == 0.0 {
        return Vec::new();
    }
    let mut output = draw.output.to_vec();
    output.sort_unstable();
    let penalty = |same: &[u32]| (same[0], params.frequency_penalty * same.len() as f32 + params.presence_penalty);
    output.chunk_by(|a, b| a == b).map(penalty).collect()
}

/// The draw, in [0, 1): of the request's seed and the position alone.
pub(super) fn uniform(draw: &Draw<'_>) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(draw.seed);
    rng.set_stream(draw.output.len() as u64);
    rng.random()
}

/// Minus infinity for every token that may not come.
fn restrict(logits: &mut [f32], draw: &Draw<'_>) {
    if let Some(allowed) = &draw.params.allowed_token_ids {
        let kept: Vec<f32> = allowed.iter().map(|id| logits[*id as usize]).collect();
        logits.fill(f32::NEG_INFINITY);
        allowed.iter().zip(kept).for_each(|(id, logit)| logits[*id as usize] = logit);
    }
    for id in draw.banned {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if let Some(mask) = draw.mask {
        mask.apply(logits);
    }
}

/// Last tokens of the runs in `words` that would be complete now.
pub(super) fn ends_of(words: &[Vec<u32>], output: &[u32]) -> impl Iterator<Item = u32> {
    words
        .iter()
        .filter_map(|word| word.split_last())
        .filter(|(_, start)| output.ends_with(start))
        .map(|(last, _)| *last)
}

/// Temperature, then min-p, top-k and top-p, then one draw from what is left.
fn draw_from(logits: &[f32], draw: &Draw<'_>) -> u32 {
    let params = draw.params;
    let mut weights = logits.to_vec();
    let (_, total) = softmax_row(&mut weights, 1.0 / params.temperature);
    if params.min_p <= 0.0 && params.top_k == 0 && params.top_p >= 1.0 {
        return any_of(&weights, uniform(draw) * total).unwrap_or_else(|| argmax(logits));
    }
    // Tokens under an even share of what top-p leaves out are left out, all of them together: they need no sorting.
    let whole = params.min_p <= 0.0 && params.top_k == 0;
    let share = 0.99 * (1.0 - f64::from(params.top_p)) * total / weights.len() as f64;
    let least = if whole { share } else { f64::from(params.min_p) };
    let mut kept: Vec<(u32, f64)> = weights
        .iter()
        .enumerate()
        .map(|(id, weight)| (id as u32, f64::from(*weight)))
        .filter(|(_, weight)| *weight > 0.0 && *weight >= least)
        .collect();
    let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if params.top_k > 0 && params.top_k < kept.len() {
        kept.select_nth_unstable_by(params.top_k - 1, order);
        kept.truncate(params.top_k);
    }
    if params.top_p < 1.0 {
        let mass = if whole { total } else { kept.iter().map(|(_, weight)| weight).sum::<f64>() };
        let enough = f64::from(params.top_p) * mass;
        // The nucleus is small as a rule: sort the most likely few, and more only if they are not enough.
        let mut most = NUCLEUS.min(kept.len());
        loop {
            if most < kept.len() {
                kept.select_nth_unstable_by(most, order);
            }
            kept[..most].sort_unstable_by(order);
            if most == kept.len() || kept[..most].iter().map(|(_, weight)| weight).sum::<f64>() >= enough {
                break;
            }
            most = (most * 8).min(kept.len());
        }
        kept.truncate(most);
        let mut sum = 0.0;
        let before_reaching_it = |(_, weight): &&(u32, f64)| {
            let short = sum < enough;
            sum += weight;
            short
        };
        let count = kept.iter().take_while(before_reaching_it).count();
        kept.truncate(count.max(1));
    }
    kept.sort_unstable_by_key(|(id, _)| *id);
    let mut left = uniform(draw) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
    for (id, weight) in &kept {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    kept.last().map_or_else(|| argmax(logits), |(id, _)| *id)
}

/// The first id up to which the weights, in order, are more than `left`; the last with a weight where they are not.
fn any_of(weights: &[f32], mut left: f64) -> Option<u32> {
    for (piece, weights) in weights.chunks(PIECE).enumerate() {
        let sum = f64::from(sum_row(weights));
        if left >= sum {
            left -= sum;
            continue;
        }
        for (at, weight) in weights.iter().enumerate() {
            left -= f64::from(*weight);
            if left < 0.0 {
                return Some((piece * PIECE + at) as u32);
            }
        }
    }
    weights.iter().rposition(|weight| *weight > 0.0).map(|id| id as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [2.0, 1.0, 0.5, -1.0, 0.0];

    fn draw_many(params: &SamplingParams, draws: u64) -> [f64; 5] {
        let mut counts = [0.0; 5];
        for seed in 0..draws {
            let draw = Draw { params, prompt: &[], output: &[], seed, banned: &[], mask: None };
            counts[sample(&mut LOGITS.clone(), &draw).0 as usize] += 1.0;
        }
        counts
    }

    /// Σ (seen − expected)² / expected over what may be drawn; nothing else may be.
    fn chi_square(params: &SamplingParams, allowed: &[usize]) -> f64 {
        let weights = LOGITS.map(|logit| f64::from(logit / params.temperature).exp());
        let total: f64 = allowed.iter().map(|id| weights[*id]).sum();
        let counts = draw_many(params, 4000);
        (0..5)
            .map(|id| {
                let expected = if allowed.contains(&id) { 4000.0 * weights[id] / total } else { 0.0 };
                if expected == 0.0 {
                    assert_eq!(counts[id], 0.0, "token {id} is cut off");
                    return 0.0;
                }
                (counts[id] - expected).powi(2) / expected
            })
            .sum()
    }

    #[test]
    fn frequencies_are_the_probabilities_and_cuts_are_exact() {
        let all = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
        // 99.9 % of chi-square with 4 degrees of freedom.
        assert!(chi_square(&all, &[0, 1, 2, 3, 4]) < 18.5);
        assert!(chi_square(&SamplingParams { top_k: 2, ..all.clone() }, &[0, 1]) < 18.5);
        // Probabilities at temperature 1: 0.57, 0.21, 0.13, 0.03, 0.08.
        let plain = SamplingParams::default();
        assert!(chi_square(&SamplingParams { top_p: 0.7, ..plain.clone() }, &[0, 1]) < 18.5);
        assert!(chi_square(&SamplingParams { min_p: 0.2, ..plain }, &[0, 1, 2]) < 18.5);
    }

    #[test]
    fn a_nucleus_wider_than_the_first_guess_is_the_fully_sorted_one() {
        let logits: Vec<f32> = (0..3000u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 20) as f32 / 4096.0).collect();
        let weights: Vec<f64> = logits.iter().map(|logit| f64::from(*logit).exp()).collect();
        for top_p in [0.02f32, 0.4, 0.95] {
            let mut ids: Vec<usize> = (0..logits.len()).collect();
            ids.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
            let enough = f64::from(top_p) * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let nucleus: Vec<usize> = ids
                .into_iter()
                .take_while(|id| {
                    let short = sum < enough;
                    sum += weights[*id];
                    short
                })
                .collect();
            let params = SamplingParams { top_p, ..SamplingParams::default() };
            for seed in 0..300 {
                let draw = Draw { params: &params, prompt: &[], output: &[], seed, banned: &[], mask: None };
                let id = sample(&mut logits.clone(), &draw).0 as usize;
                assert!(nucleus.contains(&id), "{id} is outside the nucleus of {top_p}");
            }
        }
    }

    #[test]
    fn greedy_bias_bans_and_penalties() {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let pick = |params: &SamplingParams, output: &[u32], banned: &[u32]| {
            sample(&mut LOGITS.clone(), &Draw { params, prompt: &[], output, seed: 1, banned, mask: None }).0
        };
        assert_eq!(pick(&greedy, &[], &[]), 0);
        assert_eq!(pick(&greedy, &[], &[0]), 1);
        let biased = SamplingParams { logit_bias: [(3, 10.0)].into(), ..greedy.clone() };
        assert_eq!(pick(&biased, &[], &[]), 3);
        let frequency = SamplingParams { frequency_penalty: 0.6, ..greedy.clone() };
        assert_eq!((pick(&frequency, &[0], &[]), pick(&frequency, &[0, 0], &[])), (0, 1));
        let repetition = SamplingParams { repetition_penalty: 3.0, ..greedy };
        assert_eq!(pick(&repetition, &[0], &[]), 1);
    }

    #[test]
    fn allowed_tokens_and_bad_words() {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let only = SamplingParams { allowed_token_ids: Some(vec![3, 4]), ..greedy };
        let mut logits = LOGITS;
        let draw = |banned| Draw { params: &only, prompt: &[], output: &[], seed: 1, banned, mask: None };
        assert_eq!(sample(&mut logits, &draw(&[])).0, 4);
        let mut logits = LOGITS;
        let nothing = sample(&mut logits, &draw(&[3, 4])).0;
        assert_eq!(logits[nothing as usize], f32::NEG_INFINITY, "no token is left");
        let words = [vec![1, 2, 3], vec![7], vec![]];
        let ends = |output: &[u32]| ends_of(&words, output).collect::<Vec<_>>();
        assert_eq!((ends(&[1, 2]), ends(&[2, 1]), ends(&[])), (vec![3, 7], vec![7], vec![7]));
    }

    #[test]
    fn logprobs_are_of_the_raw_distribution() {
        let params = SamplingParams {
            temperature: 0.0,
            logprobs: Some(2),
            logit_bias: [(3, 10.0)].into(),
            ..SamplingParams::default()
        };
        let draw = Draw { params: &params, prompt: &[], output: &[], seed: 1, banned: &[], mask: None };
        let logprob = sample(&mut LOGITS.clone(), &draw).1.unwrap_or_else(|| unreachable!("asked for"));
        let total: f64 = LOGITS.iter().map(|logit| f64::from(*logit).exp()).sum();
        let expected = |id: usize| (f64::from(LOGITS[id]) - total.ln()) as f32;
        assert!((logprob.logprob - expected(3)).abs() < 1e-6 && logprob.id == 3);
        assert_eq!(logprob.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 1]);
        assert!((logprob.top[1].1 - expected(1)).abs() < 1e-6);
        assert_eq!([0, 1, 2, 3, 4].map(|id| logprob_of(&LOGITS, id, 0).rank), [1, 2, 3, 5, 4].map(Some));
    }
}
