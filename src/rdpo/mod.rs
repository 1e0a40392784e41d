//! The method on one page: synthesize → score → pairs → train → evaluate → publish.

mod behavior;
mod request;

use std::sync::Arc;

pub use behavior::{Behavior, behaviors};
pub use request::{
    BehaviorRef, JobRequest, PairInput, PromptInput, PublishOptions, PublishRequire, PublishWhen, ScoringOptions,
    SynthesisOptions,
};

use crate::error::Result;
use crate::jobs::Context;
use crate::roles::Roles;

/// Runs or resumes one job to its end. Called on the worker thread; `runtime` drives the requests to the roles.
pub fn run(_context: &Context, _roles: &Arc<Roles>, _runtime: &tokio::runtime::Handle) -> Result<()> {
    todo!()
}

/// One self-critique conversation, as `POST /v1/rdpo/synthesize` returns it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Sample {
    /// Index of the prompt in the request.
    pub prompt_index: usize,
    /// The last user turn of the prompt.
    pub prompt: String,
    /// y_o.
    pub response: String,
    /// What the teacher found wrong with it (last round).
    pub critique: String,
    /// y_r.
    pub revised: String,
    /// Tokens generated for it.
    pub completion_tokens: usize,
    /// Prompt tokens read for it.
    pub prompt_tokens: usize,
    /// Of those, from the prefix cache.
    pub cached_tokens: usize,
}

/// Runs the three turns for every prompt, several in flight; `on_sample` hears each as it is done.
pub async fn synthesize(
    _roles: &Arc<Roles>,
    _behavior: &Behavior,
    _prompts: &[(usize, PromptInput)],
    _options: &SynthesisOptions,
    _seed: u64,
    _on_sample: &mut (dyn FnMut(Sample) -> Result<()> + Send),
) -> Result<()> {
    todo!()
}
