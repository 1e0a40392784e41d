//! Turns of a conversation as clients write them.

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::reply::read_from_objects_only;
use super::tools::{GivenCall, earlier_call};
use crate::error::{Error, Result};
use crate::text::Message;

/// Text, parts of text, or null.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message's content; only text is read.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct Part {
    /// `text`; `input_text`, `output_text` and `refusal` are read alike.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The text.
    pub(crate) text: Option<String>,
    /// The text of a `refusal`.
    pub(crate) refusal: Option<String>,
}

/// One turn.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub(crate) role: String,
    /// The text.
    pub(crate) content: Option<Content>,
    /// Name of the speaker.
    pub(crate) name: Option<String>,
    /// Tool calls of an assistant turn.
    pub(crate) tool_calls: Option<Vec<GivenCall>>,
    /// The call a tool turn answers.
    pub(crate) tool_call_id: Option<String>,
}

read_from_objects_only!(Part, ChatMessage);

impl Content {
    /// The parts' texts, one a line; `path` names the content.
    pub(super) fn text(&self, path: &str) -> Result<String> {
        let parts = match self {
            Content::Text(text) => return Ok(text.clone()),
            Content::Parts(parts) => parts,
        };
        let mut joined = Vec::with_capacity(parts.len());
        for (at, part) in parts.iter().enumerate() {
            let text =
                if part.kind == "refusal" { part.refusal.as_ref().or(part.text.as_ref()) } else { part.text.as_ref() };
            match text {
                Some(text) if ["text", "input_text", "output_text", "refusal"].contains(&part.kind.as_str()) => {
                    joined.push(text.as_str());
                }
                _ => {
                    let message = format!("parts of type `{}` cannot be read, only text can", part.kind);
                    return Err(Error::invalid(format!("{path}[{at}]"), message));
                }
            }
        }
        Ok(joined.join("\n"))
    }
}

/// The role as templates know it.
pub(super) fn role(given: &str, path: impl FnOnce() -> String) -> Result<&str> {
    match given {
        "developer" => Ok("system"),
        role @ ("system" | "user" | "assistant" | "tool") => Ok(role),
        other => {
            let text = format!("`{other}` is not a role: system, developer, user, assistant and tool are");
            Err(Error::invalid(path(), text))
        }
    }
}

/// Turns as the template sees them; parts that are not text are a 400.
pub(super) fn messages(given: &[ChatMessage]) -> Result<Vec<Message>> {
    if given.is_empty() {
        return Err(Error::invalid("messages", "`messages` is empty"));
    }
    given.iter().enumerate().map(|(index, message)| one_message(index, message)).collect()
}

fn one_message(index: usize, message: &ChatMessage) -> Result<Message> {
    let role = role(&message.role, || format!("messages[{index}].role"))?.to_owned();
    let path = format!("messages[{index}].content");
    let content = match &message.content {
        Some(content) => content.text(&path)?,
        None if message.tool_calls.is_some() => String::new(),
        None => return Err(Error::invalid(path, "the message has no content")),
    };
    let call = |(at, call): (usize, &GivenCall)| {
        let path = || format!("messages[{index}].tool_calls[{at}].function.arguments");
        let (id, function) = (call.id.as_deref().unwrap_or_default(), &call.function);
        earlier_call(id, &function.name, function.arguments.as_ref(), path)
    };
    let calls: Vec<Value> = message.tool_calls.iter().flatten().enumerate().map(call).collect::<Result<_>>()?;
    let tool_calls = (!calls.is_empty()).then_some(Value::Array(calls));
    Ok(Message { role, content, name: message.name.clone(), tool_calls, tool_call_id: message.tool_call_id.clone() })
}
