//! What the completion routes send. These bodies are put together piece by piece while tokens come;
//! the tests in `tests/sdk` hold what is sent against these types.

#![expect(dead_code, reason = "only the schemas of these types are used")]

use std::collections::BTreeMap;

use utoipa::ToSchema;

/// Who answers.
#[derive(ToSchema)]
pub(super) struct Maker {
    /// The model asked for.
    pub(super) model: String,
    /// Changes with the adapter.
    pub(super) system_fingerprint: String,
    /// Version of the adapter that answers; 0 is the base.
    pub(super) adapter_version: u64,
    /// Content hash of that adapter.
    #[schema(required)]
    pub(super) adapter_generation: Option<String>,
}

/// A chat completion.
#[derive(ToSchema)]
pub(super) struct ChatCompletion {
    /// `chatcmpl-…`.
    pub(super) id: String,
    /// `chat.completion`.
    pub(super) object: String,
    /// Unix seconds.
    pub(super) created: u64,
    /// Who answers.
    #[serde(flatten)]
    pub(super) maker: Maker,
    /// The answers.
    pub(super) choices: Vec<ChatChoice>,
    /// Tokens counted.
    pub(super) usage: CompletionUsage,
    /// Only the reward role: the score of the last assistant message.
    #[schema(nullable = false)]
    pub(super) reward: Option<f64>,
    /// With `return_token_ids`.
    #[schema(nullable = false)]
    pub(super) prompt_token_ids: Option<Vec<u32>>,
    /// With `prompt_logprobs`: for each prompt token its alternatives by id; the first token has none.
    #[schema(nullable = false)]
    pub(super) prompt_logprobs: Option<Vec<Option<BTreeMap<String, PromptLogprob>>>>,
    /// The request's `metadata`.
    #[schema(value_type = Option<Object>, nullable = false)]
    pub(super) metadata: Option<()>,
}

/// One answer.
#[derive(ToSchema)]
pub(super) struct ChatChoice {
    /// Which, from 0.
    pub(super) index: usize,
    /// The answer.
    pub(super) message: AnswerMessage,
    /// Where asked for; the reward role always sends its score here.
    #[schema(required)]
    pub(super) logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub(super) finish_reason: FinishedFor,
    /// The stop string or stop token id that was found.
    #[schema(required)]
    pub(super) stop_reason: Option<StopFound>,
    /// With `return_token_ids`.
    #[schema(nullable = false)]
    pub(super) token_ids: Option<Vec<u32>>,
}

/// The assistant's turn.
#[derive(ToSchema)]
pub(super) struct AnswerMessage {
    /// `assistant`.
    pub(super) role: String,
    /// The text; the reward role writes `reward:<number>`. Null where there are only calls.
    #[schema(required)]
    pub(super) content: Option<String>,
    /// Always null.
    #[schema(required)]
    pub(super) refusal: Option<String>,
    /// The calls, where there are some.
    #[schema(nullable = false)]
    pub(super) tool_calls: Option<Vec<ToolCalled>>,
}

/// A call.
#[derive(ToSchema)]
pub(super) struct ToolCalled {
    /// `call_…`; the result names it.
    pub(super) id: String,
    /// `function`.
    #[schema(rename = "type")]
    pub(super) kind: String,
    /// What is called.
    pub(super) function: FunctionCalled,
}

/// A function with its arguments.
#[derive(ToSchema)]
pub(super) struct FunctionCalled {
    /// The function.
    pub(super) name: String,
    /// The text of a JSON object.
    pub(super) arguments: String,
}

/// Why an answer ended.
#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinishedFor {
    /// End of text, a stop string or a stop token.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// It made calls.
    ToolCalls,
}

/// What ended an answer.
#[derive(ToSchema)]
#[serde(untagged)]
pub(super) enum StopFound {
    /// A stop string.
    Text(String),
    /// A stop token.
    Token(u32),
}

/// Log-probabilities of an answer's tokens.
#[derive(ToSchema)]
pub(super) struct ChatLogprobs {
    /// One entry a token.
    pub(super) content: Vec<ChatToken>,
    /// Always null.
    #[schema(required)]
    pub(super) refusal: Option<String>,
}

/// A token of the answer.
#[derive(ToSchema)]
pub(super) struct ChatToken {
    /// Its text.
    pub(super) token: String,
    /// Natural log of its probability; the score in the reward role's only entry.
    pub(super) logprob: f64,
    /// Its UTF-8 bytes, which may be part of a character.
    #[schema(required)]
    pub(super) bytes: Option<Vec<u8>>,
    /// The most likely tokens in its place.
    pub(super) top_logprobs: Vec<Alternative>,
}

/// A token that could have been.
#[derive(ToSchema)]
pub(super) struct Alternative {
    /// Its text.
    pub(super) token: String,
    /// Natural log of its probability.
    pub(super) logprob: f64,
    /// Its UTF-8 bytes.
    pub(super) bytes: Vec<u8>,
}

/// A prompt token or an alternative to it.
#[derive(ToSchema)]
pub(super) struct PromptLogprob {
    /// Natural log of its probability.
    pub(super) logprob: f64,
    /// Place in the vocabulary, by likelihood.
    pub(super) rank: usize,
    /// Its text.
    pub(super) decoded_token: String,
}

/// Tokens counted; the prompt once, however many answers there are.
#[derive(ToSchema)]
pub(super) struct CompletionUsage {
    /// Of the prompt.
    pub(super) prompt_tokens: usize,
    /// Of all answers.
    pub(super) completion_tokens: usize,
    /// Both.
    pub(super) total_tokens: usize,
    /// Of the prompt, by origin.
    pub(super) prompt_tokens_details: PromptTokens,
}

/// Prompt tokens by origin.
#[derive(ToSchema)]
pub(super) struct PromptTokens {
    /// Found in the prefix cache.
    pub(super) cached_tokens: usize,
}

/// A piece of a streamed chat completion. Each comes as `data: <json>`; `data: [DONE]` ends the stream.
#[derive(ToSchema)]
pub(super) struct ChatChunk {
    /// The same in every piece.
    pub(super) id: String,
    /// `chat.completion.chunk`.
    pub(super) object: String,
    /// Unix seconds, the same in every piece.
    pub(super) created: u64,
    /// Who answers.
    #[serde(flatten)]
    pub(super) maker: Maker,
    /// One choice; none in the piece with the counts.
    pub(super) choices: Vec<ChatDelta>,
    /// With `include_usage`: null, and the counts in the last piece.
    pub(super) usage: Option<CompletionUsage>,
    /// Only the reward role.
    #[schema(nullable = false)]
    pub(super) reward: Option<f64>,
}

/// What is new of one answer.
#[derive(ToSchema)]
pub(super) struct ChatDelta {
    /// Which answer, from 0.
    pub(super) index: usize,
    /// New text; the role in the first piece.
    pub(super) delta: DeltaMessage,
    /// Of the new tokens, where asked for.
    #[schema(required)]
    pub(super) logprobs: Option<ChatLogprobs>,
    /// Null until the end.
    #[schema(required)]
    pub(super) finish_reason: Option<FinishedFor>,
    /// With `finish_reason`.
    pub(super) stop_reason: Option<StopFound>,
    /// With `return_token_ids`.
    #[schema(nullable = false)]
    pub(super) token_ids: Option<Vec<u32>>,
}

/// New text of an answer.
#[derive(ToSchema)]
pub(super) struct DeltaMessage {
    /// `assistant`, in the first piece.
    #[schema(nullable = false)]
    pub(super) role: Option<String>,
    /// The text.
    #[schema(nullable = false)]
    pub(super) content: Option<String>,
    /// One call: first its id and name, then its arguments.
    #[schema(nullable = false)]
    pub(super) tool_calls: Option<Vec<ToolCallDelta>>,
}

/// What is new of a call.
#[derive(ToSchema)]
pub(super) struct ToolCallDelta {
    /// Which call, from 0.
    pub(super) index: usize,
    /// In the first piece.
    #[schema(nullable = false)]
    pub(super) id: Option<String>,
    /// `function`, in the first piece.
    #[schema(nullable = false, rename = "type")]
    pub(super) kind: Option<String>,
    /// Its name in the first piece, more of its arguments in every one.
    pub(super) function: FunctionDelta,
}

/// What is new of a called function.
#[derive(ToSchema)]
pub(super) struct FunctionDelta {
    /// In the first piece.
    #[schema(nullable = false)]
    pub(super) name: Option<String>,
    /// More of the text of a JSON object.
    pub(super) arguments: String,
}

/// A text completion.
#[derive(ToSchema)]
pub(super) struct Completion {
    /// `cmpl-…`.
    pub(super) id: String,
    /// `text_completion`.
    pub(super) object: String,
    /// Unix seconds.
    pub(super) created: u64,
    /// Who answers.
    #[serde(flatten)]
    pub(super) maker: Maker,
    /// `n` answers of each prompt, prompt by prompt.
    pub(super) choices: Vec<TextChoice>,
    /// Tokens counted.
    pub(super) usage: CompletionUsage,
}

/// One text.
#[derive(ToSchema)]
pub(super) struct TextChoice {
    /// Which, from 0.
    pub(super) index: usize,
    /// The text, after the prompt with `echo`.
    pub(super) text: String,
    /// Where asked for.
    #[schema(required)]
    pub(super) logprobs: Option<TextLogprobs>,
    /// Why it ended.
    pub(super) finish_reason: FinishedFor,
    /// The stop string or stop token id that was found.
    #[schema(required)]
    pub(super) stop_reason: Option<StopFound>,
    /// With `return_token_ids`.
    #[schema(nullable = false)]
    pub(super) token_ids: Option<Vec<u32>>,
    /// With `return_token_ids`.
    #[schema(nullable = false)]
    pub(super) prompt_token_ids: Option<Vec<u32>>,
    /// With `prompt_logprobs`.
    #[schema(nullable = false)]
    pub(super) prompt_logprobs: Option<Vec<Option<BTreeMap<String, PromptLogprob>>>>,
}

/// Four lists with one entry a token.
#[derive(ToSchema)]
pub(super) struct TextLogprobs {
    /// Texts.
    pub(super) tokens: Vec<String>,
    /// Natural logs of their probabilities; the prompt's first token has none.
    pub(super) token_logprobs: Vec<Option<f64>>,
    /// The token and the most likely in its place.
    pub(super) top_logprobs: Vec<Option<BTreeMap<String, f64>>>,
    /// Where they begin in the text, characters.
    pub(super) text_offset: Vec<usize>,
}

/// A piece of a streamed text completion. Each comes as `data: <json>`; `data: [DONE]` ends the stream.
#[derive(ToSchema)]
pub(super) struct CompletionChunk {
    /// The same in every piece.
    pub(super) id: String,
    /// `text_completion`.
    pub(super) object: String,
    /// Unix seconds, the same in every piece.
    pub(super) created: u64,
    /// Who answers.
    #[serde(flatten)]
    pub(super) maker: Maker,
    /// One choice; none in the piece with the counts.
    pub(super) choices: Vec<TextDelta>,
    /// With `include_usage`: null, and the counts in the last piece.
    pub(super) usage: Option<CompletionUsage>,
}

/// What is new of one text.
#[derive(ToSchema)]
pub(super) struct TextDelta {
    /// Which, from 0.
    pub(super) index: usize,
    /// New text.
    pub(super) text: String,
    /// Of the new token, where asked for.
    #[schema(required)]
    pub(super) logprobs: Option<TextLogprobs>,
    /// Null until the end.
    #[schema(required)]
    pub(super) finish_reason: Option<FinishedFor>,
    /// With `finish_reason`.
    pub(super) stop_reason: Option<StopFound>,
    /// With `return_token_ids`.
    #[schema(nullable = false)]
    pub(super) token_ids: Option<Vec<u32>>,
}
