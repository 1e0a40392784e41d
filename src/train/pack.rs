//! Lays pairs out as flat steps in which both answers of a pair share their prompt's tokens.
//!
//! A pair is `[x, y_w, y_l]`: `y_l` sees `x` and itself but not `y_w`, and its positions go on from the end of `x`. The prompt is
//! computed once instead of twice. The last token of an answer predicts nothing and is left out.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::ops::{CausalMask, Segment};

/// A pair as token ids.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenPair {
    /// The rendered prompt with its generation prompt.
    pub prompt: Vec<u32>,
    /// Response tokens of y_w, end of turn included.
    pub chosen: Vec<u32>,
    /// Response tokens of y_l, end of turn included.
    pub rejected: Vec<u32>,
    /// Log-prob of each of them under the base, where it was known when they were sampled: the reference then need not read y_l.
    pub reference_rejected: Option<Vec<f32>>,
    /// External score of y_w.
    pub score_chosen: f64,
    /// External score of y_l.
    pub score_rejected: f64,
}

/// One pair's place in a [`Pack`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PackedPair {
    /// Index of the pair in the job.
    pub(crate) index: usize,
    /// Its chosen answer's entries of [`Pack::rows`] and [`Pack::targets`].
    pub(crate) chosen: Range<usize>,
    /// The rejected answer's.
    pub(crate) rejected: Range<usize>,
}

/// One flat step of N tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pack {
    /// Token ids, (N).
    pub(crate) ids: Vec<u32>,
    /// Who sees whom, and positions.
    pub(crate) mask: CausalMask,
    /// Rows whose output predicts an answer's token, (T). A prompt's last row is there twice: it predicts the first token of both.
    pub(crate) rows: Vec<u32>,
    /// The tokens they predict, (T).
    pub(crate) targets: Vec<u32>,
    /// The pairs.
    pub(crate) pairs: Vec<PackedPair>,
}

impl Pack {
    /// Lays out `pairs`, given with their indices.
    pub(crate) fn new<'a>(pairs: impl IntoIterator<Item = (usize, &'a TokenPair)>) -> Self {
        Pack::with(pairs, |pair| &pair.rejected)
    }

    /// The same without the rejected answers whose reference is known.
    pub(crate) fn of_unknown<'a>(pairs: impl IntoIterator<Item = (usize, &'a TokenPair)>) -> Self {
        Pack::with(pairs, |pair| if pair.reference_rejected.is_some() { &[] } else { &pair.rejected })
    }

    fn with<'a>(
        pairs: impl IntoIterator<Item = (usize, &'a TokenPair)>,
        rejected: impl Fn(&'a TokenPair) -> &'a [u32],
    ) -> Self {
        let mut pack = Pack {
            ids: Vec::new(),
            mask: CausalMask::new(Vec::new(), Vec::new()),
            rows: Vec::new(),
            targets: Vec::new(),
            pairs: Vec::new(),
        };
        for (index, pair) in pairs {
            let prompt = pack.segment(&pair.prompt, 0, 0..0);
            let chosen = pack.answer(&pair.chosen, &prompt);
            let rejected = pack.answer(rejected(pair), &prompt);
            pack.pairs.push(PackedPair { index, chosen, rejected });
        }
        pack
    }

    /// A prompt with one answer.
    pub(crate) fn single(prompt: &[u32], response: &[u32]) -> Self {
        let mut pack = Pack::new([]);
        let prompt = pack.segment(prompt, 0, 0..0);
        pack.answer(response, &prompt);
        pack
    }

    /// Appends a run of tokens whose positions start at `position` and which sees `prefix`; an empty run leaves nothing.
    fn segment(&mut self, ids: &[u32], position: u32, prefix: Range<usize>) -> Range<usize> {
        let start = self.ids.len();
        if !ids.is_empty() {
            self.ids.extend_from_slice(ids);
            self.mask.positions.extend((position..).take(ids.len()));
            self.mask.segments.push(Segment { start, len: ids.len(), prefix });
        }
        start..start + ids.len()
    }

    /// Appends an answer to `prompt` without its last token; gives its entries of `rows` and `targets`.
    fn answer(&mut self, ids: &[u32], prompt: &Range<usize>) -> Range<usize> {
        let first = self.rows.len();
        let inputs = ids.len().saturating_sub(1);
        let run = self.segment(&ids[..inputs], prompt.len() as u32, prompt.clone());
        if !ids.is_empty() {
            self.rows.push((prompt.end - 1) as u32);
            self.rows.extend(run.map(|row| row as u32));
            self.targets.extend_from_slice(ids);
        }
        first..self.rows.len()
    }
}

/// Pairs that a run can learn from; errors name the pair's field under `field`.
pub(crate) fn check_pairs(field: &str, pairs: &[TokenPair], config: &ModelConfig) -> Result<()> {
    for (index, pair) in pairs.iter().enumerate() {
        for (name, ids) in [("prompt", &pair.prompt), ("chosen", &pair.chosen), ("rejected", &pair.rejected)] {
            let at = || format!("{field}[{index}].{name}");
            if ids.is_empty() {
                return Err(Error::invalid(at(), "has no tokens."));
            }
            check_ids(ids, config, at)?;
        }
        if let Some(known) = &pair.reference_rejected
            && (known.len() != pair.rejected.len() || !known.iter().all(|one| one.is_finite()))
        {
            let text = "must be one finite number for each token of `rejected`.";
            return Err(Error::invalid(format!("{field}[{index}].reference_rejected"), text));
        }
        if !pair.score_chosen.is_finite() || !pair.score_rejected.is_finite() {
            return Err(Error::invalid(format!("{field}[{index}]"), "its scores must be finite numbers."));
        }
    }
    Ok(())
}

/// Ids of the model's vocabulary.
pub(crate) fn check_ids(ids: &[u32], config: &ModelConfig, at: impl Fn() -> String) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        Some(id) => {
            Err(Error::invalid(at(), format!("token id {id} is not below the vocabulary's {}.", config.vocab_size)))
        }
        None => Ok(()),
    }
}

/// Rows a pair takes in a flat step.
pub(crate) fn packed_tokens(pair: &TokenPair) -> usize {
    pair.prompt.len() + pair.chosen.len().saturating_sub(1) + pair.rejected.len().saturating_sub(1)
}

/// Tokens of a pair as TRL counts them: prompt and answer for each side.
pub(crate) fn trl_tokens(pair: &TokenPair) -> usize {
    2 * pair.prompt.len() + pair.chosen.len() + pair.rejected.len()
}

/// Splits `indices`, in order, into flat steps of at most `budget` rows; a pair longer than that is a step of its own.
pub(crate) fn plan(pairs: &[TokenPair], indices: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut steps: Vec<Vec<usize>> = Vec::new();
    let mut rows = 0;
    for &index in indices {
        let tokens = packed_tokens(&pairs[index]);
        match steps.last_mut() {
            Some(step) if rows + tokens <= budget => {
                step.push(index);
                rows += tokens;
            }
            _ => {
                steps.push(vec![index]);
                rows = tokens;
            }
        }
    }
    steps
}

/// Cuts answers so that prompt + answer keep their first `max_length` tokens, and drops pairs whose prompt alone fills it.
/// Gives the pairs kept and how many were dropped.
pub(crate) fn truncate(pairs: &[TokenPair], max_length: usize) -> (Vec<TokenPair>, usize) {
    let kept: Vec<TokenPair> = pairs
        .iter()
        .filter(|pair| pair.prompt.len() < max_length)
        .map(|pair| {
            let mut pair = pair.clone();
            let room = max_length - pair.prompt.len();
            pair.chosen.truncate(room);
            pair.rejected.truncate(room);
            pair.reference_rejected.iter_mut().for_each(|known| known.truncate(room));
            pair
        })
        .collect();
    let dropped = pairs.len() - kept.len();
    (kept, dropped)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pair(prompt: usize, chosen: usize, rejected: usize) -> TokenPair {
        let ids = |start: usize, len: usize| (start..start + len).map(|id| id as u32).collect();
        TokenPair {
            prompt: ids(0, prompt),
            chosen: ids(100, chosen),
            rejected: ids(200, rejected),
            reference_rejected: None,
            score_chosen: 1.0,
            score_rejected: 0.0,
        }
    }

    #[test]
    fn both_answers_share_the_prompt() {
        let pack = Pack::new([(7, &pair(3, 3, 2)), (2, &pair(2, 1, 2))]);
        assert_eq!(pack.ids, [0, 1, 2, 100, 101, 200, 0, 1, 200]);
        assert_eq!(pack.mask.positions, [0, 1, 2, 3, 4, 3, 0, 1, 2]);
        assert_eq!(
            pack.mask.segments,
            [
                Segment { start: 0, len: 3, prefix: 0..0 },
                Segment { start: 3, len: 2, prefix: 0..3 },
                Segment { start: 5, len: 1, prefix: 0..3 },
                Segment { start: 6, len: 2, prefix: 0..0 },
                Segment { start: 8, len: 1, prefix: 6..8 },
            ]
        );
        assert_eq!(pack.rows, [2, 3, 4, 2, 5, 7, 7, 8]);
        assert_eq!(pack.targets, [100, 101, 102, 200, 201, 100, 200, 201]);
        assert_eq!(pack.pairs[0], PackedPair { index: 7, chosen: 0..3, rejected: 3..5 });
        assert_eq!(pack.pairs[1], PackedPair { index: 2, chosen: 5..6, rejected: 6..8 });
        assert_eq!(packed_tokens(&pair(3, 3, 2)), 6);
        assert_eq!(trl_tokens(&pair(3, 3, 2)), 11);
    }

    #[test]
    fn an_answer_whose_reference_is_known_is_left_out_of_the_reference_pass() {
        let known = TokenPair { reference_rejected: Some(vec![-1.0; 2]), ..pair(3, 3, 2) };
        let pack = Pack::of_unknown([(0, &known), (1, &pair(2, 1, 2))]);
        assert_eq!(pack.ids, [0, 1, 2, 100, 101, 0, 1, 200]);
        assert_eq!(pack.targets, [100, 101, 102, 100, 200, 201]);
        assert_eq!((pack.pairs[0].rejected.clone(), pack.pairs[1].rejected.clone()), (3..3, 4..6));
        assert_eq!(Pack::new([(0, &known)]), Pack::new([(0, &pair(3, 3, 2))]));
        assert_eq!(truncate(&[known], 4).0[0].reference_rejected.as_deref(), Some(&[-1.0f32][..]));
    }

    #[test]
    fn a_single_answer_is_one_run_after_its_prompt() {
        let pack = Pack::single(&[5, 6], &[7, 8, 9]);
        assert_eq!(pack.ids, [5, 6, 7, 8]);
        assert_eq!(pack.mask.positions, [0, 1, 2, 3]);
        assert_eq!((pack.rows, pack.targets), (vec![1, 2, 3], vec![7, 8, 9]));
    }

    #[test]
    fn plans_fill_steps_in_order() {
        let pairs = [pair(3, 3, 2), pair(3, 3, 2), pair(30, 3, 2), pair(3, 3, 2)];
        assert_eq!(plan(&pairs, &[0, 1, 2, 3], 12), [vec![0, 1], vec![2], vec![3]]);
        assert_eq!(plan(&pairs, &[3, 0], 6), [vec![3], vec![0]]);
        assert!(plan(&pairs, &[], 6).is_empty());
    }

    #[test]
    fn truncation_keeps_the_start_and_counts_what_is_dropped() {
        let (kept, dropped) = truncate(&[pair(3, 3, 9), pair(8, 1, 1), pair(7, 4, 1), pair(9, 1, 1)], 8);
        assert_eq!(dropped, 2);
        assert_eq!((kept[0].chosen.len(), kept[0].rejected.len()), (3, 5));
        assert_eq!(kept[0].rejected, [200, 201, 202, 203, 204]);
        assert_eq!((kept[1].prompt.len(), kept[1].chosen.len()), (7, 1));
    }
}
