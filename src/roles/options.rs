//! Configuration of models, roles, cache and adapters, as `rdpo.toml` has it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::reward::Rubric;
use crate::engine::SpeculativeOptions;
use crate::error::{Error, Result};

/// `[device]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceOptions {
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub kind: String,
    /// CPU threads; all cores when absent.
    pub threads: Option<usize>,
    /// What the server may use of the device's memory, a size or a share; 90% of a GPU's and all of the CPU's when absent.
    pub memory: Option<String>,
}

/// `[kv_cache]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvCacheOptions {
    /// Tokens per block.
    pub block_size: usize,
    /// Size of each checkpoint's pool, e.g. `2GiB`; a share of the device's memory for all pools together, e.g. `40%`; or `auto`: all
    /// that is left on a GPU, 2 GiB each on a CPU.
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
#[serde(deny_unknown_fields, default)]
pub struct ModelOptions {
    /// Folder or `.gguf` file.
    pub path: PathBuf,
    /// `auto` (as stored, floats as bf16), `f32`, `bf16`, `f16`, or quantized when loaded: `q8_0`, `q4_1`, `q4_k`, and on
    /// `mistralrs` whatever its in-situ quantization has.
    pub dtype: String,
    /// Longest prompt + answer, tokens.
    pub max_model_len: Option<usize>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions { path: PathBuf::new(), dtype: "auto".into(), max_model_len: None }
    }
}

/// Where a role's model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// In this process.
    #[default]
    Native,
    /// In this process, by mistral.rs.
    Mistralrs,
    /// Behind OpenAI-compatible endpoints.
    Remote,
}

/// `[roles.teacher]`, `[roles.student]`, and the model of a reward. All fields but the first two belong to `remote`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleOptions {
    /// Where the model runs.
    #[serde(default)]
    pub backend: Backend,
    /// Name under `[models]`, or with `remote` its name at the endpoints.
    pub model: String,
    /// The endpoint: what `/chat/completions` comes after, e.g. `http://host:8000/v1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Or several that serve the same model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Environment variable that holds the key, sent as a bearer token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// Seconds before an answer, or the next piece of a stream, is given up; 300 by default.
    #[serde(default, alias = "timeout", skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<f64>,
    /// Tries after the first; 4 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_retries: Option<usize>,
    /// Requests at once to each endpoint; 16 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_concurrency: Option<usize>,
    /// Seconds a job waits for an endpoint without finishing a row before it is paused; 600 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience_seconds: Option<f64>,
}

impl RoleOptions {
    /// The model of that name under `[models]`.
    pub fn native(model: impl Into<String>) -> Self {
        RoleOptions { model: model.into(), ..RoleOptions::default() }
    }

    /// Whether the model runs elsewhere.
    pub fn is_remote(&self) -> bool {
        self.backend == Backend::Remote
    }

    /// Whether each field is of use to the backend; `role` is the key under `[roles]`.
    pub fn check(&self, role: &str) -> Result<()> {
        let given = [
            ("url", self.url.is_some()),
            ("urls", !self.urls.is_empty()),
            ("api_key_env", self.api_key_env.is_some()),
            ("timeout_seconds", self.timeout_seconds.is_some()),
            ("max_retries", self.max_retries.is_some()),
            ("max_concurrency", self.max_concurrency.is_some()),
            ("patience_seconds", self.patience_seconds.is_some()),
        ];
        let wrong = |key: &str, why: &str| Err(Error::invalid(format!("roles.{role}.{key}"), why));
        match (self.backend, given.iter().find(|(_, given)| *given)) {
            (Backend::Native | Backend::Mistralrs, Some((key, _))) => wrong(key, "belongs to `backend = \"remote\"`"),
            (Backend::Remote, _) if self.url.is_some() != self.urls.is_empty() => {
                wrong("urls", "a remote role needs `url`, or several as `urls`")
            }
            _ => Ok(()),
        }
    }

    /// The same for a role that has to run on this server's own engine; `why` says why it has to.
    pub fn check_native(&self, role: &str, why: &str) -> Result<()> {
        if self.backend != Backend::Native {
            return Err(Error::invalid(format!("roles.{role}.backend"), format!("must be `native`: {why}")));
        }
        self.check(role)
    }
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
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JudgeOptions {
    /// The model that judges.
    #[serde(flatten)]
    pub role: RoleOptions,
    /// Used where the behaviour brings none; a general one where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rubric: Option<Rubric>,
}

// Not derived: serde cannot refuse unknown fields beside flattened ones.
impl<'de> Deserialize<'de> for JudgeOptions {
    fn deserialize<D: Deserializer<'de>>(source: D) -> std::result::Result<Self, D::Error> {
        let mut fields = serde_json::Map::deserialize(source)?;
        let rubric = fields.remove("rubric").unwrap_or_default();
        let rubric = serde_json::from_value(rubric).map_err(|error| D::Error::custom(format!("rubric: {error}")))?;
        let role = serde_json::from_value(fields.into()).map_err(D::Error::custom)?;
        Ok(JudgeOptions { role, rubric })
    }
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
    /// Drafts.
    pub speculative_config: SpeculativeOptions,
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
    /// Share of the device that training keeps while serving is busy.
    pub training_share: f64,
}

impl RolesOptions {
    /// Whether every role can be what it is said to be.
    pub fn check(&self) -> Result<()> {
        self.speculative_config.check()?;
        self.teacher.check("teacher")?;
        self.student.check_native("student", "the student is trained where it is served, by this server")?;
        match &self.reward {
            RewardOptions::Judge(judge) => judge.role.check("reward"),
            RewardOptions::Classifier(role) => {
                role.check_native("reward", "a classifier's score is no chat; a `judge` can be `mistralrs` or `remote`")
            }
            RewardOptions::Rules { .. } | RewardOptions::Http(_) => Ok(()),
        }
    }
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions { kind: "auto".into(), threads: None, memory: None }
    }
}

impl Default for KvCacheOptions {
    fn default() -> Self {
        KvCacheOptions {
            block_size: 16,
            memory: "auto".into(),
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
