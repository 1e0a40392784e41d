//! Completions of a remote role, of chats and texts: the body goes to an endpoint, the answer comes back under this server's names.

use std::time::Duration;

use actix_web::{HttpResponse, web};
use futures_util::StreamExt;
use serde_json::{Map, Value};
use tokio::time::{Instant, timeout_at};

use super::answer::Head;
use super::limits::{timed_out, within};
use super::reply::{Reply, error_body, event, sse};
use super::sampling::StreamOptions;
use crate::error::{Error, Result};
use crate::roles::{Chunks, Remote, Start, Target};

/// Parameters that are about tokens of the engine here.
const NATIVE: [&str; 4] = ["prompt_logprobs", "return_token_ids", "truncate_prompt_tokens", "best_of"];
/// What the head of an answer says of its maker; the endpoint's own words about itself stay there.
const HEAD: [&str; 6] = ["id", "object", "created", "model", "adapter_version", "adapter_generation"];

/// The body as an endpoint gets it, without what only an engine here could do.
pub(super) fn outgoing(target: &Target, mut body: Map<String, Value>) -> Result<Map<String, Value>> {
    body.retain(|_, value| !value.is_null());
    match NATIVE.into_iter().find(|field| body.get(*field).is_some_and(|value| *value != false)) {
        None => Ok(body),
        Some(field) => {
            let text = format!("`{}` is remote: `{field}` is about tokens, which are at its endpoint", target.model);
            Err(Error::invalid(field, text))
        }
    }
}

/// The chunks of a remote role's answer, which ends within `limit`.
pub(super) async fn stream(
    remote: &Remote,
    start: Start,
    body: Map<String, Value>,
    limit: Option<Duration>,
) -> Result<Chunks> {
    // A limit that no clock reaches is none.
    let end = limit.and_then(|limit| Some((limit, Instant::now().checked_add(limit)?)));
    let Some((limit, end)) = end else { return remote.stream(start, body).await };
    let mut chunks = within(Some(limit), remote.stream(start, body)).await?;
    Ok(Box::pin(async_stream::stream! {
        loop {
            match timeout_at(end, chunks.next()).await {
                Ok(Some(chunk)) => yield chunk,
                Ok(None) => return,
                Err(_) => {
                    yield Err(timed_out(limit));
                    return;
                }
            }
        }
    }))
}

/// Answers a request whose common fields were checked. The endpoint decides about all others: its refusal is passed on.
pub(super) async fn forward(
    target: &Target,
    remote: &Remote,
    start: Start,
    body: Map<String, Value>,
    streams: Option<StreamOptions>,
    limit: Option<Duration>,
) -> Reply {
    let mut body = outgoing(target, body)?;
    let (prefix, object) = match start {
        Start::Chat if streams.is_some() => ("chatcmpl-", "chat.completion.chunk"),
        Start::Chat => ("chatcmpl-", "chat.completion"),
        Start::Text => ("cmpl-", "text_completion"),
    };
    let head = Head::new(prefix, object, target);
    let Some(options) = streams else {
        body.remove("stream_options");
        let reply = within(limit, remote.complete(start, body)).await?;
        return Ok(head.headers(HttpResponse::Ok().json(under(&head, reply))));
    };
    let mut chunks = stream(remote, start, body, limit).await?;
    let named = head.clone();
    let pieces = async_stream::stream! {
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(mut chunk) => {
                    // The counts were asked for by this server; the client sees them only where it asked too.
                    if !options.include_usage && let Some(fields) = chunk.as_object_mut() {
                        fields.remove("usage");
                    }
                    let counts_only = chunk["choices"].as_array().is_some_and(Vec::is_empty);
                    if options.include_usage || !counts_only {
                        yield event(&under(&head, chunk));
                    }
                }
                Err(error) => {
                    yield event(&error_body(&error));
                    return;
                }
            }
        }
        yield web::Bytes::from_static(b"data: [DONE]\n\n");
    };
    Ok(named.headers(sse(pieces)))
}

/// An answer or a chunk with this server's head.
fn under(head: &Head, mut reply: Value) -> Value {
    if let Some(fields) = reply.as_object_mut() {
        fields.retain(|key, _| !HEAD.contains(&key.as_str()));
    }
    head.body(reply)
}
