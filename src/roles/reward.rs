//! Reward kinds: judge (expected score), rules, classifier, http.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Target;
use crate::error::Result;
use crate::text::Message;

/// How a judge is asked; part of a behaviour.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rubric {
    /// Text of the question; `{prompt}` and `{response}` are filled in.
    pub prompt: String,
    /// Lowest score.
    pub min: i64,
    /// Highest score.
    pub max: i64,
    /// `expected` (default) or `generate`.
    #[serde(default)]
    pub mode: super::options::JudgeMode,
    /// With `generate`: the label the number follows, `Score` by default.
    #[serde(default)]
    pub label: Option<String>,
    /// With `generate`: most tokens the judge may write, 256 by default.
    #[serde(default)]
    pub max_tokens: Option<usize>,
}

/// A score, or why there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The number.
    pub value: f64,
    /// Prompt tokens spent.
    pub prompt_tokens: usize,
    /// Generated tokens spent.
    pub completion_tokens: usize,
}

/// The reward role, whatever its kind.
pub struct Reward {
    _private: (),
}

impl Reward {
    /// `judge`, `classifier`, `rules` or `http`.
    pub fn kind(&self) -> &'static str {
        todo!()
    }

    /// The model that judges, where there is one.
    pub fn target(&self) -> Option<&Target> {
        todo!()
    }

    /// Scores the last assistant turn of a conversation. `rubric` is the behaviour's; kinds other than `judge` ignore it.
    /// An answer that cannot be read as a number is a 422 naming `reward`; it is never a number.
    pub async fn score(&self, _messages: &[Message], _rubric: Option<&Rubric>) -> Result<Score> {
        todo!()
    }
}
