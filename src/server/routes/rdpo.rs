//! Jobs: start, look, follow, steer; and two of their parts alone, synthesis and the behaviours.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix_web::http::header::ACCEPT;
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::error::{Code, Error, Result};
use crate::jobs::{EventRow, Job};
use crate::rdpo::{JobRequest, Sample, find_behavior, known_behaviors, synthesize as run_synthesis};
use crate::server::AppState;
use crate::server::reply::{Reply, blocking, error_body, event, no_method, parse, sse};

/// Events read at a time while a stream is written.
const BATCH: usize = 500;
/// A comment is sent after this long without an event, so that nobody in between closes the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Most conversations of one synthesis request; a job has no such limit.
const MOST_CONVERSATIONS: usize = 256;

pub(super) fn configure(app: &mut web::ServiceConfig) {
    let at = |path: &str| web::resource(path).default_service(web::route().to(no_method));
    app.service(at("/v1/rdpo/behaviors").route(web::get().to(behaviors)));
    app.service(at("/v1/rdpo/synthesize").route(web::post().to(synthesize)));
    app.service(at("/v1/rdpo/train").route(web::post().to(create)).route(web::get().to(list)));
    app.service(at("/v1/rdpo/train/{id}").route(web::get().to(get)));
    app.service(at("/v1/rdpo/train/{id}/events").route(web::get().to(events)));
    app.service(at("/v1/rdpo/train/{id}/pairs").route(web::get().to(pairs)));
    app.service(at("/v1/rdpo/train/{id}/report").route(web::get().to(report)));
    app.service(at("/v1/rdpo/train/{id}/cancel").route(web::post().to(cancel)));
    app.service(at("/v1/rdpo/train/{id}/pause").route(web::post().to(pause)));
    app.service(at("/v1/rdpo/train/{id}/resume").route(web::post().to(resume)));
}

fn query<T: DeserializeOwned>(request: &HttpRequest) -> Result<T> {
    web::Query::<T>::from_query(request.query_string())
        .map(web::Query::into_inner)
        .map_err(|error| Error::new(Code::InvalidValue, format!("the query cannot be read: {error}")))
}

fn limit(given: Option<usize>, usual: usize, most: usize) -> Result<usize> {
    let limit = given.unwrap_or(usual);
    let message = || Error::invalid("limit", format!("must be in 1..={most}, not {limit}"));
    if (1..=most).contains(&limit) { Ok(limit) } else { Err(message()) }
}

/// A job on the wire.
fn shown(job: &Job) -> Result<Value> {
    let mut object = Map::new();
    object.insert("id".into(), json!(job.id));
    object.insert("object".into(), json!("rdpo.job"));
    if let Value::Object(fields) = serde_json::to_value(job)? {
        object.extend(fields.into_iter().filter(|(key, _)| key != "id"));
    }
    object.insert("adapter_version".into(), job.result["adapter"]["version"].clone());
    Ok(Value::Object(object))
}

/// The same for a list: without the long parts, which the job itself and its report have.
fn shown_short(job: &Job) -> Result<Value> {
    let mut object = shown(job)?;
    for (key, list) in [("request", "prompts"), ("request", "pairs"), ("request", "eval_prompts")] {
        if let Some(part) = object[key].as_object_mut() {
            part.remove(list);
        }
    }
    if let Some(report) = object["result"].get_mut("report").and_then(Value::as_object_mut) {
        report.remove("samples");
    }
    Ok(object)
}

async fn create(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request = JobRequest::parse(&parse(&body)?)?;
    let job = blocking(move || {
        request.check(&state.roles)?;
        state.jobs.submit(&serde_json::to_value(&request)?)
    })
    .await?;
    Ok(HttpResponse::Ok().json(shown(&job)?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    after: Option<String>,
    limit: Option<usize>,
}

async fn list(state: web::Data<AppState>, request: HttpRequest) -> Reply {
    let query: ListQuery = query(&request)?;
    let limit = limit(query.limit, 20, 100)?;
    let page = blocking(move || state.jobs.store().list(query.after.as_deref(), limit)).await?;
    let data = page.data.iter().map(shown_short).collect::<Result<Vec<_>>>()?;
    let (first, last) = (page.data.first().map(|job| &job.id), page.data.last().map(|job| &job.id));
    Ok(HttpResponse::Ok()
        .json(json!({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": page.has_more})))
}

async fn read(state: &web::Data<AppState>, id: String) -> Result<Job> {
    let state = state.clone();
    blocking(move || state.jobs.store().get(&id)).await
}

async fn get(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    Ok(HttpResponse::Ok().json(shown(&read(&state, id.into_inner()).await?)?))
}

async fn report(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let job = read(&state, id.into_inner()).await?;
    match job.result.get("report") {
        Some(report) => Ok(HttpResponse::Ok().json(report)),
        None => {
            let message = format!("job `{}` has no report: it is {}", job.id, job.status.name());
            Err(Error::not_found(message).into())
        }
    }
}

async fn cancel(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let job = blocking(move || state.jobs.cancel(&id)).await?;
    Ok(HttpResponse::Ok().json(shown(&job)?))
}

async fn pause(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let job = blocking(move || state.jobs.pause(&id)).await?;
    Ok(HttpResponse::Ok().json(shown(&job)?))
}

async fn resume(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let job = blocking(move || state.jobs.resume(&id)).await?;
    Ok(HttpResponse::Ok().json(shown(&job)?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PairsQuery {
    after: Option<usize>,
    limit: Option<usize>,
}

/// The pairs kept, in their order; `after` is the index of the last one seen.
async fn pairs(state: web::Data<AppState>, id: web::Path<String>, request: HttpRequest) -> Reply {
    let query: PairsQuery = query(&request)?;
    let limit = limit(query.limit, 100, 1000)?;
    let rows = blocking(move || {
        state.jobs.store().get(&id)?;
        state.jobs.store().rows(&id, "pair")
    })
    .await?;
    let mut rest: Vec<Value> = rows
        .into_iter()
        .filter(|(index, _)| query.after.is_none_or(|after| *index > after))
        .take(limit + 1)
        .map(|(index, mut pair)| {
            if let Some(pair) = pair.as_object_mut() {
                pair.insert("index".into(), json!(index));
            }
            pair
        })
        .collect();
    let has_more = rest.len() > limit;
    rest.truncate(limit);
    Ok(HttpResponse::Ok().json(json!({"object": "list", "data": rest, "has_more": has_more})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    after: Option<i64>,
    limit: Option<usize>,
    stream: Option<bool>,
}

async fn events(state: web::Data<AppState>, id: web::Path<String>, request: HttpRequest) -> Reply {
    let (id, query): (String, EventsQuery) = (id.into_inner(), query(&request)?);
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let accepts = header(ACCEPT.as_str()).is_some_and(|accept| accept.contains("text/event-stream"));
    if query.stream.unwrap_or(accepts) {
        // A browser that reconnects says in a header where it was.
        let seen = header("last-event-id").and_then(|last| last.parse().ok());
        read(&state, id.clone()).await?;
        return Ok(follow(state, id, seen.or(query.after).unwrap_or(0)));
    }
    let limit = limit(query.limit, 100, 1000)?;
    let after = query.after.unwrap_or(0);
    let mut data = blocking(move || state.jobs.store().events(&id, after, limit + 1)).await?;
    let has_more = data.len() > limit;
    data.truncate(limit);
    Ok(HttpResponse::Ok().json(json!({"object": "list", "data": data, "has_more": has_more})))
}

/// Every event after `after`, then those to come, until the job has ended.
fn follow(state: web::Data<AppState>, id: String, mut after: i64) -> HttpResponse {
    let mut changes = state.jobs.watch();
    sse(async_stream::stream! {
        loop {
            changes.borrow_and_update();
            let (store, id) = (state.jobs.store().clone(), id.clone());
            // The status is read first: whatever was said before a final one is then among the events.
            let read = blocking(move || Ok((store.get(&id)?.status, store.events(&id, after, BATCH)?))).await;
            let (status, rows) = match read {
                Ok(read) => read,
                Err(error) => {
                    yield event(&error_body(&error));
                    break;
                }
            };
            for row in &rows {
                after = row.id;
                yield numbered(row);
            }
            if rows.len() == BATCH {
                continue;
            }
            if status.is_final() {
                yield web::Bytes::from_static(b"data: [DONE]\n\n");
                break;
            }
            match tokio::time::timeout(KEEP_ALIVE, changes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_closed)) => break,
                Err(_quiet) => yield web::Bytes::from_static(b": still here\n\n"),
            }
        }
    })
}

fn numbered(row: &EventRow) -> web::Bytes {
    let data = event(row);
    let mut bytes = format!("id: {}\n", row.id).into_bytes();
    bytes.extend_from_slice(&data);
    bytes.into()
}

/// `{behavior, prompts, synthesis, seed}`: the fields of a job that matter here, checked as a job's are.
fn synthesis_request(body: &Value) -> Result<JobRequest> {
    const FIELDS: [&str; 4] = ["behavior", "prompts", "synthesis", "seed"];
    let unknown = body.as_object().and_then(|fields| fields.keys().find(|key| !FIELDS.contains(&key.as_str())));
    if let Some(key) = unknown {
        let message = format!("`{key}` is not a field of this request; it has: {}", FIELDS.join(", "));
        return Err(Error::new(Code::UnknownField, message).at(key.as_str()));
    }
    if body.is_object() && body["prompts"].as_array().is_none_or(Vec::is_empty) {
        return Err(Error::invalid("prompts", "must be a list with at least one prompt"));
    }
    let request = JobRequest::parse(body)?;
    let conversations = request.prompts.len().saturating_mul(request.synthesis.samples_per_prompt);
    if conversations > MOST_CONVERSATIONS {
        let message =
            format!("asks for {conversations} conversations; more than {MOST_CONVERSATIONS} are a job's work");
        return Err(Error::invalid("prompts", message));
    }
    Ok(request)
}

async fn synthesize(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request = synthesis_request(&parse(&body)?)?;
    let behavior = find_behavior(&state.roles, &request.behavior)?;
    let prompts: Vec<_> = request.prompts.iter().cloned().enumerate().collect();
    let found: Arc<Mutex<Vec<Sample>>> = Arc::default();
    let mut keep = {
        let found = found.clone();
        move |sample: Sample| {
            found.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
            Ok(())
        }
    };
    run_synthesis(&state.roles, &behavior, &prompts, &request.synthesis, request.seed, &mut keep).await?;
    let mut samples = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
    samples.sort_by_key(|sample| (sample.prompt_index, sample.sample));
    let prompt: usize = samples.iter().map(|sample| sample.prompt_tokens).sum();
    let completion: usize = samples.iter().map(|sample| sample.completion_tokens).sum();
    Ok(HttpResponse::Ok().json(json!({
        "object": "list",
        "data": samples,
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    })))
}

async fn behaviors(state: web::Data<AppState>) -> Reply {
    let known = blocking(move || known_behaviors(&state.roles)).await?;
    Ok(HttpResponse::Ok().json(json!({"object": "list", "data": known})))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::jobs::Status;

    #[test]
    fn synthesis_takes_its_own_fields_only() {
        let request = synthesis_request(&json!({"prompts": ["a"], "synthesis": {"max_tokens": 8}, "seed": 3})).unwrap();
        assert_eq!((request.prompts.len(), request.synthesis.max_tokens, request.seed), (1, 8, 3));
        let param = |body: Value| synthesis_request(&body).unwrap_err().param.unwrap();
        assert_eq!(param(json!({"prompts": ["a"], "loss": {}})), "loss");
        assert_eq!(param(json!({"prompts": []})), "prompts");
        assert_eq!(param(json!({"behavior": "safety"})), "prompts");
        assert_eq!(param(json!({"prompts": ["a"], "synthesis": {"rounds": 9}})), "synthesis.rounds");
        assert_eq!(
            param(json!({"prompts": ["a", "a", "a", "a", "a"], "synthesis": {"samples_per_prompt": 64}})),
            "prompts"
        );
    }

    #[test]
    fn a_job_on_the_wire() {
        let job = Job {
            id: "rdpo-1".into(),
            status: Status::Succeeded,
            request: json!({"prompts": ["a"], "seed": 1}),
            created_at: 1,
            started_at: Some(2),
            finished_at: Some(3),
            error: None,
            progress: json!({}),
            result: json!({"adapter": {"version": 4}, "report": {"win_rate": 0.5, "samples": [1]}}),
        };
        let full = shown(&job).unwrap();
        assert_eq!((&full["object"], &full["status"]), (&json!("rdpo.job"), &json!("succeeded")));
        assert_eq!((&full["adapter_version"], &full["request"]["prompts"]), (&json!(4), &json!(["a"])));
        let short = shown_short(&job).unwrap();
        assert_eq!((&short["request"], &short["result"]["report"]), (&json!({"seed": 1}), &json!({"win_rate": 0.5})));
    }

    #[test]
    fn limits_are_named() {
        assert_eq!(limit(None, 20, 100).unwrap(), 20);
        assert_eq!(limit(Some(0), 20, 100).unwrap_err().param.unwrap(), "limit");
        assert!(limit(Some(101), 20, 100).is_err());
    }
}
