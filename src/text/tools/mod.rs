//! Tools in a conversation: how a model is told of them, how it writes a call, how results go back to it.
//!
//! The chat template decides. One that knows `tools` gets them as it is; for any other they are described in the system message in
//! the Hermes convention, and calls and results of earlier turns are written out as text.

mod forced;
mod reader;

use std::borrow::Cow;

use serde_json::{Value, json};

use super::Message;
use super::chat_template::write_json;

pub use forced::{Besides, Offered, call_grammar};
pub use reader::{CallReader, Said, ToolCall};

/// How a model writes its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolStyle {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen, and every template that says nothing else.
    Hermes,
    /// `{"name": …, "parameters": {…}}` and nothing more, or that after `<|python_tag|>`: Llama 3.
    Llama,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}]`: Mistral.
    Mistral,
}

impl ToolStyle {
    /// What the template's source gives away.
    pub(super) fn of(template: &str) -> Self {
        let has = |mark: &str| template.contains(mark);
        if has("<tool_call>") {
            ToolStyle::Hermes
        } else if has("[TOOL_CALLS]") {
            ToolStyle::Mistral
        } else if has("<|python_tag|>") || has(r#"{"name": function name, "parameters""#) {
            ToolStyle::Llama
        } else {
            ToolStyle::Hermes
        }
    }

    /// What stands before and after the JSON of a call.
    pub fn marks(self) -> (&'static str, &'static str) {
        match self {
            ToolStyle::Hermes => ("<tool_call>", "</tool_call>"),
            ToolStyle::Llama => ("<|python_tag|>", ""),
            ToolStyle::Mistral => ("[TOOL_CALLS]", ""),
        }
    }

    /// The key of a call's arguments.
    pub fn arguments_key(self) -> &'static str {
        if self == ToolStyle::Llama { "parameters" } else { "arguments" }
    }
}

/// Whether the template renders tools itself.
fn knows_tools(template: &str) -> bool {
    template.contains("tools")
}

/// The conversation as the template can take it.
pub(super) fn prepared<'a>(template: &str, messages: &'a [Message], tools: Option<&Value>) -> Cow<'a, [Message]> {
    let plain = |message: &Message| message.tool_calls.is_none() && message.role != "tool";
    if knows_tools(template) {
        return match ToolStyle::of(template) {
            ToolStyle::Mistral if !messages.iter().all(plain) => messages.iter().cloned().map(short_ids).collect(),
            _ => Cow::Borrowed(messages),
        };
    }
    if tools.is_none() && messages.iter().all(plain) {
        return Cow::Borrowed(messages);
    }
    let mut turns: Vec<Message> = Vec::with_capacity(messages.len() + 1);
    let mut results = false;
    for message in messages {
        let result = message.role == "tool";
        let turn = if result { result_turn(message) } else { called_turn(message) };
        match turns.last_mut() {
            // Results of one turn's calls are one turn too.
            Some(last) if result && results => last.content = format!("{}\n{}", last.content, turn.content),
            _ => turns.push(turn),
        }
        results = result;
    }
    if let Some(tools) = tools {
        let text = description(tools);
        match turns.first_mut() {
            Some(first) if first.role == "system" => first.content = format!("{}\n\n{text}", first.content),
            _ => turns.insert(0, Message::new("system", text)),
        }
    }
    Cow::Owned(turns)
}

/// What a model whose template has no room for tools is told of them.
fn description(tools: &Value) -> String {
    format!(
        "You may call functions to answer the user. They are described here, in JSON:\n<tools>\n{}\n</tools>\n\n\
         To call a function, write its name and arguments as JSON within <tool_call></tool_call>:\n\
         <tool_call>\n{{\"name\": <function name>, \"arguments\": <arguments as a JSON object>}}\n</tool_call>\n\
         Results come back within <tool_response></tool_response>.",
        json_text(tools)
    )
}

/// JSON as Python writes it, which is what models have seen.
fn json_text(value: &Value) -> String {
    let mut text = String::new();
    write_json(&mut text, value, None, 0);
    text
}

/// An assistant's turn with its calls written out.
fn called_turn(message: &Message) -> Message {
    let Some(calls) = message.tool_calls.as_ref().and_then(Value::as_array) else { return message.clone() };
    let mut parts = vec![message.content.clone()];
    parts.extend(calls.iter().map(|call| {
        let call = json!({"name": call["function"]["name"], "arguments": call["function"]["arguments"]});
        format!("<tool_call>\n{}\n</tool_call>", json_text(&call))
    }));
    parts.retain(|part| !part.is_empty());
    Message { content: parts.join("\n"), tool_calls: None, ..message.clone() }
}

/// A result as a turn of the user: templates without tools know no other role for it.
fn result_turn(message: &Message) -> Message {
    Message::new("user", format!("<tool_response>\n{}\n</tool_response>", message.content))
}

/// Mistral's templates take ids of nine letters and digits and no others.
fn short_ids(mut message: Message) -> Message {
    let short = |id: &str| {
        let letters: Vec<char> = id.chars().filter(char::is_ascii_alphanumeric).collect();
        let last: String = letters[letters.len().saturating_sub(9)..].iter().collect();
        format!("{last:0>9}")
    };
    for call in message.tool_calls.iter_mut().filter_map(Value::as_array_mut).flatten() {
        call["id"] = json!(short(call["id"].as_str().unwrap_or_default()));
    }
    message.tool_call_id = message.tool_call_id.as_deref().map(short);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{ message.content }}{% endfor %}";

    fn call() -> Message {
        let calls =
            json!([{"id": "call_0123456789ab", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]);
        Message { tool_calls: Some(calls), ..Message::new("assistant", "") }
    }

    fn result(text: &str) -> Message {
        Message { tool_call_id: Some("call_0123456789ab".into()), ..Message::new("tool", text) }
    }

    #[test]
    fn the_template_gives_the_style_away() {
        for (template, style) in [
            ("{%- if tools %}…<tool_call>\\n{\"name\": <function-name>…", ToolStyle::Hermes),
            ("{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS]' }}", ToolStyle::Mistral),
            ("{{- '<|python_tag|>' + tool_call.name }}", ToolStyle::Llama),
            (r#"Respond in the format {"name": function name, "parameters": dictionary …}"#, ToolStyle::Llama),
            // Hermes 3 on Llama's template.
            ("<|python_tag|> <tool_call>", ToolStyle::Hermes),
            (CHATML, ToolStyle::Hermes),
        ] {
            assert_eq!(ToolStyle::of(template), style, "{template}");
        }
    }

    #[test]
    fn a_template_that_knows_tools_gets_the_conversation_as_it_is() {
        let turns = [Message::new("user", "x"), call(), result("2")];
        let tools = json!([{"type": "function"}]);
        assert_eq!(prepared("{{ tools }} <tool_call>", &turns, Some(&tools)), Cow::Borrowed(&turns[..]));
        let mistral = prepared("{{ tools }} [TOOL_CALLS]", &turns, Some(&tools));
        assert_eq!(mistral[1].tool_calls.as_ref().map(|calls| calls[0]["id"].clone()), Some(json!("3456789ab")));
        assert_eq!(mistral[2].tool_call_id.as_deref(), Some("3456789ab"));
        assert_eq!(short_ids(result("")).tool_call_id, mistral[2].tool_call_id);
    }

    #[test]
    fn any_other_template_reads_of_them_in_the_system_message() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let turns = [Message::new("user", "x"), call(), result("2"), result("3"), Message::new("user", "y")];
        let told = prepared(CHATML, &turns, Some(&tools));
        let roles: Vec<&str> = told.iter().map(|turn| turn.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user", "user"]);
        assert!(told[0].content.contains(r#"[{"type": "function", "function": {"name": "f"}}]"#));
        assert_eq!(told[2].content, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>");
        assert_eq!(told[2].tool_calls, None);
        assert_eq!(told[3].content, "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>");
        let own = [Message::new("system", "Be brief."), Message::new("user", "x")];
        assert!(prepared(CHATML, &own, Some(&tools))[0].content.starts_with("Be brief.\n\nYou may call"));
        assert_eq!(prepared(CHATML, &own, None), Cow::Borrowed(&own[..]));
        // History is readable even where no tool is offered any more.
        assert_eq!(prepared(CHATML, &turns, None)[0].role, "user");
        assert!(prepared(CHATML, &turns, None)[1].content.starts_with("<tool_call>"));
    }
}
