//! `POST /v1/chat/completions`, for all three roles.

use std::time::Duration;

use actix_web::{HttpResponse, web};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::{Routes, resolve};
use crate::engine::request::{Event, Usage};
use crate::error::{Code, Error, Result};
use crate::roles::{Start, Target};
use crate::server::answer::{self, Choices, Head};
use crate::server::forward::forward;
use crate::server::messages::{ChatMessage, messages};
use crate::server::reply::{Reply, blocking, error_body, event, parse, sse};
use crate::server::sampling::{Refused, Sampling, StreamOptions};
use crate::server::tools::{ChatTool, Offer, call_id, chat_functions};
use crate::server::{AppState, ServerLimits};
use crate::text::{CallReader, Message, RenderOptions, Said, ToolCall};

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.post("/v1/chat/completions", create);
}

/// Body of a chat completion, besides the sampling fields.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ChatRequest {
    /// `teacher`, `reward`, `student`, or an adapter's name.
    pub(crate) model: String,
    /// The conversation.
    pub(crate) messages: Vec<ChatMessage>,
    /// Most tokens to generate (the new name; wins over `max_tokens`).
    pub(crate) max_completion_tokens: Option<usize>,
    /// Add log-probabilities.
    pub(crate) logprobs: Option<bool>,
    /// Alternatives per token, with `logprobs`.
    #[schema(maximum = 20)]
    pub(crate) top_logprobs: Option<usize>,
    /// Functions the model may call.
    pub(crate) tools: Option<Vec<ChatTool>>,
    /// Whether it may, or must, and which.
    #[schema(value_type = Option<Object>)]
    pub(crate) tool_choice: Option<Value>,
    /// Several calls in one turn (the default).
    pub(crate) parallel_tool_calls: Option<bool>,
    /// End with the header of an assistant turn (the default).
    pub(crate) add_generation_prompt: Option<bool>,
    /// Go on with the last message.
    pub(crate) continue_final_message: Option<bool>,
    /// Put the last message before the answer where both are the assistant's.
    pub(crate) echo: Option<bool>,
    /// Put BOS before what the template wrote.
    pub(crate) add_special_tokens: Option<bool>,
    /// Documents, passed to the chat template.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(crate) documents: Option<Vec<Map<String, Value>>>,
    /// How long to think, passed to the chat template; `none` turns thinking off where the template can.
    pub(crate) reasoning_effort: Option<String>,
    /// Template instead of the model's; only where the server is started with `server.trust_request_chat_template`.
    pub(crate) chat_template: Option<String>,
    /// Extra variables of the template.
    #[schema(value_type = Option<Object>)]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    /// The caller's notes, echoed.
    #[schema(value_type = Option<Object>)]
    pub(crate) metadata: Option<Map<String, Value>>,
}

/// What a request asks of the rendering.
struct Ask {
    logprobs: bool,
    ids: bool,
    stream: StreamOptions,
    n: usize,
    best_of: usize,
    /// What the answer goes on from, with `echo`.
    before: String,
    metadata: Option<Map<String, Value>>,
    /// Reads one choice.
    reader: CallReader,
}

async fn create(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request: ChatRequest = parse(&body)?;
    let sampling: Sampling = parse(&body)?;
    let n = sampling.n()?;
    let best_of = sampling.best_of(n)?;
    let target = resolve(&state, &request.model).await?;
    parse::<Refused>(&body)?.check(&target)?;
    // An endpoint is sent the body as it came.
    let remote = target.remote().filter(|_| target.reward.is_none());
    let turns = if remote.is_some() { Vec::new() } else { messages(&request.messages)? };
    let mut params = sampling.params(&target.defaults)?;
    for (field, most) in [("max_completion_tokens", request.max_completion_tokens), ("max_tokens", params.max_tokens)] {
        if most == Some(0) {
            return Err(Error::invalid(field, format!("`{field}` must be at least 1 in a chat")).into());
        }
    }
    params.max_tokens = request.max_completion_tokens.or(params.max_tokens);
    params.logprobs = match (request.logprobs.unwrap_or(false), request.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, Some(top)) if top > 0 => {
            return Err(Error::invalid("top_logprobs", "`top_logprobs` needs `logprobs: true`").into());
        }
        (false, _) => None,
    };
    if params.logprobs.is_some_and(|top| top > 20) {
        return Err(Error::invalid("top_logprobs", "`top_logprobs` must be at most 20").into());
    }
    let stream = sampling.stream_options()?;
    if target.reward.is_some() {
        if n > 1 {
            return Err(Error::invalid("n", format!("the reward role gives one answer: `n` must be 1, got {n}")).into());
        }
        let stream = sampling.streams().then_some(stream);
        return reward(&target, &turns, state.limits.request_timeout, stream).await;
    }
    if let Some(remote) = remote {
        let stream = sampling.streams().then_some(stream);
        return forward(&target, remote, Start::Chat, parse(&body)?, stream, state.limits.request_timeout).await;
    }
    let (continues, header) = (request.continue_final_message, request.add_generation_prompt);
    let ends = render_options(&state.limits, request.chat_template, continues, header)?;
    let offer = Offer::read(chat_functions(request.tools)?, request.tool_choice.as_ref(), request.parallel_tool_calls)?;
    let mut render = RenderOptions {
        kwargs: template_variables(
            request.chat_template_kwargs,
            request.documents.map(|documents| json!(documents)),
            request.reasoning_effort.as_deref(),
        ),
        ..ends
    };
    let tokenizer = target.tokenizer()?;
    let (reader, asked) = offer.apply(tokenizer, sampling.asked()?, &mut render, &mut params)?;
    let last = turns.last().filter(|turn| request.echo == Some(true) && turn.role == "assistant");
    let before = last.map_or_else(String::new, |turn| turn.content.clone());
    let (words, special) = (tokenizer.clone(), request.add_special_tokens.unwrap_or(false));
    let prompt = blocking(move || words.encode(&words.render(&turns, &render)?, special)).await?;
    let prompt = sampling.truncate(prompt, &target, &params)?;
    sampling.constrain(tokenizer, asked, &mut params).await?;
    let ask = Ask {
        logprobs: params.logprobs.is_some(),
        ids: sampling.return_token_ids.unwrap_or(false),
        stream,
        n,
        best_of,
        before,
        metadata: request.metadata,
        reader,
    };
    if best_of > n {
        params.logprobs = params.logprobs.or(Some(0));
    }
    let choices =
        Choices::submit(&target, std::slice::from_ref(&prompt), &params, best_of, state.limits.request_timeout)
            .map_err(answer::about("messages"))?;
    if sampling.streams() {
        streamed(target, choices, ask, prompt)
    } else {
        whole(target, choices, &ask, &prompt).await
    }
}

/// By which template a conversation is written and how it ends: with the header of an assistant turn, or open.
pub(super) fn render_options(
    limits: &ServerLimits,
    template: Option<String>,
    continues: Option<bool>,
    header: Option<bool>,
) -> Result<RenderOptions> {
    if template.is_some() && !limits.trust_request_chat_template {
        let text = "a template is a program that this server does not take from requests (`server.trust_request_chat_template`)";
        return Err(Error::new(Code::UnsupportedParameter, text).at("chat_template"));
    }
    let continues = continues.unwrap_or(false);
    if continues && header == Some(true) {
        let text = "`continue_final_message` and `add_generation_prompt` exclude each other";
        return Err(Error::invalid("continue_final_message", text));
    }
    Ok(RenderOptions {
        add_generation_prompt: !continues && header.unwrap_or(true),
        continue_final_message: continues,
        template,
        ..RenderOptions::default()
    })
}

/// What the template can read besides the turns.
pub(super) fn template_variables(
    kwargs: Option<Map<String, Value>>,
    documents: Option<Value>,
    effort: Option<&str>,
) -> Map<String, Value> {
    let mut variables = kwargs.unwrap_or_default();
    if let Some(documents) = documents {
        variables.entry("documents").or_insert(documents);
    }
    if let Some(effort) = effort {
        variables.entry("reasoning_effort").or_insert_with(|| json!(effort));
        variables.entry("enable_thinking").or_insert_with(|| json!(effort != "none"));
    }
    variables
}

async fn whole(target: Target, choices: Choices, ask: &Ask, prompt: &[u32]) -> Reply {
    let head = Head::new("chatcmpl-", "chat.completion", &target);
    let tokenizer = target.tokenizer()?;
    let all = answer::collect(choices, ask.best_of).await?;
    let usages: Vec<Usage> = all.iter().map(|choice| choice.usage).collect();
    let all = answer::best(all, ask.best_of, ask.n);
    let mut rendered = Vec::with_capacity(all.len());
    for (index, choice) in all.iter().enumerate() {
        let logprobs = ask.logprobs.then(|| {
            let content: Vec<Value> =
                choice.logprobs.iter().map(|token| answer::chat_logprob(tokenizer, token)).collect();
            json!({"content": content, "refusal": null})
        });
        let reason = choice.reason.as_ref();
        let (text, calls) = parts_of(ask.reader.clone(), &choice.text);
        let text = format!("{}{text}", ask.before);
        // There is no text where it only calls.
        let content = (!text.is_empty() || calls.is_empty()).then_some(text);
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        let finish_reason = reason.map(|reason| answer::finish_reason(reason, calls.len()));
        if !calls.is_empty() {
            message["tool_calls"] = Value::Array(calls);
        }
        let mut body = json!({
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": reason.map_or(Value::Null, answer::stop_reason),
        });
        if ask.ids {
            body["token_ids"] = json!(choice.ids);
        }
        rendered.push(body);
    }
    let mut fields = json!({"choices": rendered, "usage": answer::usage_json(&usages)});
    if ask.ids {
        fields["prompt_token_ids"] = json!(prompt);
    }
    if let Some(first) = all.first().filter(|choice| !choice.prompt.is_empty()) {
        fields["prompt_logprobs"] = answer::prompt_logprobs_json(tokenizer, &first.prompt, usize::MAX);
    }
    if let Some(metadata) = &ask.metadata {
        fields["metadata"] = json!(metadata);
    }
    Ok(head.headers(HttpResponse::Ok().json(head.body(fields))))
}

/// The text and the calls of a whole answer.
fn parts_of(mut reader: CallReader, answer: &str) -> (String, Vec<Value>) {
    let (mut content, mut calls) = (String::new(), Vec::new());
    for said in reader.push(answer).into_iter().chain(reader.finish()) {
        match said {
            Said::Text(text) => content.push_str(&text),
            Said::Call(ToolCall { name, arguments }) => {
                let function = json!({"name": name, "arguments": arguments});
                calls.push(json!({"id": call_id(), "type": "function", "function": function}));
            }
        }
    }
    (content, calls)
}

/// The same as pieces of a stream: a call's id and name come first, then its arguments. `calls` were made before.
fn deltas(said: Vec<Said>, mut calls: usize) -> Vec<Value> {
    let mut deltas = Vec::with_capacity(said.len());
    for said in said {
        match said {
            Said::Text(text) => deltas.push(json!({"content": text})),
            Said::Call(ToolCall { name, arguments }) => {
                let function = json!({"name": name, "arguments": ""});
                let call = json!({"index": calls, "id": call_id(), "type": "function", "function": function});
                deltas.push(json!({"tool_calls": [call]}));
                deltas.push(json!({"tool_calls": [{"index": calls, "function": {"arguments": arguments}}]}));
                calls += 1;
            }
        }
    }
    deltas
}

fn streamed(target: Target, mut choices: Choices, ask: Ask, prompt: Vec<u32>) -> Reply {
    let head = Head::new("chatcmpl-", "chat.completion.chunk", &target);
    let tokenizer = target.tokenizer()?.clone();
    let named = head.clone();
    let chunks = async_stream::stream! {
        let chunk = |choice: Value, usage: Value| {
            let choices = if choice.is_null() { json!([]) } else { json!([choice]) };
            let mut fields = json!({"choices": choices});
            if ask.stream.include_usage {
                fields["usage"] = usage;
            }
            fields
        };
        let so_far = |completion: usize| match ask.stream.continuous_usage_stats {
            true => answer::counted(prompt.len(), 0, completion),
            false => Value::Null,
        };
        for index in 0..ask.n {
            let delta = json!({"role": "assistant", "content": ask.before});
            let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
            let mut fields = chunk(choice, so_far(0));
            if ask.ids && index == 0 {
                fields["prompt_token_ids"] = json!(prompt);
            }
            yield event(&head.body(fields));
        }
        let (mut usages, mut generated, mut readers) = (Vec::new(), 0, vec![ask.reader.clone(); ask.n]);
        while let Some((index, next)) = choices.next().await {
            match next {
                Event::Token { id, text, logprob } => {
                    generated += 1;
                    let before = readers[index].calls();
                    let mut deltas = deltas(readers[index].push(&text), before);
                    if deltas.is_empty() && (logprob.is_some() || ask.ids) {
                        deltas.push(json!({"content": ""}));
                    }
                    // What belongs to the token goes with its first piece.
                    let mut logprob = logprob;
                    for (at, delta) in deltas.into_iter().enumerate() {
                        let logprobs = logprob.take().map(|token| json!({"content": [answer::chat_logprob(&tokenizer, &token)], "refusal": null}));
                        let mut choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null});
                        if ask.ids && at == 0 {
                            choice["token_ids"] = json!([id]);
                        }
                        yield event(&head.body(chunk(choice, so_far(generated))));
                    }
                }
                Event::Done { text, reason, usage } => {
                    let reader = &mut readers[index];
                    let before = reader.calls();
                    let rest = reader.push(&text).into_iter().chain(reader.finish()).collect();
                    for delta in deltas(rest, before) {
                        let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
                        yield event(&head.body(chunk(choice, so_far(generated))));
                    }
                    usages.push(usage);
                    let choice = json!({"index": index, "delta": {}, "logprobs": null,
                        "finish_reason": answer::finish_reason(&reason, reader.calls()), "stop_reason": answer::stop_reason(&reason)});
                    yield event(&head.body(chunk(choice, so_far(generated))));
                }
                Event::Failed(error) => {
                    yield event(&error_body(&error));
                    return;
                }
                Event::Prompt(_) | Event::NextToken(..) | Event::Score(..) => {}
            }
        }
        if ask.stream.include_usage {
            yield event(&head.body(chunk(Value::Null, answer::usage_json(&usages))));
        }
        yield web::Bytes::from_static(b"data: [DONE]\n\n");
    };
    Ok(named.headers(sse(chunks)))
}

/// The reward role's answer, with a top-level `reward`.
async fn reward(target: &Target, turns: &[Message], limit: Option<Duration>, stream: Option<StreamOptions>) -> Reply {
    let answer::Scored { text, logprobs, score } = answer::score(target, turns, limit, "messages").await?;
    let value = score.value;
    let logprobs = json!({"content": logprobs, "refusal": null});
    let usage = answer::counted(score.prompt_tokens, 0, score.completion_tokens);
    let choice = |key: &str, message: Value| json!({"index": 0, key: message, "logprobs": logprobs, "finish_reason": "stop", "stop_reason": null});
    let Some(options) = stream else {
        let head = Head::new("chatcmpl-", "chat.completion", target);
        let choice = choice("message", json!({"role": "assistant", "content": text, "refusal": null}));
        let body = head.body(json!({"choices": [choice], "usage": usage, "reward": value}));
        return Ok(head.headers(HttpResponse::Ok().json(body)));
    };
    let head = Head::new("chatcmpl-", "chat.completion.chunk", target);
    let choice = choice("delta", json!({"role": "assistant", "content": text}));
    let mut fields = json!({"choices": [choice], "reward": value});
    let mut chunks = Vec::with_capacity(3);
    if options.include_usage {
        fields["usage"] = Value::Null;
        chunks.push(event(&head.body(json!({"choices": [], "usage": usage}))));
    }
    chunks.insert(0, event(&head.body(fields)));
    chunks.push(web::Bytes::from_static(b"data: [DONE]\n\n"));
    Ok(head.headers(sse(futures_util::stream::iter(chunks))))
}
