//! What `/v1/responses` sends. These bodies are put together while tokens come; the tests in `tests/sdk` hold what is sent against
//! these types.

#![expect(dead_code, reason = "only the schemas of these types are used")]

use utoipa::ToSchema;

use super::replies::ChatToken;
use crate::server::routes::responses::Truncation;

/// A response.
#[derive(ToSchema)]
pub(super) struct ResponseObject {
    /// `resp_…`.
    pub(super) id: String,
    /// `response`.
    pub(super) object: String,
    /// Unix seconds.
    pub(super) created_at: u64,
    /// Where it is.
    pub(super) status: ResponseStatus,
    /// The model asked for.
    pub(super) model: String,
    /// Messages and calls, in their order.
    pub(super) output: Vec<OutputItem>,
    /// Why it failed.
    #[schema(required)]
    pub(super) error: Option<ResponseError>,
    /// Why it is incomplete.
    #[schema(required)]
    pub(super) incomplete_details: Option<IncompleteDetails>,
    /// The request's.
    #[schema(required)]
    pub(super) instructions: Option<String>,
    /// The response it goes on from.
    #[schema(required)]
    pub(super) previous_response_id: Option<String>,
    /// The request's.
    #[schema(required)]
    pub(super) max_output_tokens: Option<usize>,
    /// As it was used.
    pub(super) temperature: f64,
    /// As it was used.
    pub(super) top_p: f64,
    /// The request's.
    pub(super) top_logprobs: usize,
    /// The request's.
    #[schema(value_type = Vec<Object>)]
    pub(super) tools: (),
    /// The request's.
    pub(super) tool_choice: (),
    /// The request's.
    pub(super) parallel_tool_calls: bool,
    /// Form of the text.
    #[schema(value_type = Object)]
    pub(super) text: (),
    /// The request's.
    #[schema(value_type = Object)]
    pub(super) reasoning: (),
    /// The request's.
    pub(super) truncation: Truncation,
    /// `false`.
    pub(super) background: bool,
    /// Whether it can be fetched and gone on from.
    pub(super) store: bool,
    /// The request's.
    #[schema(value_type = Object)]
    pub(super) metadata: (),
    /// Tokens counted; null until the end.
    #[schema(required)]
    pub(super) usage: Option<ResponseUsage>,
    /// Changes with the adapter.
    pub(super) system_fingerprint: String,
    /// Version of the adapter that answered; 0 is the base.
    pub(super) adapter_version: u64,
    /// Content hash of that adapter.
    #[schema(required)]
    pub(super) adapter_generation: Option<String>,
    /// Only the reward role: the score of the last assistant message.
    #[schema(nullable = false)]
    pub(super) reward: Option<f64>,
}

/// Where a response is.
#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum ResponseStatus {
    /// Being made.
    InProgress,
    /// Whole.
    Completed,
    /// Cut at its limit.
    Incomplete,
    /// Failed.
    Failed,
}

/// Why a response failed.
#[derive(ToSchema)]
pub(super) struct ResponseError {
    /// `server_error` or `rate_limit_exceeded`.
    pub(super) code: String,
    /// What went wrong.
    pub(super) message: String,
}

/// Why a response is incomplete.
#[derive(ToSchema)]
pub(super) struct IncompleteDetails {
    /// `max_output_tokens`.
    pub(super) reason: String,
}

/// A message or a call.
#[derive(ToSchema)]
pub(super) struct OutputItem {
    /// `msg_…` or `fc_…`.
    pub(super) id: String,
    /// `message` or `function_call`.
    #[schema(rename = "type")]
    pub(super) kind: String,
    /// `in_progress`, `completed` or `incomplete`.
    pub(super) status: String,
    /// Of a message: `assistant`.
    #[schema(nullable = false)]
    pub(super) role: Option<String>,
    /// Of a message.
    #[schema(nullable = false)]
    pub(super) content: Option<Vec<OutputPart>>,
    /// Of a call: what its output names.
    #[schema(nullable = false)]
    pub(super) call_id: Option<String>,
    /// Of a call: the function.
    #[schema(nullable = false)]
    pub(super) name: Option<String>,
    /// Of a call: the text of a JSON object.
    #[schema(nullable = false)]
    pub(super) arguments: Option<String>,
}

/// Text of a message.
#[derive(ToSchema)]
pub(super) struct OutputPart {
    /// `output_text`.
    #[schema(rename = "type")]
    pub(super) kind: String,
    /// The text; the reward role writes `reward:<number>`.
    pub(super) text: String,
    /// Always empty.
    #[schema(value_type = Vec<Object>)]
    pub(super) annotations: (),
    /// Where asked for; the reward role always sends its score here.
    pub(super) logprobs: Vec<ChatToken>,
}

/// Tokens counted.
#[derive(ToSchema)]
pub(super) struct ResponseUsage {
    /// Of the prompt.
    pub(super) input_tokens: usize,
    /// Of the prompt, by origin.
    pub(super) input_tokens_details: InputTokens,
    /// Of the answer.
    pub(super) output_tokens: usize,
    /// Of the answer, by kind.
    pub(super) output_tokens_details: OutputTokens,
    /// Both.
    pub(super) total_tokens: usize,
}

/// Prompt tokens by origin.
#[derive(ToSchema)]
pub(super) struct InputTokens {
    /// Found in the prefix cache.
    pub(super) cached_tokens: usize,
    /// Always 0: keeping them costs nothing.
    pub(super) cache_write_tokens: usize,
}

/// Answer tokens by kind.
#[derive(ToSchema)]
pub(super) struct OutputTokens {
    /// Always 0.
    pub(super) reasoning_tokens: usize,
}

/// An event of a response's stream; what else it has depends on its type, as with OpenAI. The first is `response.created`, the last
/// `response.completed`, `response.incomplete` or `response.failed` with the whole `response`.
#[derive(ToSchema)]
pub(super) struct ResponseEvent {
    /// `response.…`.
    #[schema(rename = "type")]
    pub(super) kind: String,
    /// From 0.
    pub(super) sequence_number: u64,
}

/// A response that is forgotten.
#[derive(ToSchema)]
pub(super) struct ResponseDeleted {
    /// Its id.
    pub(super) id: String,
    /// `response`.
    pub(super) object: String,
    /// `true`.
    pub(super) deleted: bool,
}

/// Items of a response's own request.
#[derive(ToSchema)]
pub(super) struct InputItemList {
    /// `list`.
    pub(super) object: String,
    /// The items.
    #[schema(value_type = Vec<Object>)]
    pub(super) data: (),
    /// Id of the first one.
    #[schema(required)]
    pub(super) first_id: Option<String>,
    /// Id of the last one, for `after`.
    #[schema(required)]
    pub(super) last_id: Option<String>,
    /// Whether more follow.
    pub(super) has_more: bool,
}
