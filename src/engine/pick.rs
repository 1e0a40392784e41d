//! A draw of [`sampler::sample`] as a GPU is asked for it: what depends on the text is settled here, the logits stay there.

use std::collections::BTreeMap;

use super::sampler::{self, Draw};
use crate::model::{Edit, Pick, SampleRow};

/// The same token, from a row of `v` logits. Weights are f32 there and f64 here: a draw within some 1e-7 of a border may fall on its
/// other side.
pub(super) fn row(draw: &Draw<'_>, v: usize) -> SampleRow {
    let params = draw.params;
    let greedy = params.temperature < sampler::GREEDY;
    let pick = Pick {
        temperature: (!greedy).then_some(params.temperature),
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        uniform: if greedy { 0.0 } else { sampler::uniform(draw) },
        edits: edits(draw, v),
        mask: mask(draw, v),
    };
    SampleRow {
        pick: Some(pick),
        logprob: params.logprobs.is_some(),
        top: params.logprobs.unwrap_or(0),
        asked: Vec::new(),
    }
}

/// Penalties, biases and bans, one an id.
fn edits(draw: &Draw<'_>, v: usize) -> Vec<Edit> {
    let params = draw.params;
    let mut edits: BTreeMap<u32, Edit> = BTreeMap::new();
    let mut edit =
        |id: u32, change: &dyn Fn(&mut Edit)| change(edits.entry(id).or_insert(Edit { id, ..Edit::default() }));
    if params.repetition_penalty != 1.0 {
        draw.prompt.iter().chain(draw.output).for_each(|id| edit(*id, &|edit| edit.scaled = true));
    }
    for (id, penalty) in sampler::frequencies(draw) {
        edit(id, &|edit| edit.minus = penalty);
    }
    params.logit_bias.iter().for_each(|(id, bias)| edit(*id, &|edit| edit.plus = *bias));
    let banned = draw.banned.iter().filter(|id| (**id as usize) < v);
    banned.for_each(|id| edit(*id, &|edit| edit.banned = true));
    edits.into_values().collect()
}

/// A bit for every token that `allowed_token_ids` and the grammar both let come.
fn mask(draw: &Draw<'_>, v: usize) -> Option<Vec<u32>> {
    let mut mask = draw.mask.map(|mask| mask.words(v));
    if let Some(allowed) = &draw.params.allowed_token_ids {
        let mut words = vec![0; v.div_ceil(32)];
        allowed.iter().for_each(|id| words[*id as usize / 32] |= 1 << (id % 32));
        if let Some(mask) = mask {
            words.iter_mut().zip(mask).for_each(|(word, mask)| *word &= mask);
        }
        mask = Some(words);
    }
    mask
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::request::{SamplingParams, TokenLogprob};
    use super::super::sampler::sample;
    use super::*;
    use crate::kernels::cuda::sampled;

    /// About normal; rounded to eighths many are equal.
    fn logits(v: usize, seed: u32, rounded: bool) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let one = |_| (0..4).map(|_| next()).sum::<f32>() * 3.0;
        (0..v).map(one).map(|logit| if rounded { (logit * 8.0).round() / 8.0 } else { logit }).collect()
    }

    fn assert_close(found: f32, wanted: f32) {
        assert!((found - wanted).abs() < 2e-6 * (1.0 + wanted.abs()), "{found} should be {wanted}");
    }

    struct Case<'a> {
        params: SamplingParams,
        prompt: &'a [u32],
        output: &'a [u32],
        banned: &'a [u32],
    }

    /// The kernel beside the sampler, one row a seed.
    fn check(row_of: &[f32], cases: &[Case<'_>], seeds: u64) {
        let v = row_of.len();
        let draw = |case: &Case<'_>, seed, then: &mut dyn FnMut(&Draw<'_>)| {
            let Case { params, prompt, output, banned } = case;
            then(&Draw { params, prompt, output, seed, banned, mask: None });
        };
        for (at, case) in cases.iter().enumerate() {
            let mut rows = Vec::new();
            (0..seeds).for_each(|seed| draw(case, seed, &mut |draw| rows.push(row(draw, v))));
            let Some(found) = sampled(&row_of.repeat(rows.len()), v, &rows) else { return };
            for (seed, found) in (0..seeds).zip(found) {
                let mut logits = row_of.to_vec();
                let mut wanted = (0, None);
                draw(case, seed, &mut |draw| wanted = sample(&mut logits, draw));
                let (id, logprob): (u32, Option<TokenLogprob>) = wanted;
                let possible = logits[id as usize] > f32::NEG_INFINITY;
                assert!(found.finite && found.possible == possible, "case {at}, seed {seed}: {found:?}");
                assert_eq!(found.id, id, "case {at}, seed {seed}, {:?}", case.params);
                let Some(logprob) = logprob else { continue };
                assert_close(found.logprob, logprob.logprob);
                let ids = |top: &[(u32, f32)]| top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
                assert_eq!(ids(&found.top), ids(&logprob.top), "case {at}");
                found.top.iter().zip(&logprob.top).for_each(|(found, wanted)| assert_close(found.1, wanted.1));
            }
        }
    }

    fn plain(params: SamplingParams) -> Case<'static> {
        Case { params, prompt: &[], output: &[], banned: &[] }
    }

    fn at(temperature: f32) -> SamplingParams {
        SamplingParams { temperature, ..SamplingParams::default() }
    }

    fn cuts() -> Vec<Case<'static>> {
        let mut cases: Vec<_> = [0.0, 0.05, 0.7, 1.0, 3.0].map(|temperature| plain(at(temperature))).into();
        for top_k in [1, 2, 7, 50, 400, 100_000] {
            cases.push(plain(SamplingParams { top_k, ..at(1.5) }));
        }
        for top_p in [1e-6, 0.1, 0.5, 0.9, 0.999] {
            cases.push(plain(SamplingParams { top_p, ..at(1.2) }));
            cases.push(plain(SamplingParams { top_p, top_k: 30, ..at(0.9) }));
        }
        for min_p in [1e-4, 0.05, 0.5, 1.0] {
            cases.push(plain(SamplingParams { min_p, ..at(1.0) }));
            cases.push(plain(SamplingParams { min_p, top_p: 0.8, top_k: 60, ..at(2.0) }));
        }
        cases
    }

    #[test]
    fn the_kernel_draws_what_the_sampler_draws() {
        for (v, rounded, seeds) in
            [(37, true, 40), (1000, true, 25), (1001, false, 25), (5003, true, 2), (20_011, false, 1)]
        {
            check(&logits(v, v as u32, rounded), &cuts(), seeds);
        }
    }

    #[test]
    fn equal_logits_are_cut_by_id() {
        for v in [64, 1030] {
            check(&vec![-3.5; v], &cuts(), 8);
            let mut two = vec![1.0; v];
            two[v / 2..].fill(2.0);
            (two[3], two[v - 1]) = (0.0, -0.0);
            check(&two, &cuts(), 8);
        }
        // Zeros are equal whatever their sign.
        check(&[-1.0, -0.0, 0.0, -2.0], &cuts(), 8);
    }

    #[test]
    fn penalties_biases_and_bans_come_first() {
        let params = SamplingParams {
            repetition_penalty: 1.7,
            frequency_penalty: 0.6,
            presence_penalty: -0.4,
            logit_bias: [(5, 4.0), (6, -100.0), (40, 2.5), (999, 1.0)].into(),
            logprobs: Some(5),
            ..at(0.8)
        };
        let allowed = |ids: Vec<u32>| Some(ids);
        let cases: Vec<_> = [
            params.clone(),
            SamplingParams { temperature: 0.0, ..params.clone() },
            SamplingParams { top_p: 0.7, top_k: 40, ..params.clone() },
            SamplingParams { allowed_token_ids: allowed(vec![2, 5, 31, 32, 64, 999]), ..params.clone() },
            SamplingParams { allowed_token_ids: allowed((0..500).collect()), top_p: 0.5, ..params },
        ]
        .into_iter()
        .map(|params| Case { params, prompt: &[1, 5, 5, 31], output: &[7, 5, 7, 7, 64], banned: &[2, 40, 90, 5000] })
        .collect();
        check(&logits(1000, 3, true), &cases, 40);
    }

    #[test]
    fn where_no_token_is_left_the_row_says_so() {
        let none = SamplingParams { allowed_token_ids: Some(vec![3, 4]), logprobs: Some(2), ..at(1.0) };
        let cases = [0.0, 1.0].map(|temperature| Case {
            params: SamplingParams { temperature, ..none.clone() },
            prompt: &[],
            output: &[],
            banned: &[3, 4],
        });
        let row_of = logits(70, 1, false);
        for case in &cases {
            let Case { params, prompt, output, banned } = case;
            let draw = Draw { params, prompt, output, seed: 1, banned, mask: None };
            let Some(found) = sampled(&row_of, 70, &[row(&draw, 70)]) else { return };
            assert!(found[0].finite && !found[0].possible && found[0].id == 0, "{found:?}");
        }
    }

    #[test]
    fn logprobs_are_of_the_raw_row_and_what_is_not_finite_is_told() {
        let params = SamplingParams { logprobs: Some(20), ..at(1.0) };
        check(&logits(1001, 9, true), &[plain(params.clone())], 5);
        check(&logits(7, 9, false), &[plain(params)], 5);
        let mut rows = [logits(100, 1, false), logits(100, 2, false), logits(100, 3, false)].concat();
        (rows[50], rows[199]) = (f32::NAN, f32::INFINITY);
        let wanted = SampleRow { top: 3, asked: vec![99, 0], ..SampleRow::default() };
        let Some(found) = sampled(&rows, 100, &[wanted.clone(), wanted.clone(), wanted]) else { return };
        assert_eq!(found.iter().map(|row| row.finite).collect::<Vec<_>>(), [false, false, true]);
        let of = sampler::logprob_of(&rows[200..], 99, 3);
        for ((rank, logprob), of) in found[2].asked.iter().zip([&of, &sampler::logprob_of(&rows[200..], 0, 0)]) {
            assert_close(*logprob, of.logprob);
            assert_eq!(Some(*rank as usize), of.rank);
        }
        assert_eq!(found[2].top.len(), 3);
        found[2].top.iter().zip(&of.top).for_each(|(found, wanted)| {
            assert_eq!(found.0, wanted.0);
            assert_close(found.1, wanted.1);
        });
    }
}
