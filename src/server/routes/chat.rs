//! `POST /v1/chat/completions`, for all three roles.

use actix_web::{HttpResponse, web};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::Routes;
use crate::engine::request::{Event, Usage};
use crate::error::{Error, Result};
use crate::roles::Target;
use crate::server::AppState;
use crate::server::answer::{self, Choices, Head};
use crate::server::reply::{Reply, error_body, event, parse, read_from_objects_only, sse};
use crate::server::sampling::{Refused, Sampling, StreamOptions};
use crate::text::{Message, RenderOptions};

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.post("/v1/chat/completions", create);
}

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
    /// `text`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The text.
    pub(crate) text: Option<String>,
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
    #[schema(value_type = Option<Vec<Object>>)]
    pub(crate) tool_calls: Option<Vec<Map<String, Value>>>,
    /// The call a tool turn answers.
    pub(crate) tool_call_id: Option<String>,
}

read_from_objects_only!(Part, ChatMessage);

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
    /// Tools, passed to the chat template.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(crate) tools: Option<Vec<Map<String, Value>>>,
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
    /// Template instead of the model's.
    pub(crate) chat_template: Option<String>,
    /// Extra variables of the template.
    #[schema(value_type = Option<Object>)]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    /// The caller's notes, echoed.
    #[schema(value_type = Option<Object>)]
    pub(crate) metadata: Option<Map<String, Value>>,
}

/// Turns as the template sees them; parts that are not text are a 400.
pub(crate) fn messages(given: &[ChatMessage]) -> Result<Vec<Message>> {
    if given.is_empty() {
        return Err(Error::invalid("messages", "`messages` is empty"));
    }
    given.iter().enumerate().map(|(index, message)| one_message(index, message)).collect()
}

fn one_message(index: usize, message: &ChatMessage) -> Result<Message> {
    let role = match message.role.as_str() {
        "developer" => "system",
        role @ ("system" | "user" | "assistant" | "tool") => role,
        other => {
            let text = format!("`{other}` is not a role: system, developer, user, assistant and tool are");
            return Err(Error::invalid(format!("messages[{index}].role"), text));
        }
    };
    let content = match &message.content {
        Some(Content::Text(text)) => text.clone(),
        Some(Content::Parts(parts)) => {
            let mut joined = Vec::with_capacity(parts.len());
            for (at, part) in parts.iter().enumerate() {
                match &part.text {
                    Some(text) if ["text", "refusal"].contains(&part.kind.as_str()) => joined.push(text.as_str()),
                    _ => {
                        let path = format!("messages[{index}].content[{at}]");
                        return Err(Error::invalid(
                            path,
                            format!("parts of type `{}` cannot be read, only text can", part.kind),
                        ));
                    }
                }
            }
            joined.join("\n")
        }
        None if message.tool_calls.is_some() => String::new(),
        None => return Err(Error::invalid(format!("messages[{index}].content"), "the message has no content")),
    };
    let (tool_calls, tool_call_id) =
        (message.tool_calls.as_ref().map(|calls| json!(calls)), message.tool_call_id.clone());
    Ok(Message { role: role.to_owned(), content, name: message.name.clone(), tool_calls, tool_call_id })
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
}

async fn create(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request: ChatRequest = parse(&body)?;
    let sampling: Sampling = parse(&body)?;
    let n = sampling.n()?;
    let best_of = sampling.best_of(n)?;
    parse::<Refused>(&body)?.check()?;
    let target = state.roles.resolve(&request.model)?;
    let turns = messages(&request.messages)?;
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
        let stream = sampling.streams().then_some(stream);
        return reward(&target, &turns, stream).await;
    }
    let continues = request.continue_final_message.unwrap_or(false);
    if continues && request.add_generation_prompt == Some(true) {
        let text = "`continue_final_message` and `add_generation_prompt` exclude each other";
        return Err(Error::invalid("continue_final_message", text).into());
    }
    let render = RenderOptions {
        add_generation_prompt: !continues && request.add_generation_prompt.unwrap_or(true),
        continue_final_message: continues,
        tools: request.tools.as_ref().map(|tools| json!(tools)),
        kwargs: template_variables(&request),
        template: request.chat_template.clone(),
    };
    let tokenizer = target.tokenizer()?;
    let rendered = tokenizer.render(&turns, &render)?;
    let prompt = tokenizer.encode(&rendered, request.add_special_tokens.unwrap_or(false))?;
    let prompt = sampling.truncate(prompt, &target, &params)?;
    let last = turns.last().filter(|turn| request.echo == Some(true) && turn.role == "assistant");
    let before = last.map_or_else(String::new, |turn| turn.content.clone());
    sampling.constrain(tokenizer, &mut params).await?;
    let ask = Ask {
        logprobs: params.logprobs.is_some(),
        ids: sampling.return_token_ids.unwrap_or(false),
        stream,
        n,
        best_of,
        before,
        metadata: request.metadata.clone(),
    };
    if best_of > n {
        params.logprobs = params.logprobs.or(Some(0));
    }
    let choices = Choices::submit(&target, std::slice::from_ref(&prompt), &params, best_of).map_err(about_messages)?;
    if sampling.streams() {
        streamed(target, choices, ask, prompt)
    } else {
        whole(target, choices, &ask, &prompt).await
    }
}

/// What the template can read besides the turns.
fn template_variables(request: &ChatRequest) -> Map<String, Value> {
    let mut variables = request.chat_template_kwargs.clone().unwrap_or_default();
    if let Some(documents) = &request.documents {
        variables.entry("documents").or_insert_with(|| json!(documents));
    }
    if let Some(effort) = &request.reasoning_effort {
        variables.entry("reasoning_effort").or_insert_with(|| json!(effort));
        variables.entry("enable_thinking").or_insert_with(|| json!(effort != "none"));
    }
    variables
}

/// The engine's `prompt` is this route's `messages`.
fn about_messages(error: Error) -> Error {
    if error.param.as_deref() == Some("prompt") { error.at("messages") } else { error }
}

async fn whole(target: Target, choices: Choices, ask: &Ask, prompt: &[u32]) -> Reply {
    let head = Head::new("chatcmpl", "chat.completion", &target);
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
        let mut body = json!({
            "index": index,
            "message": {"role": "assistant", "content": format!("{}{}", ask.before, choice.text), "refusal": null},
            "logprobs": logprobs,
            "finish_reason": reason.map(answer::finish_reason),
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
        fields["prompt_logprobs"] = answer::prompt_logprobs_json(tokenizer, &first.prompt);
    }
    if let Some(metadata) = &ask.metadata {
        fields["metadata"] = json!(metadata);
    }
    let mut response = HttpResponse::Ok();
    head.headers(&mut response);
    Ok(response.json(head.body(fields)))
}

fn streamed(target: Target, mut choices: Choices, ask: Ask, prompt: Vec<u32>) -> Reply {
    let head = Head::new("chatcmpl", "chat.completion.chunk", &target);
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
        let (mut usages, mut generated) = (Vec::new(), 0);
        while let Some((index, next)) = choices.next().await {
            match next {
                Event::Token { id, text, logprob } => {
                    generated += 1;
                    if text.is_empty() && logprob.is_none() && !ask.ids {
                        continue;
                    }
                    let logprobs = logprob.map(|token| json!({"content": [answer::chat_logprob(&tokenizer, &token)], "refusal": null}));
                    let mut choice = json!({"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": null});
                    if ask.ids {
                        choice["token_ids"] = json!([id]);
                    }
                    yield event(&head.body(chunk(choice, so_far(generated))));
                }
                Event::Done { text, reason, usage } => {
                    if !text.is_empty() {
                        let choice = json!({"index": index, "delta": {"content": text}, "logprobs": null, "finish_reason": null});
                        yield event(&head.body(chunk(choice, so_far(generated))));
                    }
                    usages.push(usage);
                    let choice = json!({"index": index, "delta": {}, "logprobs": null,
                        "finish_reason": answer::finish_reason(&reason), "stop_reason": answer::stop_reason(&reason)});
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
    let mut response = sse(chunks);
    add_headers(&mut response, &named);
    Ok(response)
}

pub(super) fn add_headers(response: &mut HttpResponse, head: &Head) {
    use actix_web::http::header::{HeaderName, HeaderValue};
    let mut add = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    };
    add("x-adapter-version", &head.adapter_version.to_string());
    if let Some(generation) = &head.adapter_generation {
        add("x-adapter-generation", generation);
    }
}

/// The reward role scores the last assistant turn: `reward:<float>` as content, one entry of log-probabilities, and a top-level
/// `reward` (the convention of hosted reward models).
async fn reward(target: &Target, turns: &[Message], stream: Option<StreamOptions>) -> Reply {
    if turns.last().is_none_or(|turn| turn.role != "assistant") {
        let text = "the reward model scores the last assistant message; the conversation ends with another turn";
        return Err(Error::invalid("messages", text).into());
    }
    let Some(reward) = &target.reward else { return Err(Error::no_model(&target.model).into()) };
    let score = reward.score(turns, None).await.map_err(about_messages)?;
    let content = format!("reward:{}", score.value);
    let logprobs = json!({"content": [{"token": "reward", "logprob": score.value, "bytes": null, "top_logprobs": []}], "refusal": null});
    let usage = answer::counted(score.prompt_tokens, 0, score.completion_tokens);
    let Some(options) = stream else {
        let head = Head::new("chatcmpl", "chat.completion", target);
        let message = json!({"role": "assistant", "content": content, "refusal": null});
        let choice =
            json!({"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop", "stop_reason": null});
        let mut response = HttpResponse::Ok();
        head.headers(&mut response);
        return Ok(response.json(head.body(json!({"choices": [choice], "usage": usage, "reward": score.value}))));
    };
    let head = Head::new("chatcmpl", "chat.completion.chunk", target);
    let delta = json!({"role": "assistant", "content": content});
    let choice =
        json!({"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": "stop", "stop_reason": null});
    let mut fields = json!({"choices": [choice], "reward": score.value});
    let mut chunks = Vec::with_capacity(3);
    if options.include_usage {
        fields["usage"] = Value::Null;
        chunks.push(event(&head.body(json!({"choices": [], "usage": usage}))));
    }
    chunks.insert(0, event(&head.body(fields)));
    chunks.push(web::Bytes::from_static(b"data: [DONE]\n\n"));
    let mut response = sse(futures_util::stream::iter(chunks));
    add_headers(&mut response, &head);
    Ok(response)
}
