//! What goes into the engine and what comes out. No tensor, no channel of HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Code, Error, Result};
use crate::model::Adapter;
use crate::text::Grammar;

/// Most stop strings of a request.
const MOST_STOPS: usize = 16;
/// Most bytes of one: each is looked for at every token.
const LONGEST_STOP: usize = 4096;

/// Sampling parameters, named as vLLM names them; the defaults are OpenAI's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1].
    pub top_p: f32,
    /// Most likely tokens kept; 0 keeps all.
    pub top_k: usize,
    /// Least share of the top token's probability a token needs, in [0, 1].
    pub min_p: f32,
    /// Subtracted once from tokens already generated.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in what was generated.
    pub frequency_penalty: f32,
    /// Divides (or multiplies negative) logits of tokens in prompt and answer; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of token ids.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Same seed, same prompt, same adapter: same tokens, whatever else runs. `None` draws one.
    pub seed: Option<u64>,
    /// Most tokens to generate; `None` goes to the context's end. 0 only reads the prompt.
    pub max_tokens: Option<usize>,
    /// No end-of-text token, and no end of a stop string, among so many.
    pub min_tokens: usize,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Tokens that end the text.
    pub stop_token_ids: Vec<u32>,
    /// Go on past end-of-text tokens.
    pub ignore_eos: bool,
    /// Leave the stop string, or the text of the stop token, in the text.
    pub include_stop_str_in_output: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Log-probability of each token and of so many alternatives.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
    /// The first prompt token that gets them; those before it may come from the prefix cache.
    pub prompt_logprobs_start: usize,
    /// What the text must be; the answer ends where nothing more may follow.
    pub grammar: Option<Arc<Grammar>>,
    /// Runs of tokens that may not come.
    pub bad_words: Vec<Vec<u32>>,
    /// The only tokens that may come.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Lower goes first, and is the last to be put back when the cache is full.
    pub priority: i64,
    /// Share cached blocks only with requests of the same salt: nobody else can find out by timing what was asked.
    pub cache_salt: Option<String>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: BTreeMap::new(),
            seed: None,
            max_tokens: None,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            include_stop_str_in_output: false,
            skip_special_tokens: true,
            logprobs: None,
            prompt_logprobs: None,
            prompt_logprobs_start: 0,
            grammar: None,
            bad_words: Vec::new(),
            allowed_token_ids: None,
            priority: 0,
            cache_salt: None,
        }
    }
}

/// What to do with the prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// Generate text.
    Generate,
    /// One prefill: log-probabilities (over the whole vocabulary, before temperature) of these tokens as the next one.
    NextToken(Vec<u32>),
    /// One prefill: the raw score of the sequence-classification head at the last token.
    Score,
}

/// One unit of work.
#[derive(Clone)]
pub struct Request {
    /// Token ids; at least one.
    pub prompt: Vec<u32>,
    /// How to sample.
    pub params: SamplingParams,
    /// The adapter generation this request keeps to its end; the `Arc` is its lease. `None` is the base.
    pub adapter: Option<Arc<Adapter>>,
    /// What to do.
    pub task: Task,
    /// Role in metrics: `teacher`, `reward`, `student`.
    pub role: &'static str,
}

/// A token with its log-probability and the alternatives asked for, most likely first.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// Natural log, of the model's own distribution: before penalties, grammar, temperature and truncation (vLLM's
    /// `raw_logprobs`).
    pub logprob: f32,
    /// `(id, logprob)`.
    pub top: Vec<(u32, f32)>,
    /// Place in the vocabulary, from 1 on, where it was looked for: of a prompt's tokens.
    pub rank: Option<usize>,
}

/// Why it ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum FinishReason {
    /// End-of-text token, or a stop token (its id) or stop string.
    Stop {
        /// The stop string found.
        text: Option<String>,
        /// The stop token found, where it was asked for by id.
        token: Option<u32>,
    },
    /// `max_tokens` or the context's end.
    #[default]
    Length,
}

/// Tokens counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Of those, found in the prefix cache.
    pub cached_tokens: usize,
    /// Generated tokens.
    pub completion_tokens: usize,
}

/// What a request's stream yields, in order: `Prompt` (only with `prompt_logprobs`), `Token`s, then one of `Done`, `NextToken`,
/// `Score` or `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// Log-probabilities of the prompt's tokens; the first token has none.
    Prompt(Vec<Option<TokenLogprob>>),
    /// A generated token and the text that became certain with it.
    Token {
        /// Token id.
        id: u32,
        /// New text; empty while a character or a possible stop string is incomplete.
        text: String,
        /// With `logprobs`.
        logprob: Option<TokenLogprob>,
    },
    /// The end: text that was held back, reason, counts.
    Done {
        /// Text still to append.
        text: String,
        /// Why.
        reason: FinishReason,
        /// Counts.
        usage: Usage,
    },
    /// Answer to [`Task::NextToken`], in the order asked.
    NextToken(Vec<f32>, Usage),
    /// Answer to [`Task::Score`].
    Score(f32, Usage),
    /// The request failed.
    Failed(Error),
}

/// Events of one request; dropping it cancels the request.
pub type EventStream = tokio::sync::mpsc::UnboundedReceiver<Event>;

impl SamplingParams {
    /// Range checks that need no model, each error naming the field as the API does.
    pub fn check(&self) -> Result<()> {
        let within = |field: &str, value: f32, lowest: f32, highest: f32| {
            if (lowest..=highest).contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(field, format!("`{field}` must be between {lowest} and {highest}, got {value}")))
        };
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0).map_err(|_| {
            Error::invalid("top_p", format!("`top_p` must be above 0 and at most 1, got {}", self.top_p))
        })?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return Err(Error::invalid("repetition_penalty", "`repetition_penalty` must be above 0"));
        }
        self.logit_bias.values().try_for_each(|bias| within("logit_bias", *bias, -100.0, 100.0))?;
        let fits = |stop: &String| (1..=LONGEST_STOP).contains(&stop.len());
        if self.stop.len() > MOST_STOPS || !self.stop.iter().all(fits) {
            let text = format!(
                "`stop` takes at most {MOST_STOPS} strings, none of them empty or longer than {LONGEST_STOP} bytes"
            );
            return Err(Error::invalid("stop", text));
        }
        for (field, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if count.is_some_and(|count| count > 20) {
                return Err(Error::invalid(field, format!("`{field}` must be at most 20")));
            }
        }
        if self.allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::invalid("allowed_token_ids", "`allowed_token_ids` is empty: no token could come"));
        }
        if self.bad_words.iter().any(Vec::is_empty) {
            return Err(Error::invalid("bad_words", "`bad_words` has an empty word"));
        }
        if self.max_tokens.is_some_and(|max| self.min_tokens > max) {
            return Err(Error::invalid("min_tokens", "`min_tokens` is larger than `max_tokens`"));
        }
        Ok(())
    }
}

impl Request {
    /// Range checks, each error naming the field as the API does. `max_model_len` counts prompt and answer.
    pub fn validate(&self, vocab_size: usize, max_model_len: usize) -> Result<()> {
        let params = &self.params;
        params.check()?;
        let known = |field: &str, id: u32| {
            if (id as usize) < vocab_size {
                return Ok(());
            }
            Err(Error::invalid(field, format!("`{field}`: token id {id} is outside the vocabulary of {vocab_size}")))
        };
        let lists = [
            ("stop_token_ids", Some(&params.stop_token_ids)),
            ("allowed_token_ids", params.allowed_token_ids.as_ref()),
        ];
        // Every choice has a copy.
        if let Some((field, _)) = lists.iter().find(|(_, ids)| ids.is_some_and(|ids| ids.len() > vocab_size)) {
            return Err(Error::invalid(*field, format!("`{field}` has more ids than the vocabulary of {vocab_size}")));
        }
        params.logit_bias.keys().try_for_each(|id| known("logit_bias", *id))?;
        params.stop_token_ids.iter().try_for_each(|id| known("stop_token_ids", *id))?;
        params.allowed_token_ids.iter().flatten().try_for_each(|id| known("allowed_token_ids", *id))?;
        params.bad_words.iter().flatten().try_for_each(|id| known("bad_words", *id))?;
        self.prompt.iter().try_for_each(|id| known("prompt", *id))?;
        if let Task::NextToken(ids) = &self.task {
            ids.iter().try_for_each(|id| known("logprob_token_ids", *id))?;
        }
        if self.prompt.is_empty() {
            return Err(Error::invalid("prompt", "the prompt is empty"));
        }
        let answer = match self.task {
            Task::Generate => params.max_tokens.unwrap_or(1),
            Task::NextToken(_) | Task::Score => 0,
        };
        if self.prompt.len().saturating_add(answer) > max_model_len {
            return Err(Error::new(
                Code::ContextLengthExceeded,
                format!(
                    "The context holds {max_model_len} tokens; the prompt has {} and {answer} were asked for. Shorten the prompt or lower `max_tokens`.",
                    self.prompt.len()
                ),
            )
            .at("prompt"));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_strings_have_a_size() {
        let param = |params: SamplingParams| {
            let request = Request { prompt: vec![1], params, adapter: None, task: Task::Generate, role: "student" };
            request.validate(4, 100).err().and_then(|error| error.param)
        };
        let base = SamplingParams::default;
        assert_eq!(param(SamplingParams { stop: vec!["é".repeat(2048); 16], ..base() }), None);
        for stop in [vec!["é".repeat(2049)], vec!["a".into(), String::new()], vec!["a".into(); 17]] {
            assert_eq!(param(SamplingParams { stop, ..base() }).unwrap(), "stop");
        }
        assert_eq!(param(SamplingParams { stop_token_ids: vec![3; 4], ..base() }), None);
        assert_eq!(param(SamplingParams { stop_token_ids: vec![3; 5], ..base() }).unwrap(), "stop_token_ids");
        assert_eq!(param(SamplingParams { allowed_token_ids: Some(vec![0, 1, 2, 3]), ..base() }), None);
        for ids in [vec![3; 5], vec![4], vec![]] {
            assert_eq!(param(SamplingParams { allowed_token_ids: Some(ids), ..base() }).unwrap(), "allowed_token_ids");
        }
    }
}
