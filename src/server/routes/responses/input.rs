//! Input items of a response: read into turns, and listed again.

use std::fmt;

use serde::Deserialize;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::error::{Error, Result};
use crate::server::messages::{Content, role};
use crate::server::reply::read_from_objects_only;
use crate::server::tools::earlier_call;
use crate::text::Message;

/// A text, which is the user's, or items.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    Text(String),
    Items(Vec<InputItem>),
}

/// A message, a call that was made, or what it gave.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct InputItem {
    /// `message` (also where it is left out), `function_call`, `function_call_output`, or `reasoning`, which is not read.
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    /// Of a message: `system`, `developer`, `user` or `assistant`.
    pub(crate) role: Option<String>,
    /// Of a message.
    pub(crate) content: Option<Content>,
    /// Joins a call and its output.
    pub(crate) call_id: Option<String>,
    /// Of a call: the function.
    pub(crate) name: Option<String>,
    /// Of a call: the text of a JSON object.
    pub(crate) arguments: Option<String>,
    /// What a call gave.
    pub(crate) output: Option<Content>,
    /// Its id, where it came from a response.
    pub(crate) id: Option<String>,
}

read_from_objects_only!(InputItem);

// By hand and not `untagged`, so that an error names the item.
impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(source: D) -> std::result::Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Input;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of items")
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<Input, E> {
                Ok(Input::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> std::result::Result<Input, A::Error> {
                Deserialize::deserialize(SeqAccessDeserializer::new(items)).map(Input::Items)
            }
        }
        source.deserialize_any(Either)
    }
}

impl Input {
    /// Adds the turns to a conversation, and returns the items as they are listed.
    pub(super) fn read(self, turns: &mut Vec<Message>) -> Result<Vec<Value>> {
        let items = match self {
            Input::Text(text) => vec![InputItem {
                role: Some("user".into()),
                content: Some(Content::Text(text)),
                ..InputItem::default()
            }],
            Input::Items(items) => items,
        };
        let mut listed = Vec::with_capacity(items.len());
        for (at, item) in items.into_iter().enumerate() {
            listed.extend(one(at, item, turns)?);
        }
        Ok(listed)
    }
}

fn one(at: usize, item: InputItem, turns: &mut Vec<Message>) -> Result<Option<Value>> {
    let path = |field: &str| format!("input[{at}].{field}");
    let missing = |field: &str| Error::invalid(path(field), "is missing");
    let id = |prefix: &str| item.id.clone().unwrap_or_else(|| format!("{prefix}{}", uuid::Uuid::new_v4().simple()));
    match item.kind.as_deref() {
        None | Some("message") => {
            let given = item.role.as_deref().ok_or_else(|| missing("role"))?;
            if given == "tool" {
                return Err(Error::invalid(path("role"), "results come as items of type `function_call_output`"));
            }
            let content = item.content.as_ref().ok_or_else(|| missing("content"))?.text(&path("content"))?;
            turns.push(Message::new(role(given, || path("role"))?, content.as_str()));
            let part = if given == "assistant" {
                json!({"type": "output_text", "text": content, "annotations": []})
            } else {
                json!({"type": "input_text", "text": content})
            };
            let (id, status) = (id("msg_"), "completed");
            Ok(Some(json!({"id": id, "type": "message", "role": given, "status": status, "content": [part]})))
        }
        Some("function_call") => {
            let name = item.name.as_deref().ok_or_else(|| missing("name"))?;
            let call_id = item.call_id.as_deref().ok_or_else(|| missing("call_id"))?;
            let arguments = item.arguments.as_deref().ok_or_else(|| missing("arguments"))?;
            let call = earlier_call(call_id, name, Some(&json!(arguments)), || path("arguments"))?;
            add_call(turns, call);
            Ok(Some(json!({"id": id("fc_"), "type": "function_call", "call_id": call_id, "name": name,
                "arguments": arguments, "status": "completed"})))
        }
        Some("function_call_output") => {
            let call_id = item.call_id.as_deref().ok_or_else(|| missing("call_id"))?;
            let output = item.output.as_ref().ok_or_else(|| missing("output"))?.text(&path("output"))?;
            turns.push(Message { tool_call_id: Some(call_id.to_owned()), ..Message::new("tool", output.as_str()) });
            Ok(Some(json!({"id": id("fco_"), "type": "function_call_output", "call_id": call_id, "output": output,
                "status": "completed"})))
        }
        // Clients send back whatever a response had; no template has room for this.
        Some("reasoning") => Ok(None),
        Some(other) => Err(Error::invalid(path("type"), format!("items of type `{other}` are not known here"))),
    }
}

/// Calls of one turn stand in one turn, together with the text before them.
fn add_call(turns: &mut Vec<Message>, call: Value) {
    if turns.last().is_none_or(|turn| turn.role != "assistant") {
        turns.push(Message::new("assistant", ""));
    }
    if let Some(turn) = turns.last_mut() {
        match turn.tool_calls.as_mut().and_then(Value::as_array_mut) {
            Some(calls) => calls.push(call),
            None => turn.tool_calls = Some(json!([call])),
        }
    }
}

/// The turn that a response's output items are.
pub(super) fn answer_turn(output: &[Value]) -> Message {
    let mut turns = vec![Message::new("assistant", "")];
    for item in output {
        match item["type"].as_str() {
            Some("function_call") => {
                let name = item["name"].as_str().unwrap_or_default();
                let id = item["call_id"].as_str().unwrap_or_default();
                // Only JSON objects are read as calls, so this always is one.
                if let Ok(call) = earlier_call(id, name, item.get("arguments"), String::new) {
                    add_call(&mut turns, call);
                }
            }
            _ => turns[0].content.push_str(item["content"][0]["text"].as_str().unwrap_or_default()),
        }
    }
    turns.swap_remove(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use actix_web::web::Bytes;

    use super::*;
    use crate::server::reply::parse;

    #[derive(Deserialize)]
    struct Body {
        input: Input,
    }

    fn read(input: Value) -> Result<(Vec<Message>, Vec<Value>)> {
        let body: Body = parse(&Bytes::from(json!({"input": input}).to_string()))?;
        let mut turns = Vec::new();
        let listed = body.input.read(&mut turns)?;
        Ok((turns, listed))
    }

    #[test]
    fn items_become_turns() {
        let (turns, listed) = read(json!("Hi")).unwrap();
        assert_eq!(turns, [Message::new("user", "Hi")]);
        assert_eq!(listed[0]["content"], json!([{"type": "input_text", "text": "Hi"}]));
        let (turns, listed) = read(json!([
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "Well.", "annotations": []}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{\"a\": 1}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": ""},
            {"type": "function_call_output", "call_id": "1", "output": "7"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "8"}]},
        ]))
        .unwrap();
        let said: Vec<_> = turns.iter().map(|turn| (turn.role.as_str(), turn.content.as_str())).collect();
        assert_eq!(
            said,
            [("system", "Be brief."), ("user", "a\nb"), ("assistant", "Well."), ("tool", "7"), ("tool", "8")]
        );
        let calls = turns[2].tool_calls.as_ref().unwrap();
        assert_eq!((&calls[0]["function"]["arguments"], &calls[1]["id"]), (&json!({"a": 1}), &json!("2")));
        assert_eq!(turns[4].tool_call_id.as_deref(), Some("2"));
        assert_eq!(listed.len(), 7);
        assert_eq!((&listed[2]["id"], &listed[3]["type"]), (&json!("msg_1"), &json!("function_call")));
        // What a response said is the same turn as what a client would send back.
        assert_eq!(answer_turn(&listed[2..5]), turns[2]);
    }

    #[test]
    fn errors_name_the_item() {
        for (input, param) in [
            (json!(3), "input"),
            (json!({"role": "user"}), "input"),
            (json!([["user"]]), "input[0]"),
            (json!([{"content": "x"}]), "input[0].role"),
            (json!([{"role": "user", "content": "x"}, {"role": "user"}]), "input[1].content"),
            (json!([{"role": "tool", "content": "x"}]), "input[0].role"),
            (json!([{"role": "robot", "content": "x"}]), "input[0].role"),
            (json!([{"role": "user", "content": [{"type": "input_image"}]}]), "input[0].content[0]"),
            (json!([{"role": 3}]), "input[0].role"),
            (json!([{"type": "web_search_call"}]), "input[0].type"),
            (json!([{"type": "function_call", "call_id": "1", "name": "f"}]), "input[0].arguments"),
            (json!([{"type": "function_call", "call_id": "1", "name": "f", "arguments": "x"}]), "input[0].arguments"),
            (json!([{"type": "function_call_output", "output": "x"}]), "input[0].call_id"),
            (json!([{"type": "function_call_output", "call_id": "1"}]), "input[0].output"),
        ] {
            assert_eq!(read(input.clone()).unwrap_err().param.as_deref(), Some(param), "{input}");
        }
    }
}
