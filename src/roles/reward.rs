//! Reward kinds: judge (expected score), rules, classifier, http.

use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderValue};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use utoipa::ToSchema;

use super::judge::{judge, unreadable};
use super::pool::{address, bearer};
use super::rules::Rule;
use super::{HttpRewardOptions, RewardOptions, Target};
use crate::engine::{SamplingParams, Task};
use crate::error::{Error, Result};
use crate::telemetry::metrics;
use crate::text::{Message, RenderOptions};

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
    kind: Kind,
}

enum Kind {
    Judge { target: Box<Target>, rubric: Rubric },
    Classifier { target: Box<Target> },
    Rules(Vec<Rule>),
    Http(Endpoint),
}

/// The user's own scorer.
struct Endpoint {
    client: reqwest::Client,
    url: reqwest::Url,
    key: Option<HeaderValue>,
    retries: usize,
    places: Semaphore,
}

impl Reward {
    /// Checks the options; `target` is the judge's or classifier's model.
    pub(super) fn new(options: &RewardOptions, target: Option<Target>) -> Result<Self> {
        let target = || {
            target
                .map(Box::new)
                .ok_or_else(|| Error::internal("a reward that needs a model came without. This is a bug."))
        };
        let kind = match options {
            RewardOptions::Judge(judge) => {
                if let Some(rubric) = &judge.rubric {
                    rubric.validate("roles.reward.rubric")?;
                }
                let (target, rubric) = (target()?, judge.rubric.clone().unwrap_or_else(Rubric::general));
                if target.remote().is_some() {
                    rubric.check_afar().map_err(|error| error.at("roles.reward.rubric"))?;
                }
                Kind::Judge { target, rubric }
            }
            RewardOptions::Classifier(classifier) => {
                let target = target()?;
                let labels = target.engine()?.model().config().num_labels;
                if labels != 1 {
                    let message = format!("`{}` has {labels} labels; a classifier reward has one", classifier.model);
                    return Err(Error::invalid("roles.reward.model", message));
                }
                Kind::Classifier { target }
            }
            RewardOptions::Rules { terms } if terms.is_empty() => {
                return Err(Error::invalid("roles.reward.terms", "give at least one term"));
            }
            RewardOptions::Rules { terms } => Kind::Rules(
                terms.iter().enumerate().map(|(index, term)| Rule::new(index, term)).collect::<Result<_>>()?,
            ),
            RewardOptions::Http(http) => Kind::Http(Endpoint::new(http)?),
        };
        Ok(Reward { kind })
    }

    /// `judge`, `classifier`, `rules` or `http`.
    pub fn kind(&self) -> &'static str {
        match &self.kind {
            Kind::Judge { .. } => "judge",
            Kind::Classifier { .. } => "classifier",
            Kind::Rules(_) => "rules",
            Kind::Http(_) => "http",
        }
    }

    /// The model that judges, where there is one.
    pub fn target(&self) -> Option<&Target> {
        match &self.kind {
            Kind::Judge { target, .. } | Kind::Classifier { target } => Some(target),
            Kind::Rules(_) | Kind::Http(_) => None,
        }
    }

    /// Whether a behaviour's rubric can be asked of this judge; other kinds ignore it.
    pub fn can_use(&self, rubric: &Rubric) -> Result<()> {
        match &self.kind {
            Kind::Judge { target, .. } if target.remote().is_some() => rubric.check_afar(),
            _ => Ok(()),
        }
    }

    /// Scores the last assistant turn of a conversation. `rubric` is the behaviour's; kinds other than `judge` ignore it.
    /// An answer that cannot be read as a number is a 422 naming `reward`; it is never a number.
    pub async fn score(&self, messages: &[Message], rubric: Option<&Rubric>) -> Result<Score> {
        let (last, before) = messages
            .split_last()
            .filter(|(last, _)| last.role == "assistant")
            .ok_or_else(|| Error::invalid("messages", "the last turn must be the assistant's: it is what is scored"))?;
        let free = |value: f64| Score { value, prompt_tokens: 0, completion_tokens: 0 };
        let score = match &self.kind {
            Kind::Judge { target, rubric: own } => {
                judge(target, rubric.unwrap_or(own), &as_text(before), &last.content).await?
            }
            Kind::Classifier { target } => {
                let render = RenderOptions { add_generation_prompt: false, ..RenderOptions::default() };
                let ids = target.tokenizer()?.encode_chat(messages, &render)?;
                let mut request = target.request(ids, SamplingParams::default());
                request.task = Task::Score;
                let answer = target.ask(request).await?;
                let value = answer.score.ok_or_else(|| unreadable("the classifier gave no score".into()))?;
                Score { prompt_tokens: answer.usage.prompt_tokens, ..free(f64::from(value)) }
            }
            Kind::Rules(rules) => free(rules.iter().map(|rule| rule.score(&last.content)).sum()),
            Kind::Http(endpoint) => free(endpoint.score(&as_text(before), &last.content).await?),
        };
        if !score.value.is_finite() {
            return Err(unreadable(format!("the score is {}", score.value)));
        }
        metrics().reward_score.observe(score.value);
        Ok(score)
    }
}

/// The turns before the answer as text: the bare turn if there is one, else each with its role.
fn as_text(messages: &[Message]) -> String {
    match messages {
        [only] => only.content.clone(),
        many => many.iter().map(|turn| format!("{}: {}", turn.role, turn.content)).collect::<Vec<_>>().join("\n\n"),
    }
}

impl Endpoint {
    fn new(options: &HttpRewardOptions) -> Result<Self> {
        let field = |key: &str| format!("roles.reward.{key}");
        let url = address(&options.url, &field("url"))?;
        let seconds = options.timeout_seconds.unwrap_or(30.0);
        let timeout = Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|timeout| !timeout.is_zero())
            .ok_or_else(|| Error::invalid(field("timeout_seconds"), "must be above 0"))?;
        if options.concurrency == Some(0) {
            return Err(Error::invalid(field("concurrency"), "must be at least 1"));
        }
        let key = options.api_key_env.as_ref().map(|name| bearer(name, &field("api_key_env"))).transpose()?;
        let client = reqwest::Client::builder()
            .timeout(timeout)
            .build()
            .map_err(|error| Error::internal(format!("cannot make an HTTP client: {error}")))?;
        Ok(Endpoint {
            client,
            url,
            key,
            retries: options.max_retries.unwrap_or(3),
            places: Semaphore::new(options.concurrency.unwrap_or(8).min(Semaphore::MAX_PERMITS)),
        })
    }

    async fn score(&self, prompt: &str, response: &str) -> Result<f64> {
        let _place = self.places.acquire().await.map_err(|error| Error::internal(error.to_string()))?;
        let body = json!({"prompt": prompt, "response": response});
        let mut pause = Duration::from_millis(200);
        for left in (0..=self.retries).rev() {
            let mut request = self.client.post(self.url.clone()).json(&body);
            if let Some(key) = &self.key {
                request = request.header(AUTHORIZATION, key.clone());
            }
            let problem = match request.send().await {
                Ok(reply) if reply.status().is_success() => match reply.json::<Value>().await {
                    Err(error) if error.is_decode() => {
                        return Err(unreadable("the reward endpoint did not answer JSON".into()));
                    }
                    Err(error) => error.without_url().to_string(),
                    Ok(value) => {
                        return value["score"]
                            .as_f64()
                            .filter(|score| score.is_finite())
                            .ok_or_else(|| unreadable("the reward endpoint gave no finite number `score`".into()));
                    }
                },
                Ok(reply) if reply.status().is_server_error() || [408, 429].contains(&reply.status().as_u16()) => {
                    format!("status {}", reply.status().as_u16())
                }
                Ok(reply) => {
                    let status = reply.status().as_u16();
                    return Err(
                        Error::internal(format!("the reward endpoint refused with status {status}")).at("reward")
                    );
                }
                Err(error) => error.without_url().to_string(),
            };
            if left == 0 {
                let tries = self.retries + 1;
                let message = format!("the reward endpoint failed {tries} times, the last time with: {problem}");
                return Err(Error::internal(message).at("reward"));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
        Err(Error::internal("no try was made. This is a bug."))
    }
}
