//! The job request: every field but the work itself has a default; unknown fields are errors that name them.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::Behavior;
use crate::text::Message;
use crate::train::{LoraOptions, LossOptions, TrainingOptions};

/// A built-in behaviour's name, or a recipe in the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum BehaviorRef {
    /// Built-in.
    Name(String),
    /// Inline.
    Inline(Box<Behavior>),
}

/// A prompt: text, or turns ending in the user's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum PromptInput {
    /// One user turn.
    Text(String),
    /// A conversation.
    Messages {
        /// The turns.
        #[schema(value_type = Vec<Object>)]
        messages: Vec<Message>,
    },
}

/// A ready pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PairInput {
    /// The prompt.
    pub prompt: PromptInput,
    /// The better answer.
    pub chosen: String,
    /// The worse answer.
    pub rejected: String,
    /// External score of the better one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score_chosen: Option<f64>,
    /// External score of the worse one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score_rejected: Option<f64>,
}

/// `synthesis`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SynthesisOptions {
    /// Critique-and-revise rounds, 1..=4.
    pub rounds: usize,
    /// Conversations per prompt, 1..=64.
    pub samples_per_prompt: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// Nucleus mass.
    pub top_p: f64,
    /// Most tokens a turn.
    pub max_tokens: usize,
    /// Who gives the first answer: a model name.
    pub respond_with: String,
}

/// `scoring`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ScoringOptions {
    /// The reward role.
    pub reward: String,
    /// Pairs with a smaller gap are dropped.
    pub min_gap: Option<f64>,
    /// Pairs with equal scores are dropped.
    pub drop_ties: bool,
}

/// When the adapter goes live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PublishWhen {
    /// After the report.
    #[default]
    End,
    /// At every checkpoint.
    EveryCheckpoint,
    /// Not at all.
    Never,
}

/// What the report must show before the adapter goes live.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PublishRequire {
    /// Least win rate on held-out prompts.
    pub win_rate: f64,
}

/// `publish`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PublishOptions {
    /// The alias; becomes a model name.
    pub alias: String,
    /// When.
    pub when: PublishWhen,
    /// Conditions.
    pub require: PublishRequire,
}

/// `POST /v1/rdpo/train`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct JobRequest {
    /// The role that learns.
    pub student: String,
    /// The recipe.
    pub behavior: BehaviorRef,
    /// Prompts to make pairs from.
    pub prompts: Vec<PromptInput>,
    /// A file of prompts instead, under the data root.
    pub prompts_file: Option<String>,
    /// Ready pairs instead.
    pub pairs: Vec<PairInput>,
    /// Prompts for the report; a share of the job's own prompts when empty.
    pub eval_prompts: Vec<PromptInput>,
    /// Synthesis.
    pub synthesis: SynthesisOptions,
    /// Scoring.
    pub scoring: ScoringOptions,
    /// Loss.
    pub loss: LossOptions,
    /// Adapter.
    pub lora: LoraOptions,
    /// Training.
    pub training: TrainingOptions,
    /// Publication.
    pub publish: PublishOptions,
    /// Seed of everything.
    pub seed: u64,
    /// The user's own notes, echoed.
    #[schema(value_type = Object)]
    pub metadata: Value,
}

impl Default for SynthesisOptions {
    fn default() -> Self {
        SynthesisOptions {
            rounds: 1,
            samples_per_prompt: 1,
            temperature: 0.7,
            top_p: 1.0,
            max_tokens: 256,
            respond_with: "teacher".into(),
        }
    }
}

impl Default for ScoringOptions {
    fn default() -> Self {
        ScoringOptions { reward: "reward".into(), min_gap: None, drop_ties: true }
    }
}

impl Default for PublishOptions {
    fn default() -> Self {
        PublishOptions { alias: "student".into(), when: PublishWhen::End, require: PublishRequire::default() }
    }
}

impl Default for JobRequest {
    fn default() -> Self {
        JobRequest {
            student: "student".into(),
            behavior: BehaviorRef::Name("safety".into()),
            prompts: Vec::new(),
            prompts_file: None,
            pairs: Vec::new(),
            eval_prompts: Vec::new(),
            synthesis: SynthesisOptions::default(),
            scoring: ScoringOptions::default(),
            loss: LossOptions::default(),
            lora: LoraOptions::default(),
            training: TrainingOptions::default(),
            publish: PublishOptions::default(),
            seed: 42,
            metadata: Value::Object(serde_json::Map::new()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The page of jobs shows every field with its default, and says what each does.
    #[test]
    fn the_page_of_jobs_is_true() {
        let page = include_str!("../../docs/jobs.md");
        let block = page.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
        assert_eq!(serde_json::from_str::<JobRequest>(block).unwrap(), JobRequest::default());
        let shown: Value = serde_json::from_str(block).unwrap();
        let named = |field: &str| assert!(page.contains(&format!("`{field}`")), "{field} is not explained");
        for (key, value) in serde_json::to_value(JobRequest::default()).unwrap().as_object().unwrap() {
            let section = value.as_object().filter(|section| !section.is_empty());
            if section.is_none() {
                named(key);
            }
            for (inner, value) in section.into_iter().flatten() {
                assert!(!shown[key][inner].is_null() || value.is_null(), "{key}.{inner} is not shown");
                match value.as_object().filter(|deep| !deep.is_empty()) {
                    Some(deep) => deep.keys().for_each(|deep| named(&format!("{key}.{inner}.{deep}"))),
                    None => named(&format!("{key}.{inner}")),
                }
            }
        }
    }
}
