//! Sampling fields that chat and text completions share, as OpenAI and vLLM name them.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::constrain::{self, Asked, ResponseFormat, StructuredOutputs};
use super::reply::{blocking, read_from_objects_only};
use crate::engine::request::SamplingParams;
use crate::error::{Code, Error, Result};
use crate::roles::{GenerationDefaults, Target};
use crate::text::Tokenizer;

/// Most words of `bad_words`: each is looked for at every token.
const MOST_BAD_WORDS: usize = 1000;
/// Most bytes of one.
const LONGEST_BAD_WORD: usize = 4096;
/// Most bytes of all: every choice has a copy of their tokens.
const MOST_BAD_BYTES: usize = 256 << 10;

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

/// Which side of a long prompt goes.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum TruncationSide {
    /// The first tokens go.
    #[default]
    Left,
    /// The last ones.
    Right,
}

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
    /// Answers to generate, of which the `n` with the highest mean log-probability are given.
    #[schema(minimum = 1, maximum = 128)]
    pub(super) best_of: Option<usize>,
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
    /// Neither an end of text nor the end of a stop string among so many tokens.
    pub(super) min_tokens: Option<usize>,
    /// Token ids that end the text.
    pub(super) stop_token_ids: Option<Vec<u32>>,
    /// Go on past the end of text.
    pub(super) ignore_eos: Option<bool>,
    /// Leave special tokens out of the text (the default).
    pub(super) skip_special_tokens: Option<bool>,
    /// Leave the stop string, or the text of the stop token, in the text.
    pub(super) include_stop_str_in_output: Option<bool>,
    /// Add the token ids of prompt and answers.
    pub(super) return_token_ids: Option<bool>,
    /// Log-probabilities of the prompt's tokens with so many alternatives.
    #[schema(maximum = 20)]
    pub(super) prompt_logprobs: Option<usize>,
    /// What the answer must be.
    pub(super) response_format: Option<ResponseFormat>,
    /// What the answer must be, in vLLM's words.
    pub(super) structured_outputs: Option<StructuredOutputs>,
    /// Words that may not come.
    pub(super) bad_words: Option<Vec<String>>,
    /// The only token ids that may come.
    pub(super) allowed_token_ids: Option<Vec<u32>>,
    /// Keep only so many of the prompt's tokens; -1 keeps what leaves room for the answer.
    #[schema(minimum = -1)]
    pub(super) truncate_prompt_tokens: Option<i64>,
    /// Which of them: the last ones where the left side goes (the default).
    pub(super) truncation_side: Option<TruncationSide>,
    /// Lower goes first.
    pub(super) priority: Option<i64>,
    /// Share cached prompts only with requests of the same salt.
    pub(super) cache_salt: Option<String>,
}

/// Fields that are refused wherever they mean something, because ignoring them would give wrong answers.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Refused {
    functions: Option<Value>,
    function_call: Option<Value>,
    audio: Option<Value>,
    modalities: Option<Vec<String>>,
    suffix: Option<String>,
    use_beam_search: Option<bool>,
    logits_processors: Option<Value>,
    logprob_token_ids: Option<Value>,
    return_tokens_as_token_ids: Option<bool>,
    repetition_detection: Option<Value>,
    thinking_token_budget: Option<Value>,
    return_weight_versions: Option<bool>,
    prompt_embeds: Option<Value>,
    guided_json: Option<Value>,
    guided_regex: Option<Value>,
    guided_choice: Option<Value>,
    guided_grammar: Option<Value>,
}

impl Refused {
    /// Of a remote role the endpoint says itself what it refuses.
    pub(super) fn check(&self, target: &Target) -> Result<()> {
        if target.remote().is_some() && target.reward.is_none() {
            return Ok(());
        }
        let set = |value: &Option<Value>| value.as_ref().is_some_and(|value| !value.is_null());
        let fields = [
            ("functions", set(&self.functions)),
            ("function_call", set(&self.function_call)),
            ("audio", set(&self.audio)),
            ("modalities", self.modalities.as_ref().is_some_and(|kinds| kinds.iter().any(|kind| kind != "text"))),
            ("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
            ("use_beam_search", self.use_beam_search == Some(true)),
            ("logits_processors", set(&self.logits_processors)),
            ("logprob_token_ids", set(&self.logprob_token_ids)),
            ("return_tokens_as_token_ids", self.return_tokens_as_token_ids == Some(true)),
            ("repetition_detection", set(&self.repetition_detection)),
            ("thinking_token_budget", set(&self.thinking_token_budget)),
            ("return_weight_versions", self.return_weight_versions == Some(true)),
            ("prompt_embeds", set(&self.prompt_embeds)),
            // vLLM's old names for what is in `structured_outputs` now.
            ("guided_json", set(&self.guided_json)),
            ("guided_regex", set(&self.guided_regex)),
            ("guided_choice", set(&self.guided_choice)),
            ("guided_grammar", set(&self.guided_grammar)),
        ];
        match fields.iter().find(|(_, refused)| *refused) {
            None => Ok(()),
            Some((field, _)) => {
                let advice = if field.starts_with("guided_") { ": use `structured_outputs`" } else { "" };
                let text = format!("`{field}` is not supported by this server{advice}");
                Err(Error::new(Code::UnsupportedParameter, text).at(*field))
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

    /// Answers to generate, at least `n`.
    pub(super) fn best_of(&self, n: usize) -> Result<usize> {
        let best_of = self.best_of.unwrap_or(n);
        if !(n..=128).contains(&best_of) {
            return Err(Error::invalid("best_of", format!("`best_of` must be between `n` and 128, got {best_of}")));
        }
        if best_of > n && self.streams() {
            return Err(Error::invalid("best_of", "`best_of` cannot be streamed: the best is known at the end"));
        }
        Ok(best_of)
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

    /// What the answer must be, if anything.
    pub(super) fn asked(&self) -> Result<Option<Asked>> {
        let format = self.response_format.as_ref().map(ResponseFormat::asked).transpose()?.flatten();
        let structured = self.structured_outputs.as_ref().map(StructuredOutputs::asked).transpose()?.flatten();
        if format.is_some() && structured.is_some() {
            let text = "`structured_outputs` and `response_format` both say what the answer must be: send one";
            return Err(Error::invalid("structured_outputs", text));
        }
        Ok(format.or(structured))
    }

    /// Adds to the parameters what needs the model's tokenizer: the words that may not come, and the grammar, compiled.
    pub(super) async fn constrain(
        &self,
        tokenizer: &Arc<Tokenizer>,
        asked: Option<Asked>,
        params: &mut SamplingParams,
    ) -> Result<()> {
        if let Some(words) = self.bad_words()? {
            let tokenizer = tokenizer.clone();
            let runs = move || words.iter().map(|word| runs_of(&tokenizer, word)).collect::<Result<Vec<_>>>();
            params.bad_words.extend(blocking(runs).await?.into_iter().flatten());
        }
        if let Some(asked) = asked {
            params.grammar = Some(constrain::compile(tokenizer.clone(), asked).await?);
        }
        Ok(())
    }

    /// The words that may not come, where there are some and not too many.
    fn bad_words(&self) -> Result<Option<Vec<String>>> {
        let words = self.bad_words.as_deref().unwrap_or_default();
        let bytes: usize = words.iter().map(String::len).sum();
        let longest = words.iter().map(String::len).max().unwrap_or(0);
        if words.len() > MOST_BAD_WORDS || longest > LONGEST_BAD_WORD || bytes > MOST_BAD_BYTES {
            let text = format!(
                "`bad_words` takes at most {MOST_BAD_WORDS} words of at most {LONGEST_BAD_WORD} bytes each, {MOST_BAD_BYTES} together"
            );
            return Err(Error::invalid("bad_words", text));
        }
        Ok((!words.is_empty()).then(|| words.to_vec()))
    }

    /// What is kept of the prompt's tokens, where fewer are asked for.
    pub(super) fn truncate(&self, mut prompt: Vec<u32>, target: &Target, params: &SamplingParams) -> Result<Vec<u32>> {
        let field = "truncate_prompt_tokens";
        let context = target.max_model_len()?;
        let kept = match self.truncate_prompt_tokens.map(usize::try_from) {
            None => return Ok(prompt),
            Some(Err(_)) => context.saturating_sub(params.max_tokens.unwrap_or(1)).max(1),
            Some(Ok(kept)) if (1..=context).contains(&kept) => kept,
            Some(Ok(kept)) => {
                let text = format!("`{field}` must be -1 or between 1 and the context's {context} tokens, got {kept}");
                return Err(Error::invalid(field, text));
            }
        };
        match self.truncation_side.unwrap_or_default() {
            TruncationSide::Left => drop(prompt.drain(..prompt.len().saturating_sub(kept))),
            TruncationSide::Right => prompt.truncate(kept),
        }
        Ok(prompt)
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
            prompt_logprobs_start: 0,
            grammar: None,
            bad_words: Vec::new(),
            allowed_token_ids: self.allowed_token_ids.clone(),
            priority: self.priority.unwrap_or(0),
            cache_salt: self.cache_salt.clone(),
        };
        params.check()?;
        if self.streams() && self.prompt_logprobs.is_some() {
            return Err(Error::invalid("prompt_logprobs", "`prompt_logprobs` cannot be streamed"));
        }
        if self.truncate_prompt_tokens.is_some_and(|kept| kept < -1) {
            return Err(Error::invalid("truncate_prompt_tokens", "`truncate_prompt_tokens` must be -1 or more"));
        }
        Ok(params)
    }
}

/// A word's tokens at the start of a text and, where that is another single run of the same length, in the middle of one
/// (vLLM's rule).
fn runs_of(tokenizer: &Tokenizer, word: &str) -> Result<Vec<Vec<u32>>> {
    let word = word.trim_start();
    if word.is_empty() {
        return Err(Error::invalid("bad_words", "`bad_words` has an empty word"));
    }
    let (first, inner) = (tokenizer.encode(word, false)?, tokenizer.encode(&format!(" {word}"), false)?);
    let differs = inner.first() != first.first() && inner.len() == first.len();
    Ok(if differs { vec![first, inner] } else { vec![first] })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bad_words_have_a_size() {
        let read = |words: Vec<String>| Sampling { bad_words: Some(words), ..Sampling::default() }.bad_words();
        for fits in [vec!["a".repeat(LONGEST_BAD_WORD); 64], vec!["a".into(); MOST_BAD_WORDS]] {
            assert_eq!(read(fits.clone()).unwrap(), Some(fits));
        }
        assert_eq!(read(Vec::new()).unwrap(), None);
        for not in [
            vec!["a".into(); MOST_BAD_WORDS + 1],
            vec!["é".repeat(LONGEST_BAD_WORD / 2 + 1)],
            vec!["a".repeat(LONGEST_BAD_WORD); 65],
        ] {
            assert_eq!(read(not).unwrap_err().param.as_deref(), Some("bad_words"));
        }
    }
}
