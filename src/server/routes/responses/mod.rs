//! `/v1/responses`, for all three roles: create and stream, fetch, go on from, forget.

mod afar;
mod events;
mod input;
mod request;
mod store;

use std::pin::pin;
use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, Route, web};
use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};

use self::events::{Step, Writer, steps};
pub(crate) use self::input::InputItem;
use self::input::answer_turn;
pub(crate) use self::request::{ResponseRequest, Truncation};
use self::store::Stored;
pub(in crate::server) use self::store::StoredResponses;
use super::rdpo::{Query, limit};
use super::{Routes, reads, resolve};
use crate::engine::request::{FinishReason, Usage};
use crate::error::{Error, Result};
use crate::roles::Target;
use crate::server::AppState;
use crate::server::answer::{self, Choices, Head};
use crate::server::forward::outgoing;
use crate::server::reply::{Reply, blocking, named_event, parse, sse};
use crate::server::sampling::{Refused, Sampling};
use crate::server::tools::{Offer, flat_functions};
use crate::text::{Message, RenderOptions};

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.post("/v1/responses", create);
    let one: Vec<(&'static str, Route)> = vec![("get", reads().to(fetch)), ("delete", web::delete().to(forget))];
    routes.on("/v1/responses/{id}", one);
    routes.post("/v1/responses/{id}/cancel", cancel);
    routes.get("/v1/responses/{id}/input_items", input_items);
}

fn unknown(id: &str) -> Error {
    Error::not_found(format!(
        "Response with id '{id}' not found: it was never stored, deleted, or made room for others."
    ))
}

async fn create(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request: ResponseRequest = parse(&body)?;
    let sampling: Sampling = parse(&body)?;
    let target = resolve(&state, &request.model).await?;
    parse::<Refused>(&body)?.check(&target)?;
    request.check(&sampling)?;
    sampling.stream_options()?;
    let mut turns = match &request.previous_response_id {
        None => Vec::new(),
        Some(id) => {
            let previous = state.responses.get(id).ok_or_else(|| unknown(id).at("previous_response_id"))?;
            previous.turns.clone()
        }
    };
    let mut params = sampling.params(&target.defaults)?;
    params.max_tokens = request.max_output_tokens.or(params.max_tokens);
    params.logprobs = request.logprobs();
    let offer =
        Offer::read(flat_functions(request.tools.clone())?, request.tool_choice.as_ref(), request.parallel_tool_calls)?;
    let head = Head::new("resp_", "response", &target);
    let response = request.response(&head, &params);
    let input = request.input.clone().read(&mut turns)?;
    if turns.is_empty() {
        return Err(Error::invalid("input", "`input` is empty").into());
    }
    let limit = state.limits.request_timeout;
    let record = Record { state, keep: request.stores(), input, turns: turns.clone() };
    if target.reward.is_some() {
        let steps = scored(&target, &turns, limit, response).await?;
        return answered(&head, steps, record, sampling.streams()).await;
    }
    if let Some(instructions) = &request.instructions {
        match turns.first_mut() {
            Some(first) if first.role == "system" => first.content = format!("{instructions}\n\n{}", first.content),
            _ => turns.insert(0, Message::new("system", instructions.as_str())),
        }
    }
    let asked = request.asked(&sampling)?;
    if let Some(remote) = target.remote() {
        let body = afar::chat(&request, &offer, &turns, outgoing(&target, parse(&body)?)?)?;
        let steps = afar::steps(remote, body, sampling.streams(), limit, Writer::new(response)).await?;
        return answered(&head, steps, record, sampling.streams()).await;
    }
    let mut render = RenderOptions { kwargs: request.variables(), ..RenderOptions::default() };
    let tokenizer = target.tokenizer()?.clone();
    let (reader, asked) = offer.apply(&tokenizer, asked, &mut render, &mut params)?;
    sampling.constrain(&tokenizer, asked, &mut params).await?;
    let (asked, room, truncation) = (target.clone(), params.max_tokens, request.truncation.unwrap_or_default());
    let prompt = blocking(move || encode(&asked, &turns, &render, room, truncation)).await?;
    let prompt = sampling.truncate(prompt, &target, &params)?;
    let choices = Choices::submit(&target, &[prompt], &params, 1, limit).map_err(answer::about("input"))?;
    let steps = steps(choices, reader, Writer::new(response), tokenizer);
    answered(&head, steps, record, sampling.streams()).await
}

/// The reward role's answer: its score as text and as a top-level `reward`.
async fn scored(
    target: &Target,
    turns: &[Message],
    limit: Option<Duration>,
    mut response: Value,
) -> Result<impl Stream<Item = Step> + 'static> {
    let answer::Scored { text, logprobs, score } = answer::score(target, turns, limit, "input").await?;
    response["reward"] = json!(score.value);
    let usage =
        Usage { prompt_tokens: score.prompt_tokens, cached_tokens: 0, completion_tokens: score.completion_tokens };
    let mut writer = Writer::new(response);
    let mut events = writer.begin();
    events.extend(writer.text(&text, logprobs));
    events.extend(writer.finish(&FinishReason::Stop { text: None, token: None }, usage));
    Ok(futures_util::stream::iter(events.into_iter().map(Step::Event)))
}

/// The prompt; with `auto`, without as many of the oldest turns as must go to leave room for the answer.
fn encode(
    target: &Target,
    turns: &[Message],
    render: &RenderOptions,
    max_tokens: Option<usize>,
    truncation: Truncation,
) -> Result<Vec<u32>> {
    let tokenizer = target.tokenizer()?;
    let whole = tokenizer.encode_chat(turns, render).map_err(|error| match error.param.as_deref() {
        Some("messages") => error.at("input"),
        _ => error,
    })?;
    let room = target.max_model_len()?.saturating_sub(max_tokens.unwrap_or(1));
    if truncation == Truncation::Disabled || whole.len() <= room {
        return Ok(whole);
    }
    let first = turns.iter().take_while(|turn| turn.role == "system").count();
    let starts: Vec<usize> = (first + 1..turns.len()).filter(|at| turns[*at].role == "user").collect();
    let from = |at: usize| tokenizer.encode_chat(&[&turns[..first], &turns[at..]].concat(), render);
    let cut = starts.partition_point(|at| from(*at).is_ok_and(|prompt| prompt.len() > room));
    // Where even the last turn does not fit, the engine says so.
    starts.get(cut).map_or(Ok(whole), |at| from(*at))
}

/// What is kept of a response when it is whole.
struct Record {
    state: web::Data<AppState>,
    keep: bool,
    input: Vec<Value>,
    turns: Vec<Message>,
}

impl Record {
    /// Takes the last event of a response.
    fn finished(&mut self, event: &Value) {
        let (Some(id), Some(output)) = (event["response"]["id"].as_str(), event["response"]["output"].as_array())
        else {
            return;
        };
        if self.keep {
            let (input, mut turns) = (std::mem::take(&mut self.input), std::mem::take(&mut self.turns));
            turns.push(answer_turn(output));
            self.state.responses.keep(id, Stored { response: event["response"].clone(), input, turns });
        }
    }
}

/// Whether a response is over with this event.
fn is_last(event: &Value) -> bool {
    matches!(event["type"].as_str(), Some("response.completed" | "response.incomplete"))
}

async fn answered(head: &Head, steps: impl Stream<Item = Step> + 'static, mut record: Record, streams: bool) -> Reply {
    if streams {
        let pieces = steps.map(move |step| {
            let event = match step {
                Step::Event(event) => event,
                Step::Failed(event, _) => event,
            };
            if is_last(&event) {
                record.finished(&event);
            }
            named_event(event["type"].as_str().unwrap_or_default(), &event)
        });
        return Ok(head.headers(sse(pieces)));
    }
    let mut steps = pin!(steps);
    while let Some(step) = steps.next().await {
        match step {
            Step::Failed(_, error) => return Err(error.into()),
            Step::Event(event) if is_last(&event) => {
                record.finished(&event);
                return Ok(head.headers(HttpResponse::Ok().json(&event["response"])));
            }
            Step::Event(_) => {}
        }
    }
    Err(Error::internal("a response ended without its last event. This is a bug.").into())
}

async fn fetch(state: web::Data<AppState>, id: web::Path<String>, request: HttpRequest) -> Reply {
    let query = Query::read(&request, &["stream", "starting_after", "include", "include[]", "include_obfuscation"])?;
    if query.get("stream")?.unwrap_or(false) {
        return Err(Error::invalid("stream", "only a response that is being made can be streamed").into());
    }
    let stored = state.responses.get(&id).ok_or_else(|| unknown(&id))?;
    Ok(HttpResponse::Ok().json(&stored.response))
}

async fn forget(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    if !state.responses.forget(&id) {
        return Err(unknown(&id).into());
    }
    Ok(HttpResponse::Ok().json(json!({"id": *id, "object": "response", "deleted": true})))
}

async fn cancel(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    state.responses.get(&id).ok_or_else(|| unknown(&id))?;
    let text = "only responses made in the background can be cancelled; any other ends when its connection is closed";
    Err(Error::invalid("id", text).into())
}

async fn input_items(state: web::Data<AppState>, id: web::Path<String>, request: HttpRequest) -> Reply {
    let query = Query::read(&request, &["after", "limit", "order", "include", "include[]"])?;
    let limit = limit(query.get("limit")?, 20, 100)?;
    let stored = state.responses.get(&id).ok_or_else(|| unknown(&id))?;
    let mut items: Vec<&Value> = stored.input.iter().collect();
    match query.get::<String>("order")?.as_deref() {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => return Err(Error::invalid("order", "`order` is `asc` or `desc`").into()),
    }
    let first = match query.get::<String>("after")? {
        None => 0,
        Some(after) => {
            let at = items.iter().position(|item| item["id"] == after.as_str());
            at.ok_or_else(|| Error::invalid("after", format!("there is no item `{after}`")))? + 1
        }
    };
    let (rest, has_more) = (&items[first..], items.len() - first > limit);
    let page = &rest[..rest.len().min(limit)];
    let end = |item: Option<&&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let ends = (end(page.first()), end(page.last()));
    Ok(HttpResponse::Ok()
        .json(json!({"object": "list", "data": page, "first_id": ends.0, "last_id": ends.1, "has_more": has_more})))
}
