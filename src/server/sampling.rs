//! Sampling fields that chat and text completions share, as OpenAI and vLLM name them.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::reply::read_from_objects_only;
use crate::engine::request::SamplingParams;
use crate::error::{Code, Error, Result};
use crate::roles::GenerationDefaults;

/// One stop string or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(super) enum Stop {
    One(String),
    Several(Vec<String>),
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(super) struct StreamOptions {
    /// Send one last chunk with the counts.
    #[serde(default)]
    pub(super) include_usage: bool,
    /// Send the counts so far with every chunk.
    #[serde(default)]
    pub(super) continuous_usage_stats: bool,
}

read_from_objects_only!(StreamOptions);

/// The sampling fields of a request body.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(super) struct Sampling {
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    pub(super) temperature: Option<f32>,
    /// Nucleus mass.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub(super) top_p: Option<f32>,
    /// Most likely tokens kept; 0 or -1 keeps all.
    #[schema(minimum = -1)]
    pub(super) top_k: Option<i64>,
    /// Least share of the top token's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub(super) min_p: Option<f32>,
    /// Most tokens to generate.
    pub(super) max_tokens: Option<usize>,
    /// Answers to give.
    #[schema(minimum = 1, maximum = 128)]
    pub(super) n: Option<usize>,
    /// Strings that end the text.
    pub(super) stop: Option<Stop>,
    /// Same seed, same text.
    pub(super) seed: Option<i64>,
    /// Against tokens already there.
    #[schema(minimum = -2, maximum = 2)]
    pub(super) presence_penalty: Option<f32>,
    /// Against tokens by how often they are there.
    #[schema(minimum = -2, maximum = 2)]
    pub(super) frequency_penalty: Option<f32>,
    /// Divides the logits of tokens already there.
    #[schema(exclusive_minimum = 0)]
    pub(super) repetition_penalty: Option<f32>,
    /// Token id → what is added to its logit.
    pub(super) logit_bias: Option<BTreeMap<String, f32>>,
    /// Server-sent events.
    pub(super) stream: Option<bool>,
    /// What the stream carries besides.
    pub(super) stream_options: Option<StreamOptions>,
    /// No end of text before so many tokens.
    pub(super) min_tokens: Option<usize>,
    /// Token ids that end the text.
    pub(super) stop_token_ids: Option<Vec<u32>>,
    /// Go on past the end of text.
    pub(super) ignore_eos: Option<bool>,
    /// Leave special tokens out of the text (the default).
    pub(super) skip_special_tokens: Option<bool>,
    /// Leave the stop string in the text.
    pub(super) include_stop_str_in_output: Option<bool>,
    /// Add the token ids of prompt and answers.
    pub(super) return_token_ids: Option<bool>,
    /// Log-probabilities of the prompt's tokens with so many alternatives.
    #[schema(maximum = 20)]
    pub(super) prompt_logprobs: Option<usize>,
}

/// Fields that are refused wherever they mean something, because ignoring them would give wrong answers.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Refused {
    response_format: Option<Value>,
    structured_outputs: Option<Value>,
    tool_choice: Option<Value>,
    functions: Option<Value>,
    function_call: Option<Value>,
    audio: Option<Value>,
    modalities: Option<Vec<String>>,
    suffix: Option<String>,
    best_of: Option<usize>,
    bad_words: Option<Vec<String>>,
    allowed_token_ids: Option<Vec<u32>>,
    truncate_prompt_tokens: Option<i64>,
}

impl Refused {
    pub(super) fn check(&self, n: usize) -> Result<()> {
        let plain = |value: &Value, allowed: &[&str]| {
            value.as_str().or(value["type"].as_str()).is_some_and(|kind| allowed.contains(&kind))
        };
        let set = |value: &Option<Value>| value.as_ref().is_some_and(|value| !value.is_null());
        let fields = [
            (
                "response_format",
                self.response_format.as_ref().is_some_and(|value| !value.is_null() && !plain(value, &["text"])),
            ),
            ("structured_outputs", set(&self.structured_outputs)),
            (
                "tool_choice",
                self.tool_choice.as_ref().is_some_and(|value| !value.is_null() && !plain(value, &["none", "auto"])),
            ),
            ("functions", set(&self.functions)),
            ("function_call", set(&self.function_call)),
            ("audio", set(&self.audio)),
            ("modalities", self.modalities.as_ref().is_some_and(|kinds| kinds.iter().any(|kind| kind != "text"))),
            ("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
            ("best_of", self.best_of.is_some_and(|best_of| best_of != n)),
            ("bad_words", self.bad_words.as_ref().is_some_and(|words| !words.is_empty())),
            ("allowed_token_ids", self.allowed_token_ids.is_some()),
            ("truncate_prompt_tokens", self.truncate_prompt_tokens.is_some()),
        ];
        match fields.iter().find(|(_, refused)| *refused) {
            None => Ok(()),
            Some((field, _)) => {
                Err(Error::new(Code::UnsupportedParameter, format!("`{field}` is not supported by this server yet"))
                    .at(*field))
            }
        }
    }
}

impl Sampling {
    /// Answers to give.
    pub(super) fn n(&self) -> Result<usize> {
        match self.n {
            None => Ok(1),
            Some(n) if (1..=128).contains(&n) => Ok(n),
            Some(n) => Err(Error::invalid("n", format!("`n` must be between 1 and 128, got {n}"))),
        }
    }

    pub(super) fn streams(&self) -> bool {
        self.stream == Some(true)
    }

    pub(super) fn stream_options(&self) -> Result<StreamOptions> {
        if self.stream_options.is_some() && !self.streams() {
            return Err(Error::invalid("stream_options", "`stream_options` needs `stream: true`"));
        }
        Ok(self.stream_options.unwrap_or_default())
    }

    /// Engine parameters, their ranges checked; what the body leaves out comes from the checkpoint's defaults, then OpenAI's.
    pub(super) fn params(&self, defaults: &GenerationDefaults) -> Result<SamplingParams> {
        let base = SamplingParams::default();
        let mut logit_bias = BTreeMap::new();
        for (id, bias) in self.logit_bias.iter().flatten() {
            let digits = id.bytes().all(|byte| byte.is_ascii_digit());
            let number = id.parse().ok().filter(|_| digits);
            let id = number
                .ok_or_else(|| Error::invalid("logit_bias", format!("`logit_bias`: `{id}` is not a token id")))?;
            logit_bias.insert(id, *bias);
        }
        let top_k = match self.top_k {
            None => defaults.top_k.unwrap_or(0),
            Some(-1) => 0,
            Some(k) => usize::try_from(k)
                .map_err(|_| Error::invalid("top_k", format!("`top_k` must be -1 or more, got {k}")))?,
        };
        let params = SamplingParams {
            temperature: self.temperature.or(defaults.temperature).unwrap_or(base.temperature),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(base.top_p),
            top_k,
            min_p: self.min_p.unwrap_or(base.min_p),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            logit_bias,
            seed: self.seed.map(|seed| seed as u64),
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens.unwrap_or(0),
            stop: match &self.stop {
                None => Vec::new(),
                Some(Stop::One(stop)) => vec![stop.clone()],
                Some(Stop::Several(stops)) => stops.clone(),
            },
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            include_stop_str_in_output: self.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            logprobs: None,
            prompt_logprobs: self.prompt_logprobs,
        };
        params.check()?;
        Ok(params)
    }
}
