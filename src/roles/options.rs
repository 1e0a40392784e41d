//! Configuration of models, roles, cache and adapters, as `rdpo.toml` has it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::reward::Rubric;

/// `[device]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceOptions {
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub kind: String,
    /// CPU threads; all cores when absent.
    pub threads: Option<usize>,
}

/// `[kv_cache]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvCacheOptions {
    /// Tokens per block.
    pub block_size: usize,
    /// Size of each checkpoint's pool, e.g. `2GiB`.
    pub memory: String,
    /// Share KV of equal prefixes.
    pub prefix_caching: bool,
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Most sequences at once.
    pub max_sequences: usize,
    /// Most requests of a role waiting.
    pub max_waiting: usize,
}

/// `[models.NAME]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelOptions {
    /// Folder or `.gguf` file.
    pub path: PathBuf,
    /// `auto` (as stored, floats as bf16), `f32`, `bf16`, `f16`, or quantized when loaded: `q8_0`, `q4_1`, `q4_k`.
    #[serde(default = "auto")]
    pub dtype: String,
    /// Longest prompt + answer, tokens.
    #[serde(default)]
    pub max_model_len: Option<usize>,
}

fn auto() -> String {
    "auto".into()
}

/// `[roles.teacher]`, `[roles.student]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleOptions {
    /// Name under `[models]`.
    pub model: String,
}

/// How a judge reads its score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JudgeMode {
    /// Σ v·p(v) over the allowed values' tokens: one prefill, deterministic.
    #[default]
    Expected,
    /// The judge reasons first; the last `Label: <number>` is read.
    Generate,
}

/// A judge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgeOptions {
    /// Name under `[models]`.
    pub model: String,
    /// Used where the behaviour brings none; a general one where it is left out.
    #[serde(default)]
    pub rubric: Option<Rubric>,
}

/// `[roles.reward]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardOptions {
    /// A chat model with a rubric.
    Judge(JudgeOptions),
    /// A sequence-classification model with one label.
    Classifier(RoleOptions),
    /// Weighted terms over the response.
    Rules {
        /// The terms.
        terms: Vec<RuleOptions>,
    },
    /// The user's own endpoint.
    Http(HttpRewardOptions),
}

/// One term of a rules reward: `weight` times what the check gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "check", rename_all = "snake_case", deny_unknown_fields)]
pub enum RuleOptions {
    /// Characters of the response, divided by `per`.
    Length {
        /// Factor.
        weight: f64,
        /// Characters that make 1.
        per: f64,
    },
    /// 1 where the pattern matches.
    Regex {
        /// Factor.
        weight: f64,
        /// The pattern.
        pattern: String,
    },
    /// 1 where the text occurs, ignoring case.
    Contains {
        /// Factor.
        weight: f64,
        /// The text.
        text: String,
    },
    /// 1 where the response is valid JSON.
    JsonValid {
        /// Factor.
        weight: f64,
    },
}

/// POST `{prompt, response}`, read `{"score": number}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpRewardOptions {
    /// Where.
    pub url: String,
    /// Seconds before a try is given up.
    #[serde(default)]
    pub timeout_seconds: Option<f64>,
    /// Tries after the first.
    #[serde(default)]
    pub max_retries: Option<usize>,
    /// Requests at once.
    #[serde(default)]
    pub concurrency: Option<usize>,
    /// Environment variable holding a bearer token.
    #[serde(default)]
    pub api_key_env: Option<String>,
}

/// `[adapters]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterOptions {
    /// Root folder; every adapter path is confined to it.
    pub path: PathBuf,
    /// Most generations in memory.
    pub max_resident: usize,
    /// Highest rank accepted.
    pub max_rank: usize,
}

/// Everything [`super::Roles::load`] needs.
#[derive(Clone, Debug)]
pub struct RolesOptions {
    /// Device.
    pub device: DeviceOptions,
    /// Cache.
    pub kv_cache: KvCacheOptions,
    /// Models by name.
    pub models: BTreeMap<String, ModelOptions>,
    /// Teacher.
    pub teacher: RoleOptions,
    /// Student.
    pub student: RoleOptions,
    /// Reward.
    pub reward: RewardOptions,
    /// Adapters.
    pub adapters: AdapterOptions,
    /// Share of device time training keeps while serving is busy.
    pub training_share: f64,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions { kind: "auto".into(), threads: None }
    }
}

impl Default for KvCacheOptions {
    fn default() -> Self {
        KvCacheOptions {
            block_size: 16,
            memory: "2GiB".into(),
            prefix_caching: true,
            max_batch_tokens: 512,
            max_sequences: 64,
            max_waiting: 256,
        }
    }
}

impl Default for AdapterOptions {
    fn default() -> Self {
        AdapterOptions { path: "data/adapters".into(), max_resident: 16, max_rank: 256 }
    }
}
