//! The body of `/v1/responses`: what it asks for, and what of it stands in the answer.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::input::Input;
use crate::engine::request::SamplingParams;
use crate::error::{Code, Error, Result};
use crate::server::answer::Head;
use crate::server::constrain::{Asked, schema_form};
use crate::server::reply::read_from_objects_only;
use crate::server::routes::chat::template_variables;
use crate::server::sampling::Sampling;
use crate::server::tools::FlatTool;
use crate::text::Constraint;

/// What adds the log-probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";

/// Form of the text.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct TextOptions {
    /// `text` (the default), `json_object`, or `json_schema` with its `schema`, which is enforced.
    #[schema(value_type = Option<Object>)]
    pub(crate) format: Option<Map<String, Value>>,
}

read_from_objects_only!(TextOptions);

/// What to do with a conversation that is too long.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Truncation {
    /// Leave out the oldest turns.
    Auto,
    /// Refuse it.
    #[default]
    Disabled,
}

/// Body of a response, besides the sampling fields.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ResponseRequest {
    /// `teacher`, `reward`, `student`, or an adapter's name.
    pub(crate) model: String,
    /// What is said: a text, which is the user's, or items.
    #[schema(value_type = Object)]
    pub(crate) input: Input,
    /// What the model is told first; not carried on to the next response.
    pub(crate) instructions: Option<String>,
    /// The response to go on from, with all that led to it.
    pub(crate) previous_response_id: Option<String>,
    /// Most tokens to generate.
    pub(crate) max_output_tokens: Option<usize>,
    /// Functions the model may call.
    pub(crate) tools: Option<Vec<FlatTool>>,
    /// Whether it may, or must, and which.
    #[schema(value_type = Option<Object>)]
    pub(crate) tool_choice: Option<Value>,
    /// Several calls in one turn (the default).
    pub(crate) parallel_tool_calls: Option<bool>,
    /// Form of the text.
    pub(crate) text: Option<TextOptions>,
    /// `message.output_text.logprobs` adds log-probabilities; the rest has no effect.
    pub(crate) include: Option<Vec<String>>,
    /// Alternatives per token, with log-probabilities.
    #[schema(maximum = 20)]
    pub(crate) top_logprobs: Option<usize>,
    /// Keep the response so that it can be fetched and gone on from (the default).
    pub(crate) store: Option<bool>,
    /// The caller's notes, echoed.
    #[schema(value_type = Option<Object>)]
    pub(crate) metadata: Option<Map<String, Value>>,
    /// What to do with a conversation that is too long.
    pub(crate) truncation: Option<Truncation>,
    /// `effort` goes to the template, as `reasoning_effort` and `enable_thinking`; the rest has no effect.
    #[schema(value_type = Option<Object>)]
    pub(crate) reasoning: Option<Map<String, Value>>,
    /// Only `false`.
    pub(crate) background: Option<bool>,
    /// Extra variables of the template.
    #[schema(value_type = Option<Object>)]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    /// Refused: not there.
    #[schema(value_type = Option<Object>)]
    pub(crate) conversation: Option<Value>,
    /// Refused: not there.
    #[schema(value_type = Option<Object>)]
    pub(crate) prompt: Option<Value>,
}

impl ResponseRequest {
    /// What is refused, and ranges.
    pub(super) fn check(&self, sampling: &Sampling) -> Result<()> {
        let unsupported = |field: &str, text: &str| Err(Error::new(Code::UnsupportedParameter, text).at(field));
        if self.background == Some(true) {
            return unsupported("background", "`background` is not supported: stream the response, or wait for it");
        }
        if self.conversation.is_some() {
            return unsupported("conversation", "`conversation` is not supported: go on with `previous_response_id`");
        }
        if self.prompt.is_some() {
            return unsupported("prompt", "`prompt` templates are not supported");
        }
        let placeless = [
            ("prompt_logprobs", sampling.prompt_logprobs.is_some()),
            ("return_token_ids", sampling.return_token_ids == Some(true)),
        ];
        if let Some((field, _)) = placeless.iter().find(|(_, asked)| *asked) {
            return unsupported(field, &format!("`{field}` is not supported: a response has no place for them"));
        }
        for (field, count) in [("n", sampling.n()?), ("best_of", sampling.best_of(1)?)] {
            if count != 1 {
                return Err(Error::invalid(field, "a response has one answer"));
            }
        }
        for (field, most) in [("max_output_tokens", self.max_output_tokens), ("max_tokens", sampling.max_tokens)] {
            if most == Some(0) {
                return Err(Error::invalid(field, format!("`{field}` must be at least 1")));
            }
        }
        if self.top_logprobs.is_some_and(|top| top > 20) {
            return Err(Error::invalid("top_logprobs", "`top_logprobs` must be at most 20"));
        }
        Ok(())
    }

    /// What the text must be.
    pub(super) fn asked(&self, sampling: &Sampling) -> Result<Option<Asked>> {
        let format = self.format();
        let field = "text.format.schema";
        let schema = format.get("schema").map(|schema| schema_form(field, schema)).transpose()?.flatten();
        let own = match format["type"].as_str() {
            Some("text") => None,
            Some("json_object") => Some(("text.format", Constraint::JsonObject)),
            Some("json_schema") => {
                let missing = || Error::invalid(field, format!("`{field}` is missing"));
                Some((field, Constraint::JsonSchema(schema.ok_or_else(missing)?)))
            }
            _ => {
                let text = "the `type` of `text.format` is `text`, `json_object` or `json_schema`";
                return Err(Error::invalid("text.format", text));
            }
        };
        match (own, sampling.asked()?) {
            (Some(_), Some((field, _))) => {
                Err(Error::invalid(field, format!("`text.format` and `{field}` both say what the answer must be")))
            }
            (own, other) => Ok(own.or(other)),
        }
    }

    /// Log-probabilities with so many alternatives, where they are asked for.
    pub(super) fn logprobs(&self) -> Option<usize> {
        let asked = self.include.iter().flatten().any(|what| what == LOGPROBS);
        asked.then_some(self.top_logprobs.unwrap_or(0))
    }

    /// Whether it is kept.
    pub(super) fn stores(&self) -> bool {
        self.store.unwrap_or(true)
    }

    /// What the template can read besides the turns.
    pub(super) fn variables(&self) -> Map<String, Value> {
        let effort = self.reasoning.as_ref().and_then(|reasoning| reasoning.get("effort")?.as_str());
        template_variables(self.chat_template_kwargs.clone(), None, effort)
    }

    /// Form of the text, as it was asked for.
    pub(super) fn format(&self) -> Value {
        let format = self.text.as_ref().and_then(|text| text.format.clone());
        format.map_or_else(|| json!({"type": "text"}), Value::Object)
    }

    /// The object, before there is an answer.
    pub(super) fn response(&self, head: &Head, params: &SamplingParams) -> Value {
        let tools = self.tools.iter().flatten().map(|tool| {
            json!({"type": tool.kind, "name": tool.name, "description": tool.description,
                "parameters": tool.parameters, "strict": tool.strict})
        });
        let reasoning = |key: &str| self.reasoning.as_ref().and_then(|reasoning| reasoning.get(key));
        let mut response = json!({
            "id": head.id,
            "object": head.object,
            "created_at": head.created,
            "status": "in_progress",
            "model": head.model,
            "output": [],
            "error": null,
            "incomplete_details": null,
            "instructions": self.instructions,
            "previous_response_id": self.previous_response_id,
            "max_output_tokens": params.max_tokens,
            "temperature": as_written(params.temperature),
            "top_p": as_written(params.top_p),
            "top_logprobs": self.top_logprobs.unwrap_or(0),
            "tools": tools.collect::<Vec<_>>(),
            "tool_choice": self.tool_choice.clone().unwrap_or_else(|| json!("auto")),
            "parallel_tool_calls": self.parallel_tool_calls.unwrap_or(true),
            "text": {"format": self.format()},
            "reasoning": {"effort": reasoning("effort"), "summary": reasoning("summary")},
            "truncation": if self.truncation == Some(Truncation::Auto) { "auto" } else { "disabled" },
            "background": false,
            "store": self.stores(),
            "metadata": self.metadata.clone().unwrap_or_default(),
            "usage": null,
        });
        if let Value::Object(response) = &mut response {
            response.extend(head.maker());
        }
        response
    }
}

/// The number with its own digits: 0.7 as f64 has more.
fn as_written(number: f32) -> f64 {
    number.to_string().parse().unwrap_or_else(|_| f64::from(number))
}
