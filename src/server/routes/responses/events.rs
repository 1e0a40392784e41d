//! A response while it is made: the events of its stream, and the object they end with.

use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};

use crate::engine::request::{Event, FinishReason, Usage};
use crate::error::{Code, Error};
use crate::server::answer::{self, Choices};
use crate::server::tools::call_id;
use crate::text::{CallReader, Said, Tokenizer, ToolCall};

/// Writes a response's events in their order.
pub(super) struct Writer {
    /// The object, its output empty until the end.
    response: Value,
    output: Vec<Value>,
    /// The message that is being written.
    open: Option<Message>,
    sent: u64,
}

/// A message item on its way.
struct Message {
    id: String,
    text: String,
    logprobs: Vec<Value>,
}

/// What a stream of a response yields.
pub(super) enum Step {
    /// An event; the last has the whole response.
    Event(Value),
    /// It failed: the last event, and why.
    Failed(Value, Error),
}

impl Writer {
    /// `response`: the object without output.
    pub(super) fn new(response: Value) -> Self {
        Writer { response, output: Vec::new(), open: None, sent: 0 }
    }

    fn event(&mut self, kind: &str, fields: Value) -> Value {
        let mut event = json!({"type": kind, "sequence_number": self.sent});
        if let (Value::Object(event), Value::Object(fields)) = (&mut event, fields) {
            event.extend(fields);
        }
        self.sent += 1;
        event
    }

    /// The first two events.
    pub(super) fn begin(&mut self) -> Vec<Value> {
        ["response.created", "response.in_progress"]
            .map(|kind| self.event(kind, json!({"response": self.response.clone()})))
            .into()
    }

    /// Text of the answer; `logprobs` are those of the tokens it came with.
    pub(super) fn text(&mut self, text: &str, logprobs: Vec<Value>) -> Vec<Value> {
        let mut events = self.opened();
        let at = self.output.len();
        if let Some(message) = &mut self.open {
            message.text.push_str(text);
            message.logprobs.extend(logprobs.iter().cloned());
            let fields = json!({"item_id": message.id, "output_index": at, "content_index": 0, "delta": text,
                "logprobs": logprobs});
            events.push(self.event("response.output_text.delta", fields));
        }
        events
    }

    fn opened(&mut self) -> Vec<Value> {
        if self.open.is_some() {
            return Vec::new();
        }
        let message =
            Message { id: format!("msg_{}", uuid::Uuid::new_v4().simple()), text: String::new(), logprobs: Vec::new() };
        let (id, at) = (message.id.clone(), self.output.len());
        let item = json!({"id": id, "type": "message", "role": "assistant", "status": "in_progress", "content": []});
        self.open = Some(message);
        let item = self.event("response.output_item.added", json!({"output_index": at, "item": item}));
        let part = json!({"item_id": id, "output_index": at, "content_index": 0, "part": text_part("", &[])});
        vec![item, self.event("response.content_part.added", part)]
    }

    /// Ends the open message, if there is one.
    fn closed(&mut self, status: &str) -> Vec<Value> {
        let Some(Message { id, text, logprobs }) = self.open.take() else { return Vec::new() };
        let at = self.output.len();
        let part = text_part(&text, &logprobs);
        let place = json!({"item_id": id, "output_index": at, "content_index": 0});
        let with = |key: &str, value: Value| {
            let mut fields = place.clone();
            fields[key] = value;
            fields
        };
        let mut done = with("text", json!(text));
        done["logprobs"] = json!(logprobs);
        let item = json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": [part]});
        self.output.push(item.clone());
        vec![
            self.event("response.output_text.done", done),
            self.event("response.content_part.done", with("part", part)),
            self.event("response.output_item.done", json!({"output_index": at, "item": item})),
        ]
    }

    /// A call.
    pub(super) fn call(&mut self, call: ToolCall) -> Vec<Value> {
        let mut events = self.closed("completed");
        let ToolCall { name, arguments } = call;
        let (id, at) = (format!("fc_{}", uuid::Uuid::new_v4().simple()), self.output.len());
        let mut item = json!({"id": id, "type": "function_call", "status": "in_progress", "call_id": call_id(),
            "name": name, "arguments": ""});
        let place = |key: &str| json!({"item_id": id, "output_index": at, key: arguments});
        let mut done = place("arguments");
        done["name"] = json!(name);
        events.push(self.event("response.output_item.added", json!({"output_index": at, "item": item})));
        events.push(self.event("response.function_call_arguments.delta", place("delta")));
        events.push(self.event("response.function_call_arguments.done", done));
        item["arguments"] = json!(arguments);
        item["status"] = json!("completed");
        self.output.push(item.clone());
        events.push(self.event("response.output_item.done", json!({"output_index": at, "item": item})));
        events
    }

    /// The last events.
    pub(super) fn finish(&mut self, reason: &FinishReason, usage: Usage) -> Vec<Value> {
        let whole = *reason != FinishReason::Length;
        let status = if whole { "completed" } else { "incomplete" };
        let mut events = if self.output.is_empty() { self.opened() } else { Vec::new() };
        events.extend(self.closed(status));
        self.response["status"] = json!(status);
        self.response["output"] = Value::Array(std::mem::take(&mut self.output));
        self.response["usage"] = usage_json(usage);
        if !whole {
            self.response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        let response = json!({"response": self.response});
        events.push(self.event(&format!("response.{status}"), response));
        events
    }

    /// The event of a failure.
    pub(super) fn fail(&mut self, error: &Error) -> Value {
        let (_, kind, code) = error.code.row();
        // OpenAI's list of codes is closed; ours that is not on it is the server's error.
        let code = if error.code == Code::RateLimited { code } else { kind };
        self.response["status"] = json!("failed");
        self.response["error"] = json!({"code": code, "message": error.to_string()});
        self.event("response.failed", json!({"response": self.response}))
    }
}

fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

/// The events of an answer as it comes. Dropping the stream cancels the answer.
pub(super) fn steps(
    mut choices: Choices,
    mut reader: CallReader,
    mut writer: Writer,
    tokenizer: Arc<Tokenizer>,
) -> impl Stream<Item = Step> {
    async_stream::stream! {
        for event in writer.begin() {
            yield Step::Event(event);
        }
        // Those of tokens whose text is not certain yet.
        let mut logprobs = Vec::new();
        while let Some((_, next)) = choices.next().await {
            let (said, end) = match next {
                Event::Token { text, logprob, .. } => {
                    logprobs.extend(logprob.map(|token| answer::chat_logprob(&tokenizer, &token)));
                    (reader.push(&text), None)
                }
                Event::Done { text, reason, usage } => {
                    let mut said = reader.push(&text);
                    said.extend(reader.finish());
                    (said, Some((reason, usage)))
                }
                Event::Failed(error) => {
                    yield Step::Failed(writer.fail(&error), error);
                    return;
                }
                Event::Prompt(_) | Event::NextToken(..) | Event::Score(..) => continue,
            };
            for said in said {
                let mine = std::mem::take(&mut logprobs);
                let events = match said {
                    Said::Text(text) => writer.text(&text, mine),
                    Said::Call(call) => writer.call(call),
                };
                for event in events {
                    yield Step::Event(event);
                }
            }
            if let Some((reason, usage)) = end {
                for event in writer.finish(&reason, usage) {
                    yield Step::Event(event);
                }
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(events: &[Value]) -> Vec<&str> {
        events.iter().filter_map(|event| event["type"].as_str()?.strip_prefix("response.")).collect()
    }

    #[test]
    fn the_events_of_text_and_a_call_in_their_order() {
        let mut writer = Writer::new(json!({"id": "resp_1", "status": "in_progress", "output": []}));
        let call = ToolCall { name: "f".into(), arguments: "{\"a\":1}".into() };
        let mut events = writer.begin();
        events.extend(writer.text("He", vec![json!(1)]));
        events.extend(writer.text("y", vec![json!(2)]));
        events.extend(writer.call(call));
        events.extend(writer.finish(&FinishReason::Stop { text: None, token: None }, Usage::default()));
        let message = ["output_item.added", "content_part.added", "output_text.delta", "output_text.delta"];
        let closing = ["output_text.done", "content_part.done", "output_item.done"];
        let call =
            ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"];
        let expected = [&["created", "in_progress"][..], &message, &closing, &call, &["completed"]].concat();
        assert_eq!(kinds(&events), expected);
        let numbers: Vec<u64> = events.iter().filter_map(|event| event["sequence_number"].as_u64()).collect();
        assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
        let response = &events[events.len() - 1]["response"];
        assert_eq!(response["output"][0]["content"], json!([text_part("Hey", &[json!(1), json!(2)])]));
        assert_eq!(
            (&response["output"][1]["arguments"], &response["status"]),
            (&json!("{\"a\":1}"), &json!("completed"))
        );
        assert_eq!(events[2]["item"]["id"], events[8]["item"]["id"]);
    }

    #[test]
    fn an_answer_without_a_word_is_an_empty_message_and_a_cut_one_incomplete() {
        let mut writer = Writer::new(json!({}));
        let events = writer.finish(&FinishReason::Length, Usage::default());
        let expected = [
            "output_item.added",
            "content_part.added",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "incomplete",
        ];
        assert_eq!(kinds(&events), expected);
        let response = &events[5]["response"];
        assert_eq!(response["output"][0]["status"], "incomplete");
        assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    }

    #[test]
    fn a_failure_has_a_code_of_openais() {
        let mut writer = Writer::new(json!({}));
        let event = writer.fail(&Error::internal("broken"));
        assert_eq!(event["response"]["error"], json!({"code": "server_error", "message": "broken"}));
    }
}
