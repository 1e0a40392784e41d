//! Behaviours: named recipes of a principle, a critique request, a revision request and a judge's rubric.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::Result;
use crate::roles::Rubric;

/// A recipe; the built-in ones are TOML files of this shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Behavior {
    /// Its name.
    pub name: String,
    /// What a good answer is, in one or two sentences.
    pub principle: String,
    /// Adversarial context put before the prompt (a persona, say).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// Whether training prompts carry the context too: the student must resist it.
    #[serde(default)]
    pub train_with_context: bool,
    /// Asks the teacher what is wrong with its answer; `{principle}` is filled in.
    pub critique: String,
    /// Asks for the improved answer.
    pub revision: String,
    /// How the judge is asked.
    pub judge: Rubric,
}

/// The built-in behaviours: `safety`, `role_play_robustness`, `sycophancy`.
pub fn behaviors() -> Result<Vec<Behavior>> {
    todo!()
}
