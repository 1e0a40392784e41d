//! Speculative decoding. What a grammar forces is a draft of itself. Otherwise it is prompt lookup: where the last tokens of a text occurred before, what followed then is a draft of what
//! follows now. A revision repeats much of the answer it revises, code repeats its names.
//!
//! A draft's tokens are rows of the step like any other. Each is sampled as it would be without a draft, and the first token that
//! is another than drafted is kept and what was drafted behind it thrown away: the answer is the same token for token, whatever
//! the draft. All that is decided here is speed.
//!
//! A row is not free on a processor: a step takes as long as [`FIXED_ROWS`] rows and its own (SmolLM2-135M on two cores: 2.9 ms
//! for one row, 9.5 for 8, 18 for 16). So a row has to be likelier to give a token than a row of this step is on average: above
//! a third where one answer is written, above nine tenths beside 16 others. How likely it is shows in how many tokens the text
//! has repeated so far ([`chance`]), which needs no memory: it grows with every token that was right, and after one that was
//! wrong the match is gone.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What a step costs besides its rows, in rows.
const FIXED_ROWS: f64 = 2.0;
/// What a grammar forces is as likely as what follows after so many equal tokens.
const FORCED: usize = 32;
/// Tokens looked back over; a look takes some microseconds.
const MOST_SCANNED: usize = 8192;

/// How drafts are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpeculativeMethod {
    /// By prompt lookup.
    #[default]
    Ngram,
    /// Not at all.
    None,
}

/// `[speculative_config]`, named as vLLM names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpeculativeOptions {
    /// `ngram` or `none`.
    pub method: SpeculativeMethod,
    /// Most tokens of a draft.
    pub num_speculative_tokens: usize,
    /// Fewest last tokens that must have occurred before.
    pub prompt_lookup_min: usize,
    /// Most that are compared; the longest match is taken.
    pub prompt_lookup_max: usize,
}

impl Default for SpeculativeOptions {
    fn default() -> Self {
        SpeculativeOptions {
            method: SpeculativeMethod::Ngram,
            num_speculative_tokens: 12,
            prompt_lookup_min: 2,
            prompt_lookup_max: 16,
        }
    }
}

impl SpeculativeOptions {
    /// Range checks, each error naming the key.
    pub fn check(&self) -> Result<()> {
        for (key, value) in [
            ("num_speculative_tokens", self.num_speculative_tokens),
            ("prompt_lookup_min", self.prompt_lookup_min),
            ("prompt_lookup_max", self.prompt_lookup_max),
        ] {
            if !(1..=64).contains(&value) {
                let name = format!("speculative_config.{key}");
                return Err(Error::invalid(&name, format!("`{name}` must be between 1 and 64, got {value}")));
            }
        }
        if self.prompt_lookup_min > self.prompt_lookup_max {
            let name = "speculative_config.prompt_lookup_min";
            return Err(Error::invalid(name, format!("`{name}` is larger than `prompt_lookup_max`")));
        }
        Ok(())
    }

    /// What followed when the text's last tokens occurred before, `most` tokens at most: the longest match, and of equals the last.
    pub(super) fn find(&self, tokens: &[u32], most: usize) -> Option<Draft> {
        let most = most.min(self.num_speculative_tokens);
        let (last, before) = tokens.split_last().filter(|_| most > 0)?;
        let (mut matched, mut start) = (0, 0);
        for at in (before.len().saturating_sub(MOST_SCANNED)..before.len()).rev() {
            if before[at] != *last {
                continue;
            }
            let pairs = before[..at].iter().rev().zip(before.iter().rev());
            let len = 1 + pairs.take(self.prompt_lookup_max - 1).take_while(|(a, b)| a == b).count();
            if len > matched {
                (matched, start) = (len, at + 1);
            }
            if len == self.prompt_lookup_max {
                break;
            }
        }
        let tokens = tokens[start..].iter().take(most).copied().collect();
        (matched >= self.prompt_lookup_min).then_some(Draft { tokens, matched })
    }
}

/// Tokens that may come next.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Draft {
    pub(super) tokens: Vec<u32>,
    /// Tokens before them that are the same where they were found.
    matched: usize,
}

impl Draft {
    /// Of tokens that a grammar leaves no choice about but where one ends and the next begins.
    pub(super) fn forced(tokens: Vec<u32>) -> Self {
        Draft { tokens, matched: FORCED }
    }
}

/// How likely the next token is the one that followed before, after so many equal ones. In the turns of self-critique and in plain
/// chats 0.4 after two, 0.6 after three, 0.7 after four, 0.85 after eight, 0.95 from twelve on; after two this says 0.3, as what is
/// barely worth its row is not worth the trouble.
fn chance(matched: usize) -> f64 {
    (1.0 - 1.6 / (matched as f64).powf(1.2)).max(0.0)
}

/// How many tokens of each draft are worth their rows, `budget` in all, in a step that writes `answers` of one token each.
pub(super) fn plan(drafts: &[Draft], answers: usize, budget: usize) -> Vec<usize> {
    let mut rows: Vec<(f64, usize)> = Vec::new();
    for (index, draft) in drafts.iter().enumerate() {
        let mut all_right = 1.0;
        rows.extend((0..draft.tokens.len()).map(|at| {
            all_right *= chance(draft.matched + at);
            (all_right, index)
        }));
    }
    // Within a draft it falls: its rows keep their order.
    rows.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut cost, mut tokens) = (answers as f64 + FIXED_ROWS, answers as f64);
    let mut lens = vec![0; drafts.len()];
    for (likely, index) in rows.into_iter().take(budget) {
        if likely * cost <= tokens {
            break;
        }
        (cost, tokens) = (cost + 1.0, tokens + likely);
        lens[index] += 1;
    }
    lens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(matched: usize, len: usize) -> Draft {
        Draft { tokens: vec![0; len], matched }
    }

    #[test]
    fn the_longest_match_is_found_and_of_equals_the_last() {
        let options = SpeculativeOptions { prompt_lookup_max: 3, num_speculative_tokens: 4, ..Default::default() };
        let find = |tokens: &[u32], most| options.find(tokens, most).map(|draft| (draft.tokens, draft.matched));
        assert_eq!(find(&[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2), Some((vec![4, 9], 3)));
        assert_eq!(find(&[2, 3, 4, 0, 2, 3, 5, 1, 2, 3], 2), Some((vec![5, 1], 2)));
        assert_eq!(find(&[7, 3, 4, 1, 3], 2), None, "one token is too few");
        assert_eq!(find(&[7, 7, 7, 7], 9), Some((vec![7], 3)), "no further than the text goes");
        assert_eq!((find(&[], 9), find(&[1], 9), find(&[1, 2, 1, 2], 0)), (None, None, None));
        assert_eq!(find(&[1, 2, 3, 4, 5, 6, 1, 2], 99), Some((vec![3, 4, 5, 6], 2)), "no more than allowed");
    }

    #[test]
    fn what_lies_far_back_is_not_looked_for() {
        let mut tokens: Vec<u32> = (0..MOST_SCANNED as u32 + 9).collect();
        tokens.extend([0, 1]);
        assert_eq!(SpeculativeOptions::default().find(&tokens, 9), None);
    }

    #[test]
    fn a_row_must_be_likelier_than_a_row_of_the_step_is() {
        assert_eq!(plan(&[draft(2, 12), draft(3, 12)], 1, 99), [0, 2], "alone, after two equal tokens and after three");
        let copying = plan(&[draft(16, 12)], 1, 99)[0];
        assert!((5..12).contains(&copying), "alone, in the middle of a copy: {copying}");
        let beside = |matched| plan(&[draft(matched, 12)], 16, 99)[0];
        assert_eq!((beside(4), beside(8)), (0, 0), "beside 15 others a likely one does not pay");
        assert!((1..copying).contains(&beside(16)));
        assert_eq!(plan(&[draft(4, 12), draft(16, 12)], 2, 2), [0, 2], "the likeliest first");
        assert_eq!(plan(&[draft(16, 12)], 1, 0), [0]);
    }
}
