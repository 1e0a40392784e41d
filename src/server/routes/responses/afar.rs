//! Responses of a remote role: the conversation goes to its endpoint as a chat, and the pieces of the answer become events here.

use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use serde_json::{Map, Value, json};

use super::events::{Step, Writer};
use super::request::{ResponseRequest, Truncation};
use crate::engine::request::{FinishReason, Usage};
use crate::error::{Error, Result};
use crate::roles::{Chunks, Remote, Start, usage};
use crate::server::forward;
use crate::server::limits::within;
use crate::server::tools::Offer;
use crate::text::{Message, ToolCall};

/// Fields of a response that a chat has not, or has under another name.
const OURS: [&str; 17] = [
    "background",
    "conversation",
    "include",
    "input",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "previous_response_id",
    "prompt",
    "reasoning",
    "store",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "truncation",
];

/// The chat that asks for the same. `body` is the response's; what both have goes on as it is, and the endpoint decides about it.
pub(super) fn chat(
    request: &ResponseRequest,
    offer: &Offer,
    turns: &[Message],
    mut body: Map<String, Value>,
) -> Result<Map<String, Value>> {
    if request.truncation == Some(Truncation::Auto) {
        let text = format!("`{}` is remote: only its endpoint can tell how long a conversation is", request.model);
        return Err(Error::invalid("truncation", text));
    }
    body.retain(|field, _| !OURS.contains(&field.as_str()));
    body.extend(Remote::question(turns)?);
    let shown = offer.shown();
    if shown.is_none() {
        body.remove("parallel_tool_calls");
    }
    let logprobs = request.logprobs();
    let mut format = request.format();
    let format = match format["type"].as_str() {
        Some("json_schema") => {
            // The name is the endpoint's to miss; a schema alone is enough here.
            let mut schema = format.as_object_mut().map(std::mem::take).unwrap_or_default();
            schema.remove("type");
            schema.entry("name").or_insert_with(|| json!("answer"));
            Some(json!({"type": "json_schema", "json_schema": schema}))
        }
        Some("json_object") => Some(format),
        _ => None,
    };
    let fields = [
        ("tools", shown),
        ("tool_choice", offer.choice()),
        ("max_tokens", request.max_output_tokens.map(Value::from)),
        ("logprobs", logprobs.map(|_| json!(true))),
        ("top_logprobs", logprobs.map(Value::from)),
        ("response_format", format),
        ("reasoning_effort", request.reasoning.as_ref().and_then(|reasoning| reasoning.get("effort")).cloned()),
    ];
    body.extend(fields.into_iter().filter_map(|(field, value)| {
        let value = value.filter(|value| !value.is_null())?;
        Some((field.to_owned(), value))
    }));
    Ok(body)
}

/// The events of the answer. Where the client waits for the whole, so does this server: a failure can then be tried again.
pub(super) async fn steps(
    remote: &Remote,
    body: Map<String, Value>,
    streams: bool,
    limit: Option<Duration>,
    writer: Writer,
) -> Result<impl Stream<Item = Step> + 'static> {
    let pieces: Result<Chunks> = match streams {
        true => forward::stream(remote, Start::Chat, body, limit).await,
        false => within(limit, remote.complete(Start::Chat, body)).await.map(|reply| stream::iter([Ok(reply)]).boxed()),
    };
    let pieces = pieces.map_err(|error| match error.param.as_deref() {
        Some("messages") => error.at("input"),
        Some("max_tokens") => error.at("max_output_tokens"),
        Some("response_format") => error.at("text.format"),
        _ => error,
    })?;
    Ok(written(pieces, writer))
}

fn written(mut pieces: Chunks, mut writer: Writer) -> impl Stream<Item = Step> + 'static {
    async_stream::stream! {
        for event in writer.begin() {
            yield Step::Event(event);
        }
        let (mut calls, mut logprobs) = (Vec::new(), Vec::new());
        let (mut reason, mut counts) = (FinishReason::Stop { text: None, token: None }, Usage::default());
        while let Some(piece) = pieces.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    yield Step::Failed(writer.fail(&error), error);
                    return;
                }
            };
            if piece["usage"].is_object() {
                counts = usage(&piece);
            }
            let choice = &piece["choices"][0];
            if choice["finish_reason"] == "length" {
                reason = FinishReason::Length;
            }
            // A whole answer is one piece.
            let said = choice.get("delta").unwrap_or(&choice["message"]);
            logprobs.extend(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default());
            add_calls(&said["tool_calls"], &mut calls);
            let text = said["content"].as_str().unwrap_or_default();
            if !text.is_empty() {
                for event in writer.text(text, std::mem::take(&mut logprobs)) {
                    yield Step::Event(event);
                }
            }
        }
        // One that was cut off in its arguments is none that a client could answer.
        calls.retain(|call| reason != FinishReason::Length || serde_json::from_str::<Value>(&call.arguments).is_ok());
        for call in calls {
            for event in writer.call(call) {
                yield Step::Event(event);
            }
        }
        for event in writer.finish(&reason, counts) {
            yield Step::Event(event);
        }
    }
}

/// Adds what a piece has of calls: each piece says by `index` which one it goes on with, a whole answer has them in their order.
fn add_calls(pieces: &Value, calls: &mut Vec<ToolCall>) {
    for (at, piece) in pieces.as_array().into_iter().flatten().enumerate() {
        let at = piece["index"].as_u64().map_or(at, |index| index as usize).min(calls.len());
        if at == calls.len() {
            calls.push(ToolCall { name: String::new(), arguments: String::new() });
        }
        let text = |key: &str| piece["function"][key].as_str().unwrap_or_default();
        calls[at].name.push_str(text("name"));
        calls[at].arguments.push_str(text("arguments"));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use actix_web::web::Bytes;

    use super::*;
    use crate::server::reply::parse;
    use crate::server::tools::flat_functions;

    fn sent(body: Value) -> Result<Value> {
        let bytes = Bytes::from(body.to_string());
        let request: ResponseRequest = parse(&bytes)?;
        let functions = flat_functions(request.tools.clone())?;
        let offer = Offer::read(functions, request.tool_choice.as_ref(), request.parallel_tool_calls)?;
        let mut turns = Vec::new();
        request.input.clone().read(&mut turns)?;
        chat(&request, &offer, &turns, parse(&bytes)?).map(Value::Object)
    }

    #[test]
    fn a_response_is_asked_for_as_a_chat() {
        let schema = json!({"type": "object"});
        let tool = |name: &str| json!({"type": "function", "name": name, "parameters": schema});
        let nested = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": schema}});
        let body = json!({
            "model": "teacher", "store": false, "metadata": {}, "instructions": "x", "temperature": 0.5, "seed": 7, "stream": true,
            "input": [
                {"role": "user", "content": "Hi"},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{\"a\":1}"},
                {"type": "function_call_output", "call_id": "1", "output": "2"},
            ],
            "max_output_tokens": 9, "include": ["message.output_text.logprobs"], "top_logprobs": 3, "reasoning": {"effort": "low"},
            "tools": [tool("f"), tool("g")], "tool_choice": {"type": "function", "name": "g"}, "parallel_tool_calls": false,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": true}},
        });
        let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}});
        let expected = json!({
            "model": "teacher", "temperature": 0.5, "seed": 7, "stream": true,
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "2", "tool_call_id": "1"},
            ],
            "max_tokens": 9, "logprobs": true, "top_logprobs": 3, "reasoning_effort": "low",
            "tools": [nested("g")], "tool_choice": {"type": "function", "function": {"name": "g"}}, "parallel_tool_calls": false,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}},
        });
        assert_eq!(sent(body).unwrap(), expected);
        let plain = json!({"model": "teacher", "messages": [{"role": "user", "content": "Hi"}]});
        let bare = json!({"model": "teacher", "input": "Hi", "text": {"format": {"type": "text"}},
            "tools": [tool("f")], "tool_choice": "none", "parallel_tool_calls": true});
        assert_eq!(sent(bare).unwrap(), plain);
        let auto = sent(json!({"model": "teacher", "input": "Hi", "truncation": "auto"})).unwrap_err();
        assert_eq!(auto.param.as_deref(), Some("truncation"));
    }

    async fn response(pieces: Vec<Value>) -> Value {
        let writer = Writer::new(json!({"output": []}));
        let pieces = stream::iter(pieces.into_iter().map(Ok)).boxed();
        match written(pieces, writer).collect::<Vec<_>>().await.pop() {
            Some(Step::Event(event)) => event["response"].clone(),
            _ => Value::Null,
        }
    }

    #[tokio::test]
    async fn pieces_of_an_answer_are_put_together() {
        let delta = |delta: Value| json!({"choices": [{"index": 0, "delta": delta, "finish_reason": null}]});
        let call = |index: u64, function: Value| delta(json!({"tool_calls": [{"index": index, "function": function}]}));
        let usage = json!({"prompt_tokens": 5, "completion_tokens": 4});
        let streamed = response(vec![
            delta(json!({"role": "assistant", "content": ""})),
            delta(json!({"content": "He"})),
            delta(json!({"content": "y"})),
            call(0, json!({"name": "f", "arguments": ""})),
            call(0, json!({"arguments": "{\"a\""})),
            call(0, json!({"arguments": ":1}"})),
            call(1, json!({"name": "g", "arguments": "{}"})),
            json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}),
            json!({"choices": [], "usage": usage}),
        ])
        .await;
        let calls = json!([
            {"id": "1", "function": {"name": "f", "arguments": "{\"a\":1}"}},
            {"id": "2", "function": {"name": "g", "arguments": "{}"}},
        ]);
        let message = json!({"role": "assistant", "content": "Hey", "tool_calls": calls});
        let choice = json!({"index": 0, "message": message, "finish_reason": "tool_calls"});
        let whole = response(vec![json!({"choices": [choice], "usage": usage})]).await;
        for response in [streamed, whole] {
            let output = &response["output"];
            assert_eq!((&output[0]["content"][0]["text"], &response["status"]), (&json!("Hey"), &json!("completed")));
            assert_eq!((&output[1]["name"], &output[1]["arguments"]), (&json!("f"), &json!("{\"a\":1}")));
            assert_eq!((&output[2]["name"], output.as_array().map(Vec::len)), (&json!("g"), Some(3)));
            assert_eq!(
                (&response["usage"]["input_tokens"], &response["usage"]["total_tokens"]),
                (&json!(5), &json!(9))
            );
        }
        let cut = response(vec![json!({"choices": [{"message": {"content": "He"}, "finish_reason": "length"}]})]).await;
        assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
    }
}
