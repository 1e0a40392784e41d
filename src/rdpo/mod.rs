//! The method on one page: synthesize → score → pairs → train → evaluate → publish.

mod behavior;
mod pacing;
mod pairs;
mod parse;
mod patience;
mod publish;
mod report;
mod request;
mod run;
mod synthesize;

use std::sync::Arc;

pub use behavior::{Behavior, behaviors, behaviors_with};
pub use pairs::Pair;
pub use parse::{behavior as parse_behavior, prompts as parse_prompts};
pub use report::{Comparison, Report};
pub use request::{
    BehaviorRef, JobRequest, PairInput, PromptInput, PublishOptions, PublishRequire, PublishWhen, ScoringOptions,
    SynthesisOptions,
};
pub use synthesize::{Sample, synthesize};

use crate::error::{Error, Result};
use crate::jobs::{Context, Status, Store};
use crate::roles::{Roles, confined};
use run::Run;

/// Runs or resumes one job to its end. Called on the worker thread; `runtime` drives the requests to the roles.
///
/// Every stage leaves rows, so a job that stops anywhere goes on where it stopped and ends with the same adapter.
pub fn run(context: &Context, roles: &Arc<Roles>, runtime: &tokio::runtime::Handle) -> Result<()> {
    let ended = stages(context, roles, runtime);
    sweep(&context.store, roles);
    ended
}

/// Removes what cancelled jobs kept to be resumed, adapters and moments: nothing goes on from there.
pub fn sweep(store: &Store, roles: &Roles) {
    for folder in roles.adapters().job_folders() {
        let id = folder.file_name().unwrap_or_default().to_string_lossy();
        if store.status(&id).is_ok_and(|status| status == Status::Cancelled)
            && let Err(error) = std::fs::remove_dir_all(&folder)
        {
            tracing::warn!(%error, "{} stays behind", folder.display());
        }
    }
}

fn stages(context: &Context, roles: &Arc<Roles>, runtime: &tokio::runtime::Handle) -> Result<()> {
    let job = Run::open(context, roles, runtime)?;
    // It may have ended between its last word and the word that it has ended.
    if job.is_done() {
        return job.clear();
    }
    job.check_student()?;
    // 1–3. The teacher answers, criticizes its answer and revises it.
    job.timed("synthesizing", || job.synthesize())?;
    // 4. The reward role, which is not the teacher's judgement of itself, scores both answers.
    job.timed("scoring", || job.score())?;
    // Pairs (x, y_w = revised, y_l = first answer) with both scores.
    let pairs = job.pairs()?;
    // 5. The student learns from the pairs with the generalized DPO loss.
    let outcome = job.timed("training", || job.train(&pairs))?;
    // Base against new adapter on prompts that were held out.
    let report = job.timed("evaluating", || job.evaluate(&outcome))?;
    // The new adapter goes live; requests in flight end on the one they began with.
    job.timed("publishing", || job.publish(&outcome, &report, &pairs.training))?;
    job.clear()
}

/// The behaviours a server knows: the built-in ones and the files of `behaviors/` under its data root.
pub fn known_behaviors(roles: &Roles) -> Result<Vec<Behavior>> {
    behaviors_with(&roles.data_root().join("behaviors"))
}

/// The recipe a request names or brings; a 400 naming `behavior` that lists what there is.
pub fn find_behavior(roles: &Roles, asked: &BehaviorRef) -> Result<Behavior> {
    match asked {
        BehaviorRef::Inline(behavior) => {
            behavior.validate("behavior")?;
            Ok((**behavior).clone())
        }
        BehaviorRef::Name(name) => {
            let known = known_behaviors(roles)?;
            let names: Vec<&str> = known.iter().map(|one| one.name.as_str()).collect();
            let message = format!("there is no behavior `{name}`; there is: {}", names.join(", "));
            known.iter().find(|one| one.name == *name).cloned().ok_or_else(|| Error::invalid("behavior", message))
        }
    }
}

impl JobRequest {
    /// What only the loaded roles can tell, to be checked before a job is stored: the behaviour, the responder, the adapter to
    /// go on from, the prompts file.
    pub fn check(&self, roles: &Roles) -> Result<()> {
        let recipe = self.recipe(roles)?;
        roles.reward()?.can_use(&recipe.judge).map_err(|error| error.at("behavior.judge"))?;
        let responder =
            roles.resolve(&self.synthesis.respond_with).map_err(|error| error.at("synthesis.respond_with"))?;
        responder.must_talk().map_err(|error| error.at("synthesis.respond_with"))?;
        let lora = match &self.lora.init_from {
            Some(init) => {
                let at = |error: Error| error.at("lora.init_from");
                let file = roles.adapters().file(init).map_err(at)?;
                roles.adapters().check(&file).map_err(at)?;
                file.config
            }
            None => {
                self.check_ranks(roles.adapters().limits().1)?;
                self.lora.config(None)
            }
        };
        roles.fits(&lora, &self.training)?;
        self.all_prompts(roles).map(drop)
    }

    fn check_ranks(&self, most: usize) -> Result<()> {
        let patterns = self.lora.rank_pattern.values().map(|rank| ("lora.rank_pattern", *rank));
        match std::iter::once(("lora.r", self.lora.r)).chain(patterns).find(|(_, rank)| *rank > most) {
            Some((field, rank)) => {
                Err(Error::invalid(field, format!("{rank} is above this server's adapters.max_rank ({most})")))
            }
            None => Ok(()),
        }
    }

    fn recipe(&self, roles: &Roles) -> Result<Behavior> {
        find_behavior(roles, &self.behavior)
    }

    /// The prompts: given, of the pairs, or read from the file.
    fn all_prompts(&self, roles: &Roles) -> Result<Vec<PromptInput>> {
        let Some(file) = &self.prompts_file else {
            let of_pairs = self.pairs.iter().map(|pair| pair.prompt.clone());
            return Ok(self.prompts.iter().cloned().chain(of_pairs).collect());
        };
        let path = confined(&roles.data_root(), file, "prompts_file")?;
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Error::invalid("prompts_file", format!("`{file}` cannot be read: {error}")))?;
        let json = path.extension().is_some_and(|extension| extension == "jsonl");
        let mut found = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value = match json {
                false => serde_json::Value::String(line.to_owned()),
                true => serde_json::from_str::<serde_json::Value>(line).map_err(|error| {
                    Error::invalid("prompts_file", format!("`{file}` line {}: {error}", number + 1))
                })?,
            };
            let value = value.get("prompt").cloned().unwrap_or(value);
            let one = parse_prompts("prompts_file", &serde_json::Value::Array(vec![value])).map_err(|error| {
                Error::invalid("prompts_file", format!("`{file}` line {}: {}", number + 1, error.message))
            })?;
            found.extend(one);
        }
        if found.is_empty() {
            return Err(Error::invalid("prompts_file", format!("`{file}` has no prompt")));
        }
        Ok(found)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "memory_tests.rs"]
mod memory_tests;
