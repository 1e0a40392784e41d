//! From scored answers to preference pairs: what is dropped and why, and the tokens that are trained on.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::ScoringOptions;
use crate::error::{Error, Result};
use crate::telemetry::metrics;
use crate::text::{Message, RenderOptions, Tokenizer};
use crate::train::TokenPair;

/// A preference pair, as `GET /v1/rdpo/train/{id}/pairs` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Index of the prompt in the request.
    pub prompt_index: usize,
    /// x: the turns the student is trained under.
    pub prompt: Vec<Message>,
    /// y_w.
    pub chosen: String,
    /// y_l.
    pub rejected: String,
    /// s_w.
    pub score_chosen: f64,
    /// s_l.
    pub score_rejected: f64,
}

/// A pair before the filters; scores are `None` where the reward could not be read.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) prompt_index: usize,
    pub(super) prompt: Vec<Message>,
    pub(super) chosen: String,
    pub(super) rejected: String,
    /// What its sampler left of the rejected answer.
    pub(super) sampled: Option<Sampled>,
    pub(super) scores: Option<(f64, f64)>,
    /// Why there are no answers.
    pub(super) unanswered: Option<&'static str>,
}

/// An answer that the student's base wrote, as the student would be trained on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Sampled {
    /// Response tokens.
    pub(super) ids: Vec<u32>,
    /// Log-prob of each under the base, nats.
    pub(super) logprobs: Vec<f32>,
}

/// What the filters left.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) pairs: Vec<Pair>,
    pub(super) tokens: Vec<TokenPair>,
    /// Reason → count.
    pub(super) dropped: BTreeMap<String, usize>,
}

/// Filters candidates in their order and encodes what is left. `max_length`: tokens of prompt + answer a training step takes; `check`
/// may stop it between any two candidates.
pub(super) fn keep(
    candidates: Vec<Candidate>,
    options: &ScoringOptions,
    tokenizer: &Tokenizer,
    max_length: usize,
    check: impl Fn() -> Result<()>,
) -> Result<Kept> {
    let mut kept = Kept::default();
    let mut seen = BTreeSet::new();
    for candidate in candidates {
        check()?;
        let reason = match reason_to_drop(&candidate, options) {
            None if !seen.insert(fingerprint(&candidate)) => Some("duplicate"),
            other => other,
        };
        if let (None, Some((score_chosen, score_rejected))) = (reason, candidate.scores) {
            let pair = Pair {
                prompt_index: candidate.prompt_index,
                prompt: candidate.prompt,
                chosen: candidate.chosen,
                rejected: candidate.rejected,
                score_chosen,
                score_rejected,
            };
            let mut tokens = tokens(&pair, tokenizer)?;
            let sampled = candidate.sampled.filter(|sampled| sampled.ids == tokens.rejected);
            tokens.reference_rejected = sampled.map(|sampled| sampled.logprobs);
            if tokens.prompt.len() < max_length {
                kept.pairs.push(pair);
                kept.tokens.push(tokens);
                continue;
            }
        }
        *kept.dropped.entry(reason.unwrap_or("too_long").to_owned()).or_default() += 1;
    }
    Ok(kept)
}

/// Adds the counts of one job to the process's metrics.
pub(super) fn count(kept: &Kept) {
    metrics().pairs_kept_total.inc_by(kept.pairs.len() as u64);
    for (reason, dropped) in &kept.dropped {
        metrics().pairs_dropped_total.with_label_values(&[reason]).inc_by(*dropped as u64);
    }
    for pair in &kept.pairs {
        metrics().pair_score_gap.observe(pair.score_chosen - pair.score_rejected);
    }
}

fn reason_to_drop(candidate: &Candidate, options: &ScoringOptions) -> Option<&'static str> {
    if candidate.unanswered.is_some() {
        return candidate.unanswered;
    }
    if candidate.chosen.trim().is_empty() || candidate.rejected.trim().is_empty() {
        return Some("empty");
    }
    if candidate.chosen.trim() == candidate.rejected.trim() {
        return Some("identical");
    }
    let Some((chosen, rejected)) = candidate.scores else { return Some("parse") };
    if options.drop_ties && chosen == rejected {
        return Some("tie");
    }
    // What is less is the rounding of the scores' own difference.
    let rounding = 1e-9 * (chosen.abs() + rejected.abs());
    if options.min_gap.is_some_and(|least| chosen - rejected < least - rounding) {
        return Some("min_gap");
    }
    None
}

fn fingerprint(candidate: &Candidate) -> (String, String, String) {
    let turns: Vec<String> =
        candidate.prompt.iter().map(|turn| format!("{}\u{0}{}", turn.role, turn.content)).collect();
    (turns.join("\u{1}"), candidate.chosen.clone(), candidate.rejected.clone())
}

/// Prompt and answer tokens of both sides.
pub(super) fn tokens(pair: &Pair, tokenizer: &Tokenizer) -> Result<TokenPair> {
    let (prompt, chosen) = split(&pair.prompt, &pair.chosen, tokenizer)?;
    let (_, rejected) = split(&pair.prompt, &pair.rejected, tokenizer)?;
    let (score_chosen, score_rejected) = (pair.score_chosen, pair.score_rejected);
    Ok(TokenPair { prompt, chosen, rejected, reference_rejected: None, score_chosen, score_rejected })
}

/// Response tokens: what the rendered prompt + response has beyond the rendered prompt with its generation prompt (TRL's rule).
/// Where the tokens of the two do not share that beginning but their texts do, the rest of the text is encoded alone.
pub(super) fn split(prompt: &[Message], response: &str, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let open = RenderOptions::default();
    let closed = RenderOptions { add_generation_prompt: false, ..RenderOptions::default() };
    let mut whole = prompt.to_vec();
    whole.push(Message::new("assistant", response));
    let before = tokenizer.encode_chat(prompt, &open)?;
    let all = tokenizer.encode_chat(&whole, &closed)?;
    if let Some(rest) = all.strip_prefix(before.as_slice()) {
        return Ok((before, rest.to_vec()));
    }
    let (text, all) = (tokenizer.render(prompt, &open)?, tokenizer.render(&whole, &closed)?);
    let rest = all.strip_prefix(&text).ok_or_else(|| {
        Error::unprocessable(
            "chat_template",
            "the chat template renders a conversation with an answer differently from its own prompt for that answer, so the \
             answer's tokens cannot be told apart",
        )
    })?;
    Ok((before, tokenizer.encode(rest, false)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::error::Code;
    use crate::text::TokenizerOptions;

    fn candidate(chosen: &str, rejected: &str, scores: Option<(f64, f64)>) -> Candidate {
        Candidate {
            prompt_index: 0,
            prompt: vec![Message::new("user", "x")],
            chosen: chosen.into(),
            rejected: rejected.into(),
            sampled: None,
            scores,
            unanswered: None,
        }
    }

    #[test]
    fn each_filter_has_its_reason() {
        let options = ScoringOptions { min_gap: Some(0.5), ..ScoringOptions::default() };
        let reason = |candidate: Candidate| reason_to_drop(&candidate, &options);
        assert_eq!(reason(candidate("a", " ", Some((2.0, 1.0)))), Some("empty"));
        assert_eq!(reason(candidate("a", " a", Some((2.0, 1.0)))), Some("identical"));
        assert_eq!(reason(candidate("a", "b", None)), Some("parse"));
        assert_eq!(reason(candidate("a", "b", Some((1.0, 1.0)))), Some("tie"));
        assert_eq!(reason(candidate("a", "b", Some((1.2, 1.0)))), Some("min_gap"));
        assert_eq!(reason(candidate("a", "b", Some((1.0, 3.0)))), Some("min_gap"));
        assert_eq!(reason(candidate("a", "b", Some((2.0, 1.0)))), None);
        assert_eq!(reason(Candidate { unanswered: Some("refused"), ..candidate("", "", None) }), Some("refused"));
        // 0.3 − 0.2 is a little less than 0.1 in binary.
        let options = ScoringOptions { min_gap: Some(0.1), ..options };
        assert_eq!(reason_to_drop(&candidate("a", "b", Some((0.3, 0.2))), &options), None);
        assert_eq!(reason_to_drop(&candidate("a", "b", Some((0.2999, 0.2))), &options), Some("min_gap"));
        // By default a pair whose revision scored lower is kept: the loss gives it the margin it deserves.
        assert_eq!(reason_to_drop(&candidate("a", "b", Some((1.0, 3.0))), &ScoringOptions::default()), None);
    }

    #[test]
    fn a_stop_is_heard_between_candidates() {
        let tokenizer = Tokenizer::new(TokenizerOptions {
            tokenizer_json:
                r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#
                    .into(),
            ..TokenizerOptions::default()
        })
        .unwrap();
        let looked = Cell::new(0);
        let check = || {
            looked.set(looked.get() + 1);
            if looked.get() < 3 { Ok(()) } else { Err(Error::cancelled()) }
        };
        let candidates = vec![candidate("a", " ", None); 5];
        let stopped = keep(candidates, &ScoringOptions::default(), &tokenizer, 8, check).unwrap_err();
        assert_eq!((stopped.code, looked.get()), (Code::Cancelled, 3));
    }
}
